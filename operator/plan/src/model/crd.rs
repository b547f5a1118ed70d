//! The CustomResourceDefinition: derived from the types, with the CEL rules put in and the traces of Rust taken out.

use std::sync::LazyLock;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use super::{SwallowModel, rules::RULES};

/// The CustomResourceDefinition of SwallowModel, ready to apply.
pub fn crd() -> CustomResourceDefinition {
    serde_json::from_value(crd_value()).expect("the derived definition keeps its form")
}

/// The same as plain data, without empty fields.
pub fn crd_value() -> Value {
    let mut crd = serde_json::to_value(SwallowModel::crd()).expect("a definition is plain data");
    let schema = crd
        .pointer_mut("/spec/versions/0/schema/openAPIV3Schema")
        .expect("the derived definition has one version with a schema");
    tidy(schema);
    for rule in RULES {
        let place = rule.at.iter().fold(&mut *schema, |schema, property| {
            schema
                .get_mut("properties")
                .and_then(|properties| properties.get_mut(property))
                .unwrap_or_else(|| panic!("a rule names a property of the schema, {:?} is none", rule.at))
        });
        let rules = place
            .as_object_mut()
            .expect("a schema is an object")
            .entry("x-kubernetes-validations")
            .or_insert_with(|| json!([]));
        rules
            .as_array_mut()
            .expect("rules are a list")
            .push(rule.to_value());
    }
    crd
}

/// The schema of a whole SwallowModel, which files and specs are checked against.
pub(super) static SCHEMA: LazyLock<Value> = LazyLock::new(|| {
    crd_value()
        .pointer_mut("/spec/versions/0/schema/openAPIV3Schema")
        .map(Value::take)
        .expect("the derived definition has one version with a schema")
});

/// Takes out what Kubernetes does not know: Rust's integer formats and the nulls of absent options. An absent field
/// is absent, never null.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            tidy_fields(fields);
            fields.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

fn tidy_fields(fields: &mut Map<String, Value>) {
    // `nullable` under `properties` would be a field of that name; there is none.
    fields.remove("nullable");
    if fields.get("default") == Some(&Value::Null) {
        fields.remove("default");
    }
    // What is int-or-string needs no list of both.
    if fields.contains_key("x-kubernetes-int-or-string") {
        fields.remove("anyOf");
    }
    match fields.get("format").and_then(Value::as_str) {
        Some("uint32") => fields.insert("format".into(), json!("int64")),
        Some("uint64") => fields.insert("format".into(), json!("int64")),
        _ => None,
    };
    // Descriptions are wrapped in the source and flow freely here.
    if let Some(Value::String(text)) = fields.get_mut("description") {
        *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    }
    // Bounds come as floats; Kubernetes prints them as they are given.
    for bound in ["minimum", "maximum"] {
        if let Some(value) = fields.get(bound).and_then(Value::as_f64) {
            fields.insert(bound.into(), whole(value));
        }
    }
}

fn whole(value: f64) -> Value {
    // Bounds in this schema are far below 2^53, so the conversion is exact.
    if value.fract() == 0.0 {
        json!(value as i64)
    } else {
        json!(value)
    }
}
