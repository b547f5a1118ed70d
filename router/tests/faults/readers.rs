//! Clients that take ten bytes a second, over both fronts, beside others; and, to compare, others alone, before a router
//! and a worker of their own at the same time, so that what else goes on in this machine is the same for both.

use std::sync::Mutex;

use futures::future::join_all;
use prost::Message;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};
use tonic::Code;

use super::{
    process::{Router, start},
    support::http::{get, receive, send},
    *,
};

/// On each front, of the slow ones and of the others.
const EACH: usize = 100;
const CONNECTIONS: usize = 4;
const BYTES_PER_SECOND: u32 = 10;
/// A step costs this and so much for each row: a worker that went on computing for slow clients would be slower for all.
const STEP: Duration = Duration::from_millis(30);
const ROW: Duration = Duration::from_micros(100);
/// One look at the time between tokens. The best of a few counts: what else runs here only makes it longer.
const ROUND: Duration = Duration::from_secs(3);
const ROUNDS: usize = 5;
/// A tenth more may be, and this: so much two busy cores make of a wait. A worker that computed for the slow clients too
/// would need 20 ms more for each step.
const SCHEDULING: Duration = Duration::from_millis(8);
/// What a slow client may cost: a window of tokens, and what a socket and its buffers hold of them.
const TOKENS_MAX: u32 = 1024;
const BYTES_MAX: usize = 64 << 10;

/// A router and its only worker.
struct Side {
    worker: MockWorker,
    router: Router,
    clients: Vec<GenerationServiceClient<Channel>>,
}

/// A client whose HTTP/2 library takes no more of a stream than this before its owner has read.
async fn narrow(address: SocketAddr) -> GenerationServiceClient<Channel> {
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
    let endpoint = endpoint.initial_stream_window_size(8 << 10);
    GenerationServiceClient::new(endpoint.connect().await.expect("the router listens"))
}

impl Side {
    async fn new(args: &[&str]) -> Self {
        let worker = worker(|config| (config.credits, config.max_running) = (1000, 1000));
        let replica = format!("--replica=m={}", worker.address);
        let args: Vec<&str> = args.iter().copied().chain([&*replica]).collect();
        let mut router = start("", "warn,swallow_router=info", &args);
        router.drain_log();
        router.is_ready("m").await;
        let clients = join_all((0..CONNECTIONS).map(|_| narrow(router.grpc))).await;
        Self {
            worker,
            router,
            clients,
        }
    }

    fn pace(&self, step: Duration, row: Duration) {
        self.worker.set(|config| (config.step, config.row) = (step, row));
    }

    async fn grpc(&self, i: usize) -> tonic::Streaming<wire::StreamGenerateResponse> {
        let request = wire::StreamGenerateRequest {
            generate: Some(wire::GenerateRequest {
                logprobs: Some(wire::LogprobOptions {
                    output: true,
                    top_n: 5,
                    ..Default::default()
                }),
                ..asked(&format!("over gRPC {i}"), 30_000)
            }),
            stream: None,
        };
        let stream = self.clients[i % CONNECTIONS]
            .clone()
            .stream_generate(request)
            .await;
        stream.expect("let in").into_inner()
    }

    fn body(&self, i: usize) -> String {
        json!({"model": "m", "prompt": format!("over HTTP {i}"), "max_tokens": 30_000, "stream": true, "logprobs": 5})
            .to_string()
    }

    /// As `send`, by a client whose system takes little before it has read.
    async fn sse_narrow(&self, i: usize) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(16 << 10).expect("a size");
        let mut stream = socket
            .connect(self.router.http)
            .await
            .expect("the router listens");
        let body = self.body(i);
        let head = format!("content-length: {}\r\nconnection: close", body.len());
        let request = format!("POST /v1/completions HTTP/1.1\r\nhost: m\r\n{head}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.expect("it is read");
        stream
    }

    /// `EACH` clients on each front that take ten bytes a second.
    async fn sip(&self, tasks: &mut JoinSet<()>) {
        for i in 0..EACH {
            let mut stream = self.grpc(i).await;
            tasks.spawn(async move {
                while let Some(message) = stream.message().await.expect("no fault") {
                    let bytes = u32::try_from(message.encoded_len()).expect("small");
                    tokio::time::sleep(Duration::from_secs(1) * bytes / BYTES_PER_SECOND).await;
                }
            });
            let mut stream = self.sse_narrow(i).await;
            tasks.spawn(async move {
                let mut bytes = [0; BYTES_PER_SECOND as usize];
                while stream.read(&mut bytes).await.expect("no fault") > 0 {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            });
        }
    }

    /// `EACH` clients on each front that take what comes; the times between.
    async fn gulp(&self, tasks: &mut JoinSet<()>) -> Gaps {
        let gaps = Gaps::default();
        for i in 0..EACH {
            let (mut stream, mut seen) = (self.grpc(1000 + i).await, gaps.of_one());
            tasks.spawn(async move {
                while stream.message().await.expect("no fault").is_some() {
                    seen();
                }
            });
            let mut stream = send(
                self.router.http,
                "POST",
                "/v1/completions",
                "",
                &self.body(1000 + i),
            )
            .await;
            let mut seen = gaps.of_one();
            tasks.spawn(async move {
                let mut bytes = [0; 4096];
                while stream.read(&mut bytes).await.expect("no fault") > 0 {
                    seen();
                }
            });
        }
        gaps
    }
}

/// Times between tokens of all streams.
#[derive(Clone, Default)]
struct Gaps(Arc<Mutex<Vec<Duration>>>);

impl Gaps {
    /// To be called when something comes.
    fn of_one(&self) -> impl FnMut() + use<> {
        let (gaps, mut last) = (self.clone(), None);
        move || {
            let now = Instant::now();
            if let Some(last) = last.replace(now) {
                gaps.0.lock().expect("no panic").push(now - last);
            }
        }
    }

    fn clear(&self) {
        self.0.lock().expect("no panic").clear();
    }

    /// The 99th of a hundred.
    fn p99(&self) -> Duration {
        let mut gaps = self.0.lock().expect("no panic").clone();
        gaps.sort_unstable();
        gaps[gaps.len() * 99 / 100]
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_that_take_ten_bytes_a_second_slow_nobody_and_cost_little() {
    let (alone, beside) = tokio::join!(Side::new(&[]), Side::new(&[]));
    let mut tasks = JoinSet::new();
    beside.sip(&mut tasks).await;
    until("all are parked", || beside.worker.parked() == 2 * EACH).await;
    let each = beside.worker.seen().tokens / (2 * EACH as u64);
    println!("{each} tokens for each slow client");

    for side in [&alone, &beside] {
        side.pace(STEP, ROW);
    }
    let (quick, quick_beside) = (alone.gulp(&mut tasks).await, beside.gulp(&mut tasks).await);
    until("all have begun", || {
        [&alone, &beside]
            .iter()
            .all(|side| side.worker.seen().running >= 2 * EACH)
    })
    .await;
    let bound = |alone: Duration| alone.mul_f64(1.1) + SCHEDULING;
    let (mut best, mut best_beside) = (Duration::MAX, Duration::MAX);
    for round in 1..=ROUNDS {
        quick.clear();
        quick_beside.clear();
        tokio::time::sleep(ROUND).await; // What is measured.
        (best, best_beside) = (best.min(quick.p99()), best_beside.min(quick_beside.p99()));
        println!("round {round}: p99 of the time between tokens {best:?}, beside slow ones {best_beside:?}");
        if best_beside <= bound(best) {
            break;
        }
    }
    assert!(
        best >= STEP + ROW * 2 * EACH as u32,
        "the worker's own pace: {best:?}"
    );
    assert!(best_beside <= bound(best), "{best_beside:?} instead of {best:?}");
    // Nobody was dropped, and what the slow ones have read since was little.
    let each = beside.worker.emitted();
    assert_eq!(each.len(), 4 * EACH);
    let most = each[..2 * EACH].iter().max().expect("two hundred");
    println!("{most} tokens for one of them in the end");
    assert!(*most <= TOKENS_MAX, "{most} tokens for a slow client");
    let more = beside
        .router
        .resident_bytes()
        .saturating_sub(alone.router.resident_bytes());
    println!("{} bytes for each slow client", more / (2 * EACH));
    assert!(
        more / (2 * EACH) <= BYTES_MAX,
        "{} bytes for each slow client",
        more / (2 * EACH)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_nothing_is_given_up_in_its_time_and_told_so() {
    const EACH: usize = 10;
    let side = Side::new(&["--slow-client-seconds=1"]).await;
    let streams = join_all((0..EACH).map(|i| side.grpc(i))).await;
    let sockets = join_all((0..EACH).map(|i| side.sse_narrow(i))).await;
    until("all are parked", || side.worker.parked() == 2 * EACH).await;
    let began = Instant::now();
    side.worker
        .until("all are cancelled", |seen| seen.confirmed as usize == 2 * EACH)
        .await;
    let after = began.elapsed();
    println!("given up {after:?} after the last was parked");
    assert!(after >= Duration::from_millis(500), "{after:?}");
    let page = get(side.router.http, "/metrics").await.body;
    let series = format!("swallow_router_slow_clients_total{{model=\"m\"}} {}\n", 2 * EACH);
    assert!(page.contains(&series), "{page}");
    // What was on its way comes, and then the reason.
    for mut stream in streams {
        let status = loop {
            match stream.message().await {
                Ok(message) => assert!(message.is_some(), "it is no clean end"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("did not read"), "{status}");
    }
    for socket in sockets {
        let answer = receive(socket).await;
        let events = answer.events();
        let last = &events[events.len() - 1];
        assert!(last.contains("did not read"), "{last}");
    }
    assert_eq!(side.worker.live(), 0);
}
