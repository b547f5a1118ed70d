//! Which cells a row has, and what they need of the group.

use super::{
    BLOCK_TOKENS,
    args::{Measure, Preset, list},
};
use crate::checkpoint::LlamaConfig;

/// The first token of a prompt, alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FirstToken {
    /// Its tokens.
    pub(super) prompt: usize,
    /// Rounds that do not count.
    pub(super) warm_ups: usize,
    /// Rounds that do.
    pub(super) rounds: usize,
}

/// Sequences that decode together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decode {
    /// How many.
    pub(super) sequences: usize,
    /// Tokens of each prompt.
    pub(super) prompt: usize,
    /// Tokens that each generates.
    pub(super) outputs: usize,
    /// How often it is measured.
    pub(super) repetitions: usize,
}

/// All of a row, in the order in which they are measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cells {
    pub(super) first_token: Vec<FirstToken>,
    pub(super) decode: Vec<Decode>,
}

/// Models with more parameters are measured once from so many sequences on: the prompts alone take minutes.
const LARGE_PARAMETERS: u64 = 30_000_000_000;
const LARGE_ONCE_FROM: usize = 64;

impl Cells {
    /// The preset's, with what the flags change. The flags are checked.
    pub(super) fn new(args: &Measure, config: &LlamaConfig) -> Self {
        let preset = args.preset();
        let (prompts, batches): (&[usize], &[usize]) = match preset {
            Preset::Peer => (&[1024, 8192], &[1, 8, 32, 64, 128, 256]),
            Preset::Small => (&[512], &[1, 8, 32]),
        };
        let given = |flag, words| list(flag, words).ok().flatten();
        let prompts = given("prefill-tokens", &args.prefill_tokens).unwrap_or_else(|| prompts.to_vec());
        let batches = given("batch", &args.batch).unwrap_or_else(|| batches.to_vec());
        let (warm_ups, rounds) = match preset {
            Preset::Peer => (2, 10),
            Preset::Small => (1, 3),
        };
        let decode = |&sequences: &usize| {
            let (prompt, outputs, repetitions) = match preset {
                Preset::Peer if sequences == 1 => (128, 256, 3),
                Preset::Peer if sequences >= LARGE_ONCE_FROM && config.n_parameters() > LARGE_PARAMETERS => {
                    (1024, 128, 1)
                }
                Preset::Peer => (1024, 128, 3),
                Preset::Small => (128, 32, 1),
            };
            Decode {
                sequences,
                prompt: args.context.unwrap_or(prompt),
                outputs: args.output_tokens.unwrap_or(outputs),
                repetitions: args.repetitions.unwrap_or(repetitions),
            }
        };
        Self {
            first_token: prompts
                .into_iter()
                .map(|prompt| FirstToken {
                    prompt,
                    warm_ups,
                    rounds,
                })
                .collect(),
            decode: batches.iter().map(decode).collect(),
        }
    }

    /// Sequences and tokens of each, by cell.
    fn extents(&self) -> impl Iterator<Item = (usize, usize)> {
        let first = self.first_token.iter().map(|cell| (1, cell.prompt + 1));
        let decode = self
            .decode
            .iter()
            .map(|cell| (cell.sequences, cell.prompt + cell.outputs));
        first.chain(decode)
    }

    /// Blocks of the largest cell.
    pub(super) fn blocks(&self) -> usize {
        let blocks = |(sequences, tokens): (usize, usize)| sequences * tokens.div_ceil(BLOCK_TOKENS);
        self.extents().map(blocks).max().unwrap_or(1)
    }

    /// Most sequences of a cell.
    pub(super) fn sequences(&self) -> usize {
        self.extents().map(|(sequences, _)| sequences).max().unwrap_or(1)
    }

    /// Tokens of the longest sequence.
    pub(super) fn longest(&self) -> usize {
        self.extents().map(|(_, tokens)| tokens).max().unwrap_or(1)
    }

    /// Rows of the largest step where at most so many are allowed: no more than there are tokens.
    pub(super) fn rows(&self, most: usize) -> usize {
        let tokens = self.extents().map(|(sequences, tokens)| sequences * tokens);
        most.min(tokens.max().unwrap_or(1)).max(self.sequences())
    }
}
