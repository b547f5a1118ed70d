//! Attention: which kernel serves, and how the context of single rows is split so that all multiprocessors have work.

use std::sync::Arc;

use super::{
    BF16, CudaSpec, CudaStep, F32, Kv, Rows,
    blas::size,
    driver::{Gpu, MAP_BYTES},
    launch::Arg,
    memory::Memory,
    ops::Kernels,
};
use crate::device::{DeviceError, Heads, KvShape};

/// Rows of a tile of `prefill.cu`.
pub(super) const TILE_ROWS: usize = 64;
/// Keys of such a tile; two of keys and two of values are in shared memory.
const TILE_KEYS: usize = 64;
/// Keys of a tile of `hopper.cu`, and the most of them that the copy engine brings at a time.
pub(super) const HOPPER_KEYS: usize = 128;
/// Numbers of a row that the copy engine brings at a time.
pub(super) const HOPPER_COLUMNS: usize = 64;
const HOPPER_DIM: usize = 128;
/// Query heads of one of its blocks.
const HOPPER_HEADS: usize = 2;
/// Queries of its heads, two stages of keys and of values, and what alignment may cost.
pub(super) const HOPPER_SHARED: u32 =
    ((HOPPER_HEADS * TILE_ROWS + 4 * HOPPER_KEYS) * HOPPER_DIM * BF16 + 1024) as u32;
/// Query heads that share a pass of `attention.cu` over keys and values.
const SHARED_HEADS: usize = 8;
/// Most parts of a context: a warp merges them, a lane each.
const SPLITS_MAX: usize = 32;
/// Fewest tokens of a part, as `attention.cu` cuts them: below, starting and merging cost more than reading.
const PART_TOKENS: usize = 64;
/// Blocks of single rows that a multiprocessor has at a time.
const BLOCKS_A_SM: usize = 2;

/// Scratch for parts of contexts.
pub(super) struct Attention {
    parts: Memory,
    /// Rows, heads and parts together that have room.
    room: usize,
    max_rows: usize,
    /// Parts of the longest sequence.
    most_parts: usize,
}

/// Parts are used where there are too few blocks without them, so their number is bounded by the blocks wanted.
fn room(spec: &CudaSpec) -> usize {
    let blocks_a_row = spec.heads.n_kv * passes(spec.heads);
    // An upper bound of the multiprocessors of any GPU so far, so that the plan needs no GPU.
    let most_blocks = 2 * BLOCKS_A_SM * 160 + blocks_a_row;
    most_blocks.div_ceil(blocks_a_row).max(SPLITS_MAX) * spec.heads.n_q
}

pub(super) fn planned_bytes(spec: &CudaSpec) -> usize {
    room(spec) * (spec.heads.dim + 2) * F32
}

fn passes(heads: Heads) -> usize {
    (heads.n_q / heads.n_kv).div_ceil(SHARED_HEADS)
}

/// Shared memory of a tile.
pub(super) fn tile_shared(dim: usize) -> u32 {
    (4 * TILE_KEYS * dim * BF16) as u32
}

/// Whether the kernels for single rows and for tiles have this head size.
pub(super) fn is_fast(dim: usize) -> bool {
    matches!(dim, 64 | 128)
}

/// Whether `hopper.cu` has this shape: its swizzle repeats every eight rows, and a block's heads share keys and values.
pub(super) fn suits_hopper(shape: &KvShape) -> bool {
    let heads = shape.heads;
    heads.dim == HOPPER_DIM
        && (heads.n_q / heads.n_kv).is_multiple_of(HOPPER_HEADS)
        && shape.block_tokens >= 8
}

/// Which kernel serves works of several rows, in words.
pub(super) fn chosen(kv: &Kv) -> &'static str {
    match (&kv.maps, is_fast(kv.shape.heads.dim)) {
        (Some(_), _) => "wgmma, fed by the copy engine",
        (None, true) => "mma.sync",
        (None, false) => "any head size, slow",
    }
}

impl Attention {
    pub(super) fn new(gpu: &Arc<Gpu>, spec: &CudaSpec) -> Result<Self, DeviceError> {
        Ok(Self {
            parts: gpu.alloc(planned_bytes(spec), "attention")?,
            room: room(spec),
            max_rows: spec.max_rows,
            most_parts: spec.max_model_len.div_ceil(PART_TOKENS),
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.parts.bytes
    }

    /// Parts that a context may have: enough blocks for all multiprocessors. The kernel uses fewer where a part would be
    /// too short to be worth it. They depend on the size that steps are recorded for, so that steps of one size have the
    /// same bits however they are launched.
    fn splits(&self, gpu: &Gpu, heads: Heads, n_single: u32) -> u32 {
        let rows = size(n_single as usize).min(self.max_rows);
        let wanted = (BLOCKS_A_SM * gpu.n_sm as usize).div_ceil(rows * heads.n_kv * passes(heads));
        let roomy = self.room / (rows * heads.n_q);
        wanted.min(roomy).min(self.most_parts).clamp(1, SPLITS_MAX) as u32
    }

    /// All rows of a step.
    pub(super) fn attend(
        &self,
        (gpu, kernels): (&Gpu, &Kernels),
        step: &CudaStep,
        layer: usize,
        qkv: &Rows,
        kv: &Kv,
        out: &Rows,
    ) -> Result<(), DeviceError> {
        let heads = kv.shape.heads;
        let [keys, values] = kv.layer(layer);
        let shift = kv.shape.block_tokens.trailing_zeros();
        // Softmax over powers of two: the factor between the two exponentials is part of the scale.
        let scale = (std::f64::consts::LOG2_E / (heads.dim as f64).sqrt()) as f32;
        let (n_q, n_kv, dim) = (heads.n_q as u32, heads.n_kv as u32, heads.dim as u32);
        let at = &step.on_gpu;
        let pool = [
            Arg::from(&qkv.memory),
            keys.into(),
            values.into(),
            at.works.into(),
        ];
        let ends = [n_q.into(), n_kv.into()];
        if !is_fast(heads.dim) {
            let lists = [at.row_works, at.positions, at.blocks].map(Arg::from);
            let last = [dim.into(), shift.into(), scale.into()];
            let mut arguments = [&pool[..], &lists, &[(&out.memory).into()], &ends, &last].concat();
            let shared = 5 * dim * F32 as u32;
            let grid = [step.n_rows() as u32, n_q, 1];
            // SAFETY: the parameters of `attend_any`; rows, works and tables are this step's, within the pool.
            return unsafe { gpu.launch(&kernels.attend_any, grid, [128, 1, 1], shared, &mut arguments) };
        }
        let last = [shift.into(), scale.into()];
        if step.n_single > 0 {
            let splits = self.splits(gpu, heads, step.n_single);
            let outs = [at.blocks.into(), (&out.memory).into(), (&self.parts).into()];
            let mut arguments = [&pool[..], &outs, &ends, &last].concat();
            let grid = [step.n_single, n_kv * passes(heads) as u32, splits];
            // SAFETY: the parameters of `attend_single`; as above, and parts have room.
            unsafe {
                gpu.launch(
                    kernels.attend_single(heads.dim),
                    grid,
                    [128, 1, 1],
                    0,
                    &mut arguments,
                )?
            };
            if splits > 1 {
                let mut arguments = [
                    (&self.parts).into(),
                    at.works.into(),
                    (&out.memory).into(),
                    n_q.into(),
                    dim.into(),
                    splits.into(),
                ];
                // SAFETY: the parameters of `merge_parts`.
                unsafe {
                    gpu.launch(
                        &kernels.merge_parts,
                        [step.n_single, n_q, 1],
                        [128, 1, 1],
                        0,
                        &mut arguments,
                    )?;
                }
            }
        }
        if step.n_tiles > 0 {
            let lists = [at.tiles.into(), at.blocks.into(), (&out.memory).into()];
            if let (Some(maps), Some(kernel)) = (&kv.maps, &kernels.hopper_tiles) {
                let maps = maps.at(2 * layer * MAP_BYTES);
                let given = [Arg::from(&qkv.memory), maps.into(), at.works.into()];
                let mut arguments = [&given[..], &lists, &ends, &last].concat();
                let grid = [step.n_tiles, n_q / HOPPER_HEADS as u32, 1];
                // SAFETY: the parameters of `attend_tiles_hopper`; as above, and the maps are of this pool.
                return unsafe { gpu.launch(kernel, grid, [384, 1, 1], HOPPER_SHARED, &mut arguments) };
            }
            let mut arguments = [&pool[..], &lists, &ends, &last].concat();
            let grid = [step.n_tiles, n_q, 1];
            let shared = tile_shared(heads.dim);
            // SAFETY: the parameters of `attend_tiles`; as above.
            unsafe {
                gpu.launch(
                    kernels.attend_tiles(heads.dim),
                    grid,
                    [128, 1, 1],
                    shared,
                    &mut arguments,
                )?
            };
        }
        Ok(())
    }
}
