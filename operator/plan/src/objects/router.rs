//! The router: a Deployment, a Service, and an account that may read in which pods its models' groups are.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            Container, ContainerPort, HTTPGetAction, LocalObjectReference, PodSpec, PodTemplateSpec, Probe,
            Service, ServiceAccount, ServiceSpec, TCPSocketAction,
        },
        rbac::v1::{RoleBinding, RoleRef, Subject},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use swallow_proto::launch::{DiscoverTarget, GRPC_PORT_NAME, RouterArgs};

use super::{
    GRACE_MARGIN_SECONDS, container_security, labels, meta, pod_security, requirements, surroundings::port,
};
use crate::{
    Valid,
    launch::{ROUTER_GRPC_PORT, ROUTER_HTTP_PORT, RouterLaunch},
    model::ServiceType,
};

/// The account of router pods. Its token is mounted where the pod asks for it, and nowhere else.
pub(super) fn account(valid: &Valid, router: &RouterLaunch) -> ServiceAccount {
    ServiceAccount {
        metadata: router_meta(valid, router),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// Lets the router's account read the EndpointSlices of its namespace.
pub(super) fn role_binding(valid: &Valid, router: &RouterLaunch) -> RoleBinding {
    RoleBinding {
        metadata: router_meta(valid, router),
        role_ref: RoleRef {
            api_group: "rbac.authorization.k8s.io".into(),
            kind: "ClusterRole".into(),
            name: router.cluster_role.clone(),
        },
        subjects: Some(vec![Subject {
            kind: "ServiceAccount".into(),
            name: router.name.clone(),
            namespace: Some(valid.namespace.clone()),
            api_group: None,
        }]),
    }
}

/// How a router finds the groups of a model: by the headless service that they share.
pub fn discover_target(valid: &Valid) -> DiscoverTarget {
    DiscoverTarget {
        served_names: valid.served_names.clone(),
        service: labels::worker_name(&valid.name),
        port_name: GRPC_PORT_NAME.to_owned(),
    }
}

/// The router's pods, before the models of `targets`.
pub fn deployment(valid: &Valid, router: &RouterLaunch, targets: &[DiscoverTarget]) -> Deployment {
    let args = RouterArgs {
        discover: targets.to_vec(),
        ..router.args.clone()
    };
    let selector = labels::of_router(&router.name);
    Deployment {
        metadata: router_meta(valid, router),
        spec: Some(DeploymentSpec {
            replicas: Some(router.replicas),
            selector: LabelSelector {
                match_labels: Some(selector.clone()),
                ..LabelSelector::default()
            },
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(1)),
                    max_unavailable: Some(IntOrString::Int(0)),
                }),
            }),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels::with_common(selector, "swallow-router")),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod_spec(router, &args)),
            },
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

/// The address of clients.
pub fn service(valid: &Valid, router: &RouterLaunch) -> Service {
    let type_ = match router.service_type {
        ServiceType::ClusterIP => "ClusterIP",
        ServiceType::NodePort => "NodePort",
        ServiceType::LoadBalancer => "LoadBalancer",
    };
    Service {
        metadata: router_meta(valid, router),
        spec: Some(ServiceSpec {
            type_: Some(type_.into()),
            selector: Some(labels::of_router(&router.name)),
            ports: Some(vec![
                port("grpc", ROUTER_GRPC_PORT),
                port("http", ROUTER_HTTP_PORT),
            ]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn router_meta(valid: &Valid, router: &RouterLaunch) -> ObjectMeta {
    meta(
        valid,
        &router.name,
        labels::with_common(labels::of_router(&router.name), "swallow-router"),
    )
}

fn pod_spec(router: &RouterLaunch, args: &RouterArgs) -> PodSpec {
    let secrets: Vec<_> = router
        .pull_secrets
        .iter()
        .map(|name| LocalObjectReference { name: name.clone() })
        .collect();
    PodSpec {
        service_account_name: Some(router.name.clone()),
        automount_service_account_token: Some(true),
        enable_service_links: Some(false),
        security_context: Some(pod_security()),
        termination_grace_period_seconds: Some(grace_seconds(args)),
        image_pull_secrets: (!secrets.is_empty()).then_some(secrets),
        containers: vec![Container {
            name: "router".into(),
            image: Some(router.image.clone()),
            command: Some(vec!["swallow-router".into()]),
            args: Some(args.argv()),
            ports: Some(vec![
                container_port("grpc", ROUTER_GRPC_PORT),
                container_port("http", ROUTER_HTTP_PORT),
            ]),
            resources: Some(requirements(&router.resources, 0)),
            security_context: Some(container_security()),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            readiness_probe: Some(readiness()),
            // It answers whenever the process runs at all; what it can serve is readiness.
            liveness_probe: Some(Probe {
                tcp_socket: Some(TCPSocketAction {
                    port: IntOrString::String("http".into()),
                    host: None,
                }),
                period_seconds: Some(10),
                failure_threshold: Some(6),
                ..Probe::default()
            }),
            ..Container::default()
        }],
        ..PodSpec::default()
    }
}

/// What a router's pod may take to end.
fn grace_seconds(args: &RouterArgs) -> i64 {
    i64::from(args.shutdown_delay_seconds)
        + i64::from(args.drain_timeout_seconds)
        + i64::from(GRACE_MARGIN_SECONDS)
}

/// Ready means: `/readyz` says so, asked every two seconds.
pub(super) fn readiness() -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/readyz".into()),
            port: IntOrString::String("http".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(2),
        timeout_seconds: Some(2),
        failure_threshold: Some(2),
        ..Probe::default()
    }
}

pub(super) fn container_port(name: &str, number: u16) -> ContainerPort {
    ContainerPort {
        name: Some(name.into()),
        container_port: number.into(),
        ..ContainerPort::default()
    }
}
