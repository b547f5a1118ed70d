//! The plan carried out in a Kubernetes cluster: observe, plan, apply, tell.
//!
//! Watches keep a picture of the cluster; what changes in it puts the models that it belongs to into a queue; each
//! model in turn is planned for and the plan carried out, by as many tasks as `RECONCILERS`, one task to a model. At
//! rest nothing is written but the Lease. Nothing is kept here that a restart would lose.
//!
//! Rights it uses, by resource (`RIGHTS` of a chart):
//!
//! | Resource | Verbs |
//! |---|---|
//! | swallowmodels | list, watch |
//! | swallowmodels/status | patch |
//! | pods, deployments | list, watch, create, patch, delete |
//! | services, serviceaccounts, poddisruptionbudgets, rolebindings | list, watch, create, patch |
//! | controllerrevisions | list, watch, create, delete |
//! | events (events.k8s.io) | list, watch, create |
//! | nodes, and the pods of all namespaces, unless `--no-nodes` | list, watch |
//! | clusterroles, the routers' one | bind |
//! | leases, in the operator's namespace | get, create, patch |

mod apply;
mod cache;
mod http;
mod lease;
mod observe;
mod pods;
mod queue;
mod room;
mod tell;

use std::{
    collections::HashSet,
    env, io,
    net::SocketAddr,
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::Args;
use kube::{Api, Client};
use swallow_plan::{Images, Plan, Timestamp, plan, validate};
use swallow_proto::launch::LogFormat;
use tokio::{
    net::TcpListener,
    runtime,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::file::Errors;
use apply::{ApplyError, Writer};
use cache::Key;
use http::{Metrics, Rooms};
use lease::Election;
use observe::World;
use queue::Queue;

/// Models that are looked at at the same time.
const RECONCILERS: usize = 4;
/// Threads that ask workers for their state.
const ASKERS: usize = 32;
/// How long running looks may take to end after SIGTERM.
const LAST_LOOKS: Duration = Duration::from_secs(10);

/// Where to work and how.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Namespace whose SwallowModels are served; may be repeated [default: all namespaces]
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Vec<String>,
    /// Image of workers whose SwallowModel names none
    #[arg(long, value_name = "IMAGE", default_value_t = Images::default().worker)]
    worker_image: String,
    /// Image of routers whose SwallowModel names none
    #[arg(long, value_name = "IMAGE", default_value_t = Images::default().router)]
    router_image: String,
    /// ClusterRole that lets routers read EndpointSlices, bound in the namespaces of models
    #[arg(long, value_name = "NAME", default_value_t = Images::default().router_role)]
    router_role: String,
    /// Do not read nodes and the pods on them: what is short for a group is then told in the scheduler's words alone
    #[arg(long)]
    no_nodes: bool,
    /// Work without asking whether another replica does
    #[arg(long)]
    no_leader_election: bool,
    /// Namespace of the Lease that says which replica works [default: the operator's own]
    #[arg(long, value_name = "NAMESPACE")]
    lease_namespace: Option<String>,
    /// Name of that Lease
    #[arg(long, value_name = "NAME", default_value = "swallow-operator")]
    lease_name: String,
    /// Address for /healthz, /readyz and /metrics
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8080")]
    http_listen: SocketAddr,
    /// Form of log lines
    #[arg(long, value_enum, default_value = "json")]
    log_format: LogFormat,
}

/// Why the operator ended.
#[derive(Debug, thiserror::Error)]
enum RunError {
    /// The port is taken, or not ours.
    #[error("--http-listen: cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: io::Error },
    /// There is no cluster.
    #[error("no cluster can be reached: {0}: run in a pod with a service account, or set KUBECONFIG")]
    Cluster(kube::Error),
    /// The system gives no signals or threads.
    #[error("the process cannot be set up: {0}")]
    Process(#[from] io::Error),
    /// The metrics are not sound.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// Another replica works now.
    #[error("the Lease was lost: another replica may work now")]
    LeaseLost,
    /// A task is gone that nothing works without.
    #[error("a task ended that must not: {0}")]
    Task(String),
}

/// Works until SIGTERM.
///
/// # Errors
/// Lines that say why it ended.
pub fn run(args: RunArgs) -> Result<(), Errors> {
    log(args.log_format);
    let runtime = runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(ASKERS)
        .build()
        .map_err(|error| vec![format!("the runtime did not start: {error}")])?;
    let outcome = runtime.block_on(serve(args));
    // Nobody waits for a worker that does not answer.
    runtime.shutdown_background();
    outcome.map_err(|error| vec![error.to_string()])
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}

async fn serve(args: RunArgs) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let client = Client::try_default().await.map_err(RunError::Cluster)?;
    let queue = Arc::new(Queue::default());
    let images = Images {
        worker: args.worker_image.clone(),
        router: args.router_image.clone(),
        router_role: args.router_role.clone(),
    };
    let operator = Arc::new(Operator {
        writer: Writer {
            client: client.clone(),
        },
        world: Arc::new(World::new(images, queue.clone())),
        queue,
        metrics: Arc::new(Metrics::new()?),
        ready: Arc::new(AtomicBool::new(false)),
        instance: identity(),
    });
    let stop = CancellationToken::new();
    let listener = TcpListener::bind(args.http_listen)
        .await
        .map_err(|source| RunError::Listen {
            address: args.http_listen,
            source,
        })?;
    tracing::info!(address = %args.http_listen, "listens");
    let app = http::router(operator.rooms());
    let mut port = tokio::spawn(async move { axum::serve(listener, app).await });
    let mut work = tokio::spawn(operator.clone().work(args, stop.clone()));
    let outcome = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut port => Some(Err(RunError::Task(format!("the HTTP port: {ended:?}")))),
        ended = &mut work => Some(ended.unwrap_or_else(|error| Err(RunError::Task(error.to_string())))),
    };
    if let Some(outcome) = outcome {
        return outcome;
    }
    tracing::info!("stops");
    operator.ready.store(false, Ordering::Relaxed);
    stop.cancel();
    work.await
        .unwrap_or_else(|error| Err(RunError::Task(error.to_string())))
}

/// Tells this replica from all others, those that had its pod's name before included.
fn identity() -> String {
    let pod = env::var("POD_NAME").unwrap_or_else(|_| "swallow-operator".into());
    format!("{pod}_{}_{}", process::id(), Timestamp::now().as_millisecond())
}

/// Everything that a look at a model needs.
struct Operator {
    writer: Writer,
    world: Arc<World>,
    queue: Arc<Queue>,
    metrics: Arc<Metrics>,
    ready: Arc<AtomicBool>,
    instance: String,
}

/// A look at a model that did not succeed.
#[derive(Debug, thiserror::Error)]
enum ReconcileError {
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error("status: {}", apply::said(.0))]
    Tell(#[from] kube::Error),
}

impl Operator {
    fn rooms(&self) -> Rooms {
        Rooms {
            world: self.world.clone(),
            queue: self.queue.clone(),
            metrics: self.metrics.clone(),
            ready: self.ready.clone(),
        }
    }

    /// Waits for the lease, works, and lets go of it.
    async fn work(self: Arc<Self>, args: RunArgs, stop: CancellationToken) -> Result<(), RunError> {
        let client = self.writer.client.clone();
        if args.no_leader_election {
            return self.reconcile_all(&args, &stop).await;
        }
        let namespace = args
            .lease_namespace
            .clone()
            .unwrap_or_else(|| client.default_namespace().to_owned());
        let api = Api::namespaced(client, &namespace);
        let mut election = Election::new(api, args.lease_name.clone(), self.instance.clone());
        tokio::select! {
            // Who stands by is ready to.
            () = election.win(|| self.ready.store(true, Ordering::Relaxed)) => {}
            () = stop.cancelled() => return Ok(()),
        }
        tracing::info!(lease = args.lease_name, "leads");
        let outcome = tokio::select! {
            outcome = self.reconcile_all(&args, &stop) => outcome,
            () = election.keep() => Err(RunError::LeaseLost),
        };
        if !matches!(outcome, Err(RunError::LeaseLost)) {
            election.release().await;
        }
        outcome
    }

    async fn reconcile_all(
        self: &Arc<Self>,
        args: &RunArgs,
        stop: &CancellationToken,
    ) -> Result<(), RunError> {
        self.metrics.is_leader.set(1);
        let client = &self.writer.client;
        let mut watches = JoinSet::new();
        let mut synced = Vec::new();
        let namespaces: HashSet<&str> = args.namespace.iter().map(String::as_str).collect();
        for namespace in &namespaces {
            synced.extend(self.world.watch(client, Some(namespace), &mut watches));
        }
        if namespaces.is_empty() {
            synced.extend(self.world.watch(client, None, &mut watches));
        }
        if !args.no_nodes {
            synced.extend(self.world.watch_nodes(client, &mut watches));
        }
        for mut one in synced {
            tokio::select! {
                told = one.wait_for(|synced| *synced) => drop(told),
                () = stop.cancelled() => return Ok(()),
            }
        }
        self.ready.store(true, Ordering::Relaxed);
        watches.spawn(self.world.clone().ask_workers());
        let mut workers = JoinSet::new();
        for _ in 0..RECONCILERS {
            workers.spawn(self.clone().reconcile_next(stop.clone()));
        }
        tokio::select! {
            Some(ended) = watches.join_next() => return Err(RunError::Task(format!("a watch: {ended:?}"))),
            () = stop.cancelled() => {}
        }
        let ends = async { while workers.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_LOOKS, ends).await.is_err() {
            tracing::warn!("a look at a model was cut off; the next replica looks again");
        }
        Ok(())
    }

    async fn reconcile_next(self: Arc<Self>, stop: CancellationToken) {
        loop {
            let key = tokio::select! {
                key = self.queue.next() => key,
                () = stop.cancelled() => return,
            };
            let begun = Instant::now();
            let outcome = self.reconcile(&key).await;
            self.metrics.seconds.observe(begun.elapsed().as_secs_f64());
            let result = if outcome.is_ok() { "ok" } else { "error" };
            self.metrics.reconciles.with_label_values(&[result]).inc();
            if let Err(error) = &outcome {
                tracing::warn!(model = %key, %error, "to be tried again");
            }
            self.queue.done(&key, outcome.is_ok());
        }
    }

    async fn reconcile(&self, key: &Key) -> Result<(), ReconcileError> {
        let now = Timestamp::now();
        let Some((model, seen)) = self.world.observe(key, now) else {
            return Ok(());
        };
        let mut decided = plan(&model, &seen, now);
        let valid = validate(&model, seen.shape.as_ref()).ok();
        let mut undone: HashSet<&'static str> = HashSet::new();
        let mut outcome = Ok(());
        for action in &decided.actions {
            if outcome.is_ok() {
                tracing::info!(model = %key, %action, "acts");
                outcome = self
                    .writer
                    .carry_out(&self.world, key, valid.as_ref(), &seen, action)
                    .await;
                let counter = match &outcome {
                    Ok(()) => &self.metrics.writes,
                    Err(_) => &self.metrics.write_errors,
                };
                counter.with_label_values(&[action.verb()]).inc();
            }
            if outcome.is_err() {
                undone.insert(action.verb());
            }
        }
        if outcome.is_err()
            && let Some((_, seen)) = self.world.observe(key, now)
        {
            // What the API server refused belongs into this very status.
            decided = plan(&model, &seen, now);
        }
        self.tell(&model, &decided, &undone, now).await?;
        if let Some(time) = decided.look_again {
            let wait = time.duration_since(now);
            let wait = Duration::try_from(wait).unwrap_or_default();
            self.queue
                .at(key.clone(), Instant::now() + wait + Duration::from_millis(10));
        }
        outcome.map_err(ReconcileError::from)
    }

    async fn tell(
        &self,
        model: &swallow_plan::model::SwallowModel,
        decided: &Plan,
        undone: &HashSet<&'static str>,
        now: Timestamp,
    ) -> Result<(), ReconcileError> {
        let client = &self.writer.client;
        let written = tell::status(client, &self.world, model, &decided.status).await?;
        if written {
            self.metrics.writes.with_label_values(&["Status"]).inc();
        }
        for note in &decided.notes {
            if undone.contains(note.reason.as_str()) {
                continue;
            }
            self.metrics.writes.with_label_values(&["Event"]).inc();
            tell::event(client, model, note, now, &self.instance).await;
        }
        Ok(())
    }
}
