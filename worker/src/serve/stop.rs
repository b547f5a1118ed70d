//! How a process is asked to end: once for a drain, twice for now.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Both requests.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Take nothing new, end when what runs is done.
    pub drain: CancellationToken,
    /// End now.
    pub now: CancellationToken,
}

impl Stop {
    /// The first SIGTERM or SIGINT drains, the second ends.
    ///
    /// # Errors
    /// Signals cannot be listened to.
    pub fn on_signals() -> std::io::Result<Self> {
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = Self::default();
        let asked = stop.clone();
        // Lives as long as the runtime: a signal may come at any time.
        tokio::spawn(async move {
            for token in [asked.drain, asked.now] {
                let name = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                tracing::info!(signal = name, "asked to end");
                token.cancel();
            }
        });
        Ok(stop)
    }
}
