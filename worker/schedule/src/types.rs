//! The scheduler's vocabulary: what goes in (`Ask`), what a device runs (`Step`), what comes out (`Output`).

use std::sync::Arc;

/// A sequence, named by the caller; unique while it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// One block of keys and values, an index into the fixed pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A row of per-sequence state on the device, `0..max_running`; one running sequence holds it at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// Steps are numbered from 1, without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u64);

/// Time since any fixed start, in microseconds; only differences mean anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Micros(pub u64);

/// The name of a whole block, given its parent's: see the contract between router and worker.
pub type KeyOf = fn(parent: u64, block: &[u32]) -> u64;

/// What the device offers, fixed for the life of a scheduler.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tokens in one block.
    pub block_tokens: u32,
    /// Blocks in the pool.
    pub n_blocks: u32,
    /// Sequences in one step, and slots on the device.
    pub max_running: u32,
    /// Tokens computed in one step, decode rows and prefill chunks together.
    pub max_step_tokens: u32,
    /// Prompt and output of one sequence together.
    pub max_model_len: u32,
    /// Sequences that may wait.
    pub max_waiting: u32,
    /// Keep finished prefixes for later sequences.
    pub prefix_cache: bool,
    /// Names blocks.
    pub key_of: KeyOf,
}

/// A sequence to run.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Chosen by the caller.
    pub id: SeqId,
    /// At least one token.
    pub prompt: Arc<[u32]>,
    /// Most tokens to generate; 0 computes the prompt alone (for its log-probabilities).
    pub max_tokens: u32,
    /// Stop tokens do not end the sequence before this many tokens were generated, the stop token included.
    pub min_tokens: u32,
    /// Tokens that end it; the last generated token is then one of these.
    pub stop_ids: Arc<[u32]>,
    /// Key of the empty prefix: sequences share blocks only under equal roots.
    pub root_key: u64,
    /// Every prompt position's log-probabilities are wanted, so no cached prefix may stand for them.
    pub prompt_logprobs: bool,
    /// But not those of positions before this one, for which a cached prefix may stand.
    pub prompt_logprobs_from: u32,
    /// It ends with `Finish::Deadline` at this time, wherever it is.
    pub deadline: Option<Micros>,
}

/// Where the ids of a work's first row come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Known ids, one a row.
    Tokens(Vec<u32>),
    /// One row: the id that the device last sampled for this slot, which the host may not have seen yet.
    LastSampled,
}

/// Rows of one sequence in a step: one decode row, or a chunk of prefill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// Whose rows.
    pub seq: SeqId,
    /// Where the device keeps this sequence's state.
    pub slot: Slot,
    /// Position of the first row in the sequence.
    pub start: u32,
    /// The rows' ids.
    pub input: Input,
    /// Blocks of positions `0..start + rows`, in order.
    pub blocks: Vec<BlockId>,
    /// `Some(i)`: the last row's logits become generated token `i` of the sequence (0 first).
    pub sample: Option<u32>,
    /// Log-probabilities are wanted for the prompt tokens that these rows predict (position + 1, within the prompt).
    pub prompt_logprobs: bool,
}

impl Work {
    /// Rows of this work.
    pub fn rows(&self) -> u32 {
        match &self.input {
            Input::Tokens(ids) => u32::try_from(ids.len()).expect("a step is bounded by max_step_tokens"),
            Input::LastSampled => 1,
        }
    }
}

/// What the device runs next: decode rows first, then prefill chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number.
    pub id: StepId,
    /// Never empty.
    pub works: Vec<Work>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// Its last token is one of its stop ids.
    Stop,
    /// `max_tokens` were generated, or the sequence is as long as the model allows.
    Length,
    /// The caller cancelled it.
    Cancelled,
    /// Its deadline passed.
    Deadline,
}

/// What the caller learns, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// It runs for the first time; this many prompt tokens came from the prefix cache.
    Started {
        /// The sequence.
        seq: SeqId,
        /// Whole blocks, in tokens.
        cached_tokens: u32,
    },
    /// Generated token `index` (0 first); every index once, in order, whatever happened in between.
    Token {
        /// The sequence.
        seq: SeqId,
        /// Counts generated tokens.
        index: u32,
        /// The id.
        token: u32,
    },
    /// The last word about a sequence. Its id may be used again.
    Finished {
        /// The sequence.
        seq: SeqId,
        /// Why.
        why: Finish,
        /// Tokens it generated.
        n_tokens: u32,
    },
}

/// An ask that can never run here, or not now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing to compute.
    #[error("the prompt is empty; send at least one token")]
    EmptyPrompt,
    /// Nothing is wanted.
    #[error("max_tokens is 0 without prompt log-probabilities; nothing would be computed")]
    NothingAsked,
    /// Longer than the model's context.
    #[error(
        "the prompt has {prompt} tokens and max_tokens is {max_tokens}, together more than the model's {limit}"
    )]
    TooLong {
        /// Tokens in the prompt.
        prompt: u32,
        /// Tokens asked for.
        max_tokens: u32,
        /// Tokens the model takes.
        limit: u32,
    },
    /// It would not fit even alone.
    #[error(
        "{needed} blocks of keys and values are needed, the pool has {pool}; shorten the request or give the worker more memory"
    )]
    NeverFits {
        /// Blocks at its full length.
        needed: u32,
        /// Blocks there are.
        pool: u32,
    },
    /// Come back later.
    #[error("{limit} sequences wait already")]
    QueueFull {
        /// The bound.
        limit: u32,
    },
    /// The caller's mistake.
    #[error("sequence {0:?} is alive already")]
    DuplicateId(SeqId),
}

/// How busy the scheduler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences that hold a slot.
    pub running: u32,
    /// Sequences that do not.
    pub waiting: u32,
    /// Sequences that wait for their readers.
    pub parked: u32,
    /// Tokens still to be computed before their sequences can decode.
    pub pending_prefill_tokens: u32,
    /// Blocks that some sequence holds.
    pub blocks_held: u32,
    /// Blocks whose content is only kept for later prefixes.
    pub blocks_cached: u32,
    /// Blocks in the pool.
    pub blocks_total: u32,
    /// Sequences sent back to wait because memory ran out, ever.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache, ever.
    pub prefix_query_tokens: u64,
    /// Prompt tokens found there, ever.
    pub prefix_hit_tokens: u64,
}

/// Keys that entered and left the prefix cache since the last call, net.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvDelta {
    /// Findable now.
    pub stored: Vec<u64>,
    /// Gone.
    pub removed: Vec<u64>,
}
