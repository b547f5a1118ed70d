//! A worker without a model, for faults: the session protocol over a real socket, a cost model, a prefix cache, and a
//! token function of prompt, seed, candidate and position, so that every stream can be checked to the last token.
//!
//! It runs on a runtime of its own, which `kill` tears down with every socket, as SIGKILL would.

#![allow(dead_code, reason = "each test binary uses its part of it")]

#[path = "mock_engine.rs"]
mod engine;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use engine::{Engine, Outgoing, run_engine};
use futures::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use swallow_rpc::worker::v1::{
    self as rpc, SessionRequest, SessionResponse,
    finished::Reason,
    session_request,
    session_response::Frame,
    worker_service_server::{WorkerService, WorkerServiceServer},
};
use tokio::{
    runtime::Runtime,
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

/// Token ids are below this.
pub const VOCABULARY: u32 = 50_000;
/// A prompt that begins with this kills the worker when it is computed.
pub const POISON: u32 = 49_999;

/// What the worker generates at `index`, 0 first.
pub fn token(prompt: &[u32], seed: u64, candidate: u32, index: u32) -> u32 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64 ^ seed.rotate_left(17) ^ u64::from(candidate) << 40;
    for &id in prompt.iter().chain([&index]) {
        hash = (hash ^ u64::from(id))
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(29);
    }
    (hash >> 20) as u32 % (VOCABULARY - 1)
}

/// A letter in its place, for a vocabulary of bytes.
pub fn letter(token: u32) -> u32 {
    u32::from(b'a') + token % 26
}

/// The log-probability that goes with a token.
pub fn logprob(token: u32) -> f32 {
    -((token % 97) as f32) / 16.0
}

/// How the worker is built and behaves; the second half may change while it runs.
#[derive(Clone, Debug)]
pub struct Config {
    pub served_names: Vec<String>,
    pub protocol: u32,
    pub vocab_size: u32,
    pub files: BTreeMap<String, Vec<u8>>,
    pub max_running: u32,
    pub block_tokens: u32,
    pub n_blocks: u32,
    pub credits: u32,
    pub step_tokens: usize,
    pub prefill_tokens_per_second: u32,
    /// It generates letters.
    pub letters: bool,
    /// It generates these over and over, if there are any.
    pub says: Vec<u32>,

    /// Time of a step,
    pub step: Duration,
    /// and what each of its rows adds.
    pub row: Duration,
    /// Steps that began late are made up for, so that it serves as much as it should on a busy machine too.
    pub punctual: bool,
    /// The engine stands still and answers no ping; connections live.
    pub wedged: bool,
    /// Nothing is begun: requests wait.
    pub hold: bool,
    /// Begun requests get no token.
    pub stall: bool,
    /// Nor do those, ever, whose prompt begins with this.
    pub stall_marker: Option<u32>,
    /// The next so many requests end like this.
    pub turn_away: Option<(usize, Reason, String)>,
    /// Credits come back as requests end.
    pub give_credits: bool,
    /// The worker dies when it has generated so many tokens.
    pub die_after: Option<u64>,
    /// Output tokens are counted wrongly.
    pub miscount: bool,
    /// The bytes of a file are not what its digest says.
    pub corrupt_files: bool,
    /// It knows of windows.
    pub windows: bool,
    /// A cache event gets lost.
    pub skip_kv_event: bool,
    /// Each step's frame is followed by one that this version does not know.
    pub unknown_frames: bool,
    /// Blocks that are in the cache from the start.
    pub cached_blocks: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            served_names: vec!["m".into()],
            protocol: 1,
            vocab_size: VOCABULARY,
            files: [("tokenizer.json".to_owned(), b"{}".repeat(200_000))].into(),
            max_running: 64,
            block_tokens: 16,
            n_blocks: 4096,
            credits: 64,
            step_tokens: 2048,
            prefill_tokens_per_second: 100_000,
            letters: false,
            says: Vec::new(),
            step: Duration::from_millis(1),
            row: Duration::ZERO,
            punctual: false,
            wedged: false,
            hold: false,
            stall: false,
            stall_marker: None,
            turn_away: None,
            give_credits: true,
            die_after: None,
            miscount: false,
            corrupt_files: false,
            windows: true,
            skip_kv_event: false,
            unknown_frames: false,
            cached_blocks: 0,
        }
    }
}

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub sessions: u64,
    pub frames: Vec<usize>,
    pub requests: u64,
    /// Handles, with the reason and the time of arrival.
    pub cancels: Vec<(u32, i32, Instant)>,
    pub confirmed: u64,
    pub finished: u64,
    /// Steps in which there was something to do.
    pub steps: u64,
    pub duplicates: u64,
    pub overdrawn: bool,
    pub running: usize,
    pub waiting: usize,
    pub tokens: u64,
    pub most_handles: u32,
    pub attempts: Vec<u32>,
    pub pings: u64,
    pub goodbyes: u64,
    pub cached_tokens: u64,
    /// Prompt tokens that were computed, or are to be.
    pub prefill_tokens: u64,
    pub file_fetches: u64,
    pub most_running: usize,
}

impl Seen {
    /// Requests that had been elsewhere before, once.
    pub fn moved_here(&self) -> usize {
        self.attempts.iter().filter(|&&attempt| attempt == 1).count()
    }
}

struct Inner {
    engine: Mutex<Engine>,
    work: Notify,
    seen: watch::Sender<Seen>,
}

/// A running worker.
pub struct MockWorker {
    inner: Arc<Inner>,
    runtime: Option<Runtime>,
    /// Where it listens.
    pub address: SocketAddr,
}

impl MockWorker {
    /// At any free port.
    pub fn start(config: Config) -> Self {
        Self::start_at("127.0.0.1:0".parse().expect("an address"), config)
    }

    /// At a given address, as after a restart.
    pub fn start_at(address: SocketAddr, config: Config) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let inner = Arc::new(Inner {
            engine: Mutex::new(Engine::new(config)),
            work: Notify::new(),
            seen: watch::Sender::new(Seen::default()),
        });
        // Listening from here on: whoever connects waits for the runtime.
        let socket = socket(address);
        let address = socket.local_addr().expect("it is bound");
        let service = Service(Arc::clone(&inner));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(socket).expect("a listening socket");
            let server = WorkerServiceServer::new(service).max_decoding_message_size(64 << 20);
            // As the worker itself does it: a frame does not wait for the acknowledgement of the last one.
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let _ = tonic::transport::Server::builder()
                .add_service(server)
                .serve_with_incoming(incoming)
                .await;
        });
        runtime.spawn(run_engine(Arc::clone(&inner)));
        Self {
            inner,
            runtime: Some(runtime),
            address,
        }
    }

    /// Changes how it behaves.
    pub fn set(&self, change: impl FnOnce(&mut Config)) {
        change(&mut self.inner.engine().config);
        self.inner.work.notify_one();
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            self.inner.engine().sessions.clear();
            runtime.shutdown_background();
        }
    }

    /// What a group does that failed: every request is told, then the process ends.
    pub fn fail(&self, message: &str) {
        let mut engine = self.inner.engine();
        for sequence in std::mem::take(&mut engine.sequences) {
            let finished = rpc::Finished {
                handle: sequence.request.handle,
                reason: Reason::Error.into(),
                output_tokens: sequence.emitted,
                message: message.to_owned(),
                stop_token_id: None,
            };
            let step = rpc::StepOutput {
                finished: vec![finished],
                ..Default::default()
            };
            for session in engine.sessions.iter().filter(|to| to.id == sequence.session) {
                session.send(Frame::Step(step.clone()));
            }
        }
        engine.dead = true;
        engine.sessions.clear();
    }

    /// Tells every router that it takes no new request.
    pub fn go_away(&self) {
        let mut engine = self.inner.engine();
        engine.config.turn_away = Some((usize::MAX, Reason::Busy, "draining".into()));
        let drain = Some(prost_types::Duration {
            seconds: 30,
            nanos: 0,
        });
        let frame = Frame::GoAway(rpc::GoAway {
            reason: "test".into(),
            drain,
        });
        engine
            .sessions
            .iter()
            .for_each(|session| session.send(frame.clone()));
    }

    /// Ends every session with an error, while the process lives on.
    pub fn break_sessions(&self) {
        let mut engine = self.inner.engine();
        for session in engine.sessions.drain(..) {
            let _ = session.frames.send(Err(Status::internal("the test broke it")));
        }
        engine.sequences.clear();
    }

    /// What happened so far.
    pub fn seen(&self) -> Seen {
        self.inner.seen.borrow().clone()
    }

    /// Waits until something has happened.
    pub async fn until(&self, what: &str, condition: impl Fn(&Seen) -> bool) -> Seen {
        let mut changes = self.inner.seen.subscribe();
        let limit = Duration::from_secs(20);
        let seen = tokio::time::timeout(limit, changes.wait_for(|seen| condition(seen))).await;
        match seen {
            Ok(seen) => seen.expect("the worker has the sender").clone(),
            Err(_) => panic!("waited for {limit:?} in vain: {what}; seen: {:?}", self.seen()),
        }
    }

    /// Sequences that it has not finished.
    pub fn live(&self) -> usize {
        self.inner.engine().sequences.len()
    }

    /// Sequences that wait for their clients.
    pub fn parked(&self) -> usize {
        let engine = self.inner.engine();
        engine.sequences.iter().filter(|of| of.is_parked()).count()
    }

    /// What it generated for each sequence that it has not finished, in the order in which they came.
    pub fn emitted(&self) -> Vec<u32> {
        let engine = self.inner.engine();
        engine.sequences.iter().map(|of| of.emitted).collect()
    }

    /// Keys in its cache.
    pub fn cached(&self) -> Vec<u64> {
        self.inner.engine().cache.iter().copied().collect()
    }
}

impl Drop for MockWorker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The address of a server that was killed is free at once.
pub fn socket(address: SocketAddr) -> std::net::TcpListener {
    for _ in 0..200 {
        match std::net::TcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true).expect("a socket");
                return listener;
            }
            // The dead runtime's threads are still closing theirs.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    panic!("{address} stays taken");
}

impl Inner {
    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        self.seen.send_modify(change);
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

struct Service(Arc<Inner>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for Service {
    type SessionStream = Answers<SessionResponse>;
    type GetModelFileStream = Answers<rpc::GetModelFileResponse>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        if self.0.engine().dead {
            return Err(Status::unavailable("dead"));
        }
        let mut frames = request.into_inner();
        let first = frames.message().await?.and_then(|request| request.frame);
        let Some(session_request::Frame::Hello(hello)) = first else {
            return Err(Status::failed_precondition("the first frame is not a Hello"));
        };
        let (sender, receiver) = mpsc::unbounded_channel();
        let inner = Arc::clone(&self.0);
        let id = {
            let mut engine = inner.engine();
            engine.next_session += 1;
            let id = engine.next_session;
            let credits = i64::from(engine.config.credits);
            let mut outgoing = Outgoing {
                id,
                frames: sender,
                credits,
                kv_seq: 0,
            };
            outgoing.send(Frame::Welcome(engine.welcome()));
            if hello.kv_events {
                outgoing.kv_seq = 1;
                let stored = engine.cache.iter().copied().collect();
                outgoing.send(Frame::Kv(rpc::KvEvents {
                    seq: 1,
                    snapshot: true,
                    stored,
                    removed: vec![],
                }));
            }
            engine.sessions.push(outgoing);
            id
        };
        inner.note(|seen| seen.sessions += 1);
        tokio::spawn(async move {
            while let Some(Ok(request)) = frames.next().await {
                if let Some(frame) = request.frame {
                    inner.engine().take_in(id, frame, &inner);
                    inner.work.notify_one();
                }
            }
            inner.engine().leave(id);
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
    }

    async fn get_model_file(
        &self,
        request: Request<rpc::GetModelFileRequest>,
    ) -> Result<Response<Self::GetModelFileStream>, Status> {
        let wanted = request.into_inner().digest;
        let (file, corrupt) = {
            let engine = self.0.engine();
            let file = engine
                .config
                .files
                .values()
                .find(|bytes| digest(bytes) == wanted)
                .cloned();
            (file, engine.config.corrupt_files)
        };
        self.0.note(|seen| seen.file_fetches += 1);
        let mut file = file.ok_or_else(|| Status::not_found("no file has this digest"))?;
        if corrupt {
            file[0] ^= 1;
        }
        let chunks: Vec<_> = file
            .chunks(256 << 10)
            .map(|chunk| {
                Ok(rpc::GetModelFileResponse {
                    chunk: chunk.to_vec().into(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }
}
