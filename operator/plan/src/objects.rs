//! The plan's decisions as Kubernetes objects: pure functions that cannot fail, because they start from a `Valid` spec.
//!
//! One pod is one tensor-parallel group: ranks are threads of one process, and GPUs of one pod reach each other
//! directly. Pods run under the restricted pod security standard. Workers have no liveness probe: a loader that makes
//! progress must never be killed, a group that hangs ends itself, and one that stands still is failed by the plan.

pub mod labels;
mod pod;
mod router;
mod surroundings;

pub use pod::{Unusable, from_record, pod, record};
pub use router::{deployment, discover_target, service};
pub use surroundings::{disruption_budget, worker_account, worker_service};

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, PodSecurityContext, ResourceRequirements, SeccompProfile, SecurityContext,
    },
    apimachinery::pkg::{
        api::resource::Quantity as KubeQuantity,
        apis::meta::v1::{ObjectMeta, OwnerReference},
    },
};
use serde::Serialize;
use serde_json::Value;
use swallow_proto::launch::DiscoverTarget;

use crate::{
    Valid,
    launch::RouterLaunch,
    model::{Quantity, Resources},
};

/// The user and group of every process: nobody in particular, and not root.
const USER: i64 = 65532;
/// What a pod may take to end after its streams had their time, in seconds.
const GRACE_MARGIN_SECONDS: u32 = 15;

/// What surrounds the groups of a model, in the order in which it should be applied.
pub fn surroundings_value(valid: &Valid) -> Value {
    Value::Array(vec![
        plain(&worker_account(valid)),
        plain(&worker_service(valid)),
        plain(&disruption_budget(valid)),
    ])
}

/// A router with all models that it stands before, in the order in which it should be applied.
pub fn router_objects(valid: &Valid, router: &RouterLaunch, targets: &[DiscoverTarget]) -> Vec<Value> {
    vec![
        plain(&router::account(valid, router)),
        plain(&router::role_binding(valid, router)),
        plain(&deployment(valid, router, targets)),
        plain(&service(valid, router)),
    ]
}

/// The object with its fingerprint.
pub(crate) fn marked(mut object: Value, fingerprint: &str) -> Value {
    object["metadata"]["annotations"][labels::APPLIED] = Value::from(fingerprint);
    object
}

/// An object as plain data.
pub fn plain(object: &impl Serialize) -> Value {
    serde_json::to_value(object).expect("Kubernetes objects are plain data")
}

/// Metadata of an object that belongs to the model and goes with it.
fn meta(valid: &Valid, name: impl Into<String>, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some(valid.namespace.clone()),
        labels: Some(labels),
        owner_references: valid.uid.as_ref().map(|uid| vec![owner(valid, uid)]),
        ..ObjectMeta::default()
    }
}

fn owner(valid: &Valid, uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: "serving.swallow.dev/v1alpha1".into(),
        kind: "SwallowModel".into(),
        name: valid.name.clone(),
        uid: uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(USER),
        run_as_group: Some(USER),
        fs_group: Some(USER),
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".into(),
            localhost_profile: None,
        }),
        ..PodSecurityContext::default()
    }
}

fn container_security() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".into()]),
            add: None,
        }),
        read_only_root_filesystem: Some(true),
        ..SecurityContext::default()
    }
}

fn requirements(resources: &Resources, gpus: u32) -> ResourceRequirements {
    let convert = |quantities: &BTreeMap<String, Quantity>| -> BTreeMap<String, KubeQuantity> {
        quantities
            .iter()
            .map(|(name, quantity)| (name.clone(), KubeQuantity(quantity.to_string())))
            .collect()
    };
    let mut limits = convert(&resources.limits);
    if gpus > 0 {
        limits.insert("nvidia.com/gpu".into(), KubeQuantity(gpus.to_string()));
    }
    let requests = convert(&resources.requests);
    ResourceRequirements {
        limits: (!limits.is_empty()).then_some(limits),
        requests: (!requests.is_empty()).then_some(requests),
        claims: None,
    }
}
