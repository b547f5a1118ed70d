//! Retries are a share of the load, so that replicas which push back are not hit harder for it.

/// Retries that each new request pays for: one in ten.
const EARNED: f64 = 0.1;
/// Most that can be saved up, and what a new router starts with: enough for a quiet router to retry at all.
const SAVED_MAX: f64 = 10.0;

/// How many more times a request that a replica had no room for may be tried elsewhere.
#[derive(Clone, Debug)]
pub struct RetryBudget {
    saved: f64,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { saved: SAVED_MAX }
    }
}

impl RetryBudget {
    /// A new request came in.
    pub fn earn(&mut self) {
        self.saved = (self.saved + EARNED).min(SAVED_MAX);
    }

    /// True: one retry was taken from the budget.
    pub fn spend(&mut self) -> bool {
        let may = self.saved >= 1.0;
        if may {
            self.saved -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_stay_a_tenth_of_the_load() {
        let mut budget = RetryBudget::default();
        let mut retries = 0;
        for _ in 0..10_000 {
            budget.earn();
            // Every request is pushed back and wants as many retries as it can get.
            while budget.spend() {
                retries += 1;
            }
        }
        assert!((1_000..=1_011).contains(&retries), "{retries}");
    }
}
