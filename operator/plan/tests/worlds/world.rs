//! A small world that carries out plans: groups start, load, serve, drain and fail in simulated time.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};
use swallow_plan::{
    Action, Failure, Observed, Phase, Plan, Progress, RETRY_ANNOTATION, SeenGroup, SeenRouter, Timestamp,
    model::{GroupReason, SwallowModel, read},
    plan,
};

/// Bytes of the simulated model; half of them load in a second.
const BYTES: u64 = 100;
/// Seconds that an idle group takes to end.
const END_SECONDS: i64 = 2;

pub struct World {
    pub model: SwallowModel,
    pub now: Timestamp,
    pub groups: Vec<SimGroup>,
    router: Option<(String, Timestamp)>,
    surroundings: Option<String>,
    /// How many groups the cluster has room for.
    pub capacity: usize,
    /// New groups fail while they load.
    pub broken: Option<GroupReason>,
    /// Loading groups stand still.
    pub stalled: bool,
    n_created: u64,
}

pub struct SimGroup {
    pub seen: SeenGroup,
    since: Timestamp,
    /// It has a place in the cluster.
    placed: bool,
}

impl World {
    pub fn new() -> Self {
        let document = json!({
            "apiVersion": "serving.swallow.dev/v1alpha1",
            "kind": "SwallowModel",
            "metadata": { "name": "m" },
            "spec": {
                "model": {
                    "source": { "type": "HostPath", "hostPath": { "path": "/models/m" } },
                    "shape": { "numbers": {
                        "hiddenSize": 256, "layers": 4, "attentionHeads": 8, "keyValueHeads": 4,
                        "intermediateSize": 512, "vocabularySize": 1536, "maxPositionEmbeddings": 8192,
                    } },
                },
                "accelerator": { "device": "CPU" },
            },
        });
        let mut model = read(&document).expect("valid");
        model.metadata.generation = Some(1);
        Self {
            model,
            now: Timestamp::from_second(1_800_000_000).expect("in range"),
            groups: Vec::new(),
            router: None,
            surroundings: None,
            capacity: usize::MAX,
            broken: None,
            stalled: false,
            n_created: 0,
        }
    }

    /// Changes fields of the spec, by path.
    pub fn change(&mut self, fields: &[(&str, Value)]) {
        let mut spec = serde_json::to_value(&self.model.spec).expect("a spec is plain data");
        for (path, value) in fields {
            let place = path.split('.').fold(&mut spec, |place, name| &mut place[name]);
            *place = value.clone();
        }
        self.model.spec = serde_json::from_value(spec).expect("the test names fields that there are");
        self.model.metadata.generation = self.model.metadata.generation.map(|generation| generation + 1);
    }

    /// Sets the annotation that lifts quarantines.
    pub fn retry(&mut self, value: &str) {
        let annotations = BTreeMap::from([(RETRY_ANNOTATION.to_owned(), value.to_owned())]);
        self.model.metadata.annotations = Some(annotations);
    }

    /// The user deletes the model.
    pub fn delete(&mut self) {
        self.model.metadata.deletion_timestamp = Some(Time(self.now));
    }

    pub fn group(&mut self, name: &str) -> Option<&mut SimGroup> {
        self.groups.iter_mut().find(|group| group.seen.name == name)
    }

    pub fn observe(&self) -> Observed {
        let router = self.router.as_ref().map(|(fingerprint, applied)| SeenRouter {
            fingerprint: fingerprint.clone(),
            ready: u32::from(self.now > *applied),
            leaving: false,
            trouble: None,
        });
        Observed {
            groups: self.groups.iter().map(|group| group.seen.clone()).collect(),
            router,
            surroundings: self.surroundings.clone(),
            ..Observed::default()
        }
    }

    /// Plans once, carries the plan out and keeps its status.
    pub fn step(&mut self) -> Plan {
        let seen = self.observe();
        let plan = plan(&self.model, &seen, self.now);
        assert_eq!(
            plan,
            swallow_plan::plan(&self.model, &seen, self.now),
            "the same arguments give the same plan"
        );
        for action in &plan.actions {
            self.carry_out(action);
        }
        self.model.status = Some(plan.status.clone());
        plan
    }

    fn carry_out(&mut self, action: &Action) {
        match action {
            Action::ApplySurroundings { fingerprint, .. } => self.surroundings = Some(fingerprint.clone()),
            Action::ApplyRouter { fingerprint, .. } => self.router = Some((fingerprint.clone(), self.now)),
            Action::RemoveRouter { .. } => self.router = None,
            Action::ForgetRevision { .. } => {}
            Action::CreateGroup { group, .. } => {
                assert!(
                    self.groups.iter().all(|other| other.seen.name != group.name),
                    "{} exists",
                    group.name
                );
                self.n_created += 1;
                self.groups.push(SimGroup {
                    seen: SeenGroup {
                        name: group.name.clone(),
                        uid: self.n_created.to_string(),
                        revision: group.revision.clone(),
                        index: group.index,
                        phase: Phase::Pending {
                            reason: GroupReason::Starting,
                            message: String::new(),
                            since: self.now,
                        },
                        leaving: false,
                        node_lost: false,
                        progress_at: self.now,
                        crashes: group.crashes.clone(),
                        retry: group.retry.clone(),
                        requests: 0,
                        memory: None,
                    },
                    since: self.now,
                    placed: false,
                });
            }
            Action::DrainGroup { group, .. } => {
                let now = self.now;
                let victim = self.by_uid(&group.uid);
                assert_eq!(victim.seen.phase, Phase::Serving, "only what serves is drained");
                victim.seen.leaving = true;
                victim.since = now;
            }
            Action::FailGroup { group, reason, why } => {
                let (reason, message, now) = (*reason, why.to_string(), self.now);
                self.by_uid(&group.uid).fail(reason, &message, now);
            }
            Action::DeleteGroup { group, .. } => {
                let victim = self.by_uid(&group.uid);
                assert!(
                    victim.seen.node_lost || victim.seen.phase != Phase::Serving,
                    "what serves is drained first"
                );
                // A node that does not answer cannot say that the group is gone.
                if victim.seen.node_lost {
                    victim.seen.leaving = true;
                } else {
                    self.groups.retain(|other| other.seen.uid != group.uid);
                }
            }
        }
    }

    fn by_uid(&mut self, uid: &str) -> &mut SimGroup {
        self.groups
            .iter_mut()
            .find(|group| group.seen.uid == uid)
            .expect("an action names a group that exists")
    }

    /// A second passes.
    pub fn pass(&mut self) {
        self.now = later(self.now, 1);
        let drain = i64::from(self.model.spec.drain.timeout_seconds);
        let now = self.now;
        self.groups.retain(|group| {
            let waits = if group.seen.requests > 0 {
                drain
            } else {
                END_SECONDS
            };
            let gone = group.seen.leaving && !group.seen.node_lost && seconds(group.since, now) >= waits;
            !gone
        });
        let mut placed = self
            .groups
            .iter()
            .filter(|group| group.placed && group.holds())
            .count();
        for group in self
            .groups
            .iter_mut()
            .filter(|group| !group.seen.leaving && !group.seen.node_lost)
        {
            if !group.placed && matches!(group.seen.phase, Phase::Pending { .. }) {
                if placed >= self.capacity {
                    group.wait_for_room(now);
                    continue;
                }
                placed += 1;
                group.placed = true;
                group.go_to(
                    Phase::Pending {
                        reason: GroupReason::Starting,
                        message: String::new(),
                        since: now,
                    },
                    now,
                );
                continue;
            }
            group.grow(self.stalled, self.broken, now);
        }
    }
}

impl SimGroup {
    fn holds(&self) -> bool {
        !matches!(self.seen.phase, Phase::Failed(_)) && !self.seen.node_lost
    }

    pub fn fail(&mut self, reason: GroupReason, message: &str, now: Timestamp) {
        self.seen.requests = 0;
        self.seen.phase = Phase::Failed(Failure {
            at: now,
            reason,
            message: message.to_owned(),
        });
    }

    fn wait_for_room(&mut self, now: Timestamp) {
        if !self.seen.is_unschedulable() {
            let message = "no node has room".to_owned();
            self.seen.phase = Phase::Pending {
                reason: GroupReason::Unschedulable,
                message,
                since: now,
            };
        }
    }

    fn grow(&mut self, stalled: bool, broken: Option<GroupReason>, now: Timestamp) {
        let loading = |bytes_done| {
            Phase::Loading(Progress {
                bytes_done,
                bytes_total: BYTES,
                eta_seconds: Some((BYTES - bytes_done) / 50),
            })
        };
        let next = match &self.seen.phase {
            Phase::Pending { .. } => loading(0),
            Phase::Loading(progress) => match (stalled, broken) {
                (true, _) => return,
                (_, Some(reason)) => return self.fail(reason, "tensor lm_head.weight is missing", now),
                _ if progress.bytes_done < BYTES => loading(progress.bytes_done + BYTES / 2),
                _ => Phase::Warming,
            },
            Phase::Warming => Phase::Serving,
            Phase::Fetching(_) | Phase::Serving | Phase::Failed(_) => return,
        };
        self.go_to(next, now);
    }

    fn go_to(&mut self, phase: Phase, now: Timestamp) {
        self.seen.phase = phase;
        self.seen.progress_at = now;
        self.since = now;
    }
}

/// Whole seconds between two moments.
pub fn seconds(from: Timestamp, to: Timestamp) -> i64 {
    to.as_second() - from.as_second()
}

fn later(time: Timestamp, seconds: i64) -> Timestamp {
    Timestamp::from_second(time.as_second() + seconds).expect("in range")
}
