//! The bodies of answers to /v1/chat/completions, whole and in chunks.

use serde::Serialize;

use super::super::{
    logprobs::{ChatLogprobs, Entries, RankedToken},
    render::{StopReason, UsageBody},
};
use crate::calls::{self, Calls, Heard};

/// A prompt's scores, by position.
pub(super) type PromptLogprobs = Vec<Option<Entries<RankedToken>>>;

#[derive(Serialize)]
pub(super) struct Completion<'a> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<Choice>,
    pub usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
pub(super) struct Choice {
    pub index: usize,
    pub message: Message,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: &'static str,
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
pub(super) struct Message {
    pub role: &'static str,
    /// null where there are calls and nothing else.
    pub content: Option<String>,
    /// Always null: no refusals are told apart from answers.
    pub refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

#[derive(Serialize)]
pub(super) struct ToolCall {
    /// In a stream: which of them, in every piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// In a stream: in the first piece, as is the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    pub function: Function,
}

#[derive(Serialize)]
pub(super) struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub arguments: String,
}

impl ToolCall {
    pub(super) fn whole(call: calls::Call) -> Self {
        Self {
            index: None,
            id: Some(call.id),
            kind: Some("function"),
            function: Function {
                name: Some(call.name),
                arguments: call.arguments,
            },
        }
    }

    fn begun(name: String) -> Self {
        Self::whole(calls::Call {
            id: calls::new_id(),
            name,
            arguments: String::new(),
        })
    }

    fn more(arguments: String) -> Self {
        Self {
            index: None,
            id: None,
            kind: None,
            function: Function {
                name: None,
                arguments,
            },
        }
    }
}

#[derive(Serialize)]
pub(super) struct Chunk<'a> {
    pub id: &'a str,
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<ChunkChoice>,
    /// null in all chunks but the last, where usage was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<UsageBody>>,
    /// In the first chunk, as are the prompt's ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
pub(super) struct ChunkChoice {
    pub index: u32,
    pub delta: Delta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Default, Serialize)]
pub(super) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<[ToolCall; 1]>,
}
/// What a piece of text becomes.
pub(super) fn deltas(calls: Option<&mut Calls>, text: String) -> Vec<Delta> {
    match calls {
        None if text.is_empty() => Vec::new(),
        None => vec![Delta::text(text)],
        Some(calls) => {
            let n_calls = calls.n_calls();
            as_deltas(n_calls, calls.push(&text))
        }
    }
}

/// `n_calls` came before.
pub(super) fn as_deltas(mut n_calls: usize, heard: Vec<Heard>) -> Vec<Delta> {
    let delta = |what| {
        let mut call = match what {
            Heard::Text(text) => return Delta::text(text),
            Heard::Call(name) => {
                n_calls += 1;
                ToolCall::begun(name)
            }
            Heard::Arguments(more) => ToolCall::more(more),
        };
        call.index = n_calls.checked_sub(1);
        Delta {
            tool_calls: Some([call]),
            ..Delta::default()
        }
    };
    heard.into_iter().map(delta).collect()
}

impl Delta {
    pub(super) fn text(text: String) -> Self {
        Self {
            content: Some(text),
            ..Self::default()
        }
    }
}

impl ChunkChoice {
    pub(super) fn of(index: u32, delta: Delta) -> Self {
        Self {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
        }
    }
}
