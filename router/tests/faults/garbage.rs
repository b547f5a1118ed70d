//! Bodies that are no requests: random ones, damaged ones, and those made to hurt. Each is refused for what it is, by a
//! router that goes on.

use serde_json::{Value, json};
use swallow_rpc::worker::v1::finished::Reason;
use tonic::Code;

use super::{raw::Raw, support, *};

const ROUNDS: usize = 600;

/// A worker that is never the reason why something takes time.
fn refuser() -> MockWorker {
    worker(|config| config.turn_away = Some((usize::MAX, Reason::Rejected, "the worker was reached".into())))
}

/// CPU seconds of this process.
fn cpu_seconds() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).expect("Linux");
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

fn sound() -> [(&'static str, Value); 4] {
    [
        (
            "/v1/completions",
            json!({"model": "m", "prompt": ["héllo", "日本"], "max_tokens": 5, "temperature": 0.5, "n": 2,
                   "stop": ["a", "b"], "logprobs": 3, "echo": true, "logit_bias": {"5": -1.5}}),
        ),
        (
            "/v1/chat/completions",
            json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "top_p": 0.9,
                   "stream": true, "stream_options": {"include_usage": true}, "seed": 7}),
        ),
        (
            "/tokenize",
            json!({"model": "m", "prompt": "text", "add_special_tokens": true}),
        ),
        ("/detokenize", json!({"model": "m", "tokens": [1, 2, 3]})),
    ]
}

/// Something else in the place of some value.
fn damage(rng: &mut fastrand::Rng, value: &mut Value) {
    match value {
        Value::Object(fields) if !fields.is_empty() && rng.u8(0..4) > 0 => {
            let at = rng.usize(0..fields.len());
            let (_, inner) = fields.iter_mut().nth(at).expect("it is there");
            damage(rng, inner);
        }
        Value::Array(items) if !items.is_empty() && rng.u8(0..4) > 0 => {
            let at = rng.usize(0..items.len());
            damage(rng, &mut items[at]);
        }
        other => {
            *other = match rng.u8(0..10) {
                0 => Value::Null,
                1 => json!(-1),
                2 => json!(u64::MAX),
                3 => json!(1e308),
                4 => json!("\u{FFFD}\u{0}\u{202E}"),
                5 => json!({"a": {"a": {}}}),
                6 => json!([[], [[]]]),
                7 => json!(true),
                8 => json!("x".repeat(rng.usize(0..3000))),
                _ => json!(rng.i64(..)),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_json_is_refused_and_costs_little() {
    let worker = refuser();
    let house = house(&[&worker], |_| {}).await;
    let mut rng = support::rng("damaged_json_is_refused_and_costs_little");
    let before = cpu_seconds();
    for _ in 0..ROUNDS {
        let (path, mut body) = rng.choice(sound()).expect("not empty");
        (0..rng.usize(0..3)).for_each(|_| damage(&mut rng, &mut body));
        let mut bytes = body.to_string().into_bytes();
        if rng.bool() {
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(0..bytes.len());
                match rng.u8(0..3) {
                    0 => bytes[at] = rng.u8(..),
                    1 => bytes.truncate(at.max(1)),
                    _ => bytes.insert(at, rng.u8(..)),
                }
            }
        }
        let status = status_of(&house, path, &bytes).await;
        let shown = || {
            String::from_utf8_lossy(&bytes)
                .chars()
                .take(300)
                .collect::<String>()
        };
        assert!((200..500).contains(&status), "{status}: {path} {}", shown());
    }
    let each = (cpu_seconds() - before) / ROUNDS as f64;
    println!("{:.3} ms of CPU each, client included", each * 1e3);
    assert!(each < 0.010, "{each} s");
    house.settles(64).await;
}

async fn status_of(house: &House, path: &str, body: &[u8]) -> u16 {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(house.http)
        .await
        .expect("it listens");
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // A refusal may come, and the connection go, before the body is read.
    let _ = stream.write_all(&[head.as_bytes(), body].concat()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let status = answer
        .get(9..12)
        .and_then(|status| std::str::from_utf8(status).ok());
    status.and_then(|status| status.parse().ok()).expect("an answer")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_that_is_made_to_hurt_is_refused() {
    let worker = refuser();
    let house = house(&[&worker], |_| {}).await;
    let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    let cases = [
        r#"{"model":"m","prompt":"a","max_tokens":1e400}"#.to_owned(),
        r#"{"model":"m","prompt":"a","temperature":NaN}"#.to_owned(),
        r#"{"model":"m","prompt":"a","temperature":-Infinity}"#.to_owned(),
        r#"{"model":"m","prompt":"a","max_tokens":99999999999999999999999999}"#.to_owned(),
        r#"{"model":"m","prompt":[0.5]}"#.to_owned(),
        r#"{"model":"m","prompt":[4294967296]}"#.to_owned(),
        r#"{"model":"m","prompt":"\ud800"}"#.to_owned(),
        format!(r#"{{"model":"m","prompt":{}}}"#, deep(100_000)),
        format!(r#"{{"model":"m","prompt":"a","user":{}}}"#, deep(100_000)),
        String::new(),
        "\u{FEFF}{}".to_owned(),
        "[]".to_owned(),
    ];
    for body in cases {
        let before = cpu_seconds();
        let status = status_of(&house, "/v1/completions", body.as_bytes()).await;
        let shown: String = body.chars().take(100).collect();
        assert_eq!(status, 400, "{shown}");
        let took = cpu_seconds() - before;
        assert!(took < 0.1, "{shown}: {took} s");
    }
    assert_eq!(worker.seen().requests, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_is_too_large_is_refused_before_it_is_tokenised() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let worker = refuser();
    let house = house(&[&worker], |_| {}).await;
    // It says how large it is, and is refused before any of it comes.
    let mut stream = tokio::net::TcpStream::connect(house.http)
        .await
        .expect("it listens");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        64 << 20
    );
    stream.write_all(head.as_bytes()).await.expect("read");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("answered");
    assert!(
        answer.starts_with(b"HTTP/1.1 413"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    // Too many bytes for the model's context, whatever they are.
    let before = cpu_seconds();
    let long = json!({"model": "m", "prompt": "a".repeat(900_000), "max_tokens": 1}).to_string();
    assert_eq!(status_of(&house, "/v1/completions", long.as_bytes()).await, 400);
    let took = cpu_seconds() - before;
    assert!(took < 0.2, "{took} s");
    // One token too many.
    let mut client = house.channel().await;
    let exact = "b".repeat(32_767);
    let status = client
        .generate(asked(&exact, 1))
        .await
        .expect_err("the worker refuses all");
    assert_eq!(status.message(), "the worker was reached");
    let status = client
        .generate(asked(&(exact + "b"), 1))
        .await
        .expect_err("no room");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("32768"), "{status}");
    assert_eq!(worker.seen().requests, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_protobuf_is_refused() {
    use prost::Message;
    let worker = refuser();
    let house = house(&[&worker], |_| {}).await;
    let channel = Channel::from_shared(format!("http://{}", house.grpc))
        .expect("an address")
        .connect()
        .await
        .expect("it listens");
    let mut rng = support::rng("damaged_protobuf_is_refused");
    let mut sound = asked("prompt", 5);
    sound.sampling = Some(wire::SamplingParams {
        temperature: Some(0.5),
        logit_bias: [(5, 1.0)].into(),
        ..Default::default()
    });
    let sound = sound.encode_to_vec();
    for round in 0..ROUNDS {
        let mut bytes = sound.clone();
        for _ in 0..rng.usize(1..6) {
            let at = rng.usize(0..bytes.len());
            match rng.u8(0..3) {
                0 => bytes[at] = rng.u8(..),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, rng.u8(..)),
            }
        }
        if round % 4 == 0 {
            bytes = (0..rng.usize(0..200)).map(|_| rng.u8(..)).collect();
        }
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.expect("the connection lives");
        let path = tonic::codegen::http::uri::PathAndQuery::from_static(
            "/swallow.inference.v1.GenerationService/Generate",
        );
        let status = grpc
            .unary(tonic::Request::new(bytes.clone()), path, Raw)
            .await
            .expect_err("the worker refuses what the door lets in");
        // tonic itself says Internal of what is no message.
        let decodes = wire::GenerateRequest::decode(bytes.as_slice()).is_ok();
        let expected = [Code::InvalidArgument, Code::NotFound];
        assert!(
            expected.contains(&status.code()) || !decodes && status.code() == Code::Internal,
            "{status} of {bytes:?}"
        );
    }
    assert_eq!(
        house.metric("swallow_router_request_panics_total{protocol=\"grpc\"}"),
        0.0
    );
    house.settles(64).await;
}
