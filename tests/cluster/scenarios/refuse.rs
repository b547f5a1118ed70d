//! What cannot be served is said in one line: by the API server where it can know, else in the status.

use std::fs;

use serde_json::{Value, json};
use swallow_tests::root;

use super::serve::golden_text_is_served;
use crate::harness::{Model, Space, condition, fixture, group_reasons, now, operator_uses};

/// Waits until some group gives this reason; its message.
pub fn until_reason(space: &Space<'_>, model: &str, reason: &str) -> String {
    let found = space.until_model(model, reason, |model| {
        let told = group_reasons(model).iter().any(|group| group.1 == reason);
        told.then_some(()).ok_or_else(|| format!("no {reason}"))
    });
    let message = group_reasons(&found)
        .into_iter()
        .find(|group| group.1 == reason)
        .map(|group| group.2);
    let message = message.unwrap_or_default();
    space.tell(format!("{model}: {reason}: {message}"));
    message
}

/// By the API server itself, in the words of the resource's own rules, and `kubectl explain` says what is right.
pub fn an_invalid_model_is_refused_in_plain_words(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 1).with("suspend", json!(true)));
    let changes: [(Value, &str); 3] = [
        (
            json!({"rollout": {"maxSurge": 0, "maxUnavailable": 0}}),
            "maxSurge and maxUnavailable cannot both be zero: no group could ever be replaced",
        ),
        (
            json!({"router": {"name": "other"}}),
            "name is immutable, because clients know the address",
        ),
        (
            json!({"engine": {"maxStepTokens": 1}}),
            "maxStepTokens must be at least maxConcurrentSequences",
        ),
    ];
    for (change, words) in changes {
        let patch = json!({"spec": change}).to_string();
        let refused = space.try_kubectl(&["patch", "swallowmodel", "tiny", "--type=merge", "-p", &patch]);
        let error = refused.expect_err("it is invalid");
        assert!(error.contains(words), "'{words}' is not in: {error}");
    }
    let explained = space.kubectl(&["explain", "swallowmodel.spec.rollout.maxSurge"]);
    assert!(explained.contains("maxSurge is how many groups"), "{explained}");
    let samples = root().join("deploy/models").display().to_string();
    space.kubectl(&["apply", "--dry-run=server", "-f", &samples]);
}

pub fn what_is_wrong_is_said(space: &Space<'_>) {
    let broken = space.cluster.folder("broken");
    for file in fs::read_dir(fixture()).expect("the fixture is there").flatten() {
        let mut bytes = fs::read(file.path()).expect("the fixture can be read");
        if file.file_name() == "model-00002-of-00002.safetensors" {
            bytes.truncate(bytes.len() / 2);
        }
        fs::write(broken.join(file.file_name()), bytes).expect("the folder is ours");
    }
    let no_retry = json!({"maxRestarts": 0});
    space.apply(&Model::at("broken", 1, &broken).with("recovery", no_retry.clone()));
    space
        .apply(&Model::tiny("absent", 1).with("engine.image", json!("registry.invalid/swallow-worker:none")));
    let message = until_reason(space, "broken", "BadCheckpoint");
    assert!(
        message.contains("model-00002-of-00002.safetensors"),
        "the worker's own line: {message}"
    );
    space.apply(&Model::at("nowhere", 1, std::path::Path::new("/no/such/folder")));
    let message = until_reason(space, "nowhere", "Refused");
    assert!(
        message.contains("/no/such/folder"),
        "the kubelet's own words: {message}"
    );
    let message = until_reason(space, "absent", "ImagePull");
    assert!(message.contains("registry.invalid"), "{message}");
}

fn patch_gpus(space: &Space<'_>, operation: &Value) {
    let patch = json!([operation]).to_string();
    let words = [
        "patch",
        "node",
        "n2",
        "--subresource=status",
        "--type=json",
        "-p",
        &patch,
    ];
    space.cluster.kubectl(&words).expect("the node is there");
}

/// How many worker pods hold a place on a node now; one that ended gave it back.
fn bound(space: &Space<'_>) -> usize {
    let pods = space.worker_pods("gpu");
    pods.iter()
        .filter(|pod| !pod["spec"]["nodeName"].is_null() && pod["status"]["phase"] != "Failed")
        .count()
}

pub fn gpus_that_are_short_are_named(space: &Space<'_>) {
    let model = Model::tiny("gpu", 2)
        .with("accelerator", json!({"device": "GPU", "deviceMemory": "80Gi"}))
        .with(
            "recovery",
            json!({"maxRestarts": 1, "backoff": {"initialSeconds": 0}}),
        );
    space.apply(&model);
    let message = until_reason(space, "gpu", "Unschedulable");
    assert!(message.contains("nvidia.com/gpu"), "{message}");

    let path = "/status/capacity/nvidia.com~1gpu";
    patch_gpus(space, &json!({"op": "add", "path": path, "value": "2"}));
    let mut most = 0;
    let quarantined = space.until_model("gpu", "a group is quarantined", |model| {
        most = most.max(bound(space));
        let found = group_reasons(model).iter().any(|group| group.0 == "Quarantined");
        found.then_some(()).ok_or_else(|| "none".into())
    });
    patch_gpus(space, &json!({"op": "remove", "path": path}));
    assert!(
        most <= 1,
        "two GPUs hold one group of two at a time, and {most} were there"
    );
    let groups = group_reasons(&quarantined);
    for (state, reason, message) in &groups {
        space.tell(format!("{state} {reason}: {message}"));
    }
    let down = groups
        .iter()
        .find(|group| group.0 == "Quarantined")
        .expect("it was seen");
    assert!(
        down.2.to_lowercase().contains("cuda"),
        "the worker's own line: {}",
        down.2
    );
    assert_eq!(condition(&quarantined, "RecoveryHealthy").0, "False");
}

/// An operator that may not read nodes serves as ever, asks for none, and says why a group has no place in the words of
/// the scheduler.
pub fn without_a_right_to_nodes_the_scheduler_is_quoted(space: &Space<'_>) {
    let install = |values: &[&str]| {
        space.cluster.install(values).expect("the chart can be upgraded");
    };
    install(&["--set", "rbac.readNodes=false"]);
    let start = now();
    space.apply(&Model::tiny("tiny", 1));
    space.apply(&Model::tiny("gpu", 1).with("accelerator", json!({"device": "GPU", "deviceMemory": "80Gi"})));
    let message = until_reason(space, "gpu", "Unschedulable");
    assert!(
        message.contains("nodes are available") && !message.contains("is short by"),
        "{message}"
    );
    space.until_settled("tiny");
    golden_text_is_served(&space.door("tiny-router"), "tiny");
    let (used, refused) = operator_uses(space.cluster, &start);
    assert!(refused.is_empty(), "{refused:?}");
    assert!(
        !used.is_empty() && used.iter().all(|one| one.resource != "/nodes"),
        "{used:?}"
    );
    install(&[]);
}
