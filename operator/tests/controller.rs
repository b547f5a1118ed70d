//! The controller against a real API server without nodes: the tests play scheduler and kubelet.
//!
//! etcd and kube-apiserver come from SWALLOW_CLUSTER_BIN, or from where the cluster tests put them.

#[path = "controller/server.rs"]
mod server;

use std::time::Duration;

use k8s_openapi::api::{
    apps::v1::{ControllerRevision, Deployment},
    core::v1::{Event, Pod},
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use server::{Operator, Space};
use swallow_plan::model::{ConditionStatus, GroupReason, GroupState, SwallowModel};

fn model(name: &str, change: impl FnOnce(&mut Value)) -> Value {
    let mut document = json!({
        "apiVersion": "serving.swallow.dev/v1alpha1",
        "kind": "SwallowModel",
        "metadata": { "name": name },
        "spec": {
            "model": { "source": { "type": "PersistentVolumeClaim",
                "persistentVolumeClaim": { "claimName": "models", "path": "tiny" } } },
            "accelerator": { "device": "CPU" },
            "recovery": { "maxRestarts": 1, "backoff": { "initialSeconds": 1 } },
            "replicas": 2,
        },
    });
    change(&mut document["spec"]);
    document
}

async fn apply(space: &Space, document: &Value) {
    let name = document["metadata"]["name"].as_str().expect("it has a name");
    let params = PatchParams::apply("test").force();
    space
        .models()
        .patch(name, &params, &Patch::Apply(document))
        .await
        .expect("the model is taken");
}

async fn pods(space: &Space) -> Vec<Pod> {
    let api: Api<Pod> = space.api();
    api.list(&ListParams::default())
        .await
        .expect("pods are listed")
        .items
}

async fn pods_until(space: &Space, what: &str, enough: impl Fn(&[Pod]) -> bool) -> Vec<Pod> {
    space
        .until(what, async || {
            let pods = pods(space).await;
            enough(&pods).then_some(pods)
        })
        .await
}

async fn play(space: &Space, pod: &Pod, status: Value) {
    let api: Api<Pod> = space.api();
    let patch = Patch::Merge(json!({ "status": status }));
    api.patch_status(&pod.name_any(), &PatchParams::default(), &patch)
        .await
        .expect("the status of a pod is taken");
}

fn serving() -> Value {
    json!({
        "phase": "Running",
        "conditions": [
            { "type": "PodScheduled", "status": "True" },
            { "type": "Ready", "status": "True" },
        ],
        "containerStatuses": [{ "name": "worker", "image": "i", "imageID": "", "ready": true, "restartCount": 0,
            "state": { "running": { "startedAt": "2026-01-01T00:00:00Z" } } }],
    })
}

fn crashed() -> Value {
    let now = swallow_plan::Timestamp::now().to_string();
    json!({
        "phase": "Failed",
        "containerStatuses": [{ "name": "worker", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": { "exitCode": 1, "message": "rank 1 is gone", "finishedAt": now } } }],
    })
}

async fn router_serves(space: &Space, name: &str) {
    let api: Api<Deployment> = space.api();
    let status =
        json!({ "replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "observedGeneration": 1 });
    let patch = Patch::Merge(json!({ "status": status }));
    space
        .until("the router", async || {
            api.get_opt(name).await.expect("it is read")
        })
        .await;
    api.patch_status(name, &PatchParams::default(), &patch)
        .await
        .expect("the status of a router is taken");
}

async fn told(space: &Space, name: &str, what: &str, holds: impl Fn(&SwallowModel) -> bool) -> SwallowModel {
    space
        .until(what, async || {
            let model = space.models().get(name).await.expect("the model is read");
            holds(&model).then_some(model)
        })
        .await
}

fn ready(model: &SwallowModel) -> Option<(ConditionStatus, &str)> {
    let status = model.status.as_ref()?;
    let ready = status.conditions.iter().find(|one| one.kind == "Ready")?;
    Some((ready.status, &ready.reason))
}

async fn serves(space: &Space, name: &str, replicas: usize) {
    for pod in pods_until(space, "the groups", |pods| pods.len() == replicas).await {
        play(space, &pod, serving()).await;
    }
    router_serves(space, &format!("{name}-router")).await;
    told(space, name, "Ready", |model| {
        ready(model).is_some_and(|(status, _)| status == ConditionStatus::True)
    })
    .await;
}

/// Versions of everything that the operator writes.
async fn versions(space: &Space) -> Vec<String> {
    let mut versions: Vec<String> = pods(space)
        .await
        .iter()
        .filter_map(ResourceExt::resource_version)
        .collect();
    let models = space
        .models()
        .list(&ListParams::default())
        .await
        .expect("models are listed");
    versions.extend(models.iter().filter_map(ResourceExt::resource_version));
    let routers: Api<Deployment> = space.api();
    let routers = routers
        .list(&ListParams::default())
        .await
        .expect("routers are listed");
    versions.extend(routers.iter().filter_map(ResourceExt::resource_version));
    let revisions: Api<ControllerRevision> = space.api();
    let revisions = revisions
        .list(&ListParams::default())
        .await
        .expect("revisions are listed");
    versions.extend(revisions.iter().filter_map(ResourceExt::resource_version));
    versions
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_served_a_restart_writes_nothing_and_an_upgrade_keeps_its_pods() {
    let space = Space::new("serve").await;
    let operator = Operator::start(&space, &["--no-leader-election", "--worker-image=worker:1"]);
    apply(&space, &model("tiny", |_| {})).await;
    let first = pods_until(&space, "two pods", |pods| pods.len() == 2).await;
    assert!(first.iter().all(|pod| pod.owner_references().len() == 1));
    let why = "0/1 nodes are available: 1 Insufficient cpu.";
    let unschedulable = json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "False",
        "reason": "Unschedulable", "message": why }] });
    play(&space, &first[0], unschedulable).await;
    let seen = told(&space, "tiny", "Unschedulable", |model| {
        ready(model) == Some((ConditionStatus::False, "Unschedulable"))
    })
    .await;
    let group = &seen.status.expect("it has a status").groups[0];
    assert_eq!(
        (group.reason, group.message.as_str()),
        (Some(GroupReason::Unschedulable), why)
    );
    serves(&space, "tiny", 2).await;
    space
        .until("rest", async || operator.idle().await.then_some(()))
        .await;
    drop(operator);

    let before = versions(&space).await;
    let upgraded = Operator::start(&space, &["--no-leader-election", "--worker-image=worker:2"]);
    space
        .until("a look", async || {
            (upgraded.metric("reconciles_total{result=\"ok\"}").await? >= 1.0).then_some(())
        })
        .await;
    space
        .until("rest", async || upgraded.idle().await.then_some(()))
        .await;
    assert_eq!(upgraded.metric("writes_total").await, None, "it writes nothing");
    assert_eq!(versions(&space).await, before);

    // A further group of the same revision is made as the first ones were.
    apply(&space, &model("tiny", |spec| spec["replicas"] = json!(3))).await;
    let three = pods_until(&space, "three pods", |pods| pods.len() == 3).await;
    let images: Vec<_> = three
        .iter()
        .filter_map(|pod| pod.spec.as_ref()?.containers[0].image.clone())
        .collect();
    assert_eq!(images, ["worker:1"; 3]);
    serves(&space, "tiny", 3).await;
    // A change of the spec makes a new revision, as this operator renders it, and the old groups go.
    let changed = |spec: &mut Value| spec["engine"] = json!({ "maxStepTokens": 1024 });
    apply(&space, &model("tiny", changed)).await;
    space
        .until("the new revision", async || {
            let pods = pods(&space).await;
            let new = |pod: &Pod| {
                pod.spec
                    .as_ref()
                    .and_then(|spec| spec.containers[0].image.as_deref())
                    == Some("worker:2")
            };
            for pod in pods.iter().filter(|pod| new(pod)) {
                play(&space, pod, serving()).await;
            }
            (pods.len() == 2 && pods.iter().all(new)).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_crashes_is_started_again_and_then_quarantined() {
    let space = Space::new("crash").await;
    let _operator = Operator::start(&space, &["--no-leader-election"]);
    apply(&space, &model("tiny", |spec| spec["replicas"] = json!(1))).await;
    let first = pods_until(&space, "a pod", |pods| pods.len() == 1).await;
    play(&space, &first[0], crashed()).await;
    let uid = first[0].uid();
    let second = pods_until(&space, "another pod", |pods| {
        pods.len() == 1 && pods[0].uid() != uid
    })
    .await;
    assert!(
        second[0]
            .annotations()
            .contains_key("serving.swallow.dev/crashes")
    );
    assert_ne!(second[0].name_any(), first[0].name_any());
    play(&space, &second[0], crashed()).await;
    let model = told(&space, "tiny", "Quarantined", |model| {
        ready(model) == Some((ConditionStatus::False, "Quarantined"))
    })
    .await;
    let group = &model.status.expect("it has a status").groups[0];
    assert_eq!(group.state, GroupState::Quarantined);
    assert_eq!(group.message, "rank 1 is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_name_the_same_router_share_it() {
    let space = Space::new("share").await;
    let _operator = Operator::start(&space, &["--no-leader-election"]);
    let front = |spec: &mut Value| spec["router"] = json!({ "name": "front" });
    apply(&space, &model("a", front)).await;
    apply(&space, &model("b", front)).await;
    let api: Api<Deployment> = space.api();
    let router = |owners: usize| {
        let api = api.clone();
        async move || {
            let router = api.get_opt("front").await.expect("it is read")?;
            (router.owner_references().len() == owners).then_some(router)
        }
    };
    let shared = space.until("a router of two", router(2)).await;
    let args = format!("{:?}", shared.spec.and_then(|spec| spec.template.spec));
    assert!(
        args.contains("--discover=a=a-worker") && args.contains("--discover=b=b-worker"),
        "{args}"
    );
    space
        .models()
        .delete("a", &DeleteParams::background())
        .await
        .expect("it is deleted");
    let left = space.until("a router of one", router(1)).await;
    assert_eq!(left.owner_references()[0].name, "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_pod_security_refuses_is_said() {
    let space = Space::new("refuse").await;
    space.enforce_restricted().await;
    let _operator = Operator::start(&space, &["--no-leader-election"]);
    let host_path = |spec: &mut Value| {
        spec["model"]["source"] = json!({ "type": "HostPath", "hostPath": { "path": "/models" } });
    };
    apply(&space, &model("tiny", host_path)).await;
    let model = told(&space, "tiny", "Refused", |model| {
        ready(model) == Some((ConditionStatus::False, "Refused"))
    })
    .await;
    let conditions = model.status.expect("it has a status").conditions;
    let message = conditions
        .iter()
        .find(|one| one.kind == "Ready")
        .map(|one| &one.message);
    assert!(
        message.is_some_and(|message| message.contains("uses restricted volume type")),
        "{message:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_replica_works_and_another_takes_over() {
    let space = Space::new("lead").await;
    let lease = format!("--lease-namespace={}", space.name);
    let first = Operator::start(&space, &[&lease]);
    let leads = async |operator: &Operator| (operator.metric("is_leader").await? > 0.0).then_some(());
    space.until("a leader", async || leads(&first).await).await;
    let second = Operator::start(&space, &[&lease]);
    space
        .until("the other to stand by", async || second.metric("is_leader").await)
        .await;
    assert!(leads(&second).await.is_none(), "one works");
    first.stop(Duration::from_secs(10));
    space
        .until("the other to lead", async || leads(&second).await)
        .await;
    apply(&space, &model("tiny", |_| {})).await;
    pods_until(&space, "two pods", |pods| pods.len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_cannot_be_mounted_is_told() {
    let space = Space::new("mount").await;
    let _operator = Operator::start(&space, &["--no-leader-election"]);
    apply(&space, &model("tiny", |spec| spec["replicas"] = json!(1))).await;
    let pod = pods_until(&space, "a pod", |pods| pods.len() == 1)
        .await
        .remove(0);
    let scheduled =
        json!({ "phase": "Pending", "conditions": [{ "type": "PodScheduled", "status": "True" }] });
    play(&space, &pod, scheduled).await;
    let words = "MountVolume.SetUp failed for volume \"model\": no such export";
    let event: Event = serde_json::from_value(json!({
        "metadata": { "generateName": "tiny-" },
        "involvedObject": { "kind": "Pod", "namespace": space.name, "name": pod.name_any(), "uid": pod.uid() },
        "reason": "FailedMount", "message": words, "type": "Warning", "count": 1,
        "lastTimestamp": "2026-01-01T00:00:00Z", "source": { "component": "kubelet", "host": "n1" },
    }))
    .expect("it is an event");
    let events: Api<Event> = space.api();
    events
        .create(&PostParams::default(), &event)
        .await
        .expect("the event is taken");
    let seen = told(&space, "tiny", "Refused", |model| {
        ready(model) == Some((ConditionStatus::False, "Refused"))
    })
    .await;
    let group = &seen.status.expect("it has a status").groups[0];
    assert_eq!(
        (group.reason, group.message.as_str()),
        (Some(GroupReason::Refused), words)
    );
    // The next try succeeds, and the event is history.
    let mounted = json!({ "conditions": [
        { "type": "PodScheduled", "status": "True" },
        { "type": "PodReadyToStartContainers", "status": "True" },
    ] });
    play(&space, &pod, mounted).await;
    told(&space, "tiny", "Starting", |model| {
        ready(model) == Some((ConditionStatus::False, "Starting"))
    })
    .await;
}
