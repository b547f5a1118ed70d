//! What a start leaves on disk for the starts after it: compiled kernels, and the ways to multiply that were fastest.
//!
//! Files appear whole or not at all, because several workers of a machine start together, and containers that share a
//! volume have the same process numbers.

use std::{
    fs,
    hash::{BuildHasher, RandomState},
    io,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// The folder of one kind of files: below `SWALLOW_CACHE`, or the user's folder for caches; `None` where there is neither.
pub(super) fn folder(kind: &str) -> Option<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = || Some(set("HOME")?.join(".cache"));
    let base = set("SWALLOW_CACHE").or_else(|| Some(set("XDG_CACHE_HOME").or_else(home)?.join("swallow")))?;
    Some(base.join(kind))
}

/// Writes a file, or replaces it.
pub(super) fn put(folder: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let draft = folder.join(format!("{name}.{:016x}", RandomState::new().hash_one(name)));
    let written = fs::write(&draft, bytes).and_then(|()| fs::rename(&draft, folder.join(name)));
    written.inspect_err(|_| {
        // What is left of it has a name that nobody reads.
        let _ = fs::remove_file(&draft);
    })
}

/// Sixteen hexadecimal digits that stand for some texts in their order.
pub(super) fn short_hash(texts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hex(&hash.finalize()[..8])
}

/// Two digits a byte.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_no_draft_stays() {
        let root = tempfile::tempdir().expect("a folder for this test");
        let folder = root.path().join("a/b");
        put(&folder, "x", b"one").expect("writable");
        put(&folder, "x", b"two").expect("writable");
        assert_eq!(fs::read(folder.join("x")).expect("written"), b"two");
        // A folder cannot be replaced by a file.
        fs::create_dir(folder.join("y")).expect("writable");
        put(&folder, "y", b"three").expect_err("there is a folder of this name");
        let names: Vec<_> = fs::read_dir(&folder)
            .expect("there")
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn a_hash_knows_where_one_text_ends() {
        assert_ne!(short_hash(&["ab", "c"]), short_hash(&["a", "bc"]));
        assert_eq!(short_hash(&["a"]).len(), 16);
    }
}
