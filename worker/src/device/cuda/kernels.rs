//! The kernels: their sources, their machine code, and the cache between the two.
//!
//! Sources are part of the program. Machine code is made by NVRTC when it is first needed and kept on disk under a name
//! that holds the hash of source, flags, compiler and architecture, never the driver; `swallow-worker kernels` makes it
//! ahead for GPUs that are not here. A file of the cache ends in its own hash, so a torn one is made again.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{cache, libs::LibraryError, nvrtc::Nvrtc};

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct SourceFile {
    /// Its name without `.cu`.
    pub(super) name: &'static str,
    text: &'static str,
    /// The one architecture that has its instructions; others are served by other files.
    only: Option<&'static str>,
}

impl SourceFile {
    /// Whether it is for this architecture.
    pub(super) fn is_for(&self, arch: &str) -> bool {
        self.only.is_none_or(|only| only == arch)
    }
}

macro_rules! sources {
    ($($name:literal $(for $arch:literal)?),* $(,)?) => {
        &[$(SourceFile {
            name: $name,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/cuda/", $name, ".cu")),
            only: [$(Some($arch),)? None][0],
        },)*]
    };
}

/// All files of kernels.
pub(super) const SOURCES: &[SourceFile] = sources![
    "attention",
    "embed",
    "fill",
    "head",
    "hopper" for "sm_90a",
    "norm",
    "prefill",
    "rope",
    "sample",
    "skinny",
    "stream",
];

/// Where an image keeps kernels that were made ahead.
const INSTALLED: &str = "/usr/share/swallow/kernels";
/// Compiler versions whose code a cache may hold when the compiler itself is not here.
const WITHOUT_COMPILER: &str = "13.0";
const HASH_BYTES: usize = 32;

/// Why there is no machine code.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The compiler is missing.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The compiler refused a source: a defect of the program, or an architecture it does not know.
    #[error("kernels for {arch} do not compile: {log}")]
    Compile {
        /// For which GPU.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// The cache cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

/// The architecture that NVRTC makes code for: those whose own instructions are used end in `a`.
pub(super) fn arch(capability: u32) -> String {
    match capability {
        90 | 100 | 103 => format!("sm_{capability}a"),
        _ => format!("sm_{capability}"),
    }
}

fn flags(arch: &str) -> Vec<String> {
    let fixed = ["--std=c++17", "--ptxas-options=-v"];
    std::iter::once(format!("--gpu-architecture={arch}"))
        .chain(fixed.map(String::from))
        .collect()
}

/// Name of a file of machine code.
fn file_name(file: &SourceFile, arch: &str, compiler: &str) -> String {
    let hash = cache::short_hash(&[file.text, &flags(arch).join(" "), compiler, arch]);
    format!("{}-{arch}-{hash}.cubin", file.name)
}

/// A hash over the source of one file.
pub(super) fn source_hash(name: &str) -> String {
    let texts = SOURCES
        .iter()
        .filter(|file| file.name == name)
        .map(|file| file.text);
    cache::short_hash(&texts.collect::<Vec<_>>())
}

/// The folder that kernels are kept in.
fn kept() -> Option<PathBuf> {
    cache::folder("kernels")
}

/// Machine code of one file for a GPU of this architecture: from a cache, or compiled and kept.
pub(super) fn machine_code(file: &SourceFile, arch: &str) -> Result<Vec<u8>, KernelError> {
    // Without the compiler its version is the one that images are filled with.
    let compiler = Nvrtc::get();
    let version = compiler
        .as_ref()
        .map_or_else(|_| WITHOUT_COMPILER.to_owned(), |nvrtc| nvrtc.version_text());
    let name = file_name(file, arch, &version);
    let folders = [Some(PathBuf::from(INSTALLED)), kept()];
    for folder in folders.iter().flatten() {
        if let Some(code) = read(&folder.join(&name)) {
            return Ok(code);
        }
    }
    let code = compile(compiler?, file, arch)?.cubin;
    if let Some(folder) = kept()
        && let Err(error) = write(&folder, &name, &code)
    {
        tracing::warn!("kernels are not kept for the next start: {error}");
    }
    Ok(code)
}

fn compile(compiler: &Nvrtc, file: &SourceFile, arch: &str) -> Result<super::nvrtc::Compiled, KernelError> {
    compiler
        .compile(&format!("{}.cu", file.name), file.text, &flags(arch))
        .map_err(|log| KernelError::Compile {
            arch: arch.to_owned(),
            log,
        })
}

/// Without its hash; `None` if the file is missing or damaged.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let code = bytes.len().checked_sub(HASH_BYTES)?;
    let whole = Sha256::digest(&bytes[..code])[..] == bytes[code..];
    bytes.truncate(code);
    whole.then_some(bytes)
}

fn write(folder: &Path, name: &str, code: &[u8]) -> Result<(), KernelError> {
    let bytes = [code, &Sha256::digest(code)[..]].concat();
    cache::put(folder, name, &bytes).map_err(|source| KernelError::Write {
        path: folder.join(name),
        source,
    })
}

/// Flags of `swallow-worker kernels`.
#[derive(Clone, Debug, clap::Args)]
pub struct KernelsArgs {
    /// Architectures: sm_80 for A100, sm_90a for H100 and H200, sm_100a for B200
    #[arg(long, value_name = "SM,...", value_delimiter = ',', default_values_t = ["sm_80", "sm_90a", "sm_100a"].map(String::from))]
    pub arch: Vec<String>,
    /// Folder that gets one file for each source and architecture, and a manifest
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Fail if a kernel keeps values in local memory that should be in registers
    #[arg(long)]
    pub deny_spills: bool,
}

/// One line of the manifest.
#[derive(serde::Serialize)]
struct Entry<'a> {
    file: String,
    source: &'a str,
    arch: &'a str,
    compiler: &'a str,
    bytes: usize,
    kernels: Vec<Usage>,
}

/// What the assembler says of a kernel.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
struct Usage {
    name: String,
    registers: u32,
    shared_bytes: u32,
    spill_bytes: u32,
}

/// Runs `swallow-worker kernels`: fills a folder with machine code. Needs NVRTC, no GPU.
///
/// # Errors
/// A source does not compile, a kernel spills and that was denied, or the folder cannot be written.
pub fn make(args: &KernelsArgs) -> Result<(), KernelError> {
    let compiler = Nvrtc::get()?;
    let version = compiler.version_text();
    let mut manifest = String::new();
    for arch in &args.arch {
        for file in SOURCES.iter().filter(|file| file.is_for(arch)) {
            let compiled = compile(compiler, file, arch)?;
            let kernels = usage(&compiled.log);
            let spilt: u32 = kernels.iter().map(|kernel| kernel.spill_bytes).sum();
            if kernels.is_empty() || (args.deny_spills && spilt > 0) {
                return Err(KernelError::Compile {
                    arch: arch.clone(),
                    log: format!(
                        "{}.cu has no kernels, or kernels that spill:\n{}",
                        file.name, compiled.log
                    ),
                });
            }
            let name = file_name(file, arch, &version);
            write(&args.out, &name, &compiled.cubin)?;
            println!(
                "{name}: {} bytes, {} kernels, {spilt} bytes spilt",
                compiled.cubin.len(),
                kernels.len()
            );
            let entry = Entry {
                file: name,
                source: file.name,
                arch,
                compiler: &version,
                bytes: compiled.cubin.len(),
                kernels,
            };
            manifest += &serde_json::to_string(&entry).expect("an entry has no maps");
            manifest.push('\n');
        }
    }
    let path = args.out.join("manifest.jsonl");
    fs::write(&path, manifest).map_err(|source| KernelError::Write { path, source })
}

/// Reads the assembler's report: a line that names the kernel, one with its spills, one with its registers.
fn usage(log: &str) -> Vec<Usage> {
    let number_before = |line: &str, word: &str| -> u32 {
        let before = line.find(word).map(|at| line[..at].trim_end());
        before
            .and_then(|text| text.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
            .unwrap_or(0)
    };
    let mut kernels: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            kernels.push(Usage {
                name: rest.split('\'').next().unwrap_or("?").to_owned(),
                registers: 0,
                shared_bytes: 0,
                spill_bytes: 0,
            });
        } else if let Some(kernel) = kernels.last_mut() {
            if line.contains("bytes spill stores") {
                kernel.spill_bytes =
                    number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
            } else if line.contains("Used ") {
                kernel.registers = number_before(line, "registers");
                kernel.shared_bytes = number_before(line, "bytes smem");
            }
        }
    }
    kernels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_machine_code_changes_with_everything_that_changes_it() {
        let file = SourceFile {
            name: "a",
            text: "x",
            only: None,
        };
        let name = file_name(&file, "sm_80", "13.0");
        assert!(name.starts_with("a-sm_80-") && name.ends_with(".cubin"), "{name}");
        assert_eq!(name, file_name(&file, "sm_80", "13.0"));
        for other in [
            file_name(&file, "sm_90a", "13.0"),
            file_name(&file, "sm_80", "13.1"),
            file_name(&SourceFile { text: "y", ..file }, "sm_80", "13.0"),
        ] {
            assert_ne!(name, other);
        }
    }

    #[test]
    fn damaged_machine_code_is_not_used() {
        let folder = tempfile::tempdir().expect("a folder for this test");
        write(folder.path(), "a.cubin", b"code").expect("writable");
        let path = folder.path().join("a.cubin");
        assert_eq!(read(&path).as_deref(), Some(&b"code"[..]));
        let mut bytes = fs::read(&path).expect("written");
        bytes[0] ^= 1;
        fs::write(&path, &bytes).expect("writable");
        assert_eq!(read(&path), None);
        fs::write(&path, b"short").expect("writable");
        assert_eq!(read(&path), None);
    }

    #[test]
    fn the_assemblers_report_is_read() {
        let log = "ptxas info    : Compiling entry function 'norm' for 'sm_90a'\n\
                   ptxas info    : Function properties for norm\n    \
                   0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem";
        let want = Usage {
            name: "norm".into(),
            registers: 40,
            shared_bytes: 1024,
            spill_bytes: 20,
        };
        assert_eq!(usage(log), [want]);
    }
}
