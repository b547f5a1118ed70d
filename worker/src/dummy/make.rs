//! `swallow-worker make-checkpoint`: the weights of `--load-format=dummy` as files, to measure how fast files are read.
//!
//! Numbers are made and written some rows at a time, so memory stays small whatever the model's size. The index comes
//! last: a folder that was left half done is no checkpoint, and says so when it is opened.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Args;
use serde_json::{Map, Value, json};

use super::DummyModel;
use crate::{
    checkpoint::{CheckpointError, needed},
    device::{Part, RandomTensor, Source},
};

/// Bytes of tensors in one file, unless a single tensor has more.
const SHARD_BYTES: u64 = 4 << 30;
/// Numbers that are made at a time: 32 MiB of bf16.
const NUMBERS: usize = 16 << 20;
/// Bytes of one number.
const NUMBER_BYTES: u64 = 2;
/// What text files take, roughly: the tokenizer is the largest.
const TEXT_BYTES: u64 = 16 << 20;

/// What to make, and where.
#[derive(Args, Clone, Debug)]
pub struct MakeArgs {
    /// llama-3-8b, llama-3.3-70b, or a folder with a config.json
    #[arg(long, value_name = "NAME")]
    pub shape: PathBuf,
    /// Folder that gets the files; it must be empty, or not be there yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Why no checkpoint was made.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The shape is none.
    #[error("--shape={}: {source}", shape.display())]
    Shape {
        /// What was given.
        shape: PathBuf,
        /// What is wrong with it.
        source: Box<CheckpointError>,
    },
    /// Something is there already.
    #[error("--out={}: it is not empty; give a folder that is, or that is not there yet", .0.display())]
    NotEmpty(PathBuf),
    /// The disk is too small.
    #[error("--out={}: {needed} bytes are needed and {free} are free; make room or give another folder", dir.display())]
    NoSpace {
        /// The folder.
        dir: PathBuf,
        /// Bytes of the checkpoint.
        needed: u64,
        /// Bytes on its disk.
        free: u64,
    },
    /// A file cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

/// A tensor.
struct Entry {
    name: String,
    shape: Vec<usize>,
}

impl Entry {
    fn n_bytes(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product::<u64>() * NUMBER_BYTES
    }

    /// All of it, as rows of numbers. A vector is a column of ones, as norms are.
    fn part(&self) -> Part<'static> {
        let (rows, columns, source) = match self.shape[..] {
            [rows, columns] => {
                let random = RandomTensor::new(&self.name, columns);
                (rows, columns, Source::Random(random))
            }
            _ => (self.shape.iter().product(), 1, Source::Ones),
        };
        Part {
            source,
            rows: 0..rows,
            columns: 0..columns,
        }
    }
}

/// Makes a checkpoint and tells on stderr how far it is.
///
/// # Errors
/// The shape is none, the folder is not empty, or its disk is too small or fails.
pub fn make_checkpoint(args: &MakeArgs) -> Result<(), MakeError> {
    let model = DummyModel::open(&args.shape, 1).map_err(|source| MakeError::Shape {
        shape: args.shape.clone(),
        source: Box::new(source),
    })?;
    let entries: Vec<Entry> = needed(&model.config)
        .map(|(name, shape)| Entry { name, shape })
        .collect();
    let total = entries.iter().map(Entry::n_bytes).sum();
    let out = &args.out;
    prepare(out, total)?;
    let started = Instant::now();
    let shards = shards(entries);
    let mut done = 0;
    for (n, shard) in shards.iter().enumerate() {
        let path = out.join(shard_name(n, shards.len()));
        write_shard(&path, shard).map_err(|source| MakeError::Write {
            path: path.clone(),
            source,
        })?;
        done += shard.iter().map(Entry::n_bytes).sum::<u64>();
        let seconds = started.elapsed().as_secs_f64();
        eprintln!(
            "{}: {done} of {total} bytes, {:.2} GB/s",
            path.display(),
            done as f64 / 1e9 / seconds
        );
    }
    for file in model.text.files() {
        write_file(&out.join(file.name), &file.bytes)?;
    }
    write_file(&out.join("model.safetensors.index.json"), &index(&shards, total))
}

/// The folder, empty and on a disk with room for `total` bytes of tensors.
fn prepare(out: &Path, total: u64) -> Result<(), MakeError> {
    let failed = |source| MakeError::Write {
        path: out.to_owned(),
        source,
    };
    fs::create_dir_all(out).map_err(failed)?;
    if fs::read_dir(out).map_err(failed)?.next().is_some() {
        return Err(MakeError::NotEmpty(out.to_owned()));
    }
    let needed = total + TEXT_BYTES;
    // A file system that does not tell is no reason to stop.
    if let Ok(found) = nix::sys::statvfs::statvfs(out) {
        let free = found.blocks_available() * found.fragment_size();
        if needed > free {
            return Err(MakeError::NoSpace {
                dir: out.to_owned(),
                needed,
                free,
            });
        }
    }
    Ok(())
}

/// Tensors by file, in the model's order.
fn shards(entries: Vec<Entry>) -> Vec<Vec<Entry>> {
    let mut shards: Vec<Vec<Entry>> = Vec::new();
    let mut room = 0;
    for entry in entries {
        let bytes = entry.n_bytes();
        match shards.last_mut().filter(|_| bytes <= room) {
            Some(shard) => {
                room -= bytes;
                shard.push(entry);
            }
            None => {
                room = SHARD_BYTES.saturating_sub(bytes);
                shards.push(vec![entry]);
            }
        }
    }
    shards
}

fn shard_name(n: usize, of: usize) -> String {
    format!("model-{:05}-of-{of:05}.safetensors", n + 1)
}

fn write_shard(path: &Path, shard: &[Entry]) -> io::Result<()> {
    let mut file = BufWriter::new(File::create_new(path)?);
    let header = header(shard);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut numbers = Vec::new();
    let mut bytes = Vec::new();
    for entry in shard {
        let whole = entry.part();
        let rows_a_time = (NUMBERS / whole.columns.len()).max(1);
        for start in whole.rows.clone().step_by(rows_a_time) {
            let piece = Part {
                rows: start..(start + rows_a_time).min(whole.rows.end),
                ..whole.clone()
            };
            numbers.resize(piece.len(), 0);
            piece.read_bf16_into(&mut numbers);
            bytes.clear();
            bytes.extend(numbers.iter().flat_map(|number: &u16| number.to_le_bytes()));
            file.write_all(&bytes)?;
        }
    }
    file.into_inner()?.sync_all()
}

/// Names, formats, shapes and places, padded so that numbers lie at multiples of eight.
fn header(shard: &[Entry]) -> Vec<u8> {
    let mut tensors = Map::new();
    tensors.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut start = 0;
    for entry in shard {
        let end = start + entry.n_bytes();
        let place = json!({ "dtype": "BF16", "shape": entry.shape, "data_offsets": [start, end] });
        tensors.insert(entry.name.clone(), place);
        start = end;
    }
    let mut header = Value::Object(tensors).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

fn index(shards: &[Vec<Entry>], total: u64) -> Vec<u8> {
    let mut files = Map::new();
    for (n, shard) in shards.iter().enumerate() {
        let name = shard_name(n, shards.len());
        files.extend(
            shard
                .iter()
                .map(|entry| (entry.name.clone(), name.clone().into())),
        );
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": files });
    index.to_string().into_bytes()
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), MakeError> {
    fs::write(path, bytes).map_err(|source| MakeError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, rows: usize) -> Entry {
        Entry {
            name: name.into(),
            shape: vec![rows, 1 << 20],
        }
    }

    #[test]
    fn files_are_filled_to_their_bound_and_a_larger_tensor_has_one_of_its_own() {
        // Rows of 2 MiB: 2048 of them fill a file.
        let shards = shards(
            [("a", 1000), ("b", 1048), ("c", 1), ("d", 3000), ("e", 1)]
                .map(|(n, r)| entry(n, r))
                .into(),
        );
        let names: Vec<Vec<&str>> = shards
            .iter()
            .map(|shard| shard.iter().map(|entry| entry.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["a", "b"], vec!["c"], vec!["d"], vec!["e"]]);
    }
}
