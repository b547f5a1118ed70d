//! An endpoint in this process, on a loopback port, that fails on demand.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::JoinHandle,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use swallow_proto::launch::{FetchArgs, ProgressFormat};

pub const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
pub const REPO: &str = "org/some-model.v1";
pub const FIRST: &str = "model-00001-of-00002.safetensors";
pub const SECOND: &str = "model-00002-of-00002.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// What the endpoint does with the next request for a path, instead of answering it well.
#[derive(Clone, Debug)]
pub enum Fault {
    Status(u16, &'static str),
    /// Sends that many bytes of the body and closes the connection.
    Cut(usize),
    /// Sends that many bytes of the body, then nothing until the endpoint goes.
    Stall(usize),
    /// The right length, the wrong bytes.
    Garbled,
    /// All of the file, whatever part was asked for.
    NoRange,
    Redirect(String),
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

#[derive(Default)]
pub struct State {
    pub files: HashMap<String, Vec<u8>>,
    pub faults: HashMap<String, Vec<Fault>>,
    /// Answers the listing as it is.
    pub listing: Option<Value>,
    pub seen: Vec<Seen>,
    pub closing: bool,
}

/// An endpoint on a loopback port; gone when dropped.
pub struct Hub {
    pub port: u16,
    /// Put before every path, as a mirror may do.
    pub prefix: String,
    /// "http" or "https".
    pub scheme: &'static str,
    pub shared: Arc<(Mutex<State>, Condvar)>,
    pub thread: Option<JoinHandle<()>>,
}

impl Hub {
    pub fn start(prefix: &str, files: HashMap<String, Vec<u8>>) -> Hub {
        Hub::start_with(prefix, files, None)
    }

    /// The same over TLS.
    pub fn secure(tls: Arc<rustls::ServerConfig>) -> Hub {
        Hub::start_with("", sharded_model(), Some(tls))
    }

    fn start_with(
        prefix: &str,
        files: HashMap<String, Vec<u8>>,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> Hub {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("a bound port").port();
        let shared = Arc::new((
            Mutex::new(State {
                files,
                ..State::default()
            }),
            Condvar::new(),
        ));
        let (state, prefix_there) = (shared.clone(), prefix.to_owned());
        let thread = std::thread::spawn(move || {
            let mut connections = Vec::new();
            for stream in listener.incoming() {
                if state.0.lock().expect("no panic").closing {
                    break;
                }
                let (state, prefix, tls) = (state.clone(), prefix_there.clone(), tls.clone());
                let stream = stream.expect("a connection");
                let serve = move || match tls {
                    None => answer(stream, &prefix, &state),
                    Some(tls) => {
                        let session = rustls::ServerConnection::new(tls).expect("a sound configuration");
                        let mut stream = rustls::StreamOwned::new(session, stream);
                        answer(&mut stream, &prefix, &state)?;
                        stream.conn.send_close_notify();
                        stream.flush()
                    }
                };
                connections.push(std::thread::spawn(move || drop(serve())));
            }
            for connection in connections {
                connection.join().expect("no panic");
            }
        });
        Hub {
            port,
            prefix: prefix.to_owned(),
            scheme,
            shared,
            thread: Some(thread),
        }
    }

    pub fn model() -> Hub {
        Hub::start("", sharded_model())
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().expect("no panic")
    }

    pub fn fail(&self, name: &str, faults: &[Fault]) {
        let path = format!("/{REPO}/resolve/{REVISION}/{name}");
        self.state().faults.insert(path, faults.to_vec());
    }

    pub fn fail_listing(&self, faults: &[Fault]) {
        self.state().faults.insert(listing_path(), faults.to_vec());
    }

    /// The ranges of all requests for a file.
    pub fn ranges(&self, name: &str) -> Vec<Option<String>> {
        let state = self.state();
        let of_file = state
            .seen
            .iter()
            .filter(|seen| seen.path.ends_with(&format!("/{name}")));
        of_file.map(|seen| seen.range.clone()).collect()
    }

    pub fn args(&self, out: &Path) -> FetchArgs {
        FetchArgs {
            repo: REPO.into(),
            revision: REVISION.into(),
            endpoint: format!("{}://127.0.0.1:{}{}", self.scheme, self.port, self.prefix),
            out: out.into(),
            token_file: None,
            ca_file: None,
            progress: ProgressFormat::Json,
            http_listen: None,
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state().closing = true;
        self.shared.1.notify_all();
        // Wakes the accepting thread.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        let thread = self.thread.take().expect("dropped once");
        if !std::thread::panicking() {
            thread.join().expect("no panic in the endpoint");
        }
    }
}

pub fn listing_path() -> String {
    format!("/api/models/{REPO}/revision/{REVISION}?blobs=true")
}

/// Reads one request and answers it; an error is a client that went away.
pub fn answer(
    stream: impl Read + Write,
    prefix: &str,
    shared: &(Mutex<State>, Condvar),
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let (range, token) = (headers.remove("range"), headers.remove("authorization"));
    let mut state = shared.0.lock().expect("no panic");
    state.seen.push(Seen {
        path: path.clone(),
        range: range.clone(),
        token,
    });
    let path = path.strip_prefix(prefix).unwrap_or("outside").to_owned();
    let queue = state.faults.get_mut(&path).filter(|queue| !queue.is_empty());
    let fault = queue.map(|queue| queue.remove(0));
    let body = if path == listing_path() {
        let listing = state.listing.clone().unwrap_or_else(|| listing(&state.files));
        Some(listing.to_string().into_bytes())
    } else {
        path.rsplit_once('/')
            .and_then(|(_, name)| state.files.get(name))
            .cloned()
    };
    drop(state);
    respond(reader.into_inner(), body, range, fault, shared)
}

pub fn respond(
    mut stream: impl Write,
    body: Option<Vec<u8>>,
    range: Option<String>,
    fault: Option<Fault>,
    shared: &(Mutex<State>, Condvar),
) -> std::io::Result<()> {
    let close = "Connection: close\r\n";
    if let Some(Fault::Status(code, headers)) = fault {
        return write!(
            stream,
            "HTTP/1.1 {code} Because\r\n{headers}{close}Content-Length: 0\r\n\r\n"
        );
    }
    if let Some(Fault::Redirect(to)) = fault {
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nLocation: {to}\r\n{close}Content-Length: 2\r\n\r\nno"
        );
    }
    let Some(mut body) = body else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\n{close}Content-Length: 0\r\n\r\n"
        );
    };
    let total = body.len();
    let from = range.and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let head = match (from, &fault) {
        (Some(from), fault) if !matches!(fault, Some(Fault::NoRange)) => {
            body.drain(..from);
            format!(
                "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{total}\r\n",
                total - 1
            )
        }
        _ => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    write!(stream, "{head}{close}Content-Length: {}\r\n\r\n", body.len())?;
    match fault {
        Some(Fault::Cut(n)) => stream.write_all(&body[..n]),
        Some(Fault::Garbled) => stream.write_all(&body.iter().map(|byte| !byte).collect::<Vec<_>>()),
        Some(Fault::Stall(n)) => {
            stream.write_all(&body[..n])?;
            let open = shared.0.lock().expect("no panic");
            drop(
                shared
                    .1
                    .wait_while(open, |state| !state.closing)
                    .expect("no panic"),
            );
            Ok(())
        }
        _ => stream.write_all(&body),
    }
}

/// The answer to `?blobs=true`: weights in large-file storage, text in git.
pub fn listing(files: &HashMap<String, Vec<u8>>) -> Value {
    let one = |(name, bytes): (&String, &Vec<u8>)| {
        if name.ends_with(".safetensors") {
            let sha256 = hex(&Sha256::digest(bytes));
            return json!({"rfilename": name, "size": bytes.len(), "blobId": "0".repeat(40),
                "lfs": {"sha256": sha256, "size": bytes.len(), "pointerSize": 134}});
        }
        json!({"rfilename": name, "size": bytes.len(), "blobId": git_blob(bytes), "lfs": null})
    };
    json!({"id": REPO, "sha": REVISION, "siblings": files.iter().map(one).collect::<Vec<_>>()})
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn git_blob(bytes: &[u8]) -> String {
    use sha1::Digest as _;
    let mut sha1 = sha1::Sha1::new();
    sha1.update(format!("blob {}\0", bytes.len()));
    sha1.update(bytes);
    hex(&sha1.finalize())
}

pub fn noise(n: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| random.u8(..)).collect()
}

pub fn sharded_model() -> HashMap<String, Vec<u8>> {
    let index = json!({"weight_map": {"a": FIRST, "b": SECOND, "c": FIRST}}).to_string();
    HashMap::from([
        ("config.json".to_owned(), b"{}".to_vec()),
        ("tokenizer.json".to_owned(), noise(100_000, 1)),
        ("chat_template.jinja".to_owned(), "{{ こんにちは }}".into()),
        (INDEX.to_owned(), index.into_bytes()),
        (FIRST.to_owned(), noise(3_000_000, 2)),
        (SECOND.to_owned(), noise(200_000, 3)),
        // None of these is needed.
        ("README.md".to_owned(), b"# read".to_vec()),
        ("pytorch_model.bin".to_owned(), noise(1000, 4)),
        ("consolidated.safetensors".to_owned(), noise(1000, 5)),
        ("original/params.json".to_owned(), b"{}".to_vec()),
    ])
}
