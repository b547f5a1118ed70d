//! What transformers gave in fp32 on the same files.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::fixture;

/// A file of goldens.
#[derive(Deserialize)]
pub struct Goldens {
    pub weights_sha256: BTreeMap<String, String>,
    pub stop_ids: Vec<u32>,
    pub prompts: Vec<Golden>,
}

/// One greedy generation.
#[derive(Deserialize)]
pub struct Golden {
    pub name: String,
    pub prompt_ids: Vec<u32>,
    pub output_ids: Vec<u32>,
    pub finish: String,
    pub min_gap: f64,
    pub output_logprobs: Vec<f64>,
    pub top: Vec<Vec<(u32, f64)>>,
    pub prompt_logprobs: Vec<Option<f64>>,
}

/// Reads a committed file. A missing one is a failure: nothing else would notice.
pub fn read(name: &str) -> Goldens {
    let path = fixture("goldens").join(format!("{name}.json"));
    let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The folder of a model that a fixture script keeps in the cache, if it is there.
pub fn cached(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("SWALLOW_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/swallow")))?;
    let folders = std::fs::read_dir(cache.join(name))
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.path());
    // Names end in the number of the layout; the latest counts.
    folders
        .filter(|folder| folder.join("config.json").is_file())
        .max()
}

impl Goldens {
    /// Goldens of other weights would be worse than none.
    pub fn check_weights(&self, dir: &Path) {
        for (name, want) in &self.weights_sha256 {
            let bytes = std::fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let digest: String = Sha256::digest(&bytes)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(
                &digest,
                want,
                "{}: goldens must be recorded anew",
                dir.join(name).display()
            );
        }
    }
}
