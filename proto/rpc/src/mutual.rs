//! How a router and a replica prove to each other who they are: TLS in both directions, made of PEM in memory.
//!
//! Each end has the authorities that it trusts, a certificate chain and the chain's key. Beyond what TLS asks for, a
//! certificate must say what it is for: one without extended key usage passes for anything (RFC 5280, 4.2.1.12), and whoever
//! held such a worker's key could pass for a router. The two ends read the files and follow them.

use std::{cell::Cell, fmt, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{WebPkiSupportedAlgorithms, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage};

/// id-kp-serverAuth, 1.3.6.1.5.5.7.3.1 (RFC 5280, 4.2.1.12), as it is encoded.
const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
/// id-kp-clientAuth, 1.3.6.1.5.5.7.3.2.
const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];
/// HTTP/2, which gRPC is spoken over.
const ALPN: &[u8] = b"h2";

/// A part of what an end has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The authorities that issue the other end's certificates.
    Authorities,
    /// Its own certificate, and those between it and its authority.
    Chain,
    /// The private key of its certificate.
    Key,
}

/// What an end has, each part in PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Pem {
    authorities: Vec<u8>,
    chain: Vec<u8>,
    key: Vec<u8>,
}

/// PEM that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// A part is not what it should be.
    #[error("{1}")]
    Part(Part, String),
    /// The parts do not belong together, or the key is of a kind that is not supported.
    #[error("{0}")]
    Set(String),
}

/// A key is not for logs.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pem").finish_non_exhaustive()
    }
}

impl Pem {
    /// Takes each part from `read`.
    ///
    /// # Errors
    /// The first of `read`.
    pub fn read<E>(mut read: impl FnMut(Part) -> Result<Vec<u8>, E>) -> Result<Self, E> {
        Ok(Self {
            authorities: read(Part::Authorities)?,
            chain: read(Part::Chain)?,
            key: read(Part::Key)?,
        })
    }

    /// What a worker accepts sessions with: a router's certificate must be for client authentication.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn of_worker(&self) -> Result<ServerConfig, PemError> {
        let (roots, provider) = (self.roots()?, Arc::new(ring::default_provider()));
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| PemError::Set(error.to_string()))?;
        let verifier = Stated::new(verifier, roots, CLIENT_AUTH);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(set)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(self.chain()?, self.key()?)
            .map_err(set)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    /// What a router begins sessions with: a worker's certificate must be for server authentication, and for the name
    /// that the router asks for.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn of_router(&self) -> Result<ClientConfig, PemError> {
        let (roots, provider) = (self.roots()?, Arc::new(ring::default_provider()));
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| PemError::Set(error.to_string()))?;
        let verifier = Stated::new(verifier, roots, SERVER_AUTH);
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(set)?
            // All that rustls verifies is verified, and the purpose too.
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain()?, self.key()?)
            .map_err(set)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, PemError> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(Part::Authorities, &self.authorities)? {
            roots
                .add(authority)
                .map_err(|error| PemError::Part(Part::Authorities, error.to_string()))?;
        }
        Ok(Arc::new(roots))
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>, PemError> {
        certificates(Part::Chain, &self.chain)
    }

    fn key(&self) -> Result<PrivateKeyDer<'static>, PemError> {
        PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| PemError::Part(Part::Key, error.to_string()))
    }
}

fn set(error: Error) -> PemError {
    PemError::Set(error.to_string())
}

fn certificates(part: Part, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let found = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| PemError::Part(part, error.to_string()))?;
    if found.is_empty() {
        return Err(PemError::Part(part, "there is no certificate in it".into()));
    }
    Ok(found)
}

/// Verifies as `verifier` does, and that the certificate says that it is for `usage`.
#[derive(Debug)]
struct Stated<V: ?Sized> {
    verifier: Arc<V>,
    roots: Arc<RootCertStore>,
    usage: &'static [u8],
    algorithms: WebPkiSupportedAlgorithms,
}

impl<V: ?Sized> Stated<V> {
    fn new(verifier: Arc<V>, roots: Arc<RootCertStore>, usage: &'static [u8]) -> Self {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        Self {
            verifier,
            roots,
            usage,
            algorithms,
        }
    }

    /// Walks a path that was found good already once more, with an eye on what the certificate at its end is for.
    fn states_its_usage(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let usage = OfTheEnd {
            usage: self.usage,
            at_the_end: Cell::new(true),
        };
        EndEntityCert::try_from(end)
            .and_then(|end| {
                let (algorithms, roots) = (self.algorithms.all, &self.roots.roots);
                end.verify_for_usage(algorithms, roots, between, now, &usage, None, None)
                    .map(drop)
            })
            .map_err(|_| CertificateError::InvalidPurpose.into())
    }
}

/// A usage that the certificate at the end of a path must name, and those above it, which it is asked about afterwards,
/// must allow: authorities seldom name any.
struct OfTheEnd {
    usage: &'static [u8],
    at_the_end: Cell<bool>,
}

impl ExtendedKeyUsageValidator for OfTheEnd {
    fn validate(&self, named: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        if self.at_the_end.replace(false) {
            KeyUsage::required(self.usage).validate(named)
        } else {
            KeyUsage::required_if_present(self.usage).validate(named)
        }
    }
}

impl ServerCertVerifier for Stated<WebPkiServerVerifier> {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.verifier.verify_server_cert(end, between, name, ocsp, now)?;
        self.states_its_usage(end, between, now)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Stated<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verifier.verify_client_cert(end, between, now)?;
        self.states_its_usage(end, between, now)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
