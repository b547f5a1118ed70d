//! When routers hear how busy the replica is: when something changed, and not more often than every 20 ms.

use std::time::{Duration, Instant};

use swallow_rpc::worker::v1::{LoadReport, load_report::Health};
use swallow_schedule::Load;

use super::rates::Rates;

const EVERY: Duration = Duration::from_millis(20);

/// What was reported last.
#[derive(Debug, Default)]
pub(super) struct Reports {
    seq: u64,
    last: Option<(Instant, Load, Health)>,
    /// Something changed too soon after the last report.
    held_back: bool,
}

impl Reports {
    /// The report to send to everybody now, if one is due.
    pub(super) fn due(
        &mut self,
        load: &Load,
        rates: &Rates,
        health: Health,
        now: Instant,
    ) -> Option<LoadReport> {
        if let Some((at, told, told_health)) = &self.last {
            let changed = told != load || *told_health != health;
            self.held_back = changed && now.duration_since(*at) < EVERY;
            if !changed || self.held_back {
                return None;
            }
        }
        self.last = Some((now, *load, health));
        self.held_back = false;
        Some(self.now(load, rates, health))
    }

    /// When the report that was held back may go.
    pub(super) fn next(&self) -> Option<Instant> {
        self.last.filter(|_| self.held_back).map(|(at, ..)| at + EVERY)
    }

    /// The present state, whether or not it changed.
    pub(super) fn now(&mut self, load: &Load, rates: &Rates, health: Health) -> LoadReport {
        self.seq += 1;
        LoadReport {
            seq: self.seq,
            running: load.running,
            waiting: load.waiting,
            pending_prefill_tokens: load.pending_prefill_tokens,
            kv_blocks_used: load.blocks_held,
            kv_blocks_total: load.blocks_total,
            step_us_ewma: rates.step_us(),
            prefill_tokens_per_second: rates.prefill_per_second(),
            decode_tokens_per_second: rates.decode_per_second(),
            preemptions_total: load.preemptions,
            prefix_query_tokens_total: load.prefix_query_tokens,
            prefix_hit_tokens_total: load.prefix_hit_tokens,
            health: health.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_once_and_not_too_often() {
        let (mut reports, start) = (Reports::default(), Instant::now());
        let mut due = |running, after_ms| {
            let load = Load {
                running,
                ..Load::default()
            };
            let now = start + Duration::from_millis(after_ms);
            let report = reports
                .due(&load, &Rates::default(), Health::Serving, now)
                .map(|report| report.running);
            (
                report,
                reports.next().map(|at| at.duration_since(start).as_millis()),
            )
        };
        assert_eq!(due(0, 0), (Some(0), None));
        assert_eq!(due(0, 50), (None, None), "nothing changed");
        assert_eq!(due(1, 60), (Some(1), None));
        assert_eq!(due(2, 70), (None, Some(80)), "too soon");
        assert_eq!(due(3, 81), (Some(3), None));
        assert_eq!(due(4, 90), (None, Some(101)));
        assert_eq!(due(3, 95), (None, None), "back to what was told");
    }
}
