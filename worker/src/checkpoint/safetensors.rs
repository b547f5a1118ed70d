//! One safetensors file: its header read and checked to the byte, its data mapped and left on disk.
//!
//! The layout is eight bytes of header length (little endian), a JSON header, then the tensors' bytes without holes.
//! The parser is ours because the messages must name the tensor that does not fit; what it accepts is what the
//! format's reference implementation accepts, and a test holds the two against each other.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, Visitor},
};

use super::error::{CheckpointError, one_line};

/// A mapped file and what its header says.
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    map: Mmap,
    /// Where tensor bytes begin in the file.
    data: usize,
    /// Sorted by place in the file.
    pub(crate) entries: Vec<Entry>,
}

/// A tensor as the header describes it; `begin..end` lies inside the file's data and fits shape and dtype.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    /// As written; may be one that the model code does not read.
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    begin: usize,
    end: usize,
}

const PREFIX: usize = 8; // the header's length
const HEADER_MOST: usize = 100_000_000; // the format's own bound
const AGAIN: &str = "download the file again";

impl Shard {
    /// Maps `path` and checks its header; tensor bytes are not read.
    pub(crate) fn open(path: &Path) -> Result<Shard, CheckpointError> {
        let failed = |source| CheckpointError::Read {
            file: path.into(),
            source,
            advice: "every file of the checkpoint must be present and readable".into(),
        };
        let file = File::open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            // An empty mapping is an error of its own on some systems.
            return Err(broken(path, "a safetensors file", "an empty file"));
        }
        // SAFETY: the mapping is read-only and private to this process. Its bytes are plain data of any value, so
        // no type's invariant depends on them; shortening a model's files while they are served is documented as
        // fatal (SIGBUS), as for every memory-mapped loader.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let (data, entries) = parse_header(path, &map)?;
        Ok(Shard {
            path: path.to_owned(),
            map,
            data,
            entries,
        })
    }

    /// The bytes of one of this shard's own entries.
    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[self.data + entry.begin..self.data + entry.end]
    }
}

impl Entry {
    /// Length in the file.
    pub(crate) fn n_bytes(&self) -> usize {
        self.end - self.begin
    }
}

fn broken(path: &Path, expected: impl Into<String>, found: impl Into<String>) -> CheckpointError {
    CheckpointError::File {
        file: path.into(),
        expected: expected.into(),
        found: found.into(),
        advice: AGAIN.into(),
    }
}

/// Checks the header of the file whose content is `bytes`; returns where data begins, and the tensors in file order.
fn parse_header(path: &Path, bytes: &[u8]) -> Result<(usize, Vec<Entry>), CheckpointError> {
    if bytes.starts_with(b"version https://git-lfs") {
        let found = "a Git LFS pointer that stands for one";
        return Err(CheckpointError::File {
            file: path.into(),
            expected: "a safetensors file".into(),
            found: found.into(),
            advice: "run `git lfs pull` in the model's folder".into(),
        });
    }
    let Some((length, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        let found = format!("{} bytes, too few for one", bytes.len());
        return Err(broken(path, "a safetensors file", found));
    };
    let length = u64::from_le_bytes(*length);
    let Some(header) = usize::try_from(length)
        .ok()
        .filter(|n| *n <= HEADER_MOST)
        .and_then(|n| rest.get(..n))
    else {
        let expected = format!("a header that fits into the file's {} bytes", bytes.len());
        return Err(broken(path, expected, format!("a header of {length} bytes")));
    };
    let Header(raw) = serde_json::from_slice(header)
        .map_err(|source| broken(path, "a safetensors header", one_line(&source.to_string())))?;
    let data_bytes = rest.len() - header.len();
    let mut entries = raw
        .into_iter()
        .map(|(name, raw)| entry(path, name, raw))
        .collect::<Result<Vec<_>, _>>()?;
    entries.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    check_names(path, &entries)?;
    check_places(path, &entries, data_bytes)?;
    Ok((PREFIX + header.len(), entries))
}

/// Turns a header's entry into one whose length fits its shape and dtype.
fn entry(path: &Path, name: String, raw: RawEntry) -> Result<Entry, CheckpointError> {
    let [begin, end] = raw.data_offsets;
    let wrong = |expected: String, found: String| CheckpointError::Tensor {
        file: path.into(),
        tensor: one_line(&name),
        expected,
        found,
        advice: AGAIN.into(),
    };
    if begin > end {
        return Err(wrong("offsets in order".into(), format!("{begin} to {end}")));
    }
    if let Some(size) = dtype_bytes(&raw.dtype) {
        let needed = raw
            .shape
            .iter()
            .try_fold(size, |product, n| product.checked_mul(*n));
        if needed != Some(end - begin) {
            let needed = needed.map_or_else(|| "more bytes than exist".into(), |n| format!("{n} bytes"));
            let expected = format!("{needed} for {} {:?}", raw.dtype, raw.shape);
            return Err(wrong(expected, format!("{} bytes", end - begin)));
        }
    }
    Ok(Entry {
        name,
        dtype: raw.dtype,
        shape: raw.shape,
        begin,
        end,
    })
}

fn dtype_bytes(dtype: &str) -> Option<usize> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" | "C64" => Some(8),
        _ => None,
    }
}

fn check_names(path: &Path, entries: &[Entry]) -> Result<(), CheckpointError> {
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(CheckpointError::Tensor {
            file: path.into(),
            tensor: one_line(pair[0]),
            expected: "one entry in the header".into(),
            found: "two".into(),
            advice: AGAIN.into(),
        }),
    }
}

/// Tensors fill the file's data exactly: no overlap, no hole, nothing behind the last one.
fn check_places(path: &Path, entries: &[Entry], data_bytes: usize) -> Result<(), CheckpointError> {
    let promised = entries.iter().map(|entry| entry.end).max().unwrap_or(0);
    if promised > data_bytes {
        let expected = format!("{promised} bytes of tensors");
        return Err(broken(
            path,
            expected,
            format!("{data_bytes}: the file is truncated"),
        ));
    }
    let mut filled = 0;
    for entry in entries {
        if entry.begin != filled {
            let problem = if entry.begin < filled {
                "overlapping the tensor before it"
            } else {
                "behind a hole"
            };
            return Err(CheckpointError::Tensor {
                file: path.into(),
                tensor: one_line(&entry.name),
                expected: format!("data from byte {filled}"),
                found: format!("data from byte {}, {problem}", entry.begin),
                advice: AGAIN.into(),
            });
        }
        filled = entry.end;
    }
    if filled < data_bytes {
        let found = format!("{data_bytes}: bytes that belong to no tensor");
        return Err(broken(path, format!("{filled} bytes of tensors"), found));
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// All entries as written, repeated names included: a map type would silently keep one of them.
struct Header(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let raw = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format!("tensor {}: {error}", one_line(&name))))?;
                    entries.push((name, raw));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
