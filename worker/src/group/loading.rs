//! What is known of a group's loading: how far it is, and what it has allocated.

use std::{
    sync::{OnceLock, atomic::AtomicU64},
    time::{Duration, Instant},
};

use super::GroupSpec;
use crate::model::{Slice, Weights};

/// How far loading is, for whoever watches from another thread.
#[derive(Debug, Default)]
pub struct LoadProgress {
    /// Bytes of the checkpoint's files that the ranks read in all; what several ranks read counts for each.
    pub bytes_total: AtomicU64,
    /// Bytes read so far.
    pub bytes_done: AtomicU64,
    /// When the first rank began to read.
    began: OnceLock<Instant>,
    /// How long it took until every rank had its weights.
    took: OnceLock<Duration>,
}

impl LoadProgress {
    /// A rank begins to read.
    pub(super) fn begin(&self) {
        self.began.get_or_init(Instant::now);
    }

    /// Every rank has its weights.
    pub(super) fn end(&self) {
        if let Some(began) = self.began.get() {
            self.took.get_or_init(|| began.elapsed());
        }
    }

    /// How long reading took, from the first rank's first byte to the last one's last; `None` until then.
    pub fn took(&self) -> Option<Duration> {
        self.took.get().copied()
    }
}

/// Bytes that were allocated, not planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankMemory {
    /// Weights, in the device's layout.
    pub weights_bytes: u64,
    /// Keys and values.
    pub kv_bytes: u64,
    /// Activations, scratch and exchange.
    pub workspace_bytes: u64,
    /// All memory of the rank's GPU; 0 on processors.
    pub gpu_bytes: u64,
    /// What of it nobody uses.
    pub gpu_free_bytes: u64,
}

/// Memory of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryReport {
    /// By rank.
    pub ranks: Vec<RankMemory>,
    /// All ranks together.
    pub total: RankMemory,
}

/// Bytes that all ranks together read of a model's files.
pub(super) fn bytes_to_read(weights: &Weights, spec: &GroupSpec) -> u64 {
    let rank = |rank| {
        let slices = spec.shard(rank).slices(weights.config());
        let bytes = |s: &Slice| s.outs * s.ins * weights.number_bytes(s);
        slices.iter().map(bytes).sum::<usize>() as u64
    };
    (0..spec.n_members()).map(rank).sum()
}
