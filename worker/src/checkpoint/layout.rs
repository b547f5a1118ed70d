//! Which tensors a Llama model is made of, and which files hold them.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

use serde_json::Value;

use super::{
    config::LlamaConfig,
    error::{CheckpointError, one_line},
    json::Fields,
    safetensors::Shard,
    view::Dtype,
};

/// The files of a checkpoint, and where each needed tensor lies in them.
pub(crate) struct Tensors {
    pub(crate) shards: Vec<Shard>,
    places: HashMap<String, Place>,
}

/// A tensor that was checked: entry `entry` of shard `shard` has the needed shape and this dtype.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) shard: usize,
    pub(crate) entry: usize,
    pub(crate) dtype: Dtype,
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const INDEX_BYTES: u64 = 64 << 20; // a 70B model's has 60 kilobytes
const CONVERT: &str = "save the model again with save_pretrained, or download it again";

impl Tensors {
    /// Opens every file of the checkpoint in `dir` and finds each tensor that `config` needs, exactly once.
    pub(crate) fn open(dir: &Path, config: &LlamaConfig) -> Result<Tensors, CheckpointError> {
        let (root, shards) = open_shards(dir)?;
        let needed: HashMap<String, Vec<usize>> = needed(config).collect();
        let mut places: HashMap<String, Place> = HashMap::with_capacity(needed.len());
        for (n, shard) in shards.iter().enumerate() {
            for (entry, found) in shard.entries.iter().enumerate() {
                let Some(shape) = needed.get(&found.name) else {
                    check_stray(config, &needed, shard, &found.name)?;
                    continue;
                };
                let dtype = check_tensor(shard, entry, shape)?;
                if let Some(first) = places.insert(
                    found.name.clone(),
                    Place {
                        shard: n,
                        entry,
                        dtype,
                    },
                ) {
                    let first = one_line(&shards[first.shard].path.display().to_string());
                    return Err(tensor(
                        shard,
                        &found.name,
                        "it once",
                        format!("it in {first} too"),
                        CONVERT,
                    ));
                }
            }
        }
        // In model order, so that the first missing tensor tells how far the files reach.
        if let Some((name, shape)) = self::needed(config).find(|(name, _)| !places.contains_key(name)) {
            return Err(missing(&root, config, &name, &shape));
        }
        Ok(Tensors { shards, places })
    }

    /// Where the tensor lies; None if the model has none of that name.
    pub(crate) fn place(&self, name: &str) -> Option<(&str, Place)> {
        self.places
            .get_key_value(name)
            .map(|(name, place)| (name.as_str(), *place))
    }

    /// Bytes of all needed tensors.
    pub(crate) fn n_bytes(&self) -> u64 {
        self.places
            .values()
            .map(|place| self.shards[place.shard].entries[place.entry].n_bytes() as u64)
            .sum()
    }
}

/// Every tensor that the model's forward pass reads, in its order, with its shape.
pub(crate) fn needed(config: &LlamaConfig) -> impl Iterator<Item = (String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let (q, kv) = (
        config.n_heads * config.head_dim,
        config.n_kv_heads * config.head_dim,
    );
    let inner = config.intermediate_size;
    let layer = move |n: usize| {
        [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![q, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, q]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ]
        .map(|(name, shape)| (format!("model.layers.{n}.{name}.weight"), shape))
    };
    let embedding = (
        "model.embed_tokens.weight".to_owned(),
        vec![config.vocab_size, hidden],
    );
    let norm = ("model.norm.weight".to_owned(), vec![hidden]);
    let head = (!config.tie_word_embeddings).then(|| (LM_HEAD.to_owned(), vec![config.vocab_size, hidden]));
    std::iter::once(embedding)
        .chain((0..config.n_layers).flat_map(layer))
        .chain([norm])
        .chain(head)
}

const LM_HEAD: &str = "lm_head.weight";

/// Opens the one file, or all that the index names; also returns the file that stands for the whole in messages.
fn open_shards(dir: &Path) -> Result<(PathBuf, Vec<Shard>), CheckpointError> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    match (single.exists(), index.exists()) {
        (true, false) => {
            let shard = Shard::open(&single)?;
            Ok((single, vec![shard]))
        }
        (false, true) => {
            let shards = open_indexed(dir, &index)?;
            Ok((index, shards))
        }
        (true, true) => Err(CheckpointError::File {
            file: index.into(),
            expected: format!("either an index or {SINGLE}"),
            found: "both in one folder".into(),
            advice: "remove the one that is not this model's".into(),
        }),
        (false, false) => Err(CheckpointError::File {
            file: dir.into(),
            expected: format!("{SINGLE} or {INDEX}"),
            found: "neither".into(),
            advice: "weights in another format must be converted to safetensors first".into(),
        }),
    }
}

fn open_indexed(dir: &Path, index: &Path) -> Result<Vec<Shard>, CheckpointError> {
    let fields = Fields::read(index, INDEX_BYTES, "the index must be readable")?;
    let Some(map) = fields.object("weight_map")? else {
        return Err(fields.wrong("weight_map", "an object that maps tensors to files"));
    };
    let mut names: Vec<&str> = Vec::new();
    let mut expected: HashMap<&str, Vec<&str>> = HashMap::new();
    for tensor in map.keys() {
        let Some(name) = map
            .get(tensor)
            .and_then(Value::as_str)
            .filter(|name| is_plain_name(name))
        else {
            return Err(map.wrong(tensor, "the plain name of a .safetensors file in the same folder"));
        };
        let tensors = expected.entry(name).or_default();
        if tensors.is_empty() {
            names.push(name);
        }
        tensors.push(tensor);
    }
    if names.is_empty() {
        return Err(fields.wrong("weight_map", "at least one tensor"));
    }
    names.sort_unstable();
    names
        .iter()
        .map(|name| open_listed(&dir.join(name), index, &expected[name]))
        .collect()
}

/// Opens one shard, which must hold exactly the tensors that the index says.
fn open_listed(path: &Path, index: &Path, listed: &[&str]) -> Result<Shard, CheckpointError> {
    let shown = one_line(&index.display().to_string());
    if !path.exists() {
        return Err(CheckpointError::File {
            file: path.into(),
            expected: format!("the shard that {shown} names"),
            found: "no such file".into(),
            advice: "download the missing file".into(),
        });
    }
    let shard = Shard::open(path)?;
    let held: std::collections::HashSet<&str> =
        shard.entries.iter().map(|entry| entry.name.as_str()).collect();
    if let Some(absent) = listed.iter().find(|name| !held.contains(*name)) {
        let found = "no such tensor in the file";
        return Err(tensor(
            &shard,
            absent,
            format!("it here, as {shown} says"),
            found,
            CONVERT,
        ));
    }
    let listed: std::collections::HashSet<&str> = listed.iter().copied().collect();
    if let Some(extra) = held.iter().filter(|name| !listed.contains(*name)).min() {
        let found = "it in the file all the same";
        return Err(tensor(
            &shard,
            extra,
            format!("it elsewhere or nowhere, as {shown} says"),
            found,
            CONVERT,
        ));
    }
    Ok(shard)
}

/// A name that cannot leave the folder.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    ) && name.ends_with(".safetensors")
        && !name.contains(['/', '\\', '\0'])
}

fn tensor(
    shard: &Shard,
    name: &str,
    expected: impl Into<String>,
    found: impl Into<String>,
    advice: &str,
) -> CheckpointError {
    CheckpointError::Tensor {
        file: shard.path.as_path().into(),
        tensor: one_line(name),
        expected: expected.into(),
        found: found.into(),
        advice: advice.into(),
    }
}

fn check_tensor(shard: &Shard, entry: usize, shape: &[usize]) -> Result<Dtype, CheckpointError> {
    let found = &shard.entries[entry];
    if found.shape != shape {
        let (expected, actual) = (format!("shape {shape:?}"), format!("shape {:?}", found.shape));
        return Err(tensor(
            shard,
            &found.name,
            expected,
            actual,
            "config.json and weights must be of one model",
        ));
    }
    Dtype::parse(&found.dtype).ok_or_else(|| {
        let advice = "convert the checkpoint to BF16";
        tensor(
            shard,
            &found.name,
            "dtype F32, F16 or BF16",
            format!("dtype {}", one_line(&found.dtype)),
            advice,
        )
    })
}

/// Lets pass what has no part in the computation; whatever else has no place in the model is refused.
fn check_stray(
    config: &LlamaConfig,
    needed: &HashMap<String, Vec<usize>>,
    shard: &Shard,
    name: &str,
) -> Result<(), CheckpointError> {
    let tied_head = config.tie_word_embeddings && name == LM_HEAD;
    // Old exporters stored the rotary frequencies, which config.json determines.
    if tied_head || name.ends_with(".rotary_emb.inv_freq") {
        return Ok(());
    }
    let biased = name.strip_suffix(".bias").map(|layer| format!("{layer}.weight"));
    if biased.is_some_and(|weight| needed.contains_key(&weight) || weight == LM_HEAD) {
        let found = "a bias the model code does not apply";
        return Err(tensor(
            shard,
            name,
            "no such tensor",
            found,
            "only Llama models without biases are supported",
        ));
    }
    let found = "a tensor that no operation of the model reads";
    let advice = format!(
        "config.json (num_hidden_layers {}) and weights must be of one Llama model",
        config.n_layers
    );
    Err(tensor(shard, name, "no such tensor", found, &advice))
}

fn missing(root: &Path, config: &LlamaConfig, name: &str, shape: &[usize]) -> CheckpointError {
    let advice = if name == LM_HEAD {
        "set tie_word_embeddings in config.json if the model has no head of its own".to_owned()
    } else {
        let layers = config.n_layers;
        format!(
            "the checkpoint is incomplete or config.json (num_hidden_layers {layers}) is of another model"
        )
    };
    CheckpointError::Tensor {
        file: root.into(),
        tensor: name.to_owned(),
        expected: format!("shape {shape:?} in F32, F16 or BF16"),
        found: "no such tensor".into(),
        advice,
    }
}
