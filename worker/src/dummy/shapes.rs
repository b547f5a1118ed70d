//! Shapes of published models, for serving and measuring without their files.

/// The shapes there are.
pub const NAMES: &[&str] = &["llama-3-8b", "llama-3.3-70b"];

/// Llama 3.3's rule for positions beyond those of Llama 3.
const LONG: &str = r#", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#;

/// The config.json of a shape.
pub fn config(name: &str) -> Option<String> {
    let (hidden, inner, layers, heads, positions, rope) = match name {
        "llama-3-8b" => (4096, 14_336, 32, 32, 8192, ""),
        "llama-3.3-70b" => (8192, 28_672, 80, 64, 131_072, LONG),
        _ => return None,
    };
    Some(format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": {hidden}, "intermediate_size": {inner}, "num_hidden_layers": {layers},
    "num_attention_heads": {heads}, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": {positions}, "rms_norm_eps": 1e-5, "rope_theta": 500000.0{rope},
    "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}}
"#
    ))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::LlamaConfig;

    #[test]
    fn shapes_have_the_published_numbers_of_parameters() {
        let parameters = |name: &str| {
            let text = config(name).expect("a known shape");
            LlamaConfig::parse(Path::new("config.json"), text.as_bytes())
                .expect("accepted")
                .n_parameters()
        };
        assert_eq!(
            NAMES.iter().map(|name| parameters(name)).collect::<Vec<_>>(),
            [8_030_261_248, 70_553_706_496]
        );
        assert_eq!(config("llama-9"), None);
    }
}
