//! The boundary inside the router: a request in token ids going down, what becomes of it coming up.
//!
//! Everything above (gRPC, HTTP, templates, text) parses into an `Ask` and renders `Event`s; everything below
//! (admission, policy, sessions) knows nothing of text.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use uuid::Uuid;

use crate::keys::Share;

/// Sampling values as the client gave them; absent ones are the worker's to fill from the model's own defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; 0..=2.
    pub temperature: Option<f32>,
    /// (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// 0..=1.
    pub min_p: Option<f32>,
    /// -2..=2.
    pub presence_penalty: Option<f32>,
    /// -2..=2.
    pub frequency_penalty: Option<f32>,
    /// (0, 10].
    pub repetition_penalty: Option<f32>,
    /// Any.
    pub seed: Option<u64>,
    /// Token id and what is added to its logit, -100..=100; ids unique and ascending.
    pub logit_bias: Vec<(u32, f32)>,
}

/// What an output must follow; the worker compiles it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grammar {
    /// A JSON schema, as JSON.
    JsonSchema(String),
    /// A regular expression that the whole output matches.
    Regex(String),
    /// A context-free grammar in llguidance's variant of Lark's notation.
    Lark(String),
}

impl Grammar {
    /// As it was given.
    pub fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }
}

/// A sound request: bounds were checked against the model at the door.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The model's first served name.
    pub model: String,
    /// Names the request on every attempt.
    pub uuid: Uuid,
    /// Never empty, every id below the vocabulary's size.
    pub prompt: Arc<[u32]>,
    /// Independent continuations, at least 1.
    pub candidates: u32,
    /// How to sample.
    pub sampling: Sampling,
    /// Most tokens of each candidate; 0 only with `prompt_logprobs`.
    pub max_tokens: u32,
    /// No stop id ends a candidate before this many.
    pub min_tokens: u32,
    /// Beside the model's eos ids.
    pub stop_token_ids: Vec<u32>,
    /// Run past the model's eos ids.
    pub ignore_eos: bool,
    /// What each candidate must follow.
    pub grammar: Option<Arc<Grammar>>,
    /// `Some(n)`: each output token's log-probability and the n most likely, n <= 20.
    pub logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<u32>,
    /// Of those from this position on; below the prompt's length, and 1 at least, since nothing predicts the first.
    pub prompt_logprobs_from: u32,
    /// What stop strings and grammar take in memory meanwhile; what other prompts of its request share, in part.
    pub text_bytes: u64,
    /// Blocks are shared only under equal salts.
    pub cache_salt: u64,
    /// Whose it is.
    pub share: Share,
    /// The client's deadline.
    pub deadline: Option<Instant>,
    /// Longest wait for a replica; the router's own limit also holds.
    pub max_queue_wait: Option<Duration>,
}

/// A scored token.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// The token.
    pub token: u32,
    /// Natural logarithm, from the raw logits in fp32.
    pub logprob: f32,
    /// 1 is the most likely.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What happens to a request, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A replica runs candidate 0.
    Started {
        /// Prompt tokens that came from its prefix cache.
        cached_tokens: u32,
    },
    /// Scores of the prompt positions that were asked for, in order, before any token; one event with all of them.
    PromptScores(Vec<Score>),
    /// Next tokens of a candidate; a stop token is among them, as the last.
    Tokens {
        /// Which candidate.
        candidate: u32,
        /// At least one.
        tokens: Vec<u32>,
        /// One for each token where asked for, else empty.
        scores: Vec<Score>,
    },
    /// The last word about a candidate.
    Finished {
        /// Which candidate.
        candidate: u32,
        /// Why.
        why: Finish,
    },
}

/// Why a candidate ended on the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// By the model's end-of-sequence token.
    Eos(u32),
    /// By one of the request's stop ids.
    StopToken(u32),
    /// By `max_tokens` or the end of the context.
    Length,
}

/// A request that did not start. Nothing of it has run, or nothing that ran was seen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// No such model here.
    #[error("model '{0}' is not served here")]
    UnknownModel(String),
    /// The model is known, but no replica of it is ready.
    #[error("no replica of model '{model}' is ready; retry in {} s", retry_after.as_secs().max(1))]
    NoReplica {
        /// Which.
        model: String,
        /// When it may be worth a try.
        retry_after: Duration,
    },
    /// The queue's bounds are reached.
    #[error("the queue is full ({what}); retry in {} s", retry_after.as_secs().max(1))]
    QueueFull {
        /// Which bound.
        what: &'static str,
        /// From the measured drain rate.
        retry_after: Duration,
    },
    /// It waited as long as it may.
    #[error("no replica had room within {} ms; retry in {} s", waited.as_millis(), retry_after.as_secs().max(1))]
    QueueTimeout {
        /// How long.
        waited: Duration,
        /// From the measured drain rate.
        retry_after: Duration,
    },
    /// The client's deadline passed first.
    #[error("the deadline passed while the request was waiting")]
    Deadline,
    /// The worker refused it: the message says what to change.
    #[error("{0}")]
    Invalid(String),
    /// The router is shutting down.
    #[error("the router is shutting down; another one takes new requests")]
    ShuttingDown,
}

/// A request that had started and cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The replica is gone.
    #[error("replica '{replica}' was lost while it generated: {cause}")]
    ReplicaLost {
        /// Which.
        replica: String,
        /// What was seen.
        cause: String,
    },
    /// The client's deadline passed.
    #[error("the deadline passed after {tokens} tokens")]
    Deadline {
        /// Tokens already emitted.
        tokens: u32,
    },
    /// The worker failed it.
    #[error("the worker failed the request: {0}")]
    Worker(String),
    /// The client read too slowly and its buffer is full.
    #[error("the client did not read for too long; {buffered} tokens were waiting for it")]
    SlowClient {
        /// Tokens in the buffer.
        buffered: usize,
    },
}
