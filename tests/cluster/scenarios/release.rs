//! The chart's own life leaves the models' alone.

use std::process::Command;

use serde_json::Value;
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

pub fn an_upgrade_and_an_uninstall_leave_models_alone(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.until_settled("tiny");
    let before = uids(&space.worker_pods("tiny"));
    let door = space.door("tiny-router");
    let streams = Streams::open(&door, "tiny", 10, LONG);

    // Another default image is what an upgrade of the operator brings; a model that exists keeps its own.
    let other = "workerImage=swallow-worker:of-another-version";
    space
        .cluster
        .install(&["--set", other])
        .expect("the chart can be upgraded");
    space.until_settled("tiny");
    assert_eq!(
        uids(&space.worker_pods("tiny")),
        before,
        "an upgrade restarts no worker"
    );
    space.cluster.install(&[]).expect("the chart can be upgraded");
    space.until_settled("tiny");

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
