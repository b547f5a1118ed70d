//! Decoding, as a server does it: a scheduler plans, the group runs a step ahead, and what counts is the time between
//! the steps in which every sequence gets a token, taken where their ids leave the scheduler.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use swallow_proto::prefix;
use swallow_schedule::{Ask, Limits, Micros, Output, Scheduler, SeqId};

use super::{BLOCK_TOKENS, BenchError};
use crate::{
    group::{Group, GroupError, StepResult},
    sampling::SamplingParams,
};

/// Sequences that decode together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    /// How many.
    pub(super) sequences: usize,
    /// Tokens of each prompt.
    pub(super) prompt: usize,
    /// Tokens that each generates.
    pub(super) outputs: usize,
    /// Rows of the largest step.
    pub(super) max_step_tokens: usize,
    /// Tokens there are.
    pub(super) vocab: usize,
}

impl Batch {
    /// Blocks that all of it needs.
    pub(super) fn blocks(&self) -> usize {
        self.sequences * (self.prompt + self.outputs).div_ceil(BLOCK_TOKENS)
    }

    fn limits(&self) -> Limits {
        let number = |n: usize| u32::try_from(n).expect("the flags are checked");
        Limits {
            block_tokens: number(BLOCK_TOKENS),
            n_blocks: number(self.blocks()),
            max_running: number(self.sequences),
            max_step_tokens: number(self.max_step_tokens),
            max_model_len: number(self.prompt + self.outputs),
            max_waiting: number(self.sequences),
            prefix_cache: false,
            key_of: prefix::next,
        }
    }

    /// Pseudo-random ids; every sequence has its own.
    fn prompt_of(&self, sequence: usize, salt: u64) -> Arc<[u32]> {
        let id = |i: usize| {
            let place = salt << 40 | (sequence * self.prompt + i) as u64;
            ((place.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) % self.vocab as u64) as u32
        };
        (0..self.prompt).map(id).collect()
    }
}

/// What was measured.
pub(super) struct Measured {
    /// Median time between consecutive steps in which every sequence got a token.
    pub(super) step: Duration,
    /// Steps that were measured.
    pub(super) steps: usize,
}

/// Submits all prompts at once and runs until every sequence has its tokens.
pub(super) fn measure(
    group: &mut Group,
    batch: Batch,
    params: &SamplingParams,
    salt: u64,
) -> Result<Measured, BenchError> {
    let mut scheduler = Scheduler::new(batch.limits());
    for sequence in 0..batch.sequences {
        let (id, prompt) = (SeqId(sequence as u64), batch.prompt_of(sequence, salt));
        let params = SamplingParams {
            seed: sequence as u64,
            ..params.clone()
        };
        group.admit(id, params, Arc::clone(&prompt));
        let ask = Ask {
            id,
            prompt,
            max_tokens: u32::try_from(batch.outputs).expect("the flags are checked"),
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
    let mut gaps = Vec::new();
    let mut last: Option<Instant> = None;
    run(group, &mut scheduler, |outputs| {
        let tokens = outputs
            .iter()
            .filter(|output| matches!(output, Output::Token { .. }));
        let whole = tokens.count() == batch.sequences;
        let now = Instant::now();
        if let (Some(last), true) = (last, whole) {
            gaps.push(now.saturating_duration_since(last));
        }
        last = whole.then_some(now);
    })?;
    (0..batch.sequences).for_each(|sequence| group.retire(SeqId(sequence as u64)));
    gaps.sort_unstable();
    let step = gaps.get(gaps.len() / 2).copied().ok_or_else(|| {
        BenchError::Flag("no two consecutive steps had all sequences in them; raise --output-tokens".into())
    })?;
    Ok(Measured {
        step,
        steps: gaps.len(),
    })
}

/// Runs a scheduler until it is idle, as far ahead as the group goes; `told` sees what each commit brought out.
fn run(
    group: &mut Group,
    scheduler: &mut Scheduler,
    mut told: impl FnMut(&[Output]),
) -> Result<(), GroupError> {
    let mut flights = VecDeque::new();
    loop {
        let step = scheduler.step(Micros(0));
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
        let result: StepResult = group.finish()?;
        scheduler.commit(step, &result.tokens());
        told(&scheduler.take_outputs());
    }
}
