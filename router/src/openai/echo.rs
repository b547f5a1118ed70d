//! A prompt as an echo shows it, and where in that its tokens begin.
//!
//! A prompt that was a text is shown as its client wrote it: control tokens that are written in it are seen, and what was
//! put around it is not. A prompt of ids is shown as an output of them would be.

use std::sync::Arc;

use crate::{
    models::ModelText,
    text::{StopSet, Tokenizer, Transcript, Wording},
};

/// A prompt as it is shown; empty where it is not.
#[derive(Default)]
pub(super) struct Echo {
    pub text: String,
    /// Where each token begins, in characters.
    pub offsets: Vec<u32>,
    /// Of all of it.
    pub chars: u32,
}

impl Echo {
    /// Of a prompt, and its own text if it was one.
    pub(super) fn of(model: &ModelText, prompt: &[u32], text: Option<&str>, skip_special: bool) -> Self {
        let tokenizer = &model.tokenizer;
        let Some(text) = text else {
            let (offsets, chars) = places(tokenizer, prompt, skip_special);
            let text = String::from_utf8_lossy(&tokenizer.decode(prompt, skip_special)).into_owned();
            return Self { text, offsets, chars };
        };
        let (offsets, all) = places(tokenizer, prompt, false);
        let chars = text.chars().count() as u32;
        let before = put_around(tokenizer, prompt, all.saturating_sub(chars));
        let offsets = offsets.into_iter().map(|at| at.saturating_sub(before).min(chars));
        Self {
            text: text.to_owned(),
            offsets: offsets.collect(),
            chars,
        }
    }
}

/// Where each token begins, and where the last one ends.
fn places(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> (Vec<u32>, u32) {
    let wording = Wording {
        skip_special,
        shown: None,
        include_stop: false,
        min_tokens: 0,
        stops: Arc::new(StopSet::new(Vec::new())),
    };
    let mut transcript = Transcript::new(Arc::clone(tokenizer), Arc::new(wording));
    let mut unused = String::new();
    let mut place = |&id: &u32| {
        unused.clear();
        transcript.push(id, &mut unused).offset
    };
    let offsets = ids.iter().map(&mut place).collect();
    transcript.finish(&mut unused);
    (offsets, transcript.chars())
}

/// How many characters of `extra` ones, which the ids have and the text has not, come before it: of control tokens, but for
/// those behind it, and the space with which some vocabularies begin.
fn put_around(tokenizer: &Tokenizer, ids: &[u32], extra: u32) -> u32 {
    let before = control(tokenizer, ids.iter(), extra);
    let behind = control(tokenizer, ids.iter().rev(), extra - before);
    extra - behind
}

/// Of the control tokens at the beginning, as many characters as `most` holds.
fn control<'a>(tokenizer: &Tokenizer, ids: impl Iterator<Item = &'a u32>, most: u32) -> u32 {
    let special = ids.take_while(|id| tokenizer.is_special(**id));
    let mut widths =
        special.map(|&id| String::from_utf8_lossy(tokenizer.token_bytes(id)).chars().count() as u32);
    let mut taken = 0;
    while let Some(width) = widths.next().filter(|width| taken + width <= most) {
        taken += width;
    }
    taken
}
