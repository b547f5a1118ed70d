//! /tokenize and /detokenize, in vLLM's shapes.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::{Api, Asked, chat::conversation, error::Problem, fields::Fields};
use crate::{
    generate::{Input, Invalid},
    metrics::Call,
};

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

pub(super) async fn tokenize(api: &Api, asked: Asked, call: &mut Option<Call>) -> Result<Response, Problem> {
    let mut fields = Fields::parse(&asked.body)?;
    let model = fields.string("model")?.unwrap_or_default();
    let with_texts = fields.bool("return_token_strs")?.unwrap_or(false);
    let input = match fields.string("prompt")? {
        Some(text) => Input::Text {
            text,
            add_special: fields.bool("add_special_tokens")?.unwrap_or(true),
        },
        None => Input::Chat(conversation(&mut fields)?),
    };
    let ignored = asked.parsed(api, fields.finish()?);
    let entry = api.door.model(&model)?;
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
    let mut fields = Fields::parse(&asked.body)?;
    let model = fields.string("model")?.unwrap_or_default();
    let tokens = fields
        .ids("tokens")?
        .ok_or_else(|| Invalid::new("tokens", "is missing"))?;
    let skip_special = fields.bool("skip_special_tokens")?.unwrap_or(false);
    let ignored = asked.parsed(api, fields.finish()?);
    let entry = api.door.model(&model)?;
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
