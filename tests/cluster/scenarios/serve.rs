//! A model that is applied is served: golden text from outside, by both protocols.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use serde_json::json;
use swallow_tests::root;

use super::goldens;
use crate::harness::{Door, Model, Space, fixture};

/// This machine, on the nodes' bridge.
const HOST: &str = "10.250.0.1";
const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";

/// Every golden answer over gRPC, and some over HTTP, where each costs a process.
pub fn golden_text_is_served(door: &Door, model: &str) {
    let goldens = goldens();
    assert!(goldens.len() > 20, "only {} goldens", goldens.len());
    for golden in &goldens {
        assert_eq!(door.chat(model, &golden.messages).as_ref(), Ok(&golden.answer));
    }
    for golden in goldens.iter().step_by(8) {
        assert_eq!(
            door.chat_http(model, &golden.messages).as_ref(),
            Ok(&golden.answer)
        );
    }
}

pub fn a_model_serves_golden_text(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "swallowmodel/tiny",
        "--timeout=60s",
    ]);
    let model = space.until_settled("tiny");
    assert_eq!(model["status"]["readyReplicas"], 2);
    for group in model["status"]["groups"].as_array().into_iter().flatten() {
        let kv = group["memory"]["kvCacheBytes"].as_u64().unwrap_or_default();
        assert!(
            (250 << 20..=256 << 20).contains(&kv),
            "256 MiB of keys and values in whole blocks: {group}"
        );
    }

    let pods = space.worker_pods("tiny");
    let nodes: BTreeSet<&str> = pods
        .iter()
        .filter_map(|pod| pod["spec"]["nodeName"].as_str())
        .collect();
    assert_eq!(
        (pods.len(), nodes.len()),
        (2, 2),
        "one pod for each group, on different nodes"
    );
    golden_text_is_served(&space.door("tiny-router"), "tiny");

    let table = space.kubectl(&["get", "swallowmodels"]);
    for line in table.lines() {
        space.tell(line);
    }
    print!("{}", space.kubectl(&["get", "pods", "-o", "wide"]));
    print!("{}", space.kubectl(&["describe", "swallowmodel", "tiny"]));
    print!(
        "{}",
        space.kubectl(&[
            "get",
            "events",
            "--field-selector",
            "involvedObject.kind=SwallowModel"
        ])
    );
    let explained = space.kubectl(&["explain", "swallowmodel.spec.rollout.maxSurge"]);
    assert!(explained.contains("maxSurge is how many groups"), "{explained}");
}

/// A Hugging Face endpoint on this machine, for as long as it is held.
pub struct Mirror(Child);

impl Mirror {
    fn start(stall: Option<&str>) -> (Self, u16) {
        let mut child = Command::new("python3")
            .arg(root().join("tests/cluster/mirror.py"))
            .args([HOST, "swallow/tiny", REVISION])
            .arg(fixture())
            .args(stall)
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is installed");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("it prints its port");
        let port = line.trim().parse().expect("a port");
        (Self(child), port)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn restrict(space: &Space<'_>) {
    let label = "pod-security.kubernetes.io/enforce=restricted";
    space.kubectl(&["label", "namespace", &space.name, label]);
}

/// A model in a volume, in a namespace that enforces restricted pods.
pub fn claimed(space: &Space<'_>) -> Model {
    restrict(space);
    let size = json!({"storage": "1Gi"});
    space.apply_value(&json!({
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": space.name},
        "spec": {
            "capacity": size, "accessModes": ["ReadOnlyMany"], "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": fixture(), "type": "Directory"},
            "claimRef": {"namespace": space.name, "name": "models"},
        },
    }));
    space.apply_value(&json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"},
        "spec": {
            "accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": space.name,
            "resources": {"requests": size},
        },
    }));
    let source = json!({"type": "PersistentVolumeClaim", "persistentVolumeClaim": {"claimName": "models"}});
    Model::tiny("claimed", 1).with("model.source", source)
}

/// Removes the volume, which has no namespace that would take it along.
pub fn unclaim(space: &Space<'_>) {
    space.kubectl(&["delete", "persistentvolume", &space.name, "--wait=false"]);
}

pub fn a_claimed_model_serves_under_restricted_security(space: &Space<'_>) {
    space.apply(&claimed(space));
    space.until_settled("claimed");
    golden_text_is_served(&space.door("claimed-router"), "claimed");
    unclaim(space);
}

/// A model at a mirror, in a namespace that enforces restricted pods; and the mirror. It has a name of the cluster, so
/// nothing but the cluster's own DNS and Service is needed to reach it. Its first answer for the file `stall` never ends.
pub fn fetched(space: &Space<'_>, stall: Option<&str>) -> (Model, Mirror) {
    restrict(space);
    let (mirror, port) = Mirror::start(stall);
    space.apply_value(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "mirror"},
        "spec": {"ports": [{"name": "http", "port": 80, "targetPort": port}]},
    }));
    space.apply_value(&json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "mirror-1", "labels": {"kubernetes.io/service-name": "mirror"}},
        "ports": [{"name": "http", "port": port}],
        "endpoints": [{"addresses": [HOST]}],
    }));
    let source = json!({
        "type": "HuggingFace",
        "huggingFace": {
            "repo": "swallow/tiny",
            "revision": REVISION,
            "endpoint": format!("http://mirror.{}.svc", space.name),
        },
    });
    (Model::tiny("fetched", 1).with("model.source", source), mirror)
}

pub fn a_fetched_model_serves_under_restricted_security(space: &Space<'_>) {
    let (model, _mirror) = fetched(space, None);
    space.apply(&model);
    space.until_settled("fetched");
    golden_text_is_served(&space.door("fetched-router"), "fetched");
}

/// Two share an address, and one beside them has its own.
pub fn two_models_stand_behind_one_router(space: &Space<'_>) {
    space.apply(&Model::tiny("own", 1));
    for name in ["one", "two"] {
        space.apply(&Model::tiny(name, 1).with("router.name", json!("shared")));
    }
    for name in ["own", "one", "two"] {
        space.until_settled(name);
    }
    let (door, own) = (space.door("shared"), space.door("own-router"));
    let golden = &goldens()[0];
    assert_eq!(own.chat("own", &golden.messages).as_ref(), Ok(&golden.answer));
    own.chat("one", &golden.messages)
        .expect_err("that one is at another address");
    for name in ["one", "two"] {
        assert_eq!(door.chat(name, &golden.messages).as_ref(), Ok(&golden.answer));
    }
    let deployments = space.kubectl(&["get", "deployments", "-o", "name"]);
    assert_eq!(
        deployments.trim(),
        "deployment.apps/own-router\ndeployment.apps/shared"
    );

    space.kubectl(&["delete", "swallowmodel", "one", "--timeout=60s"]);
    assert_eq!(door.chat("two", &golden.messages).as_ref(), Ok(&golden.answer));
    space.kubectl(&["delete", "swallowmodel", "two", "--timeout=60s"]);
    space.kubectl(&[
        "wait",
        "--for=delete",
        "deployment/shared",
        "service/shared",
        "--timeout=90s",
    ]);
}
