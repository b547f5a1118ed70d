//! What is refused, and the line that says so. A folder's own path is left out of the expected lines.

use std::path::Path;

use serde_json::{Value, json};
use swallow_worker::checkpoint::Checkpoint;

use crate::folder::{FIRST, Folder, INDEX, ONE, SECOND, refusal, safetensors_bytes, with_header};

/// What was broken, and how.
type Breakage = (&'static str, fn(&mut Folder));

fn check(good: &Folder, cases: &[(Breakage, &str)]) {
    for ((title, change), expected) in cases {
        let mut folder = good.clone();
        change(&mut folder);
        assert_eq!(refusal(&folder, 1).replace(INDEX, "INDEX"), *expected, "{title}");
    }
}

/// `key = value -> line`, where the value is put into a good config.json.
const CONFIGS: &str = r#"
architectures = ["MistralForCausalLM"] -> architectures: expected ["LlamaForCausalLM"], found ["MistralForCausalLM"]; only Llama models are supported
architectures = null -> architectures: expected ["LlamaForCausalLM"], found null; only Llama models are supported
model_type = "qwen2" -> model_type: expected "llama", found "qwen2"; only Llama models are supported
hidden_act = "gelu" -> hidden_act: expected "silu", found "gelu"; no other activation is supported
attention_bias = true -> attention_bias: expected false, found true; a bias the model code does not apply
mlp_bias = true -> mlp_bias: expected false, found true; a bias the model code does not apply
quantization_config = {"quant_method": "gptq"} -> quantization_config: expected nothing, found {"quant_method":"gptq"}; quantised weights are not supported: convert the checkpoint to BF16
sliding_window = 4096 -> sliding_window: expected nothing, found 4096; every layer attends to the whole context
layer_types = ["full_attention", "sliding_attention"] -> layer_types: expected "full_attention" in every entry, found ["full_attention","sliding_attention"]; every layer attends to the whole context
partial_rotary_factor = 0.5 -> partial_rotary_factor: expected 1, found 0.5; the model code does not compute this
logits_scaling = 8 -> logits_scaling: expected 1, found 8; the model code does not compute this
attention_multiplier = 0.1 -> attention_multiplier: expected nothing, found 0.1; the model code does not compute this
qk_norm = true -> qk_norm: expected false, found true; the model code does not compute this
num_local_experts = 8 -> num_local_experts: expected 0, found 8; mixtures of experts are not supported
hidden_size = 0 -> hidden_size: expected a whole number from 1 to 131072, found 0
hidden_size = -16 -> hidden_size: expected a whole number from 1 to 131072, found -16
hidden_size = 16.5 -> hidden_size: expected a whole number from 1 to 131072, found 16.5
hidden_size = "16" -> hidden_size: expected a whole number from 1 to 131072, found "16"
hidden_size = null -> hidden_size: expected a whole number from 1 to 131072, found null
hidden_size = 18 -> hidden_size: expected a multiple of num_attention_heads, 4, or an explicit head_dim, found 18
hidden_size = 12 -> hidden_size: expected an even head width of at most 1024, not 3, found 12
head_dim = 5 -> head_dim: expected an even head width of at most 1024, not 5, found 5
num_hidden_layers = 100000 -> num_hidden_layers: expected a whole number from 1 to 1024, found 100000
num_key_value_heads = 3 -> num_key_value_heads: expected a divisor of num_attention_heads, 4, found 3
vocab_size = 1099511627776 -> vocab_size: expected a whole number from 1 to 4194304, found 1099511627776
max_position_embeddings = null -> max_position_embeddings: expected a whole number from 1 to 16777216, found null
rms_norm_eps = 0 -> rms_norm_eps: expected a number above 0 and at most 0.1, found 0
rms_norm_eps = "1e-5" -> rms_norm_eps: expected a number above 0 and at most 0.1, found "1e-5"
rope_theta = -1 -> rope_theta: expected a number above 1, found -1
eos_token_id = 37 -> eos_token_id: expected token ids from 0 to 36, found 37
eos_token_id = [1, "x"] -> eos_token_id: expected token ids from 0 to 36, found [1,"x"]
bos_token_id = [1, 2] -> bos_token_id: expected one token id, found [1,2]
tie_word_embeddings = "no" -> tie_word_embeddings: expected true or false, found "no"
rope_scaling = "llama3" -> rope_scaling: expected an object, found "llama3"
rope_scaling = {"rope_type": "yarn", "factor": 4} -> rope_scaling.rope_type: expected "default", "linear" or "llama3", found "yarn"; no other kind of rope scaling is supported
rope_scaling = {"type": "dynamic", "factor": 4} -> rope_scaling.type: expected "default", "linear" or "llama3", found "dynamic"; no other kind of rope scaling is supported
rope_parameters = {"rope_type": "longrope", "rope_theta": 500000.0} -> rope_parameters.rope_type: expected "default", "linear" or "llama3", found "longrope"; no other kind of rope scaling is supported
rope_scaling = {"factor": 4} -> rope_scaling.rope_type: expected "default", "linear" or "llama3", found nothing
rope_scaling = {"rope_type": "linear", "type": "llama3", "factor": 4} -> rope_scaling.type: expected the same as rope_type, "linear", or nothing, found "llama3"
rope_scaling = {"rope_type": "linear"} -> rope_scaling.factor: expected a number of at least 1, found nothing
rope_scaling = {"rope_type": "linear", "factor": 0.5} -> rope_scaling.factor: expected a number of at least 1, found 0.5
rope_scaling = {"rope_type": "linear", "factor": 2, "beta_fast": 32} -> rope_scaling.beta_fast: expected nothing, found 32; this rope type has no such parameter
rope_scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1} -> rope_scaling.high_freq_factor: expected a number above low_freq_factor, 4, found 1
rope_scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4} -> rope_scaling.original_max_position_embeddings: expected a whole number from 1 to 16777216, found nothing
rope_parameters = {"rope_type": "default", "rope_theta": 10000} -> rope_theta: expected the same value as rope_parameters.rope_theta, 10000, found 500000.0
rope_parameters = {"rope_type": "default", "partial_rotary_factor": 0.5} -> rope_parameters.partial_rotary_factor: expected nothing, found 0.5; this rope type has no such parameter
rope_parameters = {"full_attention": {"rope_type": "default"}} -> rope_parameters.rope_type: expected "default", "linear" or "llama3", found nothing
"#;

#[test]
fn configs_that_are_not_computed_are_refused_by_key() {
    for row in CONFIGS.lines().filter(|row| !row.is_empty()) {
        let (change, expected) = row.split_once(" -> ").expect("a change and a line");
        let (key, value) = change.split_once(" = ").expect("a key and a value");
        let mut folder = Folder::small();
        folder.set(key, serde_json::from_str(value).expect("JSON"));
        assert_eq!(refusal(&folder, 1), format!("config.json: {expected}"));
    }
    let mut both = Folder::small();
    both.set("rope_scaling", json!({"rope_type": "linear", "factor": 2}));
    both.set(
        "rope_parameters",
        json!({"rope_type": "default", "rope_theta": 500_000.0}),
    );
    assert_eq!(
        refusal(&both, 1),
        "config.json: rope_scaling: expected the same scaling as rope_parameters, or only one of the two, \
         found {\"rope_type\":\"linear\",\"factor\":2}"
    );
}

const TENSORS: &[(Breakage, &str)] = &[
    (
        ("missing", |f| drop(f.remove("model.layers.1.mlp.up_proj.weight"))),
        "model.safetensors: tensor model.layers.1.mlp.up_proj.weight: expected shape [24, 16] in F32, F16 or BF16, \
     found no such tensor; the checkpoint is incomplete or config.json (num_hidden_layers 2) is of another model",
    ),
    (
        ("missing head", |f| drop(f.remove("lm_head.weight"))),
        "model.safetensors: tensor lm_head.weight: expected shape [37, 16] in F32, F16 or BF16, found no such tensor; \
     set tie_word_embeddings in config.json if the model has no head of its own",
    ),
    (
        ("fewer layers than the config says", |f| {
            f.set("num_hidden_layers", json!(3))
        }),
        "model.safetensors: tensor model.layers.2.input_layernorm.weight: expected shape [16] in F32, F16 or BF16, \
     found no such tensor; the checkpoint is incomplete or config.json (num_hidden_layers 3) is of another model",
    ),
    (
        ("more layers than the config says", |f| {
            f.set("num_hidden_layers", json!(1))
        }),
        "model.safetensors: tensor model.layers.1.self_attn.q_proj.weight: expected no such tensor, \
     found a tensor that no operation of the model reads; \
     config.json (num_hidden_layers 1) and weights must be of one Llama model",
    ),
    (
        ("wrong shape", |f| {
            f.tensor("model.layers.0.self_attn.k_proj.weight").shape = vec![16, 8]
        }),
        "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight: expected shape [8, 16], \
     found shape [16, 8]; config.json and weights must be of one model",
    ),
    (
        ("wrong rank", |f| {
            f.tensor("model.norm.weight").shape = vec![1, 16]
        }),
        "model.safetensors: tensor model.norm.weight: expected shape [16], found shape [1, 16]; \
     config.json and weights must be of one model",
    ),
    (
        ("wrong dtype", |f| f.tensor("model.norm.weight").dtype = "I16"),
        "model.safetensors: tensor model.norm.weight: expected dtype F32, F16 or BF16, found dtype I16; \
     convert the checkpoint to BF16",
    ),
    (
        ("unheard-of dtype", |f| {
            f.tensor("model.norm.weight").dtype = "F6\n"
        }),
        "model.safetensors: tensor model.norm.weight: expected dtype F32, F16 or BF16, found dtype F6\\n; \
     convert the checkpoint to BF16",
    ),
    (
        ("a bias", |f| {
            f.add(ONE, "model.layers.0.self_attn.q_proj.bias", &[16])
        }),
        "model.safetensors: tensor model.layers.0.self_attn.q_proj.bias: expected no such tensor, \
     found a bias the model code does not apply; only Llama models without biases are supported",
    ),
    (
        ("a norm of queries", |f| {
            f.add(ONE, "model.layers.0.self_attn.q_norm.weight", &[4])
        }),
        "model.safetensors: tensor model.layers.0.self_attn.q_norm.weight: expected no such tensor, \
     found a tensor that no operation of the model reads; \
     config.json (num_hidden_layers 2) and weights must be of one Llama model",
    ),
    (
        ("a name with a line break", |f| f.add(ONE, "x\ny", &[1])),
        "model.safetensors: tensor x\\ny: expected no such tensor, found a tensor that no operation of the model reads; \
     config.json (num_hidden_layers 2) and weights must be of one Llama model",
    ),
    (
        ("twice in one file", |f| f.add(ONE, "model.norm.weight", &[16])),
        "model.safetensors: tensor model.norm.weight: expected one entry in the header, found two; \
     download the file again",
    ),
];

#[test]
fn tensors_that_are_not_the_models_are_refused_by_name() {
    check(&Folder::small(), TENSORS);
}

fn raw(f: &mut Folder, name: &str, bytes: impl Into<Vec<u8>>) {
    f.raw.insert(name.into(), Some(bytes.into()));
}
fn entry(begin: u64, end: u64) -> Value {
    json!({"dtype": "F32", "shape": [1], "data_offsets": [begin, end]})
}

const FILES: &[(Breakage, &str)] = &[
    (
        ("no config", |f| drop(f.raw.insert("config.json".into(), None))),
        "config.json: cannot be read: No such file or directory (os error 2); \
     the model's folder must hold the model's config.json in the Hugging Face layout",
    ),
    (
        ("half a config", |f| raw(f, "config.json", "{\"a\": 1")),
        "config.json: expected JSON, found EOF while parsing an object at line 1 column 7; \
     download the file again or repair it",
    ),
    (
        ("NaN as Python writes it", |f| {
            raw(f, "config.json", "{\"rms_norm_eps\": NaN}")
        }),
        "config.json: expected JSON, found expected value at line 1 column 18; download the file again or repair it",
    ),
    (
        ("a list as config", |f| raw(f, "config.json", "[]")),
        "config.json: expected a JSON object, found []; download the file again or repair it",
    ),
    (
        ("no weights", |f| drop(f.raw.insert(ONE.into(), None))),
        "DIR: expected model.safetensors or INDEX, found neither; \
     weights in another format must be converted to safetensors first",
    ),
    (
        ("an empty file", |f| raw(f, ONE, "")),
        "model.safetensors: expected a safetensors file, found an empty file; download the file again",
    ),
    (
        ("a few bytes", |f| raw(f, ONE, "abc")),
        "model.safetensors: expected a safetensors file, found 3 bytes, too few for one; download the file again",
    ),
    (
        ("a Git LFS pointer", |f| {
            raw(
                f,
                ONE,
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            )
        }),
        "model.safetensors: expected a safetensors file, found a Git LFS pointer that stands for one; \
     run `git lfs pull` in the model's folder",
    ),
    (
        ("a truncated header", |f| {
            raw(f, ONE, [&99u64.to_le_bytes()[..], b"{\"a\":"].concat())
        }),
        "model.safetensors: expected a header that fits into the file's 13 bytes, found a header of 99 bytes; \
     download the file again",
    ),
    (
        ("a header of any length", |f| raw(f, ONE, [0xff; 64])),
        "model.safetensors: expected a header that fits into the file's 64 bytes, \
     found a header of 18446744073709551615 bytes; download the file again",
    ),
    (
        ("a header of other text", |f| raw(f, ONE, with_header("[1]", b""))),
        "model.safetensors: expected a safetensors header, \
     found invalid type: sequence, expected an object of tensors at line 1 column 0; download the file again",
    ),
    (
        ("an entry without offsets", |f| {
            raw(f, ONE, with_header(r#"{"a":{"dtype":"F32","shape":[1]}}"#, b""));
        }),
        "model.safetensors: expected a safetensors header, \
     found tensor a: missing field `data_offsets` at line 1 column 32; download the file again",
    ),
    (
        ("truncated data", |f| {
            let mut bytes = safetensors_bytes(&f.shards[ONE]);
            bytes.truncate(bytes.len() - 10);
            raw(f, ONE, bytes);
        }),
        "model.safetensors: expected 10208 bytes of tensors, found 10198: the file is truncated; download the file again",
    ),
    (
        ("surplus data", |f| {
            let mut bytes = safetensors_bytes(&f.shards[ONE]);
            bytes.extend([0; 10]);
            raw(f, ONE, bytes);
        }),
        "model.safetensors: expected 10208 bytes of tensors, found 10218: bytes that belong to no tensor; \
     download the file again",
    ),
    (
        ("overlapping tensors", |f| {
            let header = json!({"a": entry(0, 4), "b": entry(2, 6)}).to_string();
            raw(f, ONE, with_header(&header, &[0; 6]));
        }),
        "model.safetensors: tensor b: expected data from byte 4, \
     found data from byte 2, overlapping the tensor before it; download the file again",
    ),
    (
        ("a hole", |f| {
            let header = json!({"a": entry(0, 4), "b": entry(8, 12)}).to_string();
            raw(f, ONE, with_header(&header, &[0; 12]));
        }),
        "model.safetensors: tensor b: expected data from byte 4, found data from byte 8, behind a hole; \
     download the file again",
    ),
    (
        ("offsets that run backwards", |f| {
            raw(
                f,
                ONE,
                with_header(&json!({"a": entry(4, 0)}).to_string(), &[0; 4]),
            );
        }),
        "model.safetensors: tensor a: expected offsets in order, found 4 to 0; download the file again",
    ),
    (
        ("fewer bytes than the shape", |f| {
            f.tensor("model.norm.weight").shape = vec![17]
        }),
        "model.safetensors: tensor model.norm.weight: expected 34 bytes for BF16 [17], found 32 bytes; \
     download the file again",
    ),
    (
        ("a shape whose size overflows", |f| {
            f.tensor("model.norm.weight").shape = vec![1 << 62, 1 << 62]
        }),
        "model.safetensors: tensor model.norm.weight: expected more bytes than exist for BF16 \
     [4611686018427387904, 4611686018427387904], found 32 bytes; download the file again",
    ),
    (
        ("an index beside the one file", |f| {
            f.index = Some(json!({"weight_map": {"a": ONE}}))
        }),
        "INDEX: expected either an index or model.safetensors, found both in one folder; \
     remove the one that is not this model's",
    ),
];

#[test]
fn broken_files_are_refused() {
    check(&Folder::small(), FILES);
    let path = Path::new("/no/such/folder");
    let error = Checkpoint::open(path, 1).expect_err("no folder").to_string();
    assert!(
        error.starts_with("/no/such/folder/config.json: cannot be read: No such file"),
        "{error}"
    );
}

fn point(f: &mut Folder, tensor: &str, to: Value) {
    let mut index = f.index();
    index["weight_map"][tensor] = to;
    f.index = Some(index);
}

const INDEXED: &[(Breakage, &str)] = &[
    (
        ("an absent shard", |f| drop(f.raw.insert(SECOND.into(), None))),
        "model-00002-of-00002.safetensors: expected the shard that INDEX names, found no such file; \
     download the missing file",
    ),
    (
        ("a tensor that is not in its shard", |f| {
            point(f, "model.norm.weight", json!(FIRST))
        }),
        "model-00001-of-00002.safetensors: tensor model.norm.weight: expected it here, as INDEX says, \
     found no such tensor in the file; save the model again with save_pretrained, or download it again",
    ),
    (
        ("a tensor that the index does not know", |f| {
            f.index = Some(f.index());
            f.add(FIRST, "model.extra", &[1]);
        }),
        "model-00001-of-00002.safetensors: tensor model.extra: expected it elsewhere or nowhere, as INDEX says, \
     found it in the file all the same; save the model again with save_pretrained, or download it again",
    ),
    (
        ("a tensor in both shards", |f| {
            f.add(FIRST, "model.norm.weight", &[16]);
        }),
        "model-00001-of-00002.safetensors: tensor model.norm.weight: expected it elsewhere or nowhere, as INDEX says, \
     found it in the file all the same; save the model again with save_pretrained, or download it again",
    ),
    (
        ("a truncated shard", |f| {
            let mut bytes = safetensors_bytes(&f.shards[SECOND]);
            bytes.truncate(bytes.len() - 10);
            f.raw.insert(SECOND.into(), Some(bytes));
        }),
        "model-00002-of-00002.safetensors: expected 5120 bytes of tensors, found 5110: the file is truncated; \
         download the file again",
    ),
    (
        ("a way out of the folder", |f| {
            point(f, "model.norm.weight", json!("../model.safetensors"))
        }),
        "INDEX: weight_map.model.norm.weight: expected the plain name of a .safetensors file in the same folder, \
     found \"../model.safetensors\"",
    ),
    (
        ("an absolute path", |f| {
            point(f, "model.norm.weight", json!("/etc/model.safetensors"))
        }),
        "INDEX: weight_map.model.norm.weight: expected the plain name of a .safetensors file in the same folder, \
     found \"/etc/model.safetensors\"",
    ),
    (
        ("a number for a file", |f| point(f, "model.norm.weight", json!(2))),
        "INDEX: weight_map.model.norm.weight: expected the plain name of a .safetensors file in the same folder, \
     found 2",
    ),
    (
        ("no map", |f| f.index = Some(json!({"metadata": {}}))),
        "INDEX: weight_map: expected an object that maps tensors to files, found nothing",
    ),
];

#[test]
fn an_index_and_its_shards_must_agree() {
    check(&Folder::small().split(), INDEXED);
    let mut nothing = Folder::small().split();
    nothing.index = Some(json!({"weight_map": {}}));
    assert!(refusal(&nothing, 1).ends_with("weight_map: expected at least one tensor, found {}"));
}

#[test]
fn degrees_that_do_not_divide_are_refused_with_those_that_do() {
    let fits = "degrees that fit this model: 1, 2, 4";
    for (degree, why) in [
        (0, "there must be at least one rank"),
        (3, "num_attention_heads 4 does not divide by it"),
        (8, "num_attention_heads 4 does not divide by it"),
    ] {
        let expected = format!("config.json: tensor parallel degree {degree} does not fit: {why}; {fits}");
        assert_eq!(refusal(&Folder::small(), degree), expected);
    }
    let mut odd = Folder::small();
    odd.set("intermediate_size", json!(26));
    assert_eq!(
        refusal(&odd, 4),
        "config.json: tensor parallel degree 4 does not fit: intermediate_size 26 does not divide by it; \
         degrees that fit this model: 1, 2"
    );
    let mut heads = Folder::small();
    heads.set("num_attention_heads", json!(12));
    heads.set("num_key_value_heads", json!(6));
    heads.set("head_dim", json!(2));
    assert_eq!(
        refusal(&heads, 4),
        "config.json: tensor parallel degree 4 does not fit: \
         num_key_value_heads 6 neither divides by it nor divides it; degrees that fit this model: 1, 2, 3, 6, 12"
    );
}
