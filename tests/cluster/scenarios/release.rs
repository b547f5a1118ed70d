//! The chart's own life leaves the models' alone.

use std::process::Command;

use serde_json::{Value, json};
use swallow_tests::root;

use super::{LONG, goldens};
use crate::harness::{Model, RELEASE, SYSTEM, Space, Streams};

fn uids(pods: &[Value]) -> Vec<String> {
    let mut uids: Vec<String> = pods
        .iter()
        .filter_map(|pod| pod["metadata"]["uid"].as_str().map(str::to_owned))
        .collect();
    uids.sort();
    uids
}

/// What the other operator adds.
const RENDERING: &str = "serving.swallow.dev/rendering";

/// The routers' pods.
fn routers(space: &Space<'_>) -> Vec<String> {
    let list = space
        .json(&["get", "pods", "-l", "serving.swallow.dev/role=router"])
        .expect("pods can be listed");
    uids(list["items"].as_array().map_or(&[], Vec::as_slice))
}

/// What each group has of that label.
fn renderings(space: &Space<'_>) -> Vec<Option<String>> {
    let pods = space.worker_pods("tiny");
    let label = |pod: &Value| pod["metadata"]["labels"][RENDERING].as_str().map(str::to_owned);
    pods.iter().map(label).collect()
}

pub fn an_upgrade_and_an_uninstall_leave_models_alone(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.until_settled("tiny");
    let before = uids(&space.worker_pods("tiny"));
    let routers_before = routers(space);
    let door = space.door("tiny-router");
    let streams = Streams::open(&door, "tiny", 10, LONG);

    // Another version has other default images, and renders otherwise; a model that exists keeps what it has.
    let tag = space
        .cluster
        .load_another_operator()
        .expect("it can be built and loaded");
    let values = [
        format!("image.tag={tag}"),
        format!("workerImage=swallow-worker:{tag}"),
    ];
    space
        .cluster
        .install(&["--set", &values[0], "--set", &values[1]])
        .expect("the chart can be upgraded");
    space.until_model("tiny", "the other operator has looked", |_| {
        let accounts = space.json(&["get", "serviceaccounts", "tiny-worker"])?;
        (accounts["metadata"]["labels"][RENDERING] == "another")
            .then_some(())
            .ok_or_else(|| "as it was".into())
    });
    space.until_settled("tiny");
    assert_eq!(
        uids(&space.worker_pods("tiny")),
        before,
        "an upgrade restarts no worker"
    );
    assert_eq!(routers(space), routers_before, "and no router");
    // A further group of the same revision is as its siblings are; a change of the spec is rendered anew.
    space.kubectl(&["scale", "swallowmodel", "tiny", "--replicas=3"]);
    space.until_settled("tiny");
    assert_eq!(renderings(space), [None, None, None]);
    space.kubectl(&["scale", "swallowmodel", "tiny", "--replicas=2"]);
    streams.finish();
    space.until_settled("tiny");
    let image = format!("swallow-worker:{}", env!("CARGO_PKG_VERSION"));
    space.patch(
        "tiny",
        &json!({"spec": {"engine": {"maxStepTokens": 256, "image": image}}}),
    );
    space.until_settled("tiny");
    let another = || Some("another".to_owned());
    assert_eq!(renderings(space), [another(), another()]);

    space.cluster.install(&[]).expect("the chart can be upgraded");
    space.until_settled("tiny");
    let before = uids(&space.worker_pods("tiny"));
    let streams = Streams::open(&door, "tiny", 10, LONG);

    space
        .cluster
        .helm(&["uninstall", RELEASE, "-n", SYSTEM, "--wait"])
        .expect("it is installed");
    let golden = &goldens()[0];
    assert_eq!(door.chat("tiny", &golden.messages).as_ref(), Ok(&golden.answer));
    space.tell(format!(
        "{} of 10 streams were open after the uninstall",
        streams.open_now()
    ));
    streams.finish();
    assert_eq!(
        uids(&space.worker_pods("tiny")),
        before,
        "an uninstall keeps models"
    );
    space.kubectl(&["get", "swallowmodel", "tiny"]);

    space.cluster.install(&[]).expect("it can be installed again");
    space.kubectl(&["scale", "swallowmodel", "tiny", "--replicas=3"]);
    space.until_settled("tiny");
    let after = uids(&space.worker_pods("tiny"));
    assert!(
        before.iter().all(|uid| after.contains(uid)),
        "the new operator takes over what it finds"
    );
}

/// People who build images with docker or buildah get ours.
pub fn the_containerfile_builds(space: &Space<'_>) {
    let storage = space.cluster.folder("buildah");
    let layers = space.cluster.layers();
    for program in ["swallow-operator", "swallow-router", "swallow-worker"] {
        let mut build = Command::new("buildah");
        build
            .arg("--root")
            .arg(storage.join("root"))
            .arg("--runroot")
            .arg(storage.join("run"));
        build.args([
            "--storage-driver",
            "vfs",
            "build",
            "--isolation",
            "chroot",
            "--target",
            program,
        ]);
        build
            .arg("--file")
            .arg(root().join("deploy/images/Containerfile"))
            .arg(&layers);
        let done = build.output().expect("buildah is installed");
        assert!(
            done.status.success(),
            "{program}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
}
