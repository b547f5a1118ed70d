//! What one sequence wants of its sampler, resolved: every default is filled in before it gets here.

use std::sync::Arc;

use crate::grammar::Constraint;

/// How tokens of one sequence are chosen. Values are checked where requests enter; out of range they make a strange
/// choice, never a panic.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the likeliest token (lowest id among equals).
    pub temperature: f32,
    /// Smallest set of likeliest tokens whose probabilities reach this sum, after `top_k`; 1 keeps all.
    pub top_p: f32,
    /// At most this many likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Subtracted from the logit of every token generated so far.
    pub presence_penalty: f32,
    /// Subtracted once for every time a token was generated so far.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens before anything else.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random draws.
    pub seed: u64,
    /// Which of several candidates of one request this is; separates their draws.
    pub candidate: u32,
    /// `Some(n)`: score each generated token and list the `n` likeliest.
    pub logprobs: Option<u32>,
    /// `Some(n)`: score each prompt token but the first and list the `n` likeliest.
    pub prompt_logprobs: Option<u32>,
    /// Stop tokens are banned before this many tokens were generated, resumed ones among them.
    pub min_tokens: u32,
    /// Tokens that end the sequence.
    pub stop_ids: Arc<[u32]>,
    /// The last so many tokens of the prompt count as generated: another replica did.
    pub resumed: u32,
    /// What generated tokens must follow. The sequence then has to wait for each of its tokens, because the next mask
    /// follows from it.
    pub grammar: Option<Constraint>,
}

impl SamplingParams {
    /// The likeliest token each time, no scores, no stop tokens.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            candidate: 0,
            logprobs: None,
            prompt_logprobs: None,
            min_tokens: 0,
            stop_ids: Arc::from([]),
            resumed: 0,
            grammar: None,
        }
    }

    /// Whether earlier tokens change the logits.
    pub(super) fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Whether top-k, top-p or min-p can remove a token from a vocabulary of this size.
    pub(super) fn filters(&self, n_vocab: usize) -> bool {
        (self.top_k > 0 && (self.top_k as usize) < n_vocab) || self.top_p < 1.0 || self.min_p > 0.0
    }
}
