//! Clients that leave, come too late, or are gone without a word, over every transport and in every phase.

use futures::future::BoxFuture;
use swallow_rpc::worker::v1::cancel::Reason;
use tokio::{io::AsyncReadExt, net::TcpStream};

use super::{shim::Shim, support::http, *};

/// What a cancel may take to reach the worker.
const CANCEL_LIMIT: Duration = Duration::from_millis(50);
/// How far from its time a deadline may be kept.
const DEADLINE_SLACK: Duration = Duration::from_millis(20);
/// A machine that stands still for a moment fails nobody: the best of so many counts.
const TRIES: u32 = 5;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Via {
    GrpcStream,
    GrpcUnary,
    Sse,
    Http,
    /// Leaves with a RST where the others send a FIN.
    SseReset,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Queue,
    Prefill,
    Decode,
}

const PHASES: [Phase; 3] = [Phase::Queue, Phase::Prefill, Phase::Decode];

/// A worker that keeps every request in one phase.
fn keeps_in(phase: Phase) -> MockWorker {
    worker(|config| {
        config.credits = if phase == Phase::Queue { 0 } else { 8 };
        config.hold = phase == Phase::Prefill;
    })
}

/// Asks for what takes a minute and reads whatever comes. Dropping it is leaving.
fn client(house: &House, via: Via, timeout: Option<&'static str>) -> BoxFuture<'static, ()> {
    let (http_address, grpc) = (house.http, house.grpc);
    let generate = asked("hello", 10_000);
    Box::pin(async move {
        match via {
            Via::GrpcStream | Via::GrpcUnary => {
                let mut client = channel(grpc).await;
                if via == Via::GrpcUnary {
                    // How it ends is not looked at: it never should, but for its deadline.
                    let _ = client.generate(with_timeout(generate, timeout)).await;
                } else {
                    let request = wire::StreamGenerateRequest {
                        generate: Some(generate),
                        stream: None,
                    };
                    if let Ok(stream) = client.stream_generate(with_timeout(request, timeout)).await {
                        let mut stream = stream.into_inner();
                        while let Ok(Some(_)) = stream.message().await {}
                    }
                }
            }
            Via::Sse | Via::Http | Via::SseReset => {
                let body = serde_json::json!({
                    "model": "m", "prompt": "hello", "max_tokens": 10_000, "stream": via != Via::Http,
                });
                let headers = match timeout {
                    Some(timeout) => format!("grpc-timeout: {timeout}\r\n"),
                    None => String::new(),
                };
                let mut stream = http::send(
                    http_address,
                    "POST",
                    "/v1/completions",
                    &headers,
                    &body.to_string(),
                )
                .await;
                if via == Via::SseReset {
                    socket2::SockRef::from(&stream)
                        .set_linger(Some(Duration::ZERO))
                        .expect("a socket");
                }
                let mut piece = vec![0; 4096];
                while let Ok(1..) = stream.read(&mut piece).await {}
            }
        }
    })
}

fn with_timeout<T>(message: T, timeout: Option<&str>) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if let Some(timeout) = timeout {
        // The header alone: the client's library must not be the one that ends the call.
        request
            .metadata_mut()
            .insert("grpc-timeout", timeout.parse().expect("ASCII"));
    }
    request
}

/// Until the request is where it is to stay.
async fn arrives(house: &House, worker: &MockWorker, phase: Phase, before: &mock_worker::Seen) {
    match phase {
        Phase::Queue => until("it is queued", || house.dispatcher.counts().queued.requests == 1).await,
        Phase::Prefill => {
            worker
                .until("it is at the worker", |seen| seen.requests > before.requests)
                .await;
        }
        Phase::Decode => {
            worker
                .until("it has tokens", |seen| seen.tokens > before.tokens + 5)
                .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_a_cancel_in_every_phase_on_every_transport() {
    for phase in PHASES {
        let worker = keeps_in(phase);
        let house = house(&[&worker], |_| {}).await;
        let credits = house.dispatcher.counts().credits;
        for via in [
            Via::GrpcStream,
            Via::GrpcUnary,
            Via::Sse,
            Via::Http,
            Via::SseReset,
        ] {
            let mut best = Duration::MAX;
            for _ in 0..TRIES {
                let before = worker.seen();
                let running = tokio::spawn(client(&house, via, None));
                arrives(&house, &worker, phase, &before).await;
                let left = Instant::now();
                running.abort();
                let gone = if phase == Phase::Queue {
                    until("the queue is empty", || {
                        house.dispatcher.counts().queued.requests == 0
                    })
                    .await;
                    Instant::now()
                } else {
                    let cancelled = |seen: &mock_worker::Seen| seen.cancels.len() > before.cancels.len();
                    let seen = worker.until("a cancel came", cancelled).await;
                    let confirmed = |seen: &mock_worker::Seen| seen.confirmed > before.confirmed;
                    worker.until("it is confirmed", confirmed).await;
                    let (_, reason, at) = *seen.cancels.last().expect("it came");
                    assert_eq!(reason, Reason::ClientGone as i32);
                    at
                };
                best = best.min(gone.saturating_duration_since(left));
                house.settles(credits).await;
            }
            println!("{via:?} in {phase:?}: {best:?}");
            assert!(best < CANCEL_LIMIT, "{via:?} in {phase:?}: {best:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_is_kept_in_every_phase() {
    let timeout = Duration::from_millis(300);
    for phase in PHASES {
        let worker = keeps_in(phase);
        let house = house(&[&worker], |_| {}).await;
        let credits = house.dispatcher.counts().credits;
        for via in [Via::GrpcStream, Via::GrpcUnary, Via::Sse, Via::Http] {
            let mut best = Duration::MAX;
            for _ in 0..TRIES {
                let before = worker.seen();
                // Longer by what the connection takes; the request itself begins when it arrives.
                let running = tokio::spawn(client(&house, via, Some("300m")));
                arrives(&house, &worker, Phase::Queue.max_seen(phase), &before).await;
                let began = Instant::now();
                let ended = if phase == Phase::Queue {
                    until("the queue is empty", || {
                        house.dispatcher.counts().queued.requests == 0
                    })
                    .await;
                    Instant::now()
                } else {
                    // The worker keeps the time itself, unless the router is first.
                    until("it is over", || worker.live() == 0).await;
                    Instant::now()
                };
                let took = ended.saturating_duration_since(began);
                best = best.min(took.abs_diff(timeout));
                running.await.expect("the client sees an end");
                house.settles(credits).await;
            }
            println!("{via:?} in {phase:?}: off by {best:?}");
            assert!(best <= DEADLINE_SLACK, "{via:?} in {phase:?}: {best:?}");
        }
    }
}

impl Phase {
    /// Where a request that stays in `phase` is first seen.
    fn max_seen(self, phase: Phase) -> Phase {
        if phase == Self::Queue {
            self
        } else {
            Phase::Prefill
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_gone_without_a_word_leaks_no_stream() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |limits| limits.keepalive = Duration::from_secs(1)).await;
    let mut shim = Shim::before_address(house.grpc).await;
    let mut client = channel(shim.address).await;
    let request = wire::StreamGenerateRequest {
        generate: Some(asked("hello", 30_000)),
        stream: None,
    };
    let mut stream = client
        .stream_generate(request)
        .await
        .expect("accepted")
        .into_inner();
    stream.message().await.expect("no fault");
    shim.swallow();
    let silent = Instant::now();
    worker
        .until("the stream is cancelled", |seen| seen.confirmed == 1)
        .await;
    assert!(
        silent.elapsed() < Duration::from_secs(10),
        "{:?}",
        silent.elapsed()
    );
    house.settles(64).await;
    assert_eq!(house.metric("swallow_router_connections{protocol=\"grpc\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_channel_serves_its_first_request() {
    let worker = worker(|_| {});
    // The connection is closed for idling while the client looks away.
    let house = house(&[&worker], |limits| limits.idle = Duration::from_millis(200)).await;
    let mut client = house.channel().await;
    client.generate(asked("one", 3)).await.expect("served");
    until("the connection is closed", || {
        house.metric("swallow_router_connections{protocol=\"grpc\"}") == 0.0
    })
    .await;
    client
        .generate(asked("two", 3))
        .await
        .expect("the channel has a new connection");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_certain_age_are_left_without_an_error() {
    let worker = worker(|config| config.step = Duration::from_millis(5));
    let house = house(&[&worker], |limits| limits.age = Some(Duration::from_millis(200))).await;
    let mut client = house.channel().await;
    let request = wire::StreamGenerateRequest {
        generate: Some(asked("long", 300)),
        stream: None,
    };
    let mut stream = client
        .stream_generate(request)
        .await
        .expect("accepted")
        .into_inner();
    let reads = async {
        let mut text = String::new();
        while let Some(message) = stream.message().await.expect("its connection has time to end") {
            if let Some(wire::stream_generate_response::Event::Delta(delta)) = message.event {
                text.push_str(&delta.text);
            }
        }
        text
    };
    let mut other = client.clone();
    let asks = async {
        for i in 0..60 {
            let request = || asked(&format!("short {i}"), 2);
            if let Err(status) = other.generate(request()).await {
                // The client's library had not sent it when the connection closed, and does not try again by itself as
                // others do. No such request was lost: the worker counts below.
                assert!(status.message().contains("was canceled"), "{status}");
                other.generate(request()).await.expect("no error");
            }
        }
    };
    let (text, ()) = tokio::join!(reads, asks);
    assert_eq!(text.len(), 300);
    assert_eq!(worker.seen().requests, 61, "each was asked once");
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_outlives_the_grace_of_its_connection_is_cut() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |limits| {
        (limits.age, limits.grace) = (Some(Duration::from_millis(100)), Duration::from_millis(100));
    })
    .await;
    let mut client = house.channel().await;
    let request = wire::StreamGenerateRequest {
        generate: Some(asked("long", 30_000)),
        stream: None,
    };
    let mut stream = client
        .stream_generate(request)
        .await
        .expect("accepted")
        .into_inner();
    let ended = async { while let Ok(Some(_)) = stream.message().await {} };
    tokio::time::timeout(LIMIT, ended).await.expect("it is cut");
    worker
        .until("the worker is told", |seen| seen.confirmed == 1)
        .await;
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_ends_idle_connections_at_once() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |_| {}).await;
    let mut idle = TcpStream::connect(house.http).await.expect("it listens");
    let mut client = house.channel().await;
    client.generate(asked("one", 3)).await.expect("served");
    house.shutdown.begin(LIMIT);
    let mut nothing = [0; 1];
    let read = tokio::time::timeout(LIMIT / 2, idle.read(&mut nothing)).await;
    assert_eq!(read.expect("in time").expect("closed, not reset"), 0);
}
