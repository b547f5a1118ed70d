//! One sequence: its tokens, the blocks that hold their keys and values, and how far it got.
//!
//! Three positions only grow until a preemption: `computed <= planned <= len`. Rows below `computed` are in memory,
//! rows from there to `planned` are in flight, and the last token of `len` may be sampled but not seen yet.

use crate::blocks::{Blocks, Node, Parent};
use crate::types::{Ask, BlockId, KeyOf, Slot};

/// Arrival number: smaller came first. Memory goes to the smallest first, and the largest is preempted first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arrival(pub(crate) u64);

/// Index into the table of sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Index(pub(crate) usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Holds nothing.
    Waiting,
    /// Holds nothing, and does not wait either: its window is full.
    Parked,
    /// Holds a slot and blocks.
    Running(Slot),
    /// Finished, but a step in flight still writes to its blocks and slot.
    Lingering(Slot),
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) ask: Ask,
    pub(crate) arrival: Arrival,
    pub(crate) state: State,
    /// Prompt, then the generated tokens that the host has seen.
    pub(crate) tokens: Vec<u32>,
    /// Blocks of positions `0..planned`, in order.
    pub(crate) table: Vec<BlockId>,
    /// Blocks set aside for the known tokens that are not planned yet.
    pub(crate) promised: u32,
    /// Rows handed to the device.
    pub(crate) planned: usize,
    /// Rows whose step is committed.
    pub(crate) computed: usize,
    /// Tokens sampled in steps in flight.
    pub(crate) unseen: usize,
    /// Steps in flight with rows of this sequence.
    pub(crate) flights: u32,
    /// Prompt rows whose log-probabilities were delivered; a replay does not ask for them again.
    pub(crate) scored: usize,
    /// A row of it has run.
    pub(crate) started: bool,
    /// It generates no more tokens than these before whoever reads them says so; at least 1.
    pub(crate) window: u32,
    /// It gets no row while a token of it is unseen.
    pub(crate) in_step: bool,
    /// When its last work was planned, counting works; 0 for never. The smallest goes first when rows are short.
    pub(crate) last_turn: u64,
    /// Chain of block keys, computed as far as they were needed.
    keys: Vec<u64>,
    /// Content of `table`'s blocks, as far as it is computed.
    nodes: Vec<Node>,
}

impl Sequence {
    pub(crate) fn new(ask: Ask, arrival: Arrival) -> Self {
        // The row before a position predicts it; rows that nobody asks for count as delivered.
        let scored = (ask.prompt_logprobs_from as usize).saturating_sub(1);
        Self {
            tokens: ask.prompt.to_vec(),
            ask,
            arrival,
            state: State::Waiting,
            table: Vec::new(),
            promised: 0,
            planned: 0,
            computed: 0,
            unseen: 0,
            flights: 0,
            scored,
            started: false,
            window: u32::MAX,
            in_step: false,
            last_turn: 0,
            keys: Vec::new(),
            nodes: Vec::new(),
        }
    }

    pub(crate) fn n_prompt(&self) -> usize {
        self.ask.prompt.len()
    }

    pub(crate) fn n_generated(&self) -> usize {
        self.tokens.len() - self.n_prompt()
    }

    /// Rows that will be computed if nothing ends it early: the last token is never fed.
    pub(crate) fn n_final_rows(ask: &Ask) -> usize {
        ask.prompt.len() + (ask.max_tokens as usize).saturating_sub(1)
    }

    /// Rows that could be planned now. One is a decode row (or the end of a prefill), more are prefill.
    pub(crate) fn n_ready(&self) -> usize {
        if self.in_step && self.unseen > 0 {
            return 0;
        }
        // The row of token `n` samples token `n + 1`.
        let n_open_rows = self.n_prompt() + self.window as usize - 1;
        let n_rows = Self::n_final_rows(&self.ask).min(n_open_rows);
        (self.tokens.len() + self.unseen).min(n_rows) - self.planned
    }

    /// All that its window lets it generate is there.
    pub(crate) fn is_full(&self) -> bool {
        self.n_generated() >= self.window as usize
    }

    /// Rows that a work may have from here, so that one flag says whether log-probabilities are wanted.
    pub(crate) fn n_chunk_max(&self) -> usize {
        if self.lacks_prompt_logprobs() && self.planned < self.scored {
            self.n_ready().min(self.scored - self.planned)
        } else {
            self.n_ready()
        }
    }

    fn lacks_prompt_logprobs(&self) -> bool {
        self.ask.prompt_logprobs && self.scored + 1 < self.n_prompt()
    }

    /// Whether rows from `start` must deliver log-probabilities of prompt tokens.
    pub(crate) fn wants_prompt_logprobs(&self, start: usize) -> bool {
        self.ask.prompt_logprobs && start >= self.scored && start + 1 < self.n_prompt()
    }

    /// Leading blocks that may come from the cache: the last known token's logits are always needed, and so are
    /// prompt log-probabilities that were not delivered yet.
    fn n_matchable(&self, block_tokens: usize) -> usize {
        let last = self.tokens.len() - 1;
        let limit = if self.lacks_prompt_logprobs() {
            self.scored.min(last)
        } else {
            last
        };
        limit / block_tokens
    }

    /// Key of the `at`-th block of the known tokens.
    pub(crate) fn key(&mut self, at: usize, key_of: KeyOf, block_tokens: usize) -> u64 {
        while self.keys.len() <= at {
            let parent = self.keys.last().copied().unwrap_or(self.ask.root_key);
            let first = self.keys.len() * block_tokens;
            self.keys
                .push(key_of(parent, &self.tokens[first..first + block_tokens]));
        }
        self.keys[at]
    }

    /// Findable blocks that continue the table, in order.
    pub(crate) fn find_more(
        &mut self,
        blocks: &Blocks,
        key_of: KeyOf,
        block_tokens: usize,
    ) -> Vec<(BlockId, Node)> {
        let mut found = Vec::new();
        let mut parent = self.parent();
        for at in self.nodes.len()..self.n_matchable(block_tokens) {
            let key = self.key(at, key_of, block_tokens);
            let tokens = &self.tokens[at * block_tokens..(at + 1) * block_tokens];
            let Some((id, node)) = blocks.find(parent, key, tokens) else {
                break;
            };
            found.push((id, node));
            parent = Parent::Block(node);
        }
        found
    }

    /// Puts found blocks at the table's end. Only on a block border, with nothing in flight before it.
    pub(crate) fn adopt(&mut self, found: &[(BlockId, Node)], blocks: &mut Blocks, block_tokens: usize) {
        assert!(
            self.is_on_border(block_tokens),
            "only whole computed blocks are followed by cached ones"
        );
        assert_eq!(
            self.table.len(),
            self.nodes.len(),
            "the table ends where the computed blocks end"
        );
        for &(id, node) in found {
            blocks.share(id);
            self.table.push(id);
            self.nodes.push(node);
        }
        self.planned = self.nodes.len() * block_tokens;
        self.computed = self.planned;
    }

    /// Whether the next row opens a block and everything before it is computed.
    pub(crate) fn is_on_border(&self, block_tokens: usize) -> bool {
        self.planned == self.computed && self.nodes.len() * block_tokens == self.planned
    }

    /// Key of the block that the next row belongs to, if another sequence could spare us its computation.
    pub(crate) fn front_key(&mut self, key_of: KeyOf, block_tokens: usize) -> Option<u64> {
        let at = self.planned / block_tokens;
        (at < self.n_matchable(block_tokens)).then(|| self.key(at, key_of, block_tokens))
    }

    /// Makes every block findable whose last row is computed now.
    pub(crate) fn store_computed(&mut self, blocks: &mut Blocks, key_of: KeyOf, block_tokens: usize) {
        for at in self.nodes.len()..self.computed / block_tokens {
            let parent = self.parent();
            let key = self.key(at, key_of, block_tokens);
            let tokens = &self.tokens[at * block_tokens..(at + 1) * block_tokens];
            self.nodes.push(blocks.store(self.table[at], parent, key, tokens));
        }
    }

    /// Gives everything back and forgets what was computed; tokens stay, to be fed again.
    pub(crate) fn let_go(&mut self, blocks: &mut Blocks) {
        assert_eq!(
            self.flights, 0,
            "blocks are let go only when no step in flight touches them"
        );
        for id in self.table.drain(..).rev() {
            blocks.release(id);
        }
        blocks.unpromise(std::mem::take(&mut self.promised));
        self.nodes.clear();
        self.planned = 0;
        self.computed = 0;
    }

    fn parent(&self) -> Parent {
        self.nodes
            .last()
            .map_or(Parent::Root(self.ask.root_key), |&node| Parent::Block(node))
    }
}
