//! /v1/chat/completions.

use std::convert::Infallible;

use axum::{
    Json,
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
    waiting,
};
use crate::{
    ask::Score,
    calls::{self, Calls, Heard},
    generate::{Chat, Fault, Input, Invalid, Piece, Reply, Request, Unasked},
    metrics::Call,
    tools::{Choice as ToolChoice, Tools, earlier_calls},
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
    /// Functions that the answer may call, and how many of them at most.
    callable: Vec<String>,
    most_calls: usize,
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
    /// null where there are calls and nothing else.
    content: Option<String>,
    /// Always null: no refusals are told apart from answers.
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

#[derive(Serialize)]
struct ToolCall {
    /// In a stream: which of them, in every piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    /// In a stream: in the first piece, as is the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: Function,
}

#[derive(Serialize)]
struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl ToolCall {
    fn whole(call: calls::Call) -> Self {
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
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolCall; 1]>,
}

/// Answers a conversation. The call is taken where the response goes on after this returns.
pub(super) async fn chat(api: &Api, asked: Asked, call: &mut Option<Call>) -> Result<Response, Problem> {
    let mut fields = Fields::parse(Page::Chat, &asked.body)?;
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
        whole(&shape, api.door.start(prepared).await?).await?
    };
    Ok(ignored.named_in(response))
}

/// What a request says.
struct Parsed {
    common: Common,
    top: Option<u32>,
    chat: Chat,
    tools: Tools,
    most_calls: usize,
}

impl Parsed {
    fn read(fields: &mut Fields) -> Result<Self, Invalid> {
        let mut common = Common::read(fields, Unasked::ContextEnd)?;
        let mut tools = tools(fields)?;
        if let Some(choice) = tool_choice(fields)? {
            tools.choose(choice)?;
        }
        let mut chat = conversation(fields)?;
        tools.show(&mut chat);
        common.grammar = tools.grammar(common.grammar)?;
        common.marks_calls = !tools.callable().is_empty();
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        Ok(Self {
            common,
            top: top(fields)?,
            chat,
            tools,
            most_calls: if parallel { usize::MAX } else { 1 },
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

/// Functions, here and in /tokenize.
pub(super) fn tools(fields: &mut Fields) -> Result<Tools, Invalid> {
    Tools::new(fields.array("tools")?.unwrap_or_default())
}

fn tool_choice(fields: &mut Fields) -> Result<Option<ToolChoice>, Invalid> {
    let unknown = || {
        let why = "must be none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}";
        Invalid::new("tool_choice", why)
    };
    let choice = match fields.take("tool_choice") {
        None => return Ok(None),
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(unknown()),
        },
        Some(named) if named["type"] == "function" => {
            let name = named["function"]["name"].as_str().ok_or_else(unknown)?;
            ToolChoice::Named(name.to_owned())
        }
        Some(_) => return Err(unknown()),
    };
    Ok(Some(choice))
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
    let mut args = fields.object("chat_template_kwargs")?.unwrap_or_default();
    let documents = fields.array("documents")?.unwrap_or_default();
    if !documents.is_empty() {
        args.insert("documents".to_owned(), Value::Array(documents));
    }
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
    for (unserved, why) in [
        ("function_call", "use tool_calls"),
        ("audio", "only text goes in and out"),
    ] {
        if message
            .shift_remove(unserved)
            .is_some_and(|value| !value.is_null())
        {
            return Err(Invalid::unsupported(field(unserved), why));
        }
    }
    match message.shift_remove("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(calls)) if calls.is_empty() => {}
        Some(Value::Array(calls)) => {
            let calls = earlier_calls(&field("tool_calls"), calls)?;
            message.insert("tool_calls".to_owned(), calls);
        }
        Some(_) => return Err(Invalid::new(field("tool_calls"), "must be a list")),
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

/// What a piece of text becomes.
fn deltas(calls: Option<&mut Calls>, text: String) -> Vec<Delta> {
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
fn as_deltas(mut n_calls: usize, heard: Vec<Heard>) -> Vec<Delta> {
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
    fn text(text: String) -> Self {
        Self {
            content: Some(text),
            ..Self::default()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::known::assert_reads;

    #[test]
    fn a_choice_of_tools_has_its_forms() {
        let read = |choice: Value| {
            let body = serde_json::json!({"tool_choice": choice}).to_string();
            tool_choice(&mut Fields::parse(Page::Chat, body.as_bytes()).expect("an object"))
        };
        let named = serde_json::json!({"type": "function", "function": {"name": "f"}});
        assert_eq!(read(named), Ok(Some(ToolChoice::Named("f".into()))));
        assert_eq!(read("required".into()), Ok(Some(ToolChoice::Required)));
        assert_eq!(read(Value::Null), Ok(None));
        for bad in ["some".into(), 1.into(), serde_json::json!({"type": "function"})] {
            assert_eq!(read(bad).expect_err("no choice").field, "tool_choice");
        }
    }

    #[test]
    fn what_is_served_is_read() {
        let body =
            br#"{"messages": [{"role": "user", "content": "q"}], "stream": true, "stream_options": {}}"#;
        let mut fields = Fields::parse(Page::Chat, body).expect("an object");
        Parsed::read(&mut fields).expect("sound");
        assert_reads(Page::Chat, &fields.asked_for);
    }
}
