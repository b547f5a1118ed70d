//! What the operator tells about a SwallowModel. Conditions are positive: True is good.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What was observed and what is being done about it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct SwallowModelStatus {
    /// observedGeneration is the metadata.generation that this status is about.
    pub observed_generation: i64,
    /// replicas is how many groups exist, those that drain or failed included.
    pub replicas: i32,
    /// readyReplicas is how many groups serve.
    pub ready_replicas: i32,
    /// updatedReplicas is how many groups serve the revision of this spec.
    pub updated_replicas: i32,
    /// selector selects the worker pods, for the scale subresource.
    #[schemars(length(max = 512))]
    pub selector: String,
    /// updateRevision names the worker pods that this spec leads to; absent while the spec is invalid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_revision: Option<String>,
    /// memoryPlan is how the memory of each rank is divided; absent while the model's size is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_plan: Option<MemoryPlanStatus>,
    /// groups tells the state of each group.
    #[schemars(length(max = 512), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub groups: Vec<GroupStatus>,
    /// conditions tell what is true: SpecValid, MemoryPlanFits, RouterReady, Ready (clients are served),
    /// FullyAvailable (every group serves this spec), Settled (nothing is being changed), RecoveryHealthy
    /// (no group is quarantined).
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How the memory of each rank is divided, in bytes. Computed from the model's size, not measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct MemoryPlanStatus {
    /// weightsBytes is the size of one rank's weights.
    pub weights_bytes: i64,
    /// overheadBytes is set aside for workspace, in each rank.
    pub overhead_bytes: i64,
    /// kvCacheBytes holds keys and values, in each rank.
    pub kv_cache_bytes: i64,
    /// kvBytesPerToken is what one token of context takes in each rank.
    pub kv_bytes_per_token: i64,
    /// plannedKVTokens is how many tokens of context fit in one group, all requests together.
    #[serde(rename = "plannedKVTokens")]
    pub planned_kv_tokens: i64,
}

/// Where a group is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GroupState {
    /// It has no process yet.
    Pending,
    /// Its files are being fetched.
    Fetching,
    /// Its weights are being read.
    Loading,
    /// Its first step is being computed.
    Warming,
    /// It serves.
    Serving,
    /// It gets nothing new, and its open streams finish.
    Draining,
    /// It ended and waits to be started again.
    Failed,
    /// It ended too often and stays down.
    Quarantined,
}

/// Why a group does not serve: a closed list, for alerts and scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum GroupReason {
    /// It is starting and makes progress.
    Starting,
    /// No node has what it asks for.
    Unschedulable,
    /// Its image cannot be had.
    ImagePull,
    /// The node refuses its volume or its pod.
    Refused,
    /// The model's files are broken or not supported; the worker's own line says how.
    BadCheckpoint,
    /// The files cannot be fetched.
    FetchFailed,
    /// It made no progress for rollout.startupProgressTimeoutSeconds.
    StartupStalled,
    /// It used more memory than it may.
    OutOfMemory,
    /// Its process ended.
    Crashed,
    /// Its node does not answer.
    NodeLost,
    /// It is being stopped.
    Stopping,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupStatus {
    /// name of the group and its pod.
    pub name: String,
    /// revision that the group was made from.
    pub revision: String,
    /// state says where the group is on its way.
    pub state: GroupState,
    /// reason says why it does not serve; absent when it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "GroupReason")]
    pub reason: Option<GroupReason>,
    /// message tells more, in the worker's or the cluster's own words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 1024))]
    pub message: String,
    /// restarts is how often it failed within recovery.windowSeconds.
    #[serde(default)]
    pub restarts: i32,
    /// progress of fetching or loading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// memory as its worker measured it once it was loaded, of all ranks together; absent before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStatus>,
}

/// Memory as a worker measured it, in bytes, of all ranks of a group together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct MemoryStatus {
    /// weightsBytes is the size of the weights in the device's number format.
    pub weights_bytes: i64,
    /// kvCacheBytes holds keys and values.
    pub kv_cache_bytes: i64,
    /// workspaceBytes is what steps need otherwise.
    pub workspace_bytes: i64,
}

/// How far fetching or loading is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct ProgressStatus {
    /// bytesDone is how many bytes are there.
    pub bytes_done: i64,
    /// bytesTotal is how many there will be; zero while unknown.
    pub bytes_total: i64,
    /// etaSeconds is how long the rest will take; absent while unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// It cannot be told.
    #[default]
    Unknown,
}

/// One thing that is true or not, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// type names the condition.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 64))]
    pub kind: String,
    /// status is True, False or Unknown.
    pub status: ConditionStatus,
    /// reason says why, in one CamelCase word, for scripts.
    #[schemars(length(min = 1, max = 128))]
    pub reason: String,
    /// message says why, for people.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub message: String,
    /// observedGeneration is the metadata.generation that this condition is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// lastTransitionTime is when status last changed.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub last_transition_time: Time,
}
