//! What dispatching has to tell, for metrics: plain calls, made as things happen.
//!
//! Calls are made from the hot path, some under a lock: an observer counts and returns.

use std::time::{Duration, Instant};

use swallow_policy::{Depth, Load, Why};

/// Where a replica is, as seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ReplicaState {
    /// Discovered, no session.
    Down,
    /// A session, but it may not be chosen: its files are on their way, or it serves something else.
    Connected,
    /// It may be chosen.
    Ready,
    /// It takes no new request.
    Draining,
    /// No longer discovered.
    Gone,
}

impl ReplicaState {
    /// Every state.
    pub const ALL: [Self; 5] = [
        Self::Down,
        Self::Connected,
        Self::Ready,
        Self::Draining,
        Self::Gone,
    ];

    /// For a metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Connected => "connected",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }
}

/// Why a request went back to the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MoveCause {
    /// The replica's session was lost.
    Lost,
    /// The replica had no room after all.
    Busy,
    /// The replica is going away.
    Draining,
}

impl MoveCause {
    /// Every cause.
    pub const ALL: [Self; 3] = [Self::Lost, Self::Busy, Self::Draining];

    /// For a metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Busy => "busy",
            Self::Draining => "draining",
        }
    }
}

/// How a watch on a model's endpoints ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WatchEnd {
    /// In its time.
    Closed,
    /// Its version was too old; all was listed again.
    Expired,
    /// With an error, or it could not be opened.
    Failed,
}

impl WatchEnd {
    /// For a metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Expired => "expired",
            Self::Failed => "failed",
        }
    }
}

/// Counts what happens. Every call does nothing unless it is written.
#[allow(unused_variables)] // The names are the documentation of what an implementation gets.
pub trait Observer: Send + Sync + 'static {
    /// A replica was chosen for a request, after this time in the queue.
    fn chose(&self, model: &str, replica: &str, why: &Why, waited: Duration) {}
    /// A replica began a request: prompt tokens believed in its cache, and found there.
    fn accepted(&self, model: &str, predicted_tokens: u32, cached_tokens: u32) {}
    /// The queue over all models changed.
    fn queue(&self, depth: Depth) {}
    /// A request lost its place and went back to the queue.
    fn moved(&self, model: &str, cause: MoveCause) {}
    /// A replica changed its state.
    fn replica(&self, model: &str, replica: &str, state: ReplicaState) {}
    /// A replica reported its load.
    fn load(&self, model: &str, replica: &str, load: Load) {}
    /// One Submit frame left with this many requests.
    fn submitted(&self, model: &str, replica: &str, requests: usize) {}
    /// One step's frame came with this many tokens.
    fn stepped(&self, model: &str, replica: &str, tokens: usize) {}
    /// A cancelled request's last word came this long after it was cancelled.
    fn cancelled(&self, model: &str, replica: &str, confirmed_after: Duration) {}
    /// A client's buffer overflowed and its request was cancelled.
    fn slow_client(&self, model: &str) {}
    /// Cache events were missed, so that the replica's cache is unknown until the next session.
    fn cache_events_missed(&self, model: &str, replica: &str) {}
    /// Discovery found so many replicas of a model.
    fn endpoints(&self, model: &str, count: usize) {}
    /// A watch on a model's endpoints ended; another one follows.
    fn watch_ended(&self, model: &str, end: WatchEnd) {}
    /// Nothing was heard from discovery since then; `None`: it is heard.
    fn discovery_stale(&self, model: &str, since: Option<Instant>) {}
}

/// Nobody counts.
impl Observer for () {}
