//! The pod of one tensor-parallel group.

use std::{collections::BTreeMap, net::Ipv4Addr};

use k8s_openapi::{
    api::core::v1::{
        Affinity, ConfigMapVolumeSource, Container, EmptyDirVolumeSource, HostPathVolumeSource, KeyToPath,
        LocalObjectReference, PersistentVolumeClaimVolumeSource, Pod, PodAffinityTerm, PodAntiAffinity,
        PodSpec, SecretVolumeSource, Toleration as KubeToleration, Volume, VolumeMount,
        WeightedPodAffinityTerm,
    },
    apimachinery::pkg::{api::resource::Quantity as KubeQuantity, apis::meta::v1::LabelSelector},
};
use serde_json::Value;
use swallow_proto::launch::FetchArgs;

use super::{
    GRACE_MARGIN_SECONDS, container_security, labels, meta, plain, pod_security, requirements,
    router::{container_port, readiness},
};
use crate::{
    RETRY_ANNOTATION, Valid,
    launch::{
        CA_FOLDER, CACHE_FOLDER, CacheVolume, FetchLaunch, GroupLaunch, GroupTemplate, MODEL_FOLDER,
        MUTUAL_TLS_FOLDER, ModelSource, TOKEN_FOLDER, WORKER_GRPC_PORT, WORKER_HTTP_PORT,
    },
    model::{ConfigMapKey, SecretKey, Spread, Toleration, TolerationEffect, TolerationOperator},
};

/// How long a group stays with a node that is not ready or does not answer, in seconds.
const NODE_PATIENCE_SECONDS: i64 = 30;
/// Shared memory of ranks that are processes' threads on several GPUs; NCCL uses a few MiB a pair.
const SHARED_MEMORY: &str = "1Gi";

/// The pod of a group.
pub fn pod(valid: &Valid, group: &GroupLaunch) -> Pod {
    let mut labels = labels::with_common(labels::of_workers(&valid.name), "swallow-worker");
    labels.insert(labels::REVISION.into(), group.revision.clone());
    labels.insert(labels::INDEX.into(), group.index.to_string());
    let mut metadata = meta(valid, &group.name, labels);
    let notes = annotations(group);
    metadata.annotations = (!notes.is_empty()).then_some(notes);
    Pod {
        metadata,
        spec: Some(pod_spec(valid, group)),
        ..Pod::default()
    }
}

/// Stands in a record for the name of the group; no name of ours has capitals.
const NAME: &str = "GROUP-NAME";

/// How the groups of a revision are rendered, to be kept: a newer operator then makes further ones the same.
pub fn record(valid: &Valid, group: &GroupLaunch) -> Value {
    let anybody = GroupLaunch {
        name: NAME.to_owned(),
        index: 0,
        crashes: Vec::new(),
        retry: None,
        replaces: None,
        ..group.clone()
    };
    plain(&pod(valid, &anybody))
}

/// The record of a revision holds no pod.
#[derive(Debug, thiserror::Error)]
#[error(
    "the record of revision {revision} holds no pod ({source}): delete the ControllerRevision, and the next group makes a new one"
)]
pub struct Unusable {
    revision: String,
    source: serde_json::Error,
}

/// The pod of a group, rendered as its revision's record says.
///
/// # Errors
/// The record is not one.
pub fn from_record(record: &Value, group: &GroupLaunch) -> Result<Pod, Unusable> {
    let mut named = record.clone();
    rename(&mut named, &group.name);
    let mut pod: Pod = serde_json::from_value(named).map_err(|source| Unusable {
        revision: group.revision.clone(),
        source,
    })?;
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(labels::INDEX.into(), group.index.to_string());
    let notes = annotations(group);
    pod.metadata.annotations = (!notes.is_empty()).then_some(notes);
    Ok(pod)
}

fn rename(value: &mut Value, name: &str) {
    match value {
        Value::String(text) if text.contains(NAME) => *text = text.replace(NAME, name),
        Value::Array(items) => items.iter_mut().for_each(|item| rename(item, name)),
        Value::Object(fields) => fields.values_mut().for_each(|field| rename(field, name)),
        _ => {}
    }
}

fn annotations(group: &GroupLaunch) -> BTreeMap<String, String> {
    let mut notes = BTreeMap::new();
    if !group.crashes.is_empty() {
        let crashes: Vec<String> = group.crashes.iter().map(ToString::to_string).collect();
        notes.insert(labels::CRASHES.to_owned(), crashes.join(","));
    }
    if let Some(retry) = &group.retry {
        notes.insert(RETRY_ANNOTATION.to_owned(), retry.clone());
    }
    notes
}

fn pod_spec(valid: &Valid, group: &GroupLaunch) -> PodSpec {
    let GroupTemplate {
        args,
        image,
        gpus,
        resources,
        placement,
        pull_secrets,
        tls_secret,
        ..
    } = &group.template;
    let (mut volumes, mut mounts, fetch) = files(&group.template);
    if let Some(secret) = tls_secret {
        volumes.push(secret_volume("mutual-tls", secret, None));
        mounts.push(read_only("mutual-tls", MUTUAL_TLS_FOLDER));
    }
    let mut folder = |name: &str, path: &str, source: EmptyDirVolumeSource| {
        volumes.push(Volume {
            name: name.into(),
            empty_dir: Some(source),
            ..Volume::default()
        });
        mounts.push(mount(name, path));
    };
    // The root file system is read-only.
    folder("tmp", "/tmp", EmptyDirVolumeSource::default());
    if args.tensor_parallel > 1 {
        let size_limit = Some(KubeQuantity(SHARED_MEMORY.into()));
        folder(
            "shm",
            "/dev/shm",
            EmptyDirVolumeSource {
                medium: Some("Memory".into()),
                size_limit,
            },
        );
    }
    let secrets: Vec<_> = pull_secrets
        .iter()
        .map(|name| LocalObjectReference { name: name.clone() })
        .collect();
    PodSpec {
        hostname: Some(group.name.clone()),
        subdomain: Some(labels::worker_name(&valid.name)),
        // A group that ended is judged by the plan, which starts another pod in its place.
        restart_policy: Some("Never".into()),
        service_account_name: Some(labels::worker_name(&valid.name)),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        security_context: Some(pod_security()),
        termination_grace_period_seconds: Some((args.drain_timeout_seconds + GRACE_MARGIN_SECONDS).into()),
        image_pull_secrets: (!secrets.is_empty()).then_some(secrets),
        node_selector: (!placement.node_selector.is_empty()).then(|| placement.node_selector.clone()),
        tolerations: Some(tolerations(&placement.tolerations)),
        priority_class_name: placement.priority_class_name.clone(),
        runtime_class_name: placement.runtime_class_name.clone(),
        affinity: (placement.spread == Spread::PreferDifferentNodes).then(|| apart(&valid.name)),
        init_containers: fetch.map(|container| vec![container]),
        containers: vec![Container {
            name: "worker".into(),
            image: Some(image.clone()),
            command: Some(vec!["swallow-worker".into()]),
            args: Some(group.args().argv().iter().map(|arg| literal(arg)).collect()),
            ports: Some(vec![
                container_port("grpc", WORKER_GRPC_PORT),
                container_port("http", WORKER_HTTP_PORT),
            ]),
            resources: Some(requirements(resources, *gpus)),
            security_context: Some(container_security()),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            readiness_probe: Some(readiness("http")),
            volume_mounts: Some(mounts),
            ..Container::default()
        }],
        volumes: Some(volumes),
        ..PodSpec::default()
    }
}

/// An argument as it is: Kubernetes would put the value of a variable for `$(NAME)`, and one dollar for two.
fn literal(arg: &str) -> String {
    arg.replace('$', "$$")
}

/// The model's files: volumes, the worker's mounts, and the container that fetches them, if one has to.
fn files(template: &GroupTemplate) -> (Vec<Volume>, Vec<VolumeMount>, Option<Container>) {
    match &template.source {
        ModelSource::Made { .. } => (Vec::new(), Vec::new(), None),
        ModelSource::HostPath { path } => {
            let source = HostPathVolumeSource {
                path: path.clone(),
                type_: Some("Directory".into()),
            };
            let volume = Volume {
                name: "model".into(),
                host_path: Some(source),
                ..Volume::default()
            };
            (vec![volume], vec![read_only("model", MODEL_FOLDER)], None)
        }
        ModelSource::Claim { claim, .. } => (
            vec![claim_volume("model", claim, true)],
            vec![read_only("model", MODEL_FOLDER)],
            None,
        ),
        ModelSource::Fetch {
            fetch,
            token,
            ca,
            cache,
        } => {
            let cache = match cache {
                CacheVolume::Claim { claim } => claim_volume("cache", claim, false),
                CacheVolume::EmptyDir { size_limit } => {
                    let size_limit = size_limit.as_ref().map(|size| KubeQuantity(size.to_string()));
                    let source = EmptyDirVolumeSource {
                        medium: None,
                        size_limit,
                    };
                    Volume {
                        name: "cache".into(),
                        empty_dir: Some(source),
                        ..Volume::default()
                    }
                }
            };
            let mut volumes = vec![cache];
            volumes.extend(token.as_ref().map(token_volume));
            volumes.extend(ca.as_ref().map(ca_volume));
            let container = fetcher(&template.image, fetch, token.is_some(), ca.is_some());
            (volumes, vec![read_only("cache", CACHE_FOLDER)], Some(container))
        }
    }
}

fn fetcher(image: &str, fetch: &FetchLaunch, with_token: bool, with_ca: bool) -> Container {
    let mut mounts = vec![mount("cache", CACHE_FOLDER), mount("tmp", "/tmp")];
    if with_token {
        mounts.push(read_only("token", TOKEN_FOLDER));
    }
    if with_ca {
        mounts.push(read_only("ca", CA_FOLDER));
    }
    let token_file = with_token.then(|| format!("{TOKEN_FOLDER}/token"));
    Container {
        name: "fetch".into(),
        image: Some(image.to_owned()),
        command: Some(vec!["swallow-worker".into()]),
        args: Some(
            FetchArgs {
                // The worker's port: the worker starts when this has ended.
                http_listen: Some((Ipv4Addr::UNSPECIFIED, WORKER_HTTP_PORT).into()),
                ca_file: with_ca.then(|| format!("{CA_FOLDER}/ca.pem").into()),
                ..fetch.args(
                    format!("{CACHE_FOLDER}/{}", fetch.folder()),
                    token_file.map(Into::into),
                )
            }
            .argv(),
        ),
        security_context: Some(container_security()),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

fn claim_volume(name: &str, claim: &str, read_only: bool) -> Volume {
    let source = PersistentVolumeClaimVolumeSource {
        claim_name: claim.to_owned(),
        read_only: Some(read_only),
    };
    Volume {
        name: name.into(),
        persistent_volume_claim: Some(source),
        ..Volume::default()
    }
}

fn ca_volume(ca: &ConfigMapKey) -> Volume {
    let item = KeyToPath {
        key: ca.key.clone(),
        path: "ca.pem".into(),
        mode: None,
    };
    let source = ConfigMapVolumeSource {
        name: ca.name.clone(),
        items: Some(vec![item]),
        default_mode: Some(0o444),
        optional: Some(false),
    };
    Volume {
        name: "ca".into(),
        config_map: Some(source),
        ..Volume::default()
    }
}

fn token_volume(token: &SecretKey) -> Volume {
    secret_volume("token", &token.name, Some((&token.key, "token")))
}

/// A Secret as a folder: of one entry as a file of that name, or of all.
pub(super) fn secret_volume(name: &str, secret: &str, item: Option<(&str, &str)>) -> Volume {
    let items = item.map(|(key, path)| {
        vec![KeyToPath {
            key: key.to_owned(),
            path: path.to_owned(),
            mode: None,
        }]
    });
    let source = SecretVolumeSource {
        secret_name: Some(secret.to_owned()),
        items,
        default_mode: Some(0o440),
        optional: Some(false),
    };
    Volume {
        name: name.into(),
        secret: Some(source),
        ..Volume::default()
    }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        ..VolumeMount::default()
    }
}

pub(super) fn read_only(name: &str, path: &str) -> VolumeMount {
    VolumeMount {
        read_only: Some(true),
        ..mount(name, path)
    }
}

/// The spec's tolerations, and a short patience with nodes in trouble: the default of five minutes is long for a group.
fn tolerations(given: &[Toleration]) -> Vec<KubeToleration> {
    let patience =
        ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"].map(|key| KubeToleration {
            key: Some(key.into()),
            operator: Some("Exists".into()),
            effect: Some("NoExecute".into()),
            toleration_seconds: Some(NODE_PATIENCE_SECONDS),
            value: None,
        });
    given.iter().map(toleration).chain(patience).collect()
}

fn toleration(given: &Toleration) -> KubeToleration {
    let operator = match given.operator {
        TolerationOperator::Equal => "Equal",
        TolerationOperator::Exists => "Exists",
    };
    let effect = given.effect.map(|effect| match effect {
        TolerationEffect::NoSchedule => "NoSchedule",
        TolerationEffect::PreferNoSchedule => "PreferNoSchedule",
        TolerationEffect::NoExecute => "NoExecute",
    });
    KubeToleration {
        key: given.key.clone(),
        operator: Some(operator.into()),
        value: given.value.clone(),
        effect: effect.map(str::to_owned),
        toleration_seconds: None,
    }
}

/// Groups of one model on different nodes, while there are enough.
fn apart(model: &str) -> Affinity {
    Affinity {
        pod_anti_affinity: Some(PodAntiAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![WeightedPodAffinityTerm {
                weight: 100,
                pod_affinity_term: PodAffinityTerm {
                    label_selector: Some(LabelSelector {
                        match_labels: Some(labels::of_workers(model)),
                        ..LabelSelector::default()
                    }),
                    topology_key: "kubernetes.io/hostname".into(),
                    ..PodAffinityTerm::default()
                },
            }]),
            ..PodAntiAffinity::default()
        }),
        ..Affinity::default()
    }
}
