//! A step's metadata: gathered in page-locked memory, copied to the GPU once.
//!
//! A step may be gathered while the one before it runs: the host's buffers take turns, and the stream's order keeps the
//! GPU's. Ids that only the GPU knows go as the number of their slot. Works of one row come first, so that the kernel for single rows sees a dense list of them; works of several rows are
//! cut into tiles.

use std::sync::Arc;

use super::{
    CudaSpec,
    attention::TILE_ROWS,
    driver::{Gpu, Memory, Pinned},
};
use crate::device::{AHEAD_MAX, DeviceError, HeadUse, RowToken, StepMeta};

/// Marks an id that stands for what a slot last sampled, as `embed.cu` reads it.
const OF_SLOT: u32 = 1 << 31;
/// The slot of a row that samples nothing, as `head.cu` reads it.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// Numbers of a work: its first row, rows, position of the first row, first entry in the block table.
const WORK: usize = 4;
/// Numbers of a tile: its work, and its first row within the work.
const TILE: usize = 2;
/// Where an array begins in memory: at a multiple of this many numbers, so that kernels may read four at once.
const ALIGN: usize = 32;

/// Addresses of a step's arrays on the GPU.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arrays {
    pub(super) tokens: u64,
    pub(super) positions: u64,
    pub(super) places: u64,
    pub(super) works: u64,
    pub(super) row_works: u64,
    pub(super) tiles: u64,
    pub(super) asks: u64,
    pub(super) slots: u64,
    pub(super) blocks: u64,
}

/// What a step consists of, for the launches.
pub(super) struct Uploaded {
    pub(super) arrays: Arrays,
    pub(super) n_single: u32,
    pub(super) n_tiles: u32,
    pub(super) longest: u32,
}

/// The buffers.
pub(super) struct Uploads {
    host: [Pinned<u32>; AHEAD_MAX],
    on_gpu: Memory,
    /// Numbers that fit.
    room: usize,
}

/// Numbers of the largest step. Tables of sequences that share blocks can be longer than the pool, so each work has
/// room for the longest.
fn room(spec: &CudaSpec) -> usize {
    let table = spec.max_running * spec.max_model_len.div_ceil(spec.block_tokens);
    let tiles = spec.max_rows.div_ceil(TILE_ROWS) + spec.max_running;
    6 * spec.max_rows + (1 + WORK) * spec.max_running + TILE * tiles + table + 9 * ALIGN
}

pub(super) fn planned_bytes(spec: &CudaSpec) -> usize {
    room(spec) * size_of::<u32>()
}

impl Uploads {
    pub(super) fn new(gpu: &Arc<Gpu>, spec: &CudaSpec) -> Result<Self, DeviceError> {
        let room = room(spec);
        Ok(Self {
            host: [gpu.pinned(room)?, gpu.pinned(room)?],
            on_gpu: gpu.alloc(room * size_of::<u32>(), "the metadata of steps")?,
            room,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.on_gpu.bytes
    }

    /// Copies a step. The last step on this side must be done: what it copies from is overwritten.
    pub(super) fn upload(
        &mut self,
        gpu: &Gpu,
        meta: &StepMeta,
        side: usize,
    ) -> Result<Uploaded, DeviceError> {
        let mut at = Writer {
            to: &mut self.host[side],
            base: self.on_gpu.address,
            n: 0,
        };
        let (single, several): (Vec<_>, Vec<_>) = meta.works.iter().partition(|work| work.rows.len() == 1);
        let longest = single.iter().map(|work| work.start + 1).max().unwrap_or(0);
        let token = |token: &RowToken| match *token {
            RowToken::Known(id) => id,
            RowToken::LastOf(slot) => OF_SLOT | slot,
        };
        let slots = meta.asks.iter().map(|ask| match ask.what {
            HeadUse::Sample { slot, .. } => slot,
            HeadUse::Score => NO_SLOT,
        });
        let n_single = single.len();
        let tiles = several.iter().enumerate().flat_map(|(i, work)| {
            let starts = (0..work.rows.len()).step_by(TILE_ROWS);
            starts.flat_map(move |start| [n_single + i, start])
        });
        let mut row_works = vec![0; meta.n_rows()];
        for (i, work) in single.iter().chain(&several).enumerate() {
            row_works[work.rows.clone()].fill(i as u32);
        }
        let works = single
            .iter()
            .chain(&several)
            .flat_map(|work| [work.rows.start, work.rows.len(), work.start, work.blocks.start]);
        let arrays = Arrays {
            tokens: at.write(meta.tokens.iter().map(token)),
            positions: at.write(meta.positions.iter().copied()),
            places: at.write(meta.kv_places.iter().copied()),
            works: at.write(works.map(|n| n as u32)),
            row_works: at.write(row_works.into_iter()),
            tiles: at.write(tiles.map(|n| n as u32)),
            asks: at.write(meta.asks.iter().map(|ask| ask.row as u32)),
            slots: at.write(slots),
            blocks: at.write(meta.block_table.iter().copied()),
        };
        let n = at.n;
        assert!(
            n <= self.room,
            "a step fits the room that was made for the largest"
        );
        gpu.copy_in(self.on_gpu.address, &self.host[side][..n])?;
        let n_tiles: usize = several
            .iter()
            .map(|work| work.rows.len().div_ceil(TILE_ROWS))
            .sum::<usize>();
        Ok(Uploaded {
            arrays,
            n_single: n_single as u32,
            n_tiles: n_tiles as u32,
            longest: longest as u32,
        })
    }
}

/// Puts arrays one after the other.
struct Writer<'a> {
    to: &'a mut [u32],
    base: u64,
    n: usize,
}

impl Writer<'_> {
    /// Returns where the array will be on the GPU.
    fn write(&mut self, numbers: impl Iterator<Item = u32>) -> u64 {
        let start = self.n;
        for number in numbers {
            self.to[self.n] = number;
            self.n += 1;
        }
        self.n = self.n.next_multiple_of(ALIGN);
        self.base + (start * size_of::<u32>()) as u64
    }
}
