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
