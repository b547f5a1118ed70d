//! Which blocks of tokens a replica has in its cache, as far as is known: two bounded sets of block keys.
//!
//! `known` is what the replica itself told; `predicted` is what this router sent it and has not heard of yet, so that
//! a burst of equal prompts goes to one place before the first of them is computed. A wrong entry costs speed only.
//! Keys are chained hashes: one of them names everything before it, and a replica that holds a block nearly always
//! holds its parents, because blocks are freed from the end. So a match is found by bisection.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

/// Most blocks believed of one replica, whatever it says: 24 MiB or so.
pub const KNOWN_MAX: usize = 1 << 20;
/// Most predictions for one replica: 64 prompts of 16k tokens in blocks of 16.
pub const PREDICTED_MAX: usize = 1 << 16;

/// Leading blocks of a prompt that a replica has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Matched {
    /// It said so.
    pub known: usize,
    /// It has them, or will when it has computed what was sent there; at least `known`.
    pub expected: usize,
}

/// The cache of one replica.
#[derive(Debug)]
pub struct PrefixIndex {
    known: LruSet,
    predicted: LruSet,
}

impl PrefixIndex {
    /// For a replica with a pool of `n_blocks`.
    pub fn new(n_blocks: usize) -> Self {
        Self {
            known: LruSet::new(n_blocks.clamp(1, KNOWN_MAX)),
            predicted: LruSet::new(n_blocks.clamp(1, PREDICTED_MAX)),
        }
    }

    /// How many leading blocks of `keys` it has: 0 if not the first, else some `n` with block `n - 1` there and block
    /// `n` not.
    pub fn matched(&self, keys: &[u64]) -> Matched {
        let match_in = |has: &dyn Fn(u64) -> bool| match keys.first() {
            // Most replicas have nothing of most prompts: one look tells.
            Some(&first) if has(first) => keys.partition_point(|&key| has(key)),
            _ => 0,
        };
        let known = match_in(&|key| self.known.contains(key));
        if self.predicted.is_empty() || known == keys.len() {
            return Matched {
                known,
                expected: known,
            };
        }
        Matched {
            known,
            expected: match_in(&|key| self.has(key)).max(known),
        }
    }

    /// A prompt of these blocks was sent there.
    pub fn predict(&mut self, keys: &[u64]) {
        // Last block first: parents are younger than their children, so that the oldest entry is always a leaf.
        for &key in keys.iter().rev() {
            if !self.known.touch(key) {
                self.predicted.insert(key);
            }
        }
    }

    /// The replica has these now.
    pub fn stored(&mut self, keys: &[u64]) {
        for &key in keys {
            self.predicted.remove(key);
            self.known.insert(key);
        }
    }

    /// The replica dropped these.
    pub fn removed(&mut self, keys: &[u64]) {
        for &key in keys {
            self.predicted.remove(key);
            self.known.remove(key);
        }
    }

    /// The replica has these and nothing else; predictions stay, for they may be on their way.
    pub fn snapshot(&mut self, keys: &[u64]) {
        self.known.clear();
        self.stored(keys);
    }

    /// Nothing is known.
    pub fn clear(&mut self) {
        self.known.clear();
        self.predicted.clear();
    }

    /// Keys in the two sets together.
    pub fn len(&self) -> usize {
        self.known.len() + self.predicted.len()
    }

    /// Nothing is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most keys in the two sets together.
    pub fn bound(&self) -> usize {
        self.known.bound + self.predicted.bound
    }

    fn has(&self, key: u64) -> bool {
        self.known.contains(key) || self.predicted.contains(key)
    }
}

/// Keys are hashes already.
#[derive(Default)]
struct KeyIsHash(u64);

impl Hasher for KeyIsHash {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }
    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Node {
    key: u64,
    older: u32,
    younger: u32,
}

/// A set with a bound: inserting one too many drops the entry that was touched longest ago. The list is threaded
/// through a vector by indices.
#[derive(Debug)]
struct LruSet {
    bound: usize,
    slots: HashMap<u64, u32, BuildHasherDefault<KeyIsHash>>,
    nodes: Vec<Node>,
    free: Vec<u32>,
    oldest: u32,
    youngest: u32,
}

impl LruSet {
    fn new(bound: usize) -> Self {
        let (slots, nodes, free) = Default::default();
        Self {
            bound,
            slots,
            nodes,
            free,
            oldest: NONE,
            youngest: NONE,
        }
    }

    fn len(&self) -> usize {
        self.slots.len()
    }

    fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    fn contains(&self, key: u64) -> bool {
        self.slots.contains_key(&key)
    }

    fn clear(&mut self) {
        *self = Self::new(self.bound);
    }

    /// False: not there.
    fn touch(&mut self, key: u64) -> bool {
        let Some(&slot) = self.slots.get(&key) else {
            return false;
        };
        if slot != self.youngest {
            self.unlink(slot);
            self.link_youngest(slot);
        }
        true
    }

    fn insert(&mut self, key: u64) {
        if self.touch(key) {
            return;
        }
        if self.slots.len() == self.bound {
            self.remove(self.nodes[self.oldest as usize].key);
        }
        let node = Node {
            key,
            older: NONE,
            younger: NONE,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.nodes[slot as usize] = node;
                slot
            }
            None => {
                self.nodes.push(node);
                u32::try_from(self.nodes.len() - 1).expect("bounds are far below 2^32")
            }
        };
        self.slots.insert(key, slot);
        self.link_youngest(slot);
    }

    fn remove(&mut self, key: u64) {
        if let Some(slot) = self.slots.remove(&key) {
            self.unlink(slot);
            self.free.push(slot);
        }
    }

    fn unlink(&mut self, slot: u32) {
        let Node { older, younger, .. } = self.nodes[slot as usize];
        match older {
            NONE => self.oldest = younger,
            older => self.nodes[older as usize].younger = younger,
        }
        match younger {
            NONE => self.youngest = older,
            younger => self.nodes[younger as usize].older = older,
        }
    }

    fn link_youngest(&mut self, slot: u32) {
        let before = self.youngest;
        let node = &mut self.nodes[slot as usize];
        (node.older, node.younger) = (before, NONE);
        match before {
            NONE => self.oldest = slot,
            before => self.nodes[before as usize].younger = slot,
        }
        self.youngest = slot;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(index: &PrefixIndex, keys: &[u64]) -> (usize, usize) {
        let Matched { known, expected } = index.matched(keys);
        (known, expected)
    }

    #[test]
    fn what_was_told_and_what_was_sent_are_told_apart() {
        let mut index = PrefixIndex::new(100);
        index.stored(&[1, 2]);
        index.predict(&[1, 2, 3, 4]);
        assert_eq!(matched(&index, &[1, 2, 3, 4, 5]), (2, 4));
        assert_eq!(matched(&index, &[9, 2, 3]), (0, 0));
        index.removed(&[4]);
        assert_eq!(matched(&index, &[1, 2, 3, 4, 5]), (2, 3));
        index.stored(&[3]);
        assert_eq!(matched(&index, &[1, 2, 3, 4, 5]), (3, 3));
        assert_eq!(index.len(), 3, "a prediction that came true is not kept twice");
        index.snapshot(&[1]);
        assert_eq!(matched(&index, &[1, 2, 3]), (1, 1));
        index.clear();
        assert!(index.is_empty());
    }

    #[test]
    fn the_bound_holds_and_leaves_go_first() {
        let mut index = PrefixIndex::new(8);
        let old: Vec<u64> = (100..106).collect();
        index.predict(&old);
        index.predict(&[1, 2, 3, 4]);
        assert_eq!(index.len(), 8);
        assert_eq!(matched(&index, &[1, 2, 3, 4]), (0, 4));
        assert_eq!(
            matched(&index, &old),
            (0, 4),
            "the end of the older prompt made room"
        );
    }

    #[test]
    fn a_random_life_never_breaks_the_list_or_the_bound() {
        for seed in 0..20u64 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut index = PrefixIndex::new(rng.usize(1..40));
            for _ in 0..2_000 {
                let keys: Vec<u64> = (0..rng.usize(0..30)).map(|_| rng.u64(0..60)).collect();
                match rng.u8(0..10) {
                    0..4 => index.predict(&keys),
                    4..8 => index.stored(&keys),
                    8 => index.removed(&keys),
                    _ if rng.u8(0..20) == 0 => index.snapshot(&keys),
                    _ => {}
                }
                assert!(index.len() <= index.bound(), "seed {seed}");
                let Matched { known, expected } = index.matched(&keys);
                assert!(known <= expected, "seed {seed}");
                assert!(known == 0 || index.known.contains(keys[known - 1]), "seed {seed}");
                assert!(expected == 0 || index.has(keys[expected - 1]), "seed {seed}");
                for set in [&index.known, &index.predicted] {
                    let mut seen = 0;
                    let mut slot = set.oldest;
                    while slot != NONE {
                        assert_eq!(
                            set.slots.get(&set.nodes[slot as usize].key),
                            Some(&slot),
                            "seed {seed}"
                        );
                        slot = set.nodes[slot as usize].younger;
                        seen += 1;
                    }
                    assert_eq!(seen, set.len(), "seed {seed}");
                    assert!(set.nodes.len() <= set.bound, "seed {seed}");
                }
            }
        }
    }
}
