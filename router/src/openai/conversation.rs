//! What a request to /v1/chat/completions says: messages, functions and which of them to call.
//!
//! /tokenize reads the same messages and functions. A message's content becomes one text here; what else it holds is the
//! template's to read.

use serde_json::{Map, Value};

use super::{fields::Fields, params::Common};
use crate::{
    generate::{Chat, Invalid, MAX_TOP, Unasked},
    tools::{Choice, Tools, earlier_calls},
};

const MAX_MESSAGES: usize = 4096;
const MAX_ROLE_BYTES: usize = 64;
/// Variables of the template that are not the client's to set beside the fields that they come from.
const OWN_FIELDS: [&str; 4] = ["messages", "add_generation_prompt", "tools", "documents"];

/// What a request says.
pub(super) struct Parsed {
    pub common: Common,
    /// Alternatives of each token, where log-probabilities were asked for.
    pub top: Option<u32>,
    pub chat: Chat,
    pub tools: Tools,
    /// Calls that one answer may have.
    pub most_calls: usize,
}

impl Parsed {
    pub(super) fn read(fields: &mut Fields) -> Result<Self, Invalid> {
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
        (true, Some(top)) if top > MAX_TOP => Err(Invalid::new(
            "top_logprobs",
            format!("must be from 0 to {MAX_TOP}, and is {top}"),
        )),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// Functions, here and in /tokenize.
pub(super) fn tools(fields: &mut Fields) -> Result<Tools, Invalid> {
    Tools::new(fields.array("tools")?.unwrap_or_default())
}

fn tool_choice(fields: &mut Fields) -> Result<Option<Choice>, Invalid> {
    let unknown = || {
        let why = "must be none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ...}}";
        Invalid::new("tool_choice", why)
    };
    let choice = match fields.take("tool_choice") {
        None => return Ok(None),
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => Choice::None,
            "auto" => Choice::Auto,
            "required" => Choice::Required,
            _ => return Err(unknown()),
        },
        Some(named) if named["type"] == "function" => {
            let name = named["function"]["name"].as_str().ok_or_else(unknown)?;
            Choice::Named(name.to_owned())
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
    if let Some(name) = OWN_FIELDS.into_iter().find(|name| args.contains_key(*name)) {
        return Err(Invalid::new(
            "chat_template_kwargs",
            format!("must not have '{name}', a field of its own"),
        ));
    }
    let documents = fields.array("documents")?.unwrap_or_default();
    if !documents.is_empty() {
        args.insert("documents".to_owned(), Value::Array(documents));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::known::{Page, assert_reads};

    #[test]
    fn a_choice_of_tools_has_its_forms() {
        let read = |choice: Value| {
            let body = serde_json::json!({"tool_choice": choice}).to_string();
            tool_choice(&mut Fields::parse(Page::Chat, body.as_bytes()).expect("an object"))
        };
        let named = serde_json::json!({"type": "function", "function": {"name": "f"}});
        assert_eq!(read(named), Ok(Some(Choice::Named("f".into()))));
        assert_eq!(read("required".into()), Ok(Some(Choice::Required)));
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
