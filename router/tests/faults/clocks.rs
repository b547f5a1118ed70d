//! A wall clock that jumps under the program: nothing that decides looks at it.

#[path = "../../../tests/support/clock.rs"]
mod clock;

use clock::Clock;

use super::{
    process::{Router, probe, start},
    support::http::{get, post, receive, send},
    *,
};

fn router_by(clock: &Clock, worker: &MockWorker) -> Router {
    let export = |(name, value): (&str, String)| format!("export {name}='{value}';");
    let shell: String = clock.env().map(export).concat();
    start(&shell, "info", &[&format!("--replica=m={}", worker.address)])
}

/// What time the router says it is.
async fn told(router: &Router) -> i64 {
    let body = serde_json::json!({"model": "m", "prompt": "p", "max_tokens": 1});
    let answer = post(router.http, "/v1/completions", &body).await.json();
    answer["created"].as_i64().expect("a time")
}

/// How long a request of 300 ms takes that would take minutes.
async fn deadline(router: &Router) -> Duration {
    let body = serde_json::json!({"model": "m", "prompt": "p", "max_tokens": 30_000}).to_string();
    let began = Instant::now();
    let header = "x-request-timeout-ms: 300\r\n";
    let response = receive(send(router.http, "POST", "/v1/completions", header, &body).await).await;
    assert_eq!(response.status, 504, "{}", response.body);
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wall_clock_that_jumps_changes_no_deadline_no_stream_and_no_count() {
    let worker = worker(|config| config.step = Duration::from_millis(5));
    let clock = Clock::right();
    let mut router = router_by(&clock, &worker);
    router.drain_log();
    router.is_ready("m").await;
    let true_time = told(&router).await;
    // A stream over all jumps.
    let request = wire::StreamGenerateRequest {
        generate: Some(asked("long", 1_000)),
        stream: None,
    };
    let stream = channel(router.grpc).await.stream_generate(request).await;
    let mut stream = stream.expect("let in").into_inner();
    let reading = tokio::spawn(async move {
        let mut text = String::new();
        while let Some(message) = stream.message().await.expect("no fault") {
            if let Some(wire::stream_generate_response::Event::Delta(delta)) = message.event {
                text.push_str(&delta.text);
            }
        }
        text
    });
    for jump in [3_600, -3_600, 86_400 * 365, -true_time + 1, 1] {
        clock.set(jump);
        let seen = told(&router).await - true_time - jump;
        assert!(
            (0..60).contains(&seen),
            "the program sees the jump: off by {seen} s"
        );
        let took = deadline(&router).await;
        let kept = Duration::from_millis(300)..Duration::from_millis(900);
        assert!(kept.contains(&took), "{took:?} after a jump of {jump} s");
        let probes = router.probes;
        let ready = tokio::task::spawn_blocking(move || probe(probes, "/readyz").1).await;
        assert!(ready.expect("no panic").starts_with("HTTP/1.1 200"));
    }
    assert_eq!(
        reading.await.expect("no panic").len(),
        1_000,
        "the stream goes on"
    );
    assert_eq!(worker.seen().sessions, 1, "the session goes on");
    // Times that were measured are those that passed.
    let page = get(router.http, "/metrics").await.body;
    let sums = page.lines().filter(|line| line.contains("_seconds_sum"));
    let mut n_sums = 0;
    for line in sums {
        let seconds: f64 = line
            .rsplit(' ')
            .next()
            .and_then(|value| value.parse().ok())
            .expect("a number");
        assert!((0.0..600.0).contains(&seconds), "{line}");
        n_sums += 1;
    }
    assert!(n_sums > 3, "{n_sums}");
}
