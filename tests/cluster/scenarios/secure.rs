//! A model behind API keys and TLS, whose routers and workers know each other by certificates: what is wrong with it is
//! said, and Secrets that come, or change, are taken up by what runs.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, ChildStdout, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use swallow_tests::{MadeSecrets, ask_https, https, read_slowly_while};

use super::refuse::until_reason;
use crate::harness::{Model, NODE, Space, condition, until};

/// Longer than a kubelet's and a router's looks at the files take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of a stream: with log-probabilities, twice what all buffers take on the way to a client that hardly reads.
const TOKENS: u32 = 2500;
const CANDIDATES: usize = 8;

/// As deploy/models/secured.yaml has it.
fn secured() -> Model {
    Model::tiny("secured", 1).with(
        "router",
        json!({
            "serviceType": "NodePort",
            "apiKeysSecretRef": {"name": "secured-keys"},
            "tlsSecretName": "secured-tls",
            "mutualTls": {"workerSecretName": "secured-worker-tls", "routerSecretName": "secured-router-tls"},
        }),
    )
}

/// Each mistake, and what the API server says of it.
fn mistakes_are_refused(space: &Space<'_>) {
    let tls = |workers: &str, routers: &str, name: &str| json!({"workerSecretName": workers, "routerSecretName": routers, "serverName": name});
    for (field, value, words) in [
        (
            "router.mutualTls",
            tls("same", "same", "swallow-worker"),
            "workerSecretName and routerSecretName must differ: who holds a worker's key could pass for a router",
        ),
        (
            "router.mutualTls",
            tls("w", "r", "Swallow Worker"),
            "serverName must be a DNS name in lower case, such as swallow-worker",
        ),
        (
            "router.mutualTls",
            json!({"workerSecretName": "w"}),
            "spec.router.mutualTls.routerSecretName: Required value",
        ),
        (
            "router.connectionGraceSeconds",
            json!(604_801),
            "spec.router.connectionGraceSeconds: Invalid value: 604801",
        ),
    ] {
        let error = space
            .try_apply(&secured().with(field, value).0)
            .expect_err("it is a mistake");
        assert!(error.contains(words), "'{words}' is not in: {error}");
    }
}

/// uid and restarts of each of the model's pods, routers among them.
fn lives(space: &Space<'_>) -> Vec<(String, u64)> {
    let pods = space.json(&["get", "pods"]).expect("pods can be listed");
    let pods = pods["items"].as_array().into_iter().flatten();
    let mut lives: Vec<_> = pods
        .map(|pod| {
            let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
            let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
            (uid.to_owned(), restarts.unwrap_or_default())
        })
        .collect();
    lives.sort();
    lives
}

/// A series of the router, scraped as the chart's PodMonitor has it: without TLS, at the port for probes.
fn scraped(space: &Space<'_>, series: &str) -> String {
    let selector = "serving.swallow.dev/role=router";
    let name = space.kubectl(&[
        "get",
        "pods",
        "-l",
        selector,
        "-o",
        "jsonpath={.items[0].metadata.name}",
    ]);
    let path = format!("/api/v1/namespaces/{}/pods/{name}:8081/proxy/metrics", space.name);
    let text = space
        .cluster
        .kubectl(&["get", "--raw", &path])
        .expect("it is scraped");
    let line = text.lines().find(|line| line.starts_with(series));
    line.unwrap_or_else(|| panic!("no {series} in {text}")).to_owned()
}

fn question(tokens: u32) -> Value {
    json!({"model": "secured", "prompt": "1 2 3", "max_tokens": tokens, "temperature": 0, "ignore_eos": true})
}

/// curl with a stream that has begun.
fn stream(url: &str, made: &MadeSecrets) -> (Child, BufReader<ChildStdout>) {
    let mut body = question(TOKENS);
    body["stream"] = true.into();
    body["logprobs"] = 5.into();
    body["n"] = CANDIDATES.into();
    let mut child = https(url, &made.authority, Some(&made.key), &body)
        .stdout(Stdio::piped())
        .spawn()
        .expect("curl is installed");
    let mut reader = BufReader::new(child.stdout.take().expect("it is piped"));
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(reader.read_line(&mut line).is_ok_and(|read| read > 0), "no event");
    }
    (child, reader)
}

fn apply_secrets(space: &Space<'_>, made: &MadeSecrets) {
    space
        .cluster
        .kubectl_with(&["-n", &space.name, "apply", "-f", "-"], &made.yaml)
        .expect("they are Secrets");
}

pub fn a_model_waits_for_its_secrets_and_follows_them(space: &Space<'_>) {
    mistakes_are_refused(space);

    space.apply(&secured());
    let message = until_reason(space, "secured", "Refused");
    assert!(
        message.contains("secret \"secured-worker-tls\" not found"),
        "{message}"
    );
    space.until_model("secured", "what the router waits for", |model| {
        let (status, reason, message) = condition(model, "RouterReady");
        let named = ["secured-keys", "secured-tls", "secured-router-tls"]
            .iter()
            .any(|name| message.contains(&format!("secret \"{name}\" not found")));
        ((status, reason, named) == ("False", "CannotStart", true))
            .then_some(())
            .ok_or_else(|| "no Secret is named".into())
    });

    let made = MadeSecrets::new("secured", &[NODE]);
    apply_secrets(space, &made);
    let model = space.until_settled("secured");
    assert_eq!(condition(&model, "Ready").2, "1 of 1 group serving");
    let url = format!("{}/v1/completions", space.https("secured-router"));
    let ask = |made: &MadeSecrets, key: Option<&str>| ask_https(&url, &made.authority, key, &question(4));
    let status = |made: &MadeSecrets, key: Option<&str>| ask(made, key).map(|(status, _)| status);
    until("an answer to who has a key", PATIENCE, || {
        let told = status(&made, Some(&made.key))?;
        (told == 200).then_some(()).ok_or_else(|| told.to_string())
    });
    assert_eq!(status(&made, None), Ok(401));
    assert_eq!(status(&made, Some("another")), Ok(401));

    let before = lives(space);
    let (mut curl, mut reader) = stream(&url, &made);
    let open = "swallow_router_open_streams{method=\"completions\"}";
    let renewed = MadeSecrets::new("secured", &[NODE]);
    let mut rest = read_slowly_while(&mut reader, || {
        apply_secrets(space, &renewed);
        // A kubelet looks at a pod's Secrets every minute or so, and whenever the pod changes.
        space.kubectl(&["annotate", "pods", "--all", "look-at=secrets"]);
        until("the new key over the new certificate", PATIENCE, || {
            let told = status(&renewed, Some(&renewed.key))?;
            (told == 200).then_some(()).ok_or_else(|| told.to_string())
        });
        assert_eq!(status(&renewed, Some(&made.key)), Ok(401), "the old key is gone");
        assert_eq!(
            scraped(space, open),
            format!("{open} 1"),
            "the stream is open still"
        );
    });
    assert!(!rest.contains("[DONE]"), "the stream outlasted the change");
    reader.read_to_string(&mut rest).expect("it goes on");
    assert!(curl.wait().is_ok_and(|status| status.success()));
    let ended = rest.matches("\"finish_reason\":\"length\"").count();
    assert_eq!((ended, rest.contains("[DONE]")), (CANDIDATES, true));
    assert_eq!(lives(space), before, "nothing was started again");

    // A router that is changed to a Secret which is not there cannot start; the one before it serves on, and that is told.
    space.patch(
        "secured",
        &json!({"spec": {"router": {"tlsSecretName": "absent"}}}),
    );
    space.until_model("secured", "what the newer router waits for", |model| {
        let (status, reason, message) = condition(model, "RouterReady");
        let named = message.contains("secret \"absent\" not found");
        ((status, reason, named) == ("True", "Available", true))
            .then_some(())
            .ok_or_else(|| "the Secret is not named".into())
    });
    assert_eq!(status(&renewed, Some(&renewed.key)), Ok(200));
}
