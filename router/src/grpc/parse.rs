//! From wire messages to requests; what only the wire can get wrong is refused here.

use std::{sync::Arc, time::Duration};

use prost_types::{Struct, Value as WireValue, value::Kind};
use serde_json::{Map, Number, Value, json};
use swallow_rpc::inference::v1 as wire;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    ask::{Grammar, Sampling},
    calls::{self, Calls},
    generate::{Chat, Input, Invalid, Request, Stop, Unasked},
    tools::{Choice, Tools, earlier_calls},
};

const MAX_REQUEST_ID_BYTES: usize = 128;
const MAX_STRUCT_DEPTH: usize = 32;
/// The length of a plain generation for which none is asked.
const DEFAULT_TOKENS: u32 = 16;

/// The client's own id, or a new one.
pub(super) fn request_id(given: String) -> Result<String, Invalid> {
    match given.len() {
        0 => Ok(Uuid::new_v4().simple().to_string()),
        1..=MAX_REQUEST_ID_BYTES => Ok(given),
        _ => Err(Invalid::new(
            "request_id",
            format!("must have at most {MAX_REQUEST_ID_BYTES} bytes"),
        )),
    }
}

pub(super) fn generate(wire: wire::GenerateRequest, deadline: Option<Instant>) -> Result<Request, Invalid> {
    use wire::generate_request::Prompt;
    let input = match wire.prompt {
        Some(Prompt::Text(text)) => Input::Text {
            text,
            add_special: wire.add_special_tokens.unwrap_or(true),
        },
        Some(Prompt::TokenIds(ids)) => {
            if wire.add_special_tokens == Some(true) {
                let why = "is for a text prompt; token ids are taken as they are";
                return Err(Invalid::new("add_special_tokens", why));
            }
            Input::Tokens(ids.ids)
        }
        None => return Err(Invalid::new("prompt", "is missing; give text or token_ids")),
    };
    Common {
        model: wire.model,
        sampling: wire.sampling,
        stop: wire.stop,
        logprobs: wire.logprobs,
        policy: wire.policy,
        candidate_count: wire.candidate_count,
        grammar: wire.grammar,
    }
    .request(input, Unasked::Tokens(DEFAULT_TOKENS), deadline)
}

/// A request, and what in its answers are calls.
pub(super) struct Conversation {
    pub request: Request,
    pub callable: Callable,
}

/// Functions of these names, and so many calls of them at most.
pub(super) struct Callable {
    names: Vec<String>,
    most: usize,
}

impl Callable {
    /// What finds the calls of an answer; nobody, where none can be called.
    pub(super) fn calls(&self) -> Option<Calls> {
        (!self.names.is_empty()).then(|| Calls::new(&self.names, self.most))
    }
}

pub(super) fn chat(wire: wire::ChatRequest, deadline: Option<Instant>) -> Result<Conversation, Invalid> {
    let args = wire
        .template_args
        .map(|args| object(args, 0))
        .transpose()?
        .unwrap_or_default();
    if let Some(name) = ["messages", "add_generation_prompt", "tools"]
        .into_iter()
        .find(|name| args.contains_key(*name))
    {
        return Err(Invalid::new(
            "template_args",
            format!("must not have '{name}', which the server sets"),
        ));
    }
    if wire
        .logprobs
        .as_ref()
        .is_some_and(|asked| asked.prompt || asked.prompt_top_n > 0)
    {
        return Err(Invalid::unsupported(
            "logprobs.prompt",
            "is not served for conversations; use GenerationService",
        ));
    }
    let mut tools = tools(wire.tools)?;
    if let Some(choice) = wire.tool_choice.map(tool_choice).transpose()? {
        tools.choose(choice)?;
    }
    let mut chat = conversation(wire.messages, args, wire.continue_final_message)?;
    tools.show(&mut chat);
    let common = Common {
        model: wire.model,
        sampling: wire.sampling,
        stop: wire.stop,
        logprobs: wire.logprobs,
        policy: wire.policy,
        candidate_count: wire.candidate_count,
        grammar: wire.grammar,
    };
    let mut request = common.request(Input::Chat(chat), Unasked::ContextEnd, deadline)?;
    request.grammar = tools.grammar(request.grammar)?;
    // Where calls are looked for, the token that marks them is text.
    request.shown = (!tools.callable().is_empty()).then_some(calls::TAG);
    Ok(Conversation {
        request,
        callable: Callable {
            names: tools.callable().to_vec(),
            most: if wire.single_tool_call { 1 } else { usize::MAX },
        },
    })
}

/// Functions as OpenAI writes them, which is what chat templates are made for.
pub(super) fn tools(tools: Vec<wire::Tool>) -> Result<Tools, Invalid> {
    let function = |(i, tool): (usize, wire::Tool)| {
        let mut function = json!({"name": tool.name});
        if !tool.description.is_empty() {
            function["description"] = tool.description.into();
        }
        if !tool.parameters.is_empty() {
            function["parameters"] = serde_json::from_str(&tool.parameters)
                .map_err(|_| Invalid::new(format!("tools[{i}].parameters"), "must be a JSON schema"))?;
        }
        Ok(json!({"type": "function", "function": function}))
    };
    let list: Result<_, Invalid> = tools.into_iter().enumerate().map(function).collect();
    Tools::new(list?).map_err(flat)
}

/// On this wire a function's fields are the tool's own.
fn flat(invalid: Invalid) -> Invalid {
    Invalid {
        field: invalid.field.replace(".function.", ".").into(),
        ..invalid
    }
}

fn tool_choice(wire: wire::ToolChoice) -> Result<Choice, Invalid> {
    use wire::tool_choice::{Choice as Given, Mode};
    let unknown = || Invalid::new("tool_choice", "must have a choice that this version knows");
    match wire.choice.ok_or_else(unknown)? {
        Given::Name(name) => Ok(Choice::Named(name)),
        Given::Mode(mode) => match Mode::try_from(mode) {
            Ok(Mode::Unspecified | Mode::Auto) => Ok(Choice::Auto),
            Ok(Mode::None) => Ok(Choice::None),
            Ok(Mode::Required) => Ok(Choice::Required),
            Err(_) => Err(unknown()),
        },
    }
}

/// A conversation that the model is to go on with.
pub(super) fn conversation(
    messages: Vec<wire::ChatMessage>,
    args: Map<String, Value>,
    continue_final: bool,
) -> Result<Chat, Invalid> {
    if messages.is_empty() {
        return Err(Invalid::new("messages", "must have at least one message"));
    }
    let messages = messages.into_iter().enumerate().map(message);
    Ok(Chat {
        messages: messages.collect::<Result<_, _>>()?,
        args,
        add_generation_prompt: !continue_final,
        continue_final,
        add_special: false,
    })
}

fn message((i, message): (usize, wire::ChatMessage)) -> Result<Value, Invalid> {
    let role = match message.role() {
        wire::Role::System => "system",
        wire::Role::User => "user",
        wire::Role::Assistant => "assistant",
        wire::Role::Tool => "tool",
        wire::Role::Unspecified => {
            return Err(Invalid::new(
                format!("messages[{i}].role"),
                "must be a role that this version knows",
            ));
        }
    };
    let field = |name: &str| format!("messages[{i}].{name}");
    let mut object = json!({"role": role, "content": message.content});
    if !message.tool_calls.is_empty() {
        if role != "assistant" {
            return Err(Invalid::new(
                field("tool_calls"),
                "are for the assistant's messages",
            ));
        }
        let call = |call: wire::ToolCall| {
            json!({"id": call.id, "type": "function",
                   "function": {"name": call.name, "arguments": call.arguments}})
        };
        let calls = message.tool_calls.into_iter().map(call).collect();
        object["tool_calls"] = earlier_calls(&field("tool_calls"), calls).map_err(flat)?;
    }
    if !message.tool_call_id.is_empty() {
        if role != "tool" {
            return Err(Invalid::new(field("tool_call_id"), "is for a tool's messages"));
        }
        object["tool_call_id"] = message.tool_call_id.into();
    }
    Ok(object)
}

/// What both kinds of requests have.
struct Common {
    model: String,
    sampling: Option<wire::SamplingParams>,
    stop: Option<wire::StopCriteria>,
    logprobs: Option<wire::LogprobOptions>,
    policy: Option<wire::RequestPolicy>,
    candidate_count: u32,
    grammar: Option<wire::Grammar>,
}

impl Common {
    fn request(self, input: Input, unasked: Unasked, deadline: Option<Instant>) -> Result<Request, Invalid> {
        let logprobs = self.logprobs.unwrap_or_default();
        let policy = self.policy.unwrap_or_default();
        Ok(Request {
            model: self.model,
            input,
            sampling: sampling(self.sampling.unwrap_or_default()),
            stop: stop(self.stop.unwrap_or_default(), unasked)?,
            grammar: self.grammar.map(grammar).transpose()?.map(Arc::new),
            logprobs: switched(
                "logprobs.top_n",
                "logprobs.output",
                logprobs.output,
                logprobs.top_n,
            )?,
            prompt_logprobs: switched(
                "logprobs.prompt_top_n",
                "logprobs.prompt",
                logprobs.prompt,
                logprobs.prompt_top_n,
            )?,
            prompt_logprobs_from: 1,
            candidates: self.candidate_count.max(1),
            skip_special: true,
            shown: None,
            cache_salt: policy.cache_salt,
            max_queue_wait: policy.max_queue_wait.map(wait).transpose()?,
            deadline,
        })
    }
}

fn grammar(wire: wire::Grammar) -> Result<Grammar, Invalid> {
    use wire::grammar::Source;
    match wire.source {
        Some(Source::JsonSchema(schema)) => Ok(Grammar::JsonSchema(schema)),
        Some(Source::Regex(regex)) => Ok(Grammar::Regex(regex)),
        Some(Source::Lark(lark)) => Ok(Grammar::Lark(lark)),
        None => Err(Invalid::new(
            "grammar",
            "must have a source that this version knows",
        )),
    }
}

fn switched(field: &'static str, switch: &str, on: bool, top_n: u32) -> Result<Option<u32>, Invalid> {
    match (on, top_n) {
        (true, top_n) => Ok(Some(top_n)),
        (false, 0) => Ok(None),
        (false, _) => Err(Invalid::new(field, format!("needs {switch} to be true"))),
    }
}

pub(super) fn wait(wire: prost_types::Duration) -> Result<Duration, Invalid> {
    Duration::try_from(wire).map_err(|_| Invalid::new("policy.max_queue_wait", "must not be negative"))
}

fn sampling(wire: wire::SamplingParams) -> Sampling {
    Sampling {
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        repetition_penalty: wire.repetition_penalty,
        seed: wire.seed,
        logit_bias: wire.logit_bias.into_iter().collect(),
    }
}

fn stop(wire: wire::StopCriteria, unasked: Unasked) -> Result<Stop, Invalid> {
    Ok(Stop {
        max_tokens: wire.max_output_tokens,
        unasked,
        min_tokens: wire.min_output_tokens.unwrap_or(0),
        strings: Stop::compile(wire.stop_strings)?,
        token_ids: wire.stop_token_ids,
        ignore_eos: wire.ignore_eos,
        include: wire.include_stop_in_output,
    })
}

fn object(wire: Struct, depth: usize) -> Result<Map<String, Value>, Invalid> {
    wire.fields
        .into_iter()
        .map(|(name, value)| Ok((name, json_value(value, depth + 1)?)))
        .collect()
}

fn json_value(wire: WireValue, depth: usize) -> Result<Value, Invalid> {
    if depth > MAX_STRUCT_DEPTH {
        return Err(Invalid::new(
            "template_args",
            format!("must not be nested deeper than {MAX_STRUCT_DEPTH}"),
        ));
    }
    Ok(match wire.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(on)) => on.into(),
        // The wire has floats only; a template prints 3, not 3.0.
        Some(Kind::NumberValue(number)) if number.fract() == 0.0 && number.abs() < 9e15 => {
            (number as i64).into()
        }
        Some(Kind::NumberValue(number)) => Number::from_f64(number)
            .ok_or_else(|| Invalid::new("template_args", "must not have numbers that are not finite"))?
            .into(),
        Some(Kind::StringValue(text)) => text.into(),
        Some(Kind::StructValue(entries)) => object(entries, depth)?.into(),
        Some(Kind::ListValue(items)) => items
            .values
            .into_iter()
            .map(|item| json_value(item, depth + 1))
            .collect::<Result<Vec<_>, _>>()?
            .into(),
    })
}
