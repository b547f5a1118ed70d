//! Which tokens may still be drawn: top-k, then top-p over what is left, then min-p.
//!
//! Each of the three keeps a prefix of the tokens ordered by likelihood (lower id first among equals), so the result is
//! the shortest prefix. Only as much of the order is computed as the answer needs: a whole vocabulary is never sorted
//! unless the distribution is nearly flat.

use super::{SamplingParams, score::Ranked};

/// First guess at how many tokens top-p keeps; it grows fourfold until the guess holds.
const FIRST_GUESS: usize = 64;

/// Ids that stay, in ascending order; at least one. `scaled` are logits over temperature, relative to the largest.
pub(super) fn keep(scaled: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut order: Vec<Ranked> = (0u32..)
        .zip(scaled)
        .map(|(id, &logit)| Ranked { logit, id })
        .filter(|x| x.logit > f32::NEG_INFINITY)
        .collect();
    if params.min_p > 0.0 {
        // A threshold on the ratio to the likeliest does not depend on what the other two remove.
        let ratio = params.min_p.min(1.0);
        order.retain(|x| x.logit == 0.0 || x.logit.exp() >= ratio);
    }
    let k = if params.top_k == 0 {
        scaled.len()
    } else {
        params.top_k as usize
    };
    let weight = |x: &Ranked| f64::from(x.logit.exp());
    let mut kept = if params.top_p < 1.0 {
        top_p(order, scaled, k, f64::from(params.top_p), weight)
    } else {
        select(&mut order, k);
        order.truncate(k);
        order
    };
    kept.sort_unstable_by_key(|x| x.id);
    kept.into_iter().map(|x| x.id).collect()
}

/// The shortest prefix of the `k` likeliest whose weight reaches `p` of those `k`. `order` may lack unlikely tokens
/// already; the total is that of all of `scaled`.
fn top_p(
    mut order: Vec<Ranked>,
    scaled: &[f32],
    k: usize,
    p: f64,
    weight: impl Fn(&Ranked) -> f64,
) -> Vec<Ranked> {
    let total: f64 = if k < scaled.len() {
        let mut all: Vec<Ranked> = (0u32..)
            .zip(scaled)
            .map(|(id, &logit)| Ranked { logit, id })
            .collect();
        select(&mut all, k);
        all.truncate(k);
        all.sort_unstable();
        all.iter().map(&weight).sum()
    } else {
        scaled.iter().map(|x| f64::from(x.exp())).sum()
    };
    let limit = k.min(order.len());
    let mut n = FIRST_GUESS.min(limit);
    loop {
        select(&mut order, n);
        order[..n].sort_unstable();
        let mut sum = 0.0;
        for (i, x) in order[..n].iter().enumerate() {
            sum += weight(x);
            if sum >= p * total {
                order.truncate(i + 1);
                return order;
            }
        }
        if n == limit {
            order.truncate(n);
            return order;
        }
        n = (n * 4).min(limit);
    }
}

/// Moves the `n` likeliest to the front, in no order.
fn select(order: &mut [Ranked], n: usize) {
    if n > 0 && n < order.len() {
        order.select_nth_unstable(n - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(probabilities: &[f32], params: SamplingParams) -> Vec<u32> {
        let max = probabilities.iter().copied().fold(0.0, f32::max);
        let logits: Vec<f32> = probabilities.iter().map(|p| (p / max).ln()).collect();
        keep(&logits, &params)
    }

    #[test]
    fn each_filter_and_their_order() {
        let p = [0.1, 0.4, 0.05, 0.25, 0.2];
        let base = SamplingParams::greedy();
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    top_k: 2,
                    ..base.clone()
                }
            ),
            [1, 3]
        );
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    top_p: 0.6,
                    ..base.clone()
                }
            ),
            [1, 3]
        );
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    top_p: 0.66,
                    ..base.clone()
                }
            ),
            [1, 3, 4]
        );
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    top_p: 0.0,
                    ..base.clone()
                }
            ),
            [1]
        );
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    min_p: 0.5,
                    ..base.clone()
                }
            ),
            [1, 3, 4]
        );
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    min_p: 1.0,
                    ..base.clone()
                }
            ),
            [1]
        );
        // After top-k 2 the probabilities are 0.615 and 0.385: 0.6 is reached by one token, not by two.
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    top_k: 2,
                    top_p: 0.6,
                    ..base.clone()
                }
            ),
            [1]
        );
        assert_eq!(
            kept(
                &p,
                SamplingParams {
                    top_k: 4,
                    top_p: 0.9,
                    min_p: 0.6,
                    ..base
                }
            ),
            [1, 3]
        );
    }

    #[test]
    fn ties_keep_lower_ids() {
        assert_eq!(
            kept(
                &[0.25; 4],
                SamplingParams {
                    top_k: 2,
                    ..SamplingParams::greedy()
                }
            ),
            [0, 1]
        );
        assert_eq!(
            kept(
                &[0.25; 4],
                SamplingParams {
                    top_p: 0.7,
                    ..SamplingParams::greedy()
                }
            ),
            [0, 1, 2]
        );
    }

    #[test]
    fn flat_distributions_grow_the_guess() {
        let p = vec![1.0 / 1000.0; 1000];
        let n = kept(
            &p,
            SamplingParams {
                top_p: 0.5,
                ..SamplingParams::greedy()
            },
        )
        .len();
        assert!((499..=501).contains(&n), "{n}");
    }
}
