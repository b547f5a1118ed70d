//! Which model is served: names, files, size.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Quantity;

/// Which model is served: its names, where its files come from, how large it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// servedNames are the names clients ask for; the first is the model's own, the others are aliases. 1
    /// to 16 names of letters, digits and `._-/:@`, without a comma or an equals sign. Defaults to
    /// metadata.name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 200)), extend("x-kubernetes-list-type" = "set"))]
    pub served_names: Vec<String>,
    /// source says where the model's files are, in the Hugging Face layout: config.json, tokenizer.json and
    /// *.safetensors. Required, unless engine.loadFormat is Dummy and shape is set. Its type cannot be
    /// changed: another kind of source is another SwallowModel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// cache says where files of a HuggingFace source are kept. Read for that source alone. Defaults to an
    /// emptyDir, which every new pod fills again; a claim is filled once and shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    /// shape tells the size of the model, for the memory plan and for the check of parallelism.tensor when
    /// the model's config.json cannot be read in advance. Defaults to unknown: then memory is not planned,
    /// and a wrong parallelism.tensor shows only when the worker has read the files. Where config.json can
    /// be read, both must agree. With engine.loadFormat Dummy it is the size of the model that is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<ShapeSpec>,
}

/// Where the model's files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SourceType {
    /// A folder of the node.
    HostPath,
    /// A folder of a volume in the namespace.
    PersistentVolumeClaim,
    /// A repository at a Hugging Face endpoint, at a pinned revision.
    HuggingFace,
}

/// Where the model's files are: exactly the member that `type` names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// type names the one member that is set. HostPath: a folder of the node, which needs a namespace whose
    /// pod security allows it. PersistentVolumeClaim: a folder of a volume. HuggingFace: fetched into the
    /// cache before the worker starts, each file's size and checksum verified. Required and immutable.
    #[serde(rename = "type")]
    pub kind: SourceType,
    /// hostPath is set when type is HostPath.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_path: Option<HostPathSource>,
    /// persistentVolumeClaim is set when type is PersistentVolumeClaim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimSource>,
    /// huggingFace is set when type is HuggingFace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugging_face: Option<HuggingFaceSource>,
}

/// A folder of the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostPathSource {
    /// path is the absolute path of the model's folder on every node that may run a group. It is mounted
    /// read-only. Required.
    #[schemars(length(min = 1, max = 1024))]
    pub path: String,
}

/// A folder of a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimSource {
    /// claimName is the PersistentVolumeClaim in the model's namespace. It is mounted read-only; more than
    /// one group needs an access mode that lets several nodes read. Required.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// path is the model's folder inside the volume, relative to its root, without `..`. Defaults to the
    /// root.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub path: String,
}

/// A repository at a Hugging Face endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HuggingFaceSource {
    /// repo is the repository, as OWNER/NAME: tokyotech-llm/Llama-3-Swallow-8B-Instruct-v0.1. Required.
    #[schemars(length(min = 3, max = 200))]
    pub repo: String,
    /// revision is the full commit, 40 hexadecimal digits in lower case. Branches and tags are refused,
    /// because what they name can change between two groups of one model. Required.
    #[schemars(length(min = 40, max = 40))]
    pub revision: String,
    /// endpoint is the base URL of a mirror that speaks the same protocol. Defaults to
    /// https://huggingface.co.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 1024))]
    pub endpoint: Option<String>,
    /// tokenSecretRef names the Secret that holds an access token for gated repositories. It is mounted
    /// into the container that fetches; the operator never reads it. Defaults to none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret_ref: Option<SecretKey>,
    /// caConfigMapRef names the ConfigMap that holds the certificate authority of a mirror, in PEM. It is
    /// trusted besides the public ones, by the container that fetches. Defaults to none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_config_map_ref: Option<ConfigMapKey>,
}

/// One key of a ConfigMap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapKey {
    /// name is the ConfigMap, in the model's namespace. Required.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// key is the entry of the ConfigMap. Defaults to ca.crt.
    #[serde(default = "ca_certificate")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn ca_certificate() -> String {
    "ca.crt".to_owned()
}

/// One key of a Secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// name is the Secret, in the model's namespace. Required.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// key is the entry of the Secret. Defaults to token.
    #[serde(default = "token")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn token() -> String {
    "token".to_owned()
}

/// What holds fetched files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CacheType {
    /// A folder that lives as long as the pod.
    #[default]
    EmptyDir,
    /// A volume that outlives pods.
    PersistentVolumeClaim,
}

/// Where fetched files are kept: the member that `type` names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Cache {
    /// type says what holds the files. EmptyDir lives as long as its pod, so each new pod fetches
    /// everything again. PersistentVolumeClaim keeps them; pods that share it fetch one after the other and
    /// then find them complete. Defaults to EmptyDir.
    #[serde(rename = "type", default)]
    pub kind: CacheType,
    /// emptyDir may be set when type is EmptyDir.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDirCache>,
    /// persistentVolumeClaim is set when type is PersistentVolumeClaim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimCache>,
}

/// A folder that lives as long as the pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDirCache {
    /// sizeLimit is the most bytes that the folder may hold, as a quantity: 40Gi. A pod that exceeds it is
    /// evicted. Defaults to what the node has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<Quantity>,
}

/// A volume that outlives pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimCache {
    /// claimName is the PersistentVolumeClaim in the model's namespace. More than one group on more than
    /// one node needs access mode ReadWriteMany. Required.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}

/// A model size known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PresetName {
    /// Llama 3, 3.1 of 8 billion parameters, and the Swallow models made from them.
    #[serde(rename = "llama-3-8b")]
    Llama3_8B,
    /// Llama 3, 3.1, 3.3 of 70 billion parameters, and the Swallow models made from them.
    #[serde(rename = "llama-3-70b")]
    Llama3_70B,
}

/// The size of the model: a preset or numbers, not both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShapeSpec {
    /// preset names a known size: llama-3-8b or llama-3-70b. Swallow models made from Llama 3, 3.1 and 3.3
    /// have exactly these. Set this or numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "PresetName")]
    pub preset: Option<PresetName>,
    /// numbers gives the size as the model's config.json does. Set this or preset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numbers: Option<ShapeNumbers>,
}

/// The size of a Llama model in numbers, each one as config.json writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShapeNumbers {
    /// hiddenSize is the width of the residual stream (hidden_size). Required.
    #[schemars(range(min = 1, max = 1048576))]
    pub hidden_size: u32,
    /// layers is the number of decoder layers (num_hidden_layers). Required.
    #[schemars(range(min = 1, max = 4096))]
    pub layers: u32,
    /// attentionHeads is the number of query heads (num_attention_heads). Required; parallelism.tensor must
    /// divide it.
    #[schemars(range(min = 1, max = 4096))]
    pub attention_heads: u32,
    /// keyValueHeads is the number of key and value heads (num_key_value_heads). Required. When
    /// parallelism.tensor is larger, each is held by several ranks.
    #[schemars(range(min = 1, max = 4096))]
    pub key_value_heads: u32,
    /// headDim is the width of one head (head_dim). Defaults to hiddenSize / attentionHeads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub head_dim: Option<u32>,
    /// intermediateSize is the width of the feed-forward layer (intermediate_size). Required;
    /// parallelism.tensor must divide it.
    #[schemars(range(min = 1, max = 4194304))]
    pub intermediate_size: u32,
    /// vocabularySize is the number of token ids (vocab_size). Required.
    #[schemars(range(min = 1, max = 16777216))]
    pub vocabulary_size: u32,
    /// maxPositionEmbeddings is the longest context, in tokens (max_position_embeddings). Required; the
    /// largest value of engine.maxModelLen, and its default.
    #[schemars(range(min = 1, max = 16777216))]
    pub max_position_embeddings: u32,
    /// tieWordEmbeddings says that the output head is the embedding itself (tie_word_embeddings). Defaults
    /// to false.
    #[serde(default)]
    pub tie_word_embeddings: bool,
}
