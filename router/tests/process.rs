//! The program itself: how it begins and how it ends.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, ChildStderr, Command, Stdio},
};

#[path = "support/http.rs"]
#[allow(dead_code, reason = "each test binary uses its part of it")]
mod http;

use http::{get, post};
use serde_json::json;

fn start(args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_swallow-router"))
        .args([
            "--grpc-listen=127.0.0.1:0",
            "--http-listen=127.0.0.1:0",
            "--log-format=json",
        ])
        .args(args)
        .env_remove("KUBERNETES_SERVICE_HOST")
        .env_remove("RUST_LOG")
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program was built")
}

/// Reads its log until a line has all of these words in it.
fn until(log: &mut BufReader<ChildStderr>, words: &[&str]) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(
            log.read_line(&mut line).expect("UTF-8") > 0,
            "it ended before {words:?}"
        );
        if words.iter().all(|word| line.contains(word)) {
            return line;
        }
    }
}

fn http_address(log: &mut BufReader<ChildStderr>) -> SocketAddr {
    let line = until(log, &["listening", "\"http\""]);
    let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    line["address"]
        .as_str()
        .and_then(|address| address.parse().ok())
        .expect("an address")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_is_told_to_end_serves_until_that_is_known() {
    let mut router = start(&["--shutdown-delay-seconds=3", "--replica=tiny=127.0.0.1:1"]);
    let mut log = BufReader::new(router.stderr.take().expect("piped"));
    let address = http_address(&mut log);
    let ready = async {
        while get(address, "/readyz").await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), ready)
        .await
        .expect("it has looked for its replica, in vain, and is ready");
    let kill = Command::new("kill").arg(router.id().to_string()).status();
    assert!(kill.expect("kill is there").success());
    until(&mut log, &["draining"]);
    assert_eq!(get(address, "/readyz").await.status, 503);
    // On a new connection, and not refused for draining.
    let asked = post(
        address,
        "/v1/completions",
        &json!({"model": "nobody", "prompt": "p"}),
    )
    .await;
    assert_eq!(asked.status, 404, "{}", asked.body);
    until(&mut log, &["\"drained\""]);
    assert!(router.wait().expect("it ends").success());
}

#[test]
fn discovery_without_a_cluster_is_one_clear_line() {
    let mut router = start(&["--discover=tiny=tiny-worker"]);
    let mut log = BufReader::new(router.stderr.take().expect("piped"));
    let line = until(&mut log, &["--discover", "service account"]);
    assert!(line.starts_with("swallow-router: "), "{line}");
    assert_eq!(router.wait().expect("it ends").code(), Some(1));
}
