//! Waits between attempts.

use std::time::Duration;

/// Exponential, with jitter, so that routers do not return in step.
#[derive(Clone, Debug)]
pub(crate) struct Pauses {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Pauses {
    /// Doubles from the first wait to the longest.
    pub fn new((first, longest): (Duration, Duration)) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// The wait before the next attempt.
    pub fn next(&mut self) -> Duration {
        let pause = self.next.mul_f64(rand::random_range(0.5..1.5));
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    /// An attempt went well.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}
