//! Workers that send nonsense: a relay before a sound worker damages, repeats, drops and invents frames of its sessions.
//! The router names it and leaves it; every request ends, memory stays flat, and other sessions notice nothing.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::{
    Stream, StreamExt,
    future::{BoxFuture, join_all},
    stream,
};
use prost::Message;
use swallow_rpc::worker::v1::{self as rpc, SessionResponse, session_response::Frame};
use tokio::sync::broadcast;
use tokio_stream::wrappers::{BroadcastStream, TcpListenerStream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    codegen::{
        Service,
        http::{Request as WireRequest, Response as WireResponse, uri::PathAndQuery},
    },
    server::{Grpc, NamedService, StreamingService},
};

use super::{raw::Raw, *};

/// What is damaged, and how, follows from this and the order of frames.
const SEED: u64 = 0x5EA1_ED11_A125;
/// How long it lies.
const LYING: Duration = Duration::from_secs(4);
/// Liars, each before the same worker.
const LIARS: usize = 4;
/// Frames that it remembers, to say them again.
const REMEMBERED: usize = 64;
/// What the process may grow by.
const GROWTH_MAX: usize = 128 << 20;

/// What the relay does, shared by its sessions.
struct Script {
    lies: AtomicBool,
    rng: Mutex<fastrand::Rng>,
    said: Mutex<Vec<Vec<u8>>>,
    damaged: AtomicUsize,
    sessions: AtomicU64,
    /// Said in every session at once; nothing: the session ends.
    orders: broadcast::Sender<Vec<u8>>,
}

/// The relay.
struct Liar {
    address: SocketAddr,
    script: Arc<Script>,
}

/// One call on its way.
struct Relayed {
    to: Channel,
    path: PathAndQuery,
    script: Arc<Script>,
}

#[derive(Clone)]
struct Relay {
    to: Channel,
    script: Arc<Script>,
}

type Bytes = Pin<Box<dyn Stream<Item = Result<Vec<u8>, Status>> + Send>>;

impl StreamingService<Vec<u8>> for Relayed {
    type Response = Vec<u8>;
    type ResponseStream = Bytes;
    type Future = BoxFuture<'static, Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let mut to = tonic::client::Grpc::new(self.to.clone());
        let (path, script) = (self.path.clone(), Arc::clone(&self.script));
        Box::pin(async move {
            let is_session = path.path().ends_with("/Session");
            let requests = request
                .into_inner()
                .take_while(|frame| std::future::ready(frame.is_ok()));
            let requests = requests.map(|frame| frame.expect("taken while it is one"));
            to.ready()
                .await
                .map_err(|error| Status::unavailable(error.to_string()))?;
            let answers = to
                .streaming(Request::new(requests), path, Raw)
                .await?
                .into_inner();
            if !is_session {
                let answers: Bytes = Box::pin(answers);
                return Ok(Response::new(answers));
            }
            script.sessions.fetch_add(1, Ordering::Relaxed);
            let orders =
                BroadcastStream::new(script.orders.subscribe()).filter_map(|order| async { order.ok() });
            let mut frames = 0u32;
            let lies = answers.flat_map(move |frame| {
                frames += 1;
                let frame = match frame {
                    Ok(frame) => frame,
                    Err(status) => return stream::iter(vec![Err(status)]),
                };
                // The Welcome is true: what it says is checked elsewhere.
                let out = if frames > 1 {
                    script.lie(frame)
                } else {
                    vec![frame]
                };
                stream::iter(out.into_iter().map(Ok).collect::<Vec<_>>())
            });
            let orders = orders.map(|order| match order.is_empty() {
                false => Ok(order),
                true => Err(Status::unavailable("the test ended the session")),
            });
            let whole: Bytes = Box::pin(stream::select(lies, orders));
            Ok(Response::new(whole))
        })
    }
}

impl NamedService for Relay {
    const NAME: &'static str = "swallow.worker.v1.WorkerService";
}

impl Service<WireRequest<Body>> for Relay {
    type Response = WireResponse<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: WireRequest<Body>) -> Self::Future {
        let path = request.uri().path_and_query().expect("gRPC has paths").clone();
        let call = Relayed {
            to: self.to.clone(),
            path,
            script: Arc::clone(&self.script),
        };
        Box::pin(async move { Ok(Grpc::new(Raw).streaming(call, request).await) })
    }
}

impl Liar {
    async fn before(worker: &MockWorker) -> Self {
        let to = Channel::from_shared(format!("http://{}", worker.address)).expect("an address");
        let script = Arc::new(Script {
            lies: AtomicBool::new(false),
            rng: Mutex::new(fastrand::Rng::with_seed(SEED)),
            said: Mutex::default(),
            damaged: AtomicUsize::new(0),
            sessions: AtomicU64::new(0),
            orders: broadcast::Sender::new(REMEMBERED),
        });
        let relay = Relay {
            to: to.connect().await.expect("it listens"),
            script: Arc::clone(&script),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(relay)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        Self { address, script }
    }

    fn lies(&self, on: bool) {
        self.script.lies.store(on, Ordering::Relaxed);
    }

    /// In every session, now.
    fn say(&self, bytes: Vec<u8>) {
        // Nobody hears it where there is no session.
        let _ = self.script.orders.send(bytes);
    }

    fn sessions(&self) -> u64 {
        self.script.sessions.load(Ordering::Relaxed)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Script {
    /// What is said instead of a frame: often the frame itself.
    fn lie(&self, mut frame: Vec<u8>) -> Vec<Vec<u8>> {
        let (mut rng, mut said) = (locked(&self.rng), locked(&self.said));
        if said.len() == REMEMBERED {
            let at = rng.usize(0..REMEMBERED);
            said.swap_remove(at);
        }
        said.push(frame.clone());
        if !self.lies.load(Ordering::Relaxed) || rng.u8(0..3) > 0 {
            return vec![frame];
        }
        self.damaged.fetch_add(1, Ordering::Relaxed);
        match rng.u8(0..8) {
            0 => return vec![],
            1 => return vec![frame.clone(), frame],
            2 => return vec![frame, said[rng.usize(0..said.len())].clone()],
            3 => frame = (0..rng.usize(0..200)).map(|_| rng.u8(..)).collect(),
            4 | 5 => {
                for _ in 0..rng.usize(1..4) {
                    let at = rng.usize(0..=frame.len());
                    match rng.u8(0..3) {
                        0 if at < frame.len() => frame[at] = rng.u8(..),
                        1 => frame.truncate(at),
                        _ => frame.insert(at, rng.u8(..)),
                    }
                }
            }
            _ => {
                let response = SessionResponse::decode(frame.as_slice()).expect("the worker is sound");
                let frame = response.frame.map(|frame| falsified(&mut rng, frame));
                return vec![SessionResponse { frame }.encode_to_vec()];
            }
        }
        vec![frame]
    }
}

/// A message in its form, and false.
fn falsified(rng: &mut fastrand::Rng, frame: Frame) -> Frame {
    let odd = |rng: &mut fastrand::Rng| match rng.u8(0..4) {
        0 => 0,
        1 => u32::MAX,
        2 => rng.u32(..),
        _ => rng.u32(0..40),
    };
    match frame {
        Frame::Step(mut step) => {
            for _ in 0..rng.usize(1..5) {
                match rng.u8(0..6) {
                    0 => step.handle.push(odd(rng)),
                    1 => step.token_id.push(odd(rng)),
                    2 => {
                        step.handle.push(odd(rng));
                        step.token_id.push(odd(rng));
                    }
                    3 => step.accepted.push(rpc::Accepted {
                        handle: odd(rng),
                        cached_tokens: odd(rng),
                    }),
                    4 => step.finished.push(rpc::Finished {
                        handle: odd(rng),
                        reason: rng.i32(-1..12),
                        output_tokens: odd(rng),
                        message: "x".repeat(rng.usize(0..2000)),
                        stop_token_id: rng.bool().then(|| odd(rng)),
                    }),
                    _ => {
                        step.logprobs = Some(rpc::LogprobColumns {
                            handle: vec![odd(rng)],
                            position: vec![odd(rng)],
                            token_id: vec![odd(rng)],
                            logprob: vec![rng.choice([f32::NAN, f32::INFINITY, -1.0]).expect("three")],
                            rank: vec![odd(rng)],
                            top_n: vec![rng.u32(0..3)],
                            top_ids: vec![odd(rng)],
                            top_logprobs: vec![f32::NEG_INFINITY],
                        });
                    }
                }
            }
            Frame::Step(step)
        }
        Frame::Credit(_) => Frame::Credit(rpc::Credit {
            add_submits: odd(rng),
        }),
        Frame::Load(mut load) => {
            for number in [
                &mut load.running,
                &mut load.waiting,
                &mut load.pending_prefill_tokens,
                &mut load.kv_blocks_used,
                &mut load.kv_blocks_total,
                &mut load.step_us_ewma,
                &mut load.prefill_tokens_per_second,
                &mut load.decode_tokens_per_second,
            ] {
                *number = odd(rng);
            }
            Frame::Load(load)
        }
        Frame::Kv(_) => {
            let n = rng.usize(0..20_000);
            Frame::Kv(rpc::KvEvents {
                seq: rng.u64(0..9),
                snapshot: rng.bool(),
                stored: (0..n).map(|_| rng.u64(..)).collect(),
                removed: (0..n / 2).map(|_| rng.u64(..)).collect(),
            })
        }
        Frame::Pong(_) => Frame::Pong(rpc::Pong { nonce: rng.u64(..) }),
        Frame::GoAway(_) | Frame::Welcome(_) => Frame::GoAway(rpc::GoAway {
            reason: "\u{0}\u{202E}".repeat(500),
            drain: Some(prost_types::Duration {
                seconds: i64::MIN,
                nanos: i32::MIN,
            }),
        }),
    }
}

/// Panics of the router's own code in this process.
fn router_panics() -> usize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let own = |at: &std::panic::Location<'_>| {
                at.file().contains("router/src") || at.file().contains("router/policy")
            };
            if info.location().is_some_and(own) {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            before(info);
        }));
    });
    PANICS.load(Ordering::Relaxed)
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = statm
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .expect("a number");
    pages * 4096
}

/// Requests of every kind, one after the other, each with a deadline; how they ended.
async fn client(house: SocketAddr, model: &'static str, n: u64, until: Instant) -> Vec<Code> {
    let mut rng = fastrand::Rng::with_seed(SEED ^ n);
    let mut client = channel(house).await;
    let mut ends = Vec::new();
    while Instant::now() < until {
        let mut generate = asked(&"p".repeat(rng.usize(1..200)), rng.u32(1..40));
        generate.model = model.into();
        generate.candidate_count = rng.u32(1..4);
        generate.logprobs = Some(wire::LogprobOptions {
            output: rng.bool(),
            prompt: rng.u8(0..4) == 0,
            ..Default::default()
        });
        let mut request = Request::new(wire::StreamGenerateRequest {
            generate: Some(generate),
            stream: None,
        });
        request.set_timeout(Duration::from_secs(1));
        let sent = Instant::now();
        let end = match client.stream_generate(request).await {
            Err(status) => status.code(),
            Ok(answer) => {
                let mut answer = answer.into_inner();
                loop {
                    match answer.message().await {
                        Ok(Some(_)) => {}
                        Ok(None) => break Code::Ok,
                        Err(status) => break status.code(),
                    }
                }
            }
        };
        // Whatever the worker says or leaves out, the deadline holds.
        assert!(sent.elapsed() < Duration::from_secs(5), "{:?}", sent.elapsed());
        ends.push(end);
    }
    ends
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_sends_damaged_frames_is_left_and_the_others_serve() {
    let panics = router_panics();
    let (honest, behind) = (
        worker(|_| {}),
        worker(|config| config.served_names = vec!["lies".into()]),
    );
    let mut liars = Vec::new();
    for _ in 0..LIARS {
        liars.push(Liar::before(&behind).await);
    }
    let mut replicas = vec![(honest.address, "m")];
    replicas.extend(liars.iter().map(|liar| (liar.address, "lies")));
    let house = house_serving(replicas, |_| {}, None, None).await;
    let before = resident_bytes();
    liars.iter().for_each(|liar| liar.lies(true));
    let until_then = Instant::now() + LYING;
    let of = |model| (0..8).map(move |n| tokio::spawn(client(house.grpc, model, n, until_then)));
    let (lied_to, served) = (join_all(of("lies")), join_all(of("m")));
    // A lie that ends no session is followed by many more; so that all kinds come to a fresh one, each is short.
    let ends = async {
        loop {
            tokio::time::sleep(Duration::from_millis(80)).await;
            liars.iter().for_each(|liar| liar.say(Vec::new()));
        }
    };
    let (lied_to, served) = tokio::select! {
        both = futures::future::join(lied_to, served) => both,
        () = ends => unreachable!("it goes on"),
    };
    let flat = |ends: Vec<Result<Vec<Code>, _>>| -> Vec<Code> {
        let ends = ends
            .into_iter()
            .flat_map(|ends| ends.expect("a client's own assertions hold"));
        ends.collect()
    };
    let (lied_to, served) = (flat(lied_to), flat(served));
    let damaged: usize = liars
        .iter()
        .map(|liar| liar.script.damaged.load(Ordering::Relaxed))
        .sum();
    let sessions: u64 = liars.iter().map(Liar::sessions).sum();
    println!(
        "{} requests, {damaged} frames damaged in {sessions} sessions, {} others",
        lied_to.len(),
        served.len()
    );
    assert!(damaged > 100 && sessions > 20, "{damaged}, {sessions}: too tame");
    // What it says of a request is the request's end; nothing of it is the router's own failure.
    for end in &lied_to {
        let known = [
            Code::Ok,
            Code::Unavailable,
            Code::DeadlineExceeded,
            Code::Cancelled, // The client's own library kept the deadline first.
            Code::Internal,
            Code::InvalidArgument,
            Code::ResourceExhausted,
        ];
        assert!(known.contains(end), "{end:?}");
    }
    assert!(
        served.len() > 50 && served.iter().all(|&end| end == Code::Ok),
        "{served:?}"
    );
    assert_eq!(honest.seen().sessions, 1, "the other session went on");
    assert_eq!(router_panics(), panics);
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < GROWTH_MAX, "{grown} bytes");
    // Once they tell the truth again, in sessions of their own, all is as if nothing had been.
    let met = liars.iter().map(Liar::sessions).collect::<Vec<_>>();
    for (liar, met) in liars.iter().zip(met) {
        liar.lies(false);
        liar.say(Vec::new());
        until("it is met again", || liar.sessions() > met).await;
    }
    house.are_ready("lies", LIARS).await;
    let mut client = house.channel().await;
    for _ in 0..20 {
        let mut asked = asked("again", 5);
        asked.model = "lies".into();
        client.generate(asked).await.expect("all are sound");
    }
    house.settles(64 * (1 + LIARS as i64)).await;
}

/// Frames in their form that nothing can be made of, and bytes that are none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_makes_no_sense_ends_its_session_by_name() {
    let behind = worker(|config| config.stall = true);
    let liar = Liar::before(&behind).await;
    let house = house_before([liar.address].into_iter(), |_| {}).await;
    let step = |step| SessionResponse {
        frame: Some(Frame::Step(step)),
    };
    let uneven = rpc::StepOutput {
        handle: vec![1, 2],
        token_id: vec![3],
        ..Default::default()
    };
    let columns = rpc::StepOutput {
        logprobs: Some(rpc::LogprobColumns {
            handle: vec![1],
            ..Default::default()
        }),
        ..Default::default()
    };
    let welcome = SessionResponse {
        frame: Some(Frame::Welcome(rpc::Welcome::default())),
    };
    for (bytes, said) in [
        (step(uneven).encode_to_vec(), "2 handles and 1 tokens"),
        (step(columns).encode_to_vec(), "differ in length"),
        (welcome.encode_to_vec(), "Welcome twice"),
        (vec![0xFF; 40], "failed to decode"),
    ] {
        let mut client = house.channel().await;
        let running = tokio::spawn(async move { client.generate(asked("p", 5)).await });
        // A request that loses two replicas is not tried on a third, so it is told of the second.
        for _ in 0..2 {
            let met = liar.sessions();
            until("it is at the worker", || behind.live() == 1).await;
            liar.say(bytes.clone());
            until("the session is another one", || liar.sessions() > met).await;
        }
        let status = running
            .await
            .expect("no panic")
            .expect_err("it lost its replicas");
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        let named = status.message().contains(&liar.address.to_string());
        assert!(named && status.message().contains(said), "{status}");
    }
    // A frame of a later version is no reason to leave.
    let (met, pings) = (liar.sessions(), behind.seen().pings);
    liar.say(vec![0xFA, 0x06, 0x00]);
    behind.until("pings go on", |seen| seen.pings > pings + 2).await;
    assert_eq!(liar.sessions(), met);
}
