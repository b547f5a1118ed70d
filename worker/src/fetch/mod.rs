//! Brings a model's files from a Hugging Face compatible endpoint into a folder, whole or not at all.
//!
//! A commit is pinned, so the list of files and their digests never change: an interrupted run continues where it
//! stopped, a finished folder is recognised by its marker without any request, and a file under its final name is
//! always complete and verified. Only what serving needs is fetched. Several runs on one folder take turns.

mod client;
mod door;
mod download;
mod listing;
mod marker;
mod progress;
mod trust;

use std::{
    fs::{self, File},
    io,
    path::Path,
    process, thread,
    time::Duration,
};

use swallow_proto::launch::{FetchArgs, ProgressFormat};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use self::{
    client::Client,
    door::Door,
    download::Downloads,
    listing::{FileSpec, Listing},
    marker::Marker,
};
pub use self::{
    client::Patience,
    progress::{Event, JsonLines, Report, TextLines},
};

/// Why the files are not there.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// An argument cannot be used.
    #[error("--{flag}: expected {expected}, found {found}")]
    Argument {
        /// The argument's name.
        flag: &'static str,
        /// What would have been accepted.
        expected: &'static str,
        /// What was given.
        found: String,
    },
    /// The endpoint wants to know who asks (HTTP 401).
    #[error("{url}: the endpoint wants a valid access token (HTTP 401{said}); give one with --token-file")]
    Unauthorized {
        /// What was asked for.
        url: String,
        /// The endpoint's own words, beginning with a comma, or empty.
        said: String,
    },
    /// The endpoint knows who asks and refuses (HTTP 403).
    #[error(
        "{url}: access is refused (HTTP 403{said}); accept the model's licence on its page with the token's account"
    )]
    Forbidden {
        /// What was asked for.
        url: String,
        /// The endpoint's own words, beginning with a comma, or empty.
        said: String,
    },
    /// The endpoint's certificate is not one to trust.
    #[error(
        "{url}: {reason}; if it is a mirror with a private certificate authority, give the authority's PEM file with \
         --ca-file"
    )]
    Certificate {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such repository, commit or file (HTTP 404).
    #[error(
        "{url}: not found (HTTP 404{said}); check --repo, --revision and --endpoint, or give --token-file"
    )]
    NotFound {
        /// What was asked for.
        url: String,
        /// The endpoint's own words, beginning with a comma, or empty.
        said: String,
    },
    /// An answer that trying again would not change.
    #[error("{url}: expected {expected}, found {found}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        found: String,
    },
    /// Trying again did not help.
    #[error(
        "{url}: gave up after {tries} tries in a row, the last ended with: {reason}; run the command again to continue"
    )]
    GaveUp {
        /// What was asked for.
        url: String,
        /// How many times.
        tries: u32,
        /// How the last try ended.
        reason: String,
    },
    /// The repository is not a model that can be served.
    #[error("{repo}: expected {expected}, found {found}")]
    Repository {
        /// The repository.
        repo: String,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// The bytes that came are not those that the endpoint promised.
    #[error(
        "{name}: expected {expected}, found {found} after a complete download; the endpoint or the network corrupts data"
    )]
    Corrupt {
        /// The file's name in the repository.
        name: String,
        /// The promised digest.
        expected: String,
        /// The digest of what came.
        found: String,
    },
    /// The folder's disk is too small.
    #[error(
        "{dir}: {needed} more bytes are needed and {free} are free; free some space or choose another --out"
    )]
    NoSpace {
        /// The folder.
        dir: String,
        /// Bytes that are still to come.
        needed: u64,
        /// Bytes that the disk has left.
        free: u64,
    },
    /// A local file cannot be read or written.
    #[error("{path}: {source}; {advice}")]
    Local {
        /// The file or folder.
        path: String,
        /// What the operating system said.
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
}

impl FetchError {
    fn local(path: &Path, source: io::Error) -> FetchError {
        let advice = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "free some space or choose another --out"
            }
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                "--out must name a folder that this user may write to"
            }
            _ => "check --out",
        };
        FetchError::Local {
            path: shown(path),
            source,
            advice,
        }
    }
}

fn shown(path: &Path) -> String {
    crate::checkpoint::one_line(&path.display().to_string())
}

/// As shells say it: 128 and the signal's number.
const ENDED_BY_SIGTERM: i32 = 143;

/// Runs the subcommand: fetches what `args` name and tells of the progress in the form they ask for.
pub fn run(args: FetchArgs) -> Result<(), FetchError> {
    end_when_told();
    let patience = Patience::default();
    let mut lines: Box<dyn Report> = match args.progress {
        ProgressFormat::Text => Box::new(TextLines::new()),
        ProgressFormat::Json => Box::new(JsonLines::new(io::stdout())),
    };
    match args.http_listen {
        Some(address) => fetch(&args, &patience, &mut Door::open(address, lines)?),
        None => fetch(&args, &patience, &mut *lines),
    }
}

/// Ends the process at SIGTERM, also as the first process of a container, whose default is to ignore it. Nothing is lost:
/// another run continues.
fn end_when_told() {
    let wait = || {
        let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            signal(SignalKind::terminate())?.recv().await;
            io::Result::Ok(())
        })
    };
    let end = move || {
        if wait().is_ok() {
            eprintln!("ended by SIGTERM; run the command again to continue");
            process::exit(ENDED_BY_SIGTERM);
        }
    };
    // Without the thread the process ends later, at SIGKILL.
    drop(thread::Builder::new().name("signals".into()).spawn(end));
}

/// Fetches what `args` name; returns when every file is there and verified. `args.progress` and
/// `args.http_listen` are for [`run`] alone.
pub fn fetch(args: &FetchArgs, patience: &Patience, report: &mut dyn Report) -> Result<(), FetchError> {
    let wanted = Wanted::new(args)?;
    // Before anything is written: the folder may be complete and read-only.
    if let Some(marker) = Marker::read(&args.out)
        && marker.is_complete(&args.out, &wanted.repo, &wanted.revision)
    {
        report.event(&Event::AlreadyComplete {
            bytes_total: marker.n_bytes(),
        });
        return Ok(());
    }
    let client = Client::new(args, patience.clone())?;
    fs::create_dir_all(&args.out).map_err(|source| FetchError::local(&args.out, source))?;
    let _turn = take_turn(&args.out, report)?;
    let before = Marker::read(&args.out);
    if let Some(marker) = &before
        && marker.is_complete(&args.out, &wanted.repo, &wanted.revision)
    {
        report.event(&Event::AlreadyComplete {
            bytes_total: marker.n_bytes(),
        });
        return Ok(());
    }
    fetch_into(&args.out, &client, &wanted, before, report)
}

/// The checked form of the arguments that name the model.
struct Wanted {
    repo: String,
    revision: String,
}

impl Wanted {
    fn new(args: &FetchArgs) -> Result<Wanted, FetchError> {
        let part = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        if !args
            .repo
            .split_once('/')
            .is_some_and(|(org, name)| part(org) && part(name))
        {
            let expected = "ORG/NAME of ASCII letters, digits, '-', '_' and '.'";
            return Err(FetchError::Argument {
                flag: "repo",
                expected,
                found: format!("{:?}", args.repo),
            });
        }
        if args.revision.len() != 40 || !args.revision.chars().all(|c| c.is_ascii_hexdigit()) {
            let expected = "a commit of 40 hexadecimal digits (branches and tags move)";
            let found = format!("{:?}", args.revision);
            return Err(FetchError::Argument {
                flag: "revision",
                expected,
                found,
            });
        }
        Ok(Wanted {
            repo: args.repo.clone(),
            revision: args.revision.to_ascii_lowercase(),
        })
    }
}

/// Holds the folder's lock until dropped; waits for another run that has it.
fn take_turn(out: &Path, report: &mut dyn Report) -> Result<File, FetchError> {
    let path = out.join(".fetch.lock");
    let failed = |source| FetchError::local(&path, source);
    let lock = File::create(&path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            report.event(&Event::Waiting);
            lock.lock().map_err(failed)?;
        }
        Err(fs::TryLockError::Error(source)) => return Err(failed(source)),
    }
    Ok(lock)
}

fn fetch_into(
    out: &Path,
    client: &Client,
    wanted: &Wanted,
    before: Option<Marker>,
    report: &mut dyn Report,
) -> Result<(), FetchError> {
    let listing = Listing::fetch(client, wanted, report)?;
    let mut downloads = Downloads::new(out, client, wanted, report)?;
    let weights = match listing.single()? {
        Some(single) => vec![single],
        None => {
            let index = listing.index()?;
            let text = downloads.fetch_small(&index)?;
            let mut files = listing.shards(&text)?;
            files.push(index);
            files
        }
    };
    let mut files: Vec<FileSpec> = listing.text_files()?;
    files.extend(weights);
    let started = Marker::started(&wanted.repo, &wanted.revision, &files, before);
    started.write(out)?;
    downloads.fetch_all(&files)?;
    let bytes_total = files.iter().map(|file| file.size).sum();
    started.finish(out, &files)?;
    report.event(&Event::Complete { bytes_total });
    Ok(())
}

/// How long to wait before try `n`, counted from 1, unless the endpoint asked for a wait of its own.
fn wait_before(n: u32, patience: &Patience, asked: Option<Duration>) -> Duration {
    const LONGEST: Duration = Duration::from_secs(60);
    let doubled = patience.first_wait.saturating_mul(1 << (n - 1).min(16));
    asked.unwrap_or(doubled).min(LONGEST)
}
