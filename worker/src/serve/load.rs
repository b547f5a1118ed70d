//! From a model's folder to a group that has done its warm-up step.
//!
//! Cheap checks come first: text files, headers, and whether memory and context fit are known before the first byte
//! of weights is read.

use std::sync::Arc;

use swallow_proto::prefix;
use swallow_schedule::Limits;
use tracing::{info, warn};

use super::{Facts, Loaded, ModelFile, ServeError};
use crate::{
    checkpoint::{Checkpoint, GenerationConfig, LlamaConfig, TextFiles, eos_union, tokenizer_eos},
    config::{CacheShape, Config, Fit},
    device::cpu::HEAD_ROWS,
    engine::{Defaults, Door},
    group::{Group, GroupSpec, RankMemory},
    model::Shard,
    state::{Memory, State},
};

/// Loads the model that `config` names.
///
/// # Errors
/// The folder is not a model that this worker serves, the flags do not fit it, or a rank did not start.
pub(super) fn load(config: &Config, state: &State) -> Result<Loaded<Group>, ServeError> {
    let ranks = to_usize(config.tensor_parallel);
    let checkpoint = Arc::new(Checkpoint::open(&config.model, ranks)?);
    let text = TextFiles::read(&config.model)?;
    let generation = GenerationConfig::read(&text)?;
    if !generation.unused.is_empty() {
        warn!(keys = ?generation.unused, "generation_config.json sets what this worker has no default for");
    }
    let vocab_size = to_u32(checkpoint.config().vocab_size);
    let eos_token_ids = reachable(
        eos_union(checkpoint.config(), &generation, tokenizer_eos(&text)?),
        vocab_size,
    );
    let fit = config.fit(&cache_shape(checkpoint.config()))?;
    log_fit(config, &fit, checkpoint.config());

    let spec = GroupSpec {
        tensor_parallel: ranks,
        threads: to_usize(config.threads),
        block_tokens: to_usize(config.block_tokens),
        n_blocks: to_usize(fit.n_blocks),
        max_running: to_usize(config.max_running),
        max_step_tokens: to_usize(config.max_step_tokens),
        max_model_len: to_usize(fit.max_model_len),
        step_timeout: config.step_timeout,
        fault: None,
    };
    let planned = planned(checkpoint.config(), config, &fit);
    state.planned(planned);
    info!(
        weights_bytes = planned.weights_bytes,
        kv_bytes = planned.kv_bytes,
        workspace_bytes = planned.workspace_bytes,
        "memory planned"
    );
    let runner = Group::start(Arc::clone(&checkpoint), spec, state.loading())?;
    let measured = memory(&runner.memory().total);
    let defaults = if config.generation_defaults {
        Defaults::of_model(&generation)
    } else {
        Defaults::NEUTRAL
    };
    Ok(Loaded {
        limits: limits(config, &fit),
        facts: Facts {
            boot_id: rand::random(),
            max_model_len: fit.max_model_len,
            vocab_size,
            eos_token_ids: Arc::clone(&eos_token_ids),
            files: text
                .files()
                .iter()
                .map(|file| ModelFile {
                    name: file.name.to_owned(),
                    digest: file.digest.clone(),
                    bytes: file.bytes.clone(),
                })
                .collect(),
        },
        door: Door {
            max_model_len: fit.max_model_len,
            vocab_size,
            eos_token_ids,
            defaults,
        },
        measured,
        runner,
    })
}

fn limits(config: &Config, fit: &Fit) -> Limits {
    Limits {
        block_tokens: config.block_tokens,
        n_blocks: fit.n_blocks,
        max_running: config.max_running,
        max_step_tokens: config.max_step_tokens,
        max_model_len: fit.max_model_len,
        max_waiting: config.max_waiting,
        prefix_cache: config.prefix_cache,
        key_of: prefix::next,
    }
}

/// The ends that the model can say. One beyond its vocabulary is a slip of its authors that stops nothing.
fn reachable(mut eos: Vec<u32>, vocab_size: u32) -> Arc<[u32]> {
    eos.retain(|id| {
        let known = *id < vocab_size;
        if !known {
            warn!(
                id,
                vocab_size, "an end-of-text token is beyond the vocabulary and is ignored"
            );
        }
        known
    });
    if eos.is_empty() {
        warn!("the model names no end-of-text token; texts end at max_tokens alone");
    }
    eos.into()
}

fn cache_shape(model: &LlamaConfig) -> CacheShape {
    CacheShape {
        n_layers: to_u32(model.n_layers),
        n_kv_heads: to_u32(model.n_kv_heads),
        head_dim: to_u32(model.head_dim),
        max_position_embeddings: to_u32(model.max_position_embeddings),
    }
}

fn log_fit(config: &Config, fit: &Fit, model: &LlamaConfig) {
    if config.max_model_len.is_none() && to_usize(fit.max_model_len) < model.max_position_embeddings {
        info!(
            max_model_len = fit.max_model_len,
            max_position_embeddings = model.max_position_embeddings,
            kv_bytes = config.kv_bytes,
            "the context is as long as --kv-bytes allows"
        );
    }
    info!(
        blocks = fit.n_blocks,
        block_tokens = config.block_tokens,
        block_bytes = fit.block_bytes,
        max_model_len = fit.max_model_len,
        "cache of keys and values"
    );
}

/// What loading will need, in fp32: the slices of every rank, the pool, and the activations of the largest step.
fn planned(model: &LlamaConfig, config: &Config, fit: &Fit) -> Memory {
    const FP32: u64 = 4;
    let of = to_usize(config.tensor_parallel);
    let rows = to_usize(config.max_step_tokens);
    // The residual stream, its norm, and what the ranks add up: a rank's own sum, and two turns of exchange.
    let streams = if of > 1 { 5 } else { 3 };
    let (mut weights, mut activations) = (0, 0);
    for shard in (0..of).map(|rank| Shard { rank, of }) {
        let slices = shard.slices(model);
        weights += slices.iter().map(|slice| slice.outs * slice.ins).sum::<usize>();
        let (heads, inner) = (shard.heads(model), shard.part(model.intermediate_size).len());
        // The inputs of a product are laid out anew for it.
        let widest = slices.iter().map(|slice| slice.ins).max().unwrap_or(0);
        let row =
            streams * model.hidden_size + heads.qkv_width() + heads.n_q * heads.dim + 3 * inner + widest;
        activations += rows * row + HEAD_ROWS * slices.embedding.outs;
    }
    Memory {
        weights_bytes: FP32 * weights as u64,
        kv_bytes: fit.block_bytes * u64::from(fit.n_blocks),
        workspace_bytes: FP32 * activations as u64,
    }
}

fn memory(report: &RankMemory) -> Memory {
    Memory {
        weights_bytes: report.weights_bytes,
        kv_bytes: report.kv_bytes,
        workspace_bytes: report.workspace_bytes,
    }
}

fn to_usize(n: u32) -> usize {
    usize::try_from(n).expect("a usize has at least 32 bits here")
}

fn to_u32(n: usize) -> u32 {
    u32::try_from(n).expect("the checkpoint bounds its sizes")
}
