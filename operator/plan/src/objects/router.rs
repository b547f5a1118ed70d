//! The router: a Deployment, a Service, and an account that may read in which pods its models' groups are.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            Container, ContainerPort, HTTPGetAction, LocalObjectReference, PodSpec, PodTemplateSpec, Probe,
            Service, ServiceAccount, ServiceSpec, Volume, VolumeMount,
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
    GRACE_MARGIN_SECONDS, container_security, labels, meta,
    pod::{read_only, secret_volume},
    pod_security, requirements,
    surroundings::port,
};
use crate::{
    Valid,
    launch::{
        KEYS_FILE, KEYS_FOLDER, MUTUAL_TLS_FOLDER, ROUTER_GRPC_PORT, ROUTER_HTTP_PORT, ROUTER_PROBE_PORT,
        RouterLaunch, TLS_FOLDER,
    },
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

/// Its Secrets, as folders: a change of one arrives in the running pod.
fn secrets(router: &RouterLaunch) -> (Vec<Volume>, Vec<VolumeMount>) {
    let keys = router.api_keys.as_ref();
    let keys = keys.map(|secret| ("keys", &secret.name, Some((&*secret.key, KEYS_FILE)), KEYS_FOLDER));
    let tls = router.tls_secret.as_ref();
    let tls = tls.map(|secret| ("tls", secret, None, TLS_FOLDER));
    let mutual = router.worker_tls_secret.as_ref();
    let mutual = mutual.map(|secret| ("mutual-tls", secret, None, MUTUAL_TLS_FOLDER));
    [keys, tls, mutual]
        .into_iter()
        .flatten()
        .map(|(name, secret, item, folder)| (secret_volume(name, secret, item), read_only(name, folder)))
        .unzip()
}

fn pod_spec(router: &RouterLaunch, args: &RouterArgs) -> PodSpec {
    let secrets: Vec<_> = router
        .pull_secrets
        .iter()
        .map(|name| LocalObjectReference { name: name.clone() })
        .collect();
    let (volumes, mounts) = self::secrets(router);
    PodSpec {
        volumes: (!volumes.is_empty()).then_some(volumes),
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
                container_port("probe", ROUTER_PROBE_PORT),
            ]),
            resources: Some(requirements(&router.resources, 0)),
            volume_mounts: (!mounts.is_empty()).then_some(mounts),
            security_context: Some(container_security()),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            readiness_probe: Some(readiness("probe")),
            // Threads of its own answer whenever the process runs at all; what it can serve is readiness.
            liveness_probe: Some(Probe {
                http_get: Some(HTTPGetAction {
                    path: Some("/health".into()),
                    port: IntOrString::String("probe".into()),
                    ..HTTPGetAction::default()
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

/// Ready means: `/readyz` at the port of that name says so, asked every two seconds.
pub(super) fn readiness(port: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/readyz".into()),
            port: IntOrString::String(port.into()),
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{
        Images, Valid, launch,
        model::read,
        objects::{plain, pod},
        validate,
    };

    fn valid(router: &Value) -> Valid {
        let model = read(&json!({
            "apiVersion": "serving.swallow.dev/v1alpha1", "kind": "SwallowModel", "metadata": { "name": "m" },
            "spec": {
                "model": { "source": { "type": "HostPath", "hostPath": { "path": "/m" } } },
                "accelerator": { "device": "CPU" },
                "router": router,
            },
        }))
        .expect("it can be read");
        validate(&model, None).expect("it is valid")
    }

    fn revision(router: &Value) -> String {
        valid(router).revision
    }

    /// The pods of a router and of a group.
    fn rendered(router: &Value) -> (Value, Value) {
        let valid = valid(router);
        let images = Images::default();
        let router = launch::router(&valid, &images);
        let group = launch::GroupLaunch {
            name: "m-0".into(),
            index: 0,
            revision: valid.revision.clone(),
            replaces: None,
            crashes: Vec::new(),
            retry: None,
            template: launch::group_template(&valid, &images),
        };
        let deployment = plain(&super::deployment(&valid, &router, &[]));
        (
            deployment["spec"]["template"]["spec"].clone(),
            plain(&pod(&valid, &group))["spec"].clone(),
        )
    }

    fn args(pod: &Value) -> Vec<&str> {
        let args = pod["containers"][0]["args"].as_array().expect("arguments");
        args.iter().filter_map(Value::as_str).collect()
    }

    /// Folder and Secret of each volume that is one.
    fn secrets(pod: &Value) -> Vec<(&str, &str)> {
        let mounts = pod["containers"][0]["volumeMounts"].as_array();
        let volumes = pod["volumes"].as_array();
        let secret = |name: &Value| {
            let volume = volumes?.iter().find(|volume| volume["name"] == *name)?;
            volume["secret"]["secretName"].as_str()
        };
        mounts
            .into_iter()
            .flatten()
            .filter_map(|mount| Some((mount["mountPath"].as_str()?, secret(&mount["name"])?)))
            .collect()
    }

    #[test]
    fn secrets_reach_the_pods_as_files_that_the_flags_name() {
        let (router, worker) = rendered(&json!({
            "apiKeysSecretRef": { "name": "keys", "key": "tenants.json" },
            "tlsSecretName": "front",
            "mutualTls": { "workerSecretName": "of-workers", "routerSecretName": "of-routers", "serverName": "w.team" },
            "maxConnectionSeconds": 0,
            "connectionGraceSeconds": 60,
        }));
        for flag in [
            "--probe-listen=0.0.0.0:8081",
            "--api-keys=/etc/swallow/keys/keys.json",
            "--tls-cert=/etc/swallow/tls/tls.crt",
            "--tls-key=/etc/swallow/tls/tls.key",
            "--worker-ca=/etc/swallow/mutual-tls/ca.crt",
            "--worker-cert=/etc/swallow/mutual-tls/tls.crt",
            "--worker-key=/etc/swallow/mutual-tls/tls.key",
            "--worker-tls-name=w.team",
            "--max-connection-seconds=0",
            "--connection-grace-seconds=60",
        ] {
            assert!(args(&router).contains(&flag), "{flag} in {:?}", args(&router));
        }
        assert_eq!(
            secrets(&router),
            [
                ("/etc/swallow/keys", "keys"),
                ("/etc/swallow/tls", "front"),
                ("/etc/swallow/mutual-tls", "of-routers")
            ]
        );
        // The port that probes and the chart's PodMonitor name speaks no TLS, whatever clients do.
        let probe = json!({ "name": "probe", "containerPort": 8081 });
        let container = &router["containers"][0];
        assert!(
            container["ports"]
                .as_array()
                .is_some_and(|ports| ports.contains(&probe))
        );
        for kind in ["readinessProbe", "livenessProbe"] {
            assert_eq!(container[kind]["httpGet"]["port"], "probe");
            assert_eq!(container[kind]["httpGet"]["scheme"], Value::Null);
        }
        assert_eq!(
            router["volumes"][0]["secret"]["items"],
            json!([{ "key": "tenants.json", "path": "keys.json" }])
        );
        for flag in [
            "--tls-cert=/etc/swallow/mutual-tls/tls.crt",
            "--tls-key=/etc/swallow/mutual-tls/tls.key",
            "--tls-client-ca=/etc/swallow/mutual-tls/ca.crt",
        ] {
            assert!(args(&worker).contains(&flag), "{flag} in {:?}", args(&worker));
        }
        assert_eq!(secrets(&worker), [("/etc/swallow/mutual-tls", "of-workers")]);
    }

    #[test]
    fn without_secrets_nothing_is_mounted() {
        let (router, worker) = rendered(&json!({}));
        assert_eq!((&router["volumes"], secrets(&worker)), (&Value::Null, Vec::new()));
        let tls = |args: Vec<&str>| args.iter().any(|arg| arg.contains("tls") || arg.contains("ca="));
        assert!(!tls(args(&router)) && !tls(args(&worker)));
    }

    #[test]
    fn only_the_workers_secret_makes_a_new_revision() {
        let tls = |worker: &str, router: &str| {
            let router = json!({ "mutualTls": { "workerSecretName": worker, "routerSecretName": router } });
            revision(&router)
        };
        assert_eq!(
            tls("w", "r"),
            tls("w", "other"),
            "the router's does not reach workers"
        );
        assert_ne!(tls("w", "r"), tls("other", "r"));
        assert_ne!(tls("w", "r"), revision(&json!({})));
        let times = json!({ "maxConnectionSeconds": 60, "tlsSecretName": "front" });
        assert_eq!(revision(&times), revision(&json!({})));
    }
}
