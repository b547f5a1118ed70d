//! TLS between router and worker, in both directions: who is let in, what each side says of the other, and certificates
//! that change under a running stream.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use swallow_tests::{PATIENCE, Running, post, program, read_slowly_while, wait_for};

/// A small model without files.
const MODEL: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 400, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "bos_token_id": 398, "eos_token_id": 399}"#;

/// A certificate authority.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate to be issued.
#[derive(Clone, Copy)]
struct Leaf {
    name: &'static str,
    role: Role,
    expired: bool,
}

/// What a certificate says that it is for.
#[derive(Clone, Copy)]
enum Role {
    Worker,
    Router,
    Both,
    /// Nothing, which TLS itself takes for anything.
    Unsaid,
}

const WORKER: Leaf = Leaf {
    name: "swallow-worker",
    role: Role::Worker,
    expired: false,
};
const ROUTER: Leaf = Leaf {
    name: "swallow-router",
    role: Role::Router,
    expired: false,
};

impl Authority {
    /// One below this one, which says as little as this one of what it is for.
    fn between(&self, name: &str) -> Self {
        let params = Self::params(name);
        let key = KeyPair::generate().expect("a key");
        let pem = params.signed_by(&key, &self.issuer).expect("a certificate").pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    fn new(name: &str) -> Self {
        let params = Self::params(name);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    /// Certificate and key, in PEM.
    fn issue(&self, leaf: Leaf) -> [String; 2] {
        let mut params = CertificateParams::new([leaf.name.to_owned()]).expect("a name");
        let (server, client) = (
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        );
        params.extended_key_usages = match leaf.role {
            Role::Worker => vec![server],
            Role::Router => vec![client],
            Role::Both => vec![server, client],
            Role::Unsaid => Vec::new(),
        };
        if leaf.expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        [certificate.pem(), key.serialize_pem()]
    }
}

/// A folder with ca.crt, tls.crt and tls.key, as a Secret is mounted.
struct Files(tempfile::TempDir);

impl Files {
    fn new(trusted: &str, own: [String; 2]) -> Self {
        let files = Self(tempfile::tempdir().expect("a temporary folder"));
        files.put(trusted, own);
        files
    }

    /// Each file is replaced at once, as a Secret's are.
    fn put(&self, trusted: &str, [cert, key]: [String; 2]) {
        for (name, text) in [("ca.crt", trusted), ("tls.crt", &cert), ("tls.key", &key)] {
            let new = self.path("new");
            fs::write(&new, text).expect("the folder is ours");
            fs::rename(new, self.path(name)).expect("the folder is ours");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn flags(&self, names: [&str; 3]) -> Vec<String> {
        names
            .iter()
            .zip(["ca.crt", "tls.crt", "tls.key"])
            .map(|(flag, file)| format!("--{flag}={}", self.path(file).display()))
            .collect()
    }

    fn of_worker(&self) -> Vec<String> {
        self.flags(["tls-client-ca", "tls-cert", "tls-key"])
    }

    fn of_router(&self) -> Vec<String> {
        self.flags(["worker-ca", "worker-cert", "worker-key"])
    }
}

fn start_worker(tls: &[String]) -> (Running, String) {
    let args = [
        "serve",
        "--load-format=dummy",
        "--served-name=m",
        "--replica-id=r",
        "--grpc-listen=127.0.0.1:0",
        "--http-listen=127.0.0.1:0",
        "--kv-bytes=67108864",
        "--threads=1",
        "--log-format=json",
    ];
    let args = args.map(str::to_owned).into_iter();
    let model = std::iter::once(format!("--model={MODEL}"));
    let worker = Running::start("swallow-worker", args.chain(model).chain(tls.iter().cloned()));
    let address = worker.log("the worker's address", |line| {
        line["grpc"].as_str().map(str::to_owned)
    });
    worker.says("\"ready\"");
    (worker, address)
}

fn start_router(worker: &str, tls: &[String]) -> Running {
    let args = [
        "--grpc-listen=127.0.0.1:0".to_owned(),
        "--http-listen=127.0.0.1:0".to_owned(),
        "--log-format=json".to_owned(),
        format!("--replica=m={worker}"),
    ];
    Running::start("swallow-router", args.into_iter().chain(tls.iter().cloned()))
}

fn completion(tokens: u32) -> Value {
    json!({ "model": "m", "prompt": "ab", "max_tokens": tokens, "temperature": 0, "ignore_eos": true })
}

/// Asks until the router has found its worker.
fn answer(router: &Running) -> Value {
    let address = router.http();
    wait_for("an answer", || {
        let answer = post(&address, "/v1/completions", &completion(8));
        answer["choices"][0]["text"].is_string().then_some(answer)
    })
}

#[test]
fn router_and_worker_that_know_each_other_serve() {
    let ca = Authority::new("ours");
    let worker_files = Files::new(&ca.pem, ca.issue(WORKER));
    let router_files = Files::new(&ca.pem, ca.issue(ROUTER));
    let (_worker, address) = start_worker(&worker_files.of_worker());
    let router = start_router(&address, &router_files.of_router());
    assert_eq!(answer(&router)["usage"]["completion_tokens"], 8);
}

/// Only the certificate at the end of a chain has to say what it is for; and it may say more than it needs.
#[test]
fn authorities_between_need_not_say_what_they_are_for() {
    let root = Authority::new("ours");
    let between = root.between("between");
    let issue = |leaf: Leaf| {
        let [certificate, key] = between.issue(Leaf {
            role: Role::Both,
            ..leaf
        });
        [certificate + &between.pem, key]
    };
    let worker_files = Files::new(&root.pem, issue(WORKER));
    let router_files = Files::new(&root.pem, issue(ROUTER));
    let (_worker, address) = start_worker(&worker_files.of_worker());
    let router = start_router(&address, &router_files.of_router());
    assert_eq!(answer(&router)["usage"]["completion_tokens"], 8);
}

/// What each of the two says when they do not get on.
struct Quarrel<'a> {
    worker: &'a [String],
    router: &'a [String],
    worker_says: Option<&'a str>,
    router_says: &'a str,
}

impl Quarrel<'_> {
    fn check(&self) {
        let (worker, address) = start_worker(self.worker);
        let router = start_router(&address, self.router);
        router.says(self.router_says);
        if let Some(words) = self.worker_says {
            worker.says(words);
        }
    }
}

#[test]
fn whoever_is_not_known_is_refused_with_words_on_both_sides() {
    let (ca, other) = (Authority::new("ours"), Authority::new("another"));
    let expired = |leaf: Leaf| Leaf {
        expired: true,
        ..leaf
    };
    let unsaid = |leaf: Leaf| Leaf {
        role: Role::Unsaid,
        ..leaf
    };
    let worker = Files::new(&ca.pem, ca.issue(WORKER)).of_worker_kept();
    let router = Files::new(&ca.pem, ca.issue(ROUTER)).of_router_kept();
    let quarrels = |files: &[(Kept, Kept, Option<&str>, &str)]| {
        for (worker, router, worker_says, router_says) in files {
            Quarrel {
                worker: &worker.flags,
                router: &router.flags,
                worker_says: *worker_says,
                router_says,
            }
            .check();
        }
    };
    let of_router = |trusted: &Authority, own: [String; 2]| Files::new(&trusted.pem, own).of_router_kept();
    let of_worker = |own: [String; 2]| Files::new(&ca.pem, own).of_worker_kept();
    quarrels(&[
        // The router trusts somebody else.
        (
            worker.clone(),
            of_router(&other, ca.issue(ROUTER)),
            Some("it refuses the certificate of --tls-cert (UnknownCA)"),
            "no authority in --worker-ca has issued the worker's certificate",
        ),
        // The worker does not know who issued the router's.
        (
            worker.clone(),
            of_router(&ca, other.issue(ROUTER)),
            Some("no authority in --tls-client-ca has issued its certificate"),
            "the worker refuses the certificate of --worker-cert",
        ),
        (
            worker.clone(),
            of_router(&ca, ca.issue(expired(ROUTER))),
            Some("its certificate has expired"),
            "the worker refuses the certificate of --worker-cert",
        ),
        (
            of_worker(ca.issue(expired(WORKER))),
            router.clone(),
            Some("it refuses the certificate of --tls-cert (CertificateExpired)"),
            "the worker's certificate has expired",
        ),
        // A certificate of the same authority that is not a worker's.
        (
            of_worker(ca.issue(Leaf {
                name: "somebody-else",
                ..WORKER
            })),
            router.clone(),
            Some("it refuses the certificate of --tls-cert"),
            "the worker's certificate is not for swallow-worker",
        ),
        // A worker's certificate does not make a router.
        (
            worker.clone(),
            of_router(&ca, ca.issue(WORKER)),
            Some("its certificate does not say that it is for clients"),
            "the worker refuses the certificate of --worker-cert",
        ),
        // Nor does one that passes for anything by saying nothing, on either side.
        (
            worker.clone(),
            of_router(&ca, ca.issue(unsaid(ROUTER))),
            Some("issue it with the extended key usage clientAuth"),
            "have the extended key usage clientAuth",
        ),
        (
            of_worker(ca.issue(unsaid(WORKER))),
            router.clone(),
            Some("have the extended key usage serverAuth"),
            "issue it with the extended key usage serverAuth",
        ),
        // One speaks TLS and the other does not.
        (
            worker,
            Kept::default(),
            Some("it speaks no TLS"),
            "does the worker speak TLS?",
        ),
        (Kept::default(), router, None, "the worker speaks no TLS"),
    ]);
}

/// Flags, with the files that they name.
#[derive(Clone, Default)]
struct Kept {
    flags: Vec<String>,
    _files: Option<Arc<Files>>,
}

impl Files {
    fn of_worker_kept(self) -> Kept {
        Kept {
            flags: self.of_worker(),
            _files: Some(Arc::new(self)),
        }
    }

    fn of_router_kept(self) -> Kept {
        Kept {
            flags: self.of_router(),
            _files: Some(Arc::new(self)),
        }
    }
}

/// Somebody who shows no certificate at all; the router's flags cannot bring that about.
#[test]
fn a_client_without_a_certificate_is_refused() {
    let ca = Authority::new("ours");
    let files = Files::new(&ca.pem, ca.issue(WORKER));
    let (worker, address) = start_worker(&files.of_worker());
    let done = Command::new("python3")
        .args(["-c", KNOCK, &address])
        .arg(files.path("ca.crt"))
        .output()
        .expect("python3 is there");
    worker.says("it shows no certificate: start the router with --worker-cert and --worker-key");
    assert!(
        !done.status.success() && String::from_utf8_lossy(&done.stderr).contains("certificate required"),
        "{done:?}"
    );
}

const KNOCK: &str = r#"
import socket, ssl, sys
host, port = sys.argv[1].rsplit(":", 1)
context = ssl.create_default_context(cafile=sys.argv[2])
context.set_alpn_protocols(["h2"])
with socket.create_connection((host, int(port))) as plain:
    with context.wrap_socket(plain, server_hostname="swallow-worker") as secured:
        secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        while secured.recv(4096):
            pass
"#;

#[test]
fn files_that_cannot_be_used_end_the_start_with_the_flags_name() {
    let ca = Authority::new("ours");
    let files = Files::new(&ca.pem, ca.issue(WORKER));
    fs::write(files.path("ca.crt"), "nothing").expect("the folder is ours");
    let said = |name: &str, args: Vec<String>| {
        let output = Command::new(program(name))
            .args(args)
            .output()
            .expect("it starts");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let mut args: Vec<String> = [
        "serve",
        "--model=llama-3-8b",
        "--load-format=dummy",
        "--served-name=m",
    ]
    .map(str::to_owned)
    .into();
    args.extend(
        [
            "--replica-id=r",
            "--grpc-listen=127.0.0.1:0",
            "--http-listen=127.0.0.1:0",
        ]
        .map(str::to_owned),
    );
    args.extend(files.of_worker());
    let words = said("swallow-worker", args);
    assert!(
        words.contains("--tls-client-ca=") && words.contains("there is no certificate in it"),
        "{words}"
    );
    let words = said("swallow-router", files.of_router());
    assert!(
        words.contains("--worker-ca=") && words.contains("there is no certificate in it"),
        "{words}"
    );
    let alone = files.of_router().remove(1);
    let words = said("swallow-router", vec![alone]);
    assert!(
        words.contains("--worker-ca"),
        "one of three is not enough: {words}"
    );
}

/// Of the stream.
const CANDIDATES: usize = 8;
/// Little of a stream goes into the system's buffers on the client's side.
const CLIENT_BUFFER_BYTES: usize = 4 << 10;

/// Reads a completion, slowly while `then` runs, which begins after the first event; gives all that came afterwards.
fn stream(address: &str, tokens: u32, then: impl FnOnce()) -> String {
    let mut body = completion(tokens);
    body["stream"] = true.into();
    // More than the system's buffers take: without log-probabilities, the tokens of a slow reader come in few events.
    body["logprobs"] = 5.into();
    body["n"] = CANDIDATES.into();
    let body = body.to_string();
    let address: SocketAddr = address.parse().expect("the router tells an address");
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket
        .set_recv_buffer_size(CLIENT_BUFFER_BYTES)
        .expect("a size above 0");
    socket.connect(&address.into()).expect("it listens");
    let mut connection = TcpStream::from(socket);
    connection
        .set_read_timeout(Some(PATIENCE))
        .expect("a time above 0");
    write!(
        connection,
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    )
    .expect("it reads");
    let mut reader = BufReader::with_capacity(CLIENT_BUFFER_BYTES, connection);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(reader.read_line(&mut line).expect("it answers") > 0, "no event");
    }
    let mut rest = read_slowly_while(&mut reader, then);
    assert!(!rest.contains("[DONE]"), "the stream had ended: {}", tail(&rest));
    reader
        .read_to_string(&mut rest)
        .expect("the stream goes on to its end");
    rest
}

/// How many requests a router is answering.
fn open_streams(router: &Running) -> u32 {
    let mut connection = TcpStream::connect(router.http()).expect("it listens");
    connection
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n")
        .expect("it reads");
    let mut text = String::new();
    connection.read_to_string(&mut text).expect("it answers");
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("swallow_router_open_streams{method=\"completions\"} "));
    value
        .and_then(|value| value.parse().ok())
        .unwrap_or_else(|| panic!("no such series: {text}"))
}

#[test]
fn certificates_change_under_a_running_stream() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let worker_files = Files::new(&old.pem, old.issue(WORKER));
    let router_files = Files::new(&old.pem, old.issue(ROUTER));
    let (worker, address) = start_worker(&worker_files.of_worker());
    let router = start_router(&address, &router_files.of_router());
    answer(&router);
    let rest = stream(&router.http(), 2500, || {
        assert_eq!(open_streams(&router), 1, "it is open before the change");
        worker_files.put(&new.pem, new.issue(WORKER));
        router_files.put(&new.pem, new.issue(ROUTER));
        worker.says("the certificates were read again");
        router.says("the certificates for workers were read again");
        // Who begins now needs the new ones.
        let late = Files::new(&new.pem, new.issue(ROUTER));
        answer(&start_router(&address, &late.of_router()));
        let early = Files::new(&old.pem, old.issue(ROUTER));
        start_router(&address, &early.of_router()).says("no authority in --worker-ca");
        assert_eq!(open_streams(&router), 1, "and it is open after it");
    });
    assert!(rest.contains("[DONE]"), "the stream broke: {}", tail(&rest));
    assert_eq!(
        rest.matches("\"finish_reason\":\"length\"").count(),
        CANDIDATES,
        "{}",
        tail(&rest)
    );
}

fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(500);
    text.get(from..).unwrap_or(text)
}

/// A pair that does not belong together changes nothing.
#[test]
fn a_half_written_change_changes_nothing() {
    let ca = Authority::new("ours");
    let worker_files = Files::new(&ca.pem, ca.issue(WORKER));
    let router_files = Files::new(&ca.pem, ca.issue(ROUTER));
    let (worker, address) = start_worker(&worker_files.of_worker());
    write(&worker_files.path("tls.key"), &ca.issue(WORKER)[1]);
    worker.says("the certificates stay as they were");
    let router = start_router(&address, &router_files.of_router());
    answer(&router);
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("the folder is ours");
}
