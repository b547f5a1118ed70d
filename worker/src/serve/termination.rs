//! The last word of a process that fails: one line in the log and the same line in the termination log, where
//! Kubernetes and the operator find it.

use std::{
    panic::PanicHookInfo,
    path::{Path, PathBuf},
};

/// Kubernetes keeps 4096 bytes.
const MESSAGE_MAX: usize = 4096;

/// Where the last word goes.
#[derive(Clone, Debug, Default)]
pub struct TerminationLog(Option<PathBuf>);

impl TerminationLog {
    /// `None`: nowhere but the log.
    pub fn new(file: Option<PathBuf>) -> Self {
        Self(file)
    }

    /// Replaces what the file said: the last word is the one that counts.
    pub fn write(&self, message: &str) {
        let Some(file) = &self.0 else { return };
        let line = one_line(message);
        if let Err(error) = std::fs::write(file, format!("{line}\n")) {
            tracing::warn!(file = %file.display(), %error, "the termination log was not written");
        }
    }

    /// Logs every panic and leaves it as the last word; a failure that is noticed later says more and replaces it.
    pub fn on_panic(&self) {
        let log = self.clone();
        std::panic::set_hook(Box::new(move |panic| {
            let message = describe(panic);
            tracing::error!("{message}");
            log.write(&message);
        }));
    }

    /// The file, if any.
    pub fn file(&self) -> Option<&Path> {
        self.0.as_deref()
    }
}

fn describe(panic: &PanicHookInfo<'_>) -> String {
    let what = panic.payload_as_str().unwrap_or("a panic without words");
    let thread = std::thread::current();
    let place = panic
        .location()
        .map(|place| format!(" at {}:{}", place.file(), place.line()))
        .unwrap_or_default();
    format!(
        "thread '{}' panicked{place}: {what}",
        thread.name().unwrap_or("unnamed")
    )
}

/// Without line breaks and within the limit, cut between characters.
pub(crate) fn one_line(message: &str) -> String {
    let words: Vec<&str> = message
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let mut line = words.join(" ");
    line.truncate(line.floor_char_boundary(MESSAGE_MAX - 1));
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_one_line_within_the_limit() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("termination-log");
        let log = TerminationLog::new(Some(file.clone()));
        log.write("first");
        log.write(&format!("a\n  b\n{}", "\u{65e5}".repeat(3000)));
        let text = std::fs::read_to_string(file).expect("written");
        assert!(
            text.starts_with("a b \u{65e5}") && text.ends_with("\u{65e5}\n") && text.len() <= MESSAGE_MAX
        );
        assert_eq!(text.lines().count(), 1);
    }
}
