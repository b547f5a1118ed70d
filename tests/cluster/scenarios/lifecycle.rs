//! Suspended, woken and deleted.

use std::time::Duration;

use serde_json::json;

use super::{goldens, serve::golden_text_is_served};
use crate::harness::{Model, Space, Streams, condition, until};

pub fn a_suspended_model_comes_back(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 1));
    space.until_settled("tiny");
    let door = space.door("tiny-router");
    let streams = Streams::open(&door, "tiny", 4, 1000);
    space.patch("tiny", &json!({"spec": {"suspend": true}}));
    streams.finish();
    let model = space.until_model("tiny", "no group is left", |model| {
        if model["status"]["replicas"] == 0 {
            Ok(())
        } else {
            Err("groups are left".into())
        }
    });
    assert_eq!(condition(&model, "Ready").0, "False");
    space.tell(format!("suspended: Ready=False {}", condition(&model, "Ready").1));
    space.patch("tiny", &json!({"spec": {"suspend": false}}));
    space.until_settled("tiny");
    let golden = &goldens()[0];
    assert_eq!(door.chat("tiny", &golden.messages).as_ref(), Ok(&golden.answer));
}

/// Everything of ours in the namespace; the namespace's own account and certificate are not.
fn ours(space: &Space<'_>) -> Vec<String> {
    let kinds = "pods,services,deployments,replicasets,endpointslices,serviceaccounts,poddisruptionbudgets,\
                 controllerrevisions,rolebindings,roles,secrets,configmaps,swallowmodels";
    space
        .kubectl(&["get", kinds, "-o", "name"])
        .lines()
        .filter(|name| !["serviceaccount/default", "configmap/kube-root-ca.crt"].contains(name))
        .map(str::to_owned)
        .collect()
}

pub fn a_deleted_model_leaves_nothing(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.until_settled("tiny");
    golden_text_is_served(&space.door("tiny-router"), "tiny");
    space.tell(format!("a served model is {} objects", ours(space).len()));
    space.kubectl(&["delete", "swallowmodel", "tiny", "--timeout=60s"]);
    until("nothing of ours is left", Duration::from_secs(90), || {
        let left = ours(space);
        if left.is_empty() {
            Ok(())
        } else {
            Err(left.join(" "))
        }
    });
}

/// Somebody's finalizer holds a deleted model up: the router goes first, then the groups, and open streams end well.
pub fn a_deletion_that_is_held_up_ends_in_good_order(space: &Space<'_>) {
    let mut model = Model::tiny("tiny", 1);
    model.0["metadata"]["finalizers"] = json!(["example.com/hold"]);
    space.apply(&model);
    space.until_settled("tiny");
    let streams = Streams::open(&space.door("tiny-router"), "tiny", 6, 1500);
    space.kubectl(&["delete", "swallowmodel", "tiny", "--wait=false"]);
    let (mut workers, mut routers) = (1, 1);
    until("no pod is left", Duration::from_secs(90), || {
        let pods = space.json(&["get", "pods"])?;
        let count = |role: &str| {
            let pods = pods["items"].as_array().into_iter().flatten();
            pods.filter(|pod| pod["metadata"]["labels"]["serving.swallow.dev/role"] == role)
                .count()
        };
        (workers, routers) = (count("worker"), count("router"));
        assert!(workers > 0 || routers == 0, "the groups went before the router");
        if workers + routers == 0 {
            Ok(())
        } else {
            Err(format!("{workers} groups and {routers} routers"))
        }
    });
    streams.finish();
    let held = space
        .json(&["get", "swallowmodel", "tiny"])
        .expect("it is held up");
    assert_eq!(condition(&held, "Ready").1, "Deleting");
    let release = json!({"metadata": {"finalizers": null}}).to_string();
    space.kubectl(&["patch", "swallowmodel", "tiny", "--type=merge", "-p", &release]);
    until("nothing of ours is left", Duration::from_secs(90), || {
        let left = ours(space);
        left.is_empty().then_some(()).ok_or_else(|| left.join(" "))
    });
}

/// What a model owns can be kept: `--cascade=orphan` deletes the model alone, and clients are served on.
pub fn an_orphaned_deployment_serves_on(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 1));
    space.until_settled("tiny");
    let door = space.door("tiny-router");
    let before = space.worker_pods("tiny")[0]["metadata"]["uid"].clone();
    space.kubectl(&[
        "delete",
        "swallowmodel",
        "tiny",
        "--cascade=orphan",
        "--timeout=60s",
    ]);
    let golden = &goldens()[0];
    assert_eq!(door.chat("tiny", &golden.messages).as_ref(), Ok(&golden.answer));
    assert_eq!(space.worker_pods("tiny")[0]["metadata"]["uid"], before);
}
