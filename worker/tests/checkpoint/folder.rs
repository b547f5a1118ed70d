//! Model folders made by hand: a small model as it should be, to be broken in one place.

use std::{collections::BTreeMap, fs};

use half::{bf16, f16};
use serde_json::{Value, json};
use swallow_worker::checkpoint::Checkpoint;
use tempfile::TempDir;

/// A tensor as it will be written.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A model folder before it is written.
#[derive(Clone)]
pub struct Folder {
    pub config: Value,
    /// Shards by file name; with an index if there is more than one.
    pub shards: BTreeMap<String, Vec<Tensor>>,
    /// Overrides the index that would be written.
    pub index: Option<Value>,
    /// Files written last, as they are; None removes a file.
    pub raw: BTreeMap<String, Option<Vec<u8>>>,
}

pub const ONE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const FIRST: &str = "model-00001-of-00002.safetensors";
pub const SECOND: &str = "model-00002-of-00002.safetensors";

pub fn small_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "vocab_size": 37, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false,
        "attention_bias": false, "some_exporters_own_key": {"a": 1}
    })
}

/// The tensors of a config, filled with seeded numbers in `dtype`. Shapes are spelled out a second time on purpose.
pub fn tensors(config: &Value, dtype: &'static str, seed: u64) -> Vec<Tensor> {
    let mut random = fastrand::Rng::with_seed(seed);
    let n = |key: &str| config[key].as_u64().expect("a size") as usize;
    let (hidden, heads, inner, vocab) = (
        n("hidden_size"),
        n("num_attention_heads"),
        n("intermediate_size"),
        n("vocab_size"),
    );
    let head_dim = config["head_dim"].as_u64().map_or(hidden / heads, |d| d as usize);
    let (q, kv) = (heads * head_dim, n("num_key_value_heads") * head_dim);
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..n("num_hidden_layers") {
        for (name, shape) in [
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
    if config["tie_word_embeddings"] != true {
        shapes.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    let mut fill = |(name, shape): (String, Vec<usize>)| {
        let numbers = (0..shape.iter().product()).map(|_| random.f32() * 8.0 - 4.0);
        let bytes = encode(dtype, numbers);
        Tensor {
            name,
            dtype,
            shape,
            bytes,
        }
    };
    shapes.into_iter().map(&mut fill).collect()
}

pub fn encode(dtype: &str, numbers: impl Iterator<Item = f32>) -> Vec<u8> {
    match dtype {
        "F32" => numbers.flat_map(f32::to_le_bytes).collect(),
        "F16" => numbers.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        "BF16" => numbers.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        other => panic!("no numbers in {other}"),
    }
}

pub fn decode(tensor: &Tensor) -> Vec<f32> {
    let pairs = || tensor.bytes.chunks(2).map(|b| [b[0], b[1]]);
    match tensor.dtype {
        "F32" => tensor
            .bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        "F16" => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        "BF16" => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        other => panic!("no numbers in {other}"),
    }
}

impl Folder {
    pub fn new(config: Value, dtype: &'static str) -> Folder {
        let shards = BTreeMap::from([(ONE.to_owned(), tensors(&config, dtype, 7))]);
        Folder {
            config,
            shards,
            index: None,
            raw: BTreeMap::new(),
        }
    }

    pub fn small() -> Folder {
        Folder::new(small_config(), "BF16")
    }

    /// The same tensors in two files and an index.
    pub fn split(mut self) -> Folder {
        let mut first = self.shards.remove(ONE).expect("a folder of one file");
        let second = first.split_off(first.len() / 2);
        self.shards = BTreeMap::from([(FIRST.to_owned(), first), (SECOND.to_owned(), second)]);
        self
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.config[key] = value;
    }

    pub fn all(&self) -> impl Iterator<Item = &Tensor> {
        self.shards.values().flatten()
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        let mut all = self.shards.values_mut().flatten();
        all.find(|tensor| tensor.name == name)
            .expect("a tensor of the model")
    }

    pub fn remove(&mut self, name: &str) -> Tensor {
        let holder = self
            .shards
            .values_mut()
            .find(|shard| shard.iter().any(|tensor| tensor.name == name));
        let holder = holder.expect("a tensor of the model");
        let at = holder
            .iter()
            .position(|tensor| tensor.name == name)
            .expect("just seen");
        holder.remove(at)
    }

    pub fn add(&mut self, shard: &str, name: &str, shape: &[usize]) {
        let bytes = vec![0; shape.iter().product::<usize>() * 4];
        let tensor = Tensor {
            name: name.into(),
            dtype: "F32",
            shape: shape.to_vec(),
            bytes,
        };
        self.shards
            .get_mut(shard)
            .expect("a shard of the model")
            .push(tensor);
    }

    pub fn index(&self) -> Value {
        let places = self
            .shards
            .iter()
            .flat_map(|(file, shard)| shard.iter().map(move |t| (&t.name, file)));
        json!({"metadata": {"total_size": 1}, "weight_map": places.collect::<BTreeMap<_, _>>()})
    }

    pub fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let put = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).expect("a written file");
        put("config.json", self.config.to_string().as_bytes());
        for (name, shard) in &self.shards {
            put(name, &safetensors_bytes(shard));
        }
        if self.shards.len() > 1 || self.index.is_some() {
            put(
                INDEX,
                self.index
                    .clone()
                    .unwrap_or_else(|| self.index())
                    .to_string()
                    .as_bytes(),
            );
        }
        for (name, bytes) in &self.raw {
            match bytes {
                Some(bytes) => put(name, bytes),
                None => fs::remove_file(dir.path().join(name)).expect("a file to remove"),
            }
        }
        dir
    }
}

/// A file by hand, its header unpadded, so that its numbers lie at odd addresses as often as not.
pub fn safetensors_bytes(tensors: &[Tensor]) -> Vec<u8> {
    let mut at = 0;
    let entries = tensors.iter().map(|tensor| {
        let begin = at;
        at += tensor.bytes.len();
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, at]});
        format!("{}:{entry}", json!(tensor.name))
    });
    let entries: Vec<String> = entries.collect();
    let header = format!("{{\"__metadata__\":{{\"format\":\"pt\"}},{}}}", entries.join(","));
    with_header(
        &header,
        &tensors.iter().flat_map(|t| t.bytes.clone()).collect::<Vec<_>>(),
    )
}

pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// The one line with which the folder is refused, its own path left out.
pub fn refusal(folder: &Folder, tensor_parallel: usize) -> String {
    let dir = folder.write();
    let error = Checkpoint::open(dir.path(), tensor_parallel).expect_err("a refused folder");
    let line = error.to_string();
    assert!(!line.contains('\n'), "one line: {line:?}");
    let dir = dir.path().display().to_string();
    assert!(line.starts_with(&dir), "{line} begins with the file");
    line.replace(&format!("{dir}/"), "").replace(&dir, "DIR")
}
