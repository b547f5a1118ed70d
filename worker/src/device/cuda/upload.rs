//! A step's metadata: gathered in page-locked memory, copied to the GPU once.
//!
//! A step may be gathered while the one before it runs: the host's buffers take turns, and the stream's order keeps the
//! GPU's. Ids that only the GPU knows go as the number of their slot. A step that is replayed has its arrays where the
//! recording has them, and rows without meaning up to the recording's size. Works of one row come first, so that the
//! kernel for single rows sees a dense list of them; works of several rows are cut into tiles.

use std::sync::Arc;

use super::{
    CudaSpec,
    attention::TILE_ROWS,
    driver::Gpu,
    memory::{Memory, Pinned},
    recording::RECORDED_ROWS,
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
    pub(super) n_rows: usize,
    pub(super) n_asks: usize,
    pub(super) n_single: u32,
    pub(super) n_tiles: u32,
    /// Laid out as a recording has it.
    pub(super) fixed: bool,
}

/// How a step that is replayed is laid out.
#[derive(Clone, Copy)]
pub(super) struct Fixed {
    /// Rows of the recording; the step has at most as many, each of a work of its own.
    pub(super) rows: usize,
    /// Rows of the largest recording, for which every array has room.
    pub(super) most: usize,
    /// The block that rows without meaning write to.
    pub(super) spare_block: u32,
    pub(super) block_tokens: usize,
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
    let fixed = (6 + WORK) * (RECORDED_ROWS + ALIGN);
    6 * spec.max_rows + (1 + WORK) * spec.max_running + TILE * tiles + table + 9 * ALIGN + fixed
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
        fixed: Option<Fixed>,
    ) -> Result<Uploaded, DeviceError> {
        let mut at = Writer {
            to: &mut self.host[side],
            base: self.on_gpu.address,
            n: 0,
            most: fixed.map_or(0, |fixed| fixed.most),
        };
        let uploaded = match fixed {
            None => gather(&mut at, meta),
            Some(fixed) => gather_fixed(&mut at, meta, fixed),
        };
        let n = at.n;
        assert!(
            n <= self.room,
            "a step fits the room that was made for the largest"
        );
        gpu.copy_in(self.on_gpu.address, &self.host[side][..n])?;
        Ok(uploaded)
    }
}

fn id(token: &RowToken) -> u32 {
    match *token {
        RowToken::Known(id) => id,
        RowToken::LastOf(slot) => OF_SLOT | slot,
    }
}

fn slots(meta: &StepMeta) -> impl Iterator<Item = u32> {
    meta.asks.iter().map(|ask| match ask.what {
        HeadUse::Sample { slot, .. } => slot,
        HeadUse::Score => NO_SLOT,
    })
}

/// Any step.
fn gather(at: &mut Writer<'_>, meta: &StepMeta) -> Uploaded {
    let (single, several): (Vec<_>, Vec<_>) = meta.works.iter().partition(|work| work.rows.len() == 1);
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
    let n_tiles: usize = several
        .iter()
        .map(|work| work.rows.len().div_ceil(TILE_ROWS))
        .sum();
    Uploaded {
        arrays: Arrays {
            tokens: at.write(1, meta.tokens.iter().map(id)),
            positions: at.write(1, meta.positions.iter().copied()),
            places: at.write(1, meta.kv_places.iter().copied()),
            works: at.write(WORK, works.map(|n| n as u32)),
            row_works: at.write(1, row_works.into_iter()),
            tiles: at.write(TILE, tiles.map(|n| n as u32)),
            asks: at.write(1, meta.asks.iter().map(|ask| ask.row as u32)),
            slots: at.write(1, slots(meta)),
            blocks: at.write(1, meta.block_table.iter().copied()),
        },
        n_rows: meta.n_rows(),
        n_asks: meta.asks.len(),
        n_single: n_single as u32,
        n_tiles: n_tiles as u32,
        fixed: false,
    }
}

/// A step of single rows in the order of its works, up to the size of a recording. Rows without meaning are the first
/// of a sequence in the spare block.
fn gather_fixed(at: &mut Writer<'_>, meta: &StepMeta, fixed: Fixed) -> Uploaded {
    let (n, rows) = (meta.n_rows(), fixed.rows);
    let fill = |with: u32| std::iter::repeat_n(with, rows - n);
    let works = meta
        .works
        .iter()
        .map(|work| [work.rows.start, 1, work.start, work.blocks.start]);
    let spare = (n..rows).map(|row| [row, 1, 0, meta.block_table.len()]);
    let place = fixed.spare_block * fixed.block_tokens as u32;
    let asked = meta.asks.iter().map(|ask| ask.row as u32);
    Uploaded {
        arrays: Arrays {
            tokens: at.write(1, meta.tokens.iter().map(id).chain(fill(0))),
            positions: at.write(1, meta.positions.iter().copied().chain(fill(0))),
            places: at.write(1, meta.kv_places.iter().copied().chain(fill(place))),
            works: at.write(WORK, works.chain(spare).flatten().map(|n| n as u32)),
            row_works: at.write(1, (0..rows).map(|row| row as u32)),
            tiles: 0,
            asks: at.write(1, asked.chain(std::iter::repeat(0)).take(rows)),
            slots: at.write(1, slots(meta).chain(std::iter::repeat(NO_SLOT)).take(rows)),
            blocks: at.write(1, meta.block_table.iter().copied().chain([fixed.spare_block])),
        },
        n_rows: rows,
        n_asks: rows,
        n_single: rows as u32,
        n_tiles: 0,
        fixed: true,
    }
}

/// Puts arrays one after the other.
struct Writer<'a> {
    to: &'a mut [u32],
    base: u64,
    n: usize,
    /// Entries that every array has room for at least.
    most: usize,
}

impl Writer<'_> {
    /// Returns where the array will be on the GPU; its entries are of `width` numbers.
    fn write(&mut self, width: usize, numbers: impl Iterator<Item = u32>) -> u64 {
        let start = self.n;
        for number in numbers {
            self.to[self.n] = number;
            self.n += 1;
        }
        self.n = self.n.max(start + width * self.most).next_multiple_of(ALIGN);
        self.base + (start * size_of::<u32>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::WorkMeta;
    use swallow_schedule::StepId;

    fn decode(n: usize) -> StepMeta {
        StepMeta {
            id: StepId(1),
            tokens: (0..n as u32).map(RowToken::LastOf).collect(),
            positions: (0..n as u32).map(|i| 20 + i).collect(),
            kv_places: (0..n as u32).map(|i| 16 * i + 4).collect(),
            row_works: (0..n as u32).collect(),
            works: (0..n)
                .map(|i| WorkMeta {
                    rows: i..i + 1,
                    start: 20 + i,
                    blocks: 2 * i..2 * i + 2,
                })
                .collect(),
            block_table: (0..2 * n as u32).collect(),
            asks: Vec::new(),
        }
    }

    /// Arrays are where the recording has them whatever the step's size, and rows beyond it touch the spare block alone.
    #[test]
    fn replayed_steps_have_fixed_places_and_harmless_rows() {
        let fixed = |rows| Fixed {
            rows,
            most: 48,
            spare_block: 99,
            block_tokens: 16,
        };
        let mut numbers = vec![7; 4096];
        let mut gathered = |meta: &StepMeta, rows| {
            let mut at = Writer {
                to: &mut numbers,
                base: 1 << 20,
                n: 0,
                most: 48,
            };
            (gather_fixed(&mut at, meta, fixed(rows)), numbers.clone())
        };
        let (full, _) = gathered(&decode(48), 48);
        let (uploaded, numbers) = gathered(&decode(3), 4);
        assert_eq!((uploaded.n_rows, uploaded.n_asks, uploaded.n_single), (4, 4, 4));
        let places = |arrays: &Arrays| [arrays.tokens, arrays.works, arrays.slots, arrays.blocks];
        assert_eq!(places(&full.arrays), places(&uploaded.arrays));
        let array = |at: u64, n: usize| &numbers[(at as usize - (1 << 20)) / 4..][..n];
        assert_eq!(
            array(uploaded.arrays.tokens, 4),
            [OF_SLOT, OF_SLOT | 1, OF_SLOT | 2, 0]
        );
        assert_eq!(array(uploaded.arrays.places, 4), [4, 20, 36, 99 * 16]);
        assert_eq!(array(uploaded.arrays.works, 16)[8..], [2, 1, 22, 4, 3, 1, 0, 6]);
        assert_eq!(array(uploaded.arrays.slots, 4), [NO_SLOT; 4]);
        assert_eq!(array(uploaded.arrays.blocks, 7), [0, 1, 2, 3, 4, 5, 99]);
    }
}
