//! Sockets of both fronts: accept, limits, and an end within a deadline.
//!
//! axum's and tonic's own servers are not used: the one leaves Nagle's delay on, the other's request timeout stops at
//! the response's headers, its maximum age never says GOAWAY, and its graceful end may never come. Here the loop of
//! every connection is ours: no delay, bounded headers and bodies and a bounded time to send them, an age at which
//! clients are asked to come again elsewhere, and a shutdown that ends when it should.

mod body;
mod connection;

use std::{
    convert::Infallible,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use http_body_util::BodyExt;
use prometheus::IntGauge;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinSet,
};

use tokio_rustls::TlsAcceptor;
use tower::util::BoxCloneSyncService;

pub use body::Stalled;

use crate::dispatch::SLOW_CLIENT_LIMIT;
use connection::Connection;

/// Open connections, unless a limit on file descriptors is lower. Each may carry many streams.
const MAX_CONNECTIONS: usize = 16 << 10;
/// File descriptors that are not for clients: sessions with workers, files, the API server.
const RESERVED_FILES: usize = 128;
/// After a failed accept, as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A client that was given up has so long to take what is on its way, and the reason.
pub const LAST_WORDS_LIMIT: Duration = Duration::from_secs(30);
/// Bodies of all requests together while they are read: beyond it requests are refused, so that many large ones at
/// once cannot take all memory.
const BODY_BYTES_MAX: usize = 256 << 20;

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// gRPC over HTTP/2.
    Grpc,
}

impl Protocol {
    /// For a metric.
    pub fn label(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        }
    }
}

/// How patient a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A client that has not sent its first request's headers by then, or those of a later one so long after their
    /// first byte, is cut; so is one that has not finished HTTP/2's preface.
    pub head: Duration,
    /// A request's body is waited for so long, and longer for what has come of it.
    pub body: Duration,
    /// A connection without a request is closed after this.
    pub idle: Duration,
    /// At this age, a tenth more or less, a client is told to open a new connection, so that load spreads over routers
    /// that came later. `None`: never.
    pub age: Option<Duration>,
    /// Streams that are open at that age have so long to end.
    pub grace: Duration,
    /// A peer that leaves sent bytes unacknowledged for so long is gone, or has taken nothing for so long. Longer than a
    /// slow client's request is waited for: that one is to be told.
    pub unacknowledged: Duration,
    /// A silent HTTP/2 peer is asked for a sign of life, and has as long to give it.
    pub keepalive: Duration,
}

impl Limits {
    /// Of a protocol, where nothing else is configured.
    pub fn of(protocol: Protocol) -> Self {
        Self {
            head: Duration::from_secs(10),
            body: Duration::from_secs(30),
            idle: match protocol {
                // Longer than what pools of clients and proxies keep a connection for.
                Protocol::Http => Duration::from_secs(75),
                Protocol::Grpc => Duration::from_secs(900),
            },
            age: Some(Duration::from_secs(1800)),
            grace: Duration::from_secs(1800),
            unacknowledged: SLOW_CLIENT_LIMIT + LAST_WORDS_LIMIT,
            keepalive: Duration::from_secs(5),
        }
    }
}

/// How many connections may be open, over all ports. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Places {
    connections: Arc<Semaphore>,
    body_bytes: Arc<AtomicUsize>,
}

impl Places {
    /// For a process that may open so many files.
    pub fn new(files: usize) -> Self {
        let connections = MAX_CONNECTIONS.min(files.saturating_sub(RESERVED_FILES)).max(1);
        Self {
            connections: Arc::new(Semaphore::new(connections)),
            body_bytes: Arc::default(),
        }
    }
}

/// What answers requests, whatever they come over: always ready, and never without an answer.
pub type Front = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// A port to serve.
pub struct Port {
    /// Bound.
    pub listener: TcpListener,
    /// What it speaks.
    pub protocol: Protocol,
    /// What answers.
    pub front: Front,
    /// Counts open connections.
    pub open: IntGauge,
    /// How patient it is.
    pub limits: Limits,
    /// Shared by all ports of a process.
    pub places: Places,
    /// Where clients speak TLS.
    pub tls: Option<TlsAcceptor>,
}

/// Tells servers to stop accepting and then, by its time, to be gone.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<Option<tokio::time::Instant>>);

/// The other end of `Shutdown`.
#[derive(Debug)]
pub struct ShutdownHandle(watch::Sender<Option<tokio::time::Instant>>);

impl ShutdownHandle {
    /// A handle and what servers watch.
    pub fn new() -> (Self, Shutdown) {
        let (sender, receiver) = watch::channel(None);
        (Self(sender), Shutdown(receiver))
    }

    /// No new connections from now; what runs may finish within `drain`. Said again, the new time counts.
    pub fn begin(&self, drain: Duration) {
        // Nobody watches once all servers are gone.
        let _ = self.0.send(Some(tokio::time::Instant::now() + drain));
    }
}

impl Shutdown {
    /// The time by which everything must be gone, once that is known.
    async fn begun(&mut self) -> tokio::time::Instant {
        loop {
            if let Some(deadline) = *self.0.borrow_and_update() {
                return deadline;
            }
            self.wait().await;
        }
    }

    /// Another time, when it is set.
    async fn changed(&mut self) -> tokio::time::Instant {
        self.wait().await;
        self.begun().await
    }

    async fn wait(&mut self) {
        if self.0.changed().await.is_err() {
            // Without a handle nobody will ever ask.
            std::future::pending::<()>().await;
        }
    }
}

/// Accepts until the shutdown begins, then waits for what runs, not longer than it says. True: all was finished.
pub async fn serve(port: Port, mut shutdown: Shutdown) -> bool {
    let Port {
        listener,
        protocol,
        front,
        open,
        limits,
        places,
        tls,
    } = port;
    let mut connections: JoinSet<()> = JoinSet::new();
    let mut deadline = loop {
        let permit = Arc::clone(&places.connections).acquire_owned();
        let accepted = async { (permit.await.expect("never closed"), listener.accept().await) };
        tokio::select! {
            deadline = shutdown.begun() => break deadline,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            (permit, accepted) = accepted => match accepted {
                Ok((stream, peer)) => {
                    let connection = Connection {
                        stream,
                        peer,
                        protocol,
                        front: front.clone(),
                        limits,
                        body_bytes: Arc::clone(&places.body_bytes),
                        shutdown: shutdown.clone(),
                        tls: tls.clone(),
                    };
                    let open = open.clone();
                    connections.spawn(async move {
                        let _permit = permit;
                        let _open = Open::new(open);
                        connection.run().await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, protocol = protocol.label(), "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    };
    drop(listener);
    let finished = loop {
        tokio::select! {
            ended = connections.join_next() => if ended.is_none() { break true },
            () = tokio::time::sleep_until(deadline) => break false,
            sooner = shutdown.changed() => deadline = sooner,
        }
    };
    connections.shutdown().await;
    finished
}

/// One more in a gauge, however it ends.
struct Open(IntGauge);

impl Open {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A request's body that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is larger than allowed.
    #[error("the request's body exceeds {0} bytes")]
    TooLarge(usize),
    /// It is not waited for any longer.
    #[error(transparent)]
    Stalled(Stalled),
    /// The client broke it off.
    #[error("the request's body was broken off: {0}")]
    Broken(String),
}

/// All of a body of at most `limit` bytes; a body that says that it is larger is not read at all.
pub async fn read_body(mut body: Body, limit: usize) -> Result<Bytes, BodyError> {
    use http_body::Body as _;
    if body.size_hint().lower() > limit as u64 {
        return Err(BodyError::TooLarge(limit));
    }
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| match Stalled::within(&error) {
            Some(stalled) => BodyError::Stalled(stalled),
            None => BodyError::Broken(error.to_string()),
        })?;
        if let Some(data) = frame.data_ref() {
            if whole.len() + data.len() > limit {
                return Err(BodyError::TooLarge(limit));
            }
            whole.extend_from_slice(data);
        }
    }
    Ok(whole.freeze())
}
