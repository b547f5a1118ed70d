//! What the plan tells: counts, groups, memory, and conditions with the one reason that matters most.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::{
    Observed, Phase, Progress, Refused, SeenGroup, SeenRouter, Timestamp, Valid,
    action::{counted, groups as count},
    after,
    census::Census,
    memory::{MemoryPlan, Size},
    model::{
        Condition, ConditionStatus, Device, GroupReason, GroupState, GroupStatus, MemoryStatus,
        ProgressStatus, SwallowModel, SwallowModelStatus,
    },
    objects::labels,
    recovery,
    rollout::Decided,
};

/// The longest text of the world that goes into a status, in characters.
const MESSAGE_MAX: usize = 512;

/// The whole status.
pub(crate) fn tell(
    model: &SwallowModel,
    verdict: &Result<Valid, Refused>,
    seen: &Observed,
    census: &Census<'_>,
    decided: &Decided,
    now: Timestamp,
) -> SwallowModelStatus {
    let groups = groups(model, seen, decided, now);
    let told = Told {
        model,
        verdict,
        seen,
        census,
        decided,
        groups: &groups,
    };
    let facts = vec![
        told.spec_valid(),
        told.memory_plan_fits(),
        told.router_ready(),
        told.ready(),
        told.fully_available(),
        told.settled(),
        told.recovery_healthy(),
    ];
    let conditions = facts
        .into_iter()
        .map(|fact| condition(fact, model, now))
        .collect();
    let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    SwallowModelStatus {
        observed_generation: model.metadata.generation.unwrap_or_default(),
        replicas: number(seen.groups.len()),
        ready_replicas: number(census.serving()),
        updated_replicas: number(census.updated()),
        selector: labels::selector(model.metadata.name.as_deref().unwrap_or_default()),
        update_revision: verdict.as_ref().ok().map(|valid| valid.revision.clone()),
        memory_plan: verdict
            .as_ref()
            .ok()
            .and_then(|valid| valid.memory)
            .map(MemoryPlan::to_status),
        groups,
        conditions,
    }
}

fn groups(model: &SwallowModel, seen: &Observed, decided: &Decided, now: Timestamp) -> Vec<GroupStatus> {
    let mut groups: Vec<GroupStatus> = seen
        .groups
        .iter()
        .map(|group| group_status(group, model, decided, now))
        .collect();
    groups.sort_by(|a, b| a.name.cmp(&b.name));
    groups
}

fn group_status(group: &SeenGroup, model: &SwallowModel, decided: &Decided, now: Timestamp) -> GroupStatus {
    let (mut state, mut reason, mut message) = match &group.phase {
        Phase::Pending { reason, message, .. } => (GroupState::Pending, Some(*reason), message.clone()),
        Phase::Fetching(_) => (GroupState::Fetching, Some(GroupReason::Starting), String::new()),
        Phase::Loading(_) => (GroupState::Loading, Some(GroupReason::Starting), String::new()),
        Phase::Warming => (GroupState::Warming, Some(GroupReason::Starting), String::new()),
        Phase::Serving => (GroupState::Serving, None, String::new()),
        Phase::Failed(failure) => (GroupState::Failed, Some(failure.reason), failure.message.clone()),
    };
    let failed = state == GroupState::Failed;
    if decided.quarantined.contains(&group.name) {
        state = GroupState::Quarantined;
    } else if group.node_lost && !failed {
        (state, reason, message) = (GroupState::Pending, Some(GroupReason::NodeLost), String::new());
    } else if group.leaving && !failed {
        (state, reason, message) = (GroupState::Draining, Some(GroupReason::Stopping), String::new());
    }
    let recovery = &model.spec.recovery;
    let restarts = match &group.phase {
        Phase::Failed(failure) => recovery::counted(group, failure, recovery).len(),
        _ => group
            .crashes
            .iter()
            .filter(|crash| after(**crash, recovery.window_seconds) > now)
            .count(),
    };
    GroupStatus {
        name: group.name.clone(),
        revision: group.revision.clone(),
        state,
        reason,
        message: shortened(&message),
        restarts: i32::try_from(restarts).unwrap_or(i32::MAX),
        progress: match &group.phase {
            Phase::Fetching(progress) | Phase::Loading(progress) => Some(progress_status(progress)),
            _ => None,
        },
        memory: memory_status(group, model),
    }
}

/// As measured; as told last of a group that serves and was not asked since this operator started.
fn memory_status(group: &SeenGroup, model: &SwallowModel) -> Option<MemoryStatus> {
    if let Some(memory) = group.memory {
        return Some(MemoryStatus {
            weights_bytes: signed(memory.weights_bytes),
            kv_cache_bytes: signed(memory.kv_bytes),
            workspace_bytes: signed(memory.workspace_bytes),
        });
    }
    let earlier = model.status.iter().flat_map(|status| &status.groups);
    earlier
        .filter(|_| group.phase == Phase::Serving)
        .find(|earlier| earlier.name == group.name)
        .and_then(|earlier| earlier.memory)
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn progress_status(progress: &Progress) -> ProgressStatus {
    ProgressStatus {
        bytes_done: signed(progress.bytes_done),
        bytes_total: signed(progress.bytes_total),
        eta_seconds: progress.eta_seconds.map(signed),
    }
}

fn with_trouble(message: String, router: &SeenRouter) -> String {
    match &router.trouble {
        Some(trouble) => shortened(&format!("{message}; router: {trouble}")),
        None => message,
    }
}

fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= MESSAGE_MAX {
        return line;
    }
    line.chars().take(MESSAGE_MAX - 1).chain(['…']).collect()
}

/// A condition without its times.
struct Fact {
    kind: &'static str,
    status: ConditionStatus,
    reason: String,
    message: String,
}

fn fact(kind: &'static str, holds: bool, reason: impl Into<String>, message: impl Into<String>) -> Fact {
    let status = if holds {
        ConditionStatus::True
    } else {
        ConditionStatus::False
    };
    Fact {
        kind,
        status,
        reason: reason.into(),
        message: message.into(),
    }
}

/// The fact with its times: the transition is the last status's, unless it turned.
fn condition(fact: Fact, model: &SwallowModel, now: Timestamp) -> Condition {
    let earlier = model
        .status
        .as_ref()
        .and_then(|status| status.conditions.iter().find(|earlier| earlier.kind == fact.kind))
        .filter(|earlier| earlier.status == fact.status);
    let whole_second = Timestamp::from_second(now.as_second()).unwrap_or(now);
    Condition {
        kind: fact.kind.into(),
        status: fact.status,
        reason: fact.reason,
        message: fact.message,
        observed_generation: model.metadata.generation.unwrap_or_default(),
        last_transition_time: earlier
            .map_or(Time(whole_second), |earlier| earlier.last_transition_time.clone()),
    }
}

struct Told<'a> {
    model: &'a SwallowModel,
    verdict: &'a Result<Valid, Refused>,
    seen: &'a Observed,
    census: &'a Census<'a>,
    decided: &'a Decided,
    groups: &'a [GroupStatus],
}

impl Told<'_> {
    fn spec_valid(&self) -> Fact {
        match self.verdict {
            Err(Refused::Invalid(problems)) => {
                let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
                fact("SpecValid", false, "InvalidSpec", shortened(&all.join("; ")))
            }
            _ => fact("SpecValid", true, "Valid", ""),
        }
    }

    fn memory_plan_fits(&self) -> Fact {
        let kind = "MemoryPlanFits";
        let unknown = |reason: &str, message: &str| Fact {
            kind,
            status: ConditionStatus::Unknown,
            reason: reason.into(),
            message: message.into(),
        };
        match self.verdict {
            Err(Refused::Invalid(_)) => unknown("InvalidSpec", ""),
            Err(Refused::DoesNotFit { misfit, .. }) => {
                fact(kind, false, "NotEnoughMemory", misfit.to_string())
            }
            Ok(Valid { memory: None, .. }) => unknown(
                "ShapeUnknown",
                "spec.model.shape is not set, and config.json could not be read in advance",
            ),
            Ok(Valid {
                memory: Some(plan),
                spec,
                shape,
                ..
            }) => {
                let context = shape
                    .as_ref()
                    .map_or(u32::MAX, |shape| shape.max_position_embeddings);
                let length = u64::from(spec.engine.max_model_len.unwrap_or(context))
                    .min(plan.kv_tokens)
                    .max(1);
                let place = match spec.accelerator.device {
                    Device::GPU => "each GPU",
                    Device::CPU => "each rank",
                };
                let message = format!(
                    "{} KV tokens a group, {} of {length}; {place}: {} weights, {} workspace, {} KV cache",
                    plan.kv_tokens,
                    counted(plan.kv_tokens / length, "sequence"),
                    Size(plan.weights_bytes),
                    Size(plan.overhead_bytes),
                    Size(plan.kv_cache_bytes),
                );
                fact(kind, true, "Fits", message)
            }
        }
    }

    fn router_ready(&self) -> Fact {
        let want = self.model.spec.router.replicas;
        match &self.seen.router {
            None => fact("RouterReady", false, "Absent", ""),
            Some(router) if router.ready > 0 && self.decided.router_disagreement.is_some() => fact(
                "RouterReady",
                true,
                "SettingsDisagree",
                self.decided.router_disagreement.clone().unwrap_or_default(),
            ),
            Some(router) => {
                let message = with_trouble(format!("{} of {want} ready", router.ready), router);
                let reason = match (router.ready, &router.trouble) {
                    (0, None) => "Starting",
                    (0, Some(_)) => "CannotStart",
                    // A newer one may have trouble; what there was serves on.
                    _ => "Available",
                };
                fact("RouterReady", router.ready > 0, reason, message)
            }
        }
    }

    /// Clients are served: a router takes requests and enough groups answer them.
    fn ready(&self) -> Fact {
        let want = self.census.want;
        let serving = self.census.serving();
        let message = format!("{serving} of {} serving", count(want));
        let unavailable = usize::try_from(self.model.spec.rollout.max_unavailable).unwrap_or_default();
        let enough = want.saturating_sub(unavailable).max(1);
        if let Some(off) = self.off() {
            return fact("Ready", false, off, format!("{} serving", count(serving)));
        }
        if serving < enough {
            let (reason, message) = self.shortfall(message);
            return fact("Ready", false, reason, message);
        }
        match &self.seen.router {
            Some(router) if router.ready > 0 => {}
            Some(router) => {
                let message = with_trouble(message, router);
                return fact("Ready", false, "RouterNotReady", message);
            }
            None => return fact("Ready", false, "RouterNotReady", message),
        }
        fact(
            "Ready",
            true,
            if serving >= want {
                "AllGroupsServing"
            } else {
                "MinimumGroupsServing"
            },
            message,
        )
    }

    /// Every wanted group serves this very spec.
    fn fully_available(&self) -> Fact {
        let want = self.census.want;
        let updated = self.census.updated();
        let message = format!("{updated} of {} serving this spec", count(want));
        if let Some(off) = self.off() {
            return fact(
                "FullyAvailable",
                false,
                off,
                format!("{} serving this spec", count(updated)),
            );
        }
        if self.verdict.is_ok() && updated >= want && self.census.old.is_empty() {
            return fact("FullyAvailable", true, "AllGroupsServing", message);
        }
        let (reason, message) = self.shortfall(message);
        fact("FullyAvailable", false, reason, message)
    }

    /// Nothing is being changed and nothing waits to be.
    fn settled(&self) -> Fact {
        let Census {
            current,
            failed,
            old,
            old_failed,
            leaving,
            lost,
            want,
        } = self.census;
        let moving = current.iter().any(|group| group.is_starting()) || !leaving.is_empty();
        let kind = "Settled";
        if self.verdict.is_err() {
            return fact(
                kind,
                false,
                "Blocked",
                "the spec cannot be carried out; what runs is left alone",
            );
        }
        if self.decided.no_room {
            let message =
                "the new groups have no room, and rollout.maxUnavailable does not let an old one go first";
            return fact(kind, false, "NoRoomForSurge", message);
        }
        if !old.is_empty() || !old_failed.is_empty() {
            let message = format!("{} of older revisions left", count(old.len() + old_failed.len()));
            return fact(kind, false, "RollingOut", message);
        }
        if !self.decided.actions.is_empty() || moving || !lost.is_empty() {
            let message = format!("{}, {want} wanted", count(self.seen.groups.len()));
            return fact(kind, false, "Changing", message);
        }
        match failed.len() - self.decided.quarantined.len().min(failed.len()) {
            0 => fact(kind, true, "AtRest", ""),
            n => fact(
                kind,
                false,
                "Recovering",
                format!("{} to be started again", count(n)),
            ),
        }
    }

    fn recovery_healthy(&self) -> Fact {
        let down: Vec<&GroupStatus> = self
            .groups
            .iter()
            .filter(|group| group.state == GroupState::Quarantined)
            .collect();
        let Some(first) = down.first() else {
            return fact("RecoveryHealthy", true, "WithinBudget", "");
        };
        let reason = first
            .reason
            .map_or_else(String::new, |reason| format!("{reason:?}"));
        let message = format!(
            "{} down until the spec or the annotation {} changes; {}: {reason}: {}",
            count(down.len()),
            crate::RETRY_ANNOTATION,
            first.name,
            first.message
        );
        fact("RecoveryHealthy", false, "Quarantined", shortened(&message))
    }

    /// Why nothing is wanted, if nothing is.
    fn off(&self) -> Option<&'static str> {
        if self.model.metadata.deletion_timestamp.is_some() {
            Some("Deleting")
        } else if self.model.spec.suspend {
            Some("Suspended")
        } else {
            (self.census.want == 0).then_some("ScaledToZero")
        }
    }

    /// The one reason why fewer groups serve than should: what the user has to act on comes first.
    fn shortfall(&self, message: String) -> (String, String) {
        match self.verdict {
            Err(Refused::Invalid(_)) => return ("InvalidSpec".into(), message),
            Err(Refused::DoesNotFit { .. }) => return ("NotEnoughMemory".into(), message),
            Ok(_) => {}
        }
        if let (Some(refused), Ok(valid)) = (&self.seen.create_refused, self.verdict)
            && refused.revision == valid.revision
        {
            return (
                "Refused".into(),
                shortened(&format!("{message}; {}", refused.message)),
            );
        }
        let weight = |group: &&GroupStatus| match (group.state, group.reason) {
            (GroupState::Quarantined, _) => 0,
            (GroupState::Failed, _) => 1,
            (GroupState::Pending, Some(GroupReason::Starting)) => 4,
            (GroupState::Pending, _) => 2,
            (GroupState::Draining, _) => 5,
            _ => 3,
        };
        let worst = self
            .groups
            .iter()
            .filter(|group| group.state != GroupState::Serving)
            .min_by_key(weight);
        match worst {
            Some(group) => {
                let reason = match group.state {
                    GroupState::Quarantined => "Quarantined".to_owned(),
                    GroupState::Draining => "RollingOut".to_owned(),
                    _ => group
                        .reason
                        .map_or_else(|| "Starting".to_owned(), |reason| format!("{reason:?}")),
                };
                let detail = if group.message.is_empty() {
                    String::new()
                } else {
                    format!(": {}", group.message)
                };
                (reason, shortened(&format!("{message}; {}{detail}", group.name)))
            }
            None if self.census.old.is_empty() => ("Starting".into(), message),
            None => ("RollingOut".into(), message),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{model::read, plan};

    /// Status, reason and message of a condition of a model with one group, which is not there yet.
    fn told(kind: &str, router: SeenRouter) -> (ConditionStatus, String, String) {
        let model = read(&json!({
            "apiVersion": "serving.swallow.dev/v1alpha1", "kind": "SwallowModel", "metadata": { "name": "m" },
            "spec": {
                "model": { "source": { "type": "HostPath", "hostPath": { "path": "/m" } } },
                "accelerator": { "device": "CPU" },
            },
        }))
        .expect("it can be read");
        let seen = Observed {
            router: Some(router),
            ..Observed::default()
        };
        let status = plan(&model, &seen, Timestamp::UNIX_EPOCH).status;
        let found = status.conditions.into_iter().find(|it| it.kind == kind);
        let found = found.expect("each condition is told");
        (found.status, found.reason, found.message)
    }

    fn router(ready: u32, trouble: Option<&str>) -> SeenRouter {
        SeenRouter {
            fingerprint: String::new(),
            ready,
            leaving: false,
            trouble: trouble.map(str::to_owned),
        }
    }

    #[test]
    fn what_keeps_a_router_is_said_whether_or_not_another_serves() {
        let absent = Some("secret \"front\" not found");
        let ready = |router| told("RouterReady", router);
        let words = |text: &str| text.to_owned();
        assert_eq!(
            ready(router(0, None)),
            (ConditionStatus::False, words("Starting"), words("0 of 1 ready"))
        );
        assert_eq!(
            ready(router(0, absent)),
            (
                ConditionStatus::False,
                words("CannotStart"),
                words("0 of 1 ready; router: secret \"front\" not found")
            )
        );
        assert_eq!(
            ready(router(1, absent)),
            (
                ConditionStatus::True,
                words("Available"),
                words("1 of 1 ready; router: secret \"front\" not found")
            )
        );
    }

    #[test]
    fn numbers_and_nouns_agree() {
        let (_, _, message) = told("Ready", router(1, None));
        assert_eq!(message, "0 of 1 group serving");
        assert_eq!(counted(1, "sequence"), "1 sequence");
        assert_eq!((count(0), count(2)), ("0 groups".into(), "2 groups".into()));
    }
}
