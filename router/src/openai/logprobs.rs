//! Log-probabilities in their three forms: of conversations, of plain completions, and vLLM's of prompts.
//!
//! Token texts are made to be told apart: what is not valid UTF-8 is written `bytes:\xe3\x81`, and two tokens of one
//! position that read the same are told apart by their ids. Evaluations compare a token's value with the largest of
//! its position, so the chosen token is always there, with the same number.

use serde::{Serialize, Serializer, ser::SerializeMap};

use super::render::finite;
use crate::{ask::Score, generate::Spoken, text::Tokenizer};

/// How tokens are named.
#[derive(Clone, Copy)]
pub(super) struct Naming<'a> {
    pub tokenizer: &'a Tokenizer,
    /// By id instead of text.
    pub by_id: bool,
}

impl Naming<'_> {
    fn name(self, token: u32) -> String {
        if self.by_id {
            return format!("token_id:{token}");
        }
        let bytes = self.tokenizer.token_bytes(token);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes
                .iter()
                .fold("bytes:".to_owned(), |name, byte| format!("{name}\\x{byte:02x}")),
        }
    }
}

/// Of a conversation's choice.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
    /// Always null: no refusals are told apart from answers.
    refusal: Option<()>,
}

#[derive(Clone, Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ChatAlternative,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Clone, Debug, Serialize)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// `top` alternatives of each token.
    pub(super) fn new(naming: Naming<'_>, tokens: &[Spoken], top: u32) -> Self {
        let alternative = |token: u32, logprob: f32| ChatAlternative {
            token: naming.name(token),
            logprob: finite(logprob),
            bytes: naming.tokenizer.token_bytes(token).to_vec(),
        };
        let content = tokens
            .iter()
            .filter_map(|spoken| spoken.score.as_ref())
            .map(|score| ChatToken {
                token: alternative(score.token, score.logprob),
                top_logprobs: score
                    .top
                    .iter()
                    .take(top as usize)
                    .map(|&(id, logprob)| alternative(id, logprob))
                    .collect(),
            });
        Self {
            content: content.collect(),
            refusal: None,
        }
    }
}

/// Entries of a JSON object in their order.
#[derive(Clone, Debug)]
pub(super) struct Entries<V>(Vec<(String, V)>);

impl<V: Serialize> Serialize for Entries<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        self.0
            .iter()
            .try_for_each(|(key, value)| map.serialize_entry(key, value))?;
        map.end()
    }
}

/// Of a plain completion's choice: parallel lists.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct TextLogprobs {
    tokens: Vec<String>,
    /// null for the very first token of all, which nothing predicts.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Entries<f32>>>,
    text_offset: Vec<u32>,
}

impl TextLogprobs {
    /// The prompt's tokens, with the scores of positions from 1.
    pub(super) fn prompt(
        &mut self,
        naming: Naming<'_>,
        ids: &[u32],
        offsets: &[u32],
        scores: &[Score],
        top: u32,
    ) {
        let scores = std::iter::once(None).chain(scores.iter().map(Some));
        for ((&token, &offset), score) in ids.iter().zip(offsets).zip(scores) {
            self.push(naming, token, offset, score, top);
        }
    }

    /// Tokens of the output, whose text begins at character `from`.
    pub(super) fn output(&mut self, naming: Naming<'_>, tokens: &[Spoken], from: u32, top: u32) {
        for spoken in tokens {
            self.push(
                naming,
                spoken.token,
                from + spoken.offset,
                spoken.score.as_ref(),
                top,
            );
        }
    }

    fn push(&mut self, naming: Naming<'_>, token: u32, offset: u32, score: Option<&Score>, top: u32) {
        self.tokens.push(naming.name(token));
        self.token_logprobs.push(score.map(|score| finite(score.logprob)));
        self.top_logprobs
            .push(score.map(|score| named(naming, score, top)));
        self.text_offset.push(offset);
    }
}

/// The chosen token first, so that it is the one that keeps its name.
fn named(naming: Naming<'_>, score: &Score, top: u32) -> Entries<f32> {
    let mut entries = vec![(naming.name(score.token), finite(score.logprob))];
    for &(id, logprob) in score
        .top
        .iter()
        .take(top as usize)
        .filter(|(id, _)| *id != score.token)
    {
        let name = naming.name(id);
        let taken = entries.iter().any(|(other, _)| *other == name);
        entries.push((
            if taken { format!("token_id:{id}") } else { name },
            finite(logprob),
        ));
    }
    Entries(entries)
}

/// One prompt token in vLLM's form.
#[derive(Clone, Debug, Serialize)]
pub(super) struct RankedToken {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

/// vLLM's `prompt_logprobs`: by token id; null for the first token.
pub(super) fn prompt_logprobs(
    naming: Naming<'_>,
    scores: &[Score],
    top: u32,
) -> Vec<Option<Entries<RankedToken>>> {
    let entry = |id: u32, logprob: f32, rank: u32| {
        let decoded_token = naming.name(id);
        (
            id.to_string(),
            RankedToken {
                logprob: finite(logprob),
                rank,
                decoded_token,
            },
        )
    };
    let position = |score: &Score| {
        let mut entries = vec![entry(score.token, score.logprob, score.rank)];
        let others = score
            .top
            .iter()
            .take(top as usize)
            .zip(1..)
            .filter(|((id, _), _)| *id != score.token);
        entries.extend(others.map(|(&(id, logprob), rank)| entry(id, logprob, rank)));
        Entries(entries)
    };
    std::iter::once(None)
        .chain(scores.iter().map(|score| Some(position(score))))
        .collect()
}
