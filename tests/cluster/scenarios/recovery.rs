//! What breaks comes back, and clients are served meanwhile.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{goldens, serve};
use crate::harness::{Model, Space, Traffic, group_reasons, until};

fn names(pods: &[Value]) -> BTreeSet<String> {
    pods.iter()
        .filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned))
        .collect()
}

fn on<'v>(pods: &'v [Value], node: &str) -> &'v Value {
    pods.iter()
        .find(|pod| pod["spec"]["nodeName"] == node)
        .unwrap_or_else(|| panic!("no worker on {node}"))
}

pub fn a_killed_worker_comes_back(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.until_settled("tiny");
    let pods = space.worker_pods("tiny");
    let golden = &goldens()[0];
    let traffic = Traffic::start(
        &space.door("tiny-router"),
        "tiny",
        &golden.messages,
        &golden.answer,
    );
    let uid = pods[0]["metadata"]["uid"].as_str().unwrap_or_default();
    let pid = space.cluster.pid(uid, "swallow-worker");
    let start = Instant::now();
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
    space.until_model("tiny", "the loss is seen", |model| {
        if model["status"]["readyReplicas"] == 1 {
            Ok(())
        } else {
            Err("two serve".into())
        }
    });
    space.tell(format!("said after {:.1} s", start.elapsed().as_secs_f64()));
    space.until_settled("tiny");
    space.tell(format!(
        "serves again after {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    let n = traffic.stop();
    space.tell(format!("{n} requests meanwhile, none failed"));
    let kept = pods[1]["metadata"]["uid"].clone();
    let left_alone = space
        .worker_pods("tiny")
        .iter()
        .any(|pod| pod["metadata"]["uid"] == kept);
    assert!(left_alone, "the other group was left alone");
}

pub fn a_drained_node_is_left(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.until_settled("tiny");
    let golden = &goldens()[0];
    let traffic = Traffic::start(
        &space.door("tiny-router"),
        "tiny",
        &golden.messages,
        &golden.answer,
    );
    let selector = "--pod-selector=serving.swallow.dev/model=tiny";
    let drained = space.cluster.kubectl(&[
        "drain",
        "n2",
        "--timeout=90s",
        "--delete-emptydir-data",
        "--force",
        selector,
    ]);
    let outcome = drained.map(|_| {
        space.until_settled("tiny");
    });
    space
        .cluster
        .kubectl(&["uncordon", "n2"])
        .expect("the node is there");
    outcome.expect("the node can be drained");
    let n = traffic.stop();
    space.tell(format!("{n} requests meanwhile, none failed"));
    let pods = space.worker_pods("tiny");
    assert!(
        pods.iter().all(|pod| pod["spec"]["nodeName"] == "n1"),
        "all groups are on the other node"
    );
}

pub fn a_lost_node_is_replaced(space: &Space<'_>) {
    // The router stays on the node that stays.
    let cordon = |word: &str| space.cluster.kubectl(&[word, "n2"]).expect("the node is there");
    cordon("cordon");
    space.apply(&Model::tiny("tiny", 1));
    space.until_settled("tiny");
    cordon("uncordon");
    space.kubectl(&["scale", "swallowmodel", "tiny", "--replicas=2"]);
    space.until_settled("tiny");
    let pods = space.worker_pods("tiny");
    let lost = on(&pods, "n2")["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let start = Instant::now();
    space.cluster.node("kill", "n2", 3);
    let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let model = space.until_model("tiny", "status names the lost node", |model| {
            let told = group_reasons(model).iter().any(|group| group.1 == "NodeLost");
            told.then_some(()).ok_or_else(|| "no NodeLost".into())
        });
        space.tell(format!(
            "status said NodeLost after {:.0} s",
            start.elapsed().as_secs_f64()
        ));
        drop(model);
        until("a new group serves", Duration::from_secs(90), || {
            let model = space.json(&["get", "swallowmodel", "tiny"])?;
            let new = names(&space.worker_pods("tiny"))
                .into_iter()
                .any(|name| name != lost && !names(&pods).contains(&name));
            if new && model["status"]["readyReplicas"] == 2 {
                Ok(())
            } else {
                Err(model["status"].to_string())
            }
        });
        let took = start.elapsed().as_secs_f64();
        space.tell(format!(
            "a group of another name served on the other node {took:.0} s after the node's death"
        ));
        assert!(took < 90.0);
    }));
    space.cluster.node("start", "n2", 3);
    if let Err(panic) = seen {
        std::panic::resume_unwind(panic);
    }
    space.until_settled("tiny");
}

/// A start that stands still is ended by the kubelet at the operator's word, and tried again.
pub fn a_stalled_start_is_begun_again(space: &Space<'_>) {
    let (model, _mirror) = serve::fetched(space, Some("model-00002-of-00002.safetensors"));
    let model = model.with("rollout", json!({"startupProgressTimeoutSeconds": 10}));
    space.apply(&model);
    let start = Instant::now();
    let seen = space.until_model("fetched", "the progress is told in bytes", |model| {
        let progress = &model["status"]["groups"][0]["progress"];
        let count = |name: &str| progress[name].as_u64().unwrap_or_default();
        let partly = 0 < count("bytesDone") && count("bytesDone") < count("bytesTotal");
        partly.then_some(()).ok_or_else(|| "no bytes".into())
    });
    let group = &seen["status"]["groups"][0];
    space.tell(format!("{}: {}", group["state"], group["progress"]));
    assert_eq!(group["state"], "Fetching");
    let stalled = space.worker_pods("fetched")[0]["metadata"]["name"].clone();
    let seen = space.until_model("fetched", "the stall is told", |model| {
        let told = group_reasons(model)
            .into_iter()
            .any(|group| group.1 == "StartupStalled");
        told.then_some(()).ok_or_else(|| "not told".into())
    });
    space.tell(format!(
        "after {:.0} s: {}",
        start.elapsed().as_secs_f64(),
        group_reasons(&seen)[0].2
    ));
    space.until_settled("fetched");
    space.tell(format!("served after {:.0} s", start.elapsed().as_secs_f64()));
    serve::golden_text_is_served(&space.door("fetched-router"), "fetched");
    let names = names(&space.worker_pods("fetched"));
    assert!(
        !names.contains(stalled.as_str().unwrap_or_default()),
        "another pod serves"
    );
    let restarts = space
        .json(&["get", "swallowmodel", "fetched"])
        .map(|model| model["status"]["groups"][0]["restarts"].clone());
    assert_eq!(restarts, Ok(json!(1)));
}
