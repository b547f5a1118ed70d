//! The router's process: listens, serves, and on the first signal drains; a second one ends it at once.

use std::{net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use swallow_proto::launch::{RouterArgs, WORKER_TLS_NAME};
use swallow_router::{
    config::{self, Cli},
    discover::{Cluster, ClusterError, Fixed, in_cluster},
    dispatch::{DispatchConfig, Dispatcher, Supervisor},
    generate::Door,
    grpc,
    http::{self, LAST_WORDS_LIMIT, Limits, Places, Port, Protocol, ShutdownHandle},
    keys::{ApiKeys, KeysError},
    log,
    metrics::Metrics,
    openai, probe,
    tls::{
        Certificate, TlsError,
        workers::{WorkerTls, WorkerTlsError, WorkerTlsFiles},
    },
    vital::{Panicked, Vitals},
};
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
};
use tracing::{info, warn};

/// Requests cost 6 % less than with the system's allocator and streamed tokens a tenth, and a held stream no more memory.
#[cfg(target_arch = "x86_64")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Why the router could not run.
#[derive(Debug, thiserror::Error)]
enum RunError {
    /// A port is taken, or not ours to listen on.
    #[error("--{flag}: cannot listen on {address}: {source}")]
    Listen {
        flag: &'static str,
        address: SocketAddr,
        source: std::io::Error,
    },
    /// The system gives no signals.
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
    /// The runtime could not be started.
    #[error("cannot start threads: {0}")]
    Runtime(std::io::Error),
    /// There is no API server to ask.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Nobody could be let in.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// Clients could not trust it.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// What workers are shown cannot be used.
    #[error(transparent)]
    WorkerTls(#[from] WorkerTlsError),
    /// A task is gone that nothing works without.
    #[error("{0}; the process ends, because it would answer nobody")]
    Panicked(#[from] Panicked),
}

/// When the last answer is complete, its bytes have this long to reach the client. Connections that merely stay open,
/// as those of health watchers, get no more.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Connections that wait to be accepted, as when all clients of another router come at once; the system may allow fewer.
/// One too many comes again after a second at the earliest.
const BACKLOG: u32 = 4096;

fn main() -> ExitCode {
    let args = Cli::parse().args;
    let replicas = match config::check(&args) {
        Ok(replicas) => replicas,
        Err(error) => {
            eprintln!("swallow-router: {error}");
            return ExitCode::from(2);
        }
    };
    let log = log::start(args.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(RunError::Runtime);
    let outcome = runtime.and_then(|runtime| {
        let outcome = runtime.block_on(run(&args, replicas));
        // Nobody waits for a thread that still tokenises.
        runtime.shutdown_background();
        outcome
    });
    log.flush();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("swallow-router: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &RouterArgs, fixed: Fixed) -> Result<(), RunError> {
    let signals = Signals::new().map_err(RunError::Signals)?;
    let grpc_listener = listen("grpc-listen", args.grpc_listen)?;
    let http_listener = listen("http-listen", args.http_listen)?;
    let metrics = Arc::new(Metrics::new());
    let keys = args.api_keys.as_deref().map(ApiKeys::load).transpose()?;
    let (dispatcher, supervisor) = dispatch(args, fixed, &metrics)?;
    let vitals = supervisor.vitals();
    let door = Door::new(Arc::new(dispatcher), Arc::clone(&metrics));
    answer_probes(args, &door)?;
    let health = grpc::Health::new();
    let max_bytes = args.max_body_bytes as usize;
    let (shutdown_handle, shutdown) = ShutdownHandle::new();
    let places = Places::new(open_files());
    if let Some(keys) = &keys {
        tokio::spawn(vitals.clone().guard("API keys".into(), keys.clone().follow()));
    }
    let certificate = certificate(args, &vitals)?;
    let acceptor = |protocol| certificate.as_ref().map(|it| it.acceptor(protocol)).transpose();
    let (grpc_tls, http_tls) = (acceptor(Protocol::Grpc)?, acceptor(Protocol::Http)?);
    let serve = |listener, protocol: Protocol, tls, front| {
        let front = match &keys {
            Some(keys) => keys.guard(front, protocol),
            None => front,
        };
        let port = Port {
            listener,
            protocol,
            front,
            open: metrics.connections(protocol.label()),
            limits: limits(args, protocol),
            places: places.clone(),
            tls,
        };
        let serving = http::serve(port, shutdown.clone());
        tokio::spawn(
            vitals
                .clone()
                .guard(format!("{} server", protocol.label()), serving),
        )
    };
    announce("grpc", &grpc_listener);
    announce("http", &http_listener);
    let grpc = serve(
        grpc_listener,
        Protocol::Grpc,
        grpc_tls,
        grpc::front(&door, &health, max_bytes),
    );
    let http = serve(
        http_listener,
        Protocol::Http,
        http_tls,
        openai::front_with(door.clone(), settings(args)),
    );
    let watch = tokio::spawn(vitals.clone().guard("health".into(), health.watch(door.clone())));

    let served = [grpc, http];
    let ends = Ends {
        door,
        supervisor,
        shutdown: shutdown_handle,
    };
    ends.at_a_signal(args, signals, served, watch).await
}

/// What is told that the router ends.
struct Ends {
    door: Door,
    supervisor: Supervisor,
    shutdown: ShutdownHandle,
}

impl Ends {
    /// Waits for a signal, then lets clients go elsewhere and streams end.
    async fn at_a_signal(
        self,
        args: &RouterArgs,
        mut signals: Signals,
        [grpc, http]: [JoinHandle<Option<bool>>; 2],
        watch: JoinHandle<Option<()>>,
    ) -> Result<(), RunError> {
        let Self {
            door,
            supervisor,
            shutdown,
        } = self;
        let vitals = supervisor.vitals();
        let name = tokio::select! {
            name = signals.next() => name,
            panicked = vitals.panicked() => {
                door.leave();
                return Err(panicked.into());
            }
        };
        // Not ready from here on. Until that is known everywhere, requests still come, on new connections too, and are
        // served like any other.
        door.leave();
        let delay = Duration::from_secs(args.shutdown_delay_seconds.into());
        let drain = Duration::from_secs(args.drain_timeout_seconds.into());
        info!(
            signal = name,
            delay_seconds = delay.as_secs(),
            drain_seconds = drain.as_secs(),
            "draining; a second signal ends the router at once"
        );
        let answers = async {
            tokio::time::sleep(delay).await;
            door.drain();
            shutdown.begin(drain + LAST_WORDS);
            supervisor.shutdown(drain).await;
            shutdown.begin(LAST_WORDS);
        };
        let drained = async { tokio::join!(answers, grpc, http, watch) };
        tokio::select! {
            ((), grpc, http, _) = drained => {
                let finished = |ended: Result<Option<bool>, _>| matches!(ended, Ok(Some(true)));
                if !(finished(grpc) && finished(http)) {
                    info!("connections that stayed open were cut");
                }
                info!("drained");
            }
            panicked = vitals.panicked() => return Err(panicked.into()),
            name = signals.next() => {
                warn!(signal = name, "ended at once");
                std::process::exit(1);
            }
        }
        Ok(())
    }
}

/// What the operator decided about the HTTP front.
fn settings(args: &RouterArgs) -> openai::Settings {
    openai::Settings {
        tokenizer_info: args.tokenizer_info,
        ..openai::Settings::new(args.max_body_bytes as usize)
    }
}

/// Starts to follow discovery: the replicas of the command line, and the Services of a cluster if it names any.
fn dispatch(
    args: &RouterArgs,
    fixed: Fixed,
    metrics: &Arc<Metrics>,
) -> Result<(Dispatcher, Supervisor), RunError> {
    let worker_tls = worker_tls(args)?;
    let config = DispatchConfig {
        worker_tls: worker_tls.clone(),
        ..args.into()
    };
    let started = |started: (Dispatcher, Supervisor)| {
        if let Some(tls) = worker_tls {
            let vitals = started.1.vitals();
            tokio::spawn(vitals.guard("workers' certificates".into(), tls.follow()));
        }
        started
    };
    if args.discover.is_empty() {
        return Ok(started(Dispatcher::start(config, fixed, metrics.clone())));
    }
    let (client, namespace) = in_cluster(args.namespace.as_deref())?;
    info!(
        namespace,
        services = args.discover.len(),
        "following EndpointSlices"
    );
    let cluster = Cluster {
        client,
        namespace,
        targets: args.discover.clone(),
        fixed,
        observer: metrics.clone(),
    };
    Ok(started(Dispatcher::start(config, cluster, metrics.clone())))
}

/// What sessions with workers are secured with, if they are.
fn worker_tls(args: &RouterArgs) -> Result<Option<WorkerTls>, WorkerTlsError> {
    // The command line has all three or none.
    let (Some(ca), Some(cert), Some(key)) = (&args.worker_ca, &args.worker_cert, &args.worker_key) else {
        return Ok(None);
    };
    let files = WorkerTlsFiles {
        ca: ca.clone(),
        cert: cert.clone(),
        key: key.clone(),
    };
    let name = args.worker_tls_name.as_deref().unwrap_or(WORKER_TLS_NAME);
    WorkerTls::load(files, name).map(Some)
}

/// Probes on a port of their own, where one is given.
fn answer_probes(args: &RouterArgs, door: &Door) -> Result<(), RunError> {
    let Some(address) = args.probe_listen else {
        return Ok(());
    };
    let listening = probe::listen(address, door.clone()).map_err(|source| RunError::Listen {
        flag: "probe-listen",
        address,
        source,
    })?;
    info!(protocol = "probes", address = %listening, "listening");
    Ok(())
}

fn announce(protocol: &'static str, listener: &TcpListener) {
    let address = listener
        .local_addr()
        .map(|address| address.to_string())
        .unwrap_or_default();
    info!(protocol, address, "listening");
}

/// What clients are shown, if they are to speak TLS; from now on as the files have it.
fn certificate(args: &RouterArgs, vitals: &Vitals) -> Result<Option<Certificate>, TlsError> {
    // The command line has both or none.
    let (Some(cert), Some(key)) = (&args.tls_cert, &args.tls_key) else {
        return Ok(None);
    };
    let certificate = Certificate::load(cert, key)?;
    let following = certificate.clone().follow();
    tokio::spawn(vitals.clone().guard("certificate".into(), following));
    Ok(Some(certificate))
}

fn limits(args: &RouterArgs, protocol: Protocol) -> Limits {
    let seconds = |given: u32| Duration::from_secs(given.into());
    let usual = Limits::of(protocol);
    Limits {
        age: match args.max_connection_seconds {
            Some(0) => None,
            Some(age) => Some(seconds(age)),
            None => usual.age,
        },
        grace: args.connection_grace_seconds.map_or(usual.grace, seconds),
        unacknowledged: args
            .slow_client_seconds
            .map_or(usual.unacknowledged, |limit| seconds(limit) + LAST_WORDS_LIMIT),
        ..usual
    }
}

/// How many files this process may open, after asking for as many as it may ask for.
fn open_files() -> usize {
    // Without an answer: what every system grants.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    usize::try_from(if raised { hard } else { soft }).unwrap_or(usize::MAX)
}

fn listen(flag: &'static str, address: SocketAddr) -> Result<TcpListener, RunError> {
    let bind = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // A router that starts anew finds the connections of the last one in TIME_WAIT.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    bind().map_err(|source| RunError::Listen {
        flag,
        address,
        source,
    })
}

/// What asks the process to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
