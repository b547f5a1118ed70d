//! A model that is fetched: the local mode brings it from a mirror served here, serves it, and asks for no byte of it
//! again; what the mirror garbles is refused.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use swallow_tests::{Local, root};

const REPO: &str = "tests/tiny";
const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
const SHARD: &str = "model-00002-of-00002.safetensors";

/// The fixture model behind a Hugging Face endpoint's addresses. It lives as long as the test's process.
struct Mirror {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Mirror {
    /// With `garbled`, the second shard comes with its last byte changed; its digest is still told as it was.
    fn start(garbled: bool) -> Self {
        let folder = root().join("tests/fixtures/tiny");
        let mut files: BTreeMap<String, Vec<u8>> = fs::read_dir(&folder)
            .expect("the fixture is committed")
            .flatten()
            .map(|entry| {
                let name = entry.file_name().into_string().expect("ASCII");
                (name, fs::read(entry.path()).expect("a file"))
            })
            .collect();
        let listing = listing(&files).to_string().into_bytes();
        if garbled {
            let last = files.get_mut(SHARD).and_then(|bytes| bytes.last_mut());
            *last.expect("the fixture has this shard") ^= 1;
        }
        files.insert(
            format!("/api/models/{REPO}/revision/{REVISION}?blobs=true"),
            listing,
        );
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (files, seen) = (Arc::new(files), Arc::clone(&asked));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, seen) = (Arc::clone(&files), Arc::clone(&seen));
                // A client that leaves is its own matter.
                thread::spawn(move || drop(answer(stream, &files, &seen)));
            }
        });
        Self { port, asked }
    }

    /// What was asked for so far.
    fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("no panic").clone()
    }

    fn yaml(&self) -> String {
        format!(
            "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata:\n  name: tiny\nspec:\n  model:\n    \
             servedNames: [tiny]\n    source:\n      type: HuggingFace\n      huggingFace:\n        repo: {REPO}\n        \
             revision: \"{REVISION}\"\n        endpoint: http://127.0.0.1:{}\n  engine:\n    kvCache:\n      bytes: 64Mi\n  \
             accelerator:\n    device: CPU\n  parallelism:\n    tensor: 1\n  replicas: 1\n",
            self.port
        )
    }
}

fn listing(files: &BTreeMap<String, Vec<u8>>) -> Value {
    let one = |(name, bytes): (&String, &Vec<u8>)| {
        let sha256: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        json!({"rfilename": name, "size": bytes.len(), "blobId": "0".repeat(40),
               "lfs": {"sha256": sha256, "size": bytes.len(), "pointerSize": 134}})
    };
    json!({"id": REPO, "sha": REVISION, "siblings": files.iter().map(one).collect::<Vec<_>>()})
}

/// One request, whole or from a byte on.
fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    asked: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut from = 0;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse().unwrap_or(0);
        }
    }
    asked.lock().expect("no panic").push(path.clone());
    let prefix = format!("/{REPO}/resolve/{REVISION}/");
    let Some(bytes) = files.get(path.strip_prefix(&prefix).unwrap_or(&path)) else {
        return write!(
            stream,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    let (status, total) = (
        if from > 0 { "206 Partial Content" } else { "200 OK" },
        bytes.len(),
    );
    let body = bytes.get(from..).unwrap_or_default();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Range: bytes {from}-{}/{total}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        total.saturating_sub(1),
        body.len()
    )?;
    stream.write_all(body)
}

/// Starts the local mode on a cache and gives what it answers.
fn text(mirror: &Mirror, cache: &Path) -> String {
    let mut local = Local::start(
        &mirror.yaml(),
        &["--cache-dir", cache.to_str().expect("a plain path")],
    );
    let (_, http) = local.ready();
    let body = json!({"model": "tiny", "temperature": 0,
                      "messages": [{"role": "user", "content": "35を漢字で書いてください。"}]});
    let answer = Command::new("curl")
        .args(["--silent", "--show-error", "--json", &body.to_string()])
        .arg(format!("http://{http}/v1/chat/completions"))
        .output()
        .expect("curl is there");
    let answer: Value = serde_json::from_slice(&answer.stdout).expect("JSON");
    local.signal(Signal::SIGTERM);
    assert!(local.wait().success(), "{}", local.stderr());
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_else(|| panic!("no text: {answer}"))
        .to_owned()
}

#[test]
fn a_fetched_model_serves_and_is_fetched_once() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let mirror = Mirror::start(false);
    let first = text(&mirror, cache.path());
    assert!(first.contains("三十五"), "{first}");
    let asked = mirror.asked();
    assert!(
        asked.iter().any(|path| path.ends_with(SHARD)),
        "it was fetched: {asked:?}"
    );
    assert_eq!(text(&mirror, cache.path()), first);
    let again = &mirror.asked()[asked.len()..];
    assert!(again.is_empty(), "the cache had all of it: {again:?}");
}

#[test]
fn garbled_weights_are_refused() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let mirror = Mirror::start(true);
    let mut local = Local::start(
        &mirror.yaml(),
        &["--cache-dir", cache.path().to_str().expect("a plain path")],
    );
    assert!(!local.wait().success());
    let said = local.stderr();
    assert!(said.contains(SHARD) && said.contains("sha256"), "{said}");
}
