//! A scripted engine behind real sockets: what it says is the test's, how it is said is the router's.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream, stream::BoxStream};
use swallow_policy::ModelId;
use swallow_router::{
    ask::{Ask, Event, Failure, Finish, Refusal, Score},
    engine::{Engine, Run},
    fleet::{ModelEntry, ModelFile, ModelFiles},
    generate::Door,
    grpc::{self, Health},
    http::{self, Front, Limits, Places, Port, Protocol, ShutdownHandle},
    metrics::Metrics,
    openai::{self, Settings},
};
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
};

use super::{EOS, byte_tokenizer, tokenizer_config};

/// The scripted model's context.
pub const CONTEXT: u32 = 512;
/// Its first served name.
pub const MODEL: &str = "tiny";
/// A model that has had no replica yet.
pub const ABSENT: &str = "absent";
/// Largest request body.
pub const MAX_BODY: usize = 64 << 10;

/// What comes of a request.
pub type Events = BoxStream<'static, Result<Event, Failure>>;
type Script = Box<dyn Fn(&Ask) -> Result<Events, Refusal> + Send + Sync>;

/// What the engine has seen.
#[derive(Default)]
pub struct Seen {
    asks: Mutex<Vec<Ask>>,
    stopped: Mutex<Vec<u32>>,
    dropped: AtomicUsize,
    drop_notice: Notify,
    /// What the engine says about discovery; true from the start.
    pub settled: AtomicBool,
    entries: Mutex<Vec<Arc<ModelEntry>>>,
    changed: watch::Sender<()>,
    early_notice: Notify,
}

impl Seen {
    /// All requests so far.
    pub fn asks(&self) -> Vec<Ask> {
        self.asks.lock().expect("not poisoned").clone()
    }

    /// The latest request.
    pub fn ask(&self) -> Ask {
        self.asks().pop().expect("a request was made")
    }

    /// Returns when so many requests wait for their model's files.
    pub async fn all_early(&self, requests: usize) {
        self.until("the requests wait", &self.early_notice, || {
            self.changed.receiver_count() >= requests
        })
        .await;
    }

    /// A first replica of "absent" comes; it serves what `MODEL` does.
    pub fn arrive(&self) {
        let mut entries = self.entries.lock().expect("not poisoned");
        let files = entries[0].files.clone();
        entries[1] = entry(1, ABSENT, &[], files);
        drop(entries);
        self.changed.send_replace(());
    }

    /// Candidates that were stopped.
    pub fn stopped(&self) -> Vec<u32> {
        self.stopped.lock().expect("not poisoned").clone()
    }

    /// Returns when so many runs are gone.
    pub async fn all_dropped(&self, runs: usize) {
        self.until("the runs are dropped", &self.drop_notice, || {
            self.dropped.load(Ordering::Acquire) >= runs
        })
        .await;
    }

    async fn until(&self, what: &str, notice: &Notify, condition: impl Fn() -> bool) {
        let wait = async {
            loop {
                let notice = notice.notified();
                if condition() {
                    return;
                }
                notice.await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(5), wait).await;
        assert!(in_time.is_ok(), "{what}");
    }
}

struct Scripted {
    script: Script,
    seen: Arc<Seen>,
}

struct ScriptedRun {
    events: Events,
    seen: Arc<Seen>,
}

impl Stream for ScriptedRun {
    type Item = Result<Event, Failure>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_next_unpin(cx)
    }
}

impl Run for ScriptedRun {
    fn stop(&mut self, candidate: u32) {
        self.seen.stopped.lock().expect("not poisoned").push(candidate);
    }
}

impl Drop for ScriptedRun {
    fn drop(&mut self) {
        self.seen.dropped.fetch_add(1, Ordering::AcqRel);
        self.seen.drop_notice.notify_waiters();
    }
}

impl Engine for Scripted {
    fn models(&self) -> Vec<Arc<ModelEntry>> {
        self.seen.entries.lock().expect("not poisoned").clone()
    }

    fn model(&self, name: &str) -> Option<Arc<ModelEntry>> {
        let named =
            |entry: &&Arc<ModelEntry>| entry.name == name || entry.aliases.iter().any(|alias| alias == name);
        let entries = self.seen.entries.lock().expect("not poisoned");
        entries.iter().find(named).cloned()
    }

    fn changes(&self) -> watch::Receiver<()> {
        let changes = self.seen.changed.subscribe();
        self.seen.early_notice.notify_waiters();
        changes
    }

    fn generate(&self, ask: Ask) -> BoxFuture<'static, Result<Box<dyn Run>, Refusal>> {
        let events = (self.script)(&ask);
        self.seen.asks.lock().expect("not poisoned").push(ask);
        let seen = Arc::clone(&self.seen);
        async move {
            Ok(Box::new(ScriptedRun {
                events: events?,
                seen,
            }) as Box<dyn Run>)
        }
        .boxed()
    }

    fn is_settled(&self) -> bool {
        self.seen.settled.load(Ordering::Acquire)
    }
}

/// A router before a scripted engine.
pub struct Router {
    /// Where HTTP is.
    pub http: SocketAddr,
    /// Where gRPC is.
    pub grpc: SocketAddr,
    /// What the engine saw.
    pub seen: Arc<Seen>,
    /// Where requests enter.
    pub door: Door,
    /// Ends both servers.
    pub shutdown: ShutdownHandle,
    /// The two servers; true if they finished all that ran.
    pub servers: Vec<tokio::task::JoinHandle<bool>>,
}

fn file(text: String) -> ModelFile {
    // Any name that is its own will do here.
    ModelFile {
        digest: format!("{:x}", text.len()),
        bytes: Bytes::from(text),
    }
}

fn entry(id: u32, name: &str, aliases: &[&str], files: Option<Arc<ModelFiles>>) -> Arc<ModelEntry> {
    Arc::new(ModelEntry {
        name: name.to_owned(),
        aliases: aliases.iter().map(ToString::to_string).collect(),
        max_model_len: CONTEXT,
        vocab_size: 262,
        eos_token_ids: vec![EOS],
        ready_replicas: usize::from(files.is_some()),
        files,
        id: ModelId(id),
        block_sizes: vec![16],
    })
}

/// As `start`, with a chat template of its own.
pub async fn start_with_template(
    template: &str,
    script: impl Fn(&Ask) -> Result<Events, Refusal> + Send + Sync + 'static,
) -> Router {
    let mut config = tokenizer_config();
    config["chat_template"] = template.into();
    start_with(config.to_string(), Settings::new(MAX_BODY), script).await
}

/// As `start`, as an operator wants it.
pub async fn start_set(
    settings: Settings,
    script: impl Fn(&Ask) -> Result<Events, Refusal> + Send + Sync + 'static,
) -> Router {
    start_with(tokenizer_config().to_string(), settings, script).await
}

/// Starts a router on free ports. Besides `MODEL` it knows "absent", which never had a replica, and "mute", whose
/// files have no tokenizer.
pub async fn start(script: impl Fn(&Ask) -> Result<Events, Refusal> + Send + Sync + 'static) -> Router {
    start_set(Settings::new(MAX_BODY), script).await
}

async fn start_with(
    tokenizer_config: String,
    settings: Settings,
    script: impl Fn(&Ask) -> Result<Events, Refusal> + Send + Sync + 'static,
) -> Router {
    let files: ModelFiles = [
        ("tokenizer.json".to_owned(), file(byte_tokenizer().to_string())),
        ("tokenizer_config.json".to_owned(), file(tokenizer_config)),
    ]
    .into_iter()
    .collect();
    let entries = vec![
        entry(0, MODEL, &["org/alias"], Some(Arc::new(files))),
        entry(1, ABSENT, &[], None),
        entry(2, "mute", &[], Some(Arc::new(ModelFiles::default()))),
    ];
    let seen = Arc::new(Seen {
        settled: AtomicBool::new(true),
        entries: Mutex::new(entries),
        ..Seen::default()
    });
    let metrics = Arc::new(Metrics::new());
    let engine = Scripted {
        script: Box::new(script),
        seen: Arc::clone(&seen),
    };
    let door = Door::new(Arc::new(engine), Arc::clone(&metrics));
    let (shutdown, watch) = ShutdownHandle::new();
    let health = Health::new();
    let http = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let grpc = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addresses = [&http, &grpc].map(|listener| listener.local_addr().expect("bound"));
    let servers = [
        (http, Protocol::Http, openai::front_with(door.clone(), settings)),
        (grpc, Protocol::Grpc, grpc::front(&door, &health, MAX_BODY)),
    ];
    let places = Places::new(1024);
    let serve = |(listener, protocol, front): (TcpListener, Protocol, Front)| {
        let port = Port {
            listener,
            protocol,
            front,
            open: metrics.connections(protocol.label()),
            limits: Limits::of(protocol),
            places: places.clone(),
            tls: None,
        };
        tokio::spawn(http::serve(port, watch.clone()))
    };
    tokio::spawn(health.watch(door.clone()));
    let servers = servers.into_iter().map(serve).collect();
    Router {
        http: addresses[0],
        grpc: addresses[1],
        seen,
        door,
        shutdown,
        servers,
    }
}

/// The first event.
pub fn started() -> Result<Event, Failure> {
    Ok(Event::Started { cached_tokens: 2 })
}

/// Tokens of a candidate with made-up scores where asked for: token `t` has logprob -0.5, the one after it -1.5.
pub fn tokens(ask: &Ask, candidate: u32, tokens: &[u32]) -> Result<Event, Failure> {
    let scores = ask
        .logprobs
        .map(|top| tokens.iter().map(|&token| score(token, top)).collect());
    Ok(Event::Tokens {
        candidate,
        tokens: tokens.to_vec(),
        scores: scores.unwrap_or_default(),
    })
}

/// A made-up score with `top` alternatives, the token itself the best.
pub fn score(token: u32, top: u32) -> Score {
    let alternative = |i: u32| ((token + i) % 256, if i == 0 { -0.5 } else { -0.5 - i as f32 });
    Score {
        token,
        logprob: -0.5,
        rank: 1,
        top: (0..top).map(alternative).collect(),
    }
}

/// A candidate's end.
pub fn finished(candidate: u32, why: Finish) -> Result<Event, Failure> {
    Ok(Event::Finished { candidate, why })
}

/// An answer in single bytes, for every candidate, then its end of sequence.
pub fn says(ask: &Ask, text: &str) -> Result<Events, Refusal> {
    let mut events = vec![started()];
    if let Some(top) = ask.prompt_logprobs {
        events.push(Ok(Event::PromptScores(
            ask.prompt[1..].iter().map(|&token| score(token, top)).collect(),
        )));
    }
    for candidate in 0..ask.candidates {
        let cut = (ask.max_tokens as usize).min(text.len());
        events.extend(
            text.bytes()
                .take(cut)
                .map(|byte| tokens(ask, candidate, &[byte.into()])),
        );
        if (ask.max_tokens as usize) > text.len() {
            events.push(tokens(ask, candidate, &[EOS]));
            events.push(finished(candidate, Finish::Eos(EOS)));
        } else {
            events.push(finished(candidate, Finish::Length));
        }
    }
    Ok(stream::iter(events).boxed())
}

/// `events`, and then nothing more, for ever.
pub fn then_hangs(events: Vec<Result<Event, Failure>>) -> Result<Events, Refusal> {
    Ok(stream::iter(events).chain(stream::pending()).boxed())
}
