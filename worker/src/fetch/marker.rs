//! The file in a fetched folder that says what is in it, and whether all of it is.
//!
//! It is written before the first download, naming every file that this and earlier runs may leave behind, and again
//! when all files are verified. So a folder that changes to another commit loses the old commit's surplus files, and
//! nothing that fetching did not put there is ever removed.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{FetchError, listing::FileSpec};

/// What a folder holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Marker {
    repo: String,
    revision: String,
    /// All files are there and verified.
    complete: bool,
    files: Vec<MarkedFile>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct MarkedFile {
    name: String,
    size: u64,
    digest: String,
}

const NAME: &str = ".fetched.json";

impl Marker {
    /// The folder's marker. One that cannot be read counts as absent: everything is then verified anew.
    pub(super) fn read(out: &Path) -> Option<Marker> {
        let marker: Marker = serde_json::from_slice(&fs::read(out.join(NAME)).ok()?).ok()?;
        let is_plain =
            |file: &MarkedFile| !file.name.contains(['/', '\\', '\0']) && !file.name.starts_with('.');
        marker.files.iter().all(is_plain).then_some(marker)
    }

    /// The folder holds that commit, every file with its size.
    pub(super) fn is_complete(&self, out: &Path, repo: &str, revision: &str) -> bool {
        let has_size = |file: &MarkedFile| {
            fs::metadata(out.join(&file.name)).is_ok_and(|found| found.is_file() && found.len() == file.size)
        };
        self.complete && self.repo == repo && self.revision == revision && self.files.iter().all(has_size)
    }

    /// Bytes of all files.
    pub(super) fn n_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// The marker of a run that begins to fetch `files` into a folder whose marker was `before`.
    pub(super) fn started(repo: &str, revision: &str, files: &[FileSpec], before: Option<Marker>) -> Marker {
        let mut all = marked(files);
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        let earlier = before.map(|marker| marker.files).unwrap_or_default();
        all.extend(
            earlier
                .into_iter()
                .filter(|file| !names.contains(&file.name.as_str())),
        );
        Marker {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            complete: false,
            files: all,
        }
    }

    /// Removes what earlier commits left, and says that `files` are all there.
    pub(super) fn finish(&self, out: &Path, files: &[FileSpec]) -> Result<(), FetchError> {
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        for stale in self
            .files
            .iter()
            .filter(|file| !names.contains(&file.name.as_str()))
        {
            let path = out.join(&stale.name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(FetchError::local(&path, source));
                }
                _ => {}
            }
        }
        Marker {
            complete: true,
            files: marked(files),
            ..self.clone()
        }
        .write(out)
    }

    /// Replaces the folder's marker, in one step, so that it survives a crash at any time.
    pub(super) fn write(&self, out: &Path) -> Result<(), FetchError> {
        let (path, new) = (out.join(NAME), out.join(".fetched.json.new"));
        let text = serde_json::to_vec_pretty(self).expect("a marker is plain data");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            // The renames of this run, files' and marker's, are on disk once their folder is.
            File::open(out)?.sync_all()
        };
        write().map_err(|source| FetchError::local(&path, source))
    }
}

fn marked(files: &[FileSpec]) -> Vec<MarkedFile> {
    let one = |file: &FileSpec| MarkedFile {
        name: file.name.clone(),
        size: file.size,
        digest: file.digest.to_string(),
    };
    files.iter().map(one).collect()
}
