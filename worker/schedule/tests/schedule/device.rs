//! A device of nothing but memory: each row writes what a real one's keys and values would depend on, the token and
//! everything before it, and each work reads its whole sequence back through its block table.
//!
//! What it reads must be the sequence, exactly. That alone shows that block tables, prefix hits, preemption and lag
//! are right: a stale, shared or lost block reads as something else. The next token is a function of what was read, so
//! a wrong read would also change the text.

use std::collections::BTreeMap;

use swallow_schedule::{Ask, BlockId, Input, Limits, Micros, SeqId, Slot, Step, Work};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What one row leaves in memory: the token, its position, and a hash of the context it was computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    position: u32,
    token: u32,
    context: u64,
}

pub struct Device {
    block_tokens: usize,
    /// Tokens are drawn from `0..vocab`.
    vocab: u32,
    memory: Vec<Vec<Option<Row>>>,
    last_sampled: BTreeMap<Slot, u32>,
}

impl Device {
    pub fn new(limits: &Limits, vocab: u32) -> Self {
        let block_tokens = limits.block_tokens as usize;
        Self {
            block_tokens,
            vocab,
            memory: vec![vec![None; block_tokens]; limits.n_blocks as usize],
            last_sampled: BTreeMap::new(),
        }
    }

    /// Runs a step: the sampled ids. `truth` gives a sequence's root key and its tokens as they should be, far enough.
    pub fn run<'a>(&mut self, step: &Step, truth: impl Fn(SeqId) -> (u64, &'a [u32])) -> Vec<u32> {
        self.assert_writes_are_private(step);
        step.works
            .iter()
            .filter_map(|work| self.run_work(work, truth(work.seq)))
            .collect()
    }

    fn run_work(&mut self, work: &Work, (root, truth): (u64, &[u32])) -> Option<u32> {
        let ids = match &work.input {
            Input::Tokens(ids) => ids.clone(),
            Input::LastSampled => vec![*self.last_sampled.get(&work.slot).expect("the slot has sampled")],
        };
        let end = work.start as usize + ids.len();
        assert!(
            !ids.is_empty() && work.blocks.len() == end.div_ceil(self.block_tokens),
            "{work:?}"
        );
        let mut context = root;
        for position in 0..end {
            let BlockId(block) = work.blocks[position / self.block_tokens];
            let cell = &mut self.memory[block as usize][position % self.block_tokens];
            if position >= work.start as usize {
                let token = ids[position - work.start as usize];
                context = chain(context, token);
                *cell = Some(Row {
                    position: position as u32,
                    token,
                    context,
                });
            } else {
                context = chain(context, truth[position]);
            }
            let expected = Row {
                position: position as u32,
                token: truth[position],
                context,
            };
            assert_eq!(*cell, Some(expected), "position {position} of {work:?}");
        }
        work.sample?;
        let token = draw(context, self.vocab);
        self.last_sampled.insert(work.slot, token);
        Some(token)
    }

    /// No work writes into a block that another work of the same step reads or writes.
    fn assert_writes_are_private(&self, step: &Step) {
        let mut writer = BTreeMap::new();
        for work in &step.works {
            for &block in &work.blocks[work.start as usize / self.block_tokens..] {
                assert_eq!(
                    writer.insert(block, work.seq),
                    None,
                    "two sequences write {block:?}"
                );
            }
        }
        for work in &step.works {
            for block in &work.blocks[..work.start as usize / self.block_tokens] {
                assert_eq!(
                    writer.get(block),
                    None,
                    "{block:?} is read and written in one step"
                );
            }
        }
    }
}

fn chain(context: u64, token: u32) -> u64 {
    xxh3_64_with_seed(&token.to_le_bytes(), context)
}

fn draw(context: u64, vocab: u32) -> u32 {
    u32::try_from(context % u64::from(vocab)).expect("below the vocabulary's size")
}

/// Prompt and output of a sequence that nothing disturbs, as far as `max_tokens` and the stop rule go.
pub fn undisturbed(ask: &Ask, vocab: u32) -> Vec<u32> {
    let mut tokens = ask.prompt.to_vec();
    let mut context = tokens
        .iter()
        .fold(ask.root_key, |context, &token| chain(context, token));
    for n in 1..=ask.max_tokens {
        let token = draw(context, vocab);
        context = chain(context, token);
        tokens.push(token);
        if n >= ask.min_tokens && ask.stop_ids.contains(&token) {
            break;
        }
    }
    tokens
}

/// As many further tokens as a lag could sample beyond the end.
pub fn with_surplus(ask: &Ask, vocab: u32) -> Vec<u32> {
    let unstoppable = Ask {
        stop_ids: [].into(),
        max_tokens: ask.max_tokens + 4,
        ..ask.clone()
    };
    undisturbed(&unstoppable, vocab)
}

pub fn key_of(parent: u64, block: &[u32]) -> u64 {
    block.iter().fold(parent ^ 0x5157_414c, |key, token| {
        xxh3_64_with_seed(&token.to_le_bytes(), key)
    })
}

/// Few keys for many blocks, as if an attacker had found how to make them collide.
pub fn colliding_key_of(parent: u64, block: &[u32]) -> u64 {
    key_of(parent, block) % 13
}

/// Room for small worlds; tests change what they are about.
pub fn limits() -> Limits {
    Limits {
        block_tokens: 4,
        n_blocks: 64,
        max_running: 8,
        max_step_tokens: 32,
        max_model_len: 256,
        max_waiting: 64,
        prefix_cache: true,
        key_of,
    }
}

/// An ask without anything special.
pub fn ask(id: u64, prompt: &[u32], max_tokens: u32) -> Ask {
    Ask {
        id: SeqId(id),
        prompt: prompt.into(),
        max_tokens,
        min_tokens: 0,
        stop_ids: [].into(),
        root_key: 7,
        prompt_logprobs: false,
        prompt_logprobs_from: 0,
        deadline: None,
    }
}

/// When nothing depends on time.
pub const NOW: Micros = Micros(0);
