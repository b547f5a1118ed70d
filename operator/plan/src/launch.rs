//! How a group and a router are started: typed arguments and what surrounds them, the same for pods and processes.
//!
//! Paths and addresses are those inside a pod; who starts local processes puts its own in their place.

use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde_json::{Value, json};
use swallow_proto::launch::{
    DeviceKind, Dtype, FetchArgs, GenerationDefaults, HUGGING_FACE, Kernels, LoadFormat, LogFormat,
    PrefixCache, ProgressFormat, RouterArgs, WorkerArgs,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    Images, Timestamp, Valid,
    memory::BLOCK_TOKENS,
    model::{
        ConfigMapKey, Device, EngineDtype, EngineGenerationDefaults, EngineKernels, EngineLoadFormat,
        EnginePrefixCache, KeysSecret, Placement, Quantity, Resources, SecretKey, ServiceType,
        SwallowModelSpec,
    },
};

/// Where a worker in a pod listens for routers.
pub const WORKER_GRPC_PORT: u16 = 50061;
/// Where a worker in a pod serves probes, metrics and its state.
pub const WORKER_HTTP_PORT: u16 = 8061;
/// Where a router in a pod listens for gRPC clients.
pub const ROUTER_GRPC_PORT: u16 = 50051;
/// Where a router in a pod listens for OpenAI clients.
pub const ROUTER_HTTP_PORT: u16 = 8000;
/// Where the model's files are in a worker's pod.
pub const MODEL_FOLDER: &str = "/models";
/// Where a pod keeps files that it fetched; each model has a folder of its own below.
pub const CACHE_FOLDER: &str = "/cache";
/// The folder of a Secret with an access token.
pub const TOKEN_FOLDER: &str = "/etc/swallow/token";
/// Where a router in a pod answers probes.
pub const ROUTER_PROBE_PORT: u16 = 8081;
/// The folder of the Secret with the certificate that clients are shown.
pub const TLS_FOLDER: &str = "/etc/swallow/tls";
/// The folder of the Secret for TLS between router and worker, on either side.
pub const MUTUAL_TLS_FOLDER: &str = "/etc/swallow/mutual-tls";
/// The folder of the Secret with API keys.
pub const KEYS_FOLDER: &str = "/etc/swallow/keys";
/// The file in it.
pub const KEYS_FILE: &str = "keys.json";
/// Where a pod that fetches has the certificate authority.
pub const CA_FOLDER: &str = "/etc/swallow/ca";

/// A group to be started.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupLaunch {
    /// Its name, free among what was seen.
    pub name: String,
    /// Its number within the revision.
    pub index: u32,
    /// The revision that it is made from.
    pub revision: String,
    /// The failed group whose place it takes.
    pub replaces: Option<String>,
    /// Failures on record, to be kept with the group and shown as `SeenGroup::crashes`.
    pub crashes: Vec<Timestamp>,
    /// The model's retry annotation, to be kept with the group and shown as `SeenGroup::retry`.
    pub retry: Option<String>,
    /// What all groups of the revision have in common.
    pub template: GroupTemplate,
}

impl GroupLaunch {
    /// The worker's arguments: the template's with this group's name.
    pub fn args(&self) -> WorkerArgs {
        WorkerArgs {
            replica_id: self.name.clone(),
            ..self.template.args.clone()
        }
    }
}

/// What all groups of a revision have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupTemplate {
    /// The worker's arguments; `replica_id` is each group's own.
    pub args: WorkerArgs,
    /// Where the model's files come from.
    pub source: ModelSource,
    /// The worker's container image.
    pub image: String,
    /// GPUs of one group; zero on CPU.
    pub gpus: u32,
    /// CPU and memory, completed from the memory plan.
    pub resources: Resources,
    /// Which nodes.
    pub placement: Placement,
    /// Names of Secrets with registries' credentials.
    pub pull_secrets: Vec<String>,
    /// The Secret for TLS with routers.
    pub tls_secret: Option<String>,
}

/// Where the model's files come from, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// From nowhere: the worker makes a model of this size.
    Made {
        /// The text of a config.json.
        config: String,
    },
    /// A folder of the node.
    HostPath {
        /// Absolute.
        path: String,
    },
    /// A folder of a volume.
    Claim {
        /// The PersistentVolumeClaim.
        claim: String,
        /// Relative to the volume's root; empty for the root.
        path: String,
    },
    /// Fetched before the worker starts.
    Fetch {
        /// What is fetched.
        fetch: FetchLaunch,
        /// The Secret with the access token.
        token: Option<SecretKey>,
        /// The ConfigMap with the endpoint's certificate authority.
        ca: Option<ConfigMapKey>,
        /// What keeps the files.
        cache: CacheVolume,
    },
}

/// What keeps fetched files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheVolume {
    /// The pod's own folder.
    EmptyDir {
        /// Most bytes in it.
        size_limit: Option<Quantity>,
    },
    /// A volume that outlives pods.
    Claim {
        /// The PersistentVolumeClaim.
        claim: String,
    },
}

/// A repository at a pinned revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchLaunch {
    /// OWNER/NAME.
    pub repo: String,
    /// 40 hexadecimal digits.
    pub revision: String,
    /// Base URL, when not Hugging Face's own.
    pub endpoint: Option<String>,
}

impl FetchLaunch {
    /// The folder of these files inside a cache: no two revisions share one.
    pub fn folder(&self) -> String {
        format!("{}/{}", self.repo.replace('/', "--"), self.revision)
    }

    /// What the worker's program is started with to bring the files to `out`. It tells its progress on stdout.
    pub fn args(&self, out: impl Into<PathBuf>, token_file: Option<PathBuf>) -> FetchArgs {
        FetchArgs {
            repo: self.repo.clone(),
            revision: self.revision.clone(),
            endpoint: self.endpoint.clone().unwrap_or_else(|| HUGGING_FACE.to_owned()),
            out: out.into(),
            token_file,
            ca_file: None,
            progress: ProgressFormat::Json,
            http_listen: None,
        }
    }
}

/// A router to be started.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterLaunch {
    /// Its name; models of one namespace with the same name share it.
    pub name: String,
    /// The router's arguments. Who the replicas are is discovery's matter and filled in by whoever starts it.
    pub args: RouterArgs,
    /// Pods (or processes).
    pub replicas: i32,
    /// The router's container image.
    pub image: String,
    /// The ClusterRole that lets its pods read EndpointSlices.
    pub cluster_role: String,
    /// CPU and memory.
    pub resources: Resources,
    /// Who can reach its Service.
    pub service_type: ServiceType,
    /// Names of Secrets with registries' credentials.
    pub pull_secrets: Vec<String>,
    /// The entry of a Secret that holds API keys.
    pub api_keys: Option<KeysSecret>,
    /// The Secret with the certificate that clients are shown.
    pub tls_secret: Option<String>,
    /// The Secret for TLS with workers.
    pub worker_tls_secret: Option<String>,
}

/// A file in a folder.
fn file(folder: &str, name: &str) -> PathBuf {
    format!("{folder}/{name}").into()
}

/// What groups of this spec have in common.
pub fn group_template(valid: &Valid, images: &Images) -> GroupTemplate {
    let spec = &valid.spec;
    let engine = &spec.engine;
    let tls_secret = spec
        .router
        .mutual_tls
        .as_ref()
        .map(|tls| tls.worker_secret_name.clone());
    let of_tls = |name: &str| tls_secret.as_ref().map(|_| file(MUTUAL_TLS_FOLDER, name));
    let args = WorkerArgs {
        model: model_folder(&valid.source).into(),
        load_format: match engine.load_format {
            EngineLoadFormat::Safetensors => LoadFormat::Safetensors,
            EngineLoadFormat::Dummy => LoadFormat::Dummy,
        },
        served_names: valid.served_names.clone(),
        replica_id: String::new(),
        grpc_listen: anywhere(WORKER_GRPC_PORT),
        http_listen: anywhere(WORKER_HTTP_PORT),
        device: match spec.accelerator.device {
            Device::GPU => DeviceKind::Cuda,
            Device::CPU => DeviceKind::Cpu,
        },
        dtype: match engine.dtype {
            EngineDtype::Auto => Dtype::Auto,
            EngineDtype::FP32 => Dtype::Fp32,
            EngineDtype::BF16 => Dtype::Bf16,
        },
        kernels: match engine.kernels {
            EngineKernels::Auto => Kernels::Auto,
            EngineKernels::Portable => Kernels::Portable,
        },
        product_choices: None,
        debug_kernels: false,
        tensor_parallel: spec.parallelism.tensor,
        threads: valid.threads,
        max_model_len: engine.max_model_len,
        max_running: engine.max_concurrent_sequences,
        max_waiting: engine.max_concurrent_sequences,
        max_step_tokens: engine.max_step_tokens,
        inter_token_latency_target_ms: engine.inter_token_latency_target_ms,
        block_tokens: BLOCK_TOKENS,
        kv_bytes: valid.kv_bytes,
        device_memory_percent: None,
        prefix_cache: match engine.prefix_cache {
            EnginePrefixCache::Enabled => PrefixCache::On,
            EnginePrefixCache::Disabled => PrefixCache::Off,
        },
        generation_defaults: match engine.generation_defaults {
            EngineGenerationDefaults::Auto => GenerationDefaults::Auto,
            EngineGenerationDefaults::Neutral => GenerationDefaults::Neutral,
        },
        chat_template: engine.chat_template.clone(),
        step_timeout_seconds: spec.recovery.step_timeout_seconds,
        drain_timeout_seconds: spec.drain.timeout_seconds,
        tls_cert: of_tls("tls.crt"),
        tls_key: of_tls("tls.key"),
        tls_client_ca: of_tls("ca.crt"),
        termination_log: Some("/dev/termination-log".into()),
        log_format: LogFormat::Json,
    };
    GroupTemplate {
        args,
        source: valid.source.clone(),
        image: engine.image.clone().unwrap_or_else(|| images.worker.clone()),
        gpus: if spec.accelerator.device == Device::GPU {
            spec.parallelism.tensor
        } else {
            0
        },
        resources: worker_resources(valid),
        placement: spec.placement.clone(),
        pull_secrets: pull_secrets(spec),
        tls_secret,
    }
}

/// The name of the router that stands before a model; models of one namespace that name the same share it.
pub fn router_name(spec: &SwallowModelSpec, model: &str) -> String {
    spec.router
        .name
        .clone()
        .unwrap_or_else(|| format!("{model}-router"))
}

/// The router that stands before this model.
pub fn router(valid: &Valid, images: &Images) -> RouterLaunch {
    let router = &valid.spec.router;
    let mutual = router.mutual_tls.as_ref();
    let of_tls = |name: &str| router.tls_secret_name.as_ref().map(|_| file(TLS_FOLDER, name));
    let of_mutual = |name: &str| mutual.map(|_| file(MUTUAL_TLS_FOLDER, name));
    let args = RouterArgs {
        grpc_listen: anywhere(ROUTER_GRPC_PORT),
        http_listen: anywhere(ROUTER_HTTP_PORT),
        probe_listen: Some(anywhere(ROUTER_PROBE_PORT)),
        replicas: Vec::new(),
        discover: Vec::new(),
        namespace: None,
        max_queued_requests: router.limits.max_queued_requests,
        max_queued_tokens: router.limits.max_queued_tokens,
        max_queued_bytes: valid.max_queued_bytes,
        max_queue_seconds: router.limits.max_queue_seconds,
        max_body_bytes: ROUTER_BODY_BYTES_MAX,
        slow_client_seconds: None,
        tokenizer_info: false,
        max_connection_seconds: router.max_connection_seconds,
        connection_grace_seconds: router.connection_grace_seconds,
        tls_cert: of_tls("tls.crt"),
        tls_key: of_tls("tls.key"),
        worker_ca: of_mutual("ca.crt"),
        worker_cert: of_mutual("tls.crt"),
        worker_key: of_mutual("tls.key"),
        worker_tls_name: mutual.and_then(|tls| tls.server_name.clone()),
        api_keys: router
            .api_keys_secret_ref
            .as_ref()
            .map(|_| file(KEYS_FOLDER, KEYS_FILE)),
        shutdown_delay_seconds: ROUTER_SHUTDOWN_DELAY_SECONDS,
        drain_timeout_seconds: valid.spec.drain.timeout_seconds,
        log_format: LogFormat::Json,
    };
    RouterLaunch {
        name: router_name(&valid.spec, &valid.name),
        args,
        replicas: router.replicas,
        image: router.image.clone().unwrap_or_else(|| images.router.clone()),
        cluster_role: images.router_role.clone(),
        resources: router.resources.clone(),
        service_type: router.service_type,
        pull_secrets: pull_secrets(&valid.spec),
        api_keys: router.api_keys_secret_ref.clone(),
        tls_secret: router.tls_secret_name.clone(),
        worker_tls_secret: mutual.map(|tls| tls.router_secret_name.clone()),
    }
}

/// What every node's kube-proxy has to hear that a router's pod leaves; a new request in that time is still served.
const ROUTER_SHUTDOWN_DELAY_SECONDS: u32 = 5;
/// Largest request body or message: a prompt of a million tokens fits.
const ROUTER_BODY_BYTES_MAX: u32 = 8 << 20;

/// The name of the worker pods that this spec leads to: a short hash of the fields that change them.
///
/// Fields at their defaults are left out, so that a field added later changes no revision; images and sizes that the
/// operator chooses by itself are left out, so that a newer operator replaces no pod.
pub fn revision(spec: &SwallowModelSpec, kv_is_the_rest: bool) -> String {
    let mut fields = serde_json::to_value(spec).expect("a spec is plain data");
    let default = serde_json::to_value(defaults_of_groups()).expect("a spec is plain data");
    prune(&mut fields, &default);
    let mut kept = json!({});
    for path in [
        "engine",
        "parallelism",
        "accelerator",
        "resources",
        "placement",
        "imagePullSecrets",
        "drain",
    ] {
        kept[path] = fields[path].take();
    }
    for field in ["servedNames", "source", "cache"] {
        kept["model"][field] = fields["model"][field].take();
    }
    if kv_is_the_rest || spec.model.source.is_none() {
        // The size of the KV cache follows from the shape, and so does all of a model that is made.
        kept["model"]["shape"] = fields["model"]["shape"].take();
    }
    // Left out where it is not set, so that it changes no revision of before there was such a field.
    if let Some(secret) = spec.router.mutual_tls.as_ref().map(|tls| &tls.worker_secret_name) {
        kept["workerSecretName"] = json!(secret);
    }
    kept["recovery"]["stepTimeoutSeconds"] = fields["recovery"]["stepTimeoutSeconds"].take();
    name_of(xxh3_64(kept.to_string().as_bytes()))
}

/// A short name for rendered content, to see whether it differs from what was applied.
pub fn fingerprint(content: &Value) -> String {
    format!("{:016x}", xxh3_64(content.to_string().as_bytes()))
}

/// Letters and digits that spell no word and are not taken for one another.
const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
/// Letters of a revision's name: 387 million names, of which a model has a few at a time.
const REVISION_LETTERS: usize = 6;

fn name_of(mut hash: u64) -> String {
    let letters = LETTERS.len() as u64;
    (0..REVISION_LETTERS)
        .map(|_| {
            let letter = LETTERS[(hash % letters) as usize];
            hash /= letters;
            char::from(letter)
        })
        .collect()
}

/// A spec with every field at its default, as far as groups depend on it.
fn defaults_of_groups() -> Value {
    json!({
        "engine": crate::model::Engine::default(),
        "parallelism": crate::model::Parallelism::default(),
        "accelerator": crate::model::Accelerator::default(),
        "resources": Resources::default(),
        "placement": Placement::default(),
        "recovery": crate::model::Recovery::default(),
    })
}

/// Removes from `fields` what is as in `default`.
fn prune(fields: &mut Value, default: &Value) {
    let (Some(fields), Some(default)) = (fields.as_object_mut(), default.as_object()) else {
        return;
    };
    for (name, default) in default {
        match fields.get_mut(name) {
            Some(value) if value == default => {
                fields.shift_remove(name);
            }
            Some(value) => prune(value, default),
            None => {}
        }
    }
}

fn anywhere(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)
}

fn model_folder(source: &ModelSource) -> String {
    match source {
        ModelSource::Made { config } => config.clone(),
        ModelSource::HostPath { .. } => MODEL_FOLDER.into(),
        ModelSource::Claim { path, .. } if path.is_empty() => MODEL_FOLDER.into(),
        ModelSource::Claim { path, .. } => format!("{MODEL_FOLDER}/{path}"),
        ModelSource::Fetch { fetch, .. } => format!("{CACHE_FOLDER}/{}", fetch.folder()),
    }
}

/// On CPU the pod asks for the memory that is planned, unless the spec says otherwise.
fn worker_resources(valid: &Valid) -> Resources {
    let mut resources = valid.spec.resources.clone();
    let given = resources.requests.contains_key("memory") || resources.limits.contains_key("memory");
    if let (Device::CPU, false, Some(memory)) = (valid.spec.accelerator.device, given, &valid.memory) {
        resources
            .requests
            .insert("memory".into(), Quantity::from(memory.group_bytes()));
    }
    resources
}

fn pull_secrets(spec: &SwallowModelSpec) -> Vec<String> {
    spec.image_pull_secrets
        .iter()
        .map(|secret| secret.name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::read;

    fn spec(change: impl FnOnce(&mut Value)) -> SwallowModelSpec {
        let mut document = json!({
            "apiVersion": "serving.swallow.dev/v1alpha1",
            "kind": "SwallowModel",
            "metadata": { "name": "tiny" },
            "spec": {
                "model": { "source": { "type": "HostPath", "hostPath": { "path": "/models/tiny" } } },
                "accelerator": { "device": "CPU" },
            },
        });
        change(&mut document["spec"]);
        read(&document).expect("valid").spec
    }

    #[test]
    fn only_what_changes_pods_changes_the_revision() {
        let base = revision(&spec(|_| {}), false);
        assert_eq!(base.len(), REVISION_LETTERS);
        for same in [
            json!({ "replicas": 3 }),
            json!({ "suspend": true }),
            json!({ "rollout": { "maxSurge": 0 } }),
            json!({ "router": { "replicas": 2 } }),
            json!({ "recovery": { "maxRestarts": 1 } }),
            // Written out, but as by default.
            json!({ "engine": { "dtype": "Auto", "kvCache": {} } }),
        ] {
            let changed = spec(|spec| {
                spec.as_object_mut()
                    .expect("a mapping")
                    .extend(same.as_object().expect("one").clone())
            });
            assert_eq!(revision(&changed, false), base, "{same}");
        }
        for other in [
            json!({ "engine": { "maxStepTokens": 1024 } }),
            json!({ "engine": { "chatTemplate": "{{ messages }}" } }),
            json!({ "parallelism": { "tensor": 2 } }),
            json!({ "drain": { "timeoutSeconds": 5 } }),
            json!({ "recovery": { "stepTimeoutSeconds": 5 } }),
            json!({ "resources": { "limits": { "cpu": 2 } } }),
            json!({ "placement": { "nodeSelector": { "a": "b" } } }),
        ] {
            let changed = spec(|spec| {
                spec.as_object_mut()
                    .expect("a mapping")
                    .extend(other.as_object().expect("one").clone())
            });
            assert_ne!(revision(&changed, false), base, "{other}");
        }
    }

    #[test]
    fn fetched_files_of_two_revisions_never_mix() {
        let fetch = |revision: &str| FetchLaunch {
            repo: "owner/name".into(),
            revision: revision.repeat(40),
            endpoint: Some("http://mirror:8080/hf".into()),
        };
        assert_ne!(fetch("a").folder(), fetch("b").folder());
        assert_eq!(
            fetch("a").args("/cache/x", Some("/t".into())).argv(),
            [
                "fetch",
                "--repo=owner/name",
                &format!("--revision={}", "a".repeat(40)),
                "--endpoint=http://mirror:8080/hf",
                "--out=/cache/x",
                "--token-file=/t",
                "--progress=json",
            ]
        );
    }
}
