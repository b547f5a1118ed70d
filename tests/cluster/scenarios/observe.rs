//! Alerts and dashboard are sound, and ask for nothing that the programs do not tell.

use std::{collections::BTreeSet, fs, process::Command, time::Duration};

use serde_json::Value;
use swallow_tests::root;

use super::serve::golden_text_is_served;
use crate::harness::{Model, SYSTEM, Space, until};

/// The names of all series of a pod, asked through the API server.
fn series(space: &Space<'_>, namespace: &str, pod: &str, port: u16) -> BTreeSet<String> {
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy/metrics");
    let text = until("metrics of a pod", Duration::from_secs(20), || {
        space.cluster.kubectl(&["get", "--raw", &path])
    });
    text.lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// The series of ours that an expression of Prometheus names.
fn names(expression: &str) -> BTreeSet<String> {
    let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == ':';
    expression
        .split(|letter| !is_name(letter))
        .filter(|word| word.starts_with("swallow_") || word.starts_with("vllm:"))
        .map(str::to_owned)
        .collect()
}

/// Every string below a member of one of these names.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                match member.as_str() {
                    Some(text) if name == "expr" || name == "query" => found.push(text.to_owned()),
                    _ => expressions(member, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| expressions(item, found)),
        _ => {}
    }
}

pub fn alerts_and_dashboard_name_what_there_is(space: &Space<'_>) {
    let folder = root().join("deploy/observe");
    let text = fs::read_to_string(folder.join("rules.yaml")).expect("it is in the repository");
    let rules: Value = serde_yaml_ng::from_str(&text).expect("it is YAML");
    let bare = space.cluster.folder("rules").join("rules.json");
    fs::write(&bare, rules["spec"].to_string()).expect("the folder is ours");
    let checked = Command::new("promtool")
        .args(["check", "rules"])
        .arg(&bare)
        .output();
    let checked = checked.expect("promtool is installed");
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    let made = Command::new("python3")
        .arg(folder.join("make_dashboard.py"))
        .output()
        .expect("python3 is installed");
    let dashboard = fs::read(folder.join("dashboard.json")).expect("it is in the repository");
    assert!(
        made.stdout == dashboard,
        "run: deploy/observe/make_dashboard.py > deploy/observe/dashboard.json"
    );
    let dashboard: Value = serde_json::from_slice(&dashboard).expect("it is JSON");

    space.apply(&Model::tiny("tiny", 1));
    space.until_settled("tiny");
    // Some series begin with the first request.
    golden_text_is_served(&space.door("tiny-router"), "tiny");
    let mut told = BTreeSet::new();
    // The ports that the chart's PodMonitors name.
    for (role, port) in [("worker", 8061), ("router", 8081)] {
        let selector = format!("serving.swallow.dev/role={role}");
        let pods = space.kubectl(&[
            "get",
            "pods",
            "-l",
            &selector,
            "-o",
            "jsonpath={.items[*].metadata.name}",
        ]);
        for pod in pods.split_whitespace() {
            told.extend(series(space, &space.name, pod, port));
        }
    }
    let words = [
        "-n",
        SYSTEM,
        "get",
        "pods",
        "-o",
        "jsonpath={.items[*].metadata.name}",
    ];
    for pod in space
        .cluster
        .kubectl(&words)
        .expect("the operator runs")
        .split_whitespace()
    {
        told.extend(series(space, SYSTEM, pod, 8080));
    }
    let mut asked = Vec::new();
    expressions(&rules, &mut asked);
    expressions(&dashboard, &mut asked);
    let asked: BTreeSet<String> = asked.iter().flat_map(|expression| names(expression)).collect();
    let absent: Vec<&String> = asked
        .iter()
        .filter(|name| {
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|ending| name.strip_suffix(ending));
            !told.contains(name.as_str()) && !family.is_some_and(|family| told.contains(family))
        })
        .collect();
    assert!(asked.len() > 15, "only {asked:?}");
    assert!(absent.is_empty(), "nobody tells {absent:?}; told are {told:#?}");
    space.tell(format!("{} series asked for, {} told", asked.len(), told.len()));
}
