//! Where the time of a step goes: steps of single rows, of a prompt, and of both together, operation by operation.

use swallow_schedule::{Input, SeqId, Slot, Step, StepId, Work};

use super::{Bench, BenchArgs, BenchError, Line, blocks, print};
use crate::sampling::SamplingParams;

/// The last of these runs counts: the first ones find cold caches and kernels that were never launched.
const RUNS: usize = 3;

/// What a step is made of.
#[derive(Clone, Copy)]
struct Mix {
    batch: usize,
    context: usize,
    prefill: usize,
}

impl Mix {
    fn works(self, vocab: u32) -> Vec<Work> {
        let work = |n: usize, start: usize, tokens: Vec<u32>, first: usize| Work {
            seq: SeqId(n as u64),
            slot: Slot(n as u32),
            start: start as u32,
            blocks: blocks(first, start + tokens.len()),
            input: Input::Tokens(tokens.into()),
            sample: Some(0),
            prompt_logprobs: false,
        };
        let each = blocks(0, self.context + 1).len();
        let single = (0..self.batch).map(|n| work(n, self.context, vec![n as u32 % vocab], n * each));
        let prompt = (self.prefill > 0).then(|| {
            let tokens = (0..self.prefill as u32).map(|i| i % vocab).collect();
            // In the blocks of the first sequence: keys and values mean nothing here.
            work(self.batch, 0, tokens, 0)
        });
        single.chain(prompt).collect()
    }
}

impl Bench<'_> {
    /// Every batch, every prompt, and every prompt beside the largest batch.
    pub(super) fn profile(&mut self, args: &BenchArgs) -> Result<(), BenchError> {
        let mix = |batch, prefill| Mix {
            batch,
            context: args.context,
            prefill,
        };
        let largest = args.batch.iter().copied().max().unwrap_or(0);
        let decode = args.batch.iter().map(|&batch| mix(batch, 0));
        let prefill = args.prefill_tokens.iter().map(|&tokens| mix(0, tokens));
        // The batch gives up a slot, and its place in the budget, to the prompt.
        let room = |tokens: usize| tokens.saturating_sub(largest).max(1);
        let mixed = args
            .prefill_tokens
            .iter()
            .map(|&tokens| mix(largest.saturating_sub(1), room(tokens)));
        for mix in decode.chain(prefill).chain(mixed).collect::<Vec<_>>() {
            self.profile_step(mix)?;
        }
        Ok(())
    }

    fn profile_step(&mut self, mix: Mix) -> Result<(), BenchError> {
        let works = mix.works(self.config.vocab_size as u32);
        for work in &works {
            self.group
                .admit(work.seq, SamplingParams::greedy(), vec![0].into());
        }
        let mut step = Step { id: StepId(0), works };
        let mut times = Vec::new();
        for _ in 0..RUNS {
            self.step += 1;
            step.id = StepId(self.step);
            times = self.group.run(&step)?.op_times;
        }
        step.works.iter().for_each(|work| self.group.retire(work.seq));
        let whole: f64 = times.iter().map(|time| time.seconds).sum();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let (bandwidth, flops) = (self.ceilings.bandwidth(), self.ceilings.flops());
        for time in &times {
            print(&Line::Operation {
                batch: mix.batch,
                context: mix.context,
                prefill_tokens: mix.prefill,
                operation: &time.op,
                calls: time.calls,
                ms: time.seconds * 1e3,
                share_of_step: time.seconds / whole,
                gb: time.bytes / 1e9,
                gflop: time.flops / 1e9,
                fraction: (time.bytes / bandwidth).max(time.flops / flops) / time.seconds,
            });
        }
        Ok(())
    }
}
