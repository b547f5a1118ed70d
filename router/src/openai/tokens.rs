//! /tokenize and /detokenize, in vLLM's shapes.

use axum::{
    Json,
    extract::{Query, State},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Api, Asked,
    chat::{conversation, tools},
    error::Problem,
    fields::Fields,
    known::Page,
};
use crate::{
    generate::{Fault, Input, Invalid},
    metrics::Call,
    models,
};

/// Of a tokenizer.json without a tokenizer_config.json that says more.
const DEFAULT_CLASS: &str = "PreTrainedTokenizerFast";

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Prompt {
    prompt: String,
}

/// What a request for tokens says.
struct ToTokenize {
    model: String,
    with_texts: bool,
    input: Input,
}

impl ToTokenize {
    fn read(fields: &mut Fields) -> Result<Self, Invalid> {
        Ok(Self {
            model: fields.string("model")?.unwrap_or_default(),
            with_texts: fields.bool("return_token_strs")?.unwrap_or(false),
            input: match fields.string("prompt")? {
                Some(text) => Input::Text {
                    text,
                    add_special: fields.bool("add_special_tokens")?.unwrap_or(true),
                },
                None => {
                    let tools = tools(fields)?;
                    let mut chat = conversation(fields)?;
                    tools.show(&mut chat);
                    Input::Chat(chat)
                }
            },
        })
    }
}

/// What a request for a text says.
struct ToDetokenize {
    model: String,
    tokens: Vec<u32>,
    skip_special: bool,
}

impl ToDetokenize {
    fn read(fields: &mut Fields) -> Result<Self, Invalid> {
        Ok(Self {
            model: fields.string("model")?.unwrap_or_default(),
            tokens: fields
                .ids("tokens")?
                .ok_or_else(|| Invalid::new("tokens", "is missing"))?,
            skip_special: fields.bool("skip_special_tokens")?.unwrap_or(false),
        })
    }
}

pub(super) async fn tokenize(api: &Api, asked: Asked, call: &mut Option<Call>) -> Result<Response, Problem> {
    let mut fields = Fields::parse(Page::Tokenize, &asked.body)?;
    let ToTokenize {
        model,
        with_texts,
        input,
    } = ToTokenize::read(&mut fields)?;
    let ignored = asked.parsed(api, fields.finish()?);
    let entry = api.door.known(&model).await?;
    if let Some(call) = call {
        call.model(&entry.name);
    }
    let text = api.door.text(&entry).await?;
    let tokens = api.door.tokens(&entry, &text, input).await?;
    let strings = tokens
        .iter()
        .map(|&id| String::from_utf8_lossy(text.tokenizer.token_bytes(id)).into_owned());
    let token_strs = with_texts.then(|| strings.collect());
    let body = Tokens {
        count: tokens.len(),
        max_model_len: entry.max_model_len,
        token_strs,
        tokens,
    };
    Ok(ignored.named_in(Json(body).into_response()))
}

pub(super) async fn detokenize(
    api: &Api,
    asked: Asked,
    call: &mut Option<Call>,
) -> Result<Response, Problem> {
    let mut fields = Fields::parse(Page::Detokenize, &asked.body)?;
    let ToDetokenize {
        model,
        tokens,
        skip_special,
    } = ToDetokenize::read(&mut fields)?;
    let ignored = asked.parsed(api, fields.finish()?);
    let entry = api.door.known(&model).await?;
    if let Some(call) = call {
        call.model(&entry.name);
    }
    let text = api.door.text(&entry).await?;
    let bytes = text.tokenizer.decode(&tokens, skip_special);
    let body = Prompt {
        prompt: String::from_utf8_lossy(&bytes).into_owned(),
    };
    Ok(ignored.named_in(Json(body).into_response()))
}

/// Which model, where there are several.
#[derive(Deserialize)]
pub(super) struct Which {
    #[serde(default)]
    model: String,
}

/// What a model's tokenizer is made of, in vLLM's shape, where the operator lets it be told.
pub(super) async fn tokenizer_info(
    State(api): State<Api>,
    Query(Which { model }): Query<Which>,
) -> Result<Response, Problem> {
    if !api.settings.tokenizer_info {
        let why = "/tokenizer_info is not served here; start the router with --tokenizer-info";
        return Err(Problem::NoRoute(why.into()));
    }
    let entry = api.door.known(&model).await?;
    // Refused as elsewhere where there are no files, or none that give a tokenizer.
    api.door.text(&entry).await?;
    let files = entry.files.as_deref().expect("a text is read from files");
    let mut info = models::tokenizer_config(files).map_err(|error| Fault::Model {
        model: entry.name.clone(),
        why: error.to_string(),
    })?;
    // Clients want to find it.
    let class = info.entry("tokenizer_class").or_insert(Value::Null);
    if !class.is_string() {
        *class = DEFAULT_CLASS.into();
    }
    Ok(Json(info).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::known::assert_reads;

    #[test]
    fn what_is_served_is_read() {
        let conversation = br#"{"messages": [{"role": "user", "content": "q"}]}"#;
        let mut fields = Fields::parse(Page::Tokenize, conversation).expect("an object");
        ToTokenize::read(&mut fields).expect("sound");
        assert_reads(Page::Tokenize, &fields.asked_for);
        let mut fields = Fields::parse(Page::Detokenize, br#"{"tokens": [1]}"#).expect("an object");
        ToDetokenize::read(&mut fields).expect("sound");
        assert_reads(Page::Detokenize, &fields.asked_for);
    }
}
