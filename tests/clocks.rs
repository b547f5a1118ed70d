//! Wall clocks of router and worker that are wrong, disagree and jump under streams: nothing that decides looks at them.
//! Deadlines, what a key may have open, streams and what was measured are as with the right time.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use swallow_tests::{PATIENCE, Running, clock::Clock, wait_for};

/// A small model without files, slow enough to be met in the middle.
const MODEL: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 400, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "bos_token_id": 398, "eos_token_id": 399}"#;
const TOKENS: u32 = 1_000;
/// Of whoever streams: one request at a time.
const STREAMS: &str = "authorization: Bearer streams\r\n";
/// Of whoever else asks.
const ASKS: &str = "authorization: Bearer asks\r\n";
const HOUR: i64 = 3_600;
const YEAR: i64 = 365 * 24 * HOUR;

fn keys() -> String {
    let key = |key: &str, more: &str| {
        let digest: String = Sha256::digest(key)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!(r#"{{"sha256": "{digest}", "tenant": "{key}"{more}}}"#)
    };
    let streams = key("streams", r#", "max_open_requests": 1"#);
    format!(r#"{{"keys": [{streams}, {}]}}"#, key("asks", ""))
}

fn worker(clock: &Clock) -> (Running, String, String) {
    let args = [
        "serve",
        "--load-format=dummy",
        "--served-name=m",
        "--replica-id=r",
        "--grpc-listen=127.0.0.1:0",
        "--http-listen=127.0.0.1:0",
        "--kv-bytes=67108864",
        "--threads=1",
        "--log-format=json",
    ];
    let args = args.map(str::to_owned).into_iter();
    let model = std::iter::once(format!("--model={MODEL}"));
    let worker = Running::start_in(clock.env(), "swallow-worker", args.chain(model));
    let [grpc, http] = ["grpc", "http"].map(|port| {
        worker.log("the worker's addresses", |line| {
            line[port].as_str().map(str::to_owned)
        })
    });
    worker.says("\"ready\"");
    (worker, grpc, http)
}

fn body(tokens: u32, candidates: u32, stream: bool) -> Value {
    json!({ "model": "m", "prompt": "ab", "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "n": candidates, "stream": stream })
}

/// A request on a connection of its own.
fn send(address: &str, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time above 0");
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: m\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).expect("it reads");
    stream
}

/// Status and body of the answer.
fn receive(mut stream: TcpStream) -> (u16, String) {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let status = answer.get(9..12).and_then(|status| status.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    (status.expect("a status"), body.expect("a head and a body"))
}

fn complete(address: &str, headers: &str, body: &Value) -> (u16, String) {
    receive(send(
        address,
        "POST",
        "/v1/completions",
        headers,
        &body.to_string(),
    ))
}

/// The text of a stream. `midway` is called when its first piece is here.
fn streamed(address: &str, midway: impl FnOnce()) -> String {
    let mut stream = send(
        address,
        "POST",
        "/v1/completions",
        STREAMS,
        &body(TOKENS, 1, true).to_string(),
    );
    let (mut first, mut answer) = ([0; 512], Vec::new());
    let read = stream.read(&mut first).expect("it begins");
    answer.extend_from_slice(&first[..read]);
    midway();
    stream.read_to_end(&mut answer).expect("it goes on");
    let answer = String::from_utf8(answer).expect("text");
    assert!(answer.contains("data: [DONE]"), "{answer}");
    let events = answer.lines().filter_map(|line| line.strip_prefix("data: {"));
    let text = |event: &str| {
        let event: Value = serde_json::from_str(&format!("{{{event}")).expect("JSON");
        event["choices"][0]["text"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    events.map(text).collect()
}

/// Times that were measured are those that passed.
fn measured(address: &str) {
    let (status, page) = receive(send(address, "GET", "/metrics", ASKS, ""));
    assert_eq!(status, 200);
    let mut sums = 0;
    for line in page.lines().filter(|line| line.contains("_seconds_sum")) {
        let value = line
            .rsplit(' ')
            .next()
            .and_then(|value| value.parse::<f64>().ok());
        assert!(
            value.is_some_and(|seconds| (0.0..600.0).contains(&seconds)),
            "{line}"
        );
        sums += 1;
    }
    assert!(sums > 3, "{sums} times were measured");
}

#[test]
fn wall_clocks_that_are_wrong_and_jump_change_nothing() {
    let (of_router, of_worker) = (Clock::right(), Clock::right());
    let (_worker, grpc, metrics) = worker(&of_worker);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("keys.json");
    std::fs::write(&file, keys()).expect("the folder is ours");
    let args = [
        "--grpc-listen=127.0.0.1:0".to_owned(),
        "--http-listen=127.0.0.1:0".to_owned(),
        "--log-format=json".to_owned(),
        format!("--api-keys={}", file.display()),
        format!("--replica=m={grpc}"),
    ];
    let router = Running::start_in(of_router.env(), "swallow-router", args);
    let http = router.http();
    wait_for("the first answer", || {
        (complete(&http, ASKS, &body(8, 1, false)).0 == 200).then_some(())
    });
    let undisturbed = streamed(&http, || {});
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = i64::try_from(now.expect("after 1970").as_secs()).expect("a time");
    // Of the router, and of the worker.
    for (router, worker) in [
        (HOUR, -HOUR),
        (-HOUR, HOUR),
        (YEAR, 1),
        (1 - now, YEAR),
        (1, 1 - now),
        (0, 0),
    ] {
        let jump = || {
            of_router.set(router);
            of_worker.set(worker);
            // Its one place is taken, whatever the time.
            assert_eq!(complete(&http, STREAMS, &body(1, 1, false)).0, 429);
        };
        assert_eq!(
            streamed(&http, jump),
            undisturbed,
            "after a jump of {router} s and {worker} s"
        );
        let (status, answer) = complete(&http, STREAMS, &body(1, 1, false));
        assert_eq!(status, 200, "its place is free again: {answer}");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        let off = answer["created"].as_i64().expect("a time") - now - router;
        assert!(
            (0..120).contains(&off),
            "the program sees the jump: off by {off} s"
        );

        let began = Instant::now();
        let deadline = format!("{ASKS}x-request-timeout-ms: 150\r\n");
        assert_eq!(complete(&http, &deadline, &body(3_900, 8, false)).0, 504);
        let kept = Duration::from_millis(150)..Duration::from_millis(1_000);
        assert!(
            kept.contains(&began.elapsed()),
            "{:?} after a jump of {router} s and {worker} s",
            began.elapsed()
        );
    }
    measured(&http);
    measured(&metrics);
    let ready = |line: &&Value| line["message"] == "replica" && line["state"] == "ready";
    assert_eq!(
        router.lines().iter().filter(ready).count(),
        1,
        "its session goes on"
    );
}
