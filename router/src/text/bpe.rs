//! Byte-level BPE for tokenizers of Llama 3's kind: the ids that the `tokenizers` library gives, in time linear in the
//! text, and several times sooner.
//!
//! Most words of a text are tokens: one look-up each. The others are merged, the pair of lowest rank first and of equal
//! ones the leftmost, as the library does; a long word by queues, so that its length does not count twice. Whatever of a
//! tokenizer.json is not known to be of this kind leaves the text to the library: `Bpe::read` then gives nothing.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    decoder::ByteLevel,
    split::{PATTERN, words},
};

/// Up to so many bytes a word is merged by looking over all of it for each merge.
const SHORT: usize = 32;
/// No token: what an empty place of a table holds, and the end of a list.
const NONE: u32 = u32::MAX;

/// tokenizer.json, as far as it decides here. What isn't of this form is not of this kind.
#[derive(Deserialize)]
struct File {
    normalizer: Option<Value>,
    pre_tokenizer: Value,
    post_processor: Option<Value>,
    #[serde(default)]
    added_tokens: Vec<Added>,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
}

#[derive(Deserialize)]
struct Model {
    r#type: Option<String>,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    ignore_merges: bool,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
}

/// Files of before 2024 write a pair as one string.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// What a pair of neighbours becomes.
#[derive(Clone, Copy)]
struct Rule {
    rank: u32,
    id: u32,
}

/// A vocabulary and its merges.
pub(super) struct Bpe {
    /// The token of each byte.
    bytes: [u32; 256],
    merges: HashMap<(u32, u32), Rule, BuildHasherDefault<Mix>>,
    /// Words that are one token each.
    whole: Whole,
    added: Trie,
    /// What the library's post-processor puts around a text.
    around: (Vec<u32>, Vec<u32>),
}

impl Bpe {
    /// From the text of tokenizer.json; `None` if it asks for anything that this does not do.
    pub(super) fn read(text: &[u8], library: &tokenizers::Tokenizer) -> Option<Self> {
        let file: File = serde_json::from_slice(text).ok()?;
        let model = &file.model;
        let empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
        let plain = file.normalizer.is_none()
            && is_llama3(&file.pre_tokenizer)
            && file.post_processor.as_ref().is_none_or(is_constant)
            && model.r#type.as_deref().is_none_or(|kind| kind == "BPE")
            && model.dropout.is_none_or(|dropout| dropout == 0.0)
            && empty(&model.continuing_subword_prefix)
            && empty(&model.end_of_word_suffix);
        if !plain {
            return None;
        }
        let level = ByteLevel::new();
        // An entry with other characters is never found in a text, which has only these when it is looked up.
        let vocab: HashMap<Vec<u8>, u32> = model
            .vocab
            .iter()
            .filter_map(|(token, &id)| Some((level.exact(token)?, id)))
            .collect();
        let mut bytes = [0; 256];
        for (byte, id) in (0..=u8::MAX).zip(&mut bytes) {
            *id = *vocab.get(&[byte][..])?;
        }
        let mut this = Self {
            bytes,
            merges: merges(model)?,
            whole: Whole::default(),
            added: Trie::new(&file.added_tokens)?,
            around: around(library)?,
        };
        this.whole = if model.ignore_merges {
            Whole::new(vocab.iter())
        } else {
            let mut scratch = Scratch::default();
            let mut becomes = |word: &[u8], id: u32| {
                scratch.ids.clear();
                this.merge(word, &mut scratch);
                scratch.ids == [id]
            };
            let whole: Vec<_> = vocab.iter().filter(|(word, id)| becomes(word, **id)).collect();
            Whole::new(whole.into_iter())
        };
        Some(this)
    }

    /// The ids of `text`; with `add_special` as the library's post-processor puts them.
    pub(super) fn encode(&self, text: &str, add_special: bool) -> Vec<u32> {
        let mut scratch = Scratch::default();
        scratch.ids.reserve(text.len() / 4 + 8);
        let (before, after) = &self.around;
        if add_special {
            scratch.ids.extend_from_slice(before);
        }
        let mut rest = text;
        while let Some((start, end, id)) = self.added.first(rest) {
            self.plain(&rest[..start], &mut scratch);
            scratch.ids.push(id);
            rest = &rest[end..];
        }
        self.plain(rest, &mut scratch);
        if add_special {
            scratch.ids.extend_from_slice(after);
        }
        scratch.ids
    }

    /// Text without added tokens.
    fn plain(&self, text: &str, scratch: &mut Scratch) {
        for word in words(text) {
            match self.whole.get(word.as_bytes()) {
                Some(id) => scratch.ids.push(id),
                None => self.merge(word.as_bytes(), scratch),
            }
        }
    }

    fn rule(&self, left: u32, right: u32) -> Option<Rule> {
        self.merges.get(&(left, right)).copied()
    }

    /// The tokens of a word.
    fn merge(&self, word: &[u8], scratch: &mut Scratch) {
        if word.len() <= SHORT {
            self.merge_short(word, scratch);
        } else {
            self.merge_long(word, &mut scratch.ids);
        }
    }

    fn merge_short(&self, word: &[u8], Scratch { ids, symbols }: &mut Scratch) {
        symbols.clear();
        symbols.extend(word.iter().map(|&byte| (self.bytes[usize::from(byte)], None)));
        for at in 1..symbols.len() {
            symbols[at - 1].1 = self.rule(symbols[at - 1].0, symbols[at].0);
        }
        loop {
            // Of equal ranks the first.
            let ranks = symbols.iter().enumerate();
            let ranks = ranks.filter_map(|(at, (_, rule))| rule.map(|rule| (rule.rank, at, rule.id)));
            let Some((_, at, id)) = ranks.min() else { break };
            symbols.remove(at + 1);
            symbols[at] = (id, symbols.get(at + 1).and_then(|right| self.rule(id, right.0)));
            if let Some(before) = at.checked_sub(1) {
                symbols[before].1 = self.rule(symbols[before].0, id);
            }
        }
        ids.extend(symbols.iter().map(|(id, _)| id));
    }

    fn merge_long(&self, word: &[u8], ids: &mut Vec<u32>) {
        let mut chain = Chain::new(word.iter().map(|&byte| self.bytes[usize::from(byte)]));
        let mut due = Due::default();
        for at in 1..chain.id.len() {
            if let Some(rule) = self.rule(chain.id[at - 1], chain.id[at]) {
                due.add(rule.rank, at as u32 - 1);
            }
        }
        while let Some((rank, at)) = due.pop() {
            // It may have been merged with another neighbour meanwhile. The pair's text only grows, so a pair of this
            // rank is the one that was meant.
            let Some(rule) = chain
                .pair(at)
                .and_then(|(left, right)| self.rule(left, right))
                .filter(|rule| rule.rank == rank)
            else {
                continue;
            };
            chain.join(at, rule.id);
            let before = chain.before[at as usize];
            for left in [before, at] {
                if left == NONE {
                    continue;
                }
                if let Some(rule) = chain.pair(left).and_then(|(left, right)| self.rule(left, right)) {
                    due.add(rule.rank, left);
                }
            }
        }
        ids.extend(chain.ids());
    }
}

/// What is used again from word to word.
#[derive(Default)]
struct Scratch {
    ids: Vec<u32>,
    symbols: Vec<(u32, Option<Rule>)>,
}

/// The tokens of a long word, as a list in place: a token that was merged into the one before it is skipped.
struct Chain {
    id: Vec<u32>,
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Chain {
    fn new(ids: impl Iterator<Item = u32>) -> Self {
        let id: Vec<u32> = ids.collect();
        let n = u32::try_from(id.len()).expect("request bodies are bounded far below 4 GiB");
        Self {
            id,
            before: std::iter::once(NONE).chain(0..n - 1).collect(),
            after: (1..n).chain([NONE]).collect(),
        }
    }

    /// A token and the next one; `None` where one of them is not there any more.
    fn pair(&self, at: u32) -> Option<(u32, u32)> {
        let (id, after) = (self.id[at as usize], self.after[at as usize]);
        (id != NONE && after != NONE).then(|| (id, self.id[after as usize]))
    }

    /// A token and the next one become one.
    fn join(&mut self, at: u32, id: u32) {
        let gone = self.after[at as usize];
        let after = self.after[gone as usize];
        self.id[at as usize] = id;
        self.id[gone as usize] = NONE;
        self.after[at as usize] = after;
        if after != NONE {
            self.before[after as usize] = at;
        }
    }

    fn ids(self) -> impl Iterator<Item = u32> {
        self.id.into_iter().filter(|&id| id != NONE)
    }
}

/// Places of a word to look at, by rank and then from left to right. Places of one rank come nearly always in order and
/// wait in a queue; so the time grows with the number of places, and the heap has ranks only.
#[derive(Default)]
struct Due {
    ranks: BinaryHeap<Reverse<u32>>,
    places: HashMap<u32, Places, BuildHasherDefault<Mix>>,
}

#[derive(Default)]
struct Places {
    ascending: VecDeque<u32>,
    others: BinaryHeap<Reverse<u32>>,
}

impl Due {
    fn add(&mut self, rank: u32, at: u32) {
        let places = self.places.entry(rank).or_default();
        if places.ascending.is_empty() && places.others.is_empty() {
            self.ranks.push(Reverse(rank));
        }
        if places.ascending.back().is_none_or(|&last| last <= at) {
            places.ascending.push_back(at);
        } else {
            places.others.push(Reverse(at));
        }
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        let Reverse(rank) = *self.ranks.peek()?;
        let places = self.places.get_mut(&rank)?;
        let queued = places.ascending.front().copied().unwrap_or(NONE);
        let other = places.others.peek().map_or(NONE, |place| place.0);
        let at = if other < queued {
            places.others.pop().map(|place| place.0)
        } else {
            places.ascending.pop_front()
        };
        if places.ascending.is_empty() && places.others.is_empty() {
            self.ranks.pop();
        }
        Some((rank, at?))
    }
}

/// The added token that begins first in a text, and of those the longest.
#[derive(Default)]
struct Trie {
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
    fn new(added: &[Added]) -> Option<Self> {
        let mut this = Self {
            begins: vec![false; 256],
            nodes: vec![Node::default()],
        };
        for token in added {
            // A normalised one is looked for in a pass of its own; without a normalizer that makes no difference where
            // all are.
            let odd = token.single_word || token.lstrip || token.rstrip;
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
    fn first(&self, text: &str) -> Option<(usize, usize, u32)> {
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

/// Words and their ids: an open table, whose words lie in one piece of memory.
#[derive(Default)]
struct Whole {
    text: Vec<u8>,
    /// Where a word begins in `text`, its length and its id.
    places: Vec<(u32, u32, u32)>,
}

impl Whole {
    fn new<'a>(words: impl ExactSizeIterator<Item = (&'a Vec<u8>, &'a u32)>) -> Self {
        let mut this = Self {
            text: Vec::new(),
            places: vec![(0, 0, NONE); (words.len() * 2).next_power_of_two()],
        };
        for (word, &id) in words {
            let at = this.place(word);
            this.places[at] = (this.text.len() as u32, word.len() as u32, id);
            this.text.extend_from_slice(word);
        }
        this
    }

    fn get(&self, word: &[u8]) -> Option<u32> {
        let (_, _, id) = self.places[self.place(word)];
        (id != NONE).then_some(id)
    }

    /// Where a word is, or would be. Half of the places are empty, so there is an end to the search.
    fn place(&self, word: &[u8]) -> usize {
        let mut hash = Mix::default();
        hash.write(word);
        let mask = self.places.len() - 1;
        let mut at = hash.finish() as usize & mask;
        loop {
            let (start, length, id) = self.places[at];
            let same = || self.text[start as usize..][..length as usize] == *word;
            if id == NONE || (length as usize == word.len() && same()) {
                return at;
            }
            at = (at + 1) & mask;
        }
    }
}

/// A hash of a multiplication a word of the machine. What is stored comes from the model's own files; a client only
/// looks up, and can't make a search longer than they do.
#[derive(Default)]
struct Mix(u64);

impl Mix {
    fn mix(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * u128::from(0x9e37_79b9_7f4a_7c15_u64);
        self.0 = (product as u64) ^ (product >> 64) as u64;
    }
}

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            self.mix(u64::from_le_bytes(word.try_into().expect("eight bytes")));
        }
        let rest = words.remainder();
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.mix(u64::from_le_bytes(last) ^ (bytes.len() as u64) << 56);
    }

    fn write_u32(&mut self, word: u32) {
        self.mix(u64::from(word) + 1);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What each pair of tokens becomes; of a pair that is given twice, the last word counts, as in the library.
fn merges(model: &Model) -> Option<HashMap<(u32, u32), Rule, BuildHasherDefault<Mix>>> {
    let mut rules = HashMap::with_capacity_and_hasher(model.merges.len(), BuildHasherDefault::default());
    for (rank, merge) in (0..).zip(&model.merges) {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.as_str(), right.as_str()),
            Merge::Line(line) => line.split_once(' ')?,
        };
        let id = *model.vocab.get(&format!("{left}{right}"))?;
        let pair = (*model.vocab.get(left)?, *model.vocab.get(right)?);
        rules.insert(pair, Rule { rank, id });
    }
    Some(rules)
}

fn is_llama3(pre_tokenizer: &Value) -> bool {
    let steps = pre_tokenizer["pretokenizers"].as_array();
    let Some([split, level]) = steps.map(Vec::as_slice) else {
        return false;
    };
    let pattern = json!({"Regex": PATTERN});
    pre_tokenizer["type"] == "Sequence"
        && split["type"] == "Split"
        && split["pattern"] == pattern
        && split["behavior"] == "Isolated"
        && split["invert"] == false
        && level["type"] == "ByteLevel"
        && level["add_prefix_space"] == false
        && level["use_regex"] == false
}

/// It puts the same ids around every text.
fn is_constant(post_processor: &Value) -> bool {
    match post_processor["type"].as_str() {
        Some("ByteLevel" | "TemplateProcessing") => true,
        Some("Sequence") => post_processor["processors"]
            .as_array()
            .is_some_and(|steps| steps.iter().all(is_constant)),
        _ => false,
    }
}

fn around(library: &tokenizers::Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let ids = |add_special| Some(library.encode_fast("a", add_special).ok()?.get_ids().to_vec());
    let (bare, with) = (ids(false)?, ids(true)?);
    let [id] = bare[..] else { return None };
    let at = with.iter().position(|&other| other == id)?;
    Some((with[..at].to_vec(), with[at + 1..].to_vec()))
}
