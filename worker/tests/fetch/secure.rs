//! Over TLS, from a mirror whose certificate authority no system knows. The certificates in `tls/` are the test's own
//! and good for a century; the key protects nothing.

use std::{path::PathBuf, process::Command, sync::Arc};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

use super::*;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fetch/tls")
        .join(name)
}

fn mirror() -> Hub {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(file("mirror.pem"))
        .expect("a PEM file")
        .collect::<Result<_, _>>()
        .expect("certificates");
    let key = PrivateKeyDer::from_pem_file(file("mirror.key")).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("all versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a key that fits");
    Hub::secure(Arc::new(config))
}

#[test]
fn a_private_authority_is_trusted_when_it_is_named() {
    let (hub, folder) = (mirror(), TempDir::new().expect("a folder"));
    let args = FetchArgs {
        ca_file: Some(file("authority.pem")),
        ..hub.args(folder.path())
    };
    run(&args).expect("all files");
    for name in WANTED {
        let fetched = fs::read(folder.path().join(name)).expect("fetched");
        assert!(fetched == hub.state().files[name], "{name}");
    }
}

#[test]
fn an_unknown_authority_is_refused_at_once_and_says_what_helps() {
    let (hub, folder) = (mirror(), TempDir::new().expect("a folder"));
    let line = refused(&hub.args(folder.path()));
    assert!(
        line.contains("--ca-file") && line.contains("certificate"),
        "{line}"
    );
    assert!(hub.state().seen.is_empty(), "nothing was asked");
}

#[test]
fn a_file_without_certificates_is_refused() {
    let (hub, folder) = (mirror(), TempDir::new().expect("a folder"));
    let of = |ca_file: PathBuf| FetchArgs {
        ca_file: Some(ca_file),
        ..hub.args(folder.path())
    };
    for name in ["mirror.key", "absent.pem"] {
        let line = refused(&of(file(name)));
        assert!(line.contains("--ca-file") && line.contains(name), "{line}");
    }
}

#[test]
fn the_systems_authorities_are_honoured() {
    let (hub, folder) = (mirror(), TempDir::new().expect("a folder"));
    let fetched = Command::new(env!("CARGO_BIN_EXE_swallow-worker"))
        .args(hub.args(folder.path()).argv())
        .env("SSL_CERT_FILE", file("authority.pem"))
        .output()
        .expect("the program was built");
    let said = String::from_utf8_lossy(&fetched.stderr);
    assert!(fetched.status.success(), "{said}");
    assert!(folder.path().join(FIRST).is_file());
}
