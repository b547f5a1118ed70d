//! TLS on both fronts, with certificates that change under running streams.

use std::{path::PathBuf, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use swallow_router::tls::Certificate;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::*;

pub const FIRST: [&str; 2] = [
    include_str!("../support/tls/first.crt"),
    include_str!("../support/tls/first.key"),
];
const SECOND: [&str; 2] = [
    include_str!("../support/tls/second.crt"),
    include_str!("../support/tls/second.key"),
];

/// A certificate and its key, that go with their test.
pub struct Files(PathBuf);

impl Files {
    pub fn new(pair: [&str; 2]) -> Self {
        let files = Self(std::env::temp_dir().join(format!("swallow-tls-{}", uuid::Uuid::new_v4())));
        std::fs::create_dir(&files.0).expect("the temporary folder can be written");
        files.put(pair);
        files
    }

    fn put(&self, [cert, key]: [&str; 2]) {
        for (name, text) in [("crt", cert), ("key", key)] {
            std::fs::write(self.0.join(name), text).expect("the temporary folder can be written");
        }
    }

    /// The flags of the program that name them.
    pub fn flags(&self) -> [String; 2] {
        [("cert", "crt"), ("key", "key")]
            .map(|(flag, name)| format!("--tls-{flag}={}", self.0.join(name).display()))
    }

    pub fn load(&self) -> Certificate {
        Certificate::load(&self.0.join("crt"), &self.0.join("key")).expect("they belong together")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // They may be gone.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn der(pair: [&str; 2]) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pair[0].as_bytes()).expect("PEM")
}

pub async fn connect(address: SocketAddr, protocol: &[u8]) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    for pair in [FIRST, SECOND] {
        roots.add(der(pair)).expect("a certificate");
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("the usual versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(address).await.expect("it listens");
    let name = ServerName::try_from("localhost").expect("a name");
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .expect("a handshake");
    let (_, session) = stream.get_ref();
    assert_eq!(session.alpn_protocol(), Some(protocol));
    stream
}

fn presented(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    let chain = stream.get_ref().1.peer_certificates().expect("one was presented");
    chain[0].clone().into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_change_and_no_stream_is_dropped() {
    let files = Files::new(FIRST);
    let certificate = files.load();
    let worker = worker(|config| config.step = Duration::from_millis(2));
    let house = house_of([worker.address].into_iter(), short, None, Some(&certificate)).await;

    // Somebody who never finishes a handshake, and somebody who does not begin one, hold up nobody.
    let _silent = TcpStream::connect(house.http).await.expect("it listens");
    let mut plain = TcpStream::connect(house.http).await.expect("it listens");
    plain
        .write_all(b"GET /health HTTP/1.1\r\n\r\n")
        .await
        .expect("read");

    let mut stream = connect(house.http, b"http/1.1").await;
    assert_eq!(presented(&stream), der(FIRST));
    let body = r#"{"model": "m", "prompt": "p", "max_tokens": 300, "stream": true}"#;
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("read");
    let mut answer = vec![0; 1024];
    let read = stream.read(&mut answer).await.expect("it begins");
    answer.truncate(read);

    // The new certificate with the old key: no pair.
    files.put([SECOND[0], FIRST[1]]);
    certificate.look().expect_err("they do not belong together");
    assert_eq!(presented(&connect(house.http, b"http/1.1").await), der(FIRST));
    files.put(SECOND);
    assert!(certificate.look().expect("a pair"), "it is another one");
    assert!(!certificate.look().expect("a pair"), "and now it is the same");
    let mut grpc = connect(house.grpc, b"h2").await;
    assert_eq!(presented(&grpc), der(SECOND));
    grpc.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .expect("read");
    let mut head = [0; 9];
    grpc.read_exact(&mut head).await.expect("HTTP/2 is spoken");
    assert_eq!(head[3], 4, "SETTINGS");

    stream
        .read_to_end(&mut answer)
        .await
        .expect("its stream goes on, to its clean end");
    let answer = String::from_utf8(answer).expect("text");
    assert!(answer.contains("data: [DONE]"), "{answer}");
    house.settles(64).await;
    until("who said nothing is gone", || {
        house.metric("swallow_router_connections{protocol=\"http\"}") == 0.0
    })
    .await;
}

fn short(limits: &mut Limits) {
    limits.head = Duration::from_secs(1);
}
