//! A worker pod as the plan sees it.

use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodStatus};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use swallow_plan::{
    Failure, Phase, Progress, RETRY_ANNOTATION, SeenGroup, Timestamp, model::GroupReason, objects::labels,
};

use crate::worker::{Told, why_ended};

/// What is kept in the annotation `labels::FAILED` of a pod that the plan ended.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ended {
    /// When.
    pub at: Timestamp,
    /// What of.
    pub reason: GroupReason,
    /// For people.
    pub message: String,
}

/// The group of a pod, with what its worker told; `None` for a pod that is not one of a group. `progress_at` is left
/// at the pod's creation.
pub fn group(pod: &Pod, told: Option<&Told>) -> Option<SeenGroup> {
    let label = |name: &str| pod.labels().get(name);
    let crashes = pod.annotations().get(labels::CRASHES).map_or("", String::as_str);
    Some(SeenGroup {
        name: pod.name_any(),
        uid: pod.uid()?,
        revision: label(labels::REVISION)?.clone(),
        index: label(labels::INDEX)?.parse().ok()?,
        phase: phase(pod, told),
        leaving: pod.metadata.deletion_timestamp.is_some(),
        node_lost: evicted_from_a_silent_node(pod),
        progress_at: created(pod),
        crashes: crashes
            .split(',')
            .filter_map(|crash| crash.parse().ok())
            .collect(),
        retry: pod.annotations().get(RETRY_ANNOTATION).cloned(),
        requests: told.map_or(0, |told| told.requests),
        memory: told.and_then(|told| told.memory),
    })
}

/// When the pod was made.
pub fn created(pod: &Pod) -> Timestamp {
    pod.metadata
        .creation_timestamp
        .as_ref()
        .map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

/// Whether its worker's process runs, so that it may answer.
pub fn answers(pod: &Pod) -> bool {
    worker(pod)
        .and_then(|status| status.state.as_ref())
        .is_some_and(|state| state.running.is_some())
}

/// Whether its files are being fetched by a process that may answer in the worker's stead.
pub fn fetches(pod: &Pod) -> bool {
    let containers = pod
        .status
        .iter()
        .flat_map(|status| &status.init_container_statuses);
    containers.flatten().any(|container| {
        container
            .state
            .as_ref()
            .is_some_and(|state| state.running.is_some())
    })
}

/// Whether its node has given it its volumes: they come before the sandbox.
pub fn has_its_volumes(pod: &Pod) -> bool {
    condition(pod, "PodReadyToStartContainers").is_some_and(|(status, ..)| status == "True")
        || fetches(pod)
        || answers(pod)
}

/// Whether its worker is ready, as the kubelet says.
pub fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|(status, ..)| status == "True")
}

/// Why a router's pod takes no requests, where it says so itself.
pub fn trouble(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    // It is started again and again; what it said last is why.
    let ended = status.container_statuses.iter().flatten().find_map(|container| {
        let last = container.last_state.as_ref()?.terminated.as_ref()?;
        (last.exit_code != 0).then_some(last)
    });
    if let Some(ended) = ended {
        let said = ended.message.as_deref().unwrap_or_default();
        let last = said.lines().map(str::trim).rfind(|line| !line.is_empty());
        return Some(last.map_or_else(
            || format!("it ended with exit code {}", ended.exit_code),
            str::to_owned,
        ));
    }
    match waiting(pod, status, None) {
        Phase::Pending { message, .. } if !message.is_empty() => Some(message),
        _ => None,
    }
}

/// A node that answers says that a pod which it stops is ready until it is stopped.
fn evicted_from_a_silent_node(pod: &Pod) -> bool {
    let evicted = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| {
            condition.type_ == "DisruptionTarget"
                && condition.reason.as_deref() == Some("DeletionByTaintManager")
        });
    evicted && pod.metadata.deletion_timestamp.is_some() && answers(pod) && !is_ready(pod)
}

fn phase(pod: &Pod, told: Option<&Told>) -> Phase {
    if let Some(ended) = pod.annotations().get(labels::FAILED) {
        return Phase::Failed(ended_by_plan(ended, pod));
    }
    let Some(status) = &pod.status else {
        return starting(created(pod));
    };
    if let Some("Failed" | "Succeeded") = status.phase.as_deref() {
        return Phase::Failed(failure(pod, status));
    }
    if let Some(running) = worker(pod)
        .and_then(|status| status.state.as_ref())
        .and_then(|state| state.running.as_ref())
    {
        if is_ready(pod) {
            return Phase::Serving;
        }
        let since = running.started_at.as_ref().map_or(created(pod), |time| time.0);
        return match told.and_then(|told| told.phase.clone()) {
            // It is as the kubelet says: it served once, or will be ready with the next probe. What was fetching when it
            // was last asked is a worker by now.
            None | Some(Phase::Serving | Phase::Fetching(_)) => starting(since),
            Some(phase) => phase,
        };
    }
    waiting(pod, status, told)
}

fn starting(since: Timestamp) -> Phase {
    Phase::Pending {
        reason: GroupReason::Starting,
        message: String::new(),
        since,
    }
}

fn waiting(pod: &Pod, status: &PodStatus, told: Option<&Told>) -> Phase {
    let containers = || {
        let init = status.init_container_statuses.iter().flatten();
        init.chain(status.container_statuses.iter().flatten())
    };
    for container in containers() {
        let Some(waiting) = container.state.as_ref().and_then(|state| state.waiting.as_ref()) else {
            continue;
        };
        let reason = match waiting.reason.as_deref() {
            Some(
                "ErrImagePull"
                | "ImagePullBackOff"
                | "InvalidImageName"
                | "ErrImageNeverPull"
                | "ImageInspectError"
                | "RegistryUnavailable",
            ) => GroupReason::ImagePull,
            Some("CreateContainerConfigError" | "CreateContainerError" | "RunContainerError") => {
                GroupReason::Refused
            }
            _ => continue,
        };
        let message = waiting
            .message
            .clone()
            .or(waiting.reason.clone())
            .unwrap_or_default();
        let since = condition(pod, "PodScheduled").map_or(created(pod), |(_, _, since, _)| since);
        return Phase::Pending {
            reason,
            message,
            since,
        };
    }
    if fetches(pod) {
        return match told.and_then(|told| told.phase.clone()) {
            Some(fetching @ Phase::Fetching(_)) => fetching,
            _ => Phase::Fetching(Progress::default()),
        };
    }
    match condition(pod, "PodScheduled") {
        Some(("False", message, since, _)) => Phase::Pending {
            reason: GroupReason::Unschedulable,
            message: message.to_owned(),
            since,
        },
        Some((_, _, since, _)) => starting(since),
        None => starting(created(pod)),
    }
}

fn ended_by_plan(annotation: &str, pod: &Pod) -> Failure {
    match serde_json::from_str::<Ended>(annotation) {
        Ok(ended) => Failure {
            at: ended.at,
            reason: ended.reason,
            message: ended.message,
        },
        Err(error) => Failure {
            at: created(pod),
            reason: GroupReason::Crashed,
            message: format!("annotation {}: {error}", labels::FAILED),
        },
    }
}

fn failure(pod: &Pod, status: &PodStatus) -> Failure {
    let init = status.init_container_statuses.iter().flatten();
    if let Some(ended) = init
        .filter_map(|status| terminated(status))
        .find(|ended| ended.exit_code != 0)
    {
        return ended_as(ended, GroupReason::FetchFailed, pod);
    }
    if let Some(ended) = worker(pod).and_then(terminated) {
        return ended_as(ended, why_ended(Some(ended.exit_code)), pod);
    }
    // No process ever ran: the node would not have it.
    let words = [&status.reason, &status.message].map(|text| text.clone().unwrap_or_default());
    Failure {
        at: condition(pod, "Ready").map_or(created(pod), |(_, _, since, _)| since),
        reason: GroupReason::Refused,
        message: words.join(": "),
    }
}

fn ended_as(ended: &ContainerStateTerminated, reason: GroupReason, pod: &Pod) -> Failure {
    let own = ended.message.as_deref().map_or("", str::trim);
    let out_of_memory = ended.reason.as_deref() == Some("OOMKilled");
    Failure {
        at: ended.finished_at.as_ref().map_or(created(pod), |time| time.0),
        reason: if out_of_memory {
            GroupReason::OutOfMemory
        } else {
            reason
        },
        message: match own {
            "" if out_of_memory => "it used more memory than its limit".to_owned(),
            "" => format!("it ended with exit code {}", ended.exit_code),
            words => words.to_owned(),
        },
    }
}

fn worker(pod: &Pod) -> Option<&ContainerStatus> {
    let status = pod.status.as_ref()?;
    let mut containers = status.container_statuses.iter().flatten();
    containers.find(|container| container.name == "worker")
}

fn terminated(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    status
        .state
        .as_ref()
        .and_then(|state: &ContainerState| state.terminated.as_ref())
}

/// Status, message, since when, and reason of a condition.
fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<(&'a str, &'a str, Timestamp, &'a str)> {
    let status = pod.status.as_ref()?;
    let condition = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == kind)?;
    let since = condition
        .last_transition_time
        .as_ref()
        .map_or(created(pod), |time| time.0);
    Some((
        &condition.status,
        condition.message.as_deref().unwrap_or_default(),
        since,
        condition.reason.as_deref().unwrap_or_default(),
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn seen(status: Value) -> SeenGroup {
        let pod = json!({
            "metadata": {
                "name": "m-abc-0", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": { labels::REVISION: "abc", labels::INDEX: "0" },
                "annotations": { labels::CRASHES: "2026-01-01T00:00:00Z,2026-01-01T00:01:00Z" },
            },
            "status": status,
        });
        let pod: Pod = serde_json::from_value(pod).expect("it is a pod");
        group(&pod, None).expect("it is a group")
    }

    #[test]
    fn a_router_that_does_not_start_says_why() {
        let trouble = |status: Value| {
            let pod = json!({ "metadata": { "name": "m-router-x" }, "status": status });
            trouble(&serde_json::from_value(pod).expect("it is a pod"))
        };
        let status = |state: Value, last: Value| {
            json!({ "phase": "Running", "containerStatuses": [{ "name": "router", "image": "i", "imageID": "", "ready": false,
                "restartCount": 1, "state": state, "lastState": last }] })
        };
        let again = json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 10s" } });
        let ended = |message: &str| json!({ "terminated": { "exitCode": 1, "message": message } });
        let words = "swallow-router: --api-keys: keys.json: no key";
        assert_eq!(
            trouble(status(
                again.clone(),
                ended(&format!("{{\"level\":\"INFO\"}}\n{words}\n"))
            ))
            .as_deref(),
            Some(words)
        );
        assert_eq!(
            trouble(status(again, ended(""))).as_deref(),
            Some("it ended with exit code 1")
        );
        let pulls = json!({ "waiting": { "reason": "ErrImagePull", "message": "gone" } });
        assert_eq!(trouble(status(pulls, json!({}))).as_deref(), Some("gone"));
        assert_eq!(trouble(status(json!({ "running": {} }), json!({}))), None);
        assert_eq!(trouble(json!({ "phase": "Pending" })), None);
    }

    fn reason(status: Value) -> (GroupReason, String) {
        match seen(status).phase {
            Phase::Pending { reason, message, .. } => (reason, message),
            Phase::Failed(failure) => (failure.reason, failure.message),
            phase => panic!("{phase:?} has no reason"),
        }
    }

    fn ended(container: &str, ended: Value) -> Value {
        let status = json!([{ "name": container, "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": ended } }]);
        let list = if container == "fetch" {
            "initContainerStatuses"
        } else {
            "containerStatuses"
        };
        json!({ "phase": "Failed", list: status })
    }

    #[test]
    fn what_is_wrong_has_one_of_the_reasons() {
        let unschedulable = json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "0/1 nodes: 1 Insufficient cpu." }] });
        assert_eq!(
            reason(unschedulable),
            (
                GroupReason::Unschedulable,
                "0/1 nodes: 1 Insufficient cpu.".into()
            )
        );
        let image = json!({ "phase": "Pending", "containerStatuses": [{ "name": "worker", "image": "", "imageID": "",
            "ready": false, "restartCount": 0, "state": { "waiting": { "reason": "ErrImagePull", "message": "gone" } } }] });
        assert_eq!(reason(image), (GroupReason::ImagePull, "gone".into()));
        for (status, expected) in [
            (
                ended("worker", json!({ "exitCode": 3, "message": "no tensor\n" })),
                (GroupReason::BadCheckpoint, "no tensor"),
            ),
            (
                ended("worker", json!({ "exitCode": 137, "reason": "OOMKilled" })),
                (GroupReason::OutOfMemory, "it used more memory than its limit"),
            ),
            (
                ended("worker", json!({ "exitCode": 1 })),
                (GroupReason::Crashed, "it ended with exit code 1"),
            ),
            (
                ended("fetch", json!({ "exitCode": 1, "message": "404" })),
                (GroupReason::FetchFailed, "404"),
            ),
            (
                json!({ "phase": "Failed", "reason": "OutOfcpu", "message": "full" }),
                (GroupReason::Refused, "OutOfcpu: full"),
            ),
        ] {
            assert_eq!(reason(status), (expected.0, expected.1.to_owned()));
        }
    }

    #[test]
    fn the_record_of_earlier_crashes_is_read_back() {
        assert_eq!(seen(json!({})).crashes.len(), 2);
    }
}
