//! The CPU device: fp32, one rank's threads, its weights, its part of the keys and values.
//!
//! Matrix products with many rows are limited by flops, with few by the bytes of the weights, attention over long
//! contexts by the bytes of keys and values; the rest is small. Every result is the same at any number of threads.

mod attention;
mod barrier;
mod buffer;
mod exchange;
mod matmul;
mod rowwise;
mod simd;
mod team;
#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

pub use attention::Kv;
pub use buffer::Rows;
pub use exchange::{Exchange, HEAD_ROWS};
pub use matmul::Matrix;
pub use simd::{Isa, Kernel, LANES, Lanes};
pub use team::Team;

use super::{
    Allocated, Device, DeviceError, HeadAsk, HeadOut, HeadUse, Heads, KvShape, Landed, Norm, Part, RowToken,
    StepMeta, VocabSplit, WorkMeta,
};
use attention::{AttentionTile, Scratch, TILE};
use buffer::{Buffer, SharedRows};
use matmul::{Which, multiply};
use rowwise::{Add, RmsNorm, SiluMul, rotate};

/// Numbers of a row-wise operation that are worth a thread's attention.
const ROWWISE_GRAIN: usize = 1 << 13;
/// Multiplications of attention that are worth a thread's attention.
const ATTENTION_GRAIN: usize = 1 << 15;

/// What a device is made of.
pub struct CpuSpec {
    /// This rank.
    pub rank: usize,
    /// Threads of this rank, at least one.
    pub threads: usize,
    /// Slots.
    pub max_running: usize,
    /// Rows of the largest step.
    pub max_rows: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// The vocabulary over the ranks.
    pub split: VocabSplit,
}

/// One rank on this machine's processors.
pub struct CpuDevice {
    rank: usize,
    isa: Isa,
    team: Team,
    exchange: Arc<Exchange>,
    /// Time spent in meetings since the last step landed.
    exchanged: Duration,
    /// Which of the exchange's areas is next.
    turn: usize,
    max_rows: usize,
    /// Activations in the order of the matrix product; as large as the widest matrix needs.
    packed: Buffer,
    /// What was sampled last, by slot.
    last_sampled: Vec<u32>,
    /// Steps are computed at once, and wait here to be fetched.
    landed: VecDeque<Landed>,
    allocated: Allocated,
    disturbed: bool,
}

/// An uploaded step.
pub struct CpuStep {
    meta: Arc<StepMeta>,
    /// Token of each row.
    ids: Vec<u32>,
    /// Rotary factors, `[row][dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl CpuStep {
    fn n_rows(&self) -> usize {
        self.meta.n_rows()
    }
}

impl CpuDevice {
    /// Makes the device of one rank. Call it on the thread that will use it.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(spec: &CpuSpec, exchange: Arc<Exchange>) -> Result<Self, DeviceError> {
        let team = Team::new(
            &format!("rank-{}", spec.rank),
            spec.threads,
            exchange.is_crowded(),
        );
        // SAFETY: ranks use each other's areas only after a meeting, and this rank has not been to one yet.
        unsafe { exchange.allocate(spec.rank, spec.hidden, spec.split.range(spec.rank).len())? };
        Ok(Self {
            rank: spec.rank,
            isa: Isa::detect(),
            team,
            exchange,
            exchanged: Duration::ZERO,
            turn: 0,
            max_rows: spec.max_rows,
            packed: Buffer::new(0, "activations")?,
            last_sampled: vec![0; spec.max_running],
            landed: VecDeque::new(),
            allocated: Allocated::default(),
            disturbed: false,
        })
    }

    /// Waits until all ranks are here.
    fn meet(&mut self) -> Result<(), DeviceError> {
        let came = Instant::now();
        self.exchange.meet(self.rank)?;
        self.exchanged += came.elapsed();
        Ok(())
    }

    /// Which of the exchange's areas is this operation's.
    fn take_turn(&mut self) -> usize {
        self.turn = 1 - self.turn;
        1 - self.turn
    }

    fn rowwise(&self, step: &CpuStep, width: usize, f: impl Fn(usize) + Sync) {
        self.team
            .each(step.n_rows(), ROWWISE_GRAIN.div_ceil(width), |rows| {
                rows.for_each(&f)
            });
    }

    /// `residual` row by row through `update`, then its norm.
    fn update_norm(
        &self,
        step: &CpuStep,
        norm: &Norm<Buffer>,
        residual: &mut Rows,
        normed: &mut Rows,
        update: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let width = residual.width;
        assert!(normed.width == width && norm.weight.len() >= width);
        let (residual, normed, isa) = (residual.shared(), normed.shared(), self.isa);
        self.rowwise(step, width, |row| {
            // SAFETY: each row is one thread's.
            let (x, y) = unsafe { (residual.part(row, 0), normed.part(row, 0)) };
            update(row, x);
            isa.run(RmsNorm {
                row: x,
                weight: &norm.weight[..width],
                eps: norm.eps,
                normed: y,
            });
        });
    }

    /// A hash over the bits of all rows.
    fn hash(&self, rows: &Rows, n_rows: usize) -> u64 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        for row in 0..n_rows {
            let row = rows.row(row);
            // SAFETY: any number is four initialised bytes.
            hasher.update(unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), size_of_val(row)) });
        }
        hasher.digest()
    }

    /// Answers the asks of a batch that are this rank's, after all ranks' logits are there.
    fn answer(
        &self,
        batch: &[HeadAsk],
        first: usize,
        split: &VocabSplit,
    ) -> Result<Vec<HeadOut>, DeviceError> {
        let exchange = &*self.exchange;
        let n_ranks = exchange.n_ranks();
        let mine: Vec<usize> = (0..batch.len())
            .filter(|i| (first + i) % n_ranks == self.rank)
            .collect();
        let outs = self.team.map(&mine, |&i| {
            ROW.with_borrow_mut(|row| {
                row.clear();
                for rank in 0..n_ranks {
                    // SAFETY: between the meetings before and after answering nobody writes logits.
                    row.extend_from_slice(unsafe { exchange.logits(rank) }.row(i));
                }
                assert_eq!(row.len(), split.n_vocab());
                respond(&batch[i], first + i, row)
            })
        });
        outs.into_iter().collect()
    }
}

thread_local! {
    /// A row of logits over the whole vocabulary.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Answers one ask from a row of logits over the whole vocabulary.
pub(in crate::device) fn respond(
    ask: &HeadAsk,
    index: usize,
    row: &mut [f32],
) -> Result<HeadOut, DeviceError> {
    let not_finite = |_| DeviceError::NotFinite {
        seq: ask.seq.0,
        position: ask.position,
    };
    let mut sampler = ask.sampler.lock().unwrap_or_else(PoisonError::into_inner);
    let next = ask.position + 1;
    let (token, score) = match ask.what {
        HeadUse::Sample { index, .. } => sampler.sample(row, index, next).map_err(not_finite)?,
        HeadUse::Score => {
            let score = sampler.score_prompt(row, next).map_err(not_finite)?;
            (score.token, Some(score))
        }
    };
    Ok(HeadOut {
        ask: index,
        token,
        score,
    })
}

impl Device for CpuDevice {
    type Matrix = Matrix;
    type Vector = Buffer;
    type Rows = Rows;
    type Kv = Kv;
    type Step = CpuStep;

    fn matrix(&mut self, outs: usize, ins: usize) -> Result<Matrix, DeviceError> {
        if self.packed.len() < self.max_rows * ins {
            self.packed = Buffer::new(self.max_rows * ins, "activations")?;
        }
        let matrix = Matrix::new(outs, ins)?;
        self.allocated.weights += matrix.data.bytes();
        Ok(matrix)
    }

    fn fill(&mut self, matrix: &mut Matrix, first_out: usize, part: &Part<'_>) -> Result<(), DeviceError> {
        matrix.fill(&self.team, first_out, &part.to_f32());
        Ok(())
    }

    fn vector(&mut self, values: &[f32]) -> Result<Buffer, DeviceError> {
        let mut vector = Buffer::new(values.len(), "weights")?;
        vector[..values.len()].copy_from_slice(values);
        self.allocated.weights += vector.bytes();
        Ok(vector)
    }

    fn rows(&mut self, width: usize) -> Result<Rows, DeviceError> {
        let rows = Rows::new(self.max_rows, width)?;
        self.allocated.workspace += rows.data.bytes();
        Ok(rows)
    }

    fn kv(&mut self, shape: KvShape) -> Result<Kv, DeviceError> {
        let kv = Kv::new(shape)?;
        self.allocated.kv += kv.bytes();
        Ok(kv)
    }

    fn randomise(&mut self, kv: &mut Kv) -> Result<(), DeviceError> {
        kv.randomise();
        Ok(())
    }

    fn allocated(&self) -> Allocated {
        let workspace = self.allocated.workspace + self.packed.bytes() + self.exchange.bytes(self.rank);
        Allocated {
            workspace,
            ..self.allocated
        }
    }

    fn disturb(&mut self) {
        self.disturbed = true;
    }

    fn begin(&mut self, meta: Arc<StepMeta>, inv_freq: &Buffer, half: usize) -> Result<CpuStep, DeviceError> {
        let ids = meta.tokens.iter().map(|token| match *token {
            RowToken::Known(id) => id,
            RowToken::LastOf(slot) => self.last_sampled[slot as usize],
        });
        let ids = ids.collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for &position in &meta.positions {
            for &frequency in &inv_freq[..half] {
                // The angle in single precision, as checkpoints were trained with it; its functions in double.
                let angle = f64::from(position as f32 * frequency);
                cos.push(angle.cos() as f32);
                sin.push(angle.sin() as f32);
            }
        }
        Ok(CpuStep { meta, ids, cos, sin })
    }

    fn embed_norm(
        &mut self,
        step: &CpuStep,
        table: &Matrix,
        split: &VocabSplit,
        norm: &Norm<Buffer>,
        residual: &mut Rows,
        normed: &mut Rows,
    ) -> Result<(), DeviceError> {
        let mine = split.range(self.rank);
        if self.exchange.n_ranks() == 1 {
            self.update_norm(step, norm, residual, normed, |row, x| {
                table.read(step.ids[row] as usize, x)
            });
            return Ok(());
        }
        let turn = self.take_turn();
        // SAFETY: this rank's own area, whose readers finished before the last meeting.
        let area = unsafe { self.exchange.partial_mut(self.rank, turn) }.shared();
        self.rowwise(step, residual.width, |row| {
            let token = step.ids[row] as usize;
            if mine.contains(&token) {
                // SAFETY: each row is one thread's.
                table.read(token - mine.start, unsafe { area.part(row, 0) });
            }
        });
        self.meet()?;
        self.update_norm(step, norm, residual, normed, |row, x| {
            // SAFETY: after the meeting nobody writes this area before the next.
            let area = unsafe { self.exchange.partial(split.owner(step.ids[row] as usize), turn) };
            x.copy_from_slice(area.row(row));
        });
        Ok(())
    }

    fn linear(&mut self, step: &CpuStep, x: &Rows, w: &Matrix, out: &mut Rows) -> Result<(), DeviceError> {
        assert_eq!(out.width, w.outs, "the output is as wide as the weights");
        let which = Which::First(step.n_rows());
        multiply(
            (self.isa, &self.team),
            &mut self.packed,
            x,
            which,
            w,
            out.shared(),
        );
        Ok(())
    }

    fn rope_write(
        &mut self,
        step: &CpuStep,
        layer: usize,
        heads: Heads,
        qkv: &mut Rows,
        kv: &mut Kv,
    ) -> Result<(), DeviceError> {
        assert_eq!(qkv.width, heads.qkv_width());
        let (dim, half, rows, kv) = (heads.dim, heads.dim / 2, qkv.shared(), kv.writer());
        self.rowwise(step, qkv.width, |row| {
            let (cos, sin) = (&step.cos[row * half..][..half], &step.sin[row * half..][..half]);
            // SAFETY: each row is one thread's.
            let (q, rest) = unsafe { rows.part(row, 0) }.split_at_mut(heads.n_q * dim);
            let (k, v) = rest.split_at_mut(heads.n_kv * dim);
            q.chunks_exact_mut(dim).for_each(|head| rotate(head, cos, sin));
            let place = step.meta.kv_places[row] as usize;
            for (head, (k, v)) in k.chunks_exact_mut(dim).zip(v.chunks_exact(dim)).enumerate() {
                rotate(k, cos, sin);
                // SAFETY: places of different rows differ: a work's positions do, and no block is written by two
                // works (checked when the step was built).
                unsafe { kv.write(layer, place, head, k, v) };
            }
        });
        Ok(())
    }

    fn attention(
        &mut self,
        step: &CpuStep,
        layer: usize,
        heads: Heads,
        qkv: &Rows,
        kv: &Kv,
        out: &mut Rows,
    ) -> Result<(), DeviceError> {
        assert!(qkv.width == heads.qkv_width() && out.width == heads.n_q * heads.dim);
        let rows_a_tile = (TILE * heads.n_kv / heads.n_q).max(1);
        let tiles: Vec<(&WorkMeta, usize, usize)> = step
            .meta
            .works
            .iter()
            .flat_map(|work| {
                let starts = (0..work.rows.len()).step_by(rows_a_tile);
                (0..heads.n_kv).flat_map(move |head| starts.clone().map(move |start| (work, head, start)))
            })
            .collect();
        let multiplications: usize = step
            .meta
            .works
            .iter()
            .map(|w| w.rows.len() * (w.start + w.rows.len()))
            .sum();
        let multiplications = 2 * multiplications * heads.n_q * heads.dim;
        let grain = (ATTENTION_GRAIN * tiles.len()).div_ceil(multiplications);
        let out: SharedRows = out.shared();
        self.team.each(tiles.len(), grain, |range| {
            SCRATCH.with_borrow_mut(|scratch| {
                for &(work, kv_head, start) in &tiles[range] {
                    self.isa.run(AttentionTile {
                        kv,
                        layer,
                        heads,
                        blocks: &step.meta.block_table[work.blocks.clone()],
                        kv_head,
                        row: work.rows.start + start,
                        position: work.start + start,
                        n_rows: rows_a_tile.min(work.rows.len() - start),
                        qkv,
                        out,
                        scratch,
                    });
                }
            });
        });
        Ok(())
    }

    fn silu_mul(&mut self, step: &CpuStep, gate_up: &Rows, out: &mut Rows) -> Result<(), DeviceError> {
        let width = out.width;
        assert_eq!(gate_up.width, 2 * width);
        let (out, isa) = (out.shared(), self.isa);
        self.rowwise(step, width, |row| {
            let (gate, up) = gate_up.row(row).split_at(width);
            // SAFETY: each row is one thread's.
            let out = unsafe { out.part(row, 0) };
            isa.run(SiluMul { gate, up, out });
        });
        Ok(())
    }

    fn reduce_add_norm(
        &mut self,
        step: &CpuStep,
        partial: &Rows,
        norm: &Norm<Buffer>,
        residual: &mut Rows,
        normed: &mut Rows,
    ) -> Result<(), DeviceError> {
        assert_eq!(partial.width, residual.width);
        if self.disturbed {
            residual.data[0] += 1.0;
        }
        if self.exchange.n_ranks() == 1 {
            self.update_norm(step, norm, residual, normed, |row, x| {
                self.isa.run(Add {
                    to: x,
                    from: partial.row(row),
                });
            });
            return Ok(());
        }
        let turn = self.take_turn();
        // SAFETY: this rank's own area, whose readers finished before the last meeting.
        let area = unsafe { self.exchange.partial_mut(self.rank, turn) }.shared();
        self.rowwise(step, partial.width, |row| {
            // SAFETY: each row is one thread's.
            unsafe { area.part(row, 0) }.copy_from_slice(partial.row(row));
        });
        self.meet()?;
        self.update_norm(step, norm, residual, normed, |row, x| {
            for rank in 0..self.exchange.n_ranks() {
                // SAFETY: after the meeting nobody writes this area before the next.
                let area = unsafe { self.exchange.partial(rank, turn) };
                self.isa.run(Add {
                    to: x,
                    from: area.row(row),
                });
            }
        });
        Ok(())
    }

    fn head_sample(
        &mut self,
        step: CpuStep,
        _residual: &Rows,
        normed: &Rows,
        head: &Matrix,
        split: &VocabSplit,
    ) -> Result<(), DeviceError> {
        assert_eq!(head.outs, split.range(self.rank).len());
        let (asks, n_ranks) = (&step.meta.asks, self.exchange.n_ranks());
        let fingerprint = self.hash(normed, step.n_rows());
        let mut outs = Vec::new();
        for (n, batch) in asks.chunks(HEAD_ROWS).enumerate() {
            let rows: Vec<usize> = batch.iter().map(|ask| ask.row).collect();
            // SAFETY: this rank's own area, whose readers finished before the last meeting.
            let logits = unsafe { self.exchange.logits_mut(self.rank) }.shared();
            multiply(
                (self.isa, &self.team),
                &mut self.packed,
                normed,
                Which::These(&rows),
                head,
                logits,
            );
            self.meet()?;
            outs.extend(self.answer(batch, n * HEAD_ROWS, split)?);
            if (n + 1) * HEAD_ROWS >= asks.len() {
                // SAFETY: this rank's own area, whose readers finished before the last meeting.
                let sampled = unsafe { self.exchange.sampled_mut(self.rank) };
                sampled.clear();
                sampled.resize(asks.len(), 0);
                outs.iter().for_each(|out: &HeadOut| sampled[out.ask] = out.token);
            }
            self.meet()?;
        }
        for (i, ask) in asks.iter().enumerate() {
            if let HeadUse::Sample { slot, .. } = ask.what {
                // SAFETY: after the meeting nobody writes this area before the next.
                self.last_sampled[slot as usize] = unsafe { self.exchange.sampled(i % n_ranks) }[i];
            }
        }
        self.landed.push_back(Landed {
            outs,
            fingerprint,
            replayed: false,
            exchanged: (n_ranks > 1).then(|| std::mem::take(&mut self.exchanged)),
            op_times: Vec::new(),
        });
        Ok(())
    }

    fn land(&mut self) -> Result<Option<Landed>, DeviceError> {
        Ok(self.landed.pop_front())
    }
}
