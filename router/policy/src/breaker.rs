//! A replica that keeps failing rests, and comes back through one request.
//!
//! Only failures of the replica count: a lost session, an internal error. A replica that says it has no room is
//! healthy, and what the client did (left, was too late, asked for nonsense) says nothing about the replica.

use std::time::Duration;

/// Failures in a row after which a replica rests. One crash is not a pattern; three are.
pub const FAILURES_TO_OPEN: u32 = 3;
/// First rest.
pub const REST_MIN: Duration = Duration::from_secs(1);
/// Longest rest: a replica that was repaired is found within half a minute.
pub const REST_MAX: Duration = Duration::from_secs(30);

/// Whether one replica may be chosen, as far as its own failures go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Breaker {
    state: State,
    failures_in_a_row: u32,
    rests_in_a_row: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Closed,
    /// Nobody before `until`; then one.
    Open { until: Duration },
    /// That one is on its way.
    Probing,
}

impl Breaker {
    /// When a request may be placed, `None` while a probe is on its way.
    pub fn opens_at(&self) -> Option<Duration> {
        match self.state {
            State::Closed => Some(Duration::ZERO),
            State::Open { until } => Some(until),
            State::Probing => None,
        }
    }

    /// A request may be placed now.
    pub fn allows(&self, now: Duration) -> bool {
        self.opens_at().is_some_and(|at| at <= now)
    }

    /// The next request placed is the probe.
    pub fn is_resting(&self) -> bool {
        self.state != State::Closed
    }

    /// A request was placed. True: it is the probe.
    pub fn placed(&mut self) -> bool {
        match self.state {
            // Closed => Closed
            State::Closed => false,
            // Open => Probing: the caller asked `allows` first.
            State::Open { .. } => {
                self.state = State::Probing;
                true
            }
            // Probing => Probing
            State::Probing => false,
        }
    }

    /// A request ended well: any => Closed.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// The probe ended without a word about the replica: Probing => Open, for the next probe at once.
    pub fn probe_left(&mut self, now: Duration) {
        if self.state == State::Probing {
            self.state = State::Open { until: now };
        }
    }

    /// The replica failed. `draw` spreads the routers' probes over the last half of the rest.
    pub fn failed(&mut self, now: Duration, draw: u64) {
        match self.state {
            // Closed => (Closed | Open)
            State::Closed => {
                self.failures_in_a_row += 1;
                if self.failures_in_a_row >= FAILURES_TO_OPEN {
                    self.rest(now, draw);
                }
            }
            // Probing => Open, longer
            State::Probing => self.rest(now, draw),
            // Open => Open: requests placed before it opened fail late; they say nothing new.
            State::Open { .. } => {}
        }
    }

    fn rest(&mut self, now: Duration, draw: u64) {
        let doublings = self.rests_in_a_row.min(16);
        let rest = REST_MIN.saturating_mul(1 << doublings).min(REST_MAX);
        self.rests_in_a_row += 1;
        let half = rest / 2;
        let jitter = half.mul_f64((draw >> 11) as f64 / (1u64 << 53) as f64);
        self.state = State::Open {
            until: now + half + jitter,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_after_a_probe() {
        let mut breaker = Breaker::default();
        for _ in 1..FAILURES_TO_OPEN {
            breaker.failed(SECOND, u64::MAX);
        }
        assert!(breaker.allows(SECOND), "two failures are not enough");
        breaker.succeeded();
        for _ in 0..FAILURES_TO_OPEN {
            breaker.failed(SECOND, u64::MAX);
        }
        assert!(!breaker.allows(SECOND));
        let until = breaker.opens_at().expect("open, not probing");
        assert!(until > SECOND + REST_MIN / 2 && until <= SECOND + REST_MIN);
        assert!(
            breaker.allows(until) && breaker.placed(),
            "the first one is the probe"
        );
        assert!(!breaker.allows(until + REST_MAX), "one probe at a time");
        breaker.succeeded();
        assert!(breaker.allows(until) && !breaker.placed());
    }

    #[test]
    fn rests_double_up_to_a_bound_and_a_probe_that_left_frees_the_place() {
        let mut breaker = Breaker::default();
        let mut now = SECOND;
        for _ in 0..FAILURES_TO_OPEN {
            breaker.failed(now, 0);
        }
        let mut rests = Vec::new();
        for _ in 0..8 {
            let until = breaker.opens_at().expect("open");
            rests.push((until - now).as_millis());
            now = until;
            assert!(breaker.placed());
            breaker.failed(now, 0);
        }
        assert_eq!(rests, [500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]);
        now = breaker.opens_at().expect("open");
        assert!(breaker.placed());
        breaker.probe_left(now);
        assert!(breaker.allows(now) && breaker.is_resting());
    }
}
