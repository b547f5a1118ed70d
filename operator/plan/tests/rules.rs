//! The rules of the API server and those of `validate` refuse the same: each CEL rule has an example here that the
//! Rust code must refuse too.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use swallow_plan::{
    model::{crd_value, read},
    validate,
};

fn sound() -> Value {
    json!({
        "apiVersion": "serving.swallow.dev/v1alpha1",
        "kind": "SwallowModel",
        "metadata": { "name": "m" },
        "spec": {
            "model": { "source": { "type": "HostPath", "hostPath": { "path": "/models/m" } } },
            "accelerator": { "device": "CPU" },
        },
    })
}

fn is_refused(document: &Value) -> bool {
    read(document).map_or(true, |model| validate(&model, None).is_err())
}

/// Messages of all rules of the definition that look at one state, not at a transition.
fn rules(schema: &Value, found: &mut BTreeSet<String>) {
    for rule in schema["x-kubernetes-validations"]
        .as_array()
        .into_iter()
        .flatten()
    {
        if !rule["rule"].as_str().is_some_and(|rule| rule.contains("oldSelf")) {
            found.insert(rule["message"].as_str().expect("each rule has words").to_owned());
        }
    }
    for inner in schema["properties"].as_object().into_iter().flatten() {
        rules(inner.1, found);
    }
}

#[test]
fn what_the_api_server_refuses_is_refused_here() {
    let examples: Vec<Value> =
        serde_yaml_ng::from_str(include_str!("violations.yaml")).expect("the examples are YAML");
    assert!(!is_refused(&sound()), "the sound one is sound");
    let mut unseen = BTreeSet::new();
    rules(
        &crd_value()["spec"]["versions"][0]["schema"]["openAPIV3Schema"],
        &mut unseen,
    );
    for example in &examples {
        let mut document = sound();
        for (path, value) in example["change"].as_object().expect("changes by path") {
            let place = path
                .split('.')
                .fold(&mut document, |place, name| &mut place[name]);
            *place = value.clone();
        }
        assert!(is_refused(&document), "{example}");
        let words = example["rule"].as_str().expect("an example names its rule");
        assert!(rules_begin_with(words), "no rule's message begins with '{words}'");
        unseen.retain(|message| !message.starts_with(words));
    }
    assert!(unseen.is_empty(), "rules without an example: {unseen:#?}");
}

fn rules_begin_with(words: &str) -> bool {
    let mut all = BTreeSet::new();
    rules(
        &crd_value()["spec"]["versions"][0]["schema"]["openAPIV3Schema"],
        &mut all,
    );
    all.iter().any(|message| message.starts_with(words))
}
