//! config.json, read strictly: what the forward pass computes is accepted, what it does not is refused by key.
//!
//! Keys nobody here has heard of are ignored, because every exporter adds its own. Keys known to change what a
//! Llama-like model computes are not: each is listed below with the one value that changes nothing.

use std::path::Path;

use serde_json::Value;

use super::{
    error::CheckpointError,
    json::Fields,
    layout,
    rope::{self, Rope},
};

/// The shape of a Llama model and the numbers of its arithmetic.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head, even. `n_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Inner width of the gated MLP.
    pub intermediate_size: usize,
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square before its root.
    pub rms_norm_eps: f64,
    /// The rotary position embedding.
    pub rope: Rope,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// The token that begins a text, if config.json names one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text, as config.json alone names them; maybe none.
    pub eos_token_ids: Vec<u32>,
}

/// The largest sizes accepted: far above any Llama, low enough that no product of them overflows.
pub(crate) struct Limits;

impl Limits {
    pub(crate) const HIDDEN: usize = 1 << 17;
    pub(crate) const LAYERS: usize = 1 << 10;
    pub(crate) const HEADS: usize = 1 << 10;
    pub(crate) const HEAD_DIM: usize = 1 << 10;
    pub(crate) const INTERMEDIATE: usize = 1 << 20;
    pub(crate) const VOCAB: usize = 1 << 22;
    pub(crate) const POSITIONS: usize = 1 << 24;
}

const CONFIG_BYTES: u64 = 4 << 20; // real ones have about a kilobyte

impl LlamaConfig {
    /// Reads and checks `config.json` in `dir`.
    pub fn read(dir: &Path) -> Result<LlamaConfig, CheckpointError> {
        let advice = "the model's folder must hold the model's config.json in the Hugging Face layout";
        LlamaConfig::from_fields(&Fields::read(&dir.join("config.json"), CONFIG_BYTES, advice)?)
    }

    /// Checks the text of a config.json; `file` is its name in messages.
    pub fn parse(file: &Path, text: &[u8]) -> Result<LlamaConfig, CheckpointError> {
        LlamaConfig::from_fields(&Fields::parse(file, text)?)
    }

    fn from_fields(fields: &Fields) -> Result<LlamaConfig, CheckpointError> {
        check_architecture(fields)?;
        check_computation(fields)?;
        let hidden_size = fields.needed_size("hidden_size", Limits::HIDDEN)?;
        let n_heads = fields.needed_size("num_attention_heads", Limits::HEADS)?;
        let n_kv_heads = fields
            .size("num_key_value_heads", Limits::HEADS)?
            .unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads, {n_heads}");
            return Err(fields.wrong("num_key_value_heads", expected));
        }
        let vocab_size = fields.needed_size("vocab_size", Limits::VOCAB)?;
        let bos = match fields.token_ids("bos_token_id", Some(vocab_size))?.as_slice() {
            [] => None,
            [id] => Some(*id),
            _ => return Err(fields.wrong("bos_token_id", "one token id")),
        };
        Ok(LlamaConfig {
            hidden_size,
            n_layers: fields.needed_size("num_hidden_layers", Limits::LAYERS)?,
            n_heads,
            n_kv_heads,
            head_dim: head_dim(fields, hidden_size, n_heads)?,
            intermediate_size: fields.needed_size("intermediate_size", Limits::INTERMEDIATE)?,
            vocab_size,
            max_position_embeddings: fields.needed_size("max_position_embeddings", Limits::POSITIONS)?,
            rms_norm_eps: fields.needed_number("rms_norm_eps", "a number above 0 and at most 0.1", |x| {
                x > 0.0 && x <= 0.1
            })?,
            rope: rope::parse(fields)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: bos,
            eos_token_ids: fields.token_ids("eos_token_id", Some(vocab_size))?,
        })
    }

    /// Numbers in all tensors of a model of this shape.
    pub fn n_parameters(&self) -> u64 {
        layout::needed(self)
            .map(|(_, shape)| shape.iter().map(|n| *n as u64).product::<u64>())
            .sum()
    }

    /// The tensor-parallel degrees, up to 64, that this shape can be cut into.
    pub fn tensor_parallel_degrees(&self) -> Vec<usize> {
        const MOST: usize = 64; // ranks live in one process on one machine
        (1..=MOST)
            .filter(|degree| self.tensor_parallel_obstacle(*degree).is_none())
            .collect()
    }

    /// Refuses a degree that this shape, which `file` gives, cannot be cut into.
    pub(crate) fn check_tensor_parallel(&self, file: &Path, degree: usize) -> Result<(), CheckpointError> {
        let Some(why) = self.tensor_parallel_obstacle(degree) else {
            return Ok(());
        };
        let valid: Vec<String> = self
            .tensor_parallel_degrees()
            .iter()
            .map(usize::to_string)
            .collect();
        Err(CheckpointError::TensorParallel {
            file: file.into(),
            asked: degree,
            why,
            valid: valid.join(", "),
        })
    }

    /// The first number that does not divide among `degree` ranks; None when all do.
    ///
    /// Key and value heads either divide among ranks or are replicated, whole, on equally many ranks each. The
    /// vocabulary is no obstacle: its last shard may be short.
    pub fn tensor_parallel_obstacle(&self, degree: usize) -> Option<String> {
        if degree == 0 {
            return Some("there must be at least one rank".into());
        }
        if !self.n_heads.is_multiple_of(degree) {
            return Some(format!(
                "num_attention_heads {} does not divide by it",
                self.n_heads
            ));
        }
        if !self.n_kv_heads.is_multiple_of(degree) && !degree.is_multiple_of(self.n_kv_heads) {
            let n = self.n_kv_heads;
            return Some(format!(
                "num_key_value_heads {n} neither divides by it nor divides it"
            ));
        }
        if !self.intermediate_size.is_multiple_of(degree) {
            return Some(format!(
                "intermediate_size {} does not divide by it",
                self.intermediate_size
            ));
        }
        None
    }
}

fn head_dim(fields: &Fields, hidden_size: usize, n_heads: usize) -> Result<usize, CheckpointError> {
    let head_dim = match fields.size("head_dim", Limits::HEAD_DIM)? {
        Some(explicit) => explicit,
        None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let expected = format!("a multiple of num_attention_heads, {n_heads}, or an explicit head_dim");
            return Err(fields.wrong("hidden_size", expected));
        }
    };
    if head_dim > Limits::HEAD_DIM || !head_dim.is_multiple_of(2) {
        let expected = format!(
            "an even head width of at most {}, not {head_dim}",
            Limits::HEAD_DIM
        );
        let key = if fields.get("head_dim").is_some() {
            "head_dim"
        } else {
            "hidden_size"
        };
        return Err(fields.wrong(key, expected));
    }
    Ok(head_dim)
}

fn check_architecture(fields: &Fields) -> Result<(), CheckpointError> {
    const SUPPORTED: &str = "only Llama models are supported";
    let known = |name: &Value| matches!(name.as_str(), Some("LlamaForCausalLM" | "LLaMAForCausalLM"));
    let named = fields.get("architectures").and_then(Value::as_array);
    if !named.is_some_and(|names| names.iter().any(known)) {
        return Err(fields.wrong_advised("architectures", "[\"LlamaForCausalLM\"]", SUPPORTED));
    }
    if fields.text("model_type")? != Some("llama") {
        return Err(fields.wrong_advised("model_type", "\"llama\"", SUPPORTED));
    }
    if !matches!(fields.text("hidden_act")?, None | Some("silu")) {
        return Err(fields.wrong_advised("hidden_act", "\"silu\"", "no other activation is supported"));
    }
    Ok(())
}

/// The value of a key that leaves the computation as it is. Null always does.
#[derive(Clone, Copy)]
enum Neutral {
    /// Only null.
    Null,
    /// `false`.
    False,
    /// The number 1.
    One,
    /// The number 0.
    Zero,
    /// A list whose every entry is this string.
    All(&'static str),
}

const NO_BIAS: &str = "a bias the model code does not apply";
const NO_QUANT: &str = "quantised weights are not supported: convert the checkpoint to BF16";
const NO_MOE: &str = "mixtures of experts are not supported";
const NO_WINDOW: &str = "every layer attends to the whole context";
const OTHER: &str = "the model code does not compute this";

/// Keys that change what a Llama-like model computes, and the values at which they do not. They come from
/// architectures that grew out of Llama, whose configs are sometimes relabelled as Llama.
const COMPUTATION: &[(&str, Neutral, &str)] = &[
    ("attention_bias", Neutral::False, NO_BIAS),
    ("mlp_bias", Neutral::False, NO_BIAS),
    ("qkv_bias", Neutral::False, NO_BIAS),
    ("use_bias", Neutral::False, NO_BIAS),
    ("use_qkv_bias", Neutral::False, NO_BIAS),
    ("bias", Neutral::False, NO_BIAS),
    ("lm_head_bias", Neutral::False, NO_BIAS),
    ("quantization_config", Neutral::Null, NO_QUANT),
    ("compression_config", Neutral::Null, NO_QUANT),
    ("quantization", Neutral::Null, NO_QUANT),
    ("num_experts", Neutral::Zero, NO_MOE),
    ("num_local_experts", Neutral::Zero, NO_MOE),
    ("n_routed_experts", Neutral::Zero, NO_MOE),
    ("moe", Neutral::Null, NO_MOE),
    ("layer_types", Neutral::All("full_attention"), NO_WINDOW),
    ("attention_chunk_size", Neutral::Null, NO_WINDOW),
    ("attention_window_size", Neutral::Null, NO_WINDOW),
    ("attention_sinks", Neutral::False, OTHER),
    ("attention_multiplier", Neutral::Null, OTHER),
    ("attn_logit_softcapping", Neutral::Null, OTHER),
    ("final_logit_softcapping", Neutral::Null, OTHER),
    ("query_pre_attn_scalar", Neutral::Null, OTHER),
    ("attn_temperature_tuning", Neutral::False, OTHER),
    ("embedding_multiplier", Neutral::One, OTHER),
    ("residual_multiplier", Neutral::One, OTHER),
    ("logits_scaling", Neutral::One, OTHER),
    ("logit_scale", Neutral::One, OTHER),
    ("scale_emb", Neutral::One, OTHER),
    ("scale_depth", Neutral::Null, OTHER),
    ("dim_model_base", Neutral::Null, OTHER),
    ("clip_qkv", Neutral::Null, OTHER),
    ("qk_norm", Neutral::False, OTHER),
    ("use_qk_norm", Neutral::False, OTHER),
    ("qk_layernorm", Neutral::False, OTHER),
    ("partial_rotary_factor", Neutral::One, OTHER),
    ("rotary_pct", Neutral::One, OTHER),
    ("rope_interleaved", Neutral::False, OTHER),
    ("rope_interleave", Neutral::False, OTHER),
    ("no_rope_layers", Neutral::Null, OTHER),
    ("no_rope_layer_interval", Neutral::Null, OTHER),
    ("nope_layer_interval", Neutral::Null, OTHER),
    ("alibi", Neutral::False, OTHER),
    ("use_parallel_residual", Neutral::False, OTHER),
    ("parallel_attn", Neutral::False, OTHER),
    ("use_mup", Neutral::False, OTHER),
    ("mup_scale", Neutral::Null, OTHER),
    ("is_encoder_decoder", Neutral::False, OTHER),
    ("add_cross_attention", Neutral::False, OTHER),
    ("vision_config", Neutral::Null, OTHER),
];

fn check_computation(fields: &Fields) -> Result<(), CheckpointError> {
    for (key, neutral, why) in COMPUTATION {
        let Some(value) = fields.get(key) else { continue };
        let (same, expected) = match neutral {
            Neutral::Null => (false, "nothing".to_owned()),
            Neutral::False => (value == &Value::Bool(false), "false".to_owned()),
            Neutral::One => (value.as_f64() == Some(1.0), "1".to_owned()),
            Neutral::Zero => (value.as_f64() == Some(0.0), "0".to_owned()),
            Neutral::All(name) => (
                value
                    .as_array()
                    .is_some_and(|list| list.iter().all(|entry| entry == name)),
                format!("{name:?} in every entry"),
            ),
        };
        if !same {
            return Err(fields.wrong_advised(key, expected, why));
        }
    }
    // A window that is written down but switched off changes nothing.
    if fields.get("sliding_window").is_some() && fields.flag("use_sliding_window")? != Some(false) {
        return Err(fields.wrong_advised("sliding_window", "nothing", NO_WINDOW));
    }
    Ok(())
}
