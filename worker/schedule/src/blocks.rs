//! The pool of blocks: every block is free, cached or held, never two at once.
//!
//! Held: some sequence's table names it, and `refs` counts the tables. Cached: nobody holds it, but its prefix is
//! findable; the least recently released goes first when memory is needed. Free: nothing of worth is in it.
//! A block becomes findable only through `store`, which the scheduler calls once its keys and values are computed.
//!
//! Keys are 64-bit hashes, so a find also compares the block's tokens and its parent's identity: two prompts whose
//! keys collide never read each other's keys and values.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{BlockId, KvDelta};

/// One block's content, once findable; never used twice, so a child can say which parent it was computed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node(u64);

/// What a block was computed after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    /// The empty prefix under this root key.
    Root(u64),
    /// The block with this content.
    Block(Node),
}

/// Why a block is findable.
#[derive(Clone, Copy, Debug)]
struct Name {
    key: u64,
    parent: Parent,
    node: Node,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Tables that name it.
    refs: u32,
    /// Its place in `lru` while cached.
    stamp: u64,
    name: Option<Name>,
}

/// The pool; see the head of this file.
#[derive(Debug)]
pub(crate) struct Blocks {
    block_tokens: usize,
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Cached blocks by the time of their release.
    lru: BTreeMap<u64, BlockId>,
    /// Findable blocks, cached or held, by key.
    index: BTreeMap<u64, BlockId>,
    /// Tokens of every named block, `block_tokens` a block; one allocation for the life of the pool.
    tokens: Vec<u32>,
    n_held: u32,
    /// Blocks that admitted sequences will still take for their prompts.
    n_promised: u32,
    next_stamp: u64,
    next_node: u64,
    stored: BTreeSet<u64>,
    removed: BTreeSet<u64>,
}

impl Blocks {
    pub(crate) fn new(n_blocks: u32, block_tokens: usize, prefix_cache: bool) -> Self {
        let n = n_blocks as usize;
        Self {
            block_tokens,
            blocks: vec![Block::default(); n],
            free: (0..n_blocks).rev().map(BlockId).collect(),
            lru: BTreeMap::new(),
            index: BTreeMap::new(),
            tokens: if prefix_cache {
                vec![0; n * block_tokens]
            } else {
                Vec::new()
            },
            n_held: 0,
            n_promised: 0,
            next_stamp: 0,
            next_node: 0,
            stored: BTreeSet::new(),
            removed: BTreeSet::new(),
        }
    }

    /// Blocks that could be taken now and are promised to nobody.
    pub(crate) fn n_available(&self) -> u32 {
        self.n_free() + self.n_cached() - self.n_promised
    }

    pub(crate) fn n_free(&self) -> u32 {
        to_u32(self.free.len())
    }

    pub(crate) fn n_cached(&self) -> u32 {
        to_u32(self.lru.len())
    }

    pub(crate) fn n_held(&self) -> u32 {
        self.n_held
    }

    pub(crate) fn n_total(&self) -> u32 {
        to_u32(self.blocks.len())
    }

    pub(crate) fn n_promised(&self) -> u32 {
        self.n_promised
    }

    /// Sets blocks aside without choosing them, so that cached prefixes live until the memory is really needed.
    pub(crate) fn promise(&mut self, n: u32) {
        assert!(
            n <= self.n_available(),
            "{n} blocks promised, {} available",
            self.n_available()
        );
        self.n_promised += n;
    }

    pub(crate) fn unpromise(&mut self, n: u32) {
        assert!(
            n <= self.n_promised,
            "{n} blocks returned, {} promised",
            self.n_promised
        );
        self.n_promised -= n;
    }

    /// Hands out an available block with one reference, forgetting the oldest cached prefix if none is free.
    pub(crate) fn take(&mut self) -> BlockId {
        assert!(
            self.n_available() > 0,
            "a block was taken though none is available"
        );
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let (_, id) = self.lru.pop_first().expect("available blocks are free or cached");
                self.unname(id);
                id
            }
        };
        self.blocks[id.0 as usize].refs = 1;
        self.n_held += 1;
        id
    }

    /// One more table names this held or cached block.
    pub(crate) fn share(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.refs == 0 {
            assert!(block.name.is_some(), "a free block was shared");
            self.lru
                .remove(&block.stamp)
                .expect("a named block without references is cached");
            self.n_held += 1;
        }
        block.refs += 1;
    }

    /// One table fewer names this block. Release a table's tail first: prefixes then outlive what follows them.
    pub(crate) fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        block.refs = block
            .refs
            .checked_sub(1)
            .expect("every release follows a take or a share");
        if block.refs > 0 {
            return;
        }
        self.n_held -= 1;
        if block.name.is_some() {
            block.stamp = self.next_stamp;
            self.next_stamp += 1;
            self.lru.insert(block.stamp, id);
        } else {
            self.free.push(id);
        }
    }

    /// Whether nobody holds it, so that sharing it costs an available block.
    pub(crate) fn is_cached(&self, id: BlockId) -> bool {
        let block = &self.blocks[id.0 as usize];
        block.refs == 0 && block.name.is_some()
    }

    /// The block that holds exactly these tokens after exactly this parent.
    pub(crate) fn find(&self, parent: Parent, key: u64, tokens: &[u32]) -> Option<(BlockId, Node)> {
        let id = *self.index.get(&key)?;
        let name = self.blocks[id.0 as usize]
            .name
            .expect("indexed blocks have names");
        (name.parent == parent && self.tokens_of(id) == tokens).then_some((id, name.node))
    }

    /// Makes a held, computed block findable, and returns the identity that its children name as their parent.
    ///
    /// If the same content is findable already, that one stays and this block stays nameless. If the key names other
    /// content (its parent was computed anew, or the hashes collide), the newer one takes its place.
    pub(crate) fn store(&mut self, id: BlockId, parent: Parent, key: u64, tokens: &[u32]) -> Node {
        if let Some((_, node)) = self.find(parent, key, tokens) {
            return node;
        }
        if let Some(&old) = self.index.get(&key) {
            if self.is_cached(old) {
                self.lru.remove(&self.blocks[old.0 as usize].stamp);
                self.free.push(old);
            }
            self.unname(old);
        }
        let node = Node(self.next_node);
        self.next_node += 1;
        let block = &mut self.blocks[id.0 as usize];
        assert!(
            block.refs > 0 && block.name.is_none(),
            "block {} was stored twice or by nobody",
            id.0
        );
        block.name = Some(Name { key, parent, node });
        let at = id.0 as usize * self.block_tokens;
        self.tokens[at..at + self.block_tokens].copy_from_slice(tokens);
        self.index.insert(key, id);
        if !self.removed.remove(&key) {
            self.stored.insert(key);
        }
        node
    }

    /// Keys that came and went since the last call, net, in ascending order.
    pub(crate) fn take_delta(&mut self) -> KvDelta {
        KvDelta {
            stored: std::mem::take(&mut self.stored).into_iter().collect(),
            removed: std::mem::take(&mut self.removed).into_iter().collect(),
        }
    }

    /// Every findable key, in ascending order.
    pub(crate) fn keys(&self) -> Vec<u64> {
        self.index.keys().copied().collect()
    }

    /// Every block is free, cached or held, and promises can be kept. Constant time, for after every call.
    pub(crate) fn assert_counts(&self) {
        assert_eq!(
            self.n_free() + self.n_cached() + self.n_held,
            self.n_total(),
            "blocks went missing"
        );
        assert!(
            self.n_promised <= self.n_free() + self.n_cached(),
            "more blocks promised than could be taken"
        );
    }

    /// Recounts every block against `refs`, the references that tables hold, one a block.
    pub(crate) fn audit(&self, refs: &[u32]) {
        self.assert_counts();
        let mut n_named = 0;
        for (at, block) in self.blocks.iter().enumerate() {
            let id = BlockId(to_u32(at));
            assert_eq!(block.refs, refs[at], "references of block {at}");
            let cached = block.refs == 0 && block.name.is_some();
            assert_eq!(
                cached,
                self.lru.get(&block.stamp) == Some(&id),
                "block {at} is cached exactly if evictable"
            );
            if let Some(name) = block.name {
                assert_eq!(
                    self.index.get(&name.key),
                    Some(&id),
                    "the key of block {at} finds it"
                );
                n_named += 1;
            }
        }
        assert_eq!(n_named, self.index.len(), "every findable key names a block");
        let mut free = self.free.clone();
        free.sort_unstable();
        let expected: Vec<BlockId> = (0..self.n_total())
            .map(BlockId)
            .filter(|id| self.blocks[id.0 as usize].refs == 0 && self.blocks[id.0 as usize].name.is_none())
            .collect();
        assert_eq!(
            free, expected,
            "free blocks are those without references and name"
        );
    }

    fn tokens_of(&self, id: BlockId) -> &[u32] {
        let at = id.0 as usize * self.block_tokens;
        &self.tokens[at..at + self.block_tokens]
    }

    fn unname(&mut self, id: BlockId) {
        let name = self.blocks[id.0 as usize]
            .name
            .take()
            .expect("only named blocks lose their name");
        self.index.remove(&name.key);
        if !self.stored.remove(&name.key) {
            self.removed.insert(name.key);
        }
    }
}

/// Counts in the pool began as a `u32`.
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).expect("the pool has at most u32::MAX blocks")
}
