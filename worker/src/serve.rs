//! The `serve` subcommand: sockets first, then the model, then requests, then a drain.
//!
//! HTTP and gRPC listen from the first moment, so that probes and people can watch the loading; the session door
//! opens when the runner has done its warm-up step. One thread loads the model and then runs the loop on it. Written
//! over `Runner`, so that the whole protocol is tested on a runner that fails on purpose.

mod calibrate;
mod compiler;
mod error;
mod facts;
mod load;
mod outbox;
mod servers;
mod session;
mod stop;
mod termination;
mod thread;
mod tls;

use std::{
    io::IsTerminal,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use swallow_proto::launch::{LogFormat, WorkerArgs};
use tokio::{net::TcpListener, runtime, sync::oneshot, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, info};

use self::{
    servers::{serve_grpc, serve_http},
    thread::EngineThread,
    tls::SessionTls,
};
use crate::{
    config::Config,
    engine::{Command, Runner},
    metrics::Metrics,
    state::{Identity, State},
};

pub use error::ServeError;
pub use facts::{Facts, Loaded, ModelFile};
pub use outbox::{Full, Outbox, OutboxStream, outbox};
pub use stop::Stop;
pub use termination::TerminationLog;
pub use tls::{TlsError, TlsFiles};

/// The session protocol's version.
pub const PROTOCOL: u32 = 1;
/// Unread bytes of one session. A router reads all the time; this is minutes of tokens.
const OUTBOX_BYTES: usize = 32 << 20;
/// Last frames may take this long to leave, and the servers this long to close.
const FLUSH_WITHIN: Duration = Duration::from_secs(2);
/// How often loading is logged.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What `serve_on` needs beside a way to load.
pub struct Plan {
    /// Who this replica is.
    pub identity: Identity,
    /// Requests that may wait here while no slot is free.
    pub max_waiting: u32,
    /// How long running requests may finish.
    pub drain_timeout: Duration,
    /// Unread bytes of one session.
    pub outbox_bytes: usize,
    /// Routers speak TLS with these files.
    pub tls: Option<TlsFiles>,
    /// For routers.
    pub grpc: TcpListener,
    /// For probes and people.
    pub http: TcpListener,
}

/// Runs `swallow-worker serve`.
///
/// # Errors
/// It could not start, or it failed. Logged and left as the termination message already.
pub fn run(args: WorkerArgs) -> Result<(), ServeError> {
    init_log(args.log_format, tracing::Level::INFO);
    let termination = TerminationLog::new(args.termination_log.clone());
    termination.on_panic();
    let outcome = run_on_runtime(args);
    if let Err(error) = &outcome {
        let line = termination::one_line(&error.to_string());
        error!("{line}");
        termination.write(&line);
    }
    outcome
}

fn run_on_runtime(args: WorkerArgs) -> Result<(), ServeError> {
    let cores = std::thread::available_parallelism()
        .map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
    let config = Config::new(args, cores)?;
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2) // Compute has the cores; these move frames.
        .thread_name("io")
        .enable_all()
        .build()
        .map_err(|source| ServeError::System {
            what: "the async runtime did not start",
            source,
        })?;
    let outcome = runtime.block_on(async {
        let stop = Stop::on_signals().map_err(|source| ServeError::System {
            what: "signals cannot be listened to",
            source,
        })?;
        let plan = Plan {
            identity: Identity {
                replica_id: config.replica_id.clone(),
                served_names: config.served_names.clone(),
                tensor_parallel: config.tensor_parallel,
            },
            max_waiting: config.max_waiting,
            drain_timeout: config.drain_timeout,
            outbox_bytes: OUTBOX_BYTES,
            tls: config.tls.clone(),
            grpc: listen("grpc-listen", config.grpc_listen).await?,
            http: listen("http-listen", config.http_listen).await?,
        };
        serve_on(plan, move |state| load::load(&config, state), stop).await
    });
    // A stalled rank never ends its thread; the process must.
    runtime.shutdown_background();
    outcome
}

async fn listen(flag: &'static str, address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Listen {
            flag,
            address,
            source,
        })
}

/// Logs to standard error what `RUST_LOG` names, or what is at least as important as `level`.
pub fn init_log(format: LogFormat, level: tracing::Level) {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(level.into())
        .from_env_lossy();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // Fails only where a test has set one before; that one stays.
    let _ = match format {
        LogFormat::Text => log.with_target(false).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}

/// Serves what `load` gives until `stop`. `load` runs on the thread that the loop will have.
///
/// # Errors
/// Loading failed, the group failed, or a second signal came.
pub async fn serve_on<R, L>(plan: Plan, load: L, stop: Stop) -> Result<(), ServeError>
where
    R: Runner,
    L: FnOnce(&State) -> Result<Loaded<R>, ServeError> + Send + 'static,
{
    let model = plan.identity.served_names.first().cloned().unwrap_or_default();
    let metrics = Arc::new(Metrics::new(&model)?);
    let tls = plan.tls.map(SessionTls::load).transpose()?;
    let state = Arc::new(State::new(plan.identity));
    let tasks = TaskTracker::new();
    let open = Arc::new(OnceLock::new());
    let sessions = session::Sessions {
        state: Arc::clone(&state),
        open: Arc::clone(&open),
        outbox_bytes: plan.outbox_bytes,
        tasks: tasks.clone(),
        last_id: 1.into(),
    };
    let down = CancellationToken::new();
    let mut servers: JoinSet<Result<(), ServeError>> = JoinSet::new();
    log_addresses(&plan.grpc, &plan.http);
    servers.spawn(serve_http(
        plan.http,
        Arc::clone(&state),
        Arc::clone(&metrics),
        down.clone(),
    ));
    servers.spawn(serve_grpc(
        plan.grpc,
        tls,
        sessions,
        Arc::clone(&state),
        down.clone(),
    ));

    let thread = EngineThread {
        state: Arc::clone(&state),
        metrics,
        max_waiting: plan.max_waiting,
    };
    let engine = start_engine(thread, load)?;
    let outcome = tokio::select! {
        outcome = live(&state, &open, engine, plan.drain_timeout, &stop) => outcome,
        () = stop.now.cancelled() => Err(ServeError::Interrupted),
        Some(server) = servers.join_next() => server.unwrap_or(Err(ServeError::ServerGone)),
    };
    if let Err(error) = &outcome {
        state.failed(&error.to_string());
    }
    tokio::select! {
        () = close(tasks, servers, down) => {}
        () = stop.now.cancelled() => {}
    }
    outcome
}

/// What the engine's thread tells: that the model is loaded, and how the loop ended.
struct Running {
    loaded: oneshot::Receiver<session::Open>,
    ended: oneshot::Receiver<Result<(), ServeError>>,
}

fn start_engine<R, L>(thread: EngineThread, load: L) -> Result<Running, ServeError>
where
    R: Runner,
    L: FnOnce(&State) -> Result<Loaded<R>, ServeError> + Send + 'static,
{
    let (loaded_tx, loaded) = oneshot::channel();
    let (ended_tx, ended) = oneshot::channel();
    let runtime = runtime::Handle::current();
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || thread.run(load, runtime, loaded_tx, ended_tx))
        .map_err(|source| ServeError::System {
            what: "the engine's thread did not start",
            source,
        })?;
    Ok(Running { loaded, ended })
}

/// Last frames leave, then the servers close. What does not end in time holds nothing that matters any more.
async fn close(tasks: TaskTracker, mut servers: JoinSet<Result<(), ServeError>>, down: CancellationToken) {
    tasks.close();
    if tokio::time::timeout(FLUSH_WITHIN, tasks.wait()).await.is_err() {
        info!("a router did not read its last frames");
    }
    down.cancel();
    let closed = async { while servers.join_next().await.is_some() {} };
    if tokio::time::timeout(FLUSH_WITHIN, closed).await.is_err() {
        info!("a connection did not close");
    }
}

fn log_addresses(grpc: &TcpListener, http: &TcpListener) {
    let address = |listener: &TcpListener| listener.local_addr().map(|address| address.to_string());
    if let (Ok(grpc), Ok(http)) = (address(grpc), address(http)) {
        info!(grpc, http, "listening");
    }
}

/// From loading to the end of the loop.
async fn live(
    state: &State,
    open: &OnceLock<session::Open>,
    engine: Running,
    drain_timeout: Duration,
    stop: &Stop,
) -> Result<(), ServeError> {
    let Running { loaded, mut ended } = engine;
    let word = |ended: Result<Result<(), ServeError>, _>| ended.unwrap_or(Err(ServeError::EngineGone));
    let loaded = tokio::select! {
        // A failed load drops `loaded`; its reason is the loop's word.
        Ok(loaded) = loaded => loaded,
        outcome = &mut ended => return word(outcome),
        () = stop.drain.cancelled() => {
            info!("ended while loading; nothing was served");
            return Ok(());
        }
        () = log_progress(state) => unreachable!("progress is logged for ever"),
    };
    let inbox = loaded.inbox.clone();
    if open.set(loaded).is_ok() {
        state.serving();
        let identity = state.identity();
        info!(
            model = identity.served_names.first(),
            replica = identity.replica_id,
            "ready"
        );
    }
    tokio::select! {
        outcome = &mut ended => return word(outcome),
        () = stop.drain.cancelled() => {}
    }
    state.draining();
    // A loop that is gone has left its word.
    let _ = inbox
        .send(Command::Drain {
            timeout: drain_timeout,
        })
        .await;
    let outcome = word(ended.await);
    if outcome.is_ok() {
        info!("drained");
    }
    outcome
}

async fn log_progress(state: &State) {
    let mut every = tokio::time::interval(PROGRESS_EVERY);
    loop {
        every.tick().await;
        let progress = state.progress();
        let eta = progress.eta_seconds.map(|eta| eta.round());
        info!(
            bytes_done = progress.bytes_done,
            bytes_total = progress.bytes_total,
            eta_seconds = eta,
            "loading"
        );
    }
}
