//! Log lines go to standard error through a thread of their own: whoever does not read them stops nobody.
//!
//! The buffer between is bounded. A line that finds it full is dropped and counted
//! (`swallow_router_log_lines_dropped_total`): a full disk or a stuck collector must cost lines, not requests.

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
    time::Duration,
};

use swallow_proto::launch::LogFormat;
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

/// Lines that wait for the thread: a second or so of a busy router at level debug.
const LINES_MAX: usize = 8192;
/// The last lines of a process have so long to be read.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that nobody read in time, since the process began.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

enum Message {
    Line(Vec<u8>),
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// The way to the log's thread.
#[derive(Clone, Debug)]
pub struct Log(SyncSender<Message>);

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

/// Begins to log, on standard error: `info` and above, unless `RUST_LOG` says otherwise.
pub fn start(format: LogFormat) -> Log {
    let (sender, receiver) = mpsc::sync_channel(LINES_MAX);
    let started = std::thread::Builder::new()
        .name("log".into())
        .spawn(move || write(&receiver));
    if let Err(error) = started {
        // Nothing is lost but the log.
        eprintln!("swallow-router: cannot start a thread, so nothing is logged: {error}");
    }
    let log = Log(sender);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(log.clone());
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
    // A panic is a line like the others, with where it happened.
    std::panic::set_hook(Box::new(|panic| {
        let at = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(
            at,
            message = panic.payload_as_str().unwrap_or("no message"),
            "panic"
        );
    }));
    log
}

fn write(lines: &Receiver<Message>) {
    let mut errors = io::stderr();
    for message in lines {
        match message {
            Message::Line(line) => {
                if errors.write_all(&line).is_err() {
                    DROPPED.fetch_add(1, Ordering::Relaxed);
                }
            }
            // Nobody waits any longer if it took too long.
            Message::Flush(done) => drop(done.try_send(())),
        }
    }
}

impl Log {
    /// Waits until what was logged is written, not for long.
    pub fn flush(&self) {
        let (done, written) = mpsc::sync_channel(1);
        if self.0.try_send(Message::Flush(done)).is_ok() {
            // Whoever reads the log has stopped reading, or it is all there.
            let _ = written.recv_timeout(FLUSH_LIMIT);
        }
    }
}

impl Write for Log {
    /// One event, whole.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0.try_send(Message::Line(line.to_vec())) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                DROPPED.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
