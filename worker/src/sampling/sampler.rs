//! One sequence's sampler: its parameters and the tokens it has seen.
//!
//! The sampler follows the device, not the scheduler: it learns each token when it draws it. When a sequence is computed
//! again after preemption, indices repeat; what came after is then forgotten, and the same draw gives the same token.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    SamplingParams, filter,
    philox::uniform,
    score::{LogSoftmax, TokenScore, finite_max},
};

/// The model's output cannot be sampled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the logits are not finite numbers")]
pub struct BadLogits;

/// Stands where no token can: any that a vocabulary has.
const NOBODYS: u32 = 0;

/// State of one sequence, from admission to the end.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    prompt: Arc<[u32]>,
    output: Vec<u32>,
    /// How often each token was generated; kept only if a penalty needs it.
    counts: HashMap<u32, u32>,
    /// Tokens of the prompt; kept only if the repetition penalty needs it.
    in_prompt: HashSet<u32>,
}

impl Sampler {
    /// A sampler that has generated nothing yet but the resumed tokens.
    pub fn new(params: SamplingParams, prompt: Arc<[u32]>) -> Self {
        let (own, resumed) = prompt.split_at(prompt.len().saturating_sub(params.resumed as usize));
        let in_prompt = if params.repetition_penalty != 1.0 {
            own.iter().copied().collect()
        } else {
            HashSet::new()
        };
        let resumed = resumed.to_vec();
        let mut sampler = Self {
            params,
            prompt,
            output: Vec::new(),
            counts: HashMap::new(),
            in_prompt,
        };
        resumed.into_iter().for_each(|token| sampler.remember(token));
        sampler
    }

    /// What the sequence asked for.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Tokens generated before token `index`, with the resumed ones.
    pub(super) fn generated(&self, index: u32) -> &[u32] {
        &self.output[..(self.counted(index) as usize).min(self.output.len())]
    }

    /// The prompt's tokens.
    pub fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// Chooses generated token `index`, counted after the resumed ones, which will stand at `position` of the
    /// sequence. `row` holds the logits of the whole vocabulary and is scratch afterwards.
    ///
    /// # Errors
    /// If a logit is not a number or the largest is infinite.
    pub fn sample(
        &mut self,
        row: &mut [f32],
        index: u32,
        position: u32,
    ) -> Result<(u32, Option<TokenScore>), BadLogits> {
        finite_max(row).ok_or(BadLogits)?;
        let index = self.counted(index);
        self.forget_from(index);
        // Scoring needs the raw row, the choice changes it.
        let raw = self.params.logprobs.map(|n_top| (n_top, row.to_vec()));
        self.bias(row);
        self.penalise(row);
        if let Some(grammar) = &self.params.grammar
            && !grammar.mask(index as usize, row)
        {
            // Whoever watches the grammar ends the sequence; this token is nobody's.
            self.remember(NOBODYS);
            return Ok((NOBODYS, None));
        }
        self.ban_early_stops(row, index);
        let token = self.choose(row, position)?;
        if let Some(grammar) = &self.params.grammar {
            grammar.take(token);
        }
        let score = match raw {
            Some((n_top, raw)) => Some(LogSoftmax::new(&raw).ok_or(BadLogits)?.score(token, n_top)),
            None => None,
        };
        self.remember(token);
        Ok((token, score))
    }

    /// Whether generated token `index` is the likeliest of the raw logits and no score of it is wanted, so that a
    /// device may find it alone and tell it with [`Sampler::take`].
    pub fn is_plain(&self, index: u32) -> bool {
        let params = &self.params;
        let bans = self.counted(index) < params.min_tokens && !params.stop_ids.is_empty();
        params.temperature <= 0.0
            && params.logprobs.is_none()
            && params.logit_bias.is_empty()
            && params.grammar.is_none()
            && !params.penalises()
            && !bans
    }

    /// Takes `token`, which a device has found, as generated token `index`.
    pub fn take(&mut self, index: u32, token: u32) {
        self.forget_from(self.counted(index));
        self.remember(token);
    }

    /// The number of a generated token when the resumed ones count.
    fn counted(&self, index: u32) -> u32 {
        self.params.resumed.saturating_add(index)
    }

    /// Scores the prompt token at `position` by the logits of the position before.
    ///
    /// # Errors
    /// If a logit is not a number or the largest is infinite.
    pub fn score_prompt(&self, row: &[f32], position: u32) -> Result<TokenScore, BadLogits> {
        let n_top = self.params.prompt_logprobs.unwrap_or(0);
        Ok(LogSoftmax::new(row)
            .ok_or(BadLogits)?
            .score(self.prompt[position as usize], n_top))
    }

    fn forget_from(&mut self, index: u32) {
        for token in self.output.drain((index as usize).min(self.output.len())..) {
            if let Some(count) = self.counts.get_mut(&token) {
                *count -= 1;
            }
        }
    }

    fn remember(&mut self, token: u32) {
        self.output.push(token);
        if self.params.penalises() {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    fn bias(&self, row: &mut [f32]) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// Repetition counts prompt and output, frequency and presence count output alone.
    fn penalise(&self, row: &mut [f32]) {
        if !self.params.penalises() {
            return;
        }
        let generated = |token: &u32| self.counts.get(token).is_some_and(|&n| n > 0);
        if self.params.repetition_penalty != 1.0 {
            let only_output = self
                .counts
                .keys()
                .filter(|t| generated(t) && !self.in_prompt.contains(t));
            for &token in self.in_prompt.iter().chain(only_output) {
                if let Some(logit) = row.get_mut(token as usize) {
                    let by = self.params.repetition_penalty;
                    *logit = if *logit > 0.0 { *logit / by } else { *logit * by };
                }
            }
        }
        for (&token, &count) in self.counts.iter().filter(|(t, _)| generated(t)) {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit -= self.params.frequency_penalty * count as f32;
                *logit -= self.params.presence_penalty;
            }
        }
    }

    /// Leaves the row alone if nothing but stop tokens could be generated, as at a grammar's end.
    fn ban_early_stops(&self, row: &mut [f32], index: u32) {
        let stops = self.banned_counted(index, row.len());
        if stops.is_empty() {
            return;
        }
        let others = || (0..).zip(row.iter()).filter(|(id, _)| !stops.contains(id));
        if others().any(|(_, logit)| logit.is_finite()) {
            for id in stops {
                row[id as usize] = f32::NEG_INFINITY;
            }
        }
    }

    /// Tokens that generated token `index` must not be.
    pub(super) fn banned(&self, index: u32, n_vocab: usize) -> HashSet<u32> {
        self.banned_counted(self.counted(index), n_vocab)
    }

    /// None if nothing but stop tokens could be generated.
    fn banned_counted(&self, index: u32, n_vocab: usize) -> HashSet<u32> {
        if index >= self.params.min_tokens {
            return HashSet::new();
        }
        let stops = self.params.stop_ids.iter().copied();
        let stops: HashSet<u32> = stops.filter(|&id| (id as usize) < n_vocab).collect();
        if stops.len() < n_vocab {
            stops
        } else {
            HashSet::new()
        }
    }

    fn choose(&self, row: &mut [f32], position: u32) -> Result<u32, BadLogits> {
        let max = finite_max(row).ok_or(BadLogits)?;
        if self.params.temperature <= 0.0 {
            let first = row.iter().position(|&x| x == max).ok_or(BadLogits)?;
            return Ok(first as u32);
        }
        // Relative to the largest, which is then 0: no temperature, however small, overflows.
        for x in row.iter_mut() {
            *x = (*x - max) / self.params.temperature;
        }
        let u = uniform(self.params.seed, self.params.candidate, position);
        // Ascending ids, not ascending likelihood: when rounding (say, of another tensor-parallel degree) swaps two
        // near-equal tokens, the borders between tokens hardly move, and the same number draws the same token.
        Ok(if self.params.filters(row.len()) {
            draw(row, u, filter::keep(row, &self.params).into_iter())
        } else {
            draw(row, u, 0..row.len() as u32)
        })
    }
}

/// `row` has logits relative to the largest. The token in whose share of `[0, 1)` the number `u` falls.
fn draw(row: &[f32], u: f64, ids: impl Iterator<Item = u32>) -> u32 {
    let weights: Vec<(u32, f64)> = ids.map(|id| (id, f64::from(row[id as usize].exp()))).collect();
    let total: f64 = weights.iter().map(|w| w.1).sum();
    let (target, mut sum, mut last) = (u * total, 0.0, 0);
    for (id, weight) in weights {
        if weight > 0.0 {
            sum += weight;
            last = id;
            if sum > target {
                break;
            }
        }
    }
    last // If rounding kept the sum below the target, the last possible token.
}
