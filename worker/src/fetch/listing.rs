//! What a commit of a repository holds, and which of it a server needs.

use std::{
    collections::{BTreeSet, HashMap},
    path::{Component, Path},
};

use serde::Deserialize;

use super::{FetchError, Report, Wanted, client::Client};
use crate::checkpoint::one_line;

/// A file to fetch. Its name is that of a file directly in the repository's root, safe to use in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileSpec {
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) digest: Digest,
}

/// What the endpoint promises about a file's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Digest {
    /// sha256 of the bytes: files kept in large-file storage.
    Sha256(String),
    /// sha1 of the bytes behind git's blob header: files kept in git itself.
    GitBlob(String),
}

impl Digest {
    /// The digits.
    pub(super) fn hex(&self) -> &str {
        match self {
            Digest::Sha256(hex) | Digest::GitBlob(hex) => hex,
        }
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Digest::Sha256(hex) => write!(f, "sha256 {hex}"),
            Digest::GitBlob(hex) => write!(f, "git blob {hex}"),
        }
    }
}

/// All files of one commit.
pub(super) struct Listing {
    repo: String,
    url: String,
    siblings: HashMap<String, Sibling>,
}

#[derive(Deserialize)]
struct Answer {
    sha: Option<String>,
    siblings: Vec<Sibling>,
}
#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}
#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

const LISTING_BYTES: u64 = 64 << 20; // a repository of 100,000 files has about 20 MB
const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 4] = [
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

impl Listing {
    /// Asks the endpoint what the commit holds.
    pub(super) fn fetch(
        client: &Client,
        wanted: &Wanted,
        report: &mut dyn Report,
    ) -> Result<Listing, FetchError> {
        let Wanted { repo, revision } = wanted;
        let url = client.url(&format!("/api/models/{repo}/revision/{revision}?blobs=true"));
        let body = client.get_whole(&url, LISTING_BYTES, report)?;
        Listing::parse(repo, revision, url, &body)
    }

    fn parse(repo: &str, revision: &str, url: String, body: &[u8]) -> Result<Listing, FetchError> {
        let answer: Answer = serde_json::from_slice(body).map_err(|error| FetchError::Answer {
            url: one_line(&url),
            expected: "a list of the model's files as JSON".into(),
            found: one_line(&error.to_string()),
        })?;
        if let Some(sha) = answer.sha.filter(|sha| !sha.eq_ignore_ascii_case(revision)) {
            let (expected, found) = (format!("commit {revision}"), format!("commit {}", one_line(&sha)));
            return Err(FetchError::Answer {
                url: one_line(&url),
                expected,
                found,
            });
        }
        // One hostile name makes the whole list suspect, even if nothing would have been written under it.
        if let Some(bad) = answer
            .siblings
            .iter()
            .find(|sibling| !is_safe(&sibling.rfilename))
        {
            let found = one_line(&format!("{:?}", bad.rfilename));
            let expected = "file names that stay inside the repository".into();
            return Err(FetchError::Answer {
                url: one_line(&url),
                expected,
                found,
            });
        }
        let siblings = answer
            .siblings
            .into_iter()
            .map(|sibling| (sibling.rfilename.clone(), sibling));
        Ok(Listing {
            repo: repo.to_owned(),
            url,
            siblings: siblings.collect(),
        })
    }

    /// The text-side files: config.json and tokenizer.json, and what else there is of them.
    pub(super) fn text_files(&self) -> Result<Vec<FileSpec>, FetchError> {
        let needed = NEEDED.into_iter().map(|name| self.needed(name));
        let optional = OPTIONAL
            .into_iter()
            .filter(|name| self.siblings.contains_key(*name));
        needed.chain(optional.map(|name| self.needed(name))).collect()
    }

    /// The weights' only file, where they are in one. Like transformers, it is preferred to an index.
    pub(super) fn single(&self) -> Result<Option<FileSpec>, FetchError> {
        self.siblings
            .get(SINGLE)
            .map(|sibling| self.spec(sibling))
            .transpose()
    }

    /// The file that names the shards.
    pub(super) fn index(&self) -> Result<FileSpec, FetchError> {
        match self.siblings.get(INDEX) {
            Some(sibling) => self.spec(sibling),
            None => Err(self.lacks(format!("{SINGLE} or {INDEX}"))),
        }
    }

    /// The shards that the text of an index names, each once.
    pub(super) fn shards(&self, index: &[u8]) -> Result<Vec<FileSpec>, FetchError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let index: Index = serde_json::from_slice(index).map_err(|error| FetchError::Repository {
            repo: self.repo.clone(),
            expected: format!("a weight_map in {INDEX}"),
            found: one_line(&error.to_string()),
        })?;
        let names: BTreeSet<String> = index.weight_map.into_values().collect();
        names.iter().map(|name| self.needed(name)).collect()
    }

    fn needed(&self, name: &str) -> Result<FileSpec, FetchError> {
        // A shard's name comes from the index, which must not lead into a folder either.
        let plain = !name.contains('/');
        match self.siblings.get(name).filter(|_| plain) {
            Some(sibling) => self.spec(sibling),
            None => Err(self.lacks(one_line(name))),
        }
    }

    fn lacks(&self, expected: String) -> FetchError {
        const SHOWN: usize = 8;
        let mut names: Vec<&str> = self.siblings.keys().map(String::as_str).collect();
        names.sort_unstable();
        let more = if names.len() > SHOWN { ", …" } else { "" };
        names.truncate(SHOWN);
        let found = format!("no such file among {}{more}", one_line(&names.join(", ")));
        FetchError::Repository {
            repo: self.repo.clone(),
            expected,
            found,
        }
    }

    fn spec(&self, sibling: &Sibling) -> Result<FileSpec, FetchError> {
        let is_hex = |text: &str, n: usize| text.len() == n && text.chars().all(|c| c.is_ascii_hexdigit());
        let name = sibling.rfilename.clone();
        let promised = match (&sibling.lfs, &sibling.blob_id, sibling.size) {
            (Some(lfs), _, _) if is_hex(&lfs.sha256, 64) => {
                Some((lfs.size, Digest::Sha256(lfs.sha256.to_ascii_lowercase())))
            }
            (None, Some(blob), Some(size)) if is_hex(blob, 40) => {
                Some((size, Digest::GitBlob(blob.to_ascii_lowercase())))
            }
            _ => None,
        };
        let (size, digest) = promised.ok_or_else(|| FetchError::Answer {
            url: one_line(&self.url),
            expected: format!("size and digest of {}", one_line(&name)),
            found: "a listing without them; use an endpoint that answers ?blobs=true".into(),
        })?;
        Ok(FileSpec { name, size, digest })
    }
}

/// A relative path of plain components.
fn is_safe(name: &str) -> bool {
    !name.is_empty()
        && !name.chars().any(|c| c.is_control() || c == '\\')
        && name.split('/').all(|part| !part.is_empty())
        && Path::new(name).components().all(|component| matches!(component, Component::Normal(_)))
        // Normal components hide inner dots, which Path drops.
        && name.split('/').all(|part| part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_folder_are_unsafe() {
        for name in ["config.json", "original/params.json", "a..b", "日本.txt", "..a"] {
            assert!(is_safe(name), "{name}");
        }
        for name in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "a/",
            "./a",
            "a/./b",
            "a\\b",
            "a\nb",
            "..",
        ] {
            assert!(!is_safe(name), "{name:?}");
        }
    }
}
