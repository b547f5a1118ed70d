//! Where the replica stands: one value that probes, `/state`, the gRPC health service and the session door all read.
//!
//! Loading => Warming => Serving => Draining; each of them => Failed, which is final. Readiness is Serving and
//! nothing else.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Instant,
};

use serde::Serialize;
use swallow_schedule::Load;
use tokio::sync::watch;

use crate::group::LoadProgress;

/// Where the replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Weights are read.
    Loading,
    /// All weights are in memory; the first step runs on every rank.
    Warming,
    /// Requests are taken.
    Serving,
    /// What runs may finish, nothing new is taken.
    Draining,
    /// The process is about to end.
    Failed,
}

/// Memory by purpose, in bytes, of all ranks together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Weights in the device's number format.
    pub weights_bytes: u64,
    /// Keys and values.
    pub kv_bytes: u64,
    /// Activations, scratch space and what the steps need otherwise.
    pub workspace_bytes: u64,
}

/// Memory as computed before loading and as found after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryReport {
    /// From the checkpoint's headers and the flags; absent until they were read.
    pub planned: Option<Memory>,
    /// From the allocations; absent until the warm-up step is done.
    pub measured: Option<Memory>,
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Progress {
    /// Bytes of weights already in memory.
    pub bytes_done: u64,
    /// Bytes of weights in all; 0 until the checkpoint's headers were read.
    pub bytes_total: u64,
    /// At the mean rate so far; absent before the first bytes and after the last.
    pub eta_seconds: Option<f64>,
    /// How long it took; absent until all are in memory.
    pub seconds: Option<f64>,
}

/// Requests and blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LoadView {
    /// Requests in the running batch.
    pub running: u32,
    /// Requests that wait for a place in it.
    pub waiting: u32,
    /// Blocks that running requests hold.
    pub kv_blocks_used: u32,
    /// Blocks kept only for later prefixes.
    pub kv_blocks_cached: u32,
    /// Blocks in the pool; 0 until loaded.
    pub kv_blocks_total: u32,
}

impl From<Load> for LoadView {
    fn from(load: Load) -> Self {
        Self {
            running: load.running,
            waiting: load.waiting,
            kv_blocks_used: load.blocks_held,
            kv_blocks_cached: load.blocks_cached,
            kv_blocks_total: load.blocks_total,
        }
    }
}

/// The body of `/state`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct View {
    /// Where the replica stands.
    pub phase: Phase,
    /// This replica's name.
    pub replica_id: String,
    /// The model's own name.
    pub model: String,
    /// All names.
    pub served_names: Vec<String>,
    /// Ranks of the group.
    pub tensor_parallel: u32,
    /// Prompt and output together; absent until loaded.
    pub max_model_len: Option<u32>,
    /// How far loading is.
    pub progress: Progress,
    /// Requests and blocks.
    pub load: LoadView,
    /// Planned and measured bytes.
    pub memory: MemoryReport,
    /// Why it failed.
    pub failure: Option<String>,
}

/// Who this replica is; fixed at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// This replica's name.
    pub replica_id: String,
    /// The model's names, its own first.
    pub served_names: Vec<String>,
    /// Ranks of the group.
    pub tensor_parallel: u32,
}

/// Shared by every part of the process.
pub struct State {
    identity: Identity,
    started: Instant,
    phase: watch::Sender<Phase>,
    progress: Arc<LoadProgress>,
    changing: Mutex<Changing>,
}

#[derive(Default)]
struct Changing {
    load: LoadView,
    memory: MemoryReport,
    max_model_len: Option<u32>,
    failure: Option<String>,
}

impl State {
    /// In `Loading`.
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            started: Instant::now(),
            phase: watch::Sender::new(Phase::Loading),
            progress: Arc::new(LoadProgress::default()),
            changing: Mutex::default(),
        }
    }

    /// Who this replica is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What the loader counts into.
    pub fn loading(&self) -> Arc<LoadProgress> {
        Arc::clone(&self.progress)
    }

    /// Where the replica stands now.
    pub fn phase(&self) -> Phase {
        let phase = *self.phase.borrow();
        let progress = self.progress();
        let all_read = progress.bytes_total > 0 && progress.bytes_done >= progress.bytes_total;
        if phase == Phase::Loading && all_read {
            Phase::Warming
        } else {
            phase
        }
    }

    /// Tells of every change between loading, serving, draining and failed.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    // Loading => Serving: every rank has done its warm-up step.
    pub(crate) fn serving(&self) {
        self.step_to(Phase::Serving, |from| from == Phase::Loading);
    }

    // Serving => Draining: what runs may finish.
    pub(crate) fn draining(&self) {
        self.step_to(Phase::Draining, |from| from == Phase::Serving);
    }

    // Any => Failed: for ever; the first reason stays.
    pub(crate) fn failed(&self, reason: &str) {
        self.changing().failure.get_or_insert_with(|| reason.to_owned());
        self.step_to(Phase::Failed, |_| true);
    }

    fn step_to(&self, to: Phase, from: impl Fn(Phase) -> bool) {
        self.phase.send_if_modified(|phase| {
            let moves = *phase != to && from(*phase);
            if moves {
                *phase = to;
            }
            moves
        });
    }

    pub(crate) fn planned(&self, memory: Memory) {
        self.changing().memory.planned = Some(memory);
    }

    pub(crate) fn loaded(&self, measured: Memory, max_model_len: u32) {
        let mut changing = self.changing();
        changing.memory.measured = Some(measured);
        changing.max_model_len = Some(max_model_len);
    }

    pub(crate) fn set_load(&self, load: Load) {
        self.changing().load = load.into();
    }

    /// How far loading is.
    pub fn progress(&self) -> Progress {
        let bytes_done = self.progress.bytes_done.load(Ordering::Relaxed);
        let bytes_total = self.progress.bytes_total.load(Ordering::Relaxed);
        let left = bytes_total.saturating_sub(bytes_done);
        let eta_seconds = (bytes_done > 0 && left > 0)
            .then(|| self.started.elapsed().as_secs_f64() * left as f64 / bytes_done as f64);
        Progress {
            bytes_done,
            bytes_total,
            eta_seconds,
            seconds: self.progress.took().map(|took| took.as_secs_f64()),
        }
    }

    /// Everything, for `/state`.
    pub fn view(&self) -> View {
        let phase = self.phase();
        let progress = self.progress();
        let changing = self.changing();
        View {
            phase,
            replica_id: self.identity.replica_id.clone(),
            model: self.identity.served_names.first().cloned().unwrap_or_default(),
            served_names: self.identity.served_names.clone(),
            tensor_parallel: self.identity.tensor_parallel,
            max_model_len: changing.max_model_len,
            progress,
            load: changing.load,
            memory: changing.memory,
            failure: changing.failure.clone(),
        }
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        // Plain values: a panic while one is written leaves nothing half done.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State::new(Identity {
            replica_id: "r".into(),
            served_names: vec!["m".into()],
            tensor_parallel: 2,
        })
    }

    #[test]
    fn phases_go_forward_alone_and_failed_is_final() {
        let state = state();
        assert_eq!(state.phase(), Phase::Loading);
        state.draining();
        assert_eq!(
            state.phase(),
            Phase::Loading,
            "nothing runs yet that could be drained"
        );
        state.loading().bytes_total.store(10, Ordering::Relaxed);
        state.loading().bytes_done.store(10, Ordering::Relaxed);
        assert_eq!(state.phase(), Phase::Warming);
        state.serving();
        assert_eq!(state.phase(), Phase::Serving);
        state.draining();
        state.serving();
        assert_eq!(state.phase(), Phase::Draining);
        state.failed("rank 1 panicked");
        state.failed("later");
        state.draining();
        assert_eq!(state.view().phase, Phase::Failed);
        assert_eq!(state.view().failure.as_deref(), Some("rank 1 panicked"));
    }

    #[test]
    fn eta_is_there_while_bytes_flow() {
        let state = state();
        assert_eq!(state.progress().eta_seconds, None);
        state.loading().bytes_total.store(10, Ordering::Relaxed);
        state.loading().bytes_done.store(5, Ordering::Relaxed);
        assert!(state.progress().eta_seconds.is_some_and(|eta| eta >= 0.0));
        state.loading().bytes_done.store(10, Ordering::Relaxed);
        assert_eq!(state.progress().eta_seconds, None);
    }
}
