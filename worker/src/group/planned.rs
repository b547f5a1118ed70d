//! What a group will allocate on GPUs, known before anything is.

use super::{GroupSpec, RankMemory};
use crate::{checkpoint::LlamaConfig, device::cuda, model::Slice};

/// Bytes of all ranks that run together: weights in bf16, norms and rotary frequencies in fp32, and the pool that `spec` names.
pub fn on_gpus(model: &LlamaConfig, spec: &GroupSpec) -> RankMemory {
    const BF16: usize = 2;
    const FP32: usize = 4;
    let mut memory = RankMemory::default();
    for rank in 0..spec.n_members() {
        let shard = spec.shard(rank);
        let slices = shard.slices(model);
        let bytes = |slice: &Slice| slice.outs * slice.ins * if slice.ins == 1 { FP32 } else { BF16 };
        memory.weights_bytes += (slices.iter().map(bytes).sum::<usize>() + model.head_dim / 2 * FP32) as u64;
        memory.workspace_bytes += cuda::workspace_bytes(&spec.cuda(model, rank));
        let heads = shard.heads(model);
        memory.kv_bytes +=
            (2 * model.n_layers * heads.n_kv * heads.dim * BF16 * spec.block_tokens * spec.n_blocks) as u64;
    }
    memory
}
