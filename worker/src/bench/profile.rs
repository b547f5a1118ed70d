//! Where the time of a step goes: steps of single rows, of a prompt, and of both together, operation by operation.

use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};

use super::{BLOCK_TOKENS, Bench, BenchError, Cells, Line, report::Mix};
use crate::sampling::SamplingParams;

/// The last of these runs counts: the first ones find cold caches and kernels that were never launched.
const RUNS: usize = 3;

fn blocks(first: usize, tokens: usize) -> Vec<BlockId> {
    (first..first + tokens.div_ceil(BLOCK_TOKENS))
        .map(|block| BlockId(block as u32))
        .collect()
}

impl Mix {
    fn works(self, vocab: u32) -> Vec<Work> {
        let work = |n: usize, start: usize, tokens: Vec<u32>, first: usize| Work {
            seq: SeqId(n as u64),
            slot: Slot(n as u32),
            start: start as u32,
            blocks: blocks(first, start + tokens.len()),
            input: Input::Tokens(tokens),
            sample: Some(0),
            prompt_logprobs: false,
        };
        let each = blocks(0, self.context + 1).len();
        let single = (0..self.batch).map(|n| work(n, self.context, vec![n as u32 % vocab], n * each));
        let prompt = (self.prefill_tokens > 0).then(|| {
            let tokens = (0..self.prefill_tokens as u32).map(|i| i % vocab).collect();
            // Behind the others: a GPU's pool has room for it.
            work(self.batch, 0, tokens, self.batch * each)
        });
        single.chain(prompt).collect()
    }
}

impl Bench<'_> {
    /// Every batch, every prompt, and every prompt beside the largest batch.
    pub(super) fn profile(&mut self, cells: &Cells) -> Result<(), BenchError> {
        let decode = cells.decode.iter().map(|cell| Mix {
            batch: cell.sequences,
            context: cell.prompt,
            prefill_tokens: 0,
        });
        let decode: Vec<Mix> = decode.collect();
        let largest = decode
            .iter()
            .copied()
            .max_by_key(|mix| mix.batch)
            .unwrap_or_default();
        let prefill = cells.first_token.iter().map(|cell| Mix {
            prefill_tokens: cell.prompt,
            ..Mix::default()
        });
        // The batch gives up a slot, and its place in the budget, to the prompt.
        let mixed = cells.first_token.iter().map(|cell| Mix {
            batch: largest.batch.saturating_sub(1),
            prefill_tokens: cell.prompt.saturating_sub(largest.batch).max(1),
            ..largest
        });
        for mix in decode.iter().copied().chain(prefill).chain(mixed) {
            self.profile_step(mix)?;
        }
        Ok(())
    }

    fn profile_step(&mut self, mix: Mix) -> Result<(), BenchError> {
        let works = mix.works(self.vocab as u32);
        for work in &works {
            self.group
                .admit(work.seq, SamplingParams::greedy(), vec![0].into());
        }
        let mut step = Step { id: StepId(0), works };
        let mut times = Vec::new();
        for _ in 0..RUNS {
            self.runs += 1;
            step.id = StepId(self.runs);
            times = self.group.run(&step)?.op_times;
        }
        step.works.iter().for_each(|work| self.group.retire(work.seq));
        let whole: f64 = times.iter().map(|time| time.seconds).sum();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        let rates = self.ceilings.rates(1); // Of the one rank whose times these are.
        for time in &times {
            self.report.add(Line::Operation {
                step: mix,
                operation: time.op.clone(),
                calls: time.calls,
                ms: time.seconds * 1e3,
                share_of_step: time.seconds / whole,
                gb: time.bytes / 1e9,
                gflop: time.flops / 1e9,
                fraction: (time.bytes / rates.bytes_per_s).max(time.flops / rates.flops_per_s) / time.seconds,
            });
        }
        Ok(())
    }
}
