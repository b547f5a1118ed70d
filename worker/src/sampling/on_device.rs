//! What a device must know to choose a token by itself, as the sampler would have.

use std::collections::HashMap;

use super::{Sampler, SamplingParams, philox::uniform_bits};

/// How a token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// The likeliest of the raw logits, unscored.
    Plain,
    /// By a draw from changed logits, or scored, or both.
    Drawn(Draw),
}

/// A draw, with everything resolved that does not depend on logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the likeliest.
    pub temperature: f32,
    /// Tokens that may be drawn at most; 0 for all.
    pub top_k: u32,
    /// Probability that the likeliest must reach; 1 for all.
    pub top_p: f32,
    /// Least likelihood relative to the likeliest; 0 for none.
    pub min_p: f32,
    /// The 53 random bits of this token.
    pub bits: u64,
    /// Added to single logits before anything else, each token at most once; minus infinity bans.
    pub edits: Vec<(u32, f32)>,
    /// Whether earlier tokens change the logits, with the three numbers of [`Draw::penalties`].
    pub penalises: bool,
    /// Of repetition, frequency and presence.
    pub penalties: [f32; 3],
    /// Score the token, and list so many of the likeliest.
    pub logprobs: Option<u32>,
}

impl Sampler {
    /// How a device chooses generated token `index`, which will stand at `position`. It tells the sampler with
    /// [`Sampler::take`].
    pub fn choice(&self, index: u32, position: u32, n_vocab: usize) -> Choice {
        if self.is_plain(index) {
            return Choice::Plain;
        }
        let params = self.params();
        let filters = params.filters(n_vocab);
        Choice::Drawn(Draw {
            temperature: params.temperature.max(0.0),
            top_k: if filters { params.top_k } else { 0 },
            top_p: if filters { params.top_p } else { 1.0 },
            min_p: if filters { params.min_p } else { 0.0 },
            bits: uniform_bits(params.seed, params.candidate, position),
            edits: self.edits(index, n_vocab),
            penalises: params.penalises(),
            penalties: [
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            ],
            logprobs: params.logprobs,
        })
    }

    /// Bias and bans. A ban is the last word on a token.
    fn edits(&self, index: u32, n_vocab: usize) -> Vec<(u32, f32)> {
        let known = |token: &u32| (*token as usize) < n_vocab;
        let mut edits: HashMap<u32, f32> = HashMap::new();
        for (token, bias) in &self.params().logit_bias {
            if known(token) {
                *edits.entry(*token).or_default() += bias;
            }
        }
        for token in self.banned(index, n_vocab) {
            edits.insert(token, f32::NEG_INFINITY);
        }
        let mut edits: Vec<_> = edits.into_iter().collect();
        edits.sort_unstable_by_key(|edit| edit.0);
        edits
    }

    /// The tokens before generated token `index`, and how many of them count as prompt.
    pub fn before(&self, index: u32) -> (Vec<u32>, usize) {
        let (prompt, params): (_, &SamplingParams) = (self.prompt(), self.params());
        let own = prompt.len().saturating_sub(params.resumed as usize);
        let generated = self.generated(index);
        ([&prompt[..own], generated].concat(), own)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn sampler(change: impl FnOnce(&mut SamplingParams)) -> Sampler {
        let mut params = SamplingParams::greedy();
        change(&mut params);
        Sampler::new(params, vec![5, 6, 7, 8].into())
    }

    fn draw(sampler: &Sampler, index: u32) -> Draw {
        match sampler.choice(index, 10, 100) {
            Choice::Drawn(draw) => draw,
            Choice::Plain => panic!("not plain"),
        }
    }

    #[test]
    fn bias_and_bans_are_edits_and_each_token_has_one() {
        let sampler = sampler(|params| {
            params.logit_bias = vec![(3, 1.0), (9, -2.0), (3, 0.5), (200, 1.0)];
            params.stop_ids = Arc::from([9, 4, 300]);
            params.min_tokens = 2;
        });
        let banned = f32::NEG_INFINITY;
        assert_eq!(draw(&sampler, 1).edits, [(3, 1.5), (4, banned), (9, banned)]);
        assert_eq!(draw(&sampler, 2).edits, [(3, 1.5), (9, -2.0)]);
    }

    #[test]
    fn filters_that_remove_nothing_are_left_out() {
        let all = sampler(|params| {
            params.temperature = 0.7;
            params.top_k = 100;
        });
        assert_eq!((draw(&all, 0).top_k, draw(&all, 0).top_p), (0, 1.0));
        let some = sampler(|params| {
            params.temperature = 0.7;
            params.top_k = 99;
        });
        assert_eq!(draw(&some, 0).top_k, 99);
        assert_eq!(sampler(|_| {}).choice(0, 10, 100), Choice::Plain);
    }

    #[test]
    fn resumed_tokens_count_as_generated() {
        let mut sampler = sampler(|params| {
            params.resumed = 1;
            params.presence_penalty = 0.5;
        });
        sampler.take(0, 40);
        sampler.take(1, 41);
        assert_eq!(sampler.before(2), (vec![5, 6, 7, 8, 40, 41], 3));
        assert_eq!(sampler.before(1), (vec![5, 6, 7, 8, 40], 3));
    }
}
