//! Running prompts as a server does: a scheduler plans, the group runs a step ahead, and what counts is when ids leave
//! the scheduler on the host.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use swallow_proto::prefix;
use swallow_schedule::{
    Ask, BlockId, Input, Limits, Micros, Output, Scheduler, SeqId, Slot, Step, StepId, Work,
};

use super::{BLOCK_TOKENS, BenchError};
use crate::{
    group::{Group, GroupError, GroupSpec},
    sampling::SamplingParams,
};

/// Sequences that are submitted at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    /// How many.
    pub(super) sequences: usize,
    /// Tokens of each prompt.
    pub(super) prompt: usize,
    /// Tokens that each generates.
    pub(super) outputs: usize,
    /// Tokens there are.
    pub(super) vocab: usize,
    /// Other prompts for every value.
    pub(super) salt: u64,
}

impl Batch {
    /// Pseudo-random ids; every sequence has its own.
    fn prompt_of(&self, sequence: usize) -> Arc<[u32]> {
        let id = |i: usize| {
            let place = self.salt << 40 | (sequence * self.prompt + i) as u64;
            ((place.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) % self.vocab as u64) as u32
        };
        (0..self.prompt).map(id).collect()
    }

    fn params(&self, sequence: usize, params: &SamplingParams) -> SamplingParams {
        SamplingParams {
            seed: sequence as u64,
            ..params.clone()
        }
    }

    fn ids(&self) -> impl Iterator<Item = SeqId> {
        (0..self.sequences as u64).map(SeqId)
    }

    fn prompts(&self) -> Vec<Arc<[u32]>> {
        (0..self.sequences)
            .map(|sequence| self.prompt_of(sequence))
            .collect()
    }

    fn submit(
        &self,
        group: &mut Group,
        scheduler: &mut Scheduler,
        params: &SamplingParams,
        prompts: Vec<Arc<[u32]>>,
    ) -> Result<(), BenchError> {
        for (sequence, prompt) in prompts.into_iter().enumerate() {
            let id = SeqId(sequence as u64);
            group.admit(id, self.params(sequence, params), Arc::clone(&prompt));
            let ask = Ask {
                id,
                prompt,
                max_tokens: number(self.outputs),
                min_tokens: 0,
                stop_ids: [].into(),
                root_key: prefix::root(0),
                prompt_logprobs: false,
                prompt_logprobs_from: 0,
                deadline: None,
            };
            scheduler
                .add(ask)
                .map_err(|refusal| BenchError::Flag(refusal.to_string()))?;
        }
        Ok(())
    }
}

/// The sizes of a benchmark are far below 2^32.
fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// A scheduler for the group: nothing is cached.
fn scheduler(spec: &GroupSpec) -> Scheduler {
    Scheduler::new(Limits {
        block_tokens: number(spec.block_tokens),
        n_blocks: number(spec.n_blocks),
        max_running: number(spec.max_running),
        max_step_tokens: number(spec.max_step_tokens),
        max_model_len: number(spec.max_model_len),
        max_waiting: number(spec.max_running),
        prefix_cache: false,
        key_of: prefix::next,
    })
}

/// From submitting one prompt's ids to its first token's id on the host.
pub(super) fn first_token(
    group: &mut Group,
    spec: &GroupSpec,
    batch: Batch,
    params: &SamplingParams,
) -> Result<Duration, BenchError> {
    let mut scheduler = scheduler(spec);
    let prompts = batch.prompts();
    let submitted = Instant::now();
    batch.submit(group, &mut scheduler, params, prompts)?;
    let mut first = None;
    let told = |outputs: &[Output]| {
        let came = outputs
            .iter()
            .any(|output| matches!(output, Output::Token { .. }));
        if came && first.is_none() {
            first = Some(submitted.elapsed());
        }
    };
    run(group, &mut Scheduled { scheduler, told })?;
    batch.ids().for_each(|id| group.retire(id));
    Ok(first.expect("a sequence ends with its token"))
}

/// Decode steps that were measured.
pub(super) struct Measured {
    /// Median time between consecutive steps in which every sequence got a token.
    pub(super) step: Duration,
    /// How many.
    pub(super) steps: usize,
}

/// The times between steps that gave every sequence a token.
#[derive(Default)]
struct Gaps {
    last: Option<Instant>,
    gaps: Vec<Duration>,
}

impl Gaps {
    /// A step's tokens are there; `whole` if every sequence got one.
    fn step(&mut self, whole: bool) {
        let now = Instant::now();
        if let (Some(last), true) = (self.last, whole) {
            self.gaps.push(now.saturating_duration_since(last));
        }
        self.last = whole.then_some(now);
    }

    fn measured(mut self) -> Result<Measured, BenchError> {
        self.gaps.sort_unstable();
        let step = self.gaps.get(self.gaps.len() / 2).copied().ok_or_else(|| {
            BenchError::Flag(
                "no two consecutive steps had all sequences in them; raise --output-tokens".into(),
            )
        })?;
        Ok(Measured {
            step,
            steps: self.gaps.len(),
        })
    }
}

/// Submits all prompts at once and runs until every sequence has its tokens.
pub(super) fn decode(
    group: &mut Group,
    spec: &GroupSpec,
    batch: Batch,
    params: &SamplingParams,
) -> Result<Measured, BenchError> {
    let mut scheduler = scheduler(spec);
    batch.submit(group, &mut scheduler, params, batch.prompts())?;
    let mut gaps = Gaps::default();
    let told = |outputs: &[Output]| {
        let tokens = outputs
            .iter()
            .filter(|output| matches!(output, Output::Token { .. }));
        gaps.step(tokens.count() == batch.sequences);
    };
    run(group, &mut Scheduled { scheduler, told })?;
    batch.ids().for_each(|id| group.retire(id));
    gaps.measured()
}

/// For tuning: decodes as if prompts had been computed, over whatever the pool holds. No scheduler is in it.
pub(super) fn decode_on_noise(
    group: &mut Group,
    batch: Batch,
    params: &SamplingParams,
) -> Result<Measured, BenchError> {
    for (sequence, id) in batch.ids().enumerate() {
        let prompt = vec![0; batch.prompt].into();
        group.admit(id, batch.params(sequence, params), prompt);
    }
    let mut source = Noise {
        batch,
        planned: 0,
        gaps: Gaps::default(),
    };
    run(group, &mut source)?;
    batch.ids().for_each(|id| group.retire(id));
    source.gaps.measured()
}

/// Where steps come from, and who hears what came of them.
trait Source {
    fn next(&mut self) -> Option<Step>;
    fn landed(&mut self, step: StepId, sampled: &[u32]);
}

struct Scheduled<T> {
    scheduler: Scheduler,
    told: T,
}

impl<T: FnMut(&[Output])> Source for Scheduled<T> {
    fn next(&mut self) -> Option<Step> {
        self.scheduler.step(Micros(0))
    }

    fn landed(&mut self, step: StepId, sampled: &[u32]) {
        self.scheduler.commit(step, sampled);
        (self.told)(&self.scheduler.take_outputs());
    }
}

struct Noise {
    batch: Batch,
    planned: usize,
    gaps: Gaps,
}

impl Source for Noise {
    fn next(&mut self) -> Option<Step> {
        if self.planned == self.batch.outputs {
            return None;
        }
        let (start, sample) = (self.batch.prompt + self.planned, self.planned);
        let each = (self.batch.prompt + self.batch.outputs).div_ceil(BLOCK_TOKENS);
        let work = |sequence: usize| Work {
            seq: SeqId(sequence as u64),
            slot: Slot(number(sequence)),
            start: number(start),
            input: match sample {
                0 => Input::Tokens(vec![0]),
                _ => Input::LastSampled,
            },
            blocks: (sequence * each..sequence * each + (start + 1).div_ceil(BLOCK_TOKENS))
                .map(|block| BlockId(number(block)))
                .collect(),
            sample: Some(number(sample)),
            prompt_logprobs: false,
        };
        self.planned += 1;
        Some(Step {
            id: StepId(self.planned as u64),
            works: (0..self.batch.sequences).map(work).collect(),
        })
    }

    fn landed(&mut self, _step: StepId, sampled: &[u32]) {
        self.gaps.step(sampled.len() == self.batch.sequences);
    }
}

/// Runs all steps, as far ahead as the group goes.
fn run(group: &mut Group, source: &mut impl Source) -> Result<(), GroupError> {
    let mut flights = VecDeque::new();
    loop {
        let step = source.next();
        let nothing = step.is_none();
        if let Some(step) = step {
            group.launch(&step)?;
            flights.push_back(step.id);
        }
        if flights.len() < group.steps_ahead() && !nothing {
            continue;
        }
        let Some(step) = flights.pop_front() else {
            return Ok(());
        };
        let result = group.finish()?;
        source.landed(step, &result.tokens());
    }
}
