//! How groups come, go and come back, and how clients reach them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Resources;

/// How groups are replaced when the spec changes. Changing these fields replaces nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Rollout {
    /// maxSurge is how many groups may exist above replicas while groups are replaced, 0 to 256. Defaults
    /// to 1. Zero drains a group before its successor starts, and needs no spare devices. Not zero together
    /// with maxUnavailable.
    #[schemars(range(min = 0, max = 256))]
    pub max_surge: i32,
    /// maxUnavailable is by how many the serving groups may fall below replicas because of a rollout, 0
    /// to 256. Defaults to 1. It is used only when a surge is not possible: maxSurge is zero, or the cluster
    /// has no room for the extra group. Zero waits for room instead. Not zero together with maxSurge.
    #[schemars(range(min = 0, max = 256))]
    pub max_unavailable: i32,
    /// startupProgressTimeoutSeconds is how long a starting group may stand still, with no further byte
    /// fetched or loaded, before it counts as failed and is replaced, 10 to 86400. Defaults to 300. There
    /// is no limit on the whole start: a loader that makes progress is never killed.
    #[schemars(range(min = 10, max = 86400))]
    pub startup_progress_timeout_seconds: u32,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            max_surge: 1,
            max_unavailable: 1,
            startup_progress_timeout_seconds: 300,
        }
    }
}

/// How long open streams may finish.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Drain {
    /// timeoutSeconds is how long open streams may go on after their group was told to stop, 1 to 86400;
    /// the router sends it nothing new meanwhile. Streams that are still open then end with UNAVAILABLE.
    /// Defaults to 300. A change makes a new revision.
    #[schemars(range(min = 1, max = 86400))]
    pub timeout_seconds: u32,
}

impl Default for Drain {
    fn default() -> Self {
        Self { timeout_seconds: 300 }
    }
}

/// How a group that ended is started again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Recovery {
    /// maxRestarts is how often a group may be started again within windowSeconds, 0 to 100. One more
    /// failure quarantines it: it stays down, status says why, and nothing loops until the spec changes or
    /// the annotation serving.swallow.dev/retry gets a new value. Defaults to 5.
    #[schemars(range(min = 0, max = 100))]
    pub max_restarts: u32,
    /// windowSeconds is the time within which failures are counted together, 1 to 604800. Defaults to 1800.
    #[schemars(range(min = 1, max = 604800))]
    pub window_seconds: u32,
    /// backoff says how long to wait before a group is started again.
    pub backoff: Backoff,
    /// stepTimeoutSeconds is how long one step of the engine may take before the worker ends itself, naming
    /// rank and step, 1 to 86400. Defaults to 300. It frees a group that hangs. A change makes a new
    /// revision.
    #[schemars(range(min = 1, max = 86400))]
    pub step_timeout_seconds: u32,
}

impl Default for Recovery {
    fn default() -> Self {
        Self {
            max_restarts: 5,
            window_seconds: 1800,
            backoff: Backoff::default(),
            step_timeout_seconds: 300,
        }
    }
}

/// How long to wait before a group is started again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Backoff {
    /// initialSeconds is the wait after the first failure in the window; each further one doubles it, 0
    /// to 86400. Defaults to 1.
    #[schemars(range(min = 0, max = 86400))]
    pub initial_seconds: u32,
    /// maxSeconds is the longest wait, 0 to 86400. Defaults to 300. At least initialSeconds.
    #[schemars(range(min = 0, max = 86400))]
    pub max_seconds: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            initial_seconds: 1,
            max_seconds: 300,
        }
    }
}

/// Who can reach the router's Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    /// The cluster's pods.
    #[default]
    ClusterIP,
    /// Whoever reaches a node.
    NodePort,
    /// Whoever reaches the cloud's load balancer.
    LoadBalancer,
}

/// How clients reach the model. Changing these fields replaces no group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Router {
    /// name names the router's Deployment and Service. Models of one namespace that give the same name
    /// share one router and must agree on its settings; a request's `model` chooses among them. Defaults to
    /// metadata.name with -router: a router of its own. Immutable, because clients know the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 50))]
    pub name: Option<String>,
    /// replicas is how many router pods share the load, 1 to 64. Defaults to 1.
    #[schemars(range(min = 1, max = 64))]
    pub replicas: i32,
    /// limits says how many requests may wait for a group, and how long.
    pub limits: RouterLimits,
    /// apiKeysSecretRef names the Secret that holds the file of API keys, in the form that swallow-router's
    /// --api-keys reads; clients without one of them are refused. It is read again when it changes. Defaults
    /// to none: nobody is told apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_keys_secret_ref: Option<KeysSecret>,
    /// tlsSecretName is the Secret with the certificate that clients are shown on both ports, as tls.crt
    /// and tls.key; it is read again when it changes, under running streams. Defaults to none: clients speak
    /// no TLS. Probes and scrapes do not either way: /metrics is at the pods' probe port, 8081, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub tls_secret_name: Option<String>,
    /// mutualTls secures what routers and workers say to each other. Defaults to none: they speak no TLS,
    /// and a network policy has to keep others away. A change of workerSecretName makes a new revision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mutual_tls: Option<MutualTls>,
    /// maxConnectionSeconds is the age, a tenth more or less, at which a client is told to open a new
    /// connection, so that load spreads over routers that came later, 0 to 604800; 0 is never. Defaults to
    /// 1800.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604800))]
    pub max_connection_seconds: Option<u32>,
    /// connectionGraceSeconds is how long streams on a connection of that age may go on, 0 to 604800.
    /// Defaults to 1800.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604800))]
    pub connection_grace_seconds: Option<u32>,
    /// serviceType says who can reach the router's Service: ClusterIP, NodePort or LoadBalancer. Defaults
    /// to ClusterIP: pods of the cluster.
    pub service_type: ServiceType,
    /// resources are the CPU and memory that each router pod asks for. Defaults to none.
    pub resources: Resources,
    /// image is the router's container image, with a tag or a digest. Defaults to the image that the
    /// operator came with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
}

impl Default for Router {
    fn default() -> Self {
        Self {
            name: None,
            replicas: 1,
            limits: RouterLimits::default(),
            api_keys_secret_ref: None,
            tls_secret_name: None,
            mutual_tls: None,
            max_connection_seconds: None,
            connection_grace_seconds: None,
            service_type: ServiceType::default(),
            resources: Resources::default(),
            image: None,
        }
    }
}

/// The entry of a Secret that holds API keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeysSecret {
    /// name is the Secret, in the model's namespace. Required.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// key is the entry of the Secret. Defaults to keys.json.
    #[serde(default = "keys_json")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn keys_json() -> String {
    "keys.json".to_owned()
}

/// TLS between routers and workers: each shows the other a certificate. Both Secrets hold tls.crt, tls.key and, as
/// ca.crt, the authorities that issued the other's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MutualTls {
    /// workerSecretName is the Secret of worker pods, in the model's namespace; its certificate is for the
    /// DNS name serverName and has the extended key usage serverAuth. Required.
    #[schemars(length(min = 1, max = 253))]
    pub worker_secret_name: String,
    /// routerSecretName is the Secret of router pods, in the model's namespace; its certificate has the
    /// extended key usage clientAuth. Required.
    #[schemars(length(min = 1, max = 253))]
    pub router_secret_name: String,
    /// serverName is the DNS name that workers' certificates carry. Pods are addressed by IPs that no
    /// certificate can know ahead, so the name is that of the role. Defaults to swallow-worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub server_name: Option<String>,
}

/// How many requests may wait in each router pod, all models together. Beyond it, clients get 429 or
/// RESOURCE_EXHAUSTED with the time after which to try again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct RouterLimits {
    /// maxQueuedRequests is how many requests may wait for a group, 1 to 1000000. Defaults to 1024.
    #[schemars(range(min = 1, max = 1000000))]
    pub max_queued_requests: u32,
    /// maxQueuedTokens is how many prompt tokens may wait, all requests together. Defaults to 4000000.
    #[schemars(range(min = 1, max = 1000000000000_i64))]
    pub max_queued_tokens: u64,
    /// maxQueuedSize is how much memory waiting requests may take, as a quantity. Defaults to 256Mi.
    pub max_queued_size: super::Quantity,
    /// maxQueueSeconds is how long a request may wait before it is refused, 1 to 86400. Defaults to 60.
    #[schemars(range(min = 1, max = 86400))]
    pub max_queue_seconds: u32,
}

impl Default for RouterLimits {
    fn default() -> Self {
        Self {
            max_queued_requests: 1024,
            max_queued_tokens: 4_000_000,
            max_queued_size: super::Quantity::from("256Mi"),
            max_queue_seconds: 60,
        }
    }
}
