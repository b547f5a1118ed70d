//! Small random checkpoints in the Hugging Face layout, for shapes that no committed fixture has.

use std::{collections::HashMap, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

/// Traits of a model.
#[derive(Clone, Debug)]
pub struct Traits {
    pub seed: u64,
    pub hidden: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub inner: usize,
    pub vocab: usize,
    pub tied: bool,
    pub rope_scaling: Option<Value>,
}

impl Default for Traits {
    fn default() -> Self {
        Self {
            seed: 1,
            hidden: 64,
            n_layers: 2,
            n_heads: 8,
            n_kv_heads: 4,
            inner: 96,
            vocab: 301,
            tied: false,
            rope_scaling: None,
        }
    }
}

/// Llama 3.1's rule, at a scale that short sequences notice.
pub fn llama3_scaling() -> Value {
    json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32
    })
}

impl Traits {
    pub fn config(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.inner, "vocab_size": self.vocab,
            "num_hidden_layers": self.n_layers, "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "rope_scaling": self.rope_scaling, "max_position_embeddings": 1024,
            "tie_word_embeddings": self.tied, "bos_token_id": 1, "eos_token_id": 2,
            "attention_bias": false, "mlp_bias": false, "torch_dtype": "bfloat16"
        })
    }

    /// Writes config and weights into `dir`.
    pub fn write(&self, dir: &Path) {
        let mut random = fastrand::Rng::with_seed(self.seed);
        let mut tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = HashMap::new();
        let mut add = |name: String, shape: &[usize], mean: f32, spread: f32| {
            let n: usize = shape.iter().product();
            // The sum of a few uniform numbers is normal enough, and bf16 is the upper half of an f32.
            let values = (0..n).flat_map(|_| {
                let x: f32 = (0..4).map(|_| random.f32() - 0.5).sum::<f32>() * 1.732;
                ((mean + spread * x).to_bits().wrapping_add(1 << 15) >> 16).to_le_bytes()[..2].to_vec()
            });
            let bytes = values.collect();
            tensors.insert(name, (shape.to_vec(), bytes));
        };
        let (hidden, dim) = (self.hidden, self.hidden / self.n_heads);
        let linear = |ins: usize| 1.0 / (ins as f32).sqrt();
        add(
            "model.embed_tokens.weight".into(),
            &[self.vocab, hidden],
            0.0,
            if self.tied { 0.3 } else { 1.0 },
        );
        for layer in 0..self.n_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            add(name("input_layernorm"), &[hidden], 1.0, 0.2);
            add(
                name("self_attn.q_proj"),
                &[self.n_heads * dim, hidden],
                0.0,
                2.0 * linear(hidden),
            );
            add(
                name("self_attn.k_proj"),
                &[self.n_kv_heads * dim, hidden],
                0.0,
                2.0 * linear(hidden),
            );
            add(
                name("self_attn.v_proj"),
                &[self.n_kv_heads * dim, hidden],
                0.0,
                linear(hidden),
            );
            add(
                name("self_attn.o_proj"),
                &[hidden, self.n_heads * dim],
                0.0,
                linear(hidden),
            );
            add(name("post_attention_layernorm"), &[hidden], 1.0, 0.2);
            add(name("mlp.gate_proj"), &[self.inner, hidden], 0.0, linear(hidden));
            add(name("mlp.up_proj"), &[self.inner, hidden], 0.0, linear(hidden));
            add(
                name("mlp.down_proj"),
                &[hidden, self.inner],
                0.0,
                linear(self.inner),
            );
        }
        add("model.norm.weight".into(), &[hidden], 1.0, 0.2);
        if !self.tied {
            add(
                "lm_head.weight".into(),
                &[self.vocab, hidden],
                0.0,
                2.0 * linear(hidden),
            );
        }
        let views: HashMap<&str, TensorView<'_>> = tensors
            .iter()
            .map(|(name, (shape, bytes))| {
                let view = TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("bytes fit the shape");
                (name.as_str(), view)
            })
            .collect();
        safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("writable");
        std::fs::write(dir.join("config.json"), self.config().to_string()).expect("writable");
    }
}
