//! The model's size, and whether ranks, threads and memory go with it.

use super::{Problems, Refused};
use crate::{
    memory::{BLOCK_TOKENS, Demand, KvSizing, MemoryPlan},
    model::{Device, EngineDtype, PresetName, Problem, ShapeNumbers, ShapeSpec, SwallowModelSpec},
    topology::{Shape, TENSOR_MAX},
};

/// Share of a GPU's memory that is used unless the spec says otherwise, in percent.
const DEVICE_MEMORY_PERCENT: u64 = 92;
/// KV cache of a group on CPU unless the spec says otherwise, in bytes.
const CPU_KV_BYTES: u64 = 1 << 30;

/// The model's size: what config.json says where it was read, else what the spec says.
pub(super) fn shape(
    spec: Option<&ShapeSpec>,
    read: Option<&Shape>,
    problems: &mut Problems,
) -> Option<Shape> {
    let field = "spec.model.shape";
    let written = match spec {
        None => None,
        Some(ShapeSpec {
            preset: Some(preset),
            numbers: None,
        }) => Some(match preset {
            PresetName::Llama3_8B => Shape::LLAMA_3_8B,
            PresetName::Llama3_70B => Shape::LLAMA_3_70B,
        }),
        Some(ShapeSpec {
            preset: None,
            numbers: Some(numbers),
        }) => numbers_to_shape(numbers, problems),
        Some(_) => {
            problems.add(field, "set preset or numbers, one of them");
            None
        }
    };
    let (Some(written), Some(read)) = (written, read) else {
        return read.copied().or(written);
    };
    // A preset stands for a family whose members differ in their context.
    let is_preset = spec.is_some_and(|spec| spec.preset.is_some());
    let context = if is_preset {
        read.max_position_embeddings
    } else {
        written.max_position_embeddings
    };
    if (Shape {
        max_position_embeddings: context,
        ..written
    }) != *read
    {
        problems.add(
            field,
            format!(
                "does not agree with the model's config.json ({}): leave it out",
                in_words(read)
            ),
        );
    }
    Some(*read)
}

fn in_words(shape: &Shape) -> String {
    format!(
        "hidden size {}, {} layers, {} heads, {} key-value heads of {}, intermediate size {}, vocabulary {}, context {}",
        shape.hidden_size,
        shape.n_layers,
        shape.n_heads,
        shape.n_kv_heads,
        shape.head_dim,
        shape.intermediate_size,
        shape.vocab_size,
        shape.max_position_embeddings
    )
}

fn numbers_to_shape(numbers: &ShapeNumbers, problems: &mut Problems) -> Option<Shape> {
    if numbers.attention_heads == 0 || numbers.key_value_heads == 0 {
        return None;
    }
    let head_dim = match numbers.head_dim {
        Some(head_dim) => head_dim,
        None if numbers.hidden_size.is_multiple_of(numbers.attention_heads) => {
            numbers.hidden_size / numbers.attention_heads
        }
        None => {
            problems.add(
                "spec.model.shape.numbers.headDim",
                "is missing, and attentionHeads does not divide hiddenSize: write it",
            );
            return None;
        }
    };
    Some(Shape {
        hidden_size: numbers.hidden_size,
        n_layers: numbers.layers,
        n_heads: numbers.attention_heads,
        n_kv_heads: numbers.key_value_heads,
        head_dim,
        intermediate_size: numbers.intermediate_size,
        vocab_size: numbers.vocabulary_size,
        max_position_embeddings: numbers.max_position_embeddings,
        tied_head: numbers.tie_word_embeddings,
    })
}

pub(super) fn check_shape(shape: &Shape, spec: &SwallowModelSpec, problems: &mut Problems) {
    let tensor = spec.parallelism.tensor;
    if (1..=TENSOR_MAX).contains(&tensor)
        && let Some(obstacle) = shape.obstacle(tensor)
    {
        let degrees: Vec<String> = shape.degrees().iter().map(u32::to_string).collect();
        let message = format!("{tensor} {obstacle}: write {}", degrees.join(", "));
        problems.add("spec.parallelism.tensor", message);
    }
    if let Some(length) = spec
        .engine
        .max_model_len
        .filter(|length| *length > shape.max_position_embeddings)
    {
        let message = format!(
            "is {length}, the model's context is {}: write at most that",
            shape.max_position_embeddings
        );
        problems.add("spec.engine.maxModelLen", message);
    }
}

/// On CPU a limit on processors is a number of threads, at least one for each rank.
pub(super) fn threads(spec: &SwallowModelSpec, problems: &mut Problems) -> Option<u32> {
    if spec.accelerator.device != Device::CPU {
        return None;
    }
    let limit = problems.whole("spec.resources.limits.cpu", spec.resources.limits.get("cpu"))?;
    Some(
        u32::try_from(limit)
            .unwrap_or(u32::MAX)
            .clamp(spec.parallelism.tensor.max(1), THREADS_MAX),
    )
}

/// The most threads that a worker computes with.
const THREADS_MAX: u32 = 4096;

/// How the KV cache is sized, and what one device (GPU) or the pod (CPU) may use.
pub(super) fn kv_sizing(
    spec: &SwallowModelSpec,
    shape_known: bool,
    problems: &mut Problems,
) -> (KvSizing, Option<u64>) {
    let kv = &spec.engine.kv_cache;
    let size = problems.whole("spec.engine.kvCache.bytes", kv.bytes.as_ref());
    problems.check(
        size != Some(0),
        "spec.engine.kvCache.bytes",
        "is 0: write how much memory holds keys and values",
    );
    let given = kv.bytes.is_some();
    problems.check(
        !(given && kv.device_memory_percent.is_some()),
        "spec.engine.kvCache",
        "has both bytes and deviceMemoryPercent: write one of them",
    );
    let memory = problems.whole(
        "spec.accelerator.deviceMemory",
        spec.accelerator.device_memory.as_ref(),
    );
    if spec.accelerator.device == Device::CPU {
        problems.check(
            kv.device_memory_percent.is_none(),
            "spec.engine.kvCache.deviceMemoryPercent",
            "is for GPU: on CPU write bytes",
        );
        problems.check(
            spec.accelerator.device_memory.is_none(),
            "spec.accelerator.deviceMemory",
            "is for GPU: leave it out on CPU",
        );
        let limit = problems.whole(
            "spec.resources.limits.memory",
            spec.resources.limits.get("memory"),
        );
        return (KvSizing::Bytes(size.unwrap_or(CPU_KV_BYTES)), limit);
    }
    let percent = kv.device_memory_percent.map_or(DEVICE_MEMORY_PERCENT, u64::from);
    let budget = memory.map(|bytes| bytes / 100 * percent);
    if given {
        return (KvSizing::Bytes(size.unwrap_or_default()), budget);
    }
    if spec.accelerator.device_memory.is_none() {
        let message = "is missing: write the memory of one GPU, such as 80Gi, or set engine.kvCache.bytes, or compute \
                       on CPU with accelerator.device: CPU";
        problems.add("spec.accelerator.deviceMemory", message);
    } else if !shape_known {
        let message = "is missing: the KV cache gets what the weights leave of deviceMemory, so write the model's \
                       shape, or set engine.kvCache.bytes";
        problems.add("spec.model.shape", message);
    }
    (KvSizing::Rest, budget)
}

pub(super) fn memory(
    spec: &SwallowModelSpec,
    shape: Shape,
    kv: KvSizing,
    budget: Option<u64>,
) -> Result<MemoryPlan, Refused> {
    let on_cpu = spec.accelerator.device == Device::CPU;
    let number_bytes = match spec.engine.dtype {
        EngineDtype::FP32 => 4,
        EngineDtype::BF16 => 2,
        EngineDtype::Auto => 2 + 2 * u64::from(on_cpu),
    };
    let demand = Demand {
        shape,
        tensor: spec.parallelism.tensor,
        device: spec.accelerator.device,
        number_bytes,
        kv,
        budget_bytes: budget,
    };
    let plan = MemoryPlan::new(&demand).map_err(|misfit| Refused::DoesNotFit { misfit, shape })?;
    match spec.engine.max_model_len {
        Some(length) if u64::from(length) > plan.kv_tokens => {
            let needed = u64::from(length.div_ceil(BLOCK_TOKENS))
                * u64::from(BLOCK_TOKENS)
                * plan.kv_bytes_per_token
                * u64::from(plan.tensor);
            let message = format!(
                "is {length}, and the KV cache holds {} tokens: write at most that, or engine.kvCache.bytes: {}Mi",
                plan.kv_tokens,
                needed.div_ceil(1 << 20)
            );
            Err(Refused::Invalid(vec![Problem::new(
                "spec.engine.maxModelLen",
                message,
            )]))
        }
        _ => Ok(plan),
    }
}
