//! What a template sees: the conversation, the names that the reference implementation defines, and the client's.

use jiff::Zoned;
use minijinja::{Error, ErrorKind, Value};
use serde_json::{Map, Value as Json};

/// What a chat template renders.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Objects with `role` and `content`, in order.
    pub messages: &'a [Json],
    /// End with the header of the model's turn.
    pub add_generation_prompt: bool,
    /// The client's further variables.
    pub args: &'a Map<String, Json>,
}

/// Texts of the tokens that templates name: `bos_token`, `eos_token` and their like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens(Vec<(&'static str, String)>);

const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl SpecialTokens {
    /// From tokenizer_config.json and, where that is silent, special_tokens_map.json.
    pub fn parse(tokenizer_config: &Json, special_tokens_map: &Json) -> Self {
        let text = |name: &str| {
            [tokenizer_config, special_tokens_map]
                .into_iter()
                .find_map(|file| {
                    let token = &file[name];
                    token.as_str().or(token["content"].as_str()).map(str::to_owned)
                })
        };
        Self(
            NAMES
                .into_iter()
                .filter_map(|name| Some((name, text(name)?)))
                .collect(),
        )
    }

    /// The text of a token by its name in the files, as `bos_token`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, text)| text.as_str())
    }
}

pub(super) fn context(conversation: &Conversation<'_>, tokens: &SpecialTokens, now: &Zoned) -> Value {
    let now = now.clone();
    let strftime_now = Value::from_function(move |format: String| strftime(&now, &format));
    let messages: Vec<Value> = conversation.messages.iter().map(value).collect();
    // `tools` and `documents` are defined, and none: templates ask `tools is not none`.
    let mut names: Vec<(Value, Value)> = vec![
        ("messages".into(), messages.into()),
        ("tools".into(), ().into()),
        ("documents".into(), ().into()),
        ("strftime_now".into(), strftime_now),
    ];
    names.extend(
        tokens
            .0
            .iter()
            .map(|(name, text)| (Value::from(*name), Value::from(text.as_str()))),
    );
    names.extend(
        conversation
            .args
            .iter()
            .map(|(name, arg)| (Value::from(name.as_str()), value(arg))),
    );
    names.push((
        "add_generation_prompt".into(),
        conversation.add_generation_prompt.into(),
    ));
    Value::from_pairs(names)
}

fn strftime(now: &Zoned, format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now).map_err(|error| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now('{format}'): {error}"),
        )
    })
}

fn value(json: &Json) -> Value {
    match json {
        Json::Null => ().into(),
        Json::Bool(bool) => (*bool).into(),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(int), ..) => int.into(),
            (_, Some(int), _) => int.into(),
            (.., float) => float.unwrap_or(f64::NAN).into(),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(items) => items.iter().map(value).collect::<Vec<Value>>().into(),
        Json::Object(entries) => Value::from_pairs(
            entries
                .iter()
                .map(|(key, item)| (Value::from(key.as_str()), value(item))),
        ),
    }
}
