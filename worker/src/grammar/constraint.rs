//! One sequence's place in its grammar: which tokens may come next, and what came.
//!
//! Shared by the sequence's sampler, which walks it, and the engine, which ends a sequence whose walk has failed. After a
//! preemption the sampler draws earlier tokens again; the place goes back with it.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use llguidance::Matcher;

use super::{GrammarError, compile::one_line};

/// Cheap to clone; all clones are the same place.
#[derive(Clone)]
pub struct Constraint(Arc<Shared>);

struct Shared {
    place: Mutex<Place>,
    failure: OnceLock<String>,
}

struct Place {
    matcher: Matcher,
    /// Tokens that the grammar has taken; none after its end.
    taken: usize,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint")
            .field("failure", &self.failure())
            .finish_non_exhaustive()
    }
}

/// Only the same place is equal.
impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Constraint {
    /// `said` has been said before.
    pub(super) fn new(matcher: Matcher, said: &[u32]) -> Result<Self, GrammarError> {
        let mut place = Place { matcher, taken: 0 };
        for (at, &token) in said.iter().enumerate() {
            let allowed = place
                .matcher
                .validate_tokens(&[token])
                .is_ok_and(|valid| valid == 1);
            if !allowed || place.take(token).is_err() {
                return Err(GrammarError::Resumed { at });
            }
        }
        Ok(Self(Arc::new(Shared {
            place: Mutex::new(place),
            failure: OnceLock::new(),
        })))
    }

    /// Takes from `row`, the logits of output token `index`, those that may not come there, and puts minus infinity in
    /// their place. False: no token can come, and the sequence has failed.
    pub fn mask(&self, index: usize, row: &mut [f32]) -> bool {
        if self.failure().is_some() {
            return false;
        }
        let outcome = self.with(|place| {
            place.back_to(index)?;
            place
                .matcher
                .compute_mask_or_eos()
                .map_err(|error| error.to_string())
        });
        let allowed = match outcome {
            Ok(allowed) => allowed,
            Err(error) => return self.fail(&error),
        };
        for (token, logit) in (0..).zip(row.iter_mut()) {
            if !allowed.is_allowed(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        row.iter().any(|logit| logit.is_finite())
            || self.fail("none of the tokens that it allows next is one that the model can say")
    }

    /// Takes the token that was drawn from the row that was masked last.
    pub fn take(&self, token: u32) {
        if let Err(error) = self.with(|place| place.take(token)) {
            self.fail(&error);
        }
    }

    /// Why it can't go on.
    pub fn failure(&self) -> Option<&str> {
        self.0.failure.get().map(String::as_str)
    }

    fn with<T>(&self, walk: impl FnOnce(&mut Place) -> T) -> T {
        walk(&mut self.0.place.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn fail(&self, why: &str) -> bool {
        let why = format!("the output can't go on by its grammar: {}", one_line(why));
        // Only the first reason counts.
        let _ = self.0.failure.set(why);
        false
    }
}

impl Place {
    /// What comes behind the grammar's end is drawn in vain and not looked at.
    fn take(&mut self, token: u32) -> Result<(), String> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(());
        }
        self.matcher
            .consume_token(token)
            .map_err(|error| error.to_string())?;
        self.taken += 1;
        Ok(())
    }

    fn back_to(&mut self, index: usize) -> Result<(), String> {
        let back = self.taken.saturating_sub(index);
        self.matcher.rollback(back).map_err(|error| error.to_string())?;
        self.taken -= back;
        Ok(())
    }
}
