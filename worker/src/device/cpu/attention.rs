//! Keys and values in fixed blocks, and causal attention over block tables.
//!
//! One allocation holds K and one holds V for all layers and blocks; nothing is moved or copied after it is written.
//! Within a block and head, K lies `[dim][token]` and V `[token][dim]`, so that scores come sixteen tokens and sums
//! sixteen dimensions at a time without adding across lanes. `[layer][block][head]` come before.
//!
//! Softmax runs along the blocks with a running maximum. A row walks the blocks of its own sequence up to its own
//! position, in order, and no operation on it depends on its neighbours in a tile: chunks, batches and tiles change no bit.

use std::{array, ops::Range};

use super::{
    buffer::{Buffer, SharedRows},
    simd::{Kernel, LANES, Lanes, exp, sum_lanes},
};
use crate::device::{DeviceError, Heads, KvShape};

/// Queries that share each loaded block: enough to keep the block's numbers in registers and the first cache busy.
pub(super) const TILE: usize = 32;
/// Queries whose sums are held in registers at once.
const GROUP: usize = 4;

/// The pool of one rank.
pub struct Kv {
    shape: KvShape,
    k: Buffer,
    v: Buffer,
}

impl Kv {
    pub(super) fn new(shape: KvShape) -> Result<Self, DeviceError> {
        let len = shape.n_layers * shape.n_blocks * shape.heads.n_kv * shape.block_tokens * shape.heads.dim;
        let buffer = || Buffer::new(len, "keys and values");
        Ok(Self {
            shape,
            k: buffer()?,
            v: buffer()?,
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.k.bytes() + self.v.bytes()
    }

    /// Numbers of one head of one block.
    fn tile_len(&self) -> usize {
        self.shape.block_tokens * self.shape.heads.dim
    }

    fn tile_at(&self, layer: usize, block: usize, head: usize) -> usize {
        assert!(layer < self.shape.n_layers && block < self.shape.n_blocks && head < self.shape.heads.n_kv);
        ((layer * self.shape.n_blocks + block) * self.shape.heads.n_kv + head) * self.tile_len()
    }

    /// Numbers from -1 to 1 that look random.
    pub(super) fn randomise(&mut self) {
        for (half, salt) in [(&mut self.k, 1), (&mut self.v, 2)] {
            for (i, number) in (salt << 48..).zip(half.iter_mut()) {
                let mixed = u64::wrapping_mul(i ^ i >> 32, 0x9E37_79B9_7F4A_7C15);
                *number = (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0;
            }
        }
    }

    /// A writer for several threads.
    pub(super) fn writer(&mut self) -> KvWriter<'_> {
        KvWriter {
            k: self.k.as_mut_ptr(),
            v: self.v.as_mut_ptr(),
            kv: self,
        }
    }
}

/// Writes keys and values of different tokens from different threads.
#[derive(Clone, Copy)]
pub(super) struct KvWriter<'a> {
    kv: &'a Kv,
    k: *mut f32,
    v: *mut f32,
}

// SAFETY: it holds addresses; whoever writes promises that each token has one writer.
unsafe impl Send for KvWriter<'_> {}
// SAFETY: as above.
unsafe impl Sync for KvWriter<'_> {}

impl KvWriter<'_> {
    /// Writes one head of one token; `place` is block times block_tokens plus offset.
    ///
    /// # Safety
    /// No other thread uses this place during the call.
    pub(super) unsafe fn write(self, layer: usize, place: usize, head: usize, k: &[f32], v: &[f32]) {
        let KvShape {
            block_tokens, heads, ..
        } = self.kv.shape;
        assert!(k.len() == heads.dim && v.len() == heads.dim);
        let (block, token) = (place / block_tokens, place % block_tokens);
        let tile = self.kv.tile_at(layer, block, head);
        // SAFETY: the tile is within both buffers (`tile_at` checks its indices), token and dimension within the tile;
        // exclusive by the caller's promise.
        unsafe {
            for (d, &k) in k.iter().enumerate() {
                *self.k.add(tile + d * block_tokens + token) = k;
            }
            std::ptr::copy_nonoverlapping(v.as_ptr(), self.v.add(tile + token * heads.dim), heads.dim);
        }
    }
}

/// A few rows of one sequence, and the query heads that share one head of keys and values.
pub(super) struct AttentionTile<'a> {
    pub(super) kv: &'a Kv,
    pub(super) layer: usize,
    pub(super) heads: Heads,
    /// Of the sequence.
    pub(super) blocks: &'a [u32],
    pub(super) kv_head: usize,
    /// First row in the step, its position, and the number of rows.
    pub(super) row: usize,
    pub(super) position: usize,
    pub(super) n_rows: usize,
    /// Rotated queries of a row.
    pub(super) qkv: &'a super::buffer::Rows,
    pub(super) out: SharedRows,
    pub(super) scratch: &'a mut Scratch,
}

/// Working memory of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    /// Scaled queries, `[query][dim]`.
    q: Vec<f32>,
    /// Weighted sums of values, `[query][dim]`.
    sums: Vec<f32>,
    /// Scores of one block, `[query][token]`.
    scores: Vec<f32>,
    /// Running maximum and normaliser.
    state: Vec<Running>,
}

#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
    /// What the sums so far must be multiplied with.
    scale: f32,
    /// Tokens of the current block that the query sees.
    seen: usize,
}

impl Kernel for AttentionTile<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Lanes>(mut self) {
        let per_kv = self.heads.n_q / self.heads.n_kv;
        let n = self.n_rows * per_kv;
        self.load_queries(per_kv, n);
        let (tokens, tile) = (self.kv.shape.block_tokens, self.kv.tile_len());
        let last = self.position + self.n_rows - 1;
        let at = |block: usize| {
            self.kv
                .tile_at(self.layer, self.blocks[block] as usize, self.kv_head)
        };
        for block in 0..=last / tokens {
            let (here, next) = (at(block), at((block + 1).min(last / tokens)));
            let part = |pool| Part::new(pool, here..here + tile, next, self.heads.dim);
            let (k, v) = (part(&*self.kv.k), part(&*self.kv.v));
            for (i, state) in self.scratch.state[..n].iter_mut().enumerate() {
                state.seen = (self.position + i / per_kv + 1)
                    .saturating_sub(block * tokens)
                    .min(tokens);
            }
            // SAFETY: the instruction set is the caller's.
            unsafe {
                scores::<S>(self.scratch, n, k);
                soften::<S>(self.scratch, n, tokens);
                accumulate::<S>(self.scratch, n, v);
            }
        }
        self.store_sums(per_kv, n);
    }
}

impl AttentionTile<'_> {
    #[inline(always)]
    fn load_queries(&mut self, per_kv: usize, n: usize) {
        let (dim, tokens) = (self.heads.dim, self.kv.shape.block_tokens);
        let scale = 1.0 / (dim as f32).sqrt();
        let s = &mut *self.scratch;
        s.q.clear();
        for row in self.row..self.row + self.n_rows {
            let queries = &self.qkv.row(row)[self.kv_head * per_kv * dim..][..per_kv * dim];
            s.q.extend(queries.iter().map(|q| q * scale));
        }
        s.sums.clear();
        s.sums.resize(n * dim, 0.0);
        s.scores.resize(n * tokens, 0.0);
        s.state.clear();
        s.state.resize(
            n,
            Running {
                max: f32::NEG_INFINITY,
                sum: 0.0,
                scale: 0.0,
                seen: 0,
            },
        );
    }

    #[inline(always)]
    fn store_sums(&mut self, per_kv: usize, n: usize) {
        let dim = self.heads.dim;
        for i in 0..n {
            let column = (self.kv_head * per_kv + i % per_kv) * dim;
            // SAFETY: this tile alone has these rows' columns of these heads.
            let to = unsafe { self.out.part(self.row + i / per_kv, column) };
            let by = 1.0 / self.scratch.state[i].sum;
            for (to, &sum) in to.iter_mut().zip(&self.scratch.sums[i * dim..][..dim]) {
                *to = sum * by;
            }
        }
    }
}

/// Keys or values of one head of one block.
#[derive(Clone, Copy)]
struct Part<'a> {
    numbers: &'a [f32],
    /// The same of the block that comes next: blocks lie anywhere, so the processor cannot guess it.
    next: *const f32,
    dim: usize,
    tokens: usize,
}

impl<'a> Part<'a> {
    #[inline(always)]
    fn new(pool: &'a [f32], here: Range<usize>, next: usize, dim: usize) -> Self {
        let tokens = here.len() / dim;
        Self {
            numbers: &pool[here],
            next: pool[next..].as_ptr(),
            dim,
            tokens,
        }
    }

    /// Prefetches nothing but itself: for all groups of queries but the first.
    #[inline(always)]
    fn settled(self) -> Self {
        Self {
            next: self.numbers.as_ptr(),
            ..self
        }
    }
}

/// Calls a function that is generic over the number of queries.
macro_rules! for_queries {
    ($count:expr, $function:ident::<$lanes:ident>($($argument:expr),*)) => {
        match $count {
            1 => $function::<$lanes, 1>($($argument),*),
            2 => $function::<$lanes, 2>($($argument),*),
            3 => $function::<$lanes, 3>($($argument),*),
            GROUP => $function::<$lanes, GROUP>($($argument),*),
            _ => unreachable!("groups have one to {GROUP} queries"),
        }
    };
}

/// Scores of all queries against all tokens of a block; those that a query may not see are ignored later.
#[inline(always)]
unsafe fn scores<S: Lanes>(s: &mut Scratch, n: usize, mut k: Part<'_>) {
    let Part { dim, tokens, .. } = k;
    for i in (0..n).step_by(GROUP) {
        let count = GROUP.min(n - i);
        let q = &s.q[i * dim..(i + count) * dim];
        let out = &mut s.scores[i * tokens..(i + count) * tokens];
        for t in (0..tokens / LANES * LANES).step_by(LANES) {
            // SAFETY: the instruction set is the caller's.
            unsafe { for_queries!(count, score_lanes::<S>(q, k, out, t)) };
        }
        for t in tokens / LANES * LANES..tokens {
            for (q, out) in q.chunks_exact(dim).zip(out.chunks_exact_mut(tokens)) {
                let keys = k.numbers[t..].iter().step_by(tokens);
                out[t] = q.iter().zip(keys).fold(0.0, |sum, (&q, &k)| S::fma1(q, k, sum));
            }
        }
        k = k.settled();
    }
}

/// Even and odd dimensions are summed apart, so that few queries do not wait for one chain of additions.
#[inline(always)]
unsafe fn score_lanes<S: Lanes, const N: usize>(q: &[f32], k: Part<'_>, out: &mut [f32], t: usize) {
    let Part {
        numbers,
        next,
        dim,
        tokens,
    } = k;
    assert!(q.len() == N * dim && out.len() == N * tokens && numbers.len() == dim * tokens);
    assert!(t + LANES <= tokens && dim.is_multiple_of(2));
    // SAFETY: within the slices by the assertions.
    unsafe {
        let mut acc = [[S::splat(0.0); 2]; N];
        for d in (0..dim).step_by(2) {
            for odd in 0..2 {
                let at = (d + odd) * tokens + t;
                S::prefetch(next.wrapping_add(at));
                let keys = S::load(numbers.as_ptr().add(at));
                for (i, acc) in acc.iter_mut().enumerate() {
                    acc[odd] = S::fma(S::splat(*q.as_ptr().add(i * dim + d + odd)), keys, acc[odd]);
                }
            }
        }
        for (i, [even, odd]) in acc.into_iter().enumerate() {
            S::store(S::add(even, odd), out.as_mut_ptr().add(i * tokens + t));
        }
    }
}

/// Turns the scores that each query sees into weights relative to its new maximum, and the others into zeros.
#[inline(always)]
unsafe fn soften<S: Lanes>(s: &mut Scratch, n: usize, tokens: usize) {
    for (state, scores) in s.state[..n].iter_mut().zip(s.scores.chunks_exact_mut(tokens)) {
        if state.seen == 0 {
            continue;
        }
        scores[state.seen..].fill(f32::NEG_INFINITY);
        // Lane by lane, because an order that vectorises must be spelled out.
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let larger = |a: &mut f32, b: f32| *a = if b > *a { b } else { *a };
        let (chunks, rest) = scores.as_chunks::<LANES>();
        for chunk in chunks {
            lanes.iter_mut().zip(chunk).for_each(|(a, &b)| larger(a, b));
        }
        lanes.iter_mut().zip(rest).for_each(|(a, &b)| larger(a, b));
        let max = lanes.iter().fold(state.max, |a, &b| if b > a { b } else { a });
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = scores.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (x, sum) in chunk.iter_mut().zip(&mut lanes) {
                *x = exp::<S>(*x - max);
                *sum += *x;
            }
        }
        for (x, sum) in rest.iter_mut().zip(&mut lanes) {
            *x = exp::<S>(*x - max);
            *sum += *x;
        }
        state.scale = exp::<S>(state.max - max);
        state.max = max;
        state.sum = S::fma1(state.sum, state.scale, sum_lanes(lanes));
    }
}

/// Adds the block's weighted values to each query's sums.
#[inline(always)]
unsafe fn accumulate<S: Lanes>(s: &mut Scratch, n: usize, mut v: Part<'_>) {
    let Part { dim, tokens, .. } = v;
    let mut i = 0;
    while i < n {
        // Queries that see the same number of tokens share the loads of values.
        let seen = s.state[i].seen;
        let count = s.state[i..(i + GROUP).min(n)]
            .iter()
            .take_while(|state| state.seen == seen)
            .count();
        let states = &s.state[i..i + count];
        let weights = &s.scores[i * tokens..(i + count) * tokens];
        let sums = &mut s.sums[i * dim..(i + count) * dim];
        i += count;
        if seen == 0 {
            continue;
        }
        for d in (0..dim / LANES * LANES).step_by(LANES) {
            // SAFETY: the instruction set is the caller's.
            unsafe { for_queries!(count, sum_values::<S>(states, weights, v, sums, d)) };
        }
        for d in dim / LANES * LANES..dim {
            let queries = states
                .iter()
                .zip(weights.chunks_exact(tokens))
                .zip(sums.chunks_exact_mut(dim));
            for ((state, weights), sums) in queries {
                let values = v.numbers[d..].iter().step_by(dim).zip(&weights[..seen]);
                sums[d] = values.fold(sums[d] * state.scale, |sum, (&v, &w)| S::fma1(w, v, sum));
            }
        }
        v = v.settled();
    }
}

#[inline(always)]
unsafe fn sum_values<S: Lanes, const N: usize>(
    states: &[Running],
    weights: &[f32],
    v: Part<'_>,
    sums: &mut [f32],
    d: usize,
) {
    let (
        Part {
            numbers,
            next,
            dim,
            tokens,
        },
        seen,
    ) = (v, states[0].seen);
    assert!(states.len() == N && weights.len() == N * tokens && sums.len() == N * dim);
    assert!(numbers.len() == dim * tokens && seen <= tokens && d + LANES <= dim);
    // SAFETY: within the slices by the assertions.
    unsafe {
        let mut acc: [S::V; N] =
            array::from_fn(|i| S::mul(S::load(sums.as_ptr().add(i * dim + d)), S::splat(states[i].scale)));
        for t in 0..seen {
            let at = t * dim + d;
            S::prefetch(next.wrapping_add(at));
            let values = S::load(numbers.as_ptr().add(at));
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = S::fma(S::splat(*weights.as_ptr().add(i * tokens + t)), values, *acc);
            }
        }
        for (i, &acc) in acc.iter().enumerate() {
            S::store(acc, sums.as_mut_ptr().add(i * dim + d));
        }
    }
}
