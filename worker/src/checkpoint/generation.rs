//! What the model's files say about sampling, and all the tokens that end its texts.
//!
//! A server's convention differs from a library call's: the values in generation_config.json are the defaults of
//! requests that name none, whatever `do_sample` says, and what is absent there is neutral. So a model without that
//! file samples at temperature 1, and `do_sample: false` alone does not make it greedy: a client that wants greedy
//! decoding asks for temperature 0.

use std::{collections::BTreeSet, path::Path};

use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use super::{config::LlamaConfig, error::CheckpointError, json::Fields, text_files::TextFiles};

/// generation_config.json. What is absent there is None here, and neutral in effect.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Above 0 and at most 1.
    pub top_p: Option<f32>,
    /// 0 filters nothing.
    pub top_k: Option<u32>,
    /// From 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0; 1 changes nothing.
    pub repetition_penalty: Option<f32>,
    /// Kept for reports; it decides nothing (see the module's text).
    pub do_sample: Option<bool>,
    /// The tokens that end a text, as this file alone names them.
    pub eos_token_ids: Vec<u32>,
    /// Keys that are set and would change sampling, but that this server has no such default for. Worth a log line.
    pub unused: Vec<String>,
}

/// Sampling keys of transformers that are not served as defaults, with the value that changes nothing.
const UNUSED: [(&str, Option<f64>); 15] = [
    ("typical_p", Some(1.0)),
    ("top_h", None),
    ("epsilon_cutoff", Some(0.0)),
    ("eta_cutoff", Some(0.0)),
    ("num_beams", Some(1.0)),
    ("penalty_alpha", Some(0.0)),
    ("no_repeat_ngram_size", Some(0.0)),
    ("encoder_repetition_penalty", Some(1.0)),
    ("bad_words_ids", None),
    ("suppress_tokens", None),
    ("begin_suppress_tokens", None),
    ("sequence_bias", None),
    ("forced_bos_token_id", None),
    ("forced_eos_token_id", None),
    ("guidance_scale", Some(1.0)),
];

impl GenerationConfig {
    /// Reads generation_config.json; all None where the model has none.
    pub fn read(files: &TextFiles) -> Result<GenerationConfig, CheckpointError> {
        const NAME: &str = "generation_config.json";
        match files.get(NAME) {
            None => Ok(GenerationConfig::default()),
            Some(file) => GenerationConfig::parse(&files.path(NAME), &file.bytes),
        }
    }

    /// Reads the text of a generation_config.json; `file` is its name in messages.
    pub fn parse(file: &Path, text: &[u8]) -> Result<GenerationConfig, CheckpointError> {
        let fields = Fields::parse(file, text)?;
        let number = |key, expected, fits: fn(f64) -> bool| {
            fields.number(key, expected, fits).map(|x| x.map(|x| x as f32))
        };
        let top_k = match fields.get("top_k") {
            None => None,
            Some(value) => {
                let k = value.as_u64().and_then(|k| u32::try_from(k).ok());
                Some(k.ok_or_else(|| fields.wrong("top_k", "a whole number of at least 0"))?)
            }
        };
        let is_set = |key: &str, neutral: Option<f64>| {
            fields
                .get(key)
                .is_some_and(|value| neutral.is_none() || value.as_f64() != neutral)
        };
        let unused = UNUSED.iter().filter(|(key, neutral)| is_set(key, *neutral));
        Ok(GenerationConfig {
            temperature: number("temperature", "a number of at least 0", |x| x >= 0.0)?,
            top_p: number("top_p", "a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?,
            top_k,
            min_p: number("min_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: number("repetition_penalty", "a number above 0", |x| x > 0.0)?,
            do_sample: fields.flag("do_sample")?,
            eos_token_ids: fields.token_ids("eos_token_id", None)?,
            unused: unused.map(|(key, _)| (*key).to_owned()).collect(),
        })
    }
}

/// The id of tokenizer_config.json's `eos_token`, looked up in tokenizer.json; None where no such token is named.
pub fn tokenizer_eos(files: &TextFiles) -> Result<Option<u32>, CheckpointError> {
    const NAME: &str = "tokenizer_config.json";
    let Some(file) = files.get(NAME) else {
        return Ok(None);
    };
    let fields = Fields::parse(&files.path(NAME), &file.bytes)?;
    let token = match fields.get("eos_token") {
        None => return Ok(None),
        Some(Value::String(token)) => token,
        Some(object) => match object.get("content") {
            Some(Value::String(token)) => token,
            _ => return Err(fields.wrong("eos_token", "a string, or an object with a string `content`")),
        },
    };
    let tokenizer = files
        .get("tokenizer.json")
        .expect("TextFiles::read refuses a folder without it");
    match token_id(token, &tokenizer.bytes) {
        Ok(Some(id)) => Ok(Some(id)),
        Ok(None) => Err(fields.wrong_advised(
            "eos_token",
            "a token of tokenizer.json",
            "the two files must be of one model",
        )),
        Err(source) => Err(CheckpointError::Json {
            file: files.path("tokenizer.json").into(),
            source,
        }),
    }
}

/// The id of `token` in a tokenizer.json: among its added tokens, where special tokens are, or else in its vocabulary.
fn token_id(token: &str, tokenizer: &[u8]) -> Result<Option<u32>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Added {
        #[serde(default)]
        added_tokens: Vec<AddedToken>,
    }
    #[derive(Deserialize)]
    struct AddedToken {
        id: u32,
        content: String,
    }
    #[derive(Deserialize)]
    struct Whole {
        model: Model,
    }
    // The vocabulary is an object in most kinds of model and a list of pairs in Unigram.
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Vocab {
        Ids(std::collections::HashMap<String, u32>),
        Other(IgnoredAny),
    }
    #[derive(Deserialize)]
    struct Model {
        vocab: Option<Vocab>,
    }
    let added: Added = serde_json::from_slice(tokenizer)?;
    if let Some(found) = added.added_tokens.iter().find(|added| added.content == token) {
        return Ok(Some(found.id));
    }
    let whole: Whole = serde_json::from_slice(tokenizer)?;
    match whole.model.vocab {
        Some(Vocab::Ids(ids)) => Ok(ids.get(token).copied()),
        Some(Vocab::Other(IgnoredAny)) | None => Ok(None),
    }
}

/// Every token that ends a text: what config.json, generation_config.json and the tokenizer name, each once, ascending.
///
/// The three often differ. A chat model whose config.json only knows the end of a document would not stop at the end
/// of its turn otherwise.
pub fn eos_union(config: &LlamaConfig, generation: &GenerationConfig, tokenizer: Option<u32>) -> Vec<u32> {
    let all: BTreeSet<u32> = config
        .eos_token_ids
        .iter()
        .chain(&generation.eos_token_ids)
        .copied()
        .chain(tokenizer)
        .collect();
    all.into_iter().collect()
}
