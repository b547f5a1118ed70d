//! What the ranks of a group share: an area each rank writes and all ranks read, and the barrier between the two.
//!
//! Sums are taken by every rank for itself, in rank order, so that all get the same bits without a second meeting. Two
//! areas take turns: a rank may write one again only after the next meeting, when all have finished reading it.

use std::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{
    barrier::{Barrier, Closed},
    buffer::Rows,
};
use crate::device::DeviceError;

/// Rows of logits that are computed at a time.
pub const HEAD_ROWS: usize = 64;

/// Shared by the ranks of one group.
pub struct Exchange {
    barrier: Barrier,
    ranks: Vec<Area>,
    n_rows: usize,
    crowded: bool,
}

/// Written by its rank, read by all.
struct Area {
    /// Taking turns: partial sums and embeddings, `[rows, hidden]`; none in a group of one.
    partial: [UnsafeCell<Option<Rows>>; 2],
    /// `[HEAD_ROWS, shard of the vocabulary]`.
    logits: UnsafeCell<Option<Rows>>,
    /// The sampled id of each ask that this rank answered.
    sampled: UnsafeCell<Vec<u32>>,
    /// Meetings that this rank has come to.
    meetings: AtomicU64,
    bytes: AtomicU64,
}

// SAFETY: an area's cells are written by their own rank alone, between two meetings in which nobody reads them; the
// methods below say which, and the barrier orders memory.
unsafe impl Sync for Exchange {}

impl Exchange {
    /// For `n_ranks` whose largest step has `n_rows` rows; `crowded` if there are fewer cores than threads.
    pub fn new(n_ranks: usize, n_rows: usize, crowded: bool) -> Self {
        let area = || Area {
            partial: [UnsafeCell::new(None), UnsafeCell::new(None)],
            logits: UnsafeCell::new(None),
            sampled: UnsafeCell::new(Vec::new()),
            meetings: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        Self {
            barrier: Barrier::new(n_ranks, crowded),
            ranks: (0..n_ranks).map(|_| area()).collect(),
            n_rows,
            crowded,
        }
    }

    /// Ranks of the group.
    pub fn n_ranks(&self) -> usize {
        self.ranks.len()
    }

    /// Whether there are fewer cores than threads.
    pub fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// Ends all meetings, so that nobody waits for a rank that has failed.
    pub fn close(&self) {
        self.barrier.close();
    }

    /// Whether a rank has failed.
    pub fn is_closed(&self) -> bool {
        self.barrier.is_closed()
    }

    /// Sleeps until [`Exchange::close`].
    pub fn wait_closed(&self) {
        self.barrier.wait_closed();
    }

    /// Meetings that a rank has come to.
    pub fn meetings(&self, rank: usize) -> u64 {
        self.ranks[rank].meetings.load(Ordering::Relaxed)
    }

    /// Makes a rank's area, on its own thread.
    ///
    /// # Safety
    /// No rank uses `rank`'s area yet.
    pub(in crate::device) unsafe fn allocate(
        &self,
        rank: usize,
        hidden: usize,
        shard: usize,
    ) -> Result<(), DeviceError> {
        if self.n_ranks() > 1 {
            for cell in &self.ranks[rank].partial {
                // SAFETY: the caller's promise.
                unsafe { self.make(rank, cell, self.n_rows, hidden)? };
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.allocate_logits(rank, shard) }
    }

    /// As [`Exchange::allocate`], for ranks that add up among themselves and bring logits here alone.
    ///
    /// # Safety
    /// No rank uses `rank`'s area yet.
    pub(in crate::device) unsafe fn allocate_logits(
        &self,
        rank: usize,
        shard: usize,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe { self.make(rank, &self.ranks[rank].logits, HEAD_ROWS, shard) }
    }

    /// # Safety
    /// `cell` is of `rank`'s area, which no rank uses yet.
    unsafe fn make(
        &self,
        rank: usize,
        cell: &UnsafeCell<Option<Rows>>,
        n_rows: usize,
        width: usize,
    ) -> Result<(), DeviceError> {
        let rows = Rows::new(n_rows, width)?;
        self.ranks[rank]
            .bytes
            .fetch_add(rows.data.bytes(), Ordering::Relaxed);
        // SAFETY: the caller promises that nobody else uses the area.
        unsafe { *cell.get() = Some(rows) };
        Ok(())
    }

    /// Bytes of a rank's area.
    pub(in crate::device) fn bytes(&self, rank: usize) -> u64 {
        self.ranks[rank].bytes.load(Ordering::Relaxed)
    }

    /// Waits for all ranks; what each wrote before is then readable by all.
    pub(in crate::device) fn meet(&self, rank: usize) -> Result<(), DeviceError> {
        self.ranks[rank].meetings.fetch_add(1, Ordering::Relaxed);
        self.barrier.wait().map_err(|Closed| DeviceError::Interrupted)
    }

    /// # Safety
    /// The caller is `rank`, and nobody has this area between the last meeting and the next.
    #[allow(
        clippy::mut_from_ref,
        reason = "an area is a cell whose exclusive use the caller promises"
    )]
    pub(in crate::device) unsafe fn partial_mut(&self, rank: usize, turn: usize) -> &mut Rows {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.ranks[rank].partial[turn].get() }
            .as_mut()
            .expect("made at start in a group of several")
    }

    /// # Safety
    /// Between a meeting after which `rank` does not write this area and the next meeting.
    pub(in crate::device) unsafe fn partial(&self, rank: usize, turn: usize) -> &Rows {
        // SAFETY: the caller's promise.
        unsafe { &*self.ranks[rank].partial[turn].get() }
            .as_ref()
            .expect("made at start in a group of several")
    }

    /// # Safety
    /// As for [`Exchange::partial_mut`].
    #[allow(
        clippy::mut_from_ref,
        reason = "an area is a cell whose exclusive use the caller promises"
    )]
    pub(in crate::device) unsafe fn logits_mut(&self, rank: usize) -> &mut Rows {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.ranks[rank].logits.get() }
            .as_mut()
            .expect("made at start")
    }

    /// # Safety
    /// As for [`Exchange::partial`].
    pub(in crate::device) unsafe fn logits(&self, rank: usize) -> &Rows {
        // SAFETY: the caller's promise.
        unsafe { &*self.ranks[rank].logits.get() }
            .as_ref()
            .expect("made at start")
    }

    /// # Safety
    /// As for [`Exchange::partial_mut`].
    #[allow(
        clippy::mut_from_ref,
        reason = "an area is a cell whose exclusive use the caller promises"
    )]
    pub(in crate::device) unsafe fn sampled_mut(&self, rank: usize) -> &mut Vec<u32> {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.ranks[rank].sampled.get() }
    }

    /// # Safety
    /// As for [`Exchange::partial`].
    pub(in crate::device) unsafe fn sampled(&self, rank: usize) -> &[u32] {
        // SAFETY: the caller's promise.
        unsafe { &*self.ranks[rank].sampled.get() }
    }
}
