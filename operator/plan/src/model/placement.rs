//! Where worker pods run and what they ask for.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Quantity;

/// CPU and memory that a pod asks for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Resources {
    /// requests is what the scheduler sets aside, by resource name: {cpu: "8", memory: 64Gi}. Defaults to
    /// none, except that a worker on CPU requests the memory of its memory plan.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub requests: BTreeMap<String, Quantity>,
    /// limits is what the container may use, by resource name. Defaults to none. On CPU, a cpu limit also
    /// sets how many threads the worker computes with. A memory limit below the memory plan is refused.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub limits: BTreeMap<String, Quantity>,
}

/// On which nodes worker pods may run. A change makes a new revision.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Placement {
    /// nodeSelector lists labels that a node must have, as name: value. Defaults to none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// tolerations list taints that do not keep the pod off a node. Defaults to none, apart from a short
    /// patience with nodes that are not ready, which every group has.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub tolerations: Vec<Toleration>,
    /// priorityClassName is the PriorityClass of worker pods: a higher one may take the place of a lower
    /// one. Defaults to the cluster's default class.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// runtimeClassName is the RuntimeClass of worker pods, where the cluster needs one for GPUs, such as
    /// nvidia. Defaults to the cluster's default runtime.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    /// spread says whether groups of this model keep apart: PreferDifferentNodes puts them on different
    /// nodes while that is possible, so that one lost node takes few of them; Any leaves it to the
    /// scheduler. Defaults to PreferDifferentNodes.
    pub spread: Spread,
}

/// Whether groups of one model keep apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Spread {
    /// Different nodes while possible.
    #[default]
    PreferDifferentNodes,
    /// As the scheduler likes.
    Any,
}

/// How a toleration's key and value are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationOperator {
    /// Key and value are the taint's.
    #[default]
    Equal,
    /// The key is the taint's, or absent.
    Exists,
}

/// What a taint does to pods that do not tolerate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationEffect {
    /// New pods stay away.
    NoSchedule,
    /// New pods stay away while there are other nodes.
    PreferNoSchedule,
    /// Running pods leave too.
    NoExecute,
}

/// A taint that does not keep the pod off a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Toleration {
    /// key is the taint's key. Defaults to every key, which needs operator Exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 316))]
    pub key: Option<String>,
    /// operator says how the taint is compared: Equal compares key and value, Exists the key alone.
    /// Defaults to Equal.
    pub operator: TolerationOperator,
    /// value is the taint's value, for operator Equal. Defaults to empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub value: Option<String>,
    /// effect is the taint's effect: NoSchedule, PreferNoSchedule or NoExecute. Defaults to all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "TolerationEffect")]
    pub effect: Option<TolerationEffect>,
}

/// A Secret with a registry's credentials.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecret {
    /// name is the Secret, in the model's namespace, of type kubernetes.io/dockerconfigjson. Required.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}
