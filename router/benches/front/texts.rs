//! The model's text side: conversations of a given length, and how tokenising grows with a text.

use std::{path::Path, time::Duration};

use swallow_router::text::Tokenizer;

use super::{
    process::{Outcome, cpu},
    read,
    report::{Report, Target},
};

/// Conversations that differ.
const CONVERSATIONS: usize = 64;
/// Bytes of the shorter text of a pair; the longer has four times as many.
const SHORT_BYTES: usize = 64 << 10;
/// Of so many measurements the fastest counts.
const RUNS: usize = 3;
/// CPU time that one takes at least.
const MEASURED: Duration = Duration::from_millis(200);

const WORDS: [&str; 40] = [
    "the", "and", "you", "are", "for", "two", "one", "out", "old", "age", "day", "ten", "tea", "can", "sum",
    "sea", "dog", "sky", "red", "how", "car", "eye", "cat", "cow", "egg", "numbers", "Japan", "month",
    "question", "answer", "little", "between", "people", "language", "model", "morning", "water", "because",
    "great", "world",
];

/// A tokenizer and what the benchmark makes of it.
pub struct Model(Tokenizer);

impl Model {
    /// From a model's folder.
    pub fn load(folder: &Path) -> Outcome<Self> {
        let json = read(folder, "tokenizer.json")?;
        Ok(Self(Tokenizer::load(&json, None, None)?))
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> u32 {
        self.0.n_ids() as u32
    }

    /// The id of a word that is one token.
    pub fn word(&self, word: &str) -> Outcome<u32> {
        match self.0.encode(word, false)?[..] {
            [id] => Ok(id),
            _ => Err(format!("--model: '{word}' is not one token of its vocabulary").into()),
        }
    }

    /// What users say, each of so many tokens, or one or two more.
    pub fn conversations(&self, tokens: usize) -> Vec<String> {
        let n_tokens = |text: &str| self.0.encode(text, false).map_or(0, |ids| ids.len());
        let mut dice = fastrand::Rng::with_seed(1);
        let mut conversations = Vec::new();
        while conversations.len() < CONVERSATIONS {
            let mut text = String::new();
            let mut so_far = 0;
            while so_far < tokens {
                let word = WORDS[dice.usize(..WORDS.len())];
                let more = format!("{}{word}", if text.is_empty() { "" } else { " " });
                // Words are tokenised each by itself.
                so_far += n_tokens(&more);
                text += &more;
            }
            conversations.push(text);
        }
        conversations
    }

    /// How much longer four times the text takes: words, and one word of one character.
    pub fn growth(&self, report: &mut Report) -> Outcome<()> {
        let words = WORDS.join(" ");
        for (name, unit) in [
            ("words", words.as_str()),
            ("'a' repeated", "a"),
            ("'z' repeated", "z"),
            ("'の' repeated", "の"),
            ("' ' repeated", " "),
            ("'!' repeated", "!"),
            ("'ab' repeated", "ab"),
        ] {
            let short = unit.repeat(SHORT_BYTES / unit.len());
            let long = unit.repeat(4 * (SHORT_BYTES / unit.len()));
            // Taken in turns: what else the machine does costs caches, so it can only be too much by chance.
            let (mut of_short, mut of_long) = (Duration::MAX, Duration::MAX);
            for _ in 0..RUNS {
                of_short = of_short.min(self.time(&short)?);
                of_long = of_long.min(self.time(&long)?);
            }
            let each = of_long.as_secs_f64() * 1e9 / long.len() as f64;
            let case = format!("tokenise, four times the text, {name}, {each:.0} ns/byte");
            report.plain(
                &case,
                of_long.as_secs_f64() / of_short.as_secs_f64(),
                "times",
                Target(5.0),
            );
        }
        Ok(())
    }

    /// CPU time of one run, from as many as the clock needs, which ticks a hundred times a second.
    fn time(&self, text: &str) -> Outcome<Duration> {
        let own = std::process::id();
        let (began, mut runs) = (cpu(own)?, 0);
        loop {
            for _ in 0..8 {
                if self.0.encode(text, false)?.is_empty() {
                    return Err("a text without tokens".into());
                }
            }
            runs += 8;
            let took = cpu(own)? - began;
            if took >= MEASURED {
                return Ok(took / runs);
            }
        }
    }
}
