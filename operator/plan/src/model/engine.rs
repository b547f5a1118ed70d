//! How the model is computed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Quantity;

/// The number format of weights, activations and the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EngineDtype {
    /// FP32 on CPU, BF16 on GPU.
    #[default]
    Auto,
    /// 32-bit IEEE floats.
    FP32,
    /// bfloat16.
    BF16,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EngineLoadFormat {
    /// The source's *.safetensors.
    #[default]
    Safetensors,
    /// A formula.
    Dummy,
}

/// Which GPU kernels may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EngineKernels {
    /// The fastest that the GPU runs.
    #[default]
    Auto,
    /// Those that every GPU runs.
    Portable,
}

/// Whether finished prefixes stay for later requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EnginePrefixCache {
    /// Blocks stay until their memory is needed.
    #[default]
    Enabled,
    /// Every prompt is computed whole.
    Disabled,
}

/// Where sampling values come from that a request leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EngineGenerationDefaults {
    /// The model's generation_config.json.
    #[default]
    Auto,
    /// Temperature 1, nothing filtered.
    Neutral,
}

/// How the model is computed and how much it serves at once. A change of any of these makes a new revision: groups
/// are replaced as rollout says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Engine {
    /// loadFormat says where weights come from: Safetensors reads the source's files, Dummy makes random ones
    /// of the model's size, to try out a deployment and to measure it without anybody's files; the model
    /// then writes letters without sense. Defaults to Safetensors. With Dummy, model.source may be left out
    /// where model.shape gives the size; a folder needs config.json alone, and its tokenizer is used if it
    /// has one.
    pub load_format: EngineLoadFormat,
    /// kernels says which GPU kernels may be used: Auto takes those made for the GPU's architecture where
    /// there are any, Portable those alone that every architecture runs, which is slower. Defaults to Auto.
    /// Portable is refused on CPU.
    pub kernels: EngineKernels,
    /// dtype is the number format of weights, activations and KV cache: Auto, FP32 or BF16. Defaults to
    /// Auto: FP32 on CPU, BF16 on GPU. The CPU computes FP32 only. Halving the bytes of a number doubles
    /// how many fit.
    pub dtype: EngineDtype,
    /// maxModelLen is the longest prompt and output together, in tokens. Defaults to the model's
    /// max_position_embeddings, and may not exceed it. The KV cache must hold at least one such sequence.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16777216))]
    pub max_model_len: Option<u32>,
    /// maxConcurrentSequences is how many requests one group computes at the same time, 1 to 4096; as many
    /// more may wait inside the group. Defaults to 64. More gives throughput, less gives each request a
    /// shorter time per token.
    #[schemars(range(min = 1, max = 4096))]
    pub max_concurrent_sequences: u32,
    /// maxStepTokens is how many tokens one step computes, prompts and outputs together, 1 to 1048576.
    /// Defaults to 512. A long prompt is computed in chunks of what is left of it, so that running requests
    /// keep their pace. At least maxConcurrentSequences.
    #[schemars(range(min = 1, max = 1048576))]
    pub max_step_tokens: u32,
    /// interTokenLatencyTargetMs is the time between two tokens of a running answer, in milliseconds, that new prompts
    /// may not push it over, 0 to 60000. Defaults to 50. While an answer runs, each step computes as much of
    /// the prompts as keeps this, by what steps cost on these devices, and 128 tokens at least; 0 sets no
    /// bound. A smaller target lets first tokens wait longer.
    #[schemars(range(min = 0, max = 60000))]
    pub inter_token_latency_target_ms: u32,
    /// prefixCache keeps the keys and values of finished requests, so that a request with the same
    /// beginning does not compute it again: Enabled or Disabled. Defaults to Enabled. It never changes what
    /// is answered.
    pub prefix_cache: EnginePrefixCache,
    /// generationDefaults says where sampling values come from that a request leaves out: Auto takes the
    /// model's generation_config.json, Neutral takes temperature 1 with nothing filtered. Defaults to Auto.
    pub generation_defaults: EngineGenerationDefaults,
    /// chatTemplate is the text of a chat template in Jinja that is used instead of the model's own, at most 30000
    /// characters: to let a model call functions whose own template does not show them, for example.
    /// Defaults to the model's own: its chat_template.jinja, or what its tokenizer_config.json has.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 30000))]
    pub chat_template: Option<String>,
    /// kvCache says how much memory holds keys and values of running requests and cached prefixes.
    pub kv_cache: KvCache,
    /// image is the worker's container image, with a tag or a digest. Defaults to the image that the
    /// operator came with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            load_format: EngineLoadFormat::default(),
            kernels: EngineKernels::default(),
            dtype: EngineDtype::default(),
            max_model_len: None,
            max_concurrent_sequences: 64,
            max_step_tokens: 512,
            inter_token_latency_target_ms: 50,
            prefix_cache: EnginePrefixCache::default(),
            generation_defaults: EngineGenerationDefaults::default(),
            chat_template: None,
            kv_cache: KvCache::default(),
            image: None,
        }
    }
}

/// How much memory holds keys and values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct KvCache {
    /// bytes is the memory for keys and values of one group, all ranks together, as a quantity in bytes:
    /// 4Gi. Defaults to 1Gi on CPU; on GPU, to what deviceMemoryPercent leaves. Set this or
    /// deviceMemoryPercent, not both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Quantity>,
    /// deviceMemoryPercent is the share of each GPU's memory (accelerator.deviceMemory) that the worker may
    /// use, weights included, 10 to 98. What weights and workspace leave of it holds keys and values.
    /// Defaults to 92 on GPU; refused on CPU. It needs model.shape, where the model's config.json cannot be
    /// read in advance.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 98))]
    pub device_memory_percent: Option<u32>,
}

/// How the model is split over the devices of one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Parallelism {
    /// tensor is how many ranks share each layer of one group, 1 to 64; a group gets that many GPUs, on one
    /// node. Defaults to 1. It must divide the model's attention heads and feed-forward width, and divide
    /// or be a multiple of its key-value heads. More ranks hold larger models and answer sooner; more
    /// replicas serve more requests.
    #[schemars(range(min = 1, max = 64))]
    pub tensor: u32,
}

impl Default for Parallelism {
    fn default() -> Self {
        Self { tensor: 1 }
    }
}

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Device {
    /// NVIDIA GPUs.
    #[default]
    GPU,
    /// Host cores.
    CPU,
}

/// What computes, and how much memory it has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Accelerator {
    /// device is what computes: GPU or CPU. Defaults to GPU: each group asks for parallelism.tensor of the
    /// resource nvidia.com/gpu on one node. CPU needs no special node and suits small models.
    pub device: Device,
    /// deviceMemory is the memory of one GPU, as a quantity: 80Gi, 143771Mi. Needed on GPU unless
    /// engine.kvCache.bytes is set, because the KV cache is sized from it; refused on CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<Quantity>,
}
