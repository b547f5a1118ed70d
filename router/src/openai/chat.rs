//! /v1/chat/completions: the answer to a conversation, whole or as a stream.

mod wire;

use std::convert::Infallible;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::Stream;

use self::wire::{Choice, Chunk, ChunkChoice, Completion, Delta, Message, ToolCall, as_deltas, deltas};
use super::{
    Api, Asked,
    conversation::Parsed,
    error::Problem,
    fields::Fields,
    known::Page,
    logprobs::{ChatLogprobs, Naming, prompt_logprobs},
    render::{DONE, Head, UsageAsked, UsageBody, ended, event, ids, one_event},
    waiting,
};
use crate::{
    ask::Score,
    calls::Calls,
    generate::{Fault, Gathered, Input, Piece, Reply, Request},
    metrics::Call,
};

/// What the response is made of, beside the answer.
struct Shape {
    head: Head,
    /// Alternatives of each token, where log-probabilities were asked for.
    top: Option<u32>,
    prompt_top: Option<u32>,
    ids_as_names: bool,
    token_ids: bool,
    usage: UsageAsked,
    /// Functions that the answer may call, and how many of them at most.
    callable: Vec<String>,
    most_calls: usize,
}

/// Answers a conversation. The call is taken where the response goes on after this returns.
pub(super) async fn chat(api: &Api, mut asked: Asked, call: &mut Option<Call>) -> Result<Response, Problem> {
    let mut fields = Fields::parse(Page::Chat, &asked.take_body())?;
    let Parsed {
        common,
        top,
        chat,
        tools,
        most_calls,
    } = Parsed::read(&mut fields)?;
    let ignored = asked.parsed(api, fields.finish()?);
    let prompt_top = common.prompt_logprobs;
    let prepared = api
        .door
        .prepare(Request {
            deadline: asked.deadline,
            ..common.request(Input::Chat(chat), top, prompt_top)
        })
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
        callable: tools.callable().to_vec(),
        most_calls,
    };
    let response = if common.stream {
        let door = api.door.clone();
        let opening = async move {
            let mut reply = door.start(prepared).await?;
            let first = reply.next().await?;
            Ok((reply, first))
        };
        waiting::stream(api, opening, call, |(reply, first), call| {
            stream(shape, reply, first, call)
        })
        .await?
    } else {
        let gathered = api.door.gather();
        whole(&shape, api.door.start(prepared).await?, &gathered).await?
    };
    Ok(ignored.named_in(response))
}

async fn whole(shape: &Shape, reply: Reply, gathered: &Gathered) -> Result<Response, Problem> {
    let text = std::sync::Arc::clone(&reply.text);
    let naming = Naming {
        tokenizer: &text.tokenizer,
        by_id: shape.ids_as_names,
    };
    let prompt = std::sync::Arc::clone(&reply.prompt);
    let (scores, answers, usage) = reply.collect(gathered).await?;
    let choices = answers.into_iter().enumerate().map(|(index, answer)| {
        let (finish_reason, stop_reason) = ended(&answer.end);
        let (content, tool_calls) = shape.spoken(answer.text);
        let finish_reason = after_calls(finish_reason, tool_calls.len());
        Choice {
            index,
            token_ids: shape.token_ids.then(|| ids(&answer.tokens)),
            logprobs: shape
                .top
                .map(|top| ChatLogprobs::new(naming, &answer.tokens, top)),
            message: Message {
                role: "assistant",
                content,
                refusal: None,
                tool_calls,
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
        let mut calls = shape.calls(reply.candidates());
        let mut next: Result<_, Fault> = Ok(first);
        let code = loop {
            match next {
                Ok(Some(piece)) => {
                    let mut out = Vec::new();
                    shape.chunks(&mut out, &reply, &mut calls, piece);
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

/// Where an answer ends by itself and has calls, it ended for them.
fn after_calls(finish_reason: &'static str, n_calls: usize) -> &'static str {
    if n_calls > 0 && finish_reason == "stop" {
        "tool_calls"
    } else {
        finish_reason
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
                tool_calls: None,
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

    /// What finds the calls of each candidate; nobody, where none can be called.
    fn calls(&self, candidates: usize) -> Vec<Calls> {
        let one = || Calls::new(&self.callable, self.most_calls);
        let n = if self.callable.is_empty() { 0 } else { candidates };
        (0..n).map(|_| one()).collect()
    }

    /// An answer's text, and its calls.
    fn spoken(&self, text: String) -> (Option<String>, Vec<ToolCall>) {
        let Some(calls) = self.calls(1).pop() else {
            return (Some(text), Vec::new());
        };
        let (content, found) = calls.split(&text);
        let found: Vec<ToolCall> = found.into_iter().map(ToolCall::whole).collect();
        let only_calls = content.is_empty() && !found.is_empty();
        ((!only_calls).then_some(content), found)
    }

    fn chunks(&self, out: &mut Vec<u8>, reply: &Reply, calls: &mut [Calls], piece: Piece) {
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
                let (mut logprobs, mut token_ids) = (logprobs, self.token_ids.then(|| ids(&tokens)));
                for delta in deltas(calls.get_mut(candidate as usize), text) {
                    one(ChunkChoice {
                        logprobs: logprobs.take(),
                        token_ids: token_ids.take(),
                        ..ChunkChoice::of(candidate, delta)
                    });
                }
                if logprobs.is_some() || token_ids.is_some() {
                    one(ChunkChoice {
                        logprobs,
                        token_ids,
                        ..ChunkChoice::of(candidate, Delta::text(String::new()))
                    });
                }
            }
            Piece::Finished { candidate, end } => {
                let (finish_reason, stop_reason) = ended(&end);
                let calls = calls.get_mut(candidate as usize);
                let (left, n_calls) = calls.map_or_else(Default::default, |calls| {
                    let (index, heard) = (calls.n_calls(), calls.finish());
                    (as_deltas(index, heard), calls.n_calls())
                });
                for delta in left {
                    one(ChunkChoice::of(candidate, delta));
                }
                let finish_reason = Some(after_calls(finish_reason, n_calls));
                one(ChunkChoice {
                    finish_reason,
                    stop_reason,
                    ..ChunkChoice::of(candidate, Delta::default())
                });
            }
        }
    }
}
