//! A change of the spec replaces groups under open streams, whatever happens meanwhile.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{LONG, goldens};
use crate::harness::{Model, SYSTEM, Space, Streams, Traffic, until};

/// How many worker pods are ready, the leaving ones excluded.
fn ready(space: &Space<'_>) -> usize {
    let is_ready = |pod: &&Value| {
        pod["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    };
    space.worker_pods("tiny").iter().filter(is_ready).count()
}

/// Waits until the change is through; the fewest ready groups on the way.
fn roll(space: &Space<'_>, patch: &Value) -> usize {
    let before = space.json(&["get", "swallowmodel", "tiny"]).expect("it exists");
    space.patch("tiny", patch);
    let mut fewest = usize::MAX;
    until("the rollout", Duration::from_secs(180), || {
        fewest = fewest.min(ready(space));
        let model = space.json(&["get", "swallowmodel", "tiny"])?;
        let status = &model["status"];
        let replicas = &model["spec"]["replicas"];
        let is_through = status["observedGeneration"] == model["metadata"]["generation"]
            && status["updateRevision"] != before["status"]["updateRevision"]
            && [
                &status["replicas"],
                &status["readyReplicas"],
                &status["updatedReplicas"],
            ]
            .iter()
            .all(|n| *n == replicas);
        if is_through {
            Ok(())
        } else {
            Err(status.to_string())
        }
    });
    fewest
}

pub fn streams_survive_a_change(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2).with("rollout", json!({"maxSurge": 1, "maxUnavailable": 0})));
    space.until_settled("tiny");
    let streams = Streams::open(&space.door("tiny-router"), "tiny", 20, LONG);
    let fewest = roll(space, &json!({"spec": {"engine": {"maxStepTokens": 256}}}));
    space.tell(format!("never fewer than {fewest} of 2 groups ready; 2 allowed"));
    streams.finish();
    assert!(fewest >= 2, "maxUnavailable is 0, and {fewest} groups were ready");
}

/// Each group fills a node, so that none fits beside the two there are.
pub fn a_change_without_room_drains_first(space: &Space<'_>) {
    let size = json!({"requests": {"cpu": "1200m"}});
    space.apply(&Model::tiny("tiny", 2).with("resources", size));
    space.until_settled("tiny");
    let streams = Streams::open(&space.door("tiny-router"), "tiny", 20, LONG);
    let fewest = roll(space, &json!({"spec": {"engine": {"maxStepTokens": 256}}}));
    space.tell(format!("never fewer than {fewest} of 2 groups ready; 1 allowed"));
    streams.finish();
    assert!(fewest >= 1, "maxUnavailable is 1, and {fewest} groups were ready");
}

pub fn a_killed_operator_leaves_a_rollout_to_the_next(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    let old = space.until_settled("tiny")["status"]["updateRevision"].clone();
    let streams = Streams::open(&space.door("tiny-router"), "tiny", 20, LONG);
    space.patch("tiny", &json!({"spec": {"engine": {"maxStepTokens": 256}}}));
    until("the first new group", Duration::from_secs(30), || {
        let pods = space.worker_pods("tiny");
        let is_new = |pod: &Value| pod["metadata"]["labels"]["serving.swallow.dev/revision"] != old;
        pods.iter()
            .any(is_new)
            .then_some(())
            .ok_or_else(|| "only old pods".into())
    });
    let list = [
        "-n",
        SYSTEM,
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/name=swallow-operator",
    ];
    let operators = space.cluster.json(&list).expect("the operator runs");
    for pod in operators["items"].as_array().into_iter().flatten() {
        let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
        let pid = space.cluster.pid(uid, "swallow-operator");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
    }
    space.until_model("tiny", "another operator finishes", |model| {
        let status = &model["status"];
        let through = status["updateRevision"] != old
            && status["updatedReplicas"] == 2
            && status["readyReplicas"] == 2
            && status["replicas"] == 2;
        through.then_some(()).ok_or_else(|| "not through".into())
    });
    streams.finish();
}

/// Two routers share the groups; each is replaced while it holds streams, and a client that comes meanwhile is served.
pub fn replaced_routers_finish_their_streams(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2).with("router.replicas", json!(2)));
    space.until_settled("tiny");
    let door = space.door("tiny-router");
    let streams = Streams::open(&door, "tiny", 20, LONG / 2);
    let golden = &goldens()[0];
    let traffic = Traffic::start(&door, "tiny", &golden.messages, &golden.answer);
    space.kubectl(&["rollout", "restart", "deployment", "tiny-router"]);
    space.kubectl(&["rollout", "status", "deployment", "tiny-router", "--timeout=120s"]);
    space.tell(format!(
        "{} of 20 streams were open when both routers were replaced",
        streams.open_now()
    ));
    let n = traffic.stop();
    space.tell(format!("{n} requests meanwhile, none failed"));
    streams.finish();
}

/// Records of revisions that no group is of are kept for a way back, and not for ever.
pub fn old_revisions_are_forgotten(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 1));
    space.until_settled("tiny");
    let records = || {
        space
            .kubectl(&["get", "controllerrevisions", "-o", "name"])
            .lines()
            .count()
    };
    for tokens in [256, 272, 288, 304, 320] {
        let revision =
            space.json(&["get", "swallowmodel", "tiny"]).expect("it exists")["status"]["updateRevision"]
                .clone();
        space.patch("tiny", &json!({"spec": {"engine": {"maxStepTokens": tokens}}}));
        space.until_model("tiny", "a group of the new revision", |model| {
            let new = &model["status"]["updateRevision"];
            let groups = model["status"]["groups"].as_array().into_iter().flatten();
            let there = *new != revision && groups.into_iter().any(|group| group["revision"] == *new);
            there.then_some(()).ok_or_else(|| "none".into())
        });
    }
    space.until_settled("tiny");
    until("the oldest records go", Duration::from_secs(30), || {
        let n = records();
        // The one in use, and three to go back to.
        if n == 4 {
            Ok(())
        } else {
            Err(format!("{n} records"))
        }
    });
}
