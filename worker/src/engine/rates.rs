//! How fast the replica is, smoothed over about the last twenty steps.

use std::time::Duration;

/// Weight of the newest step.
const ALPHA: f64 = 0.1;

/// Exponentially weighted means; 0 until the first sample.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rates {
    step_us: f64,
    prefill_per_second: f64,
    decode_per_second: f64,
}

impl Rates {
    /// Counts one step of so many rows of prefill and of decode. A mixed step says something about prefill only
    /// where prefill is most of it.
    pub(super) fn step(&mut self, prefill: u32, decode: u32, took: Duration) {
        let seconds = took.as_secs_f64().max(1e-9);
        blend(&mut self.step_us, seconds * 1e6);
        if prefill > decode {
            blend(&mut self.prefill_per_second, f64::from(prefill) / seconds);
        }
        if decode > 0 {
            blend(&mut self.decode_per_second, f64::from(decode) / seconds);
        }
    }

    pub(super) fn step_us(&self) -> u32 {
        whole(self.step_us)
    }

    pub(super) fn prefill_per_second(&self) -> u32 {
        whole(self.prefill_per_second)
    }

    pub(super) fn decode_per_second(&self) -> u32 {
        whole(self.decode_per_second)
    }
}

fn blend(mean: &mut f64, sample: f64) {
    *mean = if *mean == 0.0 {
        sample
    } else {
        *mean + ALPHA * (sample - *mean)
    };
}

/// Rounded; a float's cast saturates.
fn whole(value: f64) -> u32 {
    value.round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_follow_and_mixed_steps_count_for_decode_alone() {
        let mut rates = Rates::default();
        assert_eq!(rates.prefill_per_second(), 0);
        rates.step(500, 0, Duration::from_millis(500));
        assert_eq!((rates.prefill_per_second(), rates.decode_per_second()), (1000, 0));
        rates.step(1, 4, Duration::from_millis(10));
        assert_eq!(
            (rates.prefill_per_second(), rates.decode_per_second()),
            (1000, 400)
        );
        assert_eq!(rates.step_us(), 451_000);
    }
}
