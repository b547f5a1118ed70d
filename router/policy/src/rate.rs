//! How fast a queue drains, and from that, when it is worth to come back.
//!
//! Only time in which somebody waited counts: an idle hour says nothing about how fast the replicas are.

use std::time::Duration;

/// Shortest advice. HTTP's Retry-After counts whole seconds.
pub const RETRY_MIN: Duration = Duration::from_secs(1);
/// Longest advice: after a minute the world has changed.
pub const RETRY_MAX: Duration = Duration::from_secs(60);
/// What is advised before anything was measured.
const RETRY_UNKNOWN: Duration = Duration::from_secs(5);
/// How far back the measurement reaches: long against a step, short against a rollout.
const MEMORY: Duration = Duration::from_secs(10);

/// Tokens a second that leave a queue, weighted by e^(-age / 10 s).
#[derive(Clone, Debug, Default)]
pub struct DrainRate {
    tokens: f64,
    seconds: f64,
    /// Since when the busy time is not yet in `seconds`; `None` while the queue is empty.
    busy_since: Option<Duration>,
}

impl DrainRate {
    /// The queue went from empty to not empty.
    pub fn busy(&mut self, now: Duration) {
        self.busy_since.get_or_insert(now);
    }

    /// The queue is empty.
    pub fn idle(&mut self, now: Duration) {
        self.advance(now);
        self.busy_since = None;
    }

    /// Tokens left the queue for a replica.
    pub fn left(&mut self, tokens: u64, now: Duration) {
        self.advance(now);
        self.tokens += tokens as f64;
    }

    /// Tokens a second, `None` before the first measurement.
    pub fn tokens_per_second(&self, now: Duration) -> Option<f64> {
        let mut upto = self.clone();
        upto.advance(now);
        (upto.tokens > 0.0 && upto.seconds > 0.0).then(|| upto.tokens / upto.seconds)
    }

    /// How long `tokens` take to drain, within `RETRY_MIN..=RETRY_MAX`.
    pub fn retry_after(&self, tokens: u64, now: Duration) -> Duration {
        let Some(rate) = self.tokens_per_second(now) else {
            return RETRY_UNKNOWN;
        };
        let seconds = (tokens as f64 / rate).clamp(RETRY_MIN.as_secs_f64(), RETRY_MAX.as_secs_f64());
        Duration::from_secs_f64(seconds)
    }

    fn advance(&mut self, now: Duration) {
        let Some(since) = self.busy_since else { return };
        let passed = now.saturating_sub(since);
        self.busy_since = Some(since.max(now));
        let keep = (-passed.as_secs_f64() / MEMORY.as_secs_f64()).exp();
        self.tokens *= keep;
        // The integral of the weight over the time that passed, so that a steady rate is measured exactly.
        self.seconds = self.seconds * keep + MEMORY.as_secs_f64() * (1.0 - keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_steady_rate_is_measured_and_idle_time_is_not() {
        let mut rate = DrainRate::default();
        assert_eq!(rate.retry_after(1_000_000, ms(0)), RETRY_UNKNOWN);
        rate.busy(ms(0));
        for i in 1..=400 {
            rate.left(100, ms(i * 50));
        }
        let measured = rate.tokens_per_second(ms(20_000)).expect("measured");
        assert!((measured - 2_000.0).abs() < 40.0, "{measured}");
        rate.idle(ms(20_000));
        let later = rate.tokens_per_second(ms(3_600_000)).expect("measured");
        assert!(
            (later - measured).abs() < 1.0,
            "an idle hour changes nothing: {later}"
        );
        let wait = rate.retry_after(20_000, ms(3_600_000)).as_secs_f64();
        assert!((9.0..11.0).contains(&wait), "{wait}");
        assert_eq!(rate.retry_after(1, ms(3_600_000)), RETRY_MIN);
        assert_eq!(rate.retry_after(u64::MAX, ms(3_600_000)), RETRY_MAX);
    }

    #[test]
    fn a_stall_lowers_the_rate() {
        let mut rate = DrainRate::default();
        rate.busy(ms(0));
        for i in 1..=100 {
            rate.left(100, ms(i * 50));
        }
        let before = rate.tokens_per_second(ms(5_000)).expect("measured");
        let stalled = rate.tokens_per_second(ms(25_000)).expect("measured");
        assert!(stalled < before / 4.0, "{before} then {stalled}");
    }
}
