//! A SwallowModel from a file. The API server drops fields that it does not know, after a warning; a file is read
//! strictly: a field that nothing reads is refused by its path, with the nearest field there is.

use serde_json::{Map, Value};

use super::{Problem, SwallowModel, SwallowModelSpec, crd::SCHEMA};

/// The most problems that one reading reports.
const PROBLEMS_MAX: usize = 32;

/// Reads one SwallowModel from its plain data (YAML or JSON, parsed), with defaults filled in.
pub fn read(document: &Value) -> Result<SwallowModel, Vec<Problem>> {
    let mut problems = Vec::new();
    let Some(fields) = document.as_object() else {
        return Err(vec![Problem::new(
            "document",
            "is not a SwallowModel: write apiVersion, kind, metadata, spec",
        )]);
    };
    for (field, expected) in [
        ("apiVersion", "serving.swallow.dev/v1alpha1"),
        ("kind", "SwallowModel"),
    ] {
        match fields.get(field).and_then(Value::as_str) {
            Some(found) if found == expected => {}
            Some(found) => problems.push(Problem::new(field, format!("is '{found}': write {expected}"))),
            None => problems.push(Problem::new(field, format!("is missing: write {expected}"))),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    check(document, &root_schema(), "", &mut problems);
    if !problems.is_empty() {
        problems.truncate(PROBLEMS_MAX);
        return Err(problems);
    }
    serde_json::from_value(document.clone())
        .map_err(|error| vec![Problem::new("document", error.to_string())])
}

/// What the schema says about a spec, as the API server would: ranges, lengths, choices.
pub fn check_schema(spec: &SwallowModelSpec) -> Vec<Problem> {
    let mut problems = Vec::new();
    let value = serde_json::to_value(spec).expect("a spec is plain data");
    check(&value, &SCHEMA["properties"]["spec"], "spec", &mut problems);
    problems
}

/// The resource's schema, with the parts that the CRD leaves to Kubernetes.
fn root_schema() -> Value {
    let mut root = SCHEMA.clone();
    let texts = serde_json::json!({ "type": "object", "additionalProperties": { "type": "string" } });
    root["properties"]["apiVersion"] = serde_json::json!({ "type": "string" });
    root["properties"]["kind"] = serde_json::json!({ "type": "string" });
    root["properties"]["metadata"] = serde_json::json!({
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": { "type": "string", "minLength": 1 },
            "namespace": { "type": "string", "minLength": 1 },
            "labels": texts,
            "annotations": texts,
        },
    });
    root["required"] = serde_json::json!(["metadata", "spec"]);
    root
}

/// Checks one value against its schema and descends.
fn check(value: &Value, schema: &Value, path: &str, problems: &mut Vec<Problem>) {
    if problems.len() >= PROBLEMS_MAX {
        return;
    }
    let expected = schema["type"].as_str();
    if schema["x-kubernetes-int-or-string"] == Value::Bool(true) {
        if !value.is_string() && !value.is_i64() && !value.is_u64() {
            problems.push(Problem::new(
                path,
                format!("is {}: write a quantity, such as 4Gi", kind_of(value)),
            ));
        }
        return;
    }
    match (expected, value) {
        (Some("object"), Value::Object(fields)) => check_object(fields, schema, path, problems),
        (Some("array"), Value::Array(items)) => {
            check_size(items.len(), schema, "Items", "items", path, problems);
            for (i, item) in items.iter().enumerate() {
                check(item, &schema["items"], &format!("{path}[{i}]"), problems);
            }
        }
        (Some("string"), Value::String(text)) => check_text(text, schema, path, problems),
        (Some("integer"), Value::Number(number)) if number.is_i64() || number.is_u64() => {
            check_bounds(number.as_f64().unwrap_or(f64::INFINITY), schema, path, problems);
        }
        (Some("boolean"), Value::Bool(_)) | (None, _) => {}
        (Some(expected), found) => {
            problems.push(Problem::new(
                path,
                format!("is {}: write {}", kind_of(found), article(expected)),
            ));
        }
    }
}

fn check_object(fields: &Map<String, Value>, schema: &Value, path: &str, problems: &mut Vec<Problem>) {
    let none = Map::new();
    let known = schema["properties"].as_object().unwrap_or(&none);
    for (name, value) in fields {
        let here = join(path, name);
        match known.get(name) {
            Some(inner) => check(value, inner, &here, problems),
            None if schema["additionalProperties"].is_object() => {
                check(value, &schema["additionalProperties"], &here, problems);
            }
            None => problems.push(Problem::new(here, unknown(name, known.keys()))),
        }
    }
    for name in schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !fields.contains_key(name) {
            let about = known
                .get(name)
                .and_then(|inner| inner["description"].as_str())
                .unwrap_or_default();
            let message = if about.is_empty() {
                "is missing".into()
            } else {
                format!("is missing: {about}")
            };
            problems.push(Problem::new(join(path, name), message));
        }
    }
}

fn check_text(text: &str, schema: &Value, path: &str, problems: &mut Vec<Problem>) {
    let choices: Vec<&str> = schema["enum"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if !choices.is_empty() && !choices.contains(&text) {
        problems.push(Problem::new(
            path,
            format!("is '{text}': write {}", one_of(&choices)),
        ));
    }
    check_size(
        text.chars().count(),
        schema,
        "Length",
        "characters",
        path,
        problems,
    );
}

fn check_size(size: usize, schema: &Value, what: &str, unit: &str, path: &str, problems: &mut Vec<Problem>) {
    let bound = |side: &str| schema[format!("{side}{what}")].as_u64();
    if bound("min").is_some_and(|min| (size as u64) < min) {
        problems.push(Problem::new(
            path,
            format!(
                "has {size} {unit}: at least {} are needed",
                schema[format!("min{what}")]
            ),
        ));
    }
    if bound("max").is_some_and(|max| (size as u64) > max) {
        problems.push(Problem::new(
            path,
            format!(
                "has {size} {unit}: at most {} are allowed",
                schema[format!("max{what}")]
            ),
        ));
    }
}

fn check_bounds(value: f64, schema: &Value, path: &str, problems: &mut Vec<Problem>) {
    let below = schema["minimum"].as_f64().is_some_and(|min| value < min);
    let above = schema["maximum"].as_f64().is_some_and(|max| value > max);
    if below || above {
        let range = match (&schema["minimum"], &schema["maximum"]) {
            (min, Value::Null) => format!("at least {min}"),
            (Value::Null, max) => format!("at most {max}"),
            (min, max) => format!("{min} to {max}"),
        };
        problems.push(Problem::new(path, format!("is {value}: write {range}")));
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "empty",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

fn article(kind: &str) -> &str {
    match kind {
        "object" => "a mapping of fields",
        "array" => "a list",
        "string" => "text (in quotes, where YAML would read something else)",
        "integer" => "a whole number",
        "boolean" => "true or false",
        other => other,
    }
}

fn one_of(choices: &[&str]) -> String {
    match choices {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// What to say about a field that there is not.
fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> String {
    let nearest = known
        .map(|candidate| (distance(name, candidate), candidate))
        .min();
    match nearest {
        // Within half of its letters two names are likely meant to be one.
        Some((distance, candidate)) if distance * 2 <= candidate.chars().count() => {
            format!("there is no such field; did you mean {candidate}?")
        }
        _ => "there is no such field".into(),
    }
}

/// The number of letters to insert, remove or change, upper case or lower, to turn one name into the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().map(|c| c.to_ascii_lowercase()).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // A field's name is short; a long one is nobody's misspelling.
    for (i, x) in a.chars().take(64).map(|c| c.to_ascii_lowercase()).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn minimal() -> Value {
        json!({
            "apiVersion": "serving.swallow.dev/v1alpha1",
            "kind": "SwallowModel",
            "metadata": { "name": "tiny" },
            "spec": {
                "model": { "source": { "type": "HostPath", "hostPath": { "path": "/models/tiny" } } },
                "accelerator": { "device": "CPU" },
            },
        })
    }

    fn problems(change: impl FnOnce(&mut Value)) -> Vec<String> {
        let mut document = minimal();
        change(&mut document);
        match read(&document) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(Problem::to_string).collect(),
        }
    }

    #[test]
    fn defaults_fill_what_is_left_out() {
        let model = read(&minimal()).expect("valid");
        assert_eq!(model.spec.replicas, 1);
        assert_eq!(model.spec.parallelism.tensor, 1);
        assert_eq!(model.spec.rollout.max_surge, 1);
        assert!(!model.spec.suspend);
    }

    #[test]
    fn an_unknown_field_is_refused_with_the_nearest_one() {
        let found = problems(|d| d["spec"]["engine"] = json!({ "maxModelLength": 5, "colour": "red" }));
        assert_eq!(
            found,
            [
                "spec.engine.maxModelLength: there is no such field; did you mean maxModelLen?",
                "spec.engine.colour: there is no such field",
            ]
        );
        let found = problems(|d| d["spec"]["paralelism"] = json!({ "tensor": 2 }));
        assert_eq!(
            found,
            ["spec.paralelism: there is no such field; did you mean parallelism?"]
        );
        let found = problems(|d| d["metadata"]["lables"] = json!({}));
        assert_eq!(
            found,
            ["metadata.lables: there is no such field; did you mean labels?"]
        );
    }

    #[test]
    fn wrong_values_are_refused_with_what_to_write() {
        let found = problems(|d| {
            d["spec"]["engine"] =
                json!({ "dtype": "INT8", "maxConcurrentSequences": 0, "kvCache": { "bytes": true } });
            d["spec"]["replicas"] = json!("two");
        });
        assert_eq!(
            found,
            [
                "spec.engine.dtype: is 'INT8': write Auto, FP32 or BF16",
                "spec.engine.maxConcurrentSequences: is 0: write 1 to 4096",
                "spec.engine.kvCache.bytes: is true or false: write a quantity, such as 4Gi",
                "spec.replicas: is text: write a whole number",
            ]
        );
        let found = problems(|d| d["spec"]["model"]["source"] = json!({}));
        assert!(
            found[0].starts_with("spec.model.source.type: is missing: type names the one member"),
            "{found:?}"
        );
        let found = problems(|d| d["kind"] = json!("Deployment"));
        assert_eq!(found, ["kind: is 'Deployment': write SwallowModel"]);
    }

    #[test]
    fn no_document_makes_it_panic() {
        for document in [
            json!(null),
            json!([]),
            json!("x"),
            json!({}),
            json!({ "spec": 1 }),
        ] {
            read(&document).expect_err("not a model");
        }
        let found = problems(|d| d["spec"] = json!(null));
        assert_eq!(found, ["spec: is empty: write a mapping of fields"]);
    }
}
