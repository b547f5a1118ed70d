//! How a Llama model is cut for tensor parallelism, and which degrees are possible.
//!
//! Every rank computes whole query heads and an equal slice of the feed-forward layer. Key-value heads are shared out
//! while there are enough of them, and held by several ranks each when there are more ranks. The vocabulary needs no
//! divisor: the last rank's slice may be shorter.

use serde_json::{Value, json};

/// The most ranks of one group.
pub const TENSOR_MAX: u32 = 64;

/// The size of a model, in the numbers of its config.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Decoder layers.
    pub n_layers: u32,
    /// Query heads.
    pub n_heads: u32,
    /// Key and value heads.
    pub n_kv_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Width of the feed-forward layer.
    pub intermediate_size: u32,
    /// Token ids.
    pub vocab_size: u32,
    /// Longest context, in tokens.
    pub max_position_embeddings: u32,
    /// The output head is the embedding itself.
    pub tied_head: bool,
}

impl Shape {
    /// Llama 3 and 3.1 with 8 billion parameters. The context is the family's longest; many of its models have 8192.
    pub const LLAMA_3_8B: Shape = Shape {
        hidden_size: 4096,
        n_layers: 32,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        intermediate_size: 14_336,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        tied_head: false,
    };

    /// Llama 3, 3.1 and 3.3 with 70 billion parameters. The context is the family's longest; many models have 8192.
    pub const LLAMA_3_70B: Shape = Shape {
        hidden_size: 8192,
        n_layers: 80,
        n_heads: 64,
        n_kv_heads: 8,
        head_dim: 128,
        intermediate_size: 28_672,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        tied_head: false,
    };

    /// The size that a config.json in the Hugging Face layout gives; `None` when a number is missing or no size. What
    /// else is in the file is the worker's to judge.
    pub fn from_config(config: &Value) -> Option<Shape> {
        let number = |name: &str| {
            config
                .get(name)
                .and_then(Value::as_u64)
                .and_then(|n| u32::try_from(n).ok())
        };
        let some = |name: &str| number(name).filter(|n| *n > 0);
        let (hidden_size, n_heads) = (some("hidden_size")?, some("num_attention_heads")?);
        Some(Shape {
            hidden_size,
            n_layers: some("num_hidden_layers")?,
            n_heads,
            n_kv_heads: number("num_key_value_heads").unwrap_or(n_heads).max(1),
            head_dim: some("head_dim").or_else(|| Some(hidden_size / n_heads).filter(|dim| *dim > 0))?,
            intermediate_size: some("intermediate_size")?,
            vocab_size: some("vocab_size")?,
            max_position_embeddings: some("max_position_embeddings")?,
            tied_head: config
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(false),
        })
    }

    /// A config.json of this size, for a model that is made up: what sizes do not say is as in Llama 3, and the last two
    /// ids begin and end a text.
    pub fn to_config_json(&self) -> String {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tied_head,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "bos_token_id": self.vocab_size.saturating_sub(2),
            "eos_token_id": self.vocab_size.saturating_sub(1),
        })
        .to_string()
    }

    /// Parameters of the whole model.
    pub fn parameters(&self) -> u64 {
        let [hidden, layers, heads, kv_heads, head_dim, inner, vocab] = [
            self.hidden_size,
            self.n_layers,
            self.n_heads,
            self.n_kv_heads,
            self.head_dim,
            self.intermediate_size,
            self.vocab_size,
        ]
        .map(u64::from);
        let attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim;
        let layer = attention + 3 * hidden * inner + 2 * hidden;
        let ends = if self.tied_head { 1 } else { 2 };
        layers * layer + ends * vocab * hidden + hidden
    }

    /// Parameters that one rank of `tensor` holds, at most: slices of every matrix, the norms whole.
    pub fn parameters_of_a_rank(&self, tensor: u32) -> u64 {
        let share = |n: u32| u64::from(n.div_ceil(tensor));
        let [hidden, layers, head_dim] = [self.hidden_size, self.n_layers, self.head_dim].map(u64::from);
        let attention = 2 * hidden * (share(self.n_heads) + share(self.n_kv_heads)) * head_dim;
        let layer = attention + 3 * hidden * share(self.intermediate_size) + 2 * hidden;
        let ends = if self.tied_head { 1 } else { 2 };
        layers * layer + ends * share(self.vocab_size) * hidden + hidden
    }

    /// Numbers that one token leaves in the KV cache of one rank of `tensor`.
    pub fn kv_numbers_of_a_rank(&self, tensor: u32) -> u64 {
        2 * u64::from(self.n_layers) * u64::from(self.n_kv_heads.div_ceil(tensor)) * u64::from(self.head_dim)
    }

    /// The degrees of tensor parallelism that this model can be cut for, ascending.
    pub fn degrees(&self) -> Vec<u32> {
        (1..=TENSOR_MAX)
            .filter(|tensor| self.obstacle(*tensor).is_none())
            .collect()
    }

    /// Why the model cannot be cut for `tensor` ranks; `None` when it can.
    pub fn obstacle(&self, tensor: u32) -> Option<String> {
        let divides = |n: u32| n.is_multiple_of(tensor);
        if !divides(self.n_heads) {
            return Some(format!(
                "does not divide the model's {} attention heads",
                self.n_heads
            ));
        }
        if !divides(self.n_kv_heads) && !tensor.is_multiple_of(self.n_kv_heads) {
            return Some(format!(
                "neither divides the model's {} key-value heads nor is a multiple of them",
                self.n_kv_heads
            ));
        }
        if !divides(self.intermediate_size) {
            return Some(format!(
                "does not divide the model's intermediate size of {}",
                self.intermediate_size
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(n_heads: u32, n_kv_heads: u32, intermediate_size: u32) -> Shape {
        Shape {
            n_heads,
            n_kv_heads,
            intermediate_size,
            ..Shape::LLAMA_3_8B
        }
    }

    #[test]
    fn a_config_json_says_the_size_that_it_was_made_from() {
        for shape in [
            Shape::LLAMA_3_8B,
            Shape {
                tied_head: true,
                head_dim: 64,
                ..Shape::LLAMA_3_70B
            },
        ] {
            let config = serde_json::from_str(&shape.to_config_json()).expect("JSON");
            assert_eq!(Shape::from_config(&config), Some(shape));
        }
    }

    #[test]
    fn parameters_are_those_of_the_published_models() {
        assert_eq!(Shape::LLAMA_3_8B.parameters(), 8_030_261_248);
        assert_eq!(Shape::LLAMA_3_70B.parameters(), 70_553_706_496);
        // Llama 2 7B with Swallow's vocabulary: as many key-value heads as query heads.
        let swallow_7b = Shape {
            vocab_size: 43_176,
            ..with(32, 32, 11_008)
        };
        assert_eq!(swallow_7b.parameters(), 6_829_969_408);
        let calm2_7b = Shape {
            vocab_size: 65_024,
            ..swallow_7b
        };
        assert_eq!(calm2_7b.parameters(), 7_008_948_224);
    }

    #[test]
    fn the_ranks_hold_the_model_once_plus_norms_and_copies() {
        for shape in [Shape::LLAMA_3_8B, Shape::LLAMA_3_70B] {
            assert_eq!(shape.parameters_of_a_rank(1), shape.parameters());
            for tensor in [2, 4, 8] {
                let norms = u64::from(shape.hidden_size) * (2 * u64::from(shape.n_layers) + 1);
                let together = u64::from(tensor) * shape.parameters_of_a_rank(tensor);
                assert_eq!(
                    together,
                    shape.parameters() + u64::from(tensor - 1) * norms,
                    "{tensor}"
                );
            }
            // Beyond 8 ranks the 8 key-value heads do not get any smaller.
            assert_eq!(shape.kv_numbers_of_a_rank(16), shape.kv_numbers_of_a_rank(8));
        }
    }

    #[test]
    fn possible_degrees_are_found() {
        assert_eq!(Shape::LLAMA_3_8B.degrees(), [1, 2, 4, 8, 16, 32]);
        assert_eq!(Shape::LLAMA_3_70B.degrees(), [1, 2, 4, 8, 16, 32, 64]);
        assert_eq!(with(28, 4, 18_944).degrees(), [1, 2, 4]);
        assert_eq!(with(32, 32, 11_008).degrees(), [1, 2, 4, 8, 16, 32]);
        assert_eq!(with(9, 3, 1536).degrees(), [1, 3]);
        assert_eq!(with(1, 1, 7).degrees(), [1]);
    }

    #[test]
    fn a_config_gives_the_size_or_nothing() {
        let config = serde_json::json!({
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
            "tie_word_embeddings": true,
        });
        let shape = Shape::from_config(&config).expect("complete");
        assert_eq!((shape.head_dim, shape.parameters()), (64, 134_515_008));
        for missing in ["hidden_size", "num_hidden_layers", "vocab_size"] {
            let mut broken = config.clone();
            broken[missing] = serde_json::json!(0);
            assert_eq!(Shape::from_config(&broken), None, "{missing}");
        }
        assert_eq!(Shape::from_config(&serde_json::json!("no config")), None);
    }

    #[test]
    fn an_obstacle_says_what_does_not_divide() {
        let obstacle = |tensor| Shape::LLAMA_3_8B.obstacle(tensor).expect("impossible");
        assert_eq!(obstacle(3), "does not divide the model's 32 attention heads");
        assert_eq!(
            with(12, 4, 1200).obstacle(6).expect("impossible"),
            "neither divides the model's 4 key-value heads nor is a multiple of them"
        );
        assert_eq!(
            with(12, 4, 1202).obstacle(4).expect("impossible"),
            "does not divide the model's intermediate size of 1202"
        );
    }
}
