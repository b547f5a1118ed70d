//! When a failed group is started again, and when it is left alone.
//!
//! Each failure is a moment. Failures within the window before the last one count together; the wait doubles with
//! each, and one more than is allowed quarantines the group. That judgement does not change as time passes, so a
//! quarantined group stays down until the spec or the retry annotation changes. A checkpoint that the worker refuses
//! is quarantined at once: the same files give the same answer.

use crate::{
    Failure, SeenGroup, Timestamp, after,
    model::{GroupReason, Recovery},
};

/// What to do about a failed group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Start it again, with these failures on record.
    Restart {
        /// Failures within the window, oldest first, the last one included.
        crashes: Vec<Timestamp>,
    },
    /// Start it again with a clean record, because the user asked for that.
    Retry,
    /// Start it again at this time.
    Wait {
        /// The end of the backoff.
        until: Timestamp,
    },
    /// Leave it down.
    Quarantine,
}

/// Judges the failure of a group; `retry` is the model's retry annotation.
pub fn judge(
    group: &SeenGroup,
    failure: &Failure,
    recovery: &Recovery,
    retry: Option<&str>,
    now: Timestamp,
) -> Judgement {
    if group.retry.as_deref() != retry {
        return Judgement::Retry;
    }
    let crashes = counted(group, failure, recovery);
    if failure.reason == GroupReason::BadCheckpoint || crashes.len() > recovery.max_restarts as usize {
        return Judgement::Quarantine;
    }
    let until = after(failure.at, backoff_seconds(recovery, crashes.len()));
    if now >= until {
        Judgement::Restart { crashes }
    } else {
        Judgement::Wait { until }
    }
}

/// Failures that count together with `failure`, oldest first, itself included.
pub fn counted(group: &SeenGroup, failure: &Failure, recovery: &Recovery) -> Vec<Timestamp> {
    let mut crashes: Vec<Timestamp> = group
        .crashes
        .iter()
        .copied()
        .filter(|crash| after(*crash, recovery.window_seconds) > failure.at)
        .collect();
    crashes.push(failure.at);
    crashes
}

/// The wait after the `n`th failure in the window.
fn backoff_seconds(recovery: &Recovery, n: usize) -> u32 {
    let doublings = u32::try_from(n.saturating_sub(1)).unwrap_or(u32::MAX);
    let doubled = 1_u32
        .checked_shl(doublings)
        .and_then(|factor| recovery.backoff.initial_seconds.checked_mul(factor));
    doubled.unwrap_or(u32::MAX).min(recovery.backoff.max_seconds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Phase;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).expect("in range")
    }

    fn group(crashes: &[i64], retry: Option<&str>) -> SeenGroup {
        SeenGroup {
            name: "m-abc-0".into(),
            uid: "1".into(),
            revision: "abc".into(),
            index: 0,
            phase: Phase::Warming,
            leaving: false,
            node_lost: false,
            progress_at: at(0),
            crashes: crashes.iter().map(|second| at(*second)).collect(),
            retry: retry.map(str::to_owned),
            requests: 0,
            memory: None,
        }
    }

    fn failure(second: i64, reason: GroupReason) -> Failure {
        Failure {
            at: at(second),
            reason,
            message: String::new(),
        }
    }

    #[test]
    fn the_wait_doubles_up_to_its_bound() {
        let recovery = Recovery::default();
        let waits: Vec<u32> = [1, 2, 3, 4, 9, 10, 33, 100]
            .map(|n| backoff_seconds(&recovery, n))
            .to_vec();
        assert_eq!(waits, [1, 2, 4, 8, 256, 300, 300, 300]);
        let none = Recovery {
            backoff: crate::model::Backoff {
                initial_seconds: 0,
                max_seconds: 0,
            },
            ..recovery
        };
        assert_eq!(backoff_seconds(&none, 50), 0);
    }

    #[test]
    fn it_waits_then_restarts_then_stays_down() {
        let recovery = Recovery {
            max_restarts: 2,
            window_seconds: 100,
            ..Recovery::default()
        };
        let crash = |second| failure(second, GroupReason::Crashed);
        let judged =
            |crashes: &[i64], last, now| judge(&group(crashes, None), &crash(last), &recovery, None, at(now));
        assert_eq!(judged(&[], 10, 10), Judgement::Wait { until: at(11) });
        assert_eq!(
            judged(&[], 10, 11),
            Judgement::Restart {
                crashes: vec![at(10)]
            }
        );
        assert_eq!(judged(&[10], 20, 21), Judgement::Wait { until: at(22) });
        assert_eq!(judged(&[10, 20], 30, 1_000_000), Judgement::Quarantine);
        // A failure that is older than the window counts no more.
        assert_eq!(
            judged(&[10, 20], 110, 112),
            Judgement::Restart {
                crashes: vec![at(20), at(110)]
            }
        );
    }

    #[test]
    fn a_refused_checkpoint_stays_down_until_retried() {
        let recovery = Recovery::default();
        let bad = failure(10, GroupReason::BadCheckpoint);
        assert_eq!(
            judge(&group(&[], None), &bad, &recovery, None, at(99)),
            Judgement::Quarantine
        );
        assert_eq!(
            judge(&group(&[], None), &bad, &recovery, Some("1"), at(99)),
            Judgement::Retry
        );
        assert_eq!(
            judge(&group(&[], Some("1")), &bad, &recovery, Some("1"), at(99)),
            Judgement::Quarantine
        );
    }
}
