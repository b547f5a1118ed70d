//! What steps cost on this machine, measured before the first request, so that the first prompts beside running answers
//! are cut well already.
//!
//! Prompts of doubling lengths alone, far into a text, and beside decode rows, until one takes longer than the
//! target: longer steps than that are never planned while a stream decodes. What the steps compute means nothing.

use std::time::{Duration, Instant};

use swallow_schedule::{
    BlockId, CostModel, Input, Limits, Micros, Pace, SeqId, Slot, Step, StepCost, StepId, Work,
};
use tracing::info;

use crate::{
    group::{Group, GroupError},
    sampling::SamplingParams,
};

/// Rows of prompts that a step may have whatever they cost.
const ROWS_MIN: u32 = 128;
/// Rows of the first prompt, which only tells whether this is a machine for more.
const FIRST_ROWS: u32 = 16;
/// Rows of the shortest prompt that is learnt from.
const ROWS_LEAST: u32 = 128;
/// Rows of the longest, where the target is that long.
const ROWS_MOST: u32 = 8192;
/// Decode rows beside prompts.
const DECODE_ROWS: u32 = 64;
/// Their context.
const CONTEXT: u32 = 1024;
/// Where a prompt goes on that is far into a text.
const FAR: u32 = 4096;
/// Sequences count down from here; no request comes so far.
const FIRST_SEQUENCE: u64 = u64::MAX - 1;

/// A step to measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Probe {
    /// First position and rows of a prompt; no rows: none.
    start: u32,
    rows: u32,
    /// Single rows, each at the end of this context.
    decode: u32,
    context: u32,
}

/// Measures steps of `group`, whose pool and slots nobody uses yet.
///
/// # Errors
/// The group failed.
pub(super) fn pace(group: &mut Group, limits: &Limits, target: Duration) -> Result<Pace, GroupError> {
    let begun = Instant::now();
    let mut costs = CostModel::new();
    let mut steps = 0;
    let mut measure = |probe: Probe, costs: Option<&mut CostModel>| -> Result<Duration, GroupError> {
        let step = step(probe, limits);
        for work in &step.works {
            group.admit(work.seq, SamplingParams::greedy(), [0].into());
        }
        let began = Instant::now();
        group.run(&step)?;
        let took = began.elapsed();
        step.works.iter().for_each(|work| group.retire(work.seq));
        steps += 1;
        if let Some(costs) = costs {
            costs.begin_with(&StepCost::of(&step), Micros(took.as_micros() as u64));
        }
        Ok(took)
    };
    // Twice: kernels are loaded at their first use. A pool too small for a prompt will see none beside decoding.
    let first = first_probe(limits);
    let mut quick = first.rows > 0;
    for _ in 0..2 {
        quick = quick && measure(first, None)? < 2 * target;
    }
    if quick {
        for probe in decode_probes(limits) {
            measure(probe, Some(&mut costs))?;
        }
        'longer: for rows in sizes(limits) {
            for probe in prefill_probes(rows, limits) {
                if measure(probe, Some(&mut costs))? > target {
                    break 'longer;
                }
            }
        }
    }
    let (ms, target_ms) = (begun.elapsed().as_millis(), target.as_millis());
    info!(steps, ms, target_ms, "what steps cost is known");
    Ok(Pace {
        target: Micros(target.as_micros() as u64),
        rows_min: ROWS_MIN,
        costs,
    })
}

impl Probe {
    /// As much of it as the group has room for.
    fn within(mut self, limits: &Limits) -> Self {
        self.decode = self
            .decode
            .min(limits.max_running - 1)
            .min(limits.max_step_tokens - 1);
        self.rows = self.rows.min(limits.max_step_tokens - self.decode);
        // A block for each decode row, and half of the others for the context of all of them.
        self.decode = self.decode.min(limits.n_blocks / 4);
        let half = (limits.n_blocks - self.decode) / 2 * limits.block_tokens;
        self.context = self.context.min(limits.max_model_len - 1).min(half);
        self.rows = self.rows.min(limits.max_model_len).min(half);
        self.start = self
            .start
            .min(limits.max_model_len - self.rows)
            .min(half - self.rows);
        self
    }
}

fn first_probe(limits: &Limits) -> Probe {
    let probe = Probe {
        rows: FIRST_ROWS,
        ..Probe::default()
    };
    probe.within(limits)
}

fn decode_probes(limits: &Limits) -> Vec<Probe> {
    let mut probes = Vec::new();
    for decode in [1, DECODE_ROWS / 2, DECODE_ROWS] {
        for context in [1, CONTEXT] {
            let probe = Probe {
                decode,
                context,
                ..Probe::default()
            };
            probes.push(probe.within(limits));
        }
    }
    probes.retain(|probe| probe.decode > 0);
    probes
}

/// Doubling, up to what a step holds.
fn sizes(limits: &Limits) -> impl Iterator<Item = u32> {
    let most = ROWS_MOST.min(limits.max_step_tokens);
    std::iter::successors(Some(ROWS_LEAST.min(most)), move |&rows| {
        (rows < most).then(|| (2 * rows).min(most))
    })
}

fn prefill_probes(rows: u32, limits: &Limits) -> Vec<Probe> {
    let alone = Probe {
        rows,
        ..Probe::default()
    };
    let far = Probe { start: FAR, ..alone };
    let beside = Probe {
        decode: DECODE_ROWS,
        context: CONTEXT,
        ..alone
    };
    let mut probes = [alone, far, beside].map(|probe| probe.within(limits)).to_vec();
    probes.retain(|probe| probe.rows > 1);
    probes
}

/// The prompt has the pool's first blocks; decode rows share a context in the middle, and each writes into a block of its
/// own from the end on.
fn step(probe: Probe, limits: &Limits) -> Step {
    let block_tokens = limits.block_tokens;
    let blocks = |first: u32, tokens: u32| (first..first + tokens.div_ceil(block_tokens)).map(BlockId);
    let work = |n: u32, start: u32, rows: u32, blocks: Vec<BlockId>| Work {
        seq: SeqId(FIRST_SEQUENCE - u64::from(n)),
        slot: Slot(n),
        start,
        input: Input::Tokens(vec![0; rows as usize]),
        blocks,
        sample: Some(0),
        prompt_logprobs: false,
    };
    let mut works = Vec::new();
    let middle = (limits.n_blocks - probe.decode) / 2;
    for n in 0..probe.decode {
        let whole = probe.context / block_tokens * block_tokens;
        let own = BlockId(limits.n_blocks - 1 - n);
        let blocks = blocks(middle, whole).chain([own]).collect();
        works.push(work(n, probe.context, 1, blocks));
    }
    if probe.rows > 0 {
        let blocks = blocks(0, probe.start + probe.rows).collect();
        works.push(work(probe.decode, probe.start, probe.rows, blocks));
    }
    Step {
        id: StepId(0), // Before the first.
        works,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use swallow_proto::prefix;

    use super::*;
    use crate::{
        device::{StepMeta, StepShape},
        sampling::Sampler,
    };

    #[test]
    fn every_probe_fits_every_group() {
        let mut random = fastrand::Rng::with_seed(3);
        let mut prompts = 0;
        for round in 0..500 {
            let max_step_tokens = 1 << random.u32(0..13);
            let limits = Limits {
                block_tokens: 1 << random.u32(0..6),
                n_blocks: random.u32(1..2000),
                max_running: random.u32(1..=max_step_tokens.min(200)),
                max_step_tokens,
                max_model_len: 0,
                max_waiting: 1,
                prefix_cache: true,
                key_of: prefix::next,
            };
            let pool = limits.n_blocks * limits.block_tokens;
            let limits = Limits {
                max_model_len: random.u32(1..=pool),
                ..limits
            };
            let shape = StepShape {
                block_tokens: limits.block_tokens as usize,
                n_blocks: limits.n_blocks as usize,
                max_running: limits.max_running as usize,
                max_rows: limits.max_step_tokens as usize,
                max_model_len: limits.max_model_len as usize,
                n_vocab: 1,
            };
            let sampler = Arc::new(Mutex::new(Sampler::new(SamplingParams::greedy(), [0].into())));
            let longer = sizes(&limits).flat_map(|rows| prefill_probes(rows, &limits));
            let probes = decode_probes(&limits).into_iter().chain(longer);
            let first = Some(first_probe(&limits)).filter(|probe| probe.rows > 0);
            for probe in first.into_iter().chain(probes) {
                let step = step(probe, &limits);
                StepMeta::build(&step, &shape, |_| Some(Arc::clone(&sampler)))
                    .unwrap_or_else(|error| panic!("round {round}, {limits:?}, {probe:?}: {error}"));
                prompts += u32::from(probe.rows > 1);
            }
        }
        assert!(prompts > 500, "{prompts} prompts");
    }
}
