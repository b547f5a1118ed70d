//! A model folder in the Hugging Face layout, checked as a whole before anything is loaded.
//!
//! [`Checkpoint::open`] reads config.json and the headers of all safetensors files, and either refuses with one line
//! that says what to change or vouches for every tensor that the forward pass will ask for: present once, of the
//! right shape, in a readable format, inside a complete file, divisible among the ranks. Weights stay on disk,
//! mapped; a rank copies out only its own slices. Files must not be shortened while they are mapped.

mod config;
mod error;
mod generation;
mod json;
mod layout;
mod rope;
mod safetensors;
mod text_files;
mod view;

use std::path::{Path, PathBuf};

use self::layout::Tensors;
pub use self::{
    config::LlamaConfig,
    error::CheckpointError,
    generation::{GenerationConfig, eos_union, tokenizer_eos},
    rope::{Rope, RopeScaling},
    text_files::{TextFile, TextFiles},
    view::{Dtype, TensorView},
};
pub(crate) use self::{error::one_line, layout::needed};

/// A checked model folder.
pub struct Checkpoint {
    dir: PathBuf,
    config: LlamaConfig,
    tensors: Tensors,
}

impl Checkpoint {
    /// Checks the model in `dir` for `tensor_parallel` ranks. Reads config.json and tensor headers, nothing else.
    pub fn open(dir: &Path, tensor_parallel: usize) -> Result<Checkpoint, CheckpointError> {
        let config = LlamaConfig::read(dir)?;
        config.check_tensor_parallel(&dir.join("config.json"), tensor_parallel)?;
        let tensors = Tensors::open(dir, &config)?;
        Ok(Checkpoint {
            dir: dir.to_owned(),
            config,
            tensors,
        })
    }

    /// The folder it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Shape and arithmetic of the model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Bytes on disk of all tensors that the model needs.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.n_bytes()
    }

    /// A tensor by its name in the checkpoint, such as `model.layers.0.self_attn.q_proj.weight`.
    ///
    /// Its shape is the one that follows from [`Checkpoint::config`]: `[out, in]` for linears, `[hidden]` for norms.
    /// Panics for a name that the model does not have; `lm_head.weight` is one where `tie_word_embeddings` holds.
    pub fn tensor(&self, name: &str) -> TensorView<'_> {
        let Some((name, place)) = self.tensors.place(name) else {
            panic!("{name} is not a tensor of this model");
        };
        let shard = &self.tensors.shards[place.shard];
        let entry = &shard.entries[place.entry];
        TensorView::new(name, place.dtype, &entry.shape, shard.bytes(entry))
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint")
            .field("dir", &self.dir)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
