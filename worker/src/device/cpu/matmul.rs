//! The matrix product of the CPU device: rows of activations times rows of weights, `out[m][n] = x[m] · w[n]`.
//!
//! A general product (candle's, which is the gemm crate's) picks another algorithm for one row than for many, so a
//! row's last bits depend on its company. Here every element is summed in one order whatever the number of rows: k
//! ascending in blocks of [`BLOCK`], one accumulator a block, blocks added in order.
//!
//! Measured on one core of a Zen 4 server with AVX-512, 1536 x 576: 113 GFLOP/s at 8 and 32 rows, all that the
//! multipliers give, where gemm reaches 34 and 64; at one row both run at memory speed, at 512 rows both are equal.
//!
//! Weights lie in panels: sixteen outputs interleaved, `[outs / 16][ins][16]`, padded with zeros. One row then streams
//! the weights from front to back at memory speed; many rows reuse a block of panels from the nearest caches. Few rows
//! are limited by bytes, many by flops.

use std::{array, ops::Range};

use super::{
    buffer::{Buffer, Rows, SharedRows},
    simd::{Isa, Kernel, LANES, Lanes},
    team::Team,
};
use crate::device::DeviceError;

/// Inputs summed before the sum is added to the element: 256 rows of 48 outputs are 48 KiB, which the second cache
/// holds beside eight rows of activations in the first.
const BLOCK: usize = 256;
/// Panels that one thread works on at a time, at most.
const GROUP: usize = 3;
/// Rows that one thread works on at a time; a multiple of every register tile's height.
const ROWS: usize = 64;
/// Multiplications that are worth a thread's attention.
const GRAIN: usize = 1 << 15;

/// Weights `[outs, ins]`.
pub struct Matrix {
    pub(super) outs: usize,
    pub(super) ins: usize,
    pub(super) data: Buffer,
}

impl Matrix {
    pub(super) fn new(outs: usize, ins: usize) -> Result<Self, DeviceError> {
        let data = Buffer::new(outs.next_multiple_of(LANES) * ins, "weights")?;
        Ok(Self { outs, ins, data })
    }

    /// Sets outputs `first_out..` to row-major `values`.
    pub(super) fn fill(&mut self, team: &Team, first_out: usize, values: &[f32]) {
        let (ins, n) = (self.ins, values.len() / self.ins);
        assert_eq!(values.len(), n * ins, "whole rows");
        assert!(
            first_out + n <= self.outs,
            "outputs {first_out}.. are within {}",
            self.outs
        );
        let panels = first_out / LANES..(first_out + n).div_ceil(LANES);
        let data = SharedPanels(self.data.as_mut_ptr());
        team.each(panels.len(), (GRAIN / (ins * LANES)).max(1), |range| {
            for panel in range.start + panels.start..range.end + panels.start {
                // SAFETY: each panel is written by one thread, and lies within the buffer by the assertion above.
                let to = unsafe { data.panel(panel, ins) };
                let outs = (panel * LANES).max(first_out)..((panel + 1) * LANES).min(first_out + n);
                for out in outs {
                    let from = &values[(out - first_out) * ins..][..ins];
                    for (to, &from) in to[out % LANES..].iter_mut().step_by(LANES).zip(from) {
                        *to = from;
                    }
                }
            }
        });
    }

    /// Copies the weights of one output into `to`.
    pub(super) fn read(&self, out: usize, to: &mut [f32]) {
        let panel = &self.data[out / LANES * self.ins * LANES..][..self.ins * LANES];
        for (to, &from) in to.iter_mut().zip(panel[out % LANES..].iter().step_by(LANES)) {
            *to = from;
        }
    }
}

#[derive(Clone, Copy)]
struct SharedPanels(*mut f32);

// SAFETY: it is an address; whoever writes through it promises that nobody else uses that panel.
unsafe impl Send for SharedPanels {}
// SAFETY: as above.
unsafe impl Sync for SharedPanels {}

impl SharedPanels {
    /// # Safety
    /// The panel exists, and one thread at a time uses it.
    unsafe fn panel<'a>(self, panel: usize, ins: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(panel * ins * LANES), ins * LANES) }
    }
}

/// Which rows of the activations are multiplied.
#[derive(Clone, Copy)]
pub(super) enum Which<'a> {
    /// The first so many.
    First(usize),
    /// These.
    These(&'a [usize]),
}

impl Which<'_> {
    fn len(self) -> usize {
        match self {
            Which::First(n) => n,
            Which::These(rows) => rows.len(),
        }
    }

    fn row(self, i: usize) -> usize {
        match self {
            Which::First(_) => i,
            Which::These(rows) => rows[i],
        }
    }
}

/// `out[i] = x[which i] · wᵀ`. `packed` is scratch with room for the rows.
pub(super) fn multiply(
    (isa, team): (Isa, &Team),
    packed: &mut Buffer,
    x: &Rows,
    which: Which<'_>,
    w: &Matrix,
    out: SharedRows,
) {
    let (m, ins) = (which.len(), w.ins);
    assert_eq!(x.width, ins, "activations are as wide as the weights");
    assert!(
        out.stride >= w.outs.next_multiple_of(LANES),
        "room for whole vectors"
    );
    if m == 0 {
        return;
    }
    let tall = isa.run(Tall);
    let packed: &[f32] = if m == 1 {
        x.row(which.row(0))
    } else {
        pack(team, packed, x, which, tall);
        packed
    };
    let n_panels = w.outs.div_ceil(LANES);
    let row_blocks = m.div_ceil(ROWS);
    // Narrower groups read activations more often, but feed all threads when there are few panels.
    let group = (n_panels * row_blocks / (2 * team.threads())).clamp(1, GROUP);
    let groups = n_panels.div_ceil(group);
    let grain = GRAIN.div_ceil(group * LANES * ins * m.min(ROWS));
    team.each(groups * row_blocks, grain, |range: Range<usize>| {
        for item in range {
            // Rows change faster than panels, which then stay in the cache.
            let (panel, row) = (item / row_blocks * group, item % row_blocks * ROWS);
            isa.run(GroupProduct {
                x: packed,
                rows: row..(row + ROWS).min(m),
                ins,
                w: &w.data,
                panels: panel..(panel + group).min(n_panels),
                out,
            });
        }
    });
}

/// Interleaves the rows of each tile, `[ins][rows of the tile]`, so that a tile reads its activations in order.
fn pack(team: &Team, packed: &mut Buffer, x: &Rows, which: Which<'_>, tall: usize) {
    let (m, ins) = (which.len(), x.width);
    assert!(packed.len() >= m * ins, "scratch for {m} rows");
    let to = SharedPanels(packed.as_mut_ptr());
    let n_tall = m.div_ceil(tall);
    team.each(n_tall, (GRAIN / (ins * tall)).max(1), |range| {
        for i in range {
            for (first, rows) in tiles(i * tall..((i + 1) * tall).min(m), tall) {
                // SAFETY: tiles do not overlap, each is packed by one thread, all end before m * ins.
                let to = unsafe { std::slice::from_raw_parts_mut({ to }.0.add(first * ins), rows * ins) };
                for r in 0..rows {
                    let from = x.row(which.row(first + r));
                    for (to, &from) in to[r..].iter_mut().step_by(rows).zip(from) {
                        *to = from;
                    }
                }
            }
        }
    });
}

/// Cuts rows into register tiles: as many of the tallest as there are, then halves. (first row, rows) each.
#[inline(always)]
fn tiles(rows: Range<usize>, tall: usize) -> impl Iterator<Item = (usize, usize)> {
    let (mut at, end, mut height) = (rows.start, rows.end, tall);
    std::iter::from_fn(move || {
        while height > end - at {
            height /= 2;
        }
        let tile = (at, height);
        at += height;
        (height > 0).then_some(tile)
    })
}

/// The tallest tile of an instruction set.
struct Tall;

impl Kernel for Tall {
    type Out = usize;
    #[inline(always)]
    unsafe fn run<S: Lanes>(self) -> usize {
        S::TALL
    }
}

/// A few panels times a block of rows.
struct GroupProduct<'a> {
    /// Packed, `[all rows][ins]` in tiles.
    x: &'a [f32],
    rows: Range<usize>,
    ins: usize,
    /// All panels.
    w: &'a [f32],
    panels: Range<usize>,
    out: SharedRows,
}

impl Kernel for GroupProduct<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let panel_len = self.ins * LANES;
        assert!(self.x.len() >= self.rows.end * self.ins && self.w.len() >= self.panels.end * panel_len);
        let n_tiles = tiles(self.rows.clone(), S::TALL).count();
        for k in (0..self.ins).step_by(BLOCK) {
            let depth = BLOCK.min(self.ins - k);
            for (nth, (row, rows)) in tiles(self.rows.clone(), S::TALL).enumerate() {
                let wide = if rows == S::TALL { S::WIDE } else { GROUP };
                let mut panel = self.panels.start;
                while panel < self.panels.end {
                    let n = wide.min(self.panels.end - panel);
                    let w = self.w[panel * panel_len + k * LANES..].as_ptr();
                    // Each tile asks for its share of the block that comes next: of the same panels, or of the next.
                    let next = if k + depth < self.ins {
                        BLOCK
                    } else {
                        self.panels.len() * self.ins - k
                    };
                    let tile = Tile {
                        x: self.x[row * self.ins + k * rows..].as_ptr(),
                        w,
                        panel_len,
                        depth,
                        ahead: w.wrapping_add((next + nth * depth / n_tiles) * LANES),
                        ahead_step: LANES / n_tiles.next_power_of_two(),
                        to: self.out.at(row, panel * LANES),
                        stride: self.out.stride,
                        first: k == 0,
                    };
                    // SAFETY: `x` holds the tile's rows to the end of the block, `w` the panels', by the assertion;
                    // `out` has room for these rows of all panels (asserted by `at`), and this thread alone has
                    // these panels of these rows.
                    unsafe { tile.run_any::<S>(rows, n) };
                    panel += n;
                }
            }
        }
    }
}

/// One register tile over one block of inputs.
struct Tile {
    x: *const f32,
    w: *const f32,
    panel_len: usize,
    depth: usize,
    /// Weights to prefetch, and how far to go on with each input.
    ahead: *const f32,
    ahead_step: usize,
    to: *mut f32,
    stride: usize,
    /// Set the elements rather than add to them.
    first: bool,
}

impl Tile {
    #[inline(always)]
    unsafe fn run_any<S: Lanes>(self, rows: usize, panels: usize) {
        // SAFETY: passed on.
        unsafe {
            match (rows, panels) {
                (8, 3) => self.run::<S, 8, 3>(),
                (8, 2) => self.run::<S, 8, 2>(),
                (8, 1) => self.run::<S, 8, 1>(),
                (4, 3) => self.run::<S, 4, 3>(),
                (4, 2) => self.run::<S, 4, 2>(),
                (4, 1) => self.run::<S, 4, 1>(),
                (2, 3) => self.run::<S, 2, 3>(),
                (2, 2) => self.run::<S, 2, 2>(),
                (2, 1) => self.run::<S, 2, 1>(),
                (1, 3) => self.run::<S, 1, 3>(),
                (1, 2) => self.run::<S, 1, 2>(),
                (1, 1) => self.run::<S, 1, 1>(),
                _ => unreachable!("tiles are powers of two up to 8 rows, and up to {GROUP} panels"),
            }
        }
    }

    #[inline(always)]
    unsafe fn run<S: Lanes, const ROWS: usize, const PANELS: usize>(self) {
        // SAFETY: the caller promises `depth` inputs of ROWS rows and PANELS panels, and room for the outputs.
        unsafe {
            let mut acc = [[S::splat(0.0); PANELS]; ROWS];
            for k in 0..self.depth {
                for p in 0..PANELS {
                    S::prefetch(self.ahead.wrapping_add(p * self.panel_len + k * self.ahead_step));
                }
                let w: [S::V; PANELS] =
                    array::from_fn(|p| S::load(self.w.add(p * self.panel_len + k * LANES)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = S::splat(*self.x.add(k * ROWS + r));
                    for (acc, &w) in acc.iter_mut().zip(&w) {
                        *acc = S::fma(x, w, *acc);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                for (p, &acc) in acc.iter().enumerate() {
                    let to = self.to.add(r * self.stride + p * LANES);
                    S::store(if self.first { acc } else { S::add(S::load(to), acc) }, to);
                }
            }
        }
    }
}
