//! The SwallowModel: what a user writes, as one typed resource.
//!
//! Field documentation is the product's manual: it becomes the CRD's descriptions and `kubectl explain`. Each field
//! states its unit, its default and what follows from it. A field exists only if the plan reads it. There is no
//! `phase`: conditions say what is true, each with its reason.

mod crd;
mod engine;
mod operation;
mod placement;
mod quantity;
mod read;
mod rules;
mod source;
mod status;

pub use crd::{crd, crd_value};
pub use engine::{
    Accelerator, Device, Engine, EngineDtype, EngineGenerationDefaults, EngineKernels, EngineLoadFormat,
    EnginePrefixCache, KvCache, Parallelism,
};
pub use operation::{
    Backoff, Drain, KeysSecret, MutualTls, Recovery, Rollout, Router, RouterLimits, ServiceType,
};
pub use placement::{
    Placement, PullSecret, Resources, Spread, Toleration, TolerationEffect, TolerationOperator,
};
pub use quantity::{Quantity, QuantityError};
pub use read::{check_schema, read};
pub use source::{
    Cache, CacheType, ClaimCache, ClaimSource, ConfigMapKey, EmptyDirCache, HostPathSource,
    HuggingFaceSource, Model, PresetName, SecretKey, ShapeNumbers, ShapeSpec, Source, SourceType,
};
pub use status::{
    Condition, ConditionStatus, GroupReason, GroupState, GroupStatus, MemoryPlanStatus, MemoryStatus,
    ProgressStatus, SwallowModelStatus,
};

use std::fmt;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The longest name a SwallowModel may have: names of its pods add a revision and a number to it.
pub const NAME_MAX: usize = 40;

/// What is wrong with one field, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field, as a path from the top of the resource: `spec.engine.dtype`.
    pub field: String,
    /// What is wrong and what to write.
    pub message: String,
}

impl Problem {
    /// A problem of one field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// A language model that is served: where its files are, how the engine computes it, how many tensor-parallel
/// groups serve it, and which router stands in front.
#[allow(
    clippy::duplicated_attributes,
    reason = "printer columns have types in common"
)]
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "serving.swallow.dev",
    version = "v1alpha1",
    kind = "SwallowModel",
    singular = "swallowmodel",
    plural = "swallowmodels",
    shortname = "swm",
    namespaced,
    status = "SwallowModelStatus",
    derive = "PartialEq",
    doc = "A SwallowModel is a language model that is served by tensor-parallel worker groups behind a gRPC router.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(
        name = "Groups",
        type_ = "integer",
        json_path = ".spec.replicas",
        description = "Groups asked for"
    ),
    printcolumn(
        name = "Serving",
        type_ = "integer",
        json_path = ".status.readyReplicas",
        description = "Groups that serve"
    ),
    printcolumn(
        name = "Updated",
        type_ = "integer",
        json_path = ".status.updatedReplicas",
        description = "Groups that serve the current revision"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "Whether clients are served"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"FullyAvailable\")].reason",
        description = "Why not every group serves, or AllGroupsServing"
    ),
    printcolumn(
        name = "TP",
        type_ = "integer",
        json_path = ".spec.parallelism.tensor",
        description = "Ranks of each group"
    ),
    printcolumn(
        name = "Device",
        type_ = "string",
        json_path = ".spec.accelerator.device",
        description = "What computes"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Revision",
        type_ = "string",
        json_path = ".status.updateRevision",
        priority = 1,
        description = "The revision that groups are brought to"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct SwallowModelSpec {
    /// model says which model is served: its names, where its files come from and how large it is.
    /// Required.
    pub model: Model,
    /// engine says how the model is computed and how much it serves at once. Defaults suit a first start on
    /// GPUs.
    #[serde(default)]
    pub engine: Engine,
    /// parallelism says how the model is split over the devices of one group.
    #[serde(default)]
    pub parallelism: Parallelism,
    /// accelerator says what computes. Defaults to GPUs.
    #[serde(default)]
    pub accelerator: Accelerator,
    /// resources are the CPU and memory that each worker pod asks for. GPUs do not belong here: a group
    /// gets parallelism.tensor of them. On CPU, an absent memory request is filled from the memory plan.
    #[serde(default)]
    pub resources: Resources,
    /// replicas is how many groups serve the model, 0 to 256. Each group holds the whole model and serves
    /// on its own, so throughput grows with their number. Defaults to 1. Zero keeps router and address, and
    /// serves nothing. This is the field that `kubectl scale` and autoscalers write.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 256))]
    pub replicas: i32,
    /// placement says on which nodes worker pods may run. Defaults to any node with room.
    #[serde(default)]
    pub placement: Placement,
    /// imagePullSecrets name the Secrets of this namespace that hold credentials for the registries of the
    /// worker's and the router's image. Defaults to none. The operator never reads them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub image_pull_secrets: Vec<PullSecret>,
    /// rollout says how groups are replaced when the spec changes.
    #[serde(default)]
    pub rollout: Rollout,
    /// drain says how long open streams may finish before a group stops.
    #[serde(default)]
    pub drain: Drain,
    /// recovery says how a group that ended is started again, and when to give up.
    #[serde(default)]
    pub recovery: Recovery,
    /// router says how clients reach the model and how many requests may wait.
    #[serde(default)]
    pub router: Router,
    /// suspend stops every group, after their streams have finished, and keeps router, address and all
    /// settings. Defaults to false. Setting it back to false starts the groups again.
    #[serde(default)]
    pub suspend: bool,
}

fn one() -> i32 {
    1
}
