//! Sockets of both fronts: accept, limits, and an end within a deadline.
//!
//! axum's and tonic's own servers are not used: the one leaves Nagle's delay on, the other's request timeout stops at
//! the response's headers and its graceful end may never come. Here every connection has no delay, bounded headers
//! and a bounded time to send them, and shutting down ends when it should.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use prometheus::IntGauge;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};

/// Open connections of one port. Each may carry many streams.
const MAX_CONNECTIONS: usize = 16 << 10;
/// A client that has not sent its request's headers by then is cut; so is a connection that was idle so long.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// A client that has said nothing at all by then is cut.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two pieces of a request's body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Headers of one request.
const MAX_HEADER_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 100;
/// Requests at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 1024;
/// A silent HTTP/2 peer is asked for a sign of life, and has as long to give it.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// After a failed accept, as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// gRPC over HTTP/2 without TLS.
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
pub async fn serve(
    listener: TcpListener,
    protocol: Protocol,
    router: Router,
    open: IntGauge,
    mut shutdown: Shutdown,
) -> bool {
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections: JoinSet<()> = JoinSet::new();
    let deadline = loop {
        let permit = Arc::clone(&permits).acquire_owned();
        let accepted = async { (permit.await.expect("never closed"), listener.accept().await) };
        tokio::select! {
            deadline = shutdown.begun() => break deadline,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            (permit, accepted) = accepted => match accepted {
                Ok((stream, peer)) => {
                    let connection = Connection { stream, peer, protocol, router: router.clone() };
                    let watcher = graceful.watcher();
                    let open = open.clone();
                    connections.spawn(async move {
                        let _permit = permit;
                        let _open = Open::new(open);
                        connection.run(watcher).await;
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
    let all = graceful.shutdown();
    tokio::pin!(all);
    let mut deadline = deadline;
    let finished = loop {
        tokio::select! {
            () = &mut all => break true,
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

struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    protocol: Protocol,
    router: Router,
}

impl Connection {
    async fn run(self, watcher: hyper_util::server::graceful::Watcher) {
        if let Err(error) = self.serve(watcher).await {
            // Clients that leave are no event of ours.
            tracing::debug!(%error, "a connection ended");
        }
    }

    async fn serve(
        self,
        watcher: hyper_util::server::graceful::Watcher,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let Self {
            stream,
            peer,
            protocol,
            router,
        } = self;
        // A token is a packet of its own: waiting for more to fill it would add 40 ms.
        stream.set_nodelay(true)?;
        tokio::time::timeout(FIRST_BYTE_TIMEOUT, stream.readable())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("{peer} said nothing")))??;
        let service = TowerToHyperService::new(router);
        let io = TokioIo::new(stream);
        match protocol {
            Protocol::Http => {
                let mut builder = http1::Builder::new();
                builder
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .max_headers(MAX_HEADERS)
                    .max_buf_size(MAX_HEADER_BYTES);
                watcher.watch(builder.serve_connection(io, service)).await?;
            }
            Protocol::Grpc => {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder
                    .timer(TokioTimer::new())
                    .keep_alive_interval(KEEPALIVE)
                    .keep_alive_timeout(KEEPALIVE)
                    .max_header_list_size(MAX_HEADER_BYTES as u32)
                    .max_concurrent_streams(MAX_STREAMS);
                watcher.watch(builder.serve_connection(io, service)).await?;
            }
        }
        Ok(())
    }
}

/// A request's body that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is larger than allowed.
    #[error("the request's body exceeds {0} bytes")]
    TooLarge(usize),
    /// Nothing more came.
    #[error("the request's body stopped coming for {} s", BODY_TIMEOUT.as_secs())]
    Slow,
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
    loop {
        let frame = tokio::time::timeout(BODY_TIMEOUT, body.frame())
            .await
            .map_err(|_| BodyError::Slow)?;
        let Some(frame) = frame else {
            return Ok(whole.freeze());
        };
        let frame = frame.map_err(|error| BodyError::Broken(error.to_string()))?;
        if let Some(data) = frame.data_ref() {
            if whole.len() + data.len() > limit {
                return Err(BodyError::TooLarge(limit));
            }
            whole.extend_from_slice(data);
        }
    }
}
