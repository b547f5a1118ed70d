//! TLS on the session port, in both directions: a router is shown this worker's certificate, and must show one of an
//! authority that is trusted here. The files are read again when they change.
//!
//! Sessions keep what they began with; new ones get what is there now. Files that cannot be read, or do not belong
//! together, change nothing.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, RwLock},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustls::{CertificateError, ServerConfig};
use swallow_rpc::mutual::{Part, Pem, PemError};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, error, info, warn};

/// Between two looks at the files. A mounted Secret takes a minute to arrive anyway.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A handshake takes this long or is given up.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes at the same time; more wait in the system's queue.
const HANDSHAKES_MAX: usize = 64;
/// A router that is refused tries again every few seconds; the same words are worth a line only so often.
const SAY_AGAIN: Duration = Duration::from_secs(60);
/// After an accept that failed, as it does when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One is not there, not ours to read, or not PEM.
    #[error("--{flag}={path}: {why}", path = path.display())]
    File {
        /// Which flag names it.
        flag: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// They do not belong together, or the key is of a kind that is not supported.
    #[error("--tls-cert, --tls-key, --tls-client-ca: {0}")]
    Set(String),
}

/// The three files of a worker that speaks TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain, in PEM.
    pub cert: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
    /// Authorities of routers' certificates, in PEM.
    pub client_ca: PathBuf,
}

impl TlsFiles {
    fn read(&self) -> Result<Current, TlsError> {
        let pem = Pem::read(|part| {
            fs::read(self.flag(part).1).map_err(|error| self.unusable(part, error.to_string()))
        })?;
        let config = pem.of_worker().map_err(|error| match error {
            PemError::Part(part, why) => self.unusable(part, why),
            PemError::Set(why) => TlsError::Set(why),
        })?;
        Ok(Current {
            pem,
            config: Arc::new(config),
        })
    }

    fn flag(&self, part: Part) -> (&'static str, &Path) {
        match part {
            Part::Authorities => ("tls-client-ca", &self.client_ca),
            Part::Chain => ("tls-cert", &self.cert),
            Part::Key => ("tls-key", &self.key),
        }
    }

    fn unusable(&self, part: Part, why: String) -> TlsError {
        let (flag, path) = self.flag(part);
        TlsError::File {
            flag,
            path: path.to_owned(),
            why,
        }
    }
}

/// What sessions are accepted with, as the files have it now. Cheap to clone.
#[derive(Clone)]
pub(super) struct SessionTls(Arc<Inner>);

struct Inner {
    files: TlsFiles,
    now: RwLock<Current>,
    refused: Mutex<Option<(String, Instant)>>,
}

struct Current {
    pem: Pem,
    config: Arc<ServerConfig>,
}

impl SessionTls {
    /// Reads the files.
    ///
    /// # Errors
    /// They cannot be used.
    pub(super) fn load(files: TlsFiles) -> Result<Self, TlsError> {
        let now = RwLock::new(files.read()?);
        Ok(Self(Arc::new(Inner {
            files,
            now,
            refused: Mutex::new(None),
        })))
    }

    /// Follows the files, for ever.
    pub(super) async fn follow(self) {
        let mut told = false;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            told = match self.look() {
                Ok(false) => false,
                Ok(true) => {
                    info!("the certificates were read again; new sessions use them");
                    false
                }
                // While several files change, one is ahead of the others: worth a line, once.
                Err(error) if !told => {
                    error!(%error, "the certificates stay as they were");
                    true
                }
                Err(_) => true,
            };
        }
    }

    /// Reads the files. True: they have changed.
    fn look(&self) -> Result<bool, TlsError> {
        let read = self.0.files.read()?;
        let mut now = self.0.now.write().unwrap_or_else(PoisonError::into_inner);
        if now.pem == read.pem {
            return Ok(false);
        }
        *now = read;
        Ok(true)
    }

    fn acceptor(&self) -> TlsAcceptor {
        let now = self.0.now.read().unwrap_or_else(PoisonError::into_inner);
        TlsAcceptor::from(Arc::clone(&now.config))
    }

    /// Connections of routers that were let in.
    pub(super) fn incoming(self, listener: TcpListener) -> ReceiverStream<io::Result<Secured>> {
        let (to, from) = mpsc::channel(1);
        tokio::spawn(self.accept(listener, to));
        ReceiverStream::new(from)
    }

    async fn accept(self, listener: TcpListener, to: mpsc::Sender<io::Result<Secured>>) {
        let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .expect("it is never closed");
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = to.closed() => return,
            };
            let Ok((stream, peer)) = accepted else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let (this, to) = (self.clone(), to.clone());
            tokio::spawn(async move {
                // Frames are small, and wait for nothing.
                let _ = stream.set_nodelay(true);
                let shaken = tokio::time::timeout(HANDSHAKE_LIMIT, this.acceptor().accept(stream)).await;
                drop(place);
                match shaken {
                    // Nobody listens any more only when the server is gone.
                    Ok(Ok(stream)) => drop(to.send(Ok(Secured(Box::new(stream)))).await),
                    Ok(Err(error)) => this.refused(peer, in_words(&error)),
                    Err(_) => this.refused(peer, "it did not finish the handshake in time".into()),
                }
            });
        }
    }

    fn refused(&self, peer: SocketAddr, why: String) {
        let mut last = self.0.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let again = last
            .as_ref()
            .is_some_and(|(words, when)| *words == why && when.elapsed() < SAY_AGAIN);
        if again {
            debug!(%peer, why, "a router was not let in");
            return;
        }
        warn!(%peer, why, "a router was not let in");
        *last = Some((why, Instant::now()));
    }
}

/// Why a handshake failed, and what to change.
fn in_words(error: &io::Error) -> String {
    let cause = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::NoCertificatesPresented) => {
            "it shows no certificate: start the router with --worker-cert and --worker-key".into()
        }
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            "no authority in --tls-client-ca has issued its certificate".into()
        }
        Some(rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        )) => "its certificate has expired: give the router a new one".into(),
        Some(rustls::Error::InvalidCertificate(
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
        )) => "its certificate does not say that it is for clients: issue it with the extended key usage clientAuth".into(),
        Some(rustls::Error::InvalidCertificate(why)) => format!("its certificate is refused: {why}"),
        Some(rustls::Error::AlertReceived(alert)) => format!(
            "it refuses the certificate of --tls-cert ({alert:?}): it must be valid, of an authority in the router's \
             --worker-ca, for the name of its --worker-tls-name, and have the extended key usage serverAuth"
        ),
        Some(rustls::Error::InvalidMessage(_)) => {
            "it speaks no TLS: start the router with --worker-ca, --worker-cert and --worker-key".into()
        }
        _ => error.to_string(),
    }
}

/// A connection whose two ends know each other.
pub(super) struct Secured(Box<TlsStream<TcpStream>>);

impl Connected for Secured {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.0.get_ref().0.connect_info()
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}
