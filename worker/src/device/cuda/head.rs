//! From the last norm to tokens.
//!
//! The likeliest token of every asked row is found on the GPU, kept there for the next step, and costs the host eight
//! bytes, which it reads when the step has landed. Rows whose sampler wants more than that (a temperature, penalties,
//! log-probabilities) are drawn and scored after it, see `draws.rs`. What is left comes out as logits and goes through
//! the sampler itself, on as many threads as the machine has. Rows that are held to a grammar do so when the step has
//! landed: the next step has no row of theirs, and is computed in the meantime. Few others want what there is no room for:
//! they hold up everything, 64 at a time, and their tokens go back to the GPU before the next step begins.

use std::{
    ops::Range,
    sync::{Arc, PoisonError},
};

use rayon::prelude::*;

use super::{
    BF16, CudaDevice, CudaSpec, CudaStep, F32, Matrix, Rows,
    blas::{Operands, Out, Shape, size},
    draws::Plan,
    driver::{Event, Gpu},
    launch::Arg,
    memory::{Memory, Pinned},
    nccl::Comm,
};
use crate::{
    device::{
        AHEAD_MAX, DeviceError, HeadAsk, HeadOut, HeadUse, Landed, StepMeta,
        cpu::{HEAD_ROWS, respond},
    },
    sampling::Sampler,
};

/// Rows of logits that are computed at a time, at most.
const BATCH_MAX: usize = 256;
/// Blocks that search one row of logits.
const PARTS: usize = 64;
/// So many listed alternatives are a sampler's work.
pub(super) const HARD_TOP_MIN: usize = 129;
/// Rows of a step that are answered after it has landed, at most; a step has room for their logits on the host.
pub(super) const LATER_MAX: usize = HEAD_ROWS;
/// A logit and its token in one number, as `head.cu` makes it.
const BEST: usize = size_of::<u64>();
/// That the logits of a row are not finite numbers.
const NOT_FINITE: u64 = u64::MAX;

/// Buffers of the head.
pub(super) struct Head {
    batch: usize,
    picked: Memory,
    logits: Memory,
    parts: Memory,
    /// Of this rank.
    best: Memory,
    /// Of each rank, in their order.
    gathered: Memory,
    /// The token that each slot sampled last.
    last: Memory,
    hash: Memory,
    sides: [Side; AHEAD_MAX],
}

/// What a step brings to the host; steps take turns.
struct Side {
    /// The best of each ask.
    best: Pinned<u64>,
    hash: Pinned<u64>,
    /// This rank's logits of the asks that samplers answer later, one row after the other.
    later: Pinned<f32>,
    /// All of it is there.
    done: Event,
}

/// A step whose answers are on their way to the host.
pub(super) struct Flight {
    pub(super) meta: Arc<StepMeta>,
    side: usize,
    pub(super) replayed: bool,
    /// Exchanges between ranks that were timed, if they were.
    exchanges: Option<usize>,
    plan: Plan,
    /// This rank's answers to asks that samplers have answered.
    answered: Vec<HeadOut>,
}

pub(super) fn batch(spec: &CudaSpec) -> usize {
    spec.max_running.clamp(HEAD_ROWS, BATCH_MAX)
}

pub(super) fn planned_bytes(spec: &CudaSpec) -> usize {
    let shard = spec.split.range(spec.shard.rank).len();
    let row = spec.hidden * BF16 + shard * F32 + (PARTS + 1 + spec.shard.of) * BEST;
    batch(spec) * row + spec.max_running * size_of::<u32>() + BEST
}

impl Head {
    pub(super) fn new(gpu: &Arc<Gpu>, spec: &CudaSpec) -> Result<Self, DeviceError> {
        let (batch, n_ranks) = (batch(spec), spec.shard.of);
        let shard = spec.split.range(spec.shard.rank).len();
        let make = |a_row: usize| gpu.alloc(batch * a_row, "logits");
        // No two asks share a row.
        let side = || -> Result<Side, DeviceError> {
            Ok(Side {
                best: gpu.pinned(spec.max_rows)?,
                hash: gpu.pinned(1)?,
                later: gpu.pinned(LATER_MAX * shard)?,
                done: gpu.event(false)?,
            })
        };
        Ok(Self {
            batch,
            picked: make(spec.hidden * BF16)?,
            logits: make(shard * F32)?,
            parts: make(PARTS * BEST)?,
            best: make(BEST)?,
            gathered: make(n_ranks * BEST)?,
            last: gpu.zeroed(spec.max_running * size_of::<u32>(), "sampled tokens")?,
            hash: gpu.alloc(BEST, "logits")?,
            sides: [side()?, side()?],
        })
    }

    /// Rows of logits that are computed at a time.
    pub(super) fn batch(&self) -> usize {
        self.batch
    }

    /// Logits of the batch that was computed last.
    pub(super) fn logits(&self) -> &Memory {
        &self.logits
    }

    /// Where the last sampled token of each slot is.
    pub(super) fn last(&self) -> &Memory {
        &self.last
    }

    /// Of the product that gives logits.
    pub(super) fn operands(&self, head: &Matrix) -> Operands {
        Operands {
            x: self.picked.address,
            w: head.memory.address,
            out: self.logits.address,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let buffers = [
            &self.picked,
            &self.logits,
            &self.parts,
            &self.best,
            &self.gathered,
            &self.last,
            &self.hash,
        ];
        buffers.iter().map(|memory| memory.bytes).sum()
    }
}

/// The token of a number of `head.cu`.
fn token(best: u64) -> u32 {
    !(best as u32)
}

/// Whether the number stands for a finite logit: not for one that is not a number, nor for minus infinity.
fn is_finite(best: u64) -> bool {
    const MINUS_INFINITY: u64 = !f32::NEG_INFINITY.to_bits() as u64;
    best != NOT_FINITE && best >> 32 > MINUS_INFINITY
}

pub(super) fn locked(ask: &HeadAsk) -> std::sync::MutexGuard<'_, Sampler> {
    ask.sampler.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Those of ascending numbers that are in a range.
fn within<T>(items: &[T], number: impl Fn(&T) -> usize, range: Range<usize>) -> Range<usize> {
    let start = items.partition_point(|item| number(item) < range.start);
    start..start + items[start..].partition_point(|item| number(item) < range.end)
}

impl CudaDevice {
    /// Queues the end of a step, whose first batch of asked rows has its logits.
    pub(super) fn sample(
        &mut self,
        step: &CudaStep,
        normed: &Rows,
        head: &Matrix,
    ) -> Result<(), DeviceError> {
        let (meta, side) = (Arc::clone(&step.meta), step.side);
        let plan = self.plan_draws(&meta, side)?;
        let mut answered = Vec::new();
        for (n, batch) in meta.asks.chunks(self.head.batch).enumerate() {
            let (first, past) = (n * self.head.batch, n * self.head.batch + batch.len());
            if n > 0 {
                self.logits(step, first, batch.len(), normed, head)?;
            }
            let to = &mut self.head.sides[side].best[first..past];
            self.gpu.copy_out(to, self.head.best.address)?;
            self.draw_rows(within(&plan.drawn, |drawn| drawn.ask, first..past), batch.len())?;
            self.fetch_later(&plan, first..past, side, head.outs)?;
            let hard = &plan.hard[within(&plan.hard, |&ask| ask, first..past)];
            if !hard.is_empty() {
                // Samplers learn what came before first.
                self.land_all()?;
            }
            for some in hard.chunks(HEAD_ROWS) {
                let some: Vec<usize> = some.iter().map(|ask| ask - first).collect();
                answered.extend(self.ask_samplers(batch, first, &some, head.outs)?);
            }
        }
        if !plan.hard.is_empty() {
            self.keep_tokens(&meta.asks, &plan.hard, &answered)?;
        }
        self.fetch_draws(&plan, side)?;
        if self.comm.is_some() {
            let side = &mut self.head.sides[side];
            self.gpu.copy_out(&mut side.hash, self.head.hash.address)?;
        }
        self.head.sides[side].done.record()?;
        self.flights.push_back(Flight {
            meta,
            side,
            replayed: step.fixed,
            exchanges: self.stopwatch.taken(),
            plan,
            answered,
        });
        Ok(())
    }

    /// The oldest queued step's answers, if they are there.
    pub(super) fn land_if_done(&mut self) -> Result<Option<Landed>, DeviceError> {
        let Some(flight) = self.flights.front() else {
            return Ok(None);
        };
        if !self.head.sides[flight.side].done.reached()? {
            return match self.exchange.is_closed() {
                true => Err(DeviceError::Interrupted),
                false => Ok(None),
            };
        }
        let flight = self.flights.pop_front().expect("seen just now");
        let mut landed = self.read(flight)?;
        landed.op_times = self.op_times()?;
        Ok(Some(landed))
    }

    /// Waits for all queued steps.
    pub(super) fn land_all(&mut self) -> Result<(), DeviceError> {
        while let Some(flight) = self.flights.pop_front() {
            self.await_event(&self.head.sides[flight.side].done)?;
            let landed = self.read(flight)?;
            self.landed.push_back(landed);
        }
        Ok(())
    }

    /// A hash over the bits of the residual stream, in a group of several.
    pub(super) fn fingerprint(&self, step: &CudaStep, residual: &Rows) -> Result<(), DeviceError> {
        if self.comm.is_none() {
            return Ok(());
        }
        let (gpu, hash) = (&self.gpu, &self.head.hash);
        gpu.clear(hash)?;
        let n = (step.n_rows() * residual.width) as u64;
        let mut arguments = [(&residual.memory).into(), n.into(), hash.into()];
        let blocks = n.div_ceil(256).min(4 * u64::from(gpu.n_sm)) as u32;
        // SAFETY: the parameters of `fingerprint`; the rows have room for the step.
        unsafe {
            let kernel = &self.kernels.fingerprint;
            gpu.launch(kernel, [blocks, 1, 1], [256, 1, 1], 0, &mut arguments)
        }
    }

    /// Logits of `n` asked rows from `first` on, and the likeliest token of each, of all ranks, kept for the rows' slots.
    pub(super) fn logits(
        &mut self,
        step: &CudaStep,
        first: usize,
        n: usize,
        normed: &Rows,
        head: &Matrix,
    ) -> Result<(), DeviceError> {
        if n == 0 {
            return Ok(());
        }
        let buffers = &self.head;
        let after = |asks: u64| asks + (first * size_of::<u32>()) as u64;
        let width = head.ins;
        let mut arguments = [
            (&normed.memory).into(),
            (&buffers.picked).into(),
            after(step.on_gpu.asks).into(),
            (width as u32).into(),
        ];
        let n_blocks = n as u32;
        // SAFETY: the parameters of `gather_rows`; a batch has room.
        unsafe {
            let kernel = &self.kernels.gather_rows;
            self.gpu
                .launch(kernel, [n_blocks, 1, 1], [256, 1, 1], 0, &mut arguments)?;
        }
        let shape = Shape {
            m: size(n).min(buffers.batch),
            n: head.outs,
            k: width,
            out: Out::F32,
        };
        let operands = buffers.operands(head);
        self.multiply(shape, operands)?;
        self.mark_product(shape)?;
        let buffers = &self.head;
        let first_token = self.spec.split.range(self.spec.shard.rank).start as u32;
        let mut arguments = [
            (&buffers.logits).into(),
            (head.outs as u32).into(),
            first_token.into(),
            (&buffers.parts).into(),
        ];
        let (parts, merge) = (&self.kernels.argmax_parts, &self.kernels.argmax_merge);
        let keep = [after(step.on_gpu.slots), buffers.last.address];
        let merging = |parts: &Memory, layout: [u32; 3], best: &Memory, keep: [u64; 2]| {
            let [n, stride, row_stride] = layout.map(Arg::from);
            let [slots, last] = keep.map(Arg::from);
            [parts.into(), n, stride, row_stride, best.into(), slots, last]
        };
        // SAFETY: the parameters of `argmax_parts` and `argmax_merge`; a batch has room, slots were checked.
        unsafe {
            self.gpu
                .launch(parts, [PARTS as u32, n_blocks, 1], [256, 1, 1], 0, &mut arguments)?;
            let alone = self.comm.is_none();
            let layout = [PARTS as u32, 1, PARTS as u32];
            let mut own = merging(
                &buffers.parts,
                layout,
                &buffers.best,
                if alone { keep } else { [0; 2] },
            );
            self.gpu
                .launch(merge, [n_blocks, 1, 1], [32, 1, 1], 0, &mut own)?;
        }
        let Some(n_ranks) = self.comm.as_ref().map(Comm::n_ranks) else {
            return Ok(());
        };
        let (from, to) = (self.head.best.address, self.head.gathered.address);
        self.between_ranks("ncclAllGather", |comm| comm.gather(from, to, n * BEST))?;
        let (buffers, merge) = (&self.head, &self.kernels.argmax_merge);
        let layout = [n_ranks as u32, n_blocks, 1];
        let mut all = merging(&buffers.gathered, layout, &buffers.best, keep);
        // SAFETY: the parameters of `argmax_merge`, as above.
        unsafe { self.gpu.launch(merge, [n_blocks, 1, 1], [32, 1, 1], 0, &mut all) }
    }

    /// Reads a step that is done. Every rank knows all tokens but those that samplers answered; each sequence's sampler is
    /// told by one rank, always the same, so that it learns them in order.
    fn read(&mut self, flight: Flight) -> Result<Landed, DeviceError> {
        let (rank, n_ranks) = (self.spec.shard.rank, self.spec.shard.of);
        let side = &self.head.sides[flight.side];
        let mut outs = self.answer_later(&flight)?;
        outs.extend(flight.answered);
        let mut drawn = flight.plan.drawn.iter().enumerate().peekable();
        let mut hard = flight.plan.hard.iter().peekable();
        let mut later = flight.plan.later.iter().peekable();
        for (i, ask) in flight.meta.asks.iter().enumerate() {
            let by_sampler = [&mut hard, &mut later].map(|asks| asks.next_if(|&&ask| ask == i));
            if by_sampler.iter().any(Option::is_some) {
                continue;
            }
            let (token, score) = match drawn.next_if(|(_, drawn)| drawn.ask == i) {
                Some((at, drawn)) => self.draws.read(flight.side, at, drawn, ask)?,
                None if is_finite(side.best[i]) => (token(side.best[i]), None),
                None => {
                    return Err(DeviceError::NotFinite {
                        seq: ask.seq.0,
                        position: ask.position,
                    });
                }
            };
            if let HeadUse::Sample { index, .. } = ask.what
                && ask.seq.0 as usize % n_ranks == rank
            {
                locked(ask).take(index, token);
            }
            if i % n_ranks == rank {
                outs.push(HeadOut { ask: i, token, score });
            }
        }
        Ok(Landed {
            outs,
            fingerprint: side.hash[0],
            replayed: flight.replayed,
            exchanged: self.stopwatch.read(flight.side, flight.exchanges),
            op_times: Vec::new(),
        })
    }

    /// Answers those of some asks of a batch that are this rank's from their whole rows of logits.
    fn ask_samplers(
        &self,
        batch: &[HeadAsk],
        first: usize,
        some: &[usize],
        width: usize,
    ) -> Result<Vec<HeadOut>, DeviceError> {
        // SAFETY: this rank's own area, whose readers finished before the last meeting.
        let (area, stride) = unsafe { self.exchange.logits_mut(self.spec.shard.rank) }.all_mut();
        for (to, &i) in area.chunks_mut(stride).zip(some) {
            self.gpu
                .copy_out(&mut to[..width], self.head.logits.at(i * width * F32))?;
        }
        self.settle()?;
        let asks: Vec<usize> = some.iter().map(|i| first + i).collect();
        self.respond_all(batch, first, &asks)
    }

    /// Sends the logits of asks of a batch, `range` of the step's, that are answered later on their way to the host.
    fn fetch_later(
        &mut self,
        plan: &Plan,
        range: Range<usize>,
        side: usize,
        width: usize,
    ) -> Result<(), DeviceError> {
        for at in within(&plan.later, |&ask| ask, range.clone()) {
            let row = plan.later[at] - range.start;
            let to = &mut self.head.sides[side].later[at * width..(at + 1) * width];
            self.gpu.copy_out(to, self.head.logits.at(row * width * F32))?;
        }
        Ok(())
    }

    /// Answers those of a step's later asks that are this rank's. Ranks read their steps in the same order, and all that
    /// are done before they meet for another, so that they meet for the same one.
    fn answer_later(&self, flight: &Flight) -> Result<Vec<HeadOut>, DeviceError> {
        if flight.plan.later.is_empty() {
            return Ok(Vec::new());
        }
        let rank = self.spec.shard.rank;
        let width = self.spec.split.range(rank).len();
        let rows = self.head.sides[flight.side].later.chunks(width);
        // SAFETY: this rank's own area, whose readers finished before the last meeting.
        let (area, stride) = unsafe { self.exchange.logits_mut(rank) }.all_mut();
        for (to, row) in area.chunks_mut(stride).zip(rows).take(flight.plan.later.len()) {
            to[..width].copy_from_slice(row);
        }
        self.respond_all(&flight.meta.asks, 0, &flight.plan.later)
    }

    /// Lets samplers answer those of `asks` that are this rank's. Each rank has put its logits of the n-th of them in row
    /// n of its area; the first of `from` is the step's ask number `first`.
    fn respond_all(
        &self,
        from: &[HeadAsk],
        first: usize,
        asks: &[usize],
    ) -> Result<Vec<HeadOut>, DeviceError> {
        let (exchange, rank, n_ranks) = (&self.exchange, self.spec.shard.rank, self.spec.shard.of);
        let n_vocab = self.spec.split.n_vocab();
        exchange.meet(rank)?;
        let mine: Vec<(usize, usize)> = asks
            .iter()
            .copied()
            .enumerate()
            .filter(|(_, ask)| ask % n_ranks == rank)
            .collect();
        let outs = mine
            .par_iter()
            .map(|&(at, ask)| {
                let mut row = Vec::with_capacity(n_vocab);
                for rank in 0..n_ranks {
                    // SAFETY: between the meetings before and after answering nobody writes logits.
                    row.extend_from_slice(unsafe { exchange.logits(rank) }.row(at));
                }
                respond(&from[ask - first], ask, &mut row)
            })
            .collect();
        exchange.meet(rank)?;
        outs
    }

    /// Gives the other ranks the tokens of the asks that went through samplers here, takes theirs, and keeps all on the
    /// GPU for the next step.
    fn keep_tokens(&self, asks: &[HeadAsk], hard: &[usize], answered: &[HeadOut]) -> Result<(), DeviceError> {
        let (exchange, rank, n_ranks) = (&self.exchange, self.spec.shard.rank, self.spec.shard.of);
        // SAFETY: this rank's own area: its readers of the last step have met this rank since.
        let told = unsafe { exchange.sampled_mut(rank) };
        told.clear();
        told.resize(asks.len(), 0);
        answered.iter().for_each(|out| told[out.ask] = out.token);
        exchange.meet(rank)?;
        for &ask in hard {
            if let HeadUse::Sample { slot, .. } = asks[ask].what {
                // SAFETY: after the meeting nobody writes this area before the next.
                let token = unsafe { exchange.sampled(ask % n_ranks) }[ask];
                let to = self.head.last.at(slot as usize * size_of::<u32>());
                // The driver takes the number before the call returns: it is not in page-locked memory.
                self.gpu.copy_in(to, &[token])?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `head.cu` does it.
    fn rank(logit: f32, token: u32) -> u64 {
        let bits = if logit == 0.0 { 0 } else { logit.to_bits() };
        let order = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        u64::from(order) << 32 | u64::from(!token)
    }

    #[test]
    fn numbers_of_the_search_are_in_the_order_of_choice() {
        let logits = [-1e30, -2.0, -0.0, 0.0, 1e-20, 3.5, 1e30];
        for pair in logits.windows(2) {
            assert!(rank(pair[0], 7) <= rank(pair[1], 7), "{pair:?}");
        }
        assert!(rank(1.0, 3) > rank(1.0, 4), "the lower token of equals");
        assert!(rank(-0.0, 3) > rank(0.0, 4));
        assert_eq!(token(rank(2.0, 128_255)), 128_255);
        assert!(is_finite(rank(f32::MIN, 0)) && is_finite(rank(f32::MAX, u32::MAX - 1)));
        assert!(!is_finite(rank(f32::NEG_INFINITY, 0)) && !is_finite(NOT_FINITE));
    }
}
