//! What breaks comes back, and clients are served meanwhile.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::goldens;
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
