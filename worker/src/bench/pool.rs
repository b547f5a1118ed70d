//! How many blocks the pool has: on processors what the largest cell needs, on GPUs what a server would have.

use super::{BLOCK_TOKENS, BenchError};
use crate::{
    checkpoint::LlamaConfig,
    device::cuda,
    group::{GroupSpec, Machine, planned_on_gpus},
    model::Shard,
};

/// Bytes of a number of keys and values on a GPU.
const NUMBER_BYTES: usize = 2;

/// Blocks of a group like `spec`, which has as many as the cells need.
pub(super) fn blocks(config: &LlamaConfig, spec: &GroupSpec, percent: u32) -> Result<usize, BenchError> {
    if spec.machine == Machine::Cpu {
        return Ok(spec.n_blocks);
    }
    let ranks = spec.n_members();
    if let Some(obstacle) = config.tensor_parallel_obstacle(spec.tensor_parallel) {
        return Err(BenchError::Flag(obstacle));
    }
    let survey = cuda::survey(ranks)?;
    let planned = planned_on_gpus(config, spec);
    let rank = (planned.weights_bytes + planned.workspace_bytes).div_ceil(ranks as u64);
    let used = survey.total_bytes - survey.free_bytes;
    let left = (survey.total_bytes / 100 * u64::from(percent)).saturating_sub(used + rank);
    let rank_0 = Shard {
        rank: 0,
        of: spec.tensor_parallel,
    };
    let heads = rank_0.heads(config);
    let block = 2 * config.n_layers * heads.n_kv * heads.dim * BLOCK_TOKENS * NUMBER_BYTES;
    let most = u32::MAX as usize / BLOCK_TOKENS - 1;
    let blocks = usize::try_from(left).unwrap_or(usize::MAX) / block;
    if blocks < spec.n_blocks {
        return Err(BenchError::Flag(format!(
            "{percent} % of the GPU's memory leaves room for keys and values of {} tokens, and the largest cell has {}; \
             give smaller --batch or --prefill-tokens, or more --tensor-parallel",
            blocks * BLOCK_TOKENS,
            spec.n_blocks * BLOCK_TOKENS
        )));
    }
    Ok(blocks.min(most))
}
