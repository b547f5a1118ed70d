//! The models as their clients see them: names, limits, and the text files that came from their replicas.
//!
//! An entry is a snapshot, replaced as a whole when something changes. A model stays known once it was discovered:
//! without replicas its requests wait and are then refused as not ready, which is true, and not as unknown.

mod files;

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use swallow_policy::ModelId;
use tokio::sync::watch;

pub(crate) use files::FileCache;
pub use files::{FileError, ModelFile, ModelFiles};

/// A model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelEntry {
    /// Its first served name, which responses carry.
    pub name: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// Tokenizer, chat template and configs; `None` before the first replica was ready. They stay when it goes.
    pub files: Option<Arc<ModelFiles>>,
    /// Prompt and output together: what every ready replica can do. 0 while `files` is `None`.
    pub max_model_len: u32,
    /// Token ids are below this. 0 while `files` is `None`.
    pub vocab_size: u32,
    /// Ids that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Replicas that may be chosen.
    pub ready_replicas: usize,
    /// Its number, the same for ever.
    pub id: ModelId,
    /// Tokens in a cache block, for each size that its replicas use.
    pub block_sizes: Vec<u32>,
}

/// All models, by every name.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    names: RwLock<Names>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Names {
    by_name: HashMap<String, Arc<ModelEntry>>,
    /// By `ModelId`.
    entries: Vec<Arc<ModelEntry>>,
}

impl Directory {
    pub fn find(&self, name: &str) -> Option<Arc<ModelEntry>> {
        self.names
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .by_name
            .get(name)
            .cloned()
    }

    /// In the order in which they were discovered.
    pub fn all(&self) -> Vec<Arc<ModelEntry>> {
        self.names
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .entries
            .clone()
    }

    /// Replaces an entry, or adds the next one. A name that another model has stays with that model.
    pub fn put(&self, entry: ModelEntry) {
        self.put_quietly(entry);
        self.changed.send_replace(());
    }

    /// Told after each change.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn put_quietly(&self, entry: ModelEntry) {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        let entry = Arc::new(entry);
        let index = entry.id.0 as usize;
        if index < names.entries.len() {
            names.entries[index] = Arc::clone(&entry);
        } else {
            assert_eq!(index, names.entries.len(), "models are numbered without gaps");
            names.entries.push(Arc::clone(&entry));
        }
        names.by_name.retain(|_, other| other.id != entry.id);
        for name in std::iter::once(&entry.name).chain(&entry.aliases) {
            names
                .by_name
                .entry(name.clone())
                .or_insert_with(|| Arc::clone(&entry));
        }
    }
}
