//! How a group is made: its sizes, what it computes on, and what a test breaks in it.

use std::time::Duration;

use super::GroupError;
use crate::{
    checkpoint::LlamaConfig,
    device::{
        AHEAD_MAX, VocabSplit,
        cuda::{CudaSpec, Options},
    },
    model::Shard,
};

/// What ranks compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Machine {
    /// This machine's processors, in fp32.
    #[default]
    Cpu,
    /// One NVIDIA GPU a rank, in bf16.
    Cuda,
}

/// How a group is made.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    /// What the ranks compute on.
    pub machine: Machine,
    /// Ranks.
    pub tensor_parallel: usize,
    /// For benchmarks: of these ranks the first one runs alone, with its share of the vocabulary, and nothing is exchanged.
    /// What it computes means nothing; it takes the time that its part of the group's work takes.
    pub rank_alone: bool,
    /// Threads of all ranks together on processors; each rank has at least one.
    pub threads: usize,
    /// Tokens in one block.
    pub block_tokens: usize,
    /// Blocks in the pool; every rank holds its heads of each.
    pub n_blocks: usize,
    /// Slots.
    pub max_running: usize,
    /// Rows of the largest step.
    pub max_step_tokens: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// A step that takes longer has stalled.
    pub step_timeout: Duration,
    /// Steps that may be launched before the first of them is finished, 1 or 2. With 2 a device that runs by itself
    /// never waits for the host between steps, and what arrives in a step waits for one more.
    pub steps_ahead: usize,
    /// How GPUs compute; processors have no choice.
    pub gpu: Options,
    /// For benchmarks: keys and values are random numbers from the start, as if something had been computed.
    pub random_kv: bool,
    /// Test instrument, on no command line: a rank that misbehaves.
    pub fault: Option<Fault>,
}

impl GroupSpec {
    /// Ranks that run.
    pub fn n_members(&self) -> usize {
        if self.rank_alone { 1 } else { self.tensor_parallel }
    }

    /// A rank's part of the model.
    pub(super) fn shard(&self, rank: usize) -> Shard {
        Shard {
            rank,
            of: self.tensor_parallel,
        }
    }

    /// The vocabulary over the ranks that run.
    pub fn vocabulary(&self, config: &LlamaConfig) -> VocabSplit {
        match self.rank_alone {
            true => VocabSplit::new(self.shard(0).part(config.vocab_size).len(), 1),
            false => VocabSplit::new(config.vocab_size, self.tensor_parallel),
        }
    }

    /// A rank's device where ranks are GPUs.
    pub(super) fn cuda(&self, config: &LlamaConfig, rank: usize) -> CudaSpec {
        let shard = self.shard(rank);
        CudaSpec {
            shard: Shard {
                rank,
                of: self.n_members(),
            },
            divided: self.tensor_parallel,
            vocabulary: config.vocab_size,
            max_running: self.max_running,
            max_rows: self.max_step_tokens,
            max_model_len: self.max_model_len,
            block_tokens: self.block_tokens,
            hidden: config.hidden_size,
            heads: shard.heads(config),
            inner: shard.part(config.intermediate_size).len(),
            split: self.vocabulary(config),
            options: self.gpu.clone(),
        }
    }
}

/// Test instrument: what goes wrong, where, and in which step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Who.
    pub rank: usize,
    /// When.
    pub step: u64,
    /// What.
    pub kind: FaultKind,
}

/// Ways to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The rank's thread panics.
    Panic,
    /// The rank does nothing until the group is gone.
    Stall,
    /// The rank's residual stream is changed.
    Diverge,
}

/// Whether a group of this model can be made like this.
pub(super) fn check(spec: &GroupSpec, config: &LlamaConfig) -> Result<(), GroupError> {
    if let Some(obstacle) = config.tensor_parallel_obstacle(spec.tensor_parallel) {
        return Err(GroupError::Spec(obstacle));
    }
    let counts = [
        ("block_tokens", spec.block_tokens),
        ("n_blocks", spec.n_blocks),
        ("max_running", spec.max_running),
        ("max_step_tokens", spec.max_step_tokens),
        ("max_model_len", spec.max_model_len),
        ("steps_ahead", spec.steps_ahead),
    ];
    for (name, count) in counts {
        if count == 0 {
            return Err(GroupError::Spec(format!("{name} is 0; it must be at least 1")));
        }
    }
    if spec.steps_ahead > AHEAD_MAX {
        return Err(GroupError::Spec(format!(
            "steps_ahead is {}; it must be at most {AHEAD_MAX}",
            spec.steps_ahead
        )));
    }
    if spec.n_blocks.saturating_mul(spec.block_tokens) > u32::MAX as usize {
        return Err(GroupError::Spec(format!(
            "{} blocks of {} tokens are more than 2^32 tokens; lower the memory for keys and values",
            spec.n_blocks, spec.block_tokens
        )));
    }
    Ok(())
}
