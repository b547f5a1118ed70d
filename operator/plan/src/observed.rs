//! What was seen of the world, as plain data. The shell fills it; the plan reads it.

use serde_json::Value;

use crate::{Peer, Timestamp, model::GroupReason, topology::Shape};

/// Everything that a plan for one model depends on, apart from the model itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// Every group of the model that exists in any form, whatever its revision.
    pub groups: Vec<SeenGroup>,
    /// The model's router, if it exists.
    pub router: Option<SeenRouter>,
    /// Other valid models of the namespace that are not being deleted.
    pub peers: Vec<Peer>,
    /// The model's revisions on record.
    pub revisions: Vec<SeenRevision>,
    /// What the API server said when it last refused to create a group, if it did.
    pub create_refused: Option<CreateRefused>,
    /// Fingerprint of the surroundings (accounts, services, disruption budget) last applied, if they exist.
    pub surroundings: Option<String>,
    /// The model's size as its config.json gives it, where the shell could read it.
    pub shape: Option<Shape>,
    /// The images that pods get unless the spec names others.
    pub images: Images,
}

/// Default container images, and what else the installation decides for all models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// Of workers.
    pub worker: String,
    /// Of routers.
    pub router: String,
    /// Not an image: the ClusterRole that routers are bound to in their namespace, to read EndpointSlices.
    pub router_role: String,
}

impl Default for Images {
    fn default() -> Self {
        let tagged = |name: &str| format!("{name}:{}", env!("CARGO_PKG_VERSION"));
        Self {
            worker: tagged("swallow-worker"),
            router: tagged("swallow-router"),
            router_role: "swallow-router".to_owned(),
        }
    }
}

/// A revision on record: how its groups were rendered first, and are ever after.
#[derive(Clone, Debug, PartialEq)]
pub struct SeenRevision {
    /// The name of its record.
    pub name: String,
    /// Precondition of its removal.
    pub uid: String,
    /// The revision.
    pub revision: String,
    /// Counts up with each new revision of a model.
    pub number: i64,
    /// The pod, as `objects::record` made it.
    pub record: Value,
}

/// Why a group could not be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateRefused {
    /// The revision of the group.
    pub revision: String,
    /// In the API server's words.
    pub message: String,
}

/// One group as it was seen.
#[derive(Clone, Debug, PartialEq)]
pub struct SeenGroup {
    /// Its name, unique in the namespace among what exists.
    pub name: String,
    /// Tells it from another group that had the same name before.
    pub uid: String,
    /// The revision that it was made from.
    pub revision: String,
    /// Its number within the revision.
    pub index: u32,
    /// Where it is on its way.
    pub phase: Phase,
    /// It was told to stop.
    pub leaving: bool,
    /// Its node does not answer.
    pub node_lost: bool,
    /// When its phase or progress last moved.
    pub progress_at: Timestamp,
    /// Failures of the groups whose place it took, oldest first, as `CreateGroup` recorded them.
    pub crashes: Vec<Timestamp>,
    /// The retry annotation of the model when it was made.
    pub retry: Option<String>,
    /// Requests that it computes or holds waiting.
    pub requests: u32,
    /// What its worker measured after its warm-up, where it could be asked.
    pub memory: Option<MeasuredMemory>,
}

/// Memory as a worker found it, in bytes, of all ranks together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MeasuredMemory {
    /// Weights in the device's number format.
    pub weights_bytes: u64,
    /// Keys and values.
    pub kv_bytes: u64,
    /// Activations and scratch space.
    pub workspace_bytes: u64,
}

/// Where a group is on its way.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// No process yet, or one that has not told anything.
    Pending {
        /// What it waits for.
        reason: GroupReason,
        /// The cluster's words.
        message: String,
        /// Since when it waits for this.
        since: Timestamp,
    },
    /// Files are being fetched.
    Fetching(Progress),
    /// Weights are being read.
    Loading(Progress),
    /// The first step is being computed.
    Warming,
    /// It takes requests.
    Serving,
    /// Its process ended, or was ended because it stood still.
    Failed(Failure),
}

/// Bytes done and to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are there.
    pub bytes_done: u64,
    /// Bytes there will be; zero while unknown.
    pub bytes_total: u64,
    /// Seconds that the rest will take, where known.
    pub eta_seconds: Option<u64>,
}

/// How a group ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// When.
    pub at: Timestamp,
    /// In one word.
    pub reason: GroupReason,
    /// In the worker's own words.
    pub message: String,
}

/// The router as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenRouter {
    /// Fingerprint of what was applied last.
    pub fingerprint: String,
    /// Pods (or processes) that take requests.
    pub ready: u32,
    /// It was told to stop.
    pub leaving: bool,
    /// Why one of its pods takes no requests, where somebody says so.
    pub trouble: Option<String>,
}

impl SeenGroup {
    /// It is on its way to serving and takes no requests yet.
    pub fn is_starting(&self) -> bool {
        !matches!(self.phase, Phase::Serving | Phase::Failed(_))
    }

    /// It takes requests, and will go on to.
    pub fn serves(&self) -> bool {
        self.phase == Phase::Serving && !self.leaving && !self.node_lost
    }

    /// It waits for room in the cluster.
    pub fn is_unschedulable(&self) -> bool {
        matches!(
            self.phase,
            Phase::Pending {
                reason: GroupReason::Unschedulable,
                ..
            }
        )
    }
}
