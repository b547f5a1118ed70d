//! The load generator against our own router and a worker on processors.

use std::process::Command;

use serde_json::Value;
use swallow_tests::{Local, model_yaml, program, root};

const SMALL: [&str; 5] = [
    "--concurrency=3",
    "--requests=8",
    "--input-tokens=40",
    "--output-tokens=12",
    "--vocab=1000",
];

fn load(url: &str, more: &[&str]) -> (bool, Vec<Value>, String) {
    let output = Command::new(program("swallow-worker"))
        .args(["bench", "serve", "--url", url])
        .args(SMALL)
        .args(more)
        .output()
        .expect("the worker starts");
    let lines = String::from_utf8(output.stdout).expect("UTF-8");
    let line = |line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
    (
        output.status.success(),
        lines.lines().map(line).collect(),
        String::from_utf8(output.stderr).expect("UTF-8"),
    )
}

#[test]
fn a_load_is_served_and_measured() {
    let mut local = Local::start(
        &model_yaml("tiny", &root().join("tests/fixtures/tiny"), 1, 1),
        &[],
    );
    let (_, http) = local.ready();
    let url = format!("http://{http}");

    let (ok, lines, table) = load(&url, &["--model=tiny", "--token-ids"]);
    assert!(ok, "{table}");
    let [line] = &lines[..] else {
        panic!("one line, not {lines:?}")
    };
    assert_eq!(
        (&line["completed"], &line["failed"]),
        (&8.into(), &0.into()),
        "{line}"
    );
    let number = |name: &str| line.pointer(name).and_then(Value::as_f64).expect("a number");
    let seconds = number("/seconds");
    // Every answer has all of its tokens, whatever they are.
    assert!(
        (number("/output_tokens_per_s") * seconds - 96.0).abs() < 0.01,
        "{line}"
    );
    for spread in ["ttft_ms", "itl_ms", "request_ms"] {
        let at = |percentile: &str| number(&format!("/{spread}/{percentile}"));
        assert!(
            at("p50") > 0.0 && at("p50") <= at("p99") && at("p99") <= at("max"),
            "{line}"
        );
    }
    // Eight requests in three places take at least three rounds of the quickest.
    assert!(
        number("/request_ms/p50") <= 1e3 * seconds && number("/ttft_ms/max") <= number("/request_ms/max")
    );
    assert!(table.contains("8 requests, 3 at a time, 40 in, 12 out") && table.contains("between tokens"));

    let (ok, lines, error) = load(&url, &["--model=nobody"]);
    assert!(!ok && lines.is_empty(), "the first request fails: {lines:?}");
    assert!(error.contains("404") && error.contains("nobody"), "{error}");
}
