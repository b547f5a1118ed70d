//! The life of one client's connection: what it may take its time for, and when it has to go.
//!
//! `Pulse` is what the connection's bytes and requests tell, `Life` decides by it. Timers are cheap: whatever begins
//! later cannot be due before the next look.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicUsize},
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::Body;
use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::Service as HyperService,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulConnection,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};

use tokio_rustls::TlsAcceptor;
use tower::Service;

use super::{
    Front, Limits, Protocol, Shutdown,
    body::{Counted, Timed},
};

/// Headers of one request.
const MAX_HEADER_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 100;
/// Requests at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 1024;
/// Streams that a client opened and reset before they were looked at; one more ends its connection.
const MAX_PENDING_RESETS: usize = 20;
/// Streams that this side had to reset for a client's errors; one more ends its connection.
const MAX_ERROR_RESETS: usize = 256;
/// Of one response, between here and the socket: a client that does not read costs no more.
const SEND_BUFFER_BYTES: usize = 64 << 10;
/// Of one connection, in the kernel and not yet sent: without a bound of ours it takes megabytes, which a worker would
/// have computed for a client that does not read them.
const UNSENT_BYTES: u32 = 16 << 10;
/// HTTP/2's preface, and the SETTINGS frame that must follow it.
const HELLO_BYTES: u64 = 24 + 9;
/// Silent TCP connections are probed after this, and so often.
const PROBE_AFTER: Duration = Duration::from_secs(15);
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// An idle connection that was asked to close has so long to do so.
const GOODBYE: Duration = Duration::from_secs(5);
/// After the last answer on an HTTP/1 connection, what its client still sends is read and thrown away for so long. A socket
/// that is closed over unread bytes resets its connection, and the answer may be lost before the client has read it.
const LINGER: Duration = Duration::from_secs(1);

/// One accepted socket.
pub(super) struct Connection {
    pub stream: TcpStream,
    pub peer: SocketAddr,
    pub protocol: Protocol,
    pub front: Front,
    pub limits: Limits,
    pub body_bytes: Arc<AtomicUsize>,
    pub shutdown: Shutdown,
    pub tls: Option<TlsAcceptor>,
}

/// How it ended, otherwise than by its client.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0} was too slow to say what it wants")]
    SlowHead(SocketAddr),
    #[error("its streams did not end in time after it was asked to close")]
    Overdue,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Http(Box<dyn std::error::Error + Send + Sync>),
}

impl Connection {
    pub async fn run(self) {
        if let Err(error) = self.serve().await {
            // Clients that leave are no event of ours.
            tracing::debug!(?error, "a connection ended");
        }
    }

    async fn serve(mut self) -> Result<(), Ended> {
        set_options(&self.stream, self.limits.unacknowledged)?;
        match self.tls.take() {
            None => {
                let (stream, talk) = self.split();
                talk.over(stream).await
            }
            Some(acceptor) => {
                let (stream, talk) = self.split();
                let handshake = tokio::time::timeout(talk.limits.head, acceptor.accept(stream));
                let stream = handshake.await.map_err(|_| Ended::SlowHead(talk.peer))??;
                Box::pin(talk.over(stream)).await
            }
        }
    }

    fn split(self) -> (TcpStream, Talk) {
        let talk = Talk {
            peer: self.peer,
            protocol: self.protocol,
            front: self.front,
            limits: self.limits,
            body_bytes: self.body_bytes,
            shutdown: self.shutdown,
        };
        (self.stream, talk)
    }
}

/// What is said over a connection, however its bytes travel.
struct Talk {
    peer: SocketAddr,
    protocol: Protocol,
    front: Front,
    limits: Limits,
    body_bytes: Arc<AtomicUsize>,
    shutdown: Shutdown,
}

impl Talk {
    async fn over<I>(self, stream: I) -> Result<(), Ended>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let pulse = Pulse::new(self.protocol);
        let service = Answering {
            pulse: pulse.clone(),
            front: self.front,
            body_patience: self.limits.body,
            body_bytes: self.body_bytes,
        };
        let io = TokioIo::new(Watched {
            inner: stream,
            pulse: pulse.clone(),
            lingers: self.protocol == Protocol::Http,
            until: None,
        });
        let life = Life {
            peer: self.peer,
            limits: self.limits,
            pulse,
            shutdown: self.shutdown,
        };
        match self.protocol {
            Protocol::Http => {
                let mut builder = http1::Builder::new();
                builder
                    .timer(TokioTimer::new())
                    // `Life` is stricter; this is the library's own limit, which must not be shorter.
                    .header_read_timeout(self.limits.idle + self.limits.head)
                    .max_headers(MAX_HEADERS)
                    .max_buf_size(MAX_HEADER_BYTES);
                life.of(builder.serve_connection(io, service)).await
            }
            Protocol::Grpc => {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder
                    .timer(TokioTimer::new())
                    .keep_alive_interval(self.limits.keepalive)
                    .keep_alive_timeout(self.limits.keepalive)
                    .max_header_list_size(MAX_HEADER_BYTES as u32)
                    .max_concurrent_streams(MAX_STREAMS)
                    .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
                    .max_local_error_reset_streams(MAX_ERROR_RESETS)
                    .max_send_buf_size(SEND_BUFFER_BYTES);
                life.of(builder.serve_connection(io, service)).await
            }
        }
    }
}

fn set_options(stream: &TcpStream, unacknowledged: Duration) -> io::Result<()> {
    // A token is a packet of its own: waiting for more to fill it would add 40 ms.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(PROBE_AFTER)
            .with_interval(PROBE_EVERY),
    )?;
    #[cfg(target_os = "linux")]
    {
        socket.set_tcp_user_timeout(Some(unacknowledged))?;
        socket.set_tcp_notsent_lowat(UNSENT_BYTES)?;
    }
    Ok(())
}

/// What a connection does, seen from its bytes and its requests.
#[derive(Clone)]
struct Pulse(Arc<Mutex<State>>);

struct State {
    protocol: Protocol,
    /// Bytes from the client.
    read: u64,
    /// Something of a request's head was sent, or has to be, since then; `None` while there is none to wait for.
    head_since: Option<Instant>,
    /// Requests that are being answered.
    open: usize,
    /// The last of them ended then.
    idle_since: Instant,
}

/// What is to be done.
enum Verdict {
    /// Nothing before then.
    Stay(Instant),
    SlowHead,
    Idle,
}

impl Pulse {
    fn new(protocol: Protocol) -> Self {
        let now = Instant::now();
        Self(Arc::new(Mutex::new(State {
            protocol,
            read: 0,
            head_since: Some(now),
            open: 0,
            idle_since: now,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, bytes: usize) {
        let mut state = self.state();
        state.read += bytes as u64;
        match state.protocol {
            Protocol::Http if state.open == 0 => {
                state.head_since.get_or_insert_with(Instant::now);
            }
            Protocol::Grpc if state.read >= HELLO_BYTES => state.head_since = None,
            Protocol::Http | Protocol::Grpc => {}
        }
    }

    /// A request's head is whole.
    fn request(&self) -> InFlight {
        let mut state = self.state();
        state.head_since = None;
        state.open += 1;
        InFlight(self.clone())
    }

    fn verdict(&self, limits: &Limits) -> Verdict {
        let state = self.state();
        let now = Instant::now();
        let head = state.head_since.unwrap_or(now) + limits.head;
        // HTTP/2 frames of a head are not told apart here: whoever never sends a whole one is idle.
        let idles = state.open == 0 && (state.head_since.is_none() || state.protocol == Protocol::Grpc);
        let idle = state.idle_since + limits.idle;
        if head <= now {
            Verdict::SlowHead
        } else if idles && idle <= now {
            Verdict::Idle
        } else {
            Verdict::Stay(if idles { head.min(idle) } else { head })
        }
    }
}

/// A request that is being answered, until this is dropped.
pub(super) struct InFlight(Pulse);

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.open -= 1;
        state.idle_since = Instant::now();
    }
}

/// Decides about one connection.
struct Life {
    peer: SocketAddr,
    limits: Limits,
    pulse: Pulse,
    shutdown: Shutdown,
}

impl Life {
    /// Drives a connection to its end.
    async fn of<C>(mut self, connection: C) -> Result<(), Ended>
    where
        C: GracefulConnection,
        C::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut connection = pin!(connection);
        let born = Instant::now();
        // Spread, or all clients of a router would come back at once.
        let retires = self
            .limits
            .age
            .map(|age| born + age.mul_f64(rand::random_range(0.9..1.1)));
        // Once it was asked to close: when it is cut. A shutdown's end is kept by whoever owns all connections.
        let mut closes: Option<Instant> = None;
        let mut shutting = false;
        loop {
            let due = match (closes, self.pulse.verdict(&self.limits)) {
                (_, Verdict::SlowHead) => return Err(Ended::SlowHead(self.peer)),
                (Some(cut), _) if cut <= Instant::now() => return Err(Ended::Overdue),
                (Some(cut), _) => cut,
                (None, Verdict::Idle) => {
                    connection.as_mut().graceful_shutdown();
                    *closes.insert(Instant::now() + GOODBYE)
                }
                (None, Verdict::Stay(_)) if retires.is_some_and(|at| at <= Instant::now()) => {
                    connection.as_mut().graceful_shutdown();
                    *closes.insert(Instant::now() + self.limits.grace)
                }
                (None, Verdict::Stay(until)) => until.min(retires.unwrap_or(until)),
            };
            tokio::select! {
                biased;
                ended = connection.as_mut() => return ended.map_err(|error| Ended::Http(error.into())),
                _ = self.shutdown.begun(), if !shutting => {
                    shutting = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = tokio::time::sleep_until(due) => {}
            }
        }
    }
}

/// The bytes of a connection, counted as they come.
struct Watched<I> {
    inner: I,
    pulse: Pulse,
    /// Its client may still send when there is nothing more to say.
    lingers: bool,
    /// There is nothing more to say; it is closed then.
    until: Option<Pin<Box<Sleep>>>,
}

impl<I: AsyncRead + Unpin> Watched<I> {
    /// Reads and throws away, until the client closes its end or `until`.
    fn poll_linger(&mut self, cx: &mut Context<'_>, mut until: Pin<Box<Sleep>>) -> Poll<()> {
        let mut scratch = [0; 4096];
        while until.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.inner).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => break,
                Poll::Pending => {
                    self.until = Some(until);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(())
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        let bytes = buffer.filled().len() - before;
        if bytes > 0 {
            self.pulse.read(bytes);
        }
        polled
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let until = match self.until.take() {
            Some(until) => until,
            None => {
                ready!(Pin::new(&mut self.inner).poll_shutdown(cx))?;
                if !self.lingers {
                    return Poll::Ready(Ok(()));
                }
                Box::pin(tokio::time::sleep(LINGER))
            }
        };
        self.poll_linger(cx, until).map(Ok)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// Answers a connection's requests.
struct Answering {
    pulse: Pulse,
    front: Front,
    body_patience: Duration,
    body_bytes: Arc<AtomicUsize>,
}

impl HyperService<Request<Incoming>> for Answering {
    type Response = Response<Counted<Body>>;
    type Error = Infallible;
    type Future = Answered;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let in_flight = self.pulse.request();
        let timed = |body| Body::new(Timed::new(body, self.body_patience, Arc::clone(&self.body_bytes)));
        Answered {
            answer: self.front.clone().call(request.map(timed)),
            in_flight: Some(in_flight),
        }
    }
}

/// An answer whose request counts as open until its body is gone.
struct Answered {
    answer: BoxFuture<'static, Result<Response<Body>, Infallible>>,
    /// There until the answer is.
    in_flight: Option<InFlight>,
}

impl Future for Answered {
    type Output = Result<Response<Counted<Body>>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response = ready!(self.answer.as_mut().poll(cx))?;
        let in_flight = self.in_flight.take();
        Poll::Ready(Ok(response.map(|inner| Counted {
            inner,
            _in_flight: in_flight,
        })))
    }
}
