//! API keys that change under running streams.

use std::path::PathBuf;

use sha2::{Digest, Sha256};
use swallow_router::keys::ApiKeys;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{support::http, *};

/// A file that goes with its test.
struct KeysFile(PathBuf);

impl KeysFile {
    fn new(text: &str) -> Self {
        let file = Self(std::env::temp_dir().join(format!("swallow-keys-{}.json", uuid::Uuid::new_v4())));
        file.put(text);
        file
    }

    fn put(&self, text: &str) {
        std::fs::write(&self.0, text).expect("the temporary folder can be written");
    }
}

impl Drop for KeysFile {
    fn drop(&mut self) {
        // It may be gone.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn keys(of: &[(&str, &str)]) -> String {
    let entry = |(key, more): &(&str, &str)| {
        let digest: String = Sha256::digest(key)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!(r#"{{"sha256": "{digest}", "tenant": "team"{more}}}"#)
    };
    let entries: Vec<String> = of.iter().map(entry).collect();
    format!(r#"{{"keys": [{}]}}"#, entries.join(","))
}

fn with_key<T>(key: &str, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let value = format!("Bearer {key}").parse().expect("ASCII");
    request.metadata_mut().insert("authorization", value);
    request
}

/// For programs.
fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    details
        .error_info()
        .map(|info| info.reason.clone())
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_change_and_no_stream_is_dropped() {
    let file = KeysFile::new(&keys(&[("old", r#", "max_open_requests": 1"#), ("both", "")]));
    let loaded = ApiKeys::load(&file.0).expect("sound");
    let worker = worker(|config| config.step = Duration::from_millis(5));
    let house = house_of([worker.address].into_iter(), |_| {}, Some(&loaded), None).await;
    let mut client = house.channel().await;

    let status = client.generate(asked("p", 3)).await.expect_err("no key");
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(reason(&status), "INVALID_API_KEY");
    let body = r#"{"model": "m", "prompt": "p", "max_tokens": 3}"#;
    let post = |headers: &'static str| async move {
        http::receive(http::send(house.http, "POST", "/v1/completions", headers, body).await).await
    };
    let refused = post("authorization: Bearer wrong\r\n").await;
    assert_eq!(
        (refused.status, &*refused.headers["www-authenticate"]),
        (401, "Bearer")
    );
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!(post("authorization: Bearer both\r\n").await.status, 200);
    assert_eq!(
        http::get(house.http, "/readyz").await.status,
        200,
        "probes have no keys"
    );

    // A stream of the key that goes.
    let request = wire::StreamGenerateRequest {
        generate: Some(asked("long", 200)),
        stream: None,
    };
    let stream = client
        .stream_generate(with_key("old", request))
        .await
        .expect("let in");
    let mut stream = stream.into_inner();
    let mut text = delta(stream.message().await.expect("no fault"));
    let status = client
        .generate(with_key("old", asked("p", 3)))
        .await
        .expect_err("one is open");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(reason(&status), "TOO_MANY_OPEN_REQUESTS");
    assert!(status.get_error_details().retry_info().is_some());
    assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));

    let mut seen = Vec::new();
    file.put("{");
    loaded.look(&mut seen);
    client
        .generate(with_key("both", asked("p", 3)))
        .await
        .expect("a broken file changes nothing");
    file.put(&keys(&[("new", ""), ("both", "")]));
    loaded.look(&mut seen);
    client
        .generate(with_key("new", asked("p", 3)))
        .await
        .expect("known now");
    client
        .generate(with_key("both", asked("p", 3)))
        .await
        .expect("known still");
    let status = client
        .generate(with_key("old", asked("p", 3)))
        .await
        .expect_err("unknown now");
    assert_eq!(status.code(), Code::Unauthenticated);

    while let Some(message) = stream.message().await.expect("its stream goes on") {
        text.push_str(&delta(Some(message)));
    }
    assert_eq!(text.len(), 200);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tenant_asks_is_counted_under_its_name() {
    let digest = |key: &str| -> String {
        Sha256::digest(key)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    };
    let entry = |key: &str, tenant: &str| format!(r#"{{"sha256": "{}", "tenant": "{tenant}"}}"#, digest(key));
    let entries = [entry("a1", "sales"), entry("a2", "sales"), entry("b", "研究")].join(",");
    let file = KeysFile::new(&format!(r#"{{"keys": [{entries}]}}"#));
    let loaded = ApiKeys::load(&file.0).expect("sound");
    let worker = worker(|_| {});
    let house = house_of([worker.address].into_iter(), |_| {}, Some(&loaded), None).await;
    let mut client = house.channel().await;
    for (key, tokens) in [("a1", 3), ("a2", 4), ("b", 5)] {
        let asked = asked("prompt", tokens);
        client.generate(with_key(key, asked)).await.expect("let in");
    }
    let stream = wire::StreamGenerateRequest {
        generate: Some(asked("prompt", 6)),
        stream: None,
    };
    let stream = client
        .stream_generate(with_key("b", stream))
        .await
        .expect("let in");
    let mut stream = stream.into_inner();
    while stream.message().await.expect("no fault").is_some() {}
    client
        .generate(with_key("b", asked("prompt", 1_000_000)))
        .await
        .expect_err("too long");
    client.generate(asked("p", 1)).await.expect_err("no key");
    for (tenant, series, count) in [
        ("sales", "output_tokens_total", 7.0),
        ("sales", "prompt_tokens_total", 12.0),
        ("研究", "output_tokens_total", 11.0),
        ("研究", "prompt_tokens_total", 12.0),
    ] {
        let series = format!("swallow_router_tenant_{series}{{tenant=\"{tenant}\"}}");
        until(&series, || house.metric(&series) == count).await;
    }
    for (tenant, code, count) in [
        ("sales", "OK", 2.0),
        ("研究", "OK", 2.0),
        ("研究", "INVALID_ARGUMENT", 1.0),
    ] {
        let series = format!("swallow_router_tenant_requests_total{{code=\"{code}\",tenant=\"{tenant}\"}}");
        until(&series, || house.metric(&series) == count).await;
    }
}

/// The text in a message.
fn delta(message: Option<wire::StreamGenerateResponse>) -> String {
    match message.and_then(|message| message.event) {
        Some(wire::stream_generate_response::Event::Delta(delta)) => delta.text,
        _ => String::new(),
    }
}
