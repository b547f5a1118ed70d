//! Models that are made up: the shape of a real one, weights from a formula, and a vocabulary to write with.
//!
//! They serve to measure and to try out a deployment without anybody's files. The same shape gives the same model
//! everywhere; its texts are letters without sense. Where a folder brings a tokenizer of its own, that is used.

mod make;
pub mod shapes;
mod tokenizer;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use self::make::{MakeArgs, MakeError, make_checkpoint};
use crate::checkpoint::{CheckpointError, LlamaConfig, TextFiles};

/// A model without weights of its own.
#[derive(Clone, Debug)]
pub struct DummyModel {
    /// Shape and arithmetic.
    pub config: LlamaConfig,
    /// What routers ask for; what the folder does not hold was made.
    pub text: TextFiles,
}

impl DummyModel {
    /// Opens `model`: the name of a shape, the text of a config.json, or a folder with one.
    ///
    /// # Errors
    /// It is none of these, its shape is not that of a Llama model or cannot be cut into `tensor_parallel` ranks, or
    /// its vocabulary is too small for a tokenizer to be made.
    pub fn open(model: &Path, tensor_parallel: usize) -> Result<Self, CheckpointError> {
        let (place, text) = match written(model) {
            Some(config) => (PathBuf::from("config.json"), config),
            None if model.is_dir() => return Self::of_folder(model, tensor_parallel),
            None => return Err(neither(model)),
        };
        let config = LlamaConfig::parse(&place, text.as_bytes())?;
        config.check_tensor_parallel(&place, tensor_parallel)?;
        let text = TextFiles::made(Path::new(""), made_files(&place, &config, &text)?);
        Ok(Self { config, text })
    }

    fn of_folder(dir: &Path, tensor_parallel: usize) -> Result<Self, CheckpointError> {
        let config = LlamaConfig::read(dir)?;
        let place = dir.join("config.json");
        config.check_tensor_parallel(&place, tensor_parallel)?;
        let text = if dir.join(tokenizer::FILE).exists() {
            TextFiles::read(dir)?
        } else {
            let own = TextFiles::read_present(dir)?;
            let mut made = made_files(&place, &config, "")?;
            made.retain(|(name, _)| own.get(name).is_none());
            own.with(made)
        };
        Ok(Self { config, text })
    }
}

/// The text of a config.json that `model` is, or names.
fn written(model: &Path) -> Option<String> {
    let text = model.to_str()?;
    if text.starts_with('{') {
        return Some(text.to_owned());
    }
    shapes::config(text)
}

fn neither(model: &Path) -> CheckpointError {
    CheckpointError::Read {
        file: model.into(),
        source: io::Error::new(io::ErrorKind::NotFound, "there is no such folder"),
        advice: format!(
            "give the name of a shape ({}), a folder with a config.json, or the text of one",
            shapes::NAMES.join(", ")
        ),
    }
}

/// The text files of a model that has only a config.json, whose text is `config_json`.
fn made_files(
    place: &Path,
    config: &LlamaConfig,
    config_json: &str,
) -> Result<Vec<(&'static str, Vec<u8>)>, CheckpointError> {
    let made = tokenizer::make(place, config)?;
    Ok(vec![
        ("config.json", config_json.as_bytes().to_vec()),
        (tokenizer::FILE, made.tokenizer),
        ("tokenizer_config.json", made.tokenizer_config),
        ("generation_config.json", made.generation_config),
    ])
}
