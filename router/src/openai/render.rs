//! What both kinds of answers are written with: usage, ends, events, finite numbers.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;

use crate::generate::{End, Spoken, Usage};

/// What a response says of itself, in each of its chunks too.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub id: String,
    /// Seconds of Unix time.
    pub created: u64,
    /// The model's first served name.
    pub model: String,
}

impl Head {
    pub(super) fn new(prefix: &str, request_id: &str, model: &str) -> Self {
        Self {
            id: format!("{prefix}-{request_id}"),
            created: unix_seconds(),
            model: model.to_owned(),
        }
    }
}

/// Now. A clock before 1970 is no reason not to answer.
pub(super) fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl UsageBody {
    pub(super) fn new(all: impl IntoIterator<Item = Usage>) -> Self {
        let mut sum = Usage::default();
        for usage in all {
            sum.prompt_tokens = sum.prompt_tokens.saturating_add(usage.prompt_tokens);
            sum.output_tokens = sum.output_tokens.saturating_add(usage.output_tokens);
            sum.cached_tokens = sum.cached_tokens.saturating_add(usage.cached_tokens);
        }
        Self {
            prompt_tokens: sum.prompt_tokens,
            completion_tokens: sum.output_tokens,
            total_tokens: sum.prompt_tokens.saturating_add(sum.output_tokens),
            prompt_tokens_details: PromptDetails {
                cached_tokens: sum.cached_tokens,
            },
        }
    }
}

/// Where a stream tells its usage.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UsageAsked {
    /// In a last chunk of its own.
    pub last: bool,
    /// In each chunk, as it is by then.
    pub each: bool,
}

impl UsageAsked {
    /// The field of a chunk with choices: absent, null, or what was used so far.
    pub(super) fn in_chunk(self, so_far: impl FnOnce() -> UsageBody) -> Option<Option<UsageBody>> {
        match self {
            Self { each: true, .. } => Some(Some(so_far())),
            Self { last: true, .. } => Some(None),
            Self { .. } => None,
        }
    }
}

/// What stopped a candidate, as vLLM tells it.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    Text(String),
    Token(u32),
}

/// `finish_reason` and `stop_reason`.
pub(super) fn ended(end: &End) -> (&'static str, Option<StopReason>) {
    match end {
        End::Eos(_) => ("stop", None),
        End::StopToken(id) => ("stop", Some(StopReason::Token(*id))),
        End::StopString(text) => ("stop", Some(StopReason::Text(text.clone()))),
        End::Length => ("length", None),
    }
}

/// Of tokens.
pub(super) fn ids(tokens: &[Spoken]) -> Vec<u32> {
    tokens.iter().map(|spoken| spoken.token).collect()
}

/// JSON has no infinities: what can't happen is as unlikely as it gets.
pub(super) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// The last event of a whole stream.
pub(super) const DONE: &str = "data: [DONE]\n\n";

/// Appends one server-sent event.
pub(super) fn event(out: &mut Vec<u8>, body: &impl Serialize) {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, body).expect("string keys and writing to memory can't fail");
    out.extend_from_slice(b"\n\n");
}

/// One server-sent event.
pub(super) fn one_event(body: &impl Serialize) -> Bytes {
    let mut out = Vec::new();
    event(&mut out, body);
    out.into()
}
