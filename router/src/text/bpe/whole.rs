//! The table of words that are one token each, and the hash that it and the merges are found by.

use std::hash::Hasher;

use super::NONE;

/// Words and their ids: an open table, whose words lie in one piece of memory.
#[derive(Default)]
pub(super) struct Whole {
    text: Vec<u8>,
    /// Where a word begins in `text`, its length and its id.
    places: Vec<(u32, u32, u32)>,
}

impl Whole {
    pub(super) fn new<'a>(words: impl ExactSizeIterator<Item = (&'a Vec<u8>, &'a u32)>) -> Self {
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

    pub(super) fn get(&self, word: &[u8]) -> Option<u32> {
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
pub(super) struct Mix(u64);

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
