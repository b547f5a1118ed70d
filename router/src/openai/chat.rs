//! /v1/chat/completions.

use std::convert::Infallible;

use axum::{
    Json,
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::Stream;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Api, Asked,
    error::Problem,
    fields::Fields,
    known::Page,
    logprobs::{ChatLogprobs, Entries, Naming, RankedToken, prompt_logprobs},
    params::Common,
    render::{DONE, Head, StopReason, UsageAsked, UsageBody, ended, event, ids, one_event},
    sse,
};
use crate::{
    ask::Score,
    generate::{Chat, Fault, Input, Invalid, Piece, Reply, Unasked},
    metrics::Call,
};

const MAX_MESSAGES: usize = 4096;
const MAX_ROLE_BYTES: usize = 64;

/// What the response is made of, beside the answer.
struct Shape {
    head: Head,
    /// Alternatives of each token, where log-probabilities were asked for.
    top: Option<u32>,
    prompt_top: Option<u32>,
    ids_as_names: bool,
    token_ids: bool,
    usage: UsageAsked,
}

/// A prompt's scores, by position.
type PromptLogprobs = Vec<Option<Entries<RankedToken>>>;

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice>,
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Choice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    /// Always null: no refusals are told apart from answers.
    refusal: Option<()>,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChunkChoice>,
    /// null in all chunks but the last, where usage was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    /// In the first chunk, as are the prompt's ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: u32,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Answers a conversation. The call is taken where the response goes on after this returns.
pub(super) async fn chat(api: &Api, asked: Asked, call: &mut Option<Call>) -> Result<Response, Problem> {
    let mut fields = Fields::parse(Page::Chat, &asked.body)?;
    let Parsed { common, top, chat } = Parsed::read(&mut fields)?;
    let ignored = asked.parsed(api, fields.finish()?);
    let prompt_top = common.prompt_logprobs;
    let prepared = api
        .door
        .prepare(common.request(Input::Chat(chat), top, prompt_top))
        .await?;
    if let Some(call) = call {
        call.model(&prepared.entry.name);
    }
    let head = Head::new("chatcmpl", &asked.id, &prepared.entry.name);
    let shape = Shape {
        head,
        top,
        prompt_top,
        ids_as_names: common.ids_as_names,
        token_ids: common.token_ids,
        usage: common.usage,
    };
    let mut reply = api.door.start(prepared).await?;
    let response = if common.stream {
        // The first piece decides the status: what fails before it is an error response, not a broken stream.
        let first = reply.next().await?;
        sse(Body::from_stream(stream(shape, reply, first, call.take())))
    } else {
        whole(&shape, reply).await?
    };
    Ok(ignored.named_in(response))
}

/// What a request says.
struct Parsed {
    common: Common,
    top: Option<u32>,
    chat: Chat,
}

impl Parsed {
    fn read(fields: &mut Fields) -> Result<Self, Invalid> {
        Ok(Self {
            common: Common::read(fields, Unasked::ContextEnd)?,
            top: top(fields)?,
            chat: conversation(fields)?,
        })
    }
}

/// `logprobs` is a switch here and `top_logprobs` the number.
fn top(fields: &mut Fields) -> Result<Option<u32>, Invalid> {
    let on = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs")?;
    match (on, top) {
        (false, Some(1..)) => Err(Invalid::new("top_logprobs", "needs logprobs to be true")),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// The conversation's own fields, here and in /tokenize.
pub(super) fn conversation(fields: &mut Fields) -> Result<Chat, Invalid> {
    let messages = fields.array("messages")?.unwrap_or_default();
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        return Err(Invalid::new(
            "messages",
            format!("must be a list of 1 to {MAX_MESSAGES} messages"),
        ));
    }
    let args = fields.object("chat_template_kwargs")?.unwrap_or_default();
    if let Some(name) = ["messages", "add_generation_prompt"]
        .into_iter()
        .find(|name| args.contains_key(*name))
    {
        return Err(Invalid::new(
            "chat_template_kwargs",
            format!("must not have '{name}', a field of its own"),
        ));
    }
    let continue_final = fields.bool("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.bool("add_generation_prompt")?;
    if continue_final && add_generation_prompt == Some(true) {
        let why = "the model can't go on with the last message and begin its own; give one of continue_final_message \
                   and add_generation_prompt";
        return Err(Invalid::new("add_generation_prompt", why));
    }
    Ok(Chat {
        messages: messages
            .into_iter()
            .enumerate()
            .map(|(i, value)| message(i, value))
            .collect::<Result<_, _>>()?,
        args,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final),
        continue_final,
        add_special: fields.bool("add_special_tokens")?.unwrap_or(false),
    })
}

/// A message whose content is one text. What else it holds goes to the template as it is.
fn message(i: usize, value: Value) -> Result<Value, Invalid> {
    let field = |name: &str| format!("messages[{i}].{name}");
    let Value::Object(mut message) = value else {
        return Err(Invalid::new(
            format!("messages[{i}]"),
            "must be an object with role and content",
        ));
    };
    match message.get("role").and_then(Value::as_str) {
        Some(role) if !role.is_empty() && role.len() <= MAX_ROLE_BYTES => {}
        _ => {
            return Err(Invalid::new(
                field("role"),
                format!("must be a string of 1 to {MAX_ROLE_BYTES} bytes"),
            ));
        }
    }
    for unserved in ["tool_calls", "function_call", "audio"] {
        match message.remove(unserved) {
            None | Some(Value::Null) => {}
            Some(Value::Array(items)) if items.is_empty() => {}
            Some(_) => {
                return Err(Invalid::unsupported(
                    field(unserved),
                    "tool calls and audio are not supported",
                ));
            }
        }
    }
    let content = match message.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts: Vec<&str> = parts
                .iter()
                .enumerate()
                .map(|(p, part)| {
                    text_part(part).ok_or_else(|| {
                        let why = "must be {\"type\": \"text\", \"text\": ...}: only text goes in";
                        Invalid::unsupported(format!("messages[{i}].content[{p}]"), why)
                    })
                })
                .collect::<Result<_, _>>()?;
            texts.join("\n")
        }
        Some(_) => {
            return Err(Invalid::new(
                field("content"),
                "must be a string or a list of text parts",
            ));
        }
    };
    message.insert("content".to_owned(), Value::String(content));
    Ok(Value::Object(message))
}

fn text_part(part: &Value) -> Option<&str> {
    let part: &Map<String, Value> = part.as_object()?;
    (part.get("type")?.as_str()? == "text").then(|| part.get("text")?.as_str())?
}

async fn whole(shape: &Shape, reply: Reply) -> Result<Response, Problem> {
    let text = std::sync::Arc::clone(&reply.text);
    let naming = Naming {
        tokenizer: &text.tokenizer,
        by_id: shape.ids_as_names,
    };
    let prompt = std::sync::Arc::clone(&reply.prompt);
    let (scores, answers, usage) = reply.collect().await?;
    let choices = answers.into_iter().enumerate().map(|(index, answer)| {
        let (finish_reason, stop_reason) = ended(&answer.end);
        Choice {
            index,
            token_ids: shape.token_ids.then(|| ids(&answer.tokens)),
            logprobs: shape
                .top
                .map(|top| ChatLogprobs::new(naming, &answer.tokens, top)),
            message: Message {
                role: "assistant",
                content: answer.text,
                refusal: None,
            },
            finish_reason,
            stop_reason,
        }
    });
    let Head { id, created, model } = &shape.head;
    let completion = Completion {
        id,
        object: "chat.completion",
        created: *created,
        model,
        choices: choices.collect(),
        usage: UsageBody::new([usage]),
        prompt_logprobs: shape.prompt_top.map(|top| prompt_logprobs(naming, &scores, top)),
        prompt_token_ids: shape.token_ids.then(|| prompt.to_vec()),
    };
    Ok(Json(completion).into_response())
}

fn stream(
    shape: Shape,
    mut reply: Reply,
    first: Option<Piece>,
    mut call: Option<Call>,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let mut next: Result<_, Fault> = Ok(first);
        let code = loop {
            match next {
                Ok(Some(piece)) => {
                    let mut out = Vec::new();
                    shape.chunks(&mut out, &reply, piece);
                    if !out.is_empty() {
                        yield Ok(Bytes::from(out));
                    }
                }
                Ok(None) => {
                    if shape.usage.last {
                        let usage = Some(UsageBody::new([reply.usage()]));
                        yield Ok(one_event(&shape.chunk(Vec::new(), Some(usage))));
                    }
                    yield Ok(Bytes::from_static(DONE.as_bytes()));
                    break tonic::Code::Ok;
                }
                Err(fault) => {
                    let code = fault.code();
                    yield Ok(one_event(&Problem::Fault(fault).body()));
                    break code;
                }
            }
            next = reply.next().await;
        };
        if let Some(call) = &mut call {
            call.ended(code);
        }
    }
}

impl ChunkChoice {
    fn of(index: u32, delta: Delta) -> Self {
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

impl Shape {
    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Option<UsageBody>>) -> Chunk<'_> {
        let Head { id, created, model } = &self.head;
        Chunk {
            id,
            object: "chat.completion.chunk",
            created: *created,
            model,
            choices,
            usage,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }

    /// The first chunks say who speaks, and the very first what is known of the prompt.
    fn opening(&self, out: &mut Vec<u8>, reply: &Reply, scores: &[Score]) {
        let naming = self.naming(reply);
        for index in 0..reply.candidates() as u32 {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            let usage = self.usage.in_chunk(|| UsageBody::new([reply.usage()]));
            let mut chunk = self.chunk(vec![ChunkChoice::of(index, delta)], usage);
            if index == 0 {
                chunk.prompt_logprobs = self.prompt_top.map(|top| prompt_logprobs(naming, scores, top));
                chunk.prompt_token_ids = self.token_ids.then(|| reply.prompt.to_vec());
            }
            event(out, &chunk);
        }
    }

    fn naming<'a>(&self, reply: &'a Reply) -> Naming<'a> {
        Naming {
            tokenizer: &reply.text.tokenizer,
            by_id: self.ids_as_names,
        }
    }

    fn chunks(&self, out: &mut Vec<u8>, reply: &Reply, piece: Piece) {
        let usage = self.usage.in_chunk(|| UsageBody::new([reply.usage()]));
        let mut one = |choice: ChunkChoice| event(out, &self.chunk(vec![choice], usage));
        match piece {
            // The prompt's scores are still to come.
            Piece::Started { .. } if self.prompt_top.is_some() => {}
            Piece::Started { .. } => self.opening(out, reply, &[]),
            Piece::PromptScores(scores) => self.opening(out, reply, &scores),
            Piece::Delta {
                candidate,
                text,
                tokens,
            } => {
                let naming = self.naming(reply);
                let logprobs = self.top.map(|top| ChatLogprobs::new(naming, &tokens, top));
                if !text.is_empty() || logprobs.is_some() || self.token_ids {
                    let delta = Delta {
                        role: None,
                        content: Some(text),
                    };
                    one(ChunkChoice {
                        logprobs,
                        token_ids: self.token_ids.then(|| ids(&tokens)),
                        ..ChunkChoice::of(candidate, delta)
                    });
                }
            }
            Piece::Finished { candidate, end } => {
                let (finish_reason, stop_reason) = ended(&end);
                let finish_reason = Some(finish_reason);
                one(ChunkChoice {
                    finish_reason,
                    stop_reason,
                    ..ChunkChoice::of(candidate, Delta::default())
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::known::assert_reads;

    #[test]
    fn what_is_served_is_read() {
        let body =
            br#"{"messages": [{"role": "user", "content": "q"}], "stream": true, "stream_options": {}}"#;
        let mut fields = Fields::parse(Page::Chat, body).expect("an object");
        Parsed::read(&mut fields).expect("sound");
        assert_reads(Page::Chat, &fields.asked_for);
    }
}
