//! Model folders, good and bad: what opens, what is refused and with which line, and whether slices are the numbers
//! that were written.

mod damaged;
mod folder;
mod refused;
mod text;

use std::path::Path;

use half::{bf16, f16};
use serde_json::{Value, json};
use swallow_worker::checkpoint::{Checkpoint, Dtype, LlamaConfig, Rope, RopeScaling};

use folder::{Folder, ONE, decode, small_config};

#[test]
fn a_small_model_opens() {
    let dir = Folder::small().write();
    let checkpoint = Checkpoint::open(dir.path(), 2).expect("a good folder");
    assert_eq!(
        checkpoint.config(),
        &LlamaConfig {
            hidden_size: 16,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 4,
            intermediate_size: 24,
            vocab_size: 37,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope: Rope {
                theta: 500_000.0,
                scaling: RopeScaling::None
            },
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
        }
    );
    let head = checkpoint.tensor("lm_head.weight");
    assert_eq!(
        (head.shape(), head.dtype(), head.name()),
        (&[37, 16][..], Dtype::BF16, "lm_head.weight")
    );
    let written: usize = Folder::small().all().map(|tensor| tensor.bytes.len()).sum();
    assert_eq!(checkpoint.weight_bytes(), written as u64);
}

#[test]
fn other_good_folders_open() {
    let open = |title: &str, folder: &Folder| {
        let dir = folder.write();
        let checkpoint = Checkpoint::open(dir.path(), 1).unwrap_or_else(|error| panic!("{title}: {error}"));
        checkpoint.config().clone()
    };
    open("two shards", &Folder::small().split());

    let mut tied = Folder::small();
    tied.set("tie_word_embeddings", json!(true));
    assert!(open("a tied head that is stored all the same", &tied).tie_word_embeddings);
    tied.remove("lm_head.weight");
    open("a tied head", &tied);

    let mut config = small_config();
    for (key, value) in [("head_dim", json!(6)), ("num_key_value_heads", json!(1))] {
        config[key] = value;
    }
    assert_eq!(
        open(
            "an explicit head_dim and one KV head",
            &Folder::new(config, "F32")
        )
        .head_dim,
        6
    );

    let mut old = Folder::small();
    old.set("architectures", json!(["LLaMAForCausalLM"]));
    old.set("rope_theta", Value::Null);
    old.set("num_key_value_heads", Value::Null);
    old.set("num_attention_heads", json!(2));
    old.set("eos_token_id", json!([2, 3]));
    old.set("sliding_window", json!(4096));
    old.set("use_sliding_window", json!(false));
    old.set("layer_types", json!(["full_attention", "full_attention"]));
    old.set("partial_rotary_factor", json!(1.0));
    let head_dim = 8;
    for layer in 0..2 {
        for name in ["k_proj", "v_proj"] {
            let tensor = old.tensor(&format!("model.layers.{layer}.self_attn.{name}.weight"));
            tensor.shape = vec![2 * head_dim, 16];
            tensor.bytes.resize(2 * head_dim * 16 * 2, 0);
        }
    }
    old.add(ONE, "model.layers.0.self_attn.rotary_emb.inv_freq", &[4]);
    let config = open("an early Llama", &old);
    assert_eq!((config.n_kv_heads, config.rope.theta), (2, 10_000.0));
    assert_eq!(config.eos_token_ids, [2, 3]);
}

#[test]
fn both_spellings_of_rope_are_read() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    let llama3_scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let with_theta = |mut value: Value, theta: f64| {
        value["rope_theta"] = json!(theta);
        value
    };
    let rope = |changes: &[(&str, Value)]| {
        let mut config = small_config();
        for (key, value) in changes {
            config[*key] = value.clone();
        }
        LlamaConfig::parse(Path::new("config.json"), config.to_string().as_bytes())
            .expect("a good config")
            .rope
    };
    let expected = Rope {
        theta: 500_000.0,
        scaling: llama3_scaling,
    };
    assert_eq!(rope(&[("rope_scaling", llama3.clone())]), expected);
    let inner = with_theta(llama3.clone(), 500_000.0);
    assert_eq!(
        rope(&[("rope_parameters", inner.clone()), ("rope_theta", Value::Null)]),
        expected
    );
    assert_eq!(
        rope(&[("rope_parameters", inner), ("rope_scaling", llama3)]),
        expected
    );
    let linear = Rope {
        theta: 500_000.0,
        scaling: RopeScaling::Linear { factor: 2.0 },
    };
    assert_eq!(
        rope(&[("rope_scaling", json!({"type": "linear", "factor": 2}))]),
        linear
    );
    let plain = json!({"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0});
    let expected = Rope {
        theta: 1e6,
        scaling: RopeScaling::None,
    };
    assert_eq!(
        rope(&[("rope_parameters", plain), ("rope_theta", Value::Null)]),
        expected
    );
}

#[test]
fn the_shapes_of_real_models_are_accepted() {
    let llama = |hidden: u64, layers: u64, heads: u64, intermediate: u64| {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009], "head_dim": 128,
            "hidden_act": "silu", "hidden_size": hidden, "initializer_range": 0.02,
            "intermediate_size": intermediate, "max_position_embeddings": 8192, "mlp_bias": false,
            "model_type": "llama", "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500_000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
            "transformers_version": "4.46.3", "use_cache": true, "vocab_size": 128_256
        });
        LlamaConfig::parse(Path::new("config.json"), config.to_string().as_bytes()).expect("a good config")
    };
    let (small, large) = (llama(4096, 32, 32, 14336), llama(8192, 80, 64, 28672));
    assert_eq!(small.n_parameters(), 8_030_261_248);
    assert_eq!(large.n_parameters(), 70_553_706_496);
    assert_eq!(small.tensor_parallel_degrees(), [1, 2, 4, 8, 16, 32]);
    assert_eq!(large.tensor_parallel_degrees(), [1, 2, 4, 8, 16, 32, 64]);
}

/// Rows and columns by index arithmetic over all numbers.
fn naive(
    all: &[f32],
    row_len: usize,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
) -> Vec<f32> {
    rows.flat_map(|row| cols.clone().map(move |col| (row, col)))
        .map(|(row, col)| all[row * row_len + col])
        .collect()
}

#[test]
fn slices_are_the_written_numbers() {
    // The embedding and the MLP are large enough to be converted by several threads.
    let mut config = small_config();
    for (key, value) in [
        ("hidden_size", 512),
        ("vocab_size", 1031),
        ("intermediate_size", 1536),
    ] {
        config[key] = json!(value);
    }
    config["num_hidden_layers"] = json!(1);
    for dtype in ["F32", "F16", "BF16"] {
        let folder = Folder::new(config.clone(), dtype).split();
        let dir = folder.write();
        for degree in [1, 2, 4] {
            let checkpoint = Checkpoint::open(dir.path(), degree).expect("a good folder");
            for tensor in folder.all() {
                let (view, all) = (checkpoint.tensor(&tensor.name), decode(tensor));
                assert_eq!(view.bytes(), tensor.bytes, "{}", tensor.name);
                let (n_rows, row_len) = (view.n_rows(), view.row_len());
                for rank in 0..degree {
                    // Uneven shards too: the vocabulary does not divide.
                    let part = |n: usize| n * rank / degree..n * (rank + 1) / degree;
                    let rows = view.rows_f32(part(n_rows));
                    assert_eq!(
                        rows,
                        naive(&all, row_len, part(n_rows), 0..row_len),
                        "{view:?} rows of {rank}"
                    );
                    assert_eq!(
                        view.row_bytes(part(n_rows)).len(),
                        rows.len() * view.dtype().size()
                    );
                    if row_len > 1 {
                        let cols = view.cols_f32(part(row_len));
                        assert_eq!(
                            cols,
                            naive(&all, row_len, 0..n_rows, part(row_len)),
                            "{view:?} columns of {rank}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn every_16_bit_number_converts_as_half_does() {
    for (dtype, convert) in [
        ("F16", (|bits| f16::from_bits(bits).to_f32()) as fn(u16) -> f32),
        ("BF16", |bits| bf16::from_bits(bits).to_f32()),
    ] {
        let mut config = small_config();
        config["vocab_size"] = json!(4096);
        let mut folder = Folder::new(config, dtype);
        folder.tensor("lm_head.weight").bytes = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let dir = folder.write();
        let checkpoint = Checkpoint::open(dir.path(), 1).expect("a good folder");
        let numbers = checkpoint.tensor("lm_head.weight").rows_f32(0..4096);
        for (bits, found) in (0..=u16::MAX).zip(numbers) {
            let expected = convert(bits);
            assert!(
                found == expected || found.is_nan() && expected.is_nan(),
                "{dtype} {bits:#x}: {found} {expected}"
            );
        }
    }
}

#[test]
fn files_of_the_formats_own_library_open() {
    let folder = Folder::small();
    let tensors = folder.all().map(|tensor| {
        let view = safetensors::tensor::TensorView::new(
            safetensors::Dtype::BF16,
            tensor.shape.clone(),
            &tensor.bytes,
        );
        (tensor.name.clone(), view.expect("a sound tensor"))
    });
    let bytes = safetensors::serialize(tensors, None).expect("a written file");
    let mut folder = folder.clone();
    folder.raw.insert(ONE.into(), Some(bytes));
    let dir = folder.write();
    let checkpoint = Checkpoint::open(dir.path(), 1).expect("a good file");
    for tensor in Folder::small().all() {
        assert_eq!(checkpoint.tensor(&tensor.name).bytes(), tensor.bytes);
    }
}
