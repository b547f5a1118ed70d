//! Probes and scrapes on a port and threads of their own: a router that is busy to the last thread of its runtime, or has
//! no file descriptor left for clients, still says that it lives, and how busy it is.
//!
//! `/health` is liveness: the process is there. `/readyz` is readiness and `/metrics` the metrics, as on the HTTP port; but
//! here without TLS, whatever clients speak, because who scrapes pods by their IPs has no name to hold a certificate
//! against. Nothing here waits for the runtime or for a lock that is held for long.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use serde_json::{Value, json};

use crate::generate::Door;

/// Questions that may come at the same time, liveness, readiness and a scrape; one that hangs leaves the others.
const THREADS: usize = 3;
/// A prober that has not said or taken everything by then is left.
const PATIENCE: Duration = Duration::from_secs(1);
/// The line that names a path comes first.
const HEAD_BYTES_MAX: usize = 2048;

/// Answers probes at `address` from now on, for as long as the process lives.
///
/// # Errors
/// The port is taken, or there are no threads.
pub fn listen(address: SocketAddr, door: Door) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    for i in 0..THREADS {
        let (listener, door) = (listener.try_clone()?, door.clone());
        std::thread::Builder::new()
            .name(format!("probe {i}"))
            .spawn(move || {
                loop {
                    match listener.accept() {
                        // A prober that leaves is no event.
                        Ok((stream, _)) => drop(answer(stream, &door)),
                        Err(_) => std::thread::sleep(PATIENCE / 10),
                    }
                }
            })?;
    }
    Ok(bound)
}

fn answer(mut stream: TcpStream, door: &Door) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = Vec::new();
    let mut piece = [0; 512];
    while !head.windows(2).any(|end| end == b"\r\n") {
        let read = stream.read(&mut piece)?;
        head.extend_from_slice(&piece[..read]);
        if read == 0 || head.len() > HEAD_BYTES_MAX {
            return Ok(());
        }
    }
    let plain = |text: &str| (text.to_owned(), "text/plain");
    let (status, (text, content_type)) = match path(&head) {
        Some("/health" | "/healthz" | "/livez") => ("200 OK", plain("ok\n")),
        Some("/readyz") => {
            let status = if door.is_ready() {
                "200 OK"
            } else {
                "503 Service Unavailable"
            };
            (status, (readiness(door).to_string(), "application/json"))
        }
        Some("/metrics") => ("200 OK", door.metrics().text()),
        _ => (
            "404 Not Found",
            plain("there are /health, /readyz and /metrics here\n"),
        ),
    };
    let length = text.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{text}"
    )
}

/// What `/readyz` tells: whether requests may be sent here, if not why not, and how many replicas of each model take them.
pub(crate) fn readiness(door: &Door) -> Value {
    let models = door.models();
    let replicas: BTreeMap<&str, usize> = models
        .iter()
        .map(|entry| (entry.name.as_str(), entry.ready_replicas))
        .collect();
    if door.is_ready() {
        return json!({"ready": true, "ready_replicas": replicas});
    }
    let reason = if door.is_leaving() {
        "the router is shutting down"
    } else {
        "looking for replicas"
    };
    json!({"ready": false, "reason": reason, "ready_replicas": replicas})
}

/// Of `GET PATH HTTP/1.1`, without its query.
fn path(head: &[u8]) -> Option<&str> {
    let line = head.split(|&byte| byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    matches!(method, "GET" | "HEAD").then(|| path.split('?').next())?
}
