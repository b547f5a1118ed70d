//! Log-probabilities of raw logits: before bias, penalties and temperature.
//!
//! One pass finds maximum and normaliser; every value is then `logit - max - log(sum)`, computed in one place, so that a
//! token's own value and its entry among the likeliest are the same bits.

use std::{cmp::Ordering, collections::BinaryHeap};

/// How likely a token was, and what else was likely.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// The token that was generated, or that stands in the prompt.
    pub token: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// One more than the number of strictly likelier tokens.
    pub rank: u32,
    /// The likeliest tokens, best first, lower id first among equals.
    pub top: Vec<(u32, f32)>,
}

/// A row of raw logits with its normaliser.
pub struct LogSoftmax<'a> {
    logits: &'a [f32],
    max: f32,
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    /// `None` if a logit is not a number or the largest is not finite. The sum is taken in double precision.
    pub fn new(logits: &'a [f32]) -> Option<Self> {
        let max = finite_max(logits)?;
        let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
        Some(Self {
            logits,
            max,
            log_sum: sum.ln(),
        })
    }

    /// Scores `token` and lists the `n_top` likeliest. `token` must be within the row.
    pub fn score(&self, token: u32, n_top: u32) -> TokenScore {
        let own = self.logits[token as usize];
        let rank = 1 + self.logits.iter().filter(|&&x| x > own).count() as u32;
        let top = likeliest(self.logits, n_top as usize)
            .into_iter()
            .map(|id| (id, self.logprob(self.logits[id as usize])))
            .collect();
        TokenScore {
            token,
            logprob: self.logprob(own),
            rank,
            top,
        }
    }

    fn logprob(&self, logit: f32) -> f32 {
        Self::logprob_of(logit, self.max, self.log_sum)
    }

    /// Of a logit in a row with this largest logit and this logarithm of the sum of exponentials relative to it.
    pub fn logprob_of(logit: f32, max: f32, log_sum: f64) -> f32 {
        (f64::from(logit - max) - log_sum) as f32
    }
}

/// The largest logit, or `None` if any is not a number or the largest is infinite.
pub(super) fn finite_max(logits: &[f32]) -> Option<f32> {
    // Sixteen maxima side by side, because only an order that is spelled out vectorises.
    let (mut max, mut nan) = ([f32::NEG_INFINITY; 16], [false; 16]);
    let (chunks, rest) = logits.as_chunks::<16>();
    for part in chunks.iter().map(|chunk| &chunk[..]).chain([rest]) {
        for ((&x, max), nan) in part.iter().zip(&mut max).zip(&mut nan) {
            *nan |= x.is_nan();
            *max = if x > *max { x } else { *max };
        }
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (!nan.contains(&true) && max.is_finite()).then_some(max)
}

/// A token in the order that selection uses: larger logit first, then lower id.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Ranked {
    pub(super) logit: f32,
    pub(super) id: u32,
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> Ordering {
        // Equal logits (0.0 and -0.0 too) are told apart by id alone; rows with NaN never get here.
        let by_logit = other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal);
        by_logit.then(self.id.cmp(&other.id))
    }
}

/// Ids of the `n` likeliest, best first.
fn likeliest(logits: &[f32], n: usize) -> Vec<u32> {
    if n == 0 {
        return Vec::new();
    }
    let mut best: BinaryHeap<Ranked> = BinaryHeap::with_capacity(n.min(logits.len()) + 1); // worst on top
    for (id, &logit) in (0u32..).zip(logits) {
        let candidate = Ranked { logit, id };
        if best.len() < n {
            best.push(candidate);
        } else if best.peek().is_some_and(|worst| candidate < *worst) {
            best.pop();
            best.push(candidate);
        }
    }
    best.into_sorted_vec().into_iter().map(|x| x.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_value_is_the_entry_of_the_list_and_ties_go_by_id() {
        let row = [1.0, 3.0, 3.0, -2.0, 0.5];
        let soft = LogSoftmax::new(&row).expect("finite");
        let score = soft.score(2, 3);
        assert_eq!((score.rank, score.token), (1, 2));
        assert_eq!(score.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(score.top[1].1.to_bits(), score.logprob.to_bits());
        let total: f64 = soft.score(0, 5).top.iter().map(|t| f64::from(t.1).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        assert_eq!(
            soft.score(3, 0),
            TokenScore {
                rank: 5,
                ..soft.score(3, 0)
            }
        );
    }

    #[test]
    fn rows_that_are_not_numbers_have_no_score() {
        assert!(LogSoftmax::new(&[0.0, f32::NAN]).is_none());
        assert!(LogSoftmax::new(&[0.0, f32::INFINITY]).is_none());
        assert!(LogSoftmax::new(&[f32::NEG_INFINITY; 3]).is_none());
        assert!(LogSoftmax::new(&[0.0, f32::NEG_INFINITY]).is_some());
    }
}
