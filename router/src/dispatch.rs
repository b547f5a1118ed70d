//! From an ask to a replica's tokens: wait, choose, submit, follow; when the replica is lost, go on with another.
//!
//! One lock holds everything that is decided about (`Core`: queue, fleets, who waits) and is never held across an
//! await; sessions push tokens to their requests without it. Each replica has one task, which owns its session; one
//! more task follows discovery and one is the clock. `Supervisor` awaits them all at shutdown.

mod core;
mod flight;
mod generation;
mod output;
mod replicas;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use swallow_policy::{Depth, Limits, Queue};
use swallow_proto::launch::RouterArgs;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tracing::{info, warn};

pub(crate) use flight::{Buffers, Eviction, Flight, Part, Place, Withdrawn};
pub use generation::Generation;

pub(crate) use self::core::Core;
use crate::{
    ask::{Ask, Refusal},
    discover::Discover,
    fleet::{Directory, FileCache, ModelEntry},
    observe::Observer,
    tls::workers::WorkerTls,
    vital::Vitals,
};

/// How long a worker's engine may be silent at most, and as long as it is not known how long its steps take. The CPU
/// device takes seconds for a step of a few thousand prompt tokens; a request's own deadline binds earlier.
pub const PONG_LIMIT: Duration = Duration::from_secs(30);
/// Tokens that wait for one client before it counts as gone: minutes of reading at the speed of any model.
pub const BUFFERED_TOKENS_MAX: usize = 16_384;

/// Bytes that wait for one client, over all its candidates: 256 tokens with 20 alternatives each of a dozen candidates.
pub const BUFFERED_BYTES_MAX: usize = 1 << 20;
/// A proxy that stands still for a minute is seen in the wild; longer, and its client has given up.
pub const SLOW_CLIENT_LIMIT: Duration = Duration::from_secs(120);

/// The dispatcher's bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct DispatchConfig {
    /// What workers log this router as.
    pub router_id: String,
    /// Bounds of the admission queue.
    pub queue: Limits,
    /// Longest wait in it.
    pub max_queue_wait: Duration,
    /// Tokens that wait for one client of a worker that keeps no windows.
    pub max_buffered_tokens: usize,
    /// Bytes that wait for one client: its request's windows follow from it.
    pub max_buffered_bytes: usize,
    /// A client that reads nothing for so long, though its buffer is full, is gone.
    pub slow_client_limit: Duration,
    /// Between two pings of a session.
    pub ping_every: Duration,
    /// A session whose engine has not answered for this long is lost; earlier, if its steps are short.
    pub pong_limit: Duration,
    /// Waits between attempts to reach a replica: the first, and what doubling leads to.
    pub reconnect: (Duration, Duration),
    /// What sessions are secured with; `None`: they speak no TLS.
    pub worker_tls: Option<WorkerTls>,
}

impl From<&RouterArgs> for DispatchConfig {
    fn from(args: &RouterArgs) -> Self {
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self {
            router_id: format!("{}/{}", hostname.trim(), std::process::id()),
            queue: Limits {
                requests: args.max_queued_requests,
                tokens: args.max_queued_tokens,
                bytes: args.max_queued_bytes,
            },
            max_queue_wait: Duration::from_secs(args.max_queue_seconds.into()),
            max_buffered_tokens: BUFFERED_TOKENS_MAX,
            max_buffered_bytes: BUFFERED_BYTES_MAX,
            slow_client_limit: args
                .slow_client_seconds
                .map_or(SLOW_CLIENT_LIMIT, |seconds| Duration::from_secs(seconds.into())),
            ping_every: Duration::from_secs(1),
            pong_limit: PONG_LIMIT,
            reconnect: (Duration::from_millis(100), Duration::from_secs(2)),
            worker_tls: None,
        }
    }
}

/// Takes requests to replicas. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Dispatcher {
    shared: Arc<Shared>,
}

/// What the dispatcher holds at this moment. All zero but for `credits` when nothing is going on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests in the queue.
    pub queued: Depth,
    /// Generations that exist.
    pub open: usize,
    /// Handles in use, over all sessions.
    pub handles: usize,
    /// Tokens that this router's requests still cost the replicas.
    pub work_tokens: u64,
    /// Requests that replicas would take.
    pub credits: i64,
    /// Block keys believed in caches.
    pub cached_keys: usize,
}

/// What every task of the dispatcher has in hand.
pub(crate) struct Shared {
    pub config: DispatchConfig,
    pub observer: Arc<dyn Observer>,
    pub directory: Directory,
    pub files: FileCache,
    core: Mutex<Core>,
    zero: Instant,
    /// Something may be due earlier than the clock knows.
    clock: Notify,
    open: AtomicUsize,
    /// `open` became 0.
    all_closed: Notify,
    /// See `Dispatcher::is_settled`; stays true. A probe reads it without waiting for the lock.
    settled: AtomicBool,
    vitals: Vitals,
}

impl Dispatcher {
    /// Follows `discovery` from now on. Needs a tokio runtime.
    pub fn start(
        config: DispatchConfig,
        discovery: impl Discover,
        observer: Arc<dyn Observer>,
    ) -> (Self, Supervisor) {
        let core = Core::new(Queue::new(config.queue));
        let shared = Arc::new(Shared {
            config,
            observer,
            directory: Directory::default(),
            files: FileCache::default(),
            core: Mutex::new(core),
            zero: Instant::now(),
            clock: Notify::new(),
            open: AtomicUsize::new(0),
            all_closed: Notify::new(),
            settled: AtomicBool::new(false),
            vitals: Vitals::new(),
        });
        shared.declared(discovery.models());
        let (tasks, cut) = (TaskTracker::new(), CancellationToken::new());
        let following = follow(Arc::clone(&shared), discovery, tasks.clone(), cut.clone());
        tasks.spawn(shared.vitals.clone().guard("discovery".into(), following));
        let ticking = clock(Arc::clone(&shared), cut.clone());
        tasks.spawn(shared.vitals.clone().guard("clock".into(), ticking));
        let supervisor = Supervisor {
            shared: Arc::clone(&shared),
            tasks,
            cut: cut.drop_guard(),
        };
        (Self { shared }, supervisor)
    }

    /// All models ever discovered, ready or not, in that order.
    pub fn models(&self) -> Vec<Arc<ModelEntry>> {
        self.shared.directory.all()
    }

    /// The model that has this name, the first or another.
    pub fn model(&self, name: &str) -> Option<Arc<ModelEntry>> {
        self.shared.directory.find(name)
    }

    /// Told after each change of a model or its replicas.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.shared.directory.changes()
    }

    /// Waits in the queue where it must, picks a replica, submits, and resolves when a replica runs it. A request
    /// that was lost with its replica and cannot be tried again resolves too; its stream then begins with the failure.
    /// A stream that loses its replica continues on another after the tokens that had come: the same tokens as without
    /// the loss, if the ask has a seed or is greedy and replicas compute alike.
    ///
    /// Dropping the future, and later the `Generation`, cancels the request at its worker.
    ///
    /// # Errors
    /// It did not start: see `Refusal`.
    pub async fn generate(&self, ask: Ask) -> Result<Generation, Refusal> {
        let flight = self.shared.admit(ask)?;
        let mut generation = Generation::new(flight, Arc::clone(&self.shared));
        generation.accepted().await?;
        Ok(generation)
    }

    /// What it holds now.
    pub fn counts(&self) -> Counts {
        self.shared.counts()
    }

    /// Whether what is there to be found has been: discovery gave its first set, and each replica of it was tried. A
    /// router that takes requests earlier refuses them for want of replicas that another router has.
    pub fn is_settled(&self) -> bool {
        self.shared.is_settled()
    }
}

/// Owns the dispatcher's tasks. Dropping it ends every session at once.
#[derive(Debug)]
pub struct Supervisor {
    shared: Arc<Shared>,
    tasks: TaskTracker,
    cut: DropGuard,
}

/// A replica that is not through with its first attempt by then no longer holds up the router's readiness.
const SETTLE_LIMIT: Duration = Duration::from_secs(15);
/// How long sessions have to say goodbye.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);

impl Supervisor {
    /// What watches over the dispatcher's tasks, and may watch over others.
    pub fn vitals(&self) -> Vitals {
        self.shared.vitals.clone()
    }

    /// Refuses what waits and what comes, lets streams go on for `drain`, fails those that are left, and says goodbye
    /// to the workers.
    pub async fn shutdown(self, drain: Duration) {
        self.shared.stop_admitting();
        let open = self.shared.open.load(Ordering::Acquire);
        info!(open, "draining");
        if tokio::time::timeout(drain, self.shared.wait_all_closed())
            .await
            .is_err()
        {
            warn!(
                open = self.shared.open.load(Ordering::Acquire),
                "streams are cut: the drain time is over"
            );
        }
        self.tasks.close();
        self.shared.stop_moving();
        drop(self.cut);
        if tokio::time::timeout(GOODBYE_LIMIT, self.tasks.wait())
            .await
            .is_err()
        {
            warn!(sessions = self.tasks.len(), "sessions did not end in time");
        }
    }
}

/// Discovery's task: starts and ends sessions.
async fn follow(shared: Arc<Shared>, discovery: impl Discover, tasks: TaskTracker, cut: CancellationToken) {
    let mut sets = std::pin::pin!(discovery.changes());
    loop {
        let set = tokio::select! {
            () = cut.cancelled() => return,
            set = sets.next() => set,
        };
        // No more sets: the last one stays.
        let Some(set) = set else { return };
        for target in shared.discovered(set, &cut) {
            let name = format!("session with {}", target.replica_name);
            let session = crate::session::run(Arc::clone(&shared), target);
            tasks.spawn(shared.vitals.clone().guard(name, session));
        }
    }
}

/// The clock's task: wakes when a wait in the queue is over or a replica has rested.
async fn clock(shared: Arc<Shared>, cut: CancellationToken) {
    loop {
        let due = shared.lock().next_due().map(|due| shared.zero + due);
        let sleep = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = cut.cancelled() => return,
            () = shared.clock.notified() => {}
            () = sleep => shared.tick(),
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The rest is behind the lock, which a formatter must not take.
        f.debug_struct("Shared")
            .field("config", &self.config)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|poisoned| {
            // A request's task panicked in the middle of a decision: what was decided since cannot be trusted.
            self.vitals
                .report("dispatcher", "a panic while a decision was made");
            PoisonError::into_inner(poisoned)
        })
    }

    /// The brain's time.
    pub fn now(&self) -> Duration {
        self.zero.elapsed()
    }

    /// An instant in the brain's time.
    pub fn at(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.zero)
    }

    /// The clock looks again.
    pub fn wake_clock(&self) {
        self.clock.notify_one();
    }

    pub fn opened(&self) {
        self.open.fetch_add(1, Ordering::AcqRel);
    }

    pub fn closed(&self) {
        if self.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.all_closed.notify_waiters();
        }
    }

    async fn wait_all_closed(&self) {
        loop {
            let closed = self.all_closed.notified();
            if self.open.load(Ordering::Acquire) == 0 {
                return;
            }
            closed.await;
        }
    }

    fn counts(&self) -> Counts {
        let core = self.lock();
        let mut counts = Counts {
            queued: core.queue.depth(),
            open: self.open.load(Ordering::Acquire),
            ..Counts::default()
        };
        counts.handles = core.links().map(|link| link.live()).sum();
        for replica in core
            .models
            .iter()
            .flat_map(|model| model.fleet.replicas())
            .map(|(_, replica)| replica)
        {
            let work = replica.work();
            counts.work_tokens += work.waiting_prefill + work.running_prefill + work.decode;
            counts.credits += replica.credits();
            counts.cached_keys += replica.index_len();
        }
        counts
    }

    /// A request is over from this side: it leaves the queue, or its worker is told.
    pub fn clean_up(
        &self,
        flight: &Arc<Flight>,
        place: Place,
        reason: swallow_rpc::worker::v1::cancel::Reason,
    ) {
        match place {
            Place::Nowhere => {}
            Place::Queued => self.leave_queue(flight),
            Place::Placed(link, handles) => {
                let unsent = link.cancel(flight, &handles, reason);
                self.take_back(&link, unsent);
            }
        }
    }
}
