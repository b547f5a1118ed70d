//! Reading keys of a model folder's JSON files, so that every complaint names file, key, expectation and finding.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use super::error::{CheckpointError, one_line};

/// A JSON object and the file it came from.
pub(crate) struct Fields {
    file: PathBuf,
    /// Put before each key in messages: empty, or the path of a nested object with a dot behind.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses `bytes`, which were read from `file`, as one JSON object.
    pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Fields, CheckpointError> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Fields {
                file: file.into(),
                prefix: String::new(),
                map,
            }),
            Ok(other) => Err(CheckpointError::File {
                file: file.into(),
                expected: "a JSON object".into(),
                found: brief(&other),
                advice: "download the file again or repair it".into(),
            }),
            Err(source) => Err(CheckpointError::Json {
                file: file.into(),
                source,
            }),
        }
    }

    /// Reads `file`, of at most `limit` bytes, as one JSON object.
    pub(crate) fn read(file: &Path, limit: u64, advice: &str) -> Result<Fields, CheckpointError> {
        Fields::parse(file, &read_bounded(file, limit, advice)?)
    }

    /// The names of all keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// The value of `key`; an explicit null counts as absent, as it does in transformers.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The complaint that `key` should be `expected` but is what it is.
    pub(crate) fn wrong(&self, key: &str, expected: impl Into<String>) -> CheckpointError {
        self.wrong_advised(key, expected, "")
    }

    /// As [`Fields::wrong`], with what to do about it.
    pub(crate) fn wrong_advised(
        &self,
        key: &str,
        expected: impl Into<String>,
        advice: &str,
    ) -> CheckpointError {
        CheckpointError::Value {
            file: self.file.as_path().into(),
            key: format!("{}{}", self.prefix, one_line(key)),
            expected: expected.into(),
            found: self.map.get(key).map_or_else(|| "nothing".into(), brief),
            advice: if advice.is_empty() {
                String::new()
            } else {
                format!("; {advice}")
            },
        }
    }

    /// A whole number from 1 to `most`.
    pub(crate) fn size(&self, key: &str, most: usize) -> Result<Option<usize>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, format!("a whole number from 1 to {most}"))),
        }
    }

    /// As [`Fields::size`], where absence is an error too.
    pub(crate) fn needed_size(&self, key: &str, most: usize) -> Result<usize, CheckpointError> {
        self.size(key, most)?
            .ok_or_else(|| self.wrong(key, format!("a whole number from 1 to {most}")))
    }

    /// A finite number for which `fits` holds; `expected` says which those are.
    pub(crate) fn number(
        &self,
        key: &str,
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(x) if x.is_finite() && fits(x) => Ok(Some(x)),
            _ => Err(self.wrong(key, expected)),
        }
    }

    /// As [`Fields::number`], where absence is an error too.
    pub(crate) fn needed_number(
        &self,
        key: &str,
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<f64, CheckpointError> {
        self.number(key, expected, fits)?
            .ok_or_else(|| self.wrong(key, expected))
    }

    /// true or false.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a string"))
    }

    /// A token id or a list of token ids, each below `vocab_size` where that is known.
    pub(crate) fn token_ids(
        &self,
        key: &str,
        vocab_size: Option<usize>,
    ) -> Result<Vec<u32>, CheckpointError> {
        let limit = vocab_size.map_or(u64::from(u32::MAX), |n| n as u64);
        let id = |value: &Value| {
            let id = value.as_u64().filter(|id| *id < limit)?;
            u32::try_from(id).ok()
        };
        let ids = match self.get(key) {
            None => Some(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, format!("token ids from 0 to {}", limit - 1)))
    }

    /// A nested object.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                file: self.file.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }
}

/// Reads a whole file that must not be longer than `limit` bytes.
pub(crate) fn read_bounded(file: &Path, limit: u64, advice: &str) -> Result<Vec<u8>, CheckpointError> {
    let failed = |source| CheckpointError::Read {
        file: file.into(),
        source,
        advice: advice.to_owned(),
    };
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a file that grows or lies about its length is noticed as well.
    File::open(file)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(CheckpointError::File {
            file: file.into(),
            expected: format!("at most {limit} bytes"),
            found: "a longer file".into(),
            advice: "this is not such a file; download it again".into(),
        });
    }
    Ok(bytes)
}

/// A JSON value in a few characters.
fn brief(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = one_line(&value.to_string());
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
