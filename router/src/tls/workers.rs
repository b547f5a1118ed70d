//! TLS towards workers, in both directions: this router shows its certificate, and takes a worker whose certificate is
//! of an authority that is trusted here and carries one fixed name. The files are read again when they change.
//!
//! Workers are addressed by the IPs of pods, which no certificate can know ahead; so the name is not that of the
//! address but of the role: whoever holds a certificate with it is a worker. Sessions keep what they began with.

use std::{
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, OnceLock, PoisonError, RwLock},
    task::{Context, Poll},
};

use hyper_util::rt::TokioIo;
use rustls::{CertificateError, ClientConfig, pki_types::ServerName};
use swallow_rpc::mutual::{Part, Pem, PemError};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::codegen::{Service, http::Uri};

/// Files or a name that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WorkerTlsError {
    /// A file is not there, not ours to read, or not PEM.
    #[error("--{flag}={path}: {why}", path = path.display())]
    File {
        /// Which flag names it.
        flag: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The name is none that a certificate can carry.
    #[error("--worker-tls-name={0}: write a DNS name, such as swallow-worker")]
    Name(String),
    /// The files do not belong together, or the key is of a kind that is not supported.
    #[error("--worker-ca, --worker-cert, --worker-key: {0}")]
    Set(String),
}

/// The three files of a router that speaks TLS with its workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerTlsFiles {
    /// Authorities of workers' certificates, in PEM.
    pub ca: PathBuf,
    /// Certificate chain of this router, in PEM.
    pub cert: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
}

impl WorkerTlsFiles {
    fn read(&self) -> Result<Current, WorkerTlsError> {
        let pem = Pem::read(|part| {
            fs::read(self.flag(part).1).map_err(|error| self.unusable(part, error.to_string()))
        })?;
        let config = pem.of_router().map_err(|error| match error {
            PemError::Part(part, why) => self.unusable(part, why),
            PemError::Set(why) => WorkerTlsError::Set(why),
        })?;
        Ok(Current {
            pem,
            config: Arc::new(config),
        })
    }

    fn flag(&self, part: Part) -> (&'static str, &Path) {
        match part {
            Part::Authorities => ("worker-ca", &self.ca),
            Part::Chain => ("worker-cert", &self.cert),
            Part::Key => ("worker-key", &self.key),
        }
    }

    fn unusable(&self, part: Part, why: String) -> WorkerTlsError {
        let (flag, path) = self.flag(part);
        WorkerTlsError::File {
            flag,
            path: path.to_owned(),
            why,
        }
    }
}

/// What sessions are begun with, as the files have it now. Cheap to clone.
#[derive(Clone, Debug)]
pub struct WorkerTls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: WorkerTlsFiles,
    name: ServerName<'static>,
    now: RwLock<Current>,
}

#[derive(Debug)]
struct Current {
    pem: Pem,
    config: Arc<ClientConfig>,
}

/// Clones are the same, and nothing else is.
impl PartialEq for WorkerTls {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl WorkerTls {
    /// Reads the files; workers' certificates must carry `name`.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn load(files: WorkerTlsFiles, name: &str) -> Result<Self, WorkerTlsError> {
        let name = match ServerName::try_from(name.to_owned()) {
            Ok(name @ ServerName::DnsName(_)) => name,
            _ => return Err(WorkerTlsError::Name(name.to_owned())),
        };
        let now = RwLock::new(files.read()?);
        Ok(Self(Arc::new(Inner { files, name, now })))
    }

    /// Follows the files, for ever.
    pub async fn follow(self) {
        let said = [
            "the certificates for workers were read again; new sessions use them",
            "the certificates for workers stay as they were",
        ];
        super::follow(said, || self.look()).await;
    }

    /// Reads the files. True: they have changed.
    fn look(&self) -> Result<bool, WorkerTlsError> {
        let read = self.0.files.read()?;
        let mut now = self.0.now.write().unwrap_or_else(PoisonError::into_inner);
        if now.pem == read.pem {
            return Ok(false);
        }
        *now = read;
        Ok(true)
    }

    /// Connects to a worker and sees that it is one.
    async fn connect(self, address: String, complaint: Complaint) -> io::Result<TokioIo<Watched>> {
        let stream = TcpStream::connect(&address).await?;
        stream.set_nodelay(true)?;
        let config = {
            let now = self.0.now.read().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(&now.config)
        };
        TlsConnector::from(config)
            .connect(self.0.name.clone(), stream)
            .await
            .map(|stream| TokioIo::new(Watched { stream, complaint }))
            .map_err(|error| io::Error::other(self.in_words(&error)))
    }

    /// Why a handshake failed, and what to change.
    fn in_words(&self, error: &io::Error) -> String {
        let cause = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match cause {
            Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
                "no authority in --worker-ca has issued the worker's certificate".into()
            }
            Some(rustls::Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            )) => "the worker's certificate has expired: give it a new one".into(),
            Some(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => format!(
                "the worker's certificate is not for {}: issue it for that name, or give the name with \
                 --worker-tls-name",
                self.0.name.to_str()
            ),
            Some(rustls::Error::InvalidCertificate(
                CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
            )) => "the worker's certificate does not say that it is for servers: issue it with the extended key usage \
                   serverAuth"
                .into(),
            Some(rustls::Error::InvalidCertificate(why)) => {
                format!("the worker's certificate is refused: {why}")
            }
            Some(rustls::Error::InvalidMessage(_)) => {
                "the worker speaks no TLS: start it with --tls-cert, --tls-key and --tls-client-ca".into()
            }
            _ => refused(&error.to_string()).unwrap_or_else(|| error.to_string()),
        }
    }

    /// What connects to `address`, whatever it is asked for.
    pub(crate) fn connector(&self, address: &str, complaint: Complaint) -> Connector {
        Connector {
            tls: self.clone(),
            address: address.to_owned(),
            complaint,
        }
    }
}

/// What a worker has against this router, if it said so. Cheap to clone.
///
/// A worker judges the router's certificate when the handshake is over on this side already, and HTTP/2 above tells only
/// that the connection was closed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Complaint(Arc<OnceLock<String>>);

impl Complaint {
    /// In words.
    pub(crate) fn words(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }
}

/// What it means that the worker ended a connection with a complaint.
fn refused(error: &str) -> Option<String> {
    let (_, alert) = error.split_once("received fatal alert: ")?;
    Some(format!(
        "the worker refuses the certificate of --worker-cert ({alert}): it must be valid, of an authority in the worker's \
         --tls-client-ca, and have the extended key usage clientAuth"
    ))
}

/// Connects to one worker.
#[derive(Clone)]
pub(crate) struct Connector {
    tls: WorkerTls,
    address: String,
    complaint: Complaint,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Watched>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(
            self.tls
                .clone()
                .connect(self.address.clone(), self.complaint.clone()),
        )
    }
}

/// A connection that keeps the worker's complaint.
pub(crate) struct Watched {
    stream: TlsStream<TcpStream>,
    complaint: Complaint,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Poll::Ready(Err(error)) = &read
            && let Some(words) = refused(&error.to_string())
        {
            self.complaint.0.get_or_init(|| words);
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
