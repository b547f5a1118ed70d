//! What `swallow-operator plan` prints, applied by kubectl: the images, the pods' security, fetching, discovery and draining are
//! tried without anybody who would mend them.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use serde_json::json;
use swallow_tests::program;

use super::{
    goldens,
    serve::{self, golden_text_is_served},
};
use crate::harness::{Model, Space, Streams, Traffic};

/// Applies the plan of a model, and waits until its pods are ready.
fn apply_plan(space: &Space<'_>, mut model: Model) {
    model.0["metadata"]["namespace"] = json!(space.name);
    // The chart brings this role; its name is the plan's default.
    space.apply_value(&json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "swallow-router"},
        "rules": [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}],
    }));
    let mut child = Command::new(program("swallow-operator"))
        .args(["plan", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the operator was built");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(model.0.to_string().as_bytes()).expect("it reads");
    drop(stdin);
    let planned = child.wait_with_output().expect("it ends");
    assert!(planned.status.success(), "the model is sound");
    let objects = String::from_utf8(planned.stdout).expect("YAML is text");
    for line in objects.lines().take_while(|line| line.starts_with('#')) {
        println!("{line}");
    }
    space
        .cluster
        .kubectl_with(&["apply", "-f", "-"], &objects)
        .unwrap_or_else(|error| panic!("{error}"));
    space.kubectl(&["wait", "--for=condition=Ready", "pod", "--all", "--timeout=90s"]);
}

pub fn a_plan_that_is_applied_serves(space: &Space<'_>) {
    apply_plan(space, Model::tiny("tiny", 2));
    golden_text_is_served(&space.door("tiny-router"), "tiny");
}

/// A group is told to go and the router is replaced, both under open streams and steady traffic.
pub fn streams_outlive_their_group_and_their_router(space: &Space<'_>) {
    apply_plan(space, Model::tiny("tiny", 2));
    let door = space.door("tiny-router");
    let golden = &goldens()[0];
    let streams = Streams::open(&door, "tiny", 20, 1500);
    let traffic = Traffic::start(&door, "tiny", &golden.messages, &golden.answer);
    let pods = space.worker_pods("tiny");
    let leaving = pods[0]["metadata"]["name"].as_str().unwrap_or_default();
    space.kubectl(&["delete", "pod", leaving, "--wait=false"]);
    space.kubectl(&["rollout", "restart", "deployment", "tiny-router"]);
    space.kubectl(&["rollout", "status", "deployment", "tiny-router", "--timeout=120s"]);
    space.tell(format!(
        "{} of 20 streams were open when a group drained and another router served",
        streams.open_now()
    ));
    let n = traffic.stop();
    space.tell(format!("{n} requests meanwhile, none failed"));
    streams.finish();
}

pub fn a_fetched_model_serves_under_restricted_security(space: &Space<'_>) {
    let (model, _mirror) = serve::fetched(space, None);
    apply_plan(space, model);
    golden_text_is_served(&space.door("fetched-router"), "fetched");
}

pub fn a_claimed_model_serves_under_restricted_security(space: &Space<'_>) {
    apply_plan(space, serve::claimed(space));
    golden_text_is_served(&space.door("claimed-router"), "claimed");
    serve::unclaim(space);
}
