//! What surrounds the groups: an account without rights, names for pods, and a limit on voluntary disruption.

use k8s_openapi::{
    api::{
        core::v1::{Service, ServiceAccount, ServicePort, ServiceSpec},
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};

use super::{labels, meta};
use crate::{
    Valid,
    launch::{WORKER_GRPC_PORT, WORKER_HTTP_PORT},
};

/// The account of worker pods. It has no rights, and its token is not mounted.
pub fn worker_account(valid: &Valid) -> ServiceAccount {
    let labels = labels::with_common(labels::of_workers(&valid.name), "swallow-worker");
    ServiceAccount {
        metadata: meta(valid, labels::worker_name(&valid.name), labels),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// A headless service: it gives each group a name of its own, ready or not, because routers judge that themselves.
pub fn worker_service(valid: &Valid) -> Service {
    let labels = labels::with_common(labels::of_workers(&valid.name), "swallow-worker");
    Service {
        metadata: meta(valid, labels::worker_name(&valid.name), labels),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".into()),
            publish_not_ready_addresses: Some(true),
            selector: Some(labels::of_workers(&valid.name)),
            ports: Some(vec![
                port("grpc", WORKER_GRPC_PORT),
                port("http", WORKER_HTTP_PORT),
            ]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// How many groups must stay when nodes are drained.
pub fn disruption_budget(valid: &Valid) -> PodDisruptionBudget {
    let spec = &valid.spec;
    // A budget that allows nothing would block every drain of a node.
    let spare = spec.rollout.max_unavailable.max(1);
    let wanted = if spec.suspend { 0 } else { spec.replicas };
    let labels = labels::with_common(labels::of_workers(&valid.name), "swallow-worker");
    PodDisruptionBudget {
        metadata: meta(valid, labels::worker_name(&valid.name), labels),
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int((wanted - spare).max(0))),
            selector: Some(LabelSelector {
                match_labels: Some(labels::of_workers(&valid.name)),
                ..LabelSelector::default()
            }),
            // A group that does not serve yet protects nobody.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

pub(super) fn port(name: &str, number: u16) -> ServicePort {
    ServicePort {
        name: Some(name.into()),
        port: number.into(),
        target_port: Some(IntOrString::String(name.into())),
        app_protocol: (name == "grpc").then(|| "kubernetes.io/h2c".into()),
        ..ServicePort::default()
    }
}
