//! The files that turn text into tokens and back, which the worker hands out by digest and never interprets.
//!
//! A router holds no model folder: it asks for these by the sha256 of their bytes, so equal files of many replicas
//! are fetched once. They are read whole at start, so that a later change on disk cannot make replicas differ from
//! what they announced.

use std::{
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::{error::CheckpointError, json::read_bounded};

/// One file as it was at start.
#[derive(Clone, Debug)]
pub struct TextFile {
    /// Its name in the model folder.
    pub name: &'static str,
    /// sha256 of its bytes in lower-case hexadecimal.
    pub digest: String,
    /// Its content.
    pub bytes: Bytes,
}

/// The text-side files of a model folder.
#[derive(Clone, Debug)]
pub struct TextFiles {
    dir: PathBuf,
    files: Vec<TextFile>,
}

const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];
/// Counts before a template in tokenizer_config.json.
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const OPTIONAL: [&str; 4] = [
    "tokenizer_config.json",
    CHAT_TEMPLATE,
    "generation_config.json",
    "special_tokens_map.json",
];
const TOKENIZER_BYTES: u64 = 128 << 20; // Llama 3's has 17 MB
const OTHER_BYTES: u64 = 8 << 20;

impl TextFiles {
    /// Reads all of them from `dir`. `config.json` and `tokenizer.json` must be there; the others may be absent.
    pub fn read(dir: &Path) -> Result<TextFiles, CheckpointError> {
        let mut files = Vec::with_capacity(NEEDED.len() + OPTIONAL.len());
        for name in NEEDED {
            files.push(read_one(dir, name)?);
        }
        for name in OPTIONAL {
            files.extend(read_if_there(dir, name)?);
        }
        Ok(TextFiles {
            dir: dir.to_owned(),
            files,
        })
    }

    /// Reads those that are in `dir`, for a model whose others are made.
    pub(crate) fn read_present(dir: &Path) -> Result<TextFiles, CheckpointError> {
        let mut files = Vec::with_capacity(NEEDED.len() + OPTIONAL.len());
        for name in NEEDED.into_iter().chain(OPTIONAL) {
            files.extend(read_if_there(dir, name)?);
        }
        Ok(TextFiles {
            dir: dir.to_owned(),
            files,
        })
    }

    /// Files that were made, as if they had been read from `dir`.
    pub(crate) fn made(dir: &Path, files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> TextFiles {
        let nothing = TextFiles {
            dir: dir.to_owned(),
            files: Vec::new(),
        };
        nothing.with(files)
    }

    /// These and others that were made.
    pub(crate) fn with(mut self, files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> TextFiles {
        self.files
            .extend(files.into_iter().map(|(name, bytes)| text_file(name, bytes)));
        self
    }

    /// These with another chat template.
    pub(crate) fn with_chat_template(mut self, template: &str) -> TextFiles {
        self.files.retain(|file| file.name != CHAT_TEMPLATE);
        self.with([(CHAT_TEMPLATE, template.as_bytes().to_vec())])
    }

    /// All that are present.
    pub fn files(&self) -> &[TextFile] {
        &self.files
    }

    /// The file of that name, if present.
    pub fn get(&self, name: &str) -> Option<&TextFile> {
        self.files.iter().find(|file| file.name == name)
    }

    /// The file whose bytes have that sha256.
    pub fn by_digest(&self, digest: &str) -> Option<&TextFile> {
        self.files.iter().find(|file| file.digest == digest)
    }

    /// The file's path, for messages.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn read_one(dir: &Path, name: &'static str) -> Result<TextFile, CheckpointError> {
    let (limit, advice) = match name {
        "tokenizer.json" => (
            TOKENIZER_BYTES,
            "clients send text, so the model's folder must hold the tokenizer.json of its fast tokenizer",
        ),
        _ => (
            OTHER_BYTES,
            "the model's folder must be readable and in the Hugging Face layout",
        ),
    };
    Ok(text_file(name, read_bounded(&dir.join(name), limit, advice)?))
}

fn read_if_there(dir: &Path, name: &'static str) -> Result<Option<TextFile>, CheckpointError> {
    match read_one(dir, name) {
        Ok(file) => Ok(Some(file)),
        Err(CheckpointError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn text_file(name: &'static str, bytes: Vec<u8>) -> TextFile {
    let digest = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    TextFile {
        name,
        digest,
        bytes: bytes.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chat_template_that_is_given_counts_before_the_folder_s() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        // The one has its template in a file of its own, the other in tokenizer_config.json.
        for model in ["odd", "tiny"] {
            let own = TextFiles::read(&fixtures.join(model)).expect("a model");
            let given = own.clone().with_chat_template("{{ messages }}");
            let templates = given.files().iter().filter(|file| file.name == CHAT_TEMPLATE);
            let templates: Vec<&[u8]> = templates.map(|file| &*file.bytes).collect();
            assert_eq!(templates, [b"{{ messages }}"], "{model}");
            let file = given.get(CHAT_TEMPLATE).expect("it is there");
            assert_eq!(
                given.by_digest(&file.digest).map(|file| &file.bytes),
                Some(&file.bytes)
            );
            assert_eq!(
                given.get("tokenizer.json").map(|file| &file.digest),
                own.get("tokenizer.json").map(|file| &file.digest)
            );
        }
    }
}
