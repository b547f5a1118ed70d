//! The router's process: listens, serves, and on the first signal drains; a second one ends it at once.

use std::{net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use clap::Parser;
use swallow_proto::launch::RouterArgs;
use swallow_router::{
    config::{self, Cli},
    discover::Fixed,
    dispatch::Dispatcher,
    generate::Door,
    grpc,
    http::{self, Protocol, ShutdownHandle},
    metrics::Metrics,
    openai,
};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
};
use tracing::{info, warn};

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
}

/// When the last answer is complete, its bytes have this long to reach the client. Connections that merely stay open,
/// as those of health watchers, get no more.
const LAST_WORDS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args = Cli::parse().args;
    let replicas = match config::check(&args) {
        Ok(replicas) => replicas,
        Err(error) => {
            eprintln!("swallow-router: {error}");
            return ExitCode::from(2);
        }
    };
    config::log(args.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(RunError::Runtime);
    match runtime.and_then(|runtime| runtime.block_on(run(&args, replicas))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("swallow-router: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &RouterArgs, replicas: Fixed) -> Result<(), RunError> {
    let mut signals = Signals::new().map_err(RunError::Signals)?;
    let grpc_listener = listen("grpc-listen", args.grpc_listen).await?;
    let http_listener = listen("http-listen", args.http_listen).await?;
    let metrics = Arc::new(Metrics::new());
    let (dispatcher, supervisor) = Dispatcher::start(args.into(), replicas, metrics.clone());
    let door = Door::new(Arc::new(dispatcher), Arc::clone(&metrics));
    let health = grpc::Health::new();
    let max_bytes = args.max_body_bytes as usize;
    let (shutdown_handle, shutdown) = ShutdownHandle::new();
    let serve = |listener, protocol: Protocol, router| {
        let open = metrics.connections(protocol.label());
        tokio::spawn(http::serve(listener, protocol, router, open, shutdown.clone()))
    };
    for (flag, listener) in [("grpc", &grpc_listener), ("http", &http_listener)] {
        let address = listener
            .local_addr()
            .map(|address| address.to_string())
            .unwrap_or_default();
        info!(protocol = flag, address, "listening");
    }
    let grpc = serve(
        grpc_listener,
        Protocol::Grpc,
        grpc::router(&door, &health, max_bytes),
    );
    let http = serve(
        http_listener,
        Protocol::Http,
        openai::router(door.clone(), max_bytes),
    );
    let watch = tokio::spawn(health.watch(door.clone()));

    let name = signals.next().await;
    let drain = Duration::from_secs(args.drain_timeout_seconds.into());
    info!(
        signal = name,
        drain_seconds = drain.as_secs(),
        "draining; a second signal ends the router at once"
    );
    door.drain();
    shutdown_handle.begin(drain + LAST_WORDS);
    let answers = async {
        supervisor.shutdown(drain).await;
        shutdown_handle.begin(LAST_WORDS);
    };
    let drained = async { tokio::join!(answers, grpc, http, watch) };
    tokio::select! {
        ((), grpc, http, _) = drained => {
            if !(grpc.unwrap_or(false) && http.unwrap_or(false)) {
                info!("connections that stayed open were cut");
            }
            info!("drained");
        }
        name = signals.next() => {
            warn!(signal = name, "ended at once");
            std::process::exit(1);
        }
    }
    Ok(())
}

async fn listen(flag: &'static str, address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| RunError::Listen {
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
