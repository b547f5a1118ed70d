//! The router: a Deployment, a Service and an account.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            Container, ContainerPort, HTTPGetAction, LocalObjectReference, PodSpec, PodTemplateSpec, Probe,
            Service, ServiceAccount, ServiceSpec, TCPSocketAction,
        },
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use swallow_proto::launch::{ReplicaAddress, RouterArgs};

use super::{
    GRACE_MARGIN_SECONDS, container_security, labels, meta, pod_security, requirements, surroundings::port,
};
use crate::{
    Valid,
    launch::{ROUTER_GRPC_PORT, ROUTER_HTTP_PORT, RouterLaunch},
    model::ServiceType,
};

/// The account of router pods.
pub(super) fn account(valid: &Valid, router: &RouterLaunch) -> ServiceAccount {
    ServiceAccount {
        metadata: router_meta(valid, router),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// The router's pods, sending to `replicas`.
pub fn deployment(valid: &Valid, router: &RouterLaunch, replicas: &[ReplicaAddress]) -> Deployment {
    let args = RouterArgs {
        replicas: replicas.to_vec(),
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
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(pod_security()),
        termination_grace_period_seconds: Some((args.drain_timeout_seconds + GRACE_MARGIN_SECONDS).into()),
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
