//! Streams whose beginning lets itself be waited for, and clients that do not wait for ever.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{io::AsyncBufReadExt, sync::Notify};

use super::*;
use crate::support::engine::{Events, Router};

const COMMENT: &str = ": waiting";

/// A router whose streams are quiet for no more than this, before an engine whose events come when the gate opens.
async fn gated(
    gate: &Arc<Notify>,
    events: impl Fn() -> Vec<Result<Event, Failure>> + Send + Sync + 'static,
) -> Router {
    let settings = Settings {
        quiet: Duration::from_millis(20),
        ..Settings::new(MAX_BODY)
    };
    let gate = Arc::clone(gate);
    start_set(settings, move |_| {
        let (gate, events) = (Arc::clone(&gate), events());
        let opened = stream::once(async move {
            gate.notified().await;
            stream::iter(events)
        });
        let events: Events = opened.flatten().boxed();
        Ok(events)
    })
    .await
}

/// The response's body, read until `n` comments have come, and what came after the gate was opened.
async fn read_after(
    router: &Router,
    gate: &Notify,
    path: &str,
    body: &Value,
    n: usize,
) -> (u16, Vec<String>) {
    let headers = "content-type: application/json\r\n";
    let mut stream =
        tokio::io::BufReader::new(send(router.http, "POST", path, headers, &body.to_string()).await);
    let (mut status, mut comments, mut events) = (0, 0, Vec::new());
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.expect("UTF-8") == 0 {
            return (status, events);
        }
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("HTTP/1.1 ") {
            status = rest[..3].parse().expect("a status");
        } else if line == COMMENT {
            assert!(events.is_empty(), "nobody waits any more");
            comments += 1;
            if comments == n {
                gate.notify_one();
            }
        } else if let Some(data) = line.strip_prefix("data: ") {
            assert!(comments >= n, "{comments} comments came first");
            events.push(data.to_owned());
        }
    }
}

#[tokio::test]
async fn a_stream_that_waits_is_kept_alive_by_comments() {
    let gate = Arc::new(Notify::new());
    let said = || {
        let text = |byte: u8| Event::Tokens {
            candidate: 0,
            tokens: vec![byte.into()],
            scores: Vec::new(),
        };
        vec![
            started(),
            Ok(text(b'o')),
            Ok(text(b'k')),
            finished(0, Finish::Length),
        ]
    };
    let router = gated(&gate, said).await;
    let chat = json!({"model": "tiny", "messages": user("q"), "stream": true, "max_tokens": 2});
    let text = json!({"model": "tiny", "prompt": "p", "stream": true, "max_tokens": 2});
    for (path, body) in [(CHAT, chat), (TEXT, text)] {
        let (status, events) = read_after(&router, &gate, path, &body, 3).await;
        assert_eq!(status, 200);
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
        let told: String = events[..events.len() - 1]
            .iter()
            .filter_map(|event| {
                let choice = &serde_json::from_str::<Value>(event).expect("JSON")["choices"][0];
                let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
                text.map(str::to_owned)
            })
            .collect();
        assert_eq!(told, "ok");
    }
}

#[tokio::test]
async fn what_fails_after_a_comment_is_the_last_event() {
    let gate = Arc::new(Notify::new());
    let lost = || {
        let cause = "its socket closed".to_owned();
        vec![Err(Failure::ReplicaLost {
            replica: "r".into(),
            cause,
        })]
    };
    let router = gated(&gate, lost).await;
    let body = json!({"model": "tiny", "messages": user("q"), "stream": true});
    let (status, events) = read_after(&router, &gate, CHAT, &body, 1).await;
    assert_eq!((status, events.len()), (200, 1), "{events:?}");
    assert!(events[0].contains("its socket closed"), "{events:?}");
    // The call is counted by how it ended, not by its status.
    let (text, _) = router.door.metrics().text();
    let ended = text
        .lines()
        .find(|line| line.starts_with("swallow_router_requests_total"));
    assert!(
        ended.is_some_and(|line| line.contains("UNAVAILABLE")),
        "{ended:?}"
    );
}

#[tokio::test]
async fn who_leaves_while_it_waits_is_not_waited_for() {
    let gate = Arc::new(Notify::new());
    let router = gated(&gate, || vec![started()]).await;
    let body = json!({"model": "tiny", "prompt": "p", "stream": true}).to_string();
    let mut stream = send(router.http, "POST", TEXT, "", &body).await;
    let mut first = [0; 64];
    stream.read_exact(&mut first).await.expect("a response begins");
    drop(stream);
    router.seen.all_dropped(1).await;
}

#[tokio::test]
async fn a_clients_deadline_binds_the_whole_request() {
    const WAITS: Duration = Duration::from_millis(150);
    let router = start(|ask| match &ask.prompt[1..] {
        [104] => then_hangs(vec![]),
        _ => then_hangs(vec![started(), tokens(ask, 0, &[b'a'.into()])]),
    })
    .await;
    let mut runs = 0;
    for (header, stream, prompt, status) in [
        ("x-request-timeout-ms: 150", false, "h", 504),
        ("grpc-timeout: 150m", false, "go", 504),
        ("grpc-timeout: 1H\r\nx-request-timeout-ms: 150", true, "h", 504),
        ("x-request-timeout-ms: 150", true, "go", 200),
    ] {
        let body = json!({"model": "tiny", "prompt": prompt, "stream": stream}).to_string();
        let sent = Instant::now();
        let response = receive(send(router.http, "POST", TEXT, &format!("{header}\r\n"), &body).await).await;
        let took = sent.elapsed();
        assert!(took >= WAITS && took < WAITS * 4, "{took:?}");
        assert_eq!(response.status, status, "{header}: {}", response.body);
        let error = if status == 200 {
            let events = response.events();
            assert!(
                events[0].contains("\"a\""),
                "what came before is told: {events:?}"
            );
            serde_json::from_str(events.last().expect("an error")).expect("JSON")
        } else {
            response.json()
        };
        assert_eq!(error["error"]["code"], "decode_deadline", "{error}");
        runs += 1;
        router.seen.all_dropped(runs).await;
        assert!(router.seen.ask().deadline.is_some(), "the worker is told");
    }
    for header in [
        "x-request-timeout-ms: soon",
        "x-request-timeout-ms: -1",
        "grpc-timeout: 5",
    ] {
        let body = json!({"model": "tiny", "prompt": "p"}).to_string();
        let response = receive(send(router.http, "POST", TEXT, &format!("{header}\r\n"), &body).await).await;
        let name = header.split(':').next();
        assert_eq!(
            (response.status, response.json()["error"]["param"].as_str()),
            (400, name),
            "{header}"
        );
    }
    let body = json!({"model": "tiny", "prompt": "p"}).to_string();
    let late = receive(send(router.http, "POST", TEXT, "x-request-timeout-ms: 0\r\n", &body).await).await;
    assert_eq!(late.status, 504);
}

#[tokio::test]
async fn the_first_requests_of_a_model_wait_for_what_it_is_made_of() {
    let router = start(|ask| says(ask, "here")).await;
    let text = json!({"model": ABSENT, "prompt": "p"});
    let streamed = json!({"model": ABSENT, "prompt": "p", "stream": true});
    let ids = json!({"model": ABSENT, "prompt": [1, 2], "max_tokens": 9});
    let tokenize = json!({"model": ABSENT, "prompt": "p"});
    let asked = [
        (TEXT, &text),
        (TEXT, &streamed),
        (TEXT, &ids),
        ("/tokenize", &tokenize),
    ];
    let answers = futures::future::join_all(asked.map(|(path, body)| post(router.http, path, body)));
    let arrives = async {
        router.seen.all_early(asked.len()).await;
        router.seen.arrive();
    };
    let (answers, ()) = tokio::join!(answers, arrives);
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200; 4]);
    assert_eq!(answers[2].json()["choices"][0]["text"], "here");
}

#[tokio::test]
async fn a_deadline_binds_those_too_who_wait_for_a_first_replica() {
    let router = start(|ask| says(ask, "here")).await;
    let body = json!({"model": ABSENT, "prompt": "p"}).to_string();
    let headers = "content-type: application/json\r\nx-request-timeout-ms: 50\r\n";
    let began = Instant::now();
    let response = receive(send(router.http, "POST", TEXT, headers, &body).await).await;
    assert_eq!(response.status, 504);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}
