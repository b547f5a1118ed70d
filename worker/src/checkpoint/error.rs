//! One error type for everything that can be wrong with a model folder.
//!
//! Each message is a single line: the file, the key or tensor, what was expected, what was found, and what to do.
//! It is printed as is, and written to the termination log as is, so nothing that comes out of a file reaches it
//! unescaped or unbounded.

use std::{io, path::Path};

/// Why a model folder cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file is absent, unreadable, or not a file.
    #[error("{}: cannot be read: {source}; {advice}", shown(file))]
    Read {
        /// The file or folder.
        file: Box<Path>,
        /// What the operating system said.
        source: io::Error,
        /// What to do about it.
        advice: String,
    },
    /// A file that should hold JSON does not.
    #[error(
        "{}: expected JSON, found {source}; download the file again or repair it",
        shown(file)
    )]
    Json {
        /// The file.
        file: Box<Path>,
        /// Where parsing stopped and why.
        source: serde_json::Error,
    },
    /// A key of a JSON file holds something unusable.
    #[error("{}: {key}: expected {expected}, found {found}{advice}", shown(file))]
    Value {
        /// The file.
        file: Box<Path>,
        /// Path of the key inside the file, with dots.
        key: String,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        found: String,
        /// What to do, beginning with `; `, or empty where the expectation says it.
        advice: String,
    },
    /// A file as a whole is not what it should be.
    #[error("{}: expected {expected}, found {found}; {advice}", shown(file))]
    File {
        /// The file.
        file: Box<Path>,
        /// What would have been accepted.
        expected: String,
        /// What is there.
        found: String,
        /// What to do about it.
        advice: String,
    },
    /// A tensor is missing, or is not the one that the model needs.
    #[error(
        "{}: tensor {tensor}: expected {expected}, found {found}; {advice}",
        shown(file)
    )]
    Tensor {
        /// The file that holds the tensor, or should.
        file: Box<Path>,
        /// The tensor's name.
        tensor: String,
        /// What the model needs.
        expected: String,
        /// What is there.
        found: String,
        /// What to do about it.
        advice: String,
    },
    /// The model cannot be cut into that many ranks.
    #[error(
        "{}: tensor parallel degree {asked} does not fit: {why}; degrees that fit this model: {valid}",
        shown(file)
    )]
    TensorParallel {
        /// The config.json whose numbers decide.
        file: Box<Path>,
        /// The degree asked for.
        asked: usize,
        /// The first number that does not divide.
        why: String,
        /// Every degree up to 64 that would work.
        valid: String,
    },
}

/// A path in one line.
pub(crate) fn shown(path: &Path) -> String {
    one_line(&path.display().to_string())
}

/// `text` without control characters and of bounded length, for use inside a message.
pub(crate) fn one_line(text: &str) -> String {
    const LONGEST: usize = 300; // longer than any sane path or tensor name, shorter than a log line's limit
    let mut line = String::with_capacity(text.len().min(LONGEST));
    for (n, c) in text.chars().enumerate() {
        if n == LONGEST {
            line.push('…');
            break;
        }
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_files_stays_in_one_bounded_line() {
        assert_eq!(one_line("q_proj.重み"), "q_proj.重み");
        assert_eq!(one_line("a\nb\u{1b}[31m\u{2028}"), "a\\nb\\u{1b}[31m\\u{2028}");
        let long = one_line(&"x".repeat(1000));
        assert_eq!(long.chars().count(), 301);
        assert!(long.ends_with('…'));
    }
}
