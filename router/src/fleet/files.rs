//! A model's text files, fetched from a replica and kept by digest, so that any number of replicas costs one copy.
//!
//! A file is what its digest says or it is not used.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use swallow_rpc::worker::v1::{
    GetModelFileRequest, model_spec::File, worker_service_client::WorkerServiceClient,
};
use tonic::transport::Channel;

/// The largest tokenizers have some 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Between two chunks of a file.
const CHUNK_LIMIT: Duration = Duration::from_secs(10);
/// The protocol names six.
const FILES_MAX: usize = 32;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFile {
    /// sha256 in lower-case hexadecimal.
    pub digest: String,
    /// All of it.
    pub bytes: Bytes,
}

/// The files of a model, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFiles(std::collections::BTreeMap<String, ModelFile>);

impl ModelFiles {
    /// "tokenizer.json" and so on; `None` where the model has no such file.
    pub fn get(&self, name: &str) -> Option<&ModelFile> {
        self.0.get(name)
    }

    /// Names and files, ascending by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &ModelFile)> {
        self.0.iter().map(|(name, file)| (name.as_str(), file))
    }
}

impl FromIterator<(String, ModelFile)> for ModelFiles {
    fn from_iter<T: IntoIterator<Item = (String, ModelFile)>>(files: T) -> Self {
        Self(files.into_iter().collect())
    }
}

/// A file that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The replica did not send it.
    #[error("cannot fetch '{name}': {status}")]
    Fetch {
        /// Its name.
        name: String,
        /// The replica's answer.
        status: Box<tonic::Status>,
    },
    /// It is not what was announced.
    #[error("'{name}' is not what the replica announced: {what}")]
    Wrong {
        /// Its name.
        name: String,
        /// What differs.
        what: String,
    },
}

/// A place for one digest: whoever holds the lock fetches, the others find the bytes.
type Slot = Arc<tokio::sync::Mutex<Option<Bytes>>>;

/// Files by digest, for all models.
#[derive(Debug, Default)]
pub(crate) struct FileCache(Mutex<HashMap<String, Slot>>);

impl FileCache {
    /// All files of a model, fetched where they are not here yet.
    pub async fn files(
        &self,
        client: &mut WorkerServiceClient<Channel>,
        files: &[File],
    ) -> Result<ModelFiles, FileError> {
        if files.len() > FILES_MAX {
            let what = format!(
                "{} files are announced, at most {FILES_MAX} are fetched",
                files.len()
            );
            return Err(FileError::Wrong {
                name: "files".into(),
                what,
            });
        }
        let mut got = Vec::with_capacity(files.len());
        for file in files {
            let slot = Arc::clone(self.slots().entry(file.digest.clone()).or_default());
            let mut place = slot.lock().await;
            let bytes = match &*place {
                Some(bytes) => bytes.clone(),
                None => place.insert(fetch(client, file).await?).clone(),
            };
            got.push((
                file.name.clone(),
                ModelFile {
                    digest: file.digest.clone(),
                    bytes,
                },
            ));
        }
        Ok(got.into_iter().collect())
    }

    /// Drops what no model uses and nobody is fetching.
    pub fn keep_only<'a>(&self, used: impl Iterator<Item = &'a ModelFiles>) {
        let digests: std::collections::HashSet<&str> = used
            .flat_map(|files| files.iter().map(|(_, file)| file.digest.as_str()))
            .collect();
        self.slots()
            .retain(|digest, slot| Arc::strong_count(slot) > 1 || digests.contains(digest.as_str()));
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<String, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn fetch(client: &mut WorkerServiceClient<Channel>, file: &File) -> Result<Bytes, FileError> {
    let name = || file.name.clone();
    let status = |status: tonic::Status| FileError::Fetch {
        name: name(),
        status: Box::new(status),
    };
    let wrong = |what: String| FileError::Wrong { name: name(), what };
    if file.size_bytes > FILE_BYTES_MAX {
        return Err(wrong(format!(
            "{} bytes are more than {FILE_BYTES_MAX}",
            file.size_bytes
        )));
    }
    let request = GetModelFileRequest {
        digest: file.digest.clone(),
    };
    // Other replicas of the model wait for this one's answer: one that hangs must not hold them up.
    let slow = |_| status(tonic::Status::deadline_exceeded("the replica stopped sending"));
    let answer = tokio::time::timeout(CHUNK_LIMIT, client.get_model_file(request));
    let mut chunks = answer.await.map_err(slow)?.map_err(status)?.into_inner();
    // Not the announced size at once: it is a claim until the bytes are here.
    let mut bytes = BytesMut::new();
    while let Some(part) = tokio::time::timeout(CHUNK_LIMIT, chunks.message())
        .await
        .map_err(slow)?
        .map_err(status)?
    {
        bytes.extend_from_slice(&part.chunk);
        if bytes.len() as u64 > file.size_bytes {
            return Err(wrong(format!(
                "more than the announced {} bytes came",
                file.size_bytes
            )));
        }
    }
    let digest = hex(&Sha256::digest(&bytes));
    if digest != file.digest {
        return Err(wrong(format!(
            "sha256 is {digest} over {} bytes, not {}",
            bytes.len(),
            file.digest
        )));
    }
    Ok(bytes.freeze())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
