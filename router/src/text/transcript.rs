//! One candidate's tokens as text, token by token.
//!
//! Concatenated, what is shown equals the whole output decoded at once and cut at its first stop string. Shown late
//! is only an unfinished code point and the beginning of a stop string.

use std::sync::Arc;

use super::{StopCursor, StopSet, Tokenizer, Utf8Assembler};

/// How the output of one request is put into words; shared by its candidates.
#[derive(Clone, Debug)]
pub struct Wording {
    /// Leave control tokens out.
    pub skip_special: bool,
    /// But for this one.
    pub shown: Option<u32>,
    /// Show the stop string or stop token that was asked for.
    pub include_stop: bool,
    /// A stop string counts that is complete after more tokens than these.
    pub min_tokens: u32,
    /// What ends a candidate.
    pub stops: Arc<StopSet>,
}

/// What one token added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Where the token's text begins, in characters from the output's beginning.
    pub offset: u32,
    /// The stop string that it completed.
    pub stop: Option<usize>,
}

/// One candidate's text so far.
#[derive(Debug)]
pub struct Transcript {
    tokenizer: Arc<Tokenizer>,
    wording: Arc<Wording>,
    utf8: Utf8Assembler,
    cursor: StopCursor,
    tokens: u32,
    /// Characters decoded so far, shown or withheld.
    chars: u32,
    scratch: String,
}

impl Transcript {
    /// Nothing said yet.
    pub fn new(tokenizer: Arc<Tokenizer>, wording: Arc<Wording>) -> Self {
        Self {
            tokenizer,
            wording,
            utf8: Utf8Assembler::default(),
            cursor: StopCursor::default(),
            tokens: 0,
            chars: 0,
            scratch: String::new(),
        }
    }

    /// Tokens read so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Characters decoded so far, shown or withheld.
    pub fn chars(&self) -> u32 {
        self.chars
    }

    /// The next token; text that is certain now is appended to `out`. After a stop string nothing more is read.
    pub fn push(&mut self, token: u32, out: &mut String) -> Shown {
        let offset = self.chars;
        let watched = self.tokens >= self.wording.min_tokens;
        self.tokens += 1;
        if self.wording.skip_special && self.wording.shown != Some(token) && self.tokenizer.is_special(token)
        {
            return Shown { offset, stop: None };
        }
        self.scratch.clear();
        self.utf8
            .push(self.tokenizer.token_bytes(token), &mut self.scratch);
        Shown {
            offset,
            stop: self.show(watched, out),
        }
    }

    /// The token that stopped the candidate, `named` by the request or else the model's own end of sequence.
    pub fn stop_token(&mut self, token: u32, named: bool, out: &mut String) -> Shown {
        let stop = self.finish(out);
        self.tokens += 1;
        let offset = self.chars;
        if stop.is_some() {
            return Shown { offset, stop };
        }
        let visible = named || !(self.wording.skip_special && self.tokenizer.is_special(token));
        if self.wording.include_stop && visible {
            let text = String::from_utf8_lossy(self.tokenizer.token_bytes(token));
            self.chars += text.chars().count() as u32;
            out.push_str(&text);
        }
        Shown { offset, stop: None }
    }

    /// No more tokens: what was withheld is shown, an unfinished code point as U+FFFD. That character too may
    /// complete a stop string.
    pub fn finish(&mut self, out: &mut String) -> Option<usize> {
        self.scratch.clear();
        self.utf8.finish(&mut self.scratch);
        let stop = self.show(self.tokens > self.wording.min_tokens, out);
        if stop.is_none() {
            self.cursor.finish(out);
        }
        stop
    }

    fn show(&mut self, watched: bool, out: &mut String) -> Option<usize> {
        self.chars += self.scratch.chars().count() as u32;
        if !watched {
            self.cursor.pass(&self.wording.stops, &self.scratch, out);
            return None;
        }
        self.cursor
            .push(&self.wording.stops, &self.scratch, self.wording.include_stop, out)
    }
}
