//! From a model's folder to a group that has done its warm-up step.
//!
//! Cheap checks come first: text files, headers, and whether memory and context fit are known before the first byte
//! of weights is read.

use std::sync::Arc;

use swallow_proto::{
    launch::{DeviceKind, LoadFormat},
    prefix,
};
use swallow_schedule::Limits;
use tracing::{info, warn};

use super::{Facts, Loaded, ModelFile, ServeError, calibrate};
use crate::{
    checkpoint::{Checkpoint, GenerationConfig, LlamaConfig, TextFiles, eos_union, tokenizer_eos},
    config::{CacheShape, Config, Fit},
    device::{
        AHEAD_MAX,
        cpu::HEAD_ROWS,
        cuda::{self, Options, Products},
    },
    dummy::DummyModel,
    engine::{Defaults, Door},
    group::{Group, GroupSpec, Machine, RankMemory, planned_on_gpus},
    model::{Shard, Weights},
    state::{Memory, State},
};

/// Loads the model that `config` names.
///
/// # Errors
/// The folder is not a model that this worker serves, the flags do not fit it, or a rank did not start.
pub(super) fn load(config: &Config, state: &State) -> Result<Loaded<Group>, ServeError> {
    let ranks = to_usize(config.tensor_parallel);
    let (weights, text) = open(config, ranks)?;
    let text = match &config.chat_template {
        Some(template) => text.with_chat_template(template),
        None => text,
    };
    let model = weights.config().clone();
    let generation = GenerationConfig::read(&text)?;
    if !generation.unused.is_empty() {
        warn!(keys = ?generation.unused, "generation_config.json sets what this worker has no default for");
    }
    let vocab_size = to_u32(model.vocab_size);
    let eos_token_ids = reachable(eos_union(&model, &generation, tokenizer_eos(&text)?), vocab_size);
    let machine = machine(config.device)?;
    if machine == Machine::Cpu && (config.product_choices.is_some() || config.debug_kernels) {
        warn!("--product-choices and --debug-kernels are for GPUs: processors have nothing of them");
    }
    let config = &with_kv_bytes(config, machine, &model)?;
    let fit = config.fit(&cache_shape(&model, machine))?;
    log_fit(config, &fit, &model);

    let spec = group_spec(config, machine, &fit);
    let planned = match machine {
        Machine::Cpu => planned(&model, config, &fit),
        Machine::Cuda => planned_cuda(&model, config, &fit),
    };
    state.planned(planned);
    info!(
        weights_bytes = planned.weights_bytes,
        kv_bytes = planned.kv_bytes,
        workspace_bytes = planned.workspace_bytes,
        "memory planned"
    );
    let mut runner = Group::start(weights, spec, state.loading())?;
    log_loading(config, state);
    let measured = memory(&runner.memory().total);
    let limits = limits(config, &fit);
    let pace = match config.inter_token_latency_target {
        Some(target) => Some(calibrate::pace(&mut runner, &limits, target)?),
        None => None,
    };
    let defaults = if config.generation_defaults {
        Defaults::of_model(&generation)
    } else {
        Defaults::NEUTRAL
    };
    Ok(Loaded {
        limits,
        pace,
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

/// The group that these flags ask for.
fn group_spec(config: &Config, machine: Machine, fit: &Fit) -> GroupSpec {
    GroupSpec {
        machine,
        tensor_parallel: to_usize(config.tensor_parallel),
        rank_alone: false,
        threads: to_usize(config.threads),
        block_tokens: to_usize(config.block_tokens),
        n_blocks: to_usize(fit.n_blocks),
        max_running: to_usize(config.max_running),
        max_step_tokens: to_usize(config.max_step_tokens),
        max_model_len: to_usize(fit.max_model_len),
        step_timeout: config.step_timeout,
        // Processors compute on the thread that would launch, so they gain nothing.
        steps_ahead: match machine {
            Machine::Cpu => 1,
            Machine::Cuda => AHEAD_MAX,
        },
        gpu: Options {
            portable: config.portable_kernels,
            products: match &config.product_choices {
                Some(file) => Products::Pinned(file.clone()),
                None => Products::Kept,
            },
            debug: config.debug_kernels,
            ..Options::default()
        },
        random_kv: false,
        fault: None,
    }
}

/// Where the model's weights come from, and its text files.
fn open(config: &Config, ranks: usize) -> Result<(Weights, TextFiles), ServeError> {
    Ok(match config.load_format {
        LoadFormat::Safetensors => {
            let checkpoint = Arc::new(Checkpoint::open(&config.model, ranks)?);
            (checkpoint.into(), TextFiles::read(&config.model)?)
        }
        LoadFormat::Dummy => {
            let dummy = DummyModel::open(&config.model, ranks)?;
            warn!("weights are random: the model writes letters without sense");
            (dummy.config.into(), dummy.text)
        }
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

/// What the ranks compute on. With `auto` a machine whose GPUs cannot be used computes on its processors, and says why.
fn machine(device: DeviceKind) -> Result<Machine, ServeError> {
    match device {
        DeviceKind::Cpu => Ok(Machine::Cpu),
        DeviceKind::Cuda => Ok(Machine::Cuda),
        DeviceKind::Auto => Ok(match cuda::available() {
            Ok(()) => Machine::Cuda,
            Err(error) => {
                info!("computing on the CPU: {error}");
                Machine::Cpu
            }
        }),
    }
}

/// The flags, with the bytes for keys and values that the GPUs' memory leaves if that is what they ask for.
fn with_kv_bytes(config: &Config, machine: Machine, model: &LlamaConfig) -> Result<Config, ServeError> {
    let mut config = config.clone();
    if machine == Machine::Cpu {
        return Ok(config);
    }
    let ranks = to_usize(config.tensor_parallel);
    let survey = cuda::survey(ranks)?;
    let Some(percent) = config.device_memory_percent else {
        return Ok(config);
    };
    let used = survey.total_bytes - survey.free_bytes;
    let nothing = Fit {
        block_bytes: 0,
        n_blocks: 0,
        max_model_len: config
            .max_model_len
            .unwrap_or(to_u32(model.max_position_embeddings)),
    };
    let needed = planned_cuda(model, &config, &nothing);
    let rank = (needed.weights_bytes + needed.workspace_bytes).div_ceil(u64::from(config.tensor_parallel));
    let budget = survey.total_bytes / 100 * u64::from(percent);
    let left = budget.saturating_sub(used + rank);
    info!(
        gpu = survey.name,
        total_bytes = survey.total_bytes,
        free_bytes = survey.free_bytes,
        percent,
        kv_bytes_a_gpu = left,
        "memory for keys and values"
    );
    config.kv_bytes = left * u64::from(config.tensor_parallel);
    Ok(config)
}

fn cache_shape(model: &LlamaConfig, machine: Machine) -> CacheShape {
    CacheShape {
        n_layers: to_u32(model.n_layers),
        n_kv_heads: to_u32(model.n_kv_heads),
        head_dim: to_u32(model.head_dim),
        number_bytes: match machine {
            Machine::Cpu => 4,
            Machine::Cuda => 2,
        },
        max_position_embeddings: to_u32(model.max_position_embeddings),
    }
}

/// How fast the weights came. Dummy ones are counted as they are kept on a GPU, in bf16.
fn log_loading(config: &Config, state: &State) {
    let progress = state.progress();
    let Some(seconds) = progress.seconds else { return };
    info!(
        bytes = progress.bytes_done,
        seconds = (seconds * 1e3).round() / 1e3,
        gb_per_s = (progress.bytes_done as f64 / 1e7 / seconds.max(1e-9)).round() / 1e2,
        made = config.load_format == LoadFormat::Dummy,
        "weights are in memory"
    );
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

/// What loading will need on GPUs.
fn planned_cuda(model: &LlamaConfig, config: &Config, fit: &Fit) -> Memory {
    Memory {
        kv_bytes: fit.block_bytes * u64::from(fit.n_blocks),
        ..memory(&planned_on_gpus(model, &group_spec(config, Machine::Cuda, fit)))
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
