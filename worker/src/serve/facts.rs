//! What is known of a model once it is loaded.

use std::sync::Arc;

use bytes::Bytes;
use swallow_rpc::worker::v1::{ModelSpec, model_spec};
use swallow_schedule::{Limits, Pace};

use crate::{engine::Door, grammar::Grammars, state::Memory};

/// What Welcome and the door say about the model.
#[derive(Clone, Debug)]
pub struct Facts {
    /// New for each process: all cached blocks are gone.
    pub boot_id: [u8; 16],
    /// Prompt and output together.
    pub max_model_len: u32,
    /// Token ids are below it.
    pub vocab_size: u32,
    /// What ends a text, ascending.
    pub eos_token_ids: Arc<[u32]>,
    /// Text-side files.
    pub files: Vec<ModelFile>,
}

/// A file that routers fetch by digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFile {
    /// As in the model's folder.
    pub name: String,
    /// sha256 in lower-case hexadecimal.
    pub digest: String,
    /// All of it.
    pub bytes: Bytes,
}

impl Facts {
    /// What compiles grammars for this model. One without a tokenizer has none of whatever kind.
    pub(crate) fn grammars(&self) -> Grammars {
        let tokenizer = self.files.iter().find(|file| file.name == "tokenizer.json");
        let bytes = tokenizer.map(|file| file.bytes.clone()).unwrap_or_default();
        Grammars::new(bytes, self.vocab_size, Arc::clone(&self.eos_token_ids))
    }

    pub(crate) fn model_spec(&self, served_names: &[String]) -> ModelSpec {
        let files = self.files.iter().map(|file| model_spec::File {
            name: file.name.clone(),
            digest: file.digest.clone(),
            size_bytes: file.bytes.len() as u64,
        });
        ModelSpec {
            served_names: served_names.to_vec(),
            max_model_len: self.max_model_len,
            vocab_size: self.vocab_size,
            eos_token_ids: self.eos_token_ids.to_vec(),
            files: files.collect(),
        }
    }
}

/// A model that is ready to run.
pub struct Loaded<R> {
    /// Has done its warm-up step.
    pub runner: R,
    /// Of scheduler and device.
    pub limits: Limits,
    /// What bounds prefill beside decoding.
    pub pace: Option<Pace>,
    /// What routers learn.
    pub facts: Facts,
    /// What requests are checked against.
    pub door: Door,
    /// Found after loading.
    pub measured: Memory,
}
