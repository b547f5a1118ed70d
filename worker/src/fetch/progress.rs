//! What happens during a fetch, told to a person or to a program.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use serde_json::json;

use crate::checkpoint::one_line;

/// Something worth telling.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The folder holds the commit already; nothing was asked for.
    AlreadyComplete {
        /// Of all files.
        bytes_total: u64,
    },
    /// Another run is busy with the folder; this one waits for it.
    Waiting,
    /// It is known what must be there in the end.
    Planned {
        /// How many files.
        files: usize,
        /// Their bytes.
        bytes_total: u64,
    },
    /// Bytes came; many a second.
    Progress {
        /// The file they belong to.
        name: String,
        /// Of all files, as far as they are on disk.
        bytes_done: u64,
        /// Of all files; 0 before it is known.
        bytes_total: u64,
    },
    /// A file is there and verified.
    File {
        /// Its name.
        name: String,
        /// Its length.
        bytes: u64,
    },
    /// A try failed and another one follows.
    Retry {
        /// What was asked for.
        url: String,
        /// How it failed.
        reason: String,
        /// How long until the next try.
        wait: Duration,
    },
    /// All files are there and verified.
    Complete {
        /// Of all files.
        bytes_total: u64,
    },
}

/// Takes events as they happen.
pub trait Report {
    /// Called for each of them; should return at once.
    fn event(&mut self, event: &Event);
}

/// Speed and time left, from samples of how much is done.
#[derive(Debug, Default)]
pub(super) struct Meter {
    last: Option<(Instant, u64)>,
    /// Smoothed over a few samples; None before two of them.
    bytes_per_second: Option<f64>,
}

impl Meter {
    /// Takes a sample if `interval` has passed since the last one; says whether it did.
    pub(super) fn sample(&mut self, now: Instant, done: u64, interval: Duration) -> bool {
        let Some((then, before)) = self.last else {
            self.last = Some((now, done));
            return true;
        };
        let passed = now.saturating_duration_since(then);
        if passed < interval || passed.is_zero() {
            return false;
        }
        let speed = done.saturating_sub(before) as f64 / passed.as_secs_f64();
        const NEW: f64 = 0.3; // the weight of the newest sample: steady, yet follows a change within seconds
        self.bytes_per_second = Some(
            self.bytes_per_second
                .map_or(speed, |old| NEW * speed + (1.0 - NEW) * old),
        );
        self.last = Some((now, done));
        true
    }

    pub(super) fn seconds_left(&self, done: u64, total: u64) -> Option<u64> {
        let speed = self.bytes_per_second.filter(|speed| *speed > 0.0)?;
        Some((total.saturating_sub(done) as f64 / speed).ceil() as u64)
    }
}

/// One JSON object a line.
pub struct JsonLines<W> {
    to: W,
    meter: Meter,
}

impl<W: Write> JsonLines<W> {
    /// Writes to `to`.
    pub fn new(to: W) -> JsonLines<W> {
        JsonLines {
            to,
            meter: Meter::default(),
        }
    }
}

impl<W: Write> Report for JsonLines<W> {
    fn event(&mut self, event: &Event) {
        let line = match event {
            Event::AlreadyComplete { bytes_total } => {
                json!({"event": "complete", "already": true, "bytes_total": bytes_total})
            }
            Event::Waiting => json!({"event": "waiting"}),
            Event::Planned { files, bytes_total } => {
                json!({"event": "planned", "files": files, "bytes_total": bytes_total})
            }
            Event::Progress {
                name,
                bytes_done,
                bytes_total,
            } => {
                if !self
                    .meter
                    .sample(Instant::now(), *bytes_done, Duration::from_secs(1))
                {
                    return;
                }
                json!({
                    "event": "progress", "file": name, "bytes_done": bytes_done, "bytes_total": bytes_total,
                    "bytes_per_second": self.meter.bytes_per_second.map(|speed| speed as u64),
                    "eta_seconds": self.meter.seconds_left(*bytes_done, *bytes_total),
                })
            }
            Event::File { name, bytes } => json!({"event": "file", "file": name, "bytes": bytes}),
            Event::Retry { url, reason, wait } => {
                json!({"event": "retry", "url": url, "reason": reason, "wait_seconds": wait.as_secs_f64()})
            }
            Event::Complete { bytes_total } => {
                json!({"event": "complete", "already": false, "bytes_total": bytes_total})
            }
        };
        // A reader that went away is no reason to stop a download.
        let _ = writeln!(self.to, "{line}").and_then(|()| self.to.flush());
    }
}

/// Lines for people on stderr; on a terminal, one line that moves.
pub struct TextLines {
    is_terminal: bool,
    /// The moving line is on the screen, without its end.
    is_open: bool,
    meter: Meter,
}

impl TextLines {
    /// Writes to stderr.
    #[expect(
        clippy::new_without_default,
        reason = "it looks at stderr, which a default should not"
    )]
    pub fn new() -> TextLines {
        TextLines {
            is_terminal: io::stderr().is_terminal(),
            is_open: false,
            meter: Meter::default(),
        }
    }

    fn line(&mut self, text: &str) {
        let start = if self.is_open { "\r\x1b[K" } else { "" };
        self.is_open = false;
        // As for JSON: nobody reading is no reason to stop.
        let _ = writeln!(io::stderr(), "{start}{text}");
    }

    fn moving_line(&mut self, text: &str) {
        if !self.is_terminal {
            return self.line(text);
        }
        self.is_open = true;
        let _ = write!(io::stderr(), "\r\x1b[K{text}");
    }
}

impl Report for TextLines {
    fn event(&mut self, event: &Event) {
        match event {
            Event::AlreadyComplete { bytes_total } => {
                self.line(&format!("complete already: {}", size(*bytes_total)));
            }
            Event::Waiting => self.line("another fetch into this folder is running; waiting for it"),
            Event::Planned { files, bytes_total } => {
                self.line(&format!("{files} files, {}", size(*bytes_total)));
            }
            Event::Progress {
                name,
                bytes_done,
                bytes_total,
            } => {
                let interval = Duration::from_millis(if self.is_terminal { 500 } else { 10_000 });
                if self.meter.sample(Instant::now(), *bytes_done, interval) {
                    self.moving_line(&progress_line(&self.meter, name, *bytes_done, *bytes_total));
                }
            }
            Event::File { name, bytes } => self.line(&format!("{}  {}", one_line(name), size(*bytes))),
            Event::Retry { url, reason, wait } => {
                self.line(&format!(
                    "{url}: {reason}; trying again in {:.0} s",
                    wait.as_secs_f64().ceil()
                ));
            }
            Event::Complete { bytes_total } => self.line(&format!("complete: {}", size(*bytes_total))),
        }
    }
}

fn progress_line(meter: &Meter, name: &str, done: u64, total: u64) -> String {
    let percent = done.saturating_mul(100).checked_div(total).unwrap_or(0);
    let mut line = format!("{percent:>3} %  {} of {}", size(done), size(total));
    if let Some(speed) = meter.bytes_per_second {
        line += &format!("  {}/s", size(speed as u64));
    }
    if let Some(seconds) = meter.seconds_left(done, total) {
        line += &format!("  ETA {}:{:02}", seconds / 60, seconds % 60);
    }
    line + "  " + &one_line(name)
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1e3;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1e3;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_949, "999.9 kB"),
            (999_950, "1.0 MB"),
            (141_107_413_000, "141.1 GB"),
            (u64::MAX, "18446744.1 TB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn the_time_left_follows_the_speed() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut meter = Meter::default();
        assert!(
            meter.sample(start, 500, second),
            "the first sample is always taken"
        );
        assert_eq!(meter.seconds_left(500, 1000), None);
        assert!(!meter.sample(start + second / 2, 550, second));
        assert!(meter.sample(start + second, 600, second));
        assert_eq!(meter.bytes_per_second, Some(100.0));
        assert_eq!(meter.seconds_left(600, 1000), Some(4));
        assert_eq!(
            progress_line(&meter, "a.bin", 600, 1000),
            " 60 %  600 B of 1.0 kB  100 B/s  ETA 0:04  a.bin"
        );
        assert!(meter.sample(start + 2 * second, 600, second));
        assert_eq!(meter.bytes_per_second, Some(70.0));
    }

    #[test]
    fn programs_get_one_object_a_line() {
        let mut lines = JsonLines::new(Vec::new());
        let wait = Duration::from_millis(1500);
        lines.event(&Event::Retry {
            url: "http://a/b".into(),
            reason: "x\ny".into(),
            wait,
        });
        lines.event(&Event::Complete { bytes_total: 7 });
        assert_eq!(
            String::from_utf8(lines.to).expect("JSON is UTF-8"),
            "{\"event\":\"retry\",\"url\":\"http://a/b\",\"reason\":\"x\\ny\",\"wait_seconds\":1.5}\n\
             {\"event\":\"complete\",\"already\":false,\"bytes_total\":7}\n"
        );
    }
}
