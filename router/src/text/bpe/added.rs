//! Added tokens, which are cut out of a text before anything else: one pass, whatever their number.

use std::collections::BTreeMap;

use serde::Deserialize;

/// An added token, as tokenizer.json has it.
#[derive(Deserialize)]
pub(super) struct Added {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
}

/// The added token that begins first in a text, and of those the longest.
#[derive(Default)]
pub(super) struct Trie {
    /// Of the first bytes.
    begins: Vec<bool>,
    nodes: Vec<Node>,
}

#[derive(Default)]
struct Node {
    next: BTreeMap<u8, usize>,
    ends: Option<u32>,
}

impl Trie {
    /// `None` where one asks for more than to be found as it is, or has not the `id` that the library gives it.
    pub(super) fn new(added: &[Added], id: impl Fn(&str) -> Option<u32>) -> Option<Self> {
        let mut this = Self {
            begins: vec![false; 256],
            nodes: vec![Node::default()],
        };
        for token in added {
            // A normalised one is looked for in a pass of its own; without a normalizer that makes no difference where
            // all are.
            let odd =
                token.single_word || token.lstrip || token.rstrip || id(&token.content) != Some(token.id);
            if odd || token.content.is_empty() || token.normalized != added[0].normalized {
                return None;
            }
            this.begins[usize::from(token.content.as_bytes()[0])] = true;
            let mut at = 0;
            for byte in token.content.bytes() {
                let new = this.nodes.len();
                let next = *this.nodes[at].next.entry(byte).or_insert(new);
                if next == new {
                    this.nodes.push(Node::default());
                }
                at = next;
            }
            this.nodes[at].ends = Some(token.id);
        }
        Some(this)
    }

    /// Where it begins and ends, and its id.
    pub(super) fn first(&self, text: &str) -> Option<(usize, usize, u32)> {
        let bytes = text.as_bytes();
        let starts = bytes.iter().enumerate();
        let mut starts = starts.filter(|(_, byte)| self.begins[usize::from(**byte)]);
        starts.find_map(|(start, _)| {
            self.longest(&bytes[start..])
                .map(|(length, id)| (start, start + length, id))
        })
    }

    fn longest(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        let (mut at, mut found) = (0, None);
        for (length, byte) in (1..).zip(bytes) {
            let Some(&next) = self.nodes[at].next.get(byte) else {
                break;
            };
            at = next;
            found = self.nodes[at].ends.map(|id| (length, id)).or(found);
        }
        found
    }
}
