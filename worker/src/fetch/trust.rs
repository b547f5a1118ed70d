//! Whose certificates an https endpoint may show.
//!
//! The system's authorities count, which is where companies put their own; `SSL_CERT_FILE` and `SSL_CERT_DIR` say
//! where they are if not in the usual place. A system without any, as a container image from scratch, gets Mozilla's,
//! compiled in. `--ca-file` adds to the system's.

use std::{fs, path::Path};

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::{FetchError, shown};

/// Who is trusted.
pub(super) fn tls(ca_file: Option<&Path>) -> Result<TlsConfig, FetchError> {
    // What cannot be read of the system's is as good as absent: the others may do.
    let system = rustls_native_certs::load_native_certs().certs;
    let mut trusted: Vec<Certificate<'static>> = system
        .iter()
        .map(|certificate| Certificate::from_der(certificate).to_owned())
        .collect();
    if let Some(path) = ca_file {
        trusted.extend(read(path)?);
    }
    let roots = if trusted.is_empty() {
        RootCerts::WebPki
    } else {
        RootCerts::from(trusted)
    };
    Ok(TlsConfig::builder().root_certs(roots).build())
}

fn read(path: &Path) -> Result<Vec<Certificate<'static>>, FetchError> {
    let bad = |found: String| FetchError::Argument {
        flag: "ca-file",
        expected: "a PEM file with certificates",
        found: format!("{found} in {}", shown(path)),
    };
    let text = fs::read(path).map_err(|source| FetchError::Local {
        path: shown(path),
        source,
        advice: "--ca-file must name a readable file",
    })?;
    let items: Vec<PemItem<'static>> = parse_pem(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| bad(error.to_string()))?;
    let certificates: Vec<_> = items
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(bad("none".into()));
    }
    Ok(certificates)
}
