//! How far a fetch is, over HTTP for as long as it runs: an operator reads it like the `/state` of a worker that loads.
//!
//! The fetch computes on the main thread and the door has its own, so that a slow disk does not keep it from answering.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use axum::{Json, Router, routing::get};
use serde::Serialize;
use tokio::{net::TcpListener, runtime};

use super::{Event, FetchError, Report, progress::Meter};

/// What `/state` says.
#[derive(Clone, Debug, Serialize)]
struct View {
    /// Tells it from a worker's.
    phase: &'static str,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
struct Progress {
    /// Bytes that are there and verified or being verified.
    bytes_done: u64,
    /// Zero while unknown, and while another run has its turn.
    bytes_total: u64,
    eta_seconds: Option<u64>,
}

/// Shows events at an address before it passes them on.
pub(super) struct Door {
    shown: Arc<Mutex<Progress>>,
    meter: Meter,
    then: Box<dyn Report>,
}

impl Door {
    /// Listens from now on until the process ends.
    pub(super) fn open(address: SocketAddr, then: Box<dyn Report>) -> Result<Door, FetchError> {
        let shown = Arc::new(Mutex::new(Progress::default()));
        let refused = |error: std::io::Error| FetchError::Argument {
            flag: "http-listen",
            expected: "an address that this process can listen on",
            found: format!("{address}: {error}"),
        };
        let runtime = runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(refused)?;
        let listener = runtime.block_on(TcpListener::bind(address)).map_err(refused)?;
        let to_show = shown.clone();
        let state = move || {
            let progress = *lock(&to_show);
            async move {
                Json(View {
                    phase: "fetching",
                    progress,
                })
            }
        };
        let app = Router::new().route("/state", get(state));
        thread::Builder::new()
            .name("door".into())
            .spawn(move || {
                // Whoever asks can do without the answer; the fetch goes on.
                let _ = runtime.block_on(async { axum::serve(listener, app).await });
            })
            .map_err(refused)?;
        Ok(Door {
            shown,
            meter: Meter::default(),
            then,
        })
    }

    fn show(&mut self, bytes_done: u64, bytes_total: u64) {
        self.meter
            .sample(Instant::now(), bytes_done, Duration::from_secs(1));
        *lock(&self.shown) = Progress {
            bytes_done,
            bytes_total,
            eta_seconds: self.meter.seconds_left(bytes_done, bytes_total),
        };
    }
}

impl Report for Door {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Progress {
                bytes_done,
                bytes_total,
                ..
            } => self.show(*bytes_done, *bytes_total),
            Event::Planned { bytes_total, .. } => self.show(0, *bytes_total),
            Event::AlreadyComplete { bytes_total } | Event::Complete { bytes_total } => {
                self.show(*bytes_total, *bytes_total);
            }
            Event::Waiting | Event::File { .. } | Event::Retry { .. } => {}
        }
        self.then.event(event);
    }
}

fn lock(shown: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    // Plain values: a panic while one is written leaves nothing half done.
    shown.lock().unwrap_or_else(PoisonError::into_inner)
}
