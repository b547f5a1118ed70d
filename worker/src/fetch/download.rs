//! One file at a time: continued where an earlier try stopped, verified, then moved to its final name.
//!
//! Bytes are hashed as they come. What an earlier run left is hashed once before it is continued, so a file is never
//! taken over on trust, and its name in the partial folder carries its digest, so no other version is continued.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
};

use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use ureq::http::{StatusCode, header};

use super::{
    Event, FetchError, Report, Wanted,
    client::{Client, Trouble},
    listing::{Digest, FileSpec},
    shown,
};
use crate::checkpoint::one_line;

/// Downloads into one folder.
pub(super) struct Downloads<'a> {
    out: &'a Path,
    partial: PathBuf,
    client: &'a Client,
    wanted: &'a Wanted,
    report: &'a mut dyn Report,
    /// Bytes of finished files.
    done: u64,
    total: u64,
}

const BUFFER: usize = 256 << 10;
// A try that brought at least this much counts as progress: an endpoint that cuts long downloads is no failing one.
const PROGRESS: u64 = 8 << 20;
const SMALL: u64 = 64 << 20;

/// How a try at one file ended short of success.
enum Setback {
    Try(Trouble),
    /// The bytes are all there and wrong; they are gone now.
    Corrupt {
        found: String,
    },
}

impl<'a> Downloads<'a> {
    pub(super) fn new(
        out: &'a Path,
        client: &'a Client,
        wanted: &'a Wanted,
        report: &'a mut dyn Report,
    ) -> Result<Downloads<'a>, FetchError> {
        let partial = out.join(".partial");
        fs::create_dir_all(&partial).map_err(|source| FetchError::local(&partial, source))?;
        Ok(Downloads {
            out,
            partial,
            client,
            wanted,
            report,
            done: 0,
            total: 0,
        })
    }

    /// Returns the content of one small file ahead of the others. It does not get its final name yet: the folder may
    /// still hold another commit, whole.
    pub(super) fn fetch_small(&mut self, file: &FileSpec) -> Result<Vec<u8>, FetchError> {
        if file.size > SMALL {
            let (expected, found) = (format!("at most {SMALL} bytes"), format!("{} bytes", file.size));
            return Err(FetchError::Answer {
                url: one_line(&file.name),
                expected,
                found,
            });
        }
        let mut path = self.out.join(&file.name);
        if !self.is_verified(&path, file) {
            path = self.download(file)?;
        }
        fs::read(&path).map_err(|source| FetchError::local(&path, source))
    }

    /// Fetches `files` in their order; all of them are there and verified when it returns.
    pub(super) fn fetch_all(&mut self, files: &[FileSpec]) -> Result<(), FetchError> {
        self.done = 0;
        self.total = files.iter().map(|file| file.size).sum();
        self.check_space(files)?;
        self.report.event(&Event::Planned {
            files: files.len(),
            bytes_total: self.total,
        });
        for file in files {
            self.fetch_one(file)?;
            self.done += file.size;
            self.progress(file, 0);
            self.report.event(&Event::File {
                name: file.name.clone(),
                bytes: file.size,
            });
        }
        // Nothing in it is wanted any more; what is left belongs to commits that were never finished.
        fs::remove_dir_all(&self.partial).map_err(|source| FetchError::local(&self.partial, source))
    }

    fn progress(&mut self, file: &FileSpec, have: u64) {
        let (name, bytes_done) = (file.name.clone(), self.done + have);
        self.report.event(&Event::Progress {
            name,
            bytes_done,
            bytes_total: self.total,
        });
    }

    /// Says at the start, and not after hours, that the disk is too small.
    fn check_space(&self, files: &[FileSpec]) -> Result<(), FetchError> {
        let length = |path: &Path| fs::metadata(path).map_or(0, |found| found.len());
        let missing = |file: &FileSpec| {
            let there = length(&self.out.join(&file.name)) == file.size;
            if there {
                0
            } else {
                file.size.saturating_sub(length(&self.partial_path(file)))
            }
        };
        let needed: u64 = files.iter().map(missing).sum();
        // A file system that does not tell is no reason to stop.
        let Ok(found) = nix::sys::statvfs::statvfs(self.out) else {
            return Ok(());
        };
        let free = found.blocks_available() * found.fragment_size();
        if needed > free {
            return Err(FetchError::NoSpace {
                dir: shown(self.out),
                needed,
                free,
            });
        }
        Ok(())
    }

    fn partial_path(&self, file: &FileSpec) -> PathBuf {
        self.partial
            .join(format!("{}.{}", file.name, &file.digest.hex()[..16]))
    }

    /// The file under its final name is the right one already.
    fn is_verified(&mut self, path: &Path, file: &FileSpec) -> bool {
        let mut digest = || {
            let mut found = File::open(path)?;
            let mut hasher = Hasher::new(file);
            hasher.read(&mut found, file.size, |verified| self.progress(file, verified))?;
            io::Result::Ok(hasher.finish())
        };
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == file.size)
            && digest().is_ok_and(|digest| digest == file.digest)
    }

    fn fetch_one(&mut self, file: &FileSpec) -> Result<(), FetchError> {
        let path = self.out.join(&file.name);
        if self.is_verified(&path, file) {
            return Ok(());
        }
        let partial = self.download(file)?;
        fs::rename(&partial, &path).map_err(|source| FetchError::local(&path, source))
    }

    /// Brings a file into the partial folder, with as many tries as patience has, and returns its path there.
    fn download(&mut self, file: &FileSpec) -> Result<PathBuf, FetchError> {
        let Wanted { repo, revision } = self.wanted;
        let url = self
            .client
            .url(&format!("/{repo}/resolve/{revision}/{}", encoded(&file.name)));
        let partial = self.partial_path(file);
        let mut failures = 0;
        let mut corrupted = false;
        loop {
            let before = fs::metadata(&partial).map_or(0, |found| found.len());
            match self.try_one(&url, &partial, file)? {
                Ok(()) => return Ok(partial),
                // An old part may have been bad; bytes that all came in this run were not.
                Err(Setback::Corrupt { .. }) if before > 0 && !corrupted => corrupted = true,
                Err(Setback::Corrupt { found }) => {
                    let (name, expected) = (one_line(&file.name), file.digest.to_string());
                    return Err(FetchError::Corrupt {
                        name,
                        expected,
                        found,
                    });
                }
                Err(Setback::Try(trouble)) => {
                    let now = fs::metadata(&partial).map_or(0, |found| found.len());
                    if now.saturating_sub(before) >= PROGRESS {
                        failures = 0;
                    }
                    self.client.pause(&url, &mut failures, trouble, self.report)?;
                }
            }
        }
    }

    /// One try at the rest of a file. The outer error is final and local; the inner one may pass.
    fn try_one(
        &mut self,
        url: &str,
        partial: &Path,
        file: &FileSpec,
    ) -> Result<Result<(), Setback>, FetchError> {
        let local = |source| FetchError::local(partial, source);
        let mut target = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(partial)
            .map_err(local)?;
        let mut hasher = Hasher::new(file);
        let mut have = target.metadata().map_err(local)?.len();
        if have > file.size {
            restart(&mut target, &mut hasher, file).map_err(local)?;
            have = 0;
        }
        hasher
            .read(&mut target, have, |verified| self.progress(file, verified))
            .map_err(local)?;
        if have < file.size {
            let mut response = match self.client.get(url, have) {
                Ok(response) => response,
                Err(trouble) => return Ok(Err(Setback::Try(trouble))),
            };
            match continues_at(&response, have) {
                Some(true) => {}
                // The endpoint sends all of it, or cannot continue there.
                Some(false) | None => {
                    let all = response.status() == StatusCode::OK;
                    restart(&mut target, &mut hasher, file).map_err(local)?;
                    have = 0;
                    if !all {
                        let reason = format!("HTTP {} to a request for a part", response.status());
                        return Ok(Err(Setback::Try(Trouble::Passing(reason, None))));
                    }
                }
            }
            let mut body = response.body_mut().as_reader();
            if let Err(trouble) = self.copy(&mut body, &mut target, &mut hasher, have, file)? {
                return Ok(Err(Setback::Try(trouble)));
            }
        }
        let found = hasher.finish();
        if found != file.digest {
            fs::remove_file(partial).map_err(local)?;
            return Ok(Err(Setback::Corrupt {
                found: found.to_string(),
            }));
        }
        target.sync_all().map_err(local)?;
        Ok(Ok(()))
    }

    /// Copies until the file has its size. The outer error is final and local; the inner one may pass.
    fn copy(
        &mut self,
        body: &mut impl Read,
        target: &mut File,
        hasher: &mut Hasher,
        mut have: u64,
        file: &FileSpec,
    ) -> Result<Result<(), Trouble>, FetchError> {
        let mut buffer = vec![0; BUFFER];
        while have < file.size {
            let n = match body.read(&mut buffer) {
                Ok(0) => {
                    let reason = format!("the connection ended at byte {have} of {}", file.size);
                    return Ok(Err(Trouble::Passing(reason, None)));
                }
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let reason = format!("{} at byte {have} of {}", one_line(&error.to_string()), file.size);
                    return Ok(Err(Trouble::Passing(reason, None)));
                }
            };
            // An answer that is longer than promised is cut; its digest tells whether that was right.
            let n = n.min(usize::try_from(file.size - have).unwrap_or(n));
            target
                .write_all(&buffer[..n])
                .map_err(|source| FetchError::local(self.out, source))?;
            hasher.update(&buffer[..n]);
            have += n as u64;
            self.progress(file, have);
        }
        Ok(Ok(()))
    }
}

/// Whether an answer goes on at byte `have`: Some(true), starts at the beginning: Some(false), neither: None.
fn continues_at(response: &ureq::http::Response<ureq::Body>, have: u64) -> Option<bool> {
    if response.status() == StatusCode::OK {
        return Some(have == 0);
    }
    let range = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let first = range.strip_prefix("bytes ")?.split_once('-')?.0;
    let right = response.status() == StatusCode::PARTIAL_CONTENT && first.parse() == Ok(have);
    right.then_some(true)
}

fn restart(target: &mut File, hasher: &mut Hasher, file: &FileSpec) -> io::Result<()> {
    *hasher = Hasher::new(file);
    target.set_len(0)?;
    target.rewind()
}

enum Hasher {
    Sha256(Box<Sha256>),
    GitBlob(Box<Sha1>),
}

impl Hasher {
    fn new(file: &FileSpec) -> Hasher {
        match file.digest {
            Digest::Sha256(_) => Hasher::Sha256(Box::default()),
            Digest::GitBlob(_) => {
                let mut sha1 = Sha1::new();
                sha1.update(format!("blob {}\0", file.size));
                Hasher::GitBlob(Box::new(sha1))
            }
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::GitBlob(hasher) => hasher.update(bytes),
        }
    }

    /// Takes in the next `n` bytes of `file`, or as many as it has, and tells how many it has taken as it goes: reading
    /// back a large part is work too, and must not look like standing still.
    fn read(&mut self, file: &mut File, n: u64, mut tell: impl FnMut(u64)) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut rest = file.take(n);
        let mut taken = 0;
        loop {
            match rest.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    self.update(&buffer[..n]);
                    taken += n as u64;
                    tell(taken);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn finish(self) -> Digest {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Hasher::Sha256(hasher) => Digest::Sha256(hex(&hasher.finalize())),
            Hasher::GitBlob(hasher) => Digest::GitBlob(hex(&hasher.finalize())),
        }
    }
}

/// A file's name as a segment of an address.
fn encoded(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    let one = |byte: u8| {
        if plain(byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    };
    name.bytes().map(one).collect()
}
