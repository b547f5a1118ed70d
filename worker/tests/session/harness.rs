//! A worker in this process and a router made of a plain gRPC client.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use swallow_rpc::worker::v1::{
    Accepted, Cancel, Finished, GoAway, Hello, LoadReport, Ping, Request, SessionRequest, SessionResponse,
    Submit, Welcome, cancel, finished, session_request, session_response::Frame,
    worker_service_client::WorkerServiceClient,
};
use swallow_schedule::Limits;
use swallow_worker::{
    engine::{Defaults, Door, Runner},
    serve::{Facts, Loaded, ModelFile, Plan, ServeError, Stop, serve_on},
    state::{Identity, Memory, State},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

use crate::fake::{Controls, Fake};

/// Nothing here takes that long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for `future`, not for ever.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come"))
}

pub const EOS: u32 = 97;
pub const VOCAB: u32 = 1000;
pub const BLOCK_TOKENS: u32 = 4;

/// What differs between tests.
#[derive(Clone, Debug)]
pub struct Setup {
    pub max_running: u32,
    pub max_waiting: u32,
    pub n_blocks: u32,
    /// Of the runner.
    pub steps_ahead: usize,
    pub drain_timeout: Duration,
    pub outbox_bytes: usize,
    /// Hold the loading until this is notified.
    pub load_gate: Option<std::sync::Arc<tokio::sync::Notify>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            max_running: 4,
            max_waiting: 4,
            n_blocks: 256,
            steps_ahead: 1,
            drain_timeout: PATIENCE,
            outbox_bytes: 1 << 20,
            load_gate: None,
        }
    }
}

pub fn limits(setup: &Setup) -> Limits {
    Limits {
        block_tokens: BLOCK_TOKENS,
        n_blocks: setup.n_blocks,
        max_running: setup.max_running,
        max_step_tokens: 32,
        max_model_len: 512,
        max_waiting: setup.max_waiting,
        prefix_cache: true,
        key_of: swallow_proto::prefix::next,
    }
}

pub fn files() -> Vec<ModelFile> {
    vec![
        ModelFile {
            name: "config.json".into(),
            digest: "aa".into(),
            bytes: "{}".into(),
        },
        ModelFile {
            name: "tokenizer.json".into(),
            digest: "bb".into(),
            bytes: vec![7; 600_000].into(),
        },
    ]
}

/// What every test's model says of itself.
pub fn model(setup: &Setup) -> (Limits, Facts, Door) {
    let limits = limits(setup);
    let facts = Facts {
        boot_id: [9; 16],
        max_model_len: limits.max_model_len,
        vocab_size: VOCAB,
        eos_token_ids: [EOS].into(),
        files: files(),
    };
    let door = Door {
        max_model_len: limits.max_model_len,
        vocab_size: VOCAB,
        eos_token_ids: [EOS].into(),
        defaults: Defaults::NEUTRAL,
    };
    (limits, facts, door)
}

fn fake_model(
    setup: &Setup,
    controls: Controls,
) -> impl FnOnce(&State) -> Result<Loaded<Fake>, ServeError> + Send + 'static {
    let (limits, facts, door) = model(setup);
    let (gate, steps_ahead) = (setup.load_gate.clone(), setup.steps_ahead);
    let runtime = tokio::runtime::Handle::current();
    move |_| {
        if let Some(gate) = &gate {
            runtime.block_on(gate.notified());
        }
        let measured = Memory {
            weights_bytes: 1,
            kv_bytes: 2,
            workspace_bytes: 3,
        };
        Ok(Loaded {
            runner: Fake::new(controls, steps_ahead),
            limits,
            pace: None,
            facts,
            door,
            measured,
        })
    }
}

/// A running worker.
pub struct Worker {
    pub grpc: SocketAddr,
    pub http: SocketAddr,
    pub controls: Controls,
    pub stop: Stop,
    ended: JoinHandle<Result<(), ServeError>>,
}

impl Worker {
    /// Starts one and waits until it is ready.
    pub async fn ready(setup: Setup) -> Self {
        let worker = Self::start(setup).await;
        worker.health().await.until(ServingStatus::Serving).await;
        worker
    }

    /// Starts one, loading still.
    pub async fn start(setup: Setup) -> Self {
        let controls = Controls::default();
        let theirs = controls.clone();
        Self::launch(&setup, controls, fake_model(&setup, theirs)).await
    }

    /// Starts one that loads what `load` gives.
    pub async fn launch<R, L>(setup: &Setup, controls: Controls, load: L) -> Self
    where
        R: Runner + 'static,
        L: FnOnce(&State) -> Result<Loaded<R>, ServeError> + Send + 'static,
    {
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let grpc = TcpListener::bind(local).await.expect("a free port");
        let http = TcpListener::bind(local).await.expect("a free port");
        let (grpc_at, http_at) = (
            grpc.local_addr().expect("bound"),
            http.local_addr().expect("bound"),
        );
        let plan = Plan {
            identity: Identity {
                replica_id: "replica-0".into(),
                served_names: vec!["echo".into(), "alias".into()],
                tensor_parallel: 2,
            },
            max_waiting: setup.max_waiting,
            drain_timeout: setup.drain_timeout,
            outbox_bytes: setup.outbox_bytes,
            tls: None,
            grpc,
            http,
        };
        let stop = Stop::default();
        let ended = tokio::spawn(serve_on(plan, load, stop.clone()));
        Self {
            grpc: grpc_at,
            http: http_at,
            controls,
            stop,
            ended,
        }
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.grpc)).expect("an address");
        soon("a connection", endpoint.connect()).await.expect("listening")
    }

    pub async fn client(&self) -> WorkerServiceClient<Channel> {
        WorkerServiceClient::new(self.channel().await)
    }

    pub async fn health(&self) -> HealthWatch {
        let mut client = HealthClient::new(self.channel().await);
        let service = "swallow.worker.v1.WorkerService".to_owned();
        let watch = soon("health", client.watch(HealthCheckRequest { service })).await;
        HealthWatch(watch.expect("the service is known").into_inner())
    }

    /// A router without KV events.
    pub async fn router(&self) -> Router {
        self.open(hello()).await.expect("a session")
    }

    /// A router whose connection buffers as little as HTTP/2 lets it.
    pub async fn narrow_router(&self) -> Router {
        let endpoint = Channel::from_shared(format!("http://{}", self.grpc))
            .expect("an address")
            .initial_stream_window_size(65_535)
            .initial_connection_window_size(65_535);
        let channel = soon("a connection", endpoint.connect()).await.expect("listening");
        let first = session_request::Frame::Hello(hello());
        Router::open(WorkerServiceClient::new(channel), first)
            .await
            .expect("a session")
    }

    pub async fn open(&self, hello: Hello) -> Result<Router, Status> {
        Router::open(self.client().await, session_request::Frame::Hello(hello)).await
    }

    /// Status and body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let whole = async {
            let mut stream = TcpStream::connect(self.http).await.expect("listening");
            let request = format!("GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.expect("written");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("read");
            answer
        };
        let answer = soon(path, whole).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .expect("a status");
        (status, body.to_owned())
    }

    pub async fn state(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/state").await.1).expect("JSON")
    }

    /// How the process would have ended.
    pub async fn ended(self) -> Result<(), ServeError> {
        soon("the end", self.ended).await.expect("no panic")
    }
}

pub struct HealthWatch(Streaming<HealthCheckResponse>);

impl HealthWatch {
    pub async fn until(&mut self, wanted: ServingStatus) {
        loop {
            let seen = soon("a change of health", self.0.message())
                .await
                .expect("watched")
                .expect("watched");
            if seen.status() == wanted {
                return;
            }
        }
    }
}

pub fn hello() -> Hello {
    Hello {
        protocol: 1,
        router_id: "router-a".into(),
        kv_events: false,
    }
}

/// A request that echoes `prompt`; its uuid is made of `handle` and the router's number.
pub fn request(handle: u32, prompt: &[u32], max_tokens: u32) -> Request {
    let mut uuid = vec![0; 12];
    uuid.extend(handle.to_be_bytes());
    Request {
        handle,
        request_uuid: uuid,
        prompt_ids: prompt.to_vec(),
        max_tokens,
        ..Request::default()
    }
}

/// What a router knows of one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    pub accepted: Option<Accepted>,
    pub tokens: Vec<u32>,
    /// Position, token, logprob, how many alternatives.
    pub scores: Vec<(u32, u32, f32, u32)>,
    pub finished: Option<Finished>,
}

impl Seen {
    pub fn reason(&self) -> finished::Reason {
        self.finished.as_ref().expect("finished").reason()
    }

    pub fn message(&self) -> &str {
        &self.finished.as_ref().expect("finished").message
    }
}

/// One session, as a router sees it.
pub struct Router {
    to: mpsc::Sender<SessionRequest>,
    from: Streaming<SessionResponse>,
    pub welcome: Welcome,
    /// Granted less sent.
    pub credits: i64,
    pub load: LoadReport,
    pub go_away: Option<GoAway>,
    pub pongs: Vec<u64>,
    pub keys: BTreeSet<u64>,
    kv_seq: u64,
    pub seen: BTreeMap<u32, Seen>,
    pub step_frames: Vec<u64>,
}

impl Router {
    pub async fn open(
        mut client: WorkerServiceClient<Channel>,
        first: session_request::Frame,
    ) -> Result<Self, Status> {
        let (to, requests) = mpsc::channel(64);
        to.send(SessionRequest { frame: Some(first) })
            .await
            .expect("room");
        let answer = soon(
            "an answer to Hello",
            client.session(ReceiverStream::new(requests)),
        )
        .await?;
        let mut from = answer.into_inner();
        let first = soon("Welcome", from.message())
            .await?
            .and_then(|response| response.frame);
        let Some(Frame::Welcome(welcome)) = first else {
            panic!("Welcome comes first, not {first:?}")
        };
        Ok(Self {
            to,
            from,
            credits: welcome.submit_credits.into(),
            welcome,
            load: LoadReport::default(),
            go_away: None,
            pongs: Vec::new(),
            keys: BTreeSet::new(),
            kv_seq: 0,
            seen: BTreeMap::new(),
            step_frames: Vec::new(),
        })
    }

    pub async fn send(&self, frame: session_request::Frame) {
        self.to
            .send(SessionRequest { frame: Some(frame) })
            .await
            .expect("the session is open");
    }

    pub async fn submit(&mut self, requests: Vec<Request>) {
        self.credits -= i64::try_from(requests.len()).expect("few");
        self.send(session_request::Frame::Submit(Submit { requests }))
            .await;
    }

    /// Sends unless the connection is stuffed.
    pub fn try_submit(&self, requests: Vec<Request>) {
        let frame = Some(session_request::Frame::Submit(Submit { requests }));
        let _ = self.to.try_send(SessionRequest { frame });
    }

    pub async fn cancel(&self, handles: &[u32]) {
        let reason = cancel::Reason::ClientGone.into();
        self.send(session_request::Frame::Cancel(Cancel {
            handles: handles.to_vec(),
            reason,
        }))
        .await;
    }

    /// Returns when everything that the loop had said before is read.
    pub async fn ping(&mut self, nonce: u64) {
        self.send(session_request::Frame::Ping(Ping { nonce })).await;
        self.until("Pong", |router| router.pongs.contains(&nonce)).await;
    }

    pub async fn finished(&mut self, handle: u32) -> Seen {
        self.until("Finished", |router| {
            router
                .seen
                .get(&handle)
                .is_some_and(|seen| seen.finished.is_some())
        })
        .await;
        self.seen[&handle].clone()
    }

    /// Reads until `done` holds.
    pub async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let response = soon(what, self.from.message()).await;
            let response = response.unwrap_or_else(|status| panic!("{what}: {status}"));
            let Some(response) = response else {
                panic!("the session ended before {what}")
            };
            self.take(response.frame.expect("a frame"));
        }
    }

    /// Reads to the stream's end and gives how it ended.
    pub async fn end(&mut self) -> Result<(), Status> {
        loop {
            match soon("the stream's end", self.from.message()).await? {
                Some(response) => self.take(response.frame.expect("a frame")),
                None => return Ok(()),
            }
        }
    }

    fn take(&mut self, frame: Frame) {
        match frame {
            Frame::Welcome(_) => panic!("a second Welcome"),
            Frame::Step(step) => {
                self.step_frames.push(step.step);
                for accepted in step.accepted {
                    let old = self
                        .seen
                        .entry(accepted.handle)
                        .or_default()
                        .accepted
                        .replace(accepted);
                    assert_eq!(old, None, "accepted once");
                }
                assert_eq!(step.handle.len(), step.token_id.len());
                for (handle, token) in step.handle.iter().zip(&step.token_id) {
                    let seen = self.seen.entry(*handle).or_default();
                    assert!(seen.accepted.is_some() && seen.finished.is_none(), "{seen:?}");
                    seen.tokens.push(*token);
                }
                if let Some(columns) = step.logprobs {
                    for (i, handle) in columns.handle.iter().enumerate() {
                        let row = (
                            columns.position[i],
                            columns.token_id[i],
                            columns.logprob[i],
                            columns.top_n[i],
                        );
                        self.seen.entry(*handle).or_default().scores.push(row);
                    }
                    let listed: u32 = columns.top_n.iter().sum();
                    assert_eq!(columns.top_ids.len(), listed as usize);
                    assert_eq!(columns.top_logprobs.len(), listed as usize);
                }
                for finished in step.finished {
                    let seen = self.seen.entry(finished.handle).or_default();
                    assert_eq!(seen.finished, None, "finished once");
                    seen.finished = Some(finished);
                }
            }
            Frame::Load(load) => {
                assert!(load.seq > self.load.seq);
                self.load = load;
            }
            Frame::Kv(events) => {
                assert_eq!(events.seq, self.kv_seq + 1, "dense");
                self.kv_seq = events.seq;
                if events.snapshot {
                    self.keys.clear();
                }
                for key in events.removed {
                    assert!(self.keys.remove(&key), "only what was stored is removed");
                }
                for key in events.stored {
                    assert!(self.keys.insert(key), "stored once");
                }
            }
            Frame::Credit(credit) => self.credits += i64::from(credit.add_submits),
            Frame::Pong(pong) => self.pongs.push(pong.nonce),
            Frame::GoAway(go_away) => self.go_away = Some(go_away),
        }
    }
}
