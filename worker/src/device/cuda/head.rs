//! From the last norm to tokens.
//!
//! The likeliest token of every asked row is found on the GPU and costs the host eight bytes a row and rank. Rows whose
//! sampler wants more than that (a temperature, penalties, log-probabilities) come out as logits, 64 at a time, and go
//! through the sampler itself, on as many threads as the machine has.

use std::sync::{Arc, PoisonError};

use rayon::prelude::*;

use super::{
    BF16, CudaDevice, CudaSpec, CudaStep, F32, Matrix, Rows,
    blas::{Operands, Out, Shape, size},
    driver::{Gpu, Memory, Pinned},
};
use crate::{
    device::{
        DeviceError, HeadAsk, HeadOut, HeadUse, VocabSplit,
        cpu::{HEAD_ROWS, respond},
    },
    sampling::Sampler,
};

/// Rows of logits that are computed at a time, at most.
const BATCH_MAX: usize = 256;
/// Blocks that search one row of logits.
const PARTS: usize = 16;
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
    best: Memory,
    /// Of all ranks, in their order.
    gathered: Memory,
    hash: Memory,
    on_host: Pinned<u64>,
    hash_on_host: Pinned<u64>,
}

fn batch(spec: &CudaSpec) -> usize {
    spec.max_running.clamp(HEAD_ROWS, BATCH_MAX)
}

pub(super) fn planned_bytes(spec: &CudaSpec) -> usize {
    let shard = spec.split.range(spec.shard.rank).len();
    let row = spec.hidden * BF16 + shard * F32 + (PARTS + 1 + spec.shard.of) * BEST;
    batch(spec) * row + BEST
}

impl Head {
    pub(super) fn new(gpu: &Arc<Gpu>, spec: &CudaSpec) -> Result<Self, DeviceError> {
        let (batch, n_ranks) = (batch(spec), spec.shard.of);
        let shard = spec.split.range(spec.shard.rank).len();
        let make = |a_row: usize| gpu.alloc(batch * a_row, "logits");
        Ok(Self {
            batch,
            picked: make(spec.hidden * BF16)?,
            logits: make(shard * F32)?,
            parts: make(PARTS * BEST)?,
            best: make(BEST)?,
            gathered: make(n_ranks * BEST)?,
            hash: gpu.alloc(BEST, "logits")?,
            on_host: gpu.pinned(batch * n_ranks)?,
            hash_on_host: gpu.pinned(1)?,
        })
    }

    /// Rows of logits that are computed at a time.
    pub(super) fn batch(&self) -> usize {
        self.batch
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

fn locked(ask: &HeadAsk) -> std::sync::MutexGuard<'_, Sampler> {
    ask.sampler.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the likeliest token answers an ask.
fn is_plain(ask: &HeadAsk) -> bool {
    match ask.what {
        HeadUse::Sample { index, .. } => locked(ask).is_plain(index),
        HeadUse::Score => false,
    }
}

impl CudaDevice {
    pub(super) fn sample(
        &mut self,
        step: &CudaStep,
        residual: &Rows,
        normed: &Rows,
        head: &Matrix,
        split: &VocabSplit,
    ) -> Result<Vec<HeadOut>, DeviceError> {
        let (asks, rank, n_ranks) = (&step.meta.asks, self.spec.shard.rank, self.spec.shard.of);
        assert_eq!(head.outs, split.range(rank).len());
        self.fingerprint(step, residual)?;
        let mut outs = Vec::new();
        let (mut agreed, mut hard_asks) = (false, false);
        for (n, batch) in asks.chunks(self.head.batch).enumerate() {
            let first = n * self.head.batch;
            self.logits(step, first, batch.len(), normed, head)?;
            self.settle()?;
            if !agreed {
                self.agree()?;
                agreed = true;
            }
            let hard: Vec<usize> = (0..batch.len()).filter(|&i| !is_plain(&batch[i])).collect();
            self.take_likeliest(batch, first, &hard, &mut outs)?;
            hard_asks |= !hard.is_empty();
            for some in hard.chunks(HEAD_ROWS) {
                outs.extend(self.ask_samplers(batch, first, some, split, head.outs)?);
            }
        }
        if !agreed {
            self.settle()?;
            self.agree()?;
        }
        if hard_asks && n_ranks > 1 {
            self.tell_tokens(asks, &mut outs)?;
        }
        for out in &outs {
            if let HeadUse::Sample { slot, .. } = asks[out.ask].what {
                self.last_sampled[slot as usize] = out.token;
            }
        }
        outs.retain(|out| out.ask % n_ranks == rank);
        Ok(outs)
    }

    /// A hash over the bits of the residual stream, in a group of several.
    fn fingerprint(&mut self, step: &CudaStep, residual: &Rows) -> Result<(), DeviceError> {
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
            gpu.launch(
                &self.kernels.fingerprint,
                [blocks, 1, 1],
                [256, 1, 1],
                0,
                &mut arguments,
            )?
        };
        gpu.copy_out(&mut self.head.hash_on_host, hash.address)
    }

    /// Meets the other ranks and compares the hashes.
    fn agree(&self) -> Result<(), DeviceError> {
        if self.comm.is_none() {
            return Ok(());
        }
        let rank = self.spec.shard.rank;
        self.exchange.set_hash(rank, self.head.hash_on_host[0]);
        self.exchange.meet(rank)?;
        self.exchange.compare(rank)
    }

    /// Logits of `n` asked rows from `first` on, and the likeliest token of each, of all ranks, on their way to the
    /// host.
    fn logits(
        &mut self,
        step: &CudaStep,
        first: usize,
        n: usize,
        normed: &Rows,
        head: &Matrix,
    ) -> Result<(), DeviceError> {
        let buffers = &mut self.head;
        let (rows, width) = (step.on_gpu.asks + (first * size_of::<u32>()) as u64, head.ins);
        let mut arguments = [
            (&normed.memory).into(),
            (&buffers.picked).into(),
            rows.into(),
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
        self.blas.multiply(shape, buffers.operands(head))?;
        let first_token = self.spec.split.range(self.spec.shard.rank).start as u32;
        let mut arguments = [
            (&buffers.logits).into(),
            (head.outs as u32).into(),
            first_token.into(),
            (&buffers.parts).into(),
        ];
        let mut merging = [
            (&buffers.parts).into(),
            (PARTS as u32).into(),
            (&buffers.best).into(),
        ];
        // SAFETY: the parameters of `argmax_parts` and `argmax_merge`; a batch has room.
        unsafe {
            let (parts, merge) = (&self.kernels.argmax_parts, &self.kernels.argmax_merge);
            self.gpu
                .launch(parts, [PARTS as u32, n_blocks, 1], [256, 1, 1], 0, &mut arguments)?;
            self.gpu
                .launch(merge, [n_blocks, 1, 1], [32, 1, 1], 0, &mut merging)?;
        }
        match &self.comm {
            None => self.gpu.copy_out(&mut buffers.on_host[..n], buffers.best.address),
            Some(comm) => {
                comm.gather(buffers.best.address, buffers.gathered.address, n * BEST)?;
                let all = &mut buffers.on_host[..n * comm.n_ranks()];
                self.gpu.copy_out(all, buffers.gathered.address)
            }
        }
    }

    /// Answers the plain asks of a batch: every rank all of them, since all know the tokens.
    fn take_likeliest(
        &self,
        batch: &[HeadAsk],
        first: usize,
        hard: &[usize],
        outs: &mut Vec<HeadOut>,
    ) -> Result<(), DeviceError> {
        let (rank, n_ranks) = (self.spec.shard.rank, self.spec.shard.of);
        for (i, ask) in batch.iter().enumerate() {
            let of_ranks = (0..n_ranks).map(|rank| self.head.on_host[rank * batch.len() + i]);
            let best = of_ranks.max().unwrap_or(NOT_FINITE);
            if !is_finite(best) {
                return Err(DeviceError::NotFinite {
                    seq: ask.seq.0,
                    position: ask.position,
                });
            }
            let (HeadUse::Sample { index, .. }, Err(_)) = (ask.what, hard.binary_search(&i)) else {
                continue;
            };
            if (first + i) % n_ranks == rank {
                locked(ask).take(index, token(best));
            }
            outs.push(HeadOut {
                ask: first + i,
                token: token(best),
                score: None,
            });
        }
        Ok(())
    }

    /// Answers those of some asks of a batch that are this rank's from their whole rows of logits.
    fn ask_samplers(
        &self,
        batch: &[HeadAsk],
        first: usize,
        some: &[usize],
        split: &VocabSplit,
        width: usize,
    ) -> Result<Vec<HeadOut>, DeviceError> {
        let (exchange, rank, n_ranks) = (&self.exchange, self.spec.shard.rank, self.spec.shard.of);
        // SAFETY: this rank's own area, whose readers finished before the last meeting.
        let (area, stride) = unsafe { exchange.logits_mut(rank) }.all_mut();
        for (to, &i) in area.chunks_mut(stride).zip(some) {
            self.gpu
                .copy_out(&mut to[..width], self.head.logits.at(i * width * F32))?;
        }
        self.settle()?;
        exchange.meet(rank)?;
        let mine: Vec<(usize, usize)> = some
            .iter()
            .copied()
            .enumerate()
            .filter(|(_, i)| (first + i) % n_ranks == rank)
            .collect();
        let outs = mine
            .par_iter()
            .map(|&(at, i)| {
                let mut row = Vec::with_capacity(split.n_vocab());
                for rank in 0..n_ranks {
                    // SAFETY: between the meetings before and after answering nobody writes logits.
                    row.extend_from_slice(unsafe { exchange.logits(rank) }.row(at));
                }
                respond(&batch[i], first + i, &mut row)
            })
            .collect();
        exchange.meet(rank)?;
        outs
    }

    /// Gives the other ranks the tokens of the asks that went through samplers here, and takes theirs.
    fn tell_tokens(&self, asks: &[HeadAsk], outs: &mut Vec<HeadOut>) -> Result<(), DeviceError> {
        let (exchange, rank, n_ranks) = (&self.exchange, self.spec.shard.rank, self.spec.shard.of);
        // SAFETY: this rank's own area: its readers of the last step have met this rank since.
        let told = unsafe { exchange.sampled_mut(rank) };
        told.clear();
        told.resize(asks.len(), 0);
        outs.iter().for_each(|out| told[out.ask] = out.token);
        exchange.meet(rank)?;
        outs.sort_unstable_by_key(|out| out.ask);
        let known: Vec<usize> = outs.iter().map(|out| out.ask).collect();
        for ask in (0..asks.len()).filter(|ask| known.binary_search(ask).is_err()) {
            outs.push(HeadOut {
                ask,
                // SAFETY: after the meeting nobody writes this area before the next.
                token: unsafe { exchange.sampled(ask % n_ranks) }[ask],
                score: None,
            });
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
