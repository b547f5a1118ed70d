//! What a model's text files say: its tokenizer, its chat template, the texts of its special tokens.
//!
//! Read once for each set of digests, off the async threads, however many requests wait for it. What could not be
//! read stays so: the same bytes would fail again.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Map, Value};
use tokio::sync::OnceCell;

use crate::{
    fleet::{ModelEntry, ModelFile, ModelFiles},
    template::{ChatTemplate, SpecialTokens, TemplateError},
    text::{Tokenizer, TokenizerError},
};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

/// Files that give no text.
#[derive(Debug, thiserror::Error)]
pub enum ModelTextError {
    /// There is no tokenizer.json.
    #[error("the model's folder has no tokenizer.json; convert its tokenizer to that format")]
    NoTokenizer,
    /// There is one, but it can't be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A JSON file is not one.
    #[error("{name} can't be read: {why}")]
    Json {
        /// Its name.
        name: &'static str,
        /// Where it fails.
        why: String,
    },
    /// The library that reads it panicked.
    #[error("tokenizer.json can't be read: the tokenizers library panicked on it")]
    Panicked,
}

/// A model's text side.
#[derive(Debug)]
pub struct ModelText {
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// For templates.
    pub special: SpecialTokens,
    /// `None`: the model has none. An error: it can't be compiled.
    pub template: Option<Result<ChatTemplate, TemplateError>>,
    /// sha256 of tokenizer.json.
    pub tokenizer_digest: String,
    /// sha256 of the file that the template is in; empty without one.
    pub template_digest: String,
}

impl ModelText {
    /// Reads a model's files.
    pub fn read(files: &ModelFiles) -> Result<Self, ModelTextError> {
        let json = |name| match files.get(name) {
            None => Ok(Value::Null),
            Some(file) => serde_json::from_slice(&file.bytes).map_err(|error| ModelTextError::Json {
                name,
                why: error.to_string(),
            }),
        };
        let (config, map): (Value, Value) = (json(TOKENIZER_CONFIG)?, json(SPECIAL_TOKENS)?);
        let tokenizer = files.get(TOKENIZER).ok_or(ModelTextError::NoTokenizer)?;
        let special = SpecialTokens::parse(&config, &map);
        let add_bos = config["add_bos_token"].as_bool();
        let source = template_source(files, &config);
        Ok(Self {
            tokenizer: Arc::new(Tokenizer::load(
                &tokenizer.bytes,
                special.get("bos_token"),
                add_bos,
            )?),
            template_digest: source
                .as_ref()
                .map(|(file, _)| file.digest.clone())
                .unwrap_or_default(),
            template: source.map(|(_, source)| ChatTemplate::compile(&source)),
            tokenizer_digest: tokenizer.digest.clone(),
            special,
        })
    }
}

/// What tokenizer_config.json says, with the chat template that is used here.
///
/// # Errors
/// The file is not JSON.
pub fn tokenizer_config(files: &ModelFiles) -> Result<Map<String, Value>, ModelTextError> {
    let config = match files.get(TOKENIZER_CONFIG) {
        None => Value::Object(Map::new()),
        Some(file) => serde_json::from_slice(&file.bytes).map_err(|error| ModelTextError::Json {
            name: TOKENIZER_CONFIG,
            why: error.to_string(),
        })?,
    };
    let template = template_source(files, &config);
    let Value::Object(mut config) = config else {
        return Err(ModelTextError::Json {
            name: TOKENIZER_CONFIG,
            why: "it is no object".into(),
        });
    };
    if let Some((_, template)) = template {
        config.insert("chat_template".into(), template.into());
    }
    Ok(config)
}

/// A file of its own wins over the one in tokenizer_config.json, where a list of templates has one named "default".
fn template_source<'a>(files: &'a ModelFiles, config: &Value) -> Option<(&'a ModelFile, String)> {
    if let Some(file) = files.get(TEMPLATE) {
        return Some((file, String::from_utf8_lossy(&file.bytes).into_owned()));
    }
    let file = files.get(TOKENIZER_CONFIG)?;
    let source = match &config["chat_template"] {
        Value::String(source) => Some(source.as_str()),
        Value::Array(named) => named
            .iter()
            .find(|template| template["name"] == "default")
            .and_then(|t| t["template"].as_str()),
        _ => None,
    };
    source.map(|source| (file, source.to_owned()))
}

/// Digests of all files that matter.
type Key = Vec<String>;
type Slot = Arc<OnceCell<Result<Arc<ModelText>, Arc<ModelTextError>>>>;

/// The text sides of all models.
#[derive(Debug, Default)]
pub struct Library(Mutex<HashMap<Key, Slot>>);

impl Library {
    /// The text side of a model with these files, read now if nobody did. `models` are all there are: what none of
    /// them uses is forgotten.
    pub async fn text(
        &self,
        model: &str,
        files: &Arc<ModelFiles>,
        models: impl FnOnce() -> Vec<Arc<ModelEntry>>,
    ) -> Result<Arc<ModelText>, Arc<ModelTextError>> {
        let slot = self.slot(key(files), models);
        let read = || async {
            let files = Arc::clone(files);
            let read = tokio::task::spawn_blocking(move || ModelText::read(&files)).await;
            let read = read.unwrap_or(Err(ModelTextError::Panicked));
            if let Err(error) = &read {
                tracing::error!(model, %error, "the model's files give no text");
            }
            read.map(Arc::new).map_err(Arc::new)
        };
        slot.get_or_init(read).await.clone()
    }

    fn slot(&self, key: Key, models: impl FnOnce() -> Vec<Arc<ModelEntry>>) -> Slot {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(&key) {
            return Arc::clone(slot);
        }
        let used: Vec<Key> = models()
            .iter()
            .filter_map(|model| model.files.as_deref().map(self::key))
            .collect();
        slots.retain(|key, _| used.contains(key));
        Arc::clone(slots.entry(key).or_default())
    }
}

fn key(files: &ModelFiles) -> Key {
    [TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, TEMPLATE]
        .iter()
        .map(|name| {
            files
                .get(name)
                .map(|file| file.digest.clone())
                .unwrap_or_default()
        })
        .collect()
}
