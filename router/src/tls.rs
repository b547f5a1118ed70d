//! TLS on the fronts: a certificate and its key from files, read again when they change. What sessions with workers are
//! secured with is in [`workers`].
//!
//! Connections keep the certificate that they began with; new ones get the one that is there now. A pair that cannot
//! be read, or does not belong together, changes nothing.

pub mod workers;

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_rustls::TlsAcceptor;
use tracing::{error, info};

use crate::http::Protocol;

/// Between two looks at the files. A mounted Secret takes a minute to arrive anyway.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// A pair of files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One is not there, or not ours to read.
    #[error("{flag}: cannot read {path}: {why}", path = path.display())]
    Read {
        /// Which flag names it.
        flag: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// They do not belong together, or the key is of a kind that is not supported.
    #[error("--tls-cert, --tls-key: {0}")]
    Pair(String),
}

/// A certificate chain and its key, as the files have them now. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Certificate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cert: PathBuf,
    key: PathBuf,
    now: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    /// Reads both files, in PEM.
    ///
    /// # Errors
    /// They cannot be used.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let now = RwLock::new(Arc::new(read(cert, key)?));
        let (cert, key) = (cert.to_owned(), key.to_owned());
        Ok(Self(Arc::new(Inner { cert, key, now })))
    }

    /// Follows the files, for ever.
    pub async fn follow(self) {
        let said = [
            "the certificate was read again",
            "the certificate stays as it was",
        ];
        follow(said, || self.look()).await;
    }

    /// Reads the files. True: there is another certificate now.
    ///
    /// # Errors
    /// They cannot be used; nothing changed.
    pub fn look(&self) -> Result<bool, TlsError> {
        let read = read(&self.0.cert, &self.0.key)?;
        let mut now = self.0.now.write().unwrap_or_else(PoisonError::into_inner);
        let is_new = read.cert != now.cert;
        *now = Arc::new(read);
        Ok(is_new)
    }

    /// What accepts connections of a protocol.
    ///
    /// # Errors
    /// TLS cannot be had with the versions that are allowed.
    pub fn acceptor(&self, protocol: Protocol) -> Result<TlsAcceptor, TlsError> {
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::Pair(error.to_string()))?;
        let mut config = builder
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(self.clone()));
        config.alpn_protocols = match protocol {
            Protocol::Http => vec![b"http/1.1".to_vec()],
            Protocol::Grpc => vec![b"h2".to_vec()],
        };
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(
            &self.0.now.read().unwrap_or_else(PoisonError::into_inner),
        ))
    }
}

/// Looks at files for ever, and says when they have changed, or why what was read of them stays.
async fn follow<E: Display>([again, stays]: [&str; 2], look: impl Fn() -> Result<bool, E>) {
    let mut told = false;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        told = match look() {
            Ok(false) => false,
            Ok(true) => {
                info!("{again}");
                false
            }
            // While several files change, one is ahead of the others: worth a line, once.
            Err(error) if !told => {
                error!(%error, "{stays}");
                true
            }
            Err(_) => true,
        };
    }
}

fn read(cert: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let unread = |flag, path: &Path, why: String| TlsError::Read {
        flag,
        path: path.to_owned(),
        why,
    };
    let of_cert = |error: rustls::pki_types::pem::Error| unread("--tls-cert", cert, error.to_string());
    let chain = CertificateDer::pem_file_iter(cert)
        .map_err(of_cert)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(of_cert)?;
    if chain.is_empty() {
        return Err(unread("--tls-cert", cert, "there is no certificate in it".into()));
    }
    let key =
        PrivateKeyDer::from_pem_file(key).map_err(|error| unread("--tls-key", key, error.to_string()))?;
    CertifiedKey::from_der(chain, key, &ring::default_provider())
        .map_err(|error| TlsError::Pair(error.to_string()))
}
