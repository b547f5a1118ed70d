//! Groups come and go while clients are served.

use std::time::Duration;

use serde_json::json;

use super::LONG;
use crate::harness::{Model, Space, Streams, group_reasons, until};

pub fn streams_survive_scaling(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.until_settled("tiny");
    let door = space.door("tiny-router");
    let streams = Streams::open(&door, "tiny", 20, LONG);
    space.kubectl(&["scale", "swallowmodel", "tiny", "--replicas=3"]);
    space.until_settled("tiny");
    space.kubectl(&["scale", "swallowmodel", "tiny", "--replicas=1"]);
    space.until_model("tiny", "two groups drain", |model| {
        let draining = group_reasons(model)
            .iter()
            .filter(|group| group.0 == "Draining")
            .count();
        if draining == 2 || model["status"]["replicas"] == 1 {
            Ok(())
        } else {
            Err(format!("{draining} drain"))
        }
    });
    space.tell(format!(
        "{} of 20 streams were open when two groups began to drain",
        streams.open_now()
    ));
    streams.finish();
    let model = space.until_settled("tiny");
    assert_eq!(model["status"]["replicas"], 1);
    assert_eq!(space.worker_pods("tiny").len(), 1);
}

/// The autoscaler reads processor use from metrics-server, and writes to the scale subresource like `kubectl scale`.
pub fn an_autoscaler_scales_up_under_load(space: &Space<'_>) {
    let model = Model::tiny("tiny", 1).with("resources", json!({"requests": {"cpu": "200m"}}));
    space.apply(&model);
    space.until_settled("tiny");
    space.apply_value(&json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "tiny"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "serving.swallow.dev/v1alpha1", "kind": "SwallowModel", "name": "tiny"},
            "minReplicas": 1, "maxReplicas": 2,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 60}}}],
        },
    }));
    let door = space.door("tiny-router");
    let streams = Streams::open(&door, "tiny", 10, 6000);
    let autoscaled = until(
        "the autoscaler asks for two groups",
        Duration::from_secs(120),
        || {
            let hpa = space.json(&["get", "hpa", "tiny"])?;
            if hpa["status"]["desiredReplicas"] == 2 {
                Ok(hpa)
            } else {
                Err(hpa["status"].to_string())
            }
        },
    );
    space.tell(format!("autoscaler: {}", autoscaled["status"]["currentMetrics"]));
    space.kubectl(&["delete", "hpa", "tiny"]);
    let model = space.until_settled("tiny");
    assert_eq!(model["status"]["readyReplicas"], 2);
    streams.finish();
}
