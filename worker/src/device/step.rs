//! A step as a device wants it: flat arrays over rows, built once for all ranks from the scheduler's works.
//!
//! Building checks everything that a kernel would otherwise have to trust: ids within the vocabulary, positions within
//! the model's length, blocks within the pool, no block written by two works.

use std::{
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use swallow_schedule::{Input, SeqId, Step, StepId, Work};

use crate::sampling::{Sampler, TokenScore};

/// The bounds that a step must keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Tokens in one block.
    pub block_tokens: usize,
    /// Blocks in the pool.
    pub n_blocks: usize,
    /// Slots, and works in one step.
    pub max_running: usize,
    /// Rows in one step.
    pub max_rows: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Tokens there are.
    pub n_vocab: usize,
}

/// Where a row's token id comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowToken {
    /// Known when the step was planned.
    Known(u32),
    /// What the device sampled last for this slot.
    LastOf(u32),
}

/// The rows of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkMeta {
    /// Its rows.
    pub rows: Range<usize>,
    /// Position of the first row in the sequence.
    pub start: usize,
    /// Its blocks, a range of the step's block table.
    pub blocks: Range<usize>,
}

/// What a row's logits are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadUse {
    /// Choose generated token `index`, which stands at the position after the row's, and keep it for `slot`.
    Sample {
        /// Counts generated tokens.
        index: u32,
        /// Where the token is kept for the next step.
        slot: u32,
    },
    /// Score the prompt token at the position after the row's.
    Score,
}

/// One row whose logits are wanted.
#[derive(Clone, Debug)]
pub struct HeadAsk {
    /// The row.
    pub row: usize,
    /// Its position in the sequence.
    pub position: u32,
    /// Whose.
    pub seq: SeqId,
    /// The sequence's sampler; the one rank that answers locks it.
    pub sampler: Arc<Mutex<Sampler>>,
    /// For what.
    pub what: HeadUse,
}

/// The answer to one ask.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadOut {
    /// Index among the step's asks.
    pub ask: usize,
    /// The sampled, or scored, token.
    pub token: u32,
    /// If log-probabilities were asked for.
    pub score: Option<TokenScore>,
}

/// What a rank computed in a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Landed {
    /// Its answers: each ask is answered by exactly one rank.
    pub outs: Vec<HeadOut>,
    /// A hash over the residual stream; equal on all ranks of a group, or one of them is wrong.
    pub fingerprint: u64,
    /// It ran from a recording.
    pub replayed: bool,
    /// Time that the rank spent meeting the others, waiting for them included; `None` alone, or where nobody looks.
    pub exchanged: Option<Duration>,
    /// Where its time went, of a device that was told to look.
    pub op_times: Vec<OpTime>,
}

/// The time that one kind of operation took in a step, on one rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpTime {
    /// Its name.
    pub op: String,
    /// How often.
    pub calls: usize,
    /// All calls together.
    pub seconds: f64,
    /// Bytes that had to be read and written, each once.
    pub bytes: f64,
    /// Floating-point operations that had to be done.
    pub flops: f64,
}

/// A step that does not fit the device. The scheduler keeps these bounds; this is a defect of the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step {step} cannot run: {what}")]
pub struct BadStep {
    /// Its number.
    pub step: u64,
    /// The violated bound.
    pub what: String,
}

/// A whole step, flat.
#[derive(Clone, Debug)]
pub struct StepMeta {
    /// Its number; 0 is the warm-up.
    pub id: StepId,
    /// One a row.
    pub tokens: Vec<RowToken>,
    /// Position in its sequence, one a row.
    pub positions: Vec<u32>,
    /// Where keys and values go: block times block_tokens plus offset, one a row, all different.
    pub kv_places: Vec<u32>,
    /// Index into `works`, one a row.
    pub row_works: Vec<u32>,
    /// The sequences.
    pub works: Vec<WorkMeta>,
    /// Blocks of all works, one after the other.
    pub block_table: Vec<u32>,
    /// Rows whose logits are wanted: in order of works, scores before the sample.
    pub asks: Vec<HeadAsk>,
}

impl StepMeta {
    /// Flattens `step`. `sampler_of` finds a sequence's sampler.
    ///
    /// # Errors
    /// If the step breaks a bound of `shape`, or a sequence that needs a sampler has none.
    pub fn build(
        step: &Step,
        shape: &StepShape,
        sampler_of: impl Fn(SeqId) -> Option<Arc<Mutex<Sampler>>>,
    ) -> Result<StepMeta, BadStep> {
        let bad = |what: String| BadStep {
            step: step.id.0,
            what,
        };
        let mut meta = StepMeta::empty(step.id);
        if step.works.is_empty() || step.works.len() > shape.max_running {
            return Err(bad(format!(
                "{} works, not 1 to {}",
                step.works.len(),
                shape.max_running
            )));
        }
        for work in &step.works {
            check(work, shape).map_err(|what| bad(format!("sequence {}: {what}", work.seq.0)))?;
            meta.push(work, shape);
            if work.sample.is_some() || work.prompt_logprobs {
                let sampler = sampler_of(work.seq)
                    .ok_or_else(|| bad(format!("sequence {} was not admitted", work.seq.0)))?;
                meta.ask(work, &sampler);
            }
        }
        if meta.n_rows() > shape.max_rows {
            return Err(bad(format!(
                "{} rows, more than {}",
                meta.n_rows(),
                shape.max_rows
            )));
        }
        meta.check_written(shape).map_err(bad)?;
        Ok(meta)
    }

    /// A step without rows.
    pub fn empty(id: StepId) -> StepMeta {
        StepMeta {
            id,
            tokens: Vec::new(),
            positions: Vec::new(),
            kv_places: Vec::new(),
            row_works: Vec::new(),
            works: Vec::new(),
            block_table: Vec::new(),
            asks: Vec::new(),
        }
    }

    /// Rows of the step.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    fn push(&mut self, work: &Work, shape: &StepShape) {
        let (first_row, n_rows) = (self.n_rows(), work.rows() as usize);
        let first_block = self.block_table.len();
        match &work.input {
            Input::Tokens(ids) => self.tokens.extend(ids.iter().map(|&id| RowToken::Known(id))),
            Input::LastSampled => self.tokens.push(RowToken::LastOf(work.slot.0)),
        }
        for position in work.start as usize..work.start as usize + n_rows {
            let block = work.blocks[position / shape.block_tokens].0 as usize;
            self.positions.push(position as u32);
            self.kv_places
                .push((block * shape.block_tokens + position % shape.block_tokens) as u32);
        }
        self.row_works
            .extend(std::iter::repeat_n(self.works.len() as u32, n_rows));
        self.block_table.extend(work.blocks.iter().map(|b| b.0));
        self.works.push(WorkMeta {
            rows: first_row..first_row + n_rows,
            start: work.start as usize,
            blocks: first_block..self.block_table.len(),
        });
    }

    fn ask(&mut self, work: &Work, sampler: &Arc<Mutex<Sampler>>) {
        let rows = self.works[self.works.len() - 1].rows.clone();
        let n_prompt = sampler
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .prompt()
            .len() as u32;
        let mut push = |row: usize, what| {
            let position = self.positions[row];
            self.asks.push(HeadAsk {
                row,
                position,
                seq: work.seq,
                sampler: sampler.clone(),
                what,
            });
        };
        if work.prompt_logprobs {
            let n_scored = n_prompt.saturating_sub(work.start + 1).min(rows.len() as u32) as usize;
            for row in rows.start..rows.start + n_scored {
                push(row, HeadUse::Score);
            }
        }
        if let Some(index) = work.sample {
            push(
                rows.end - 1,
                HeadUse::Sample {
                    index,
                    slot: work.slot.0,
                },
            );
        }
    }

    /// Works may read the same blocks; they must not write the same.
    fn check_written(&self, shape: &StepShape) -> Result<(), String> {
        let mut written: Vec<u32> = Vec::new();
        for work in &self.works {
            let end = work.start + work.rows.len();
            let blocks = work.start / shape.block_tokens..end.div_ceil(shape.block_tokens);
            written.extend(&self.block_table[work.blocks.clone()][blocks]);
        }
        written.sort_unstable();
        match written.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("block {} is written twice", pair[0])),
            None => Ok(()),
        }
    }
}

fn check(work: &Work, shape: &StepShape) -> Result<(), String> {
    let end = work.start as usize + work.rows() as usize;
    if work.rows() == 0 {
        return Err("no rows".into());
    }
    if end > shape.max_model_len {
        return Err(format!(
            "position {} is beyond the model's {}",
            end - 1,
            shape.max_model_len
        ));
    }
    if work.blocks.len() != end.div_ceil(shape.block_tokens) {
        return Err(format!("{} blocks for {end} tokens", work.blocks.len()));
    }
    if let Some(block) = work.blocks.iter().find(|b| b.0 as usize >= shape.n_blocks) {
        return Err(format!("block {} is not one of {}", block.0, shape.n_blocks));
    }
    if work.slot.0 as usize >= shape.max_running {
        return Err(format!(
            "slot {} is not one of {}",
            work.slot.0, shape.max_running
        ));
    }
    if let Input::Tokens(ids) = &work.input
        && let Some(id) = ids.iter().find(|&&id| id as usize >= shape.n_vocab)
    {
        return Err(format!("token {id} is not one of {}", shape.n_vocab));
    }
    Ok(())
}
