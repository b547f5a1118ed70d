//! What the tests share: where the repository and its programs are, and how the main job is started, watched and
//! stopped. Nothing waits for a time; everything waits for a condition, up to a limit that fails the test.

pub mod clock;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// Longer than anything here takes on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests are one folder below the root")
        .to_owned()
}

/// A program of ours, built beside this test.
///
/// # Panics
/// If it was not built: `cargo build --release --bins` comes first, as in `tests/run`.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let path = test
        .parent()
        .and_then(Path::parent)
        .expect("tests run from target/PROFILE/deps")
        .join(name);
    assert!(
        path.is_file(),
        "{} is not built; run `cargo build --release --bins` first",
        path.display()
    );
    path
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// After `PATIENCE`, naming `what`.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "waited {} s in vain for: {what}",
            PATIENCE.as_secs()
        );
        thread::sleep(Duration::from_millis(20)); // Between two looks at a condition.
    }
}

/// A SwallowModel for the local mode, as a user would write it.
pub fn model_yaml(name: &str, folder: &Path, tensor: u32, replicas: u32) -> String {
    format!(
        "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata:\n  name: {name}\nspec:\n  model:\n    \
         servedNames: [{name}]\n    source:\n      type: HostPath\n      hostPath:\n        path: {}\n  engine:\n    kvCache:\n      \
         bytes: 64Mi\n  accelerator:\n    device: CPU\n  parallelism:\n    tensor: {tensor}\n  replicas: {replicas}\n",
        folder.display()
    )
}

/// The running local mode.
pub struct Local {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: Vec<String>,
    folder: tempfile::TempDir,
}

impl Local {
    /// Starts `swallow-operator local` on a file with this text; port 0 takes free ports.
    pub fn start(yaml: &str, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("model.yaml");
        fs::write(&file, yaml).expect("the folder is ours");
        let mut child = Command::new(program("swallow-operator"))
            .args(["local", "-f"])
            .arg(&file)
            .args(["--grpc-port", "0", "--http-port", "0"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(folder.path().join("stderr")).expect("the folder is ours"))
            .spawn()
            .expect("the operator starts");
        let stdout = child.stdout.take().expect("it is piped");
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            lines,
            seen: Vec::new(),
            folder,
        }
    }

    /// The first line of its output, from now on, that begins with `start`.
    ///
    /// # Panics
    /// If the output ends or `PATIENCE` passes first; shows all of it.
    pub fn line(&mut self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.starts_with(start) => return line,
                Ok(line) => self.seen.push(line),
                Err(_) => panic!(
                    "no line '{start}...'\n{}\n{}",
                    self.seen.join("\n"),
                    self.stderr()
                ),
            }
        }
    }

    /// Waits until it is ready; gives the gRPC address and the HTTP address, each HOST:PORT.
    pub fn ready(&mut self) -> (String, String) {
        let line = self.line("ready");
        let field = |name: &str| {
            let value = line
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name))
                .unwrap_or_else(|| panic!("{name} in '{line}'"));
            value.rsplit("//").next().unwrap_or_default().to_owned()
        };
        (field("grpc="), field("http="))
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("process ids are small"))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it is our child");
    }

    /// Waits until it ends.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the end of the local mode", || {
            self.child.try_wait().expect("it is our child")
        })
    }

    /// The processes it started, with their command lines.
    pub fn processes(&self) -> Vec<(Pid, String)> {
        children(self.pid())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program with its log, one JSON object a line.
pub struct Running {
    /// To be ended or asked about.
    pub child: Child,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Running {
    /// Starts a program of ours.
    ///
    /// # Panics
    /// If it was not built.
    pub fn start(name: &str, args: impl IntoIterator<Item = String>) -> Self {
        Self::start_in([], name, args)
    }

    /// As `start`, with more in its environment.
    ///
    /// # Panics
    /// If it was not built.
    pub fn start_in(
        env: impl IntoIterator<Item = (&'static str, String)>,
        name: &str,
        args: impl IntoIterator<Item = String>,
    ) -> Self {
        let mut child = Command::new(program(name))
            .args(args)
            .envs(env)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Self { child, log }
    }

    /// What it said so far.
    pub fn lines(&self) -> Vec<Value> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first line of which `pick` makes something; shows all of them if there is none.
    ///
    /// # Panics
    /// After `PATIENCE`.
    pub fn log<T>(&self, what: &str, pick: impl Fn(&Value) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            let lines = self.lines();
            if let Some(found) = lines.iter().find_map(&pick) {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "no line with {what}: {lines:#?}");
            thread::sleep(Duration::from_millis(10)); // Between two looks at a condition.
        }
    }

    /// Waits for a line with these words.
    ///
    /// # Panics
    /// After `PATIENCE`.
    pub fn says(&self, words: &str) {
        self.log(words, |line| line.to_string().contains(words).then_some(()));
    }

    /// The router's address for OpenAI clients.
    ///
    /// # Panics
    /// After `PATIENCE`, as of a program that is no router.
    pub fn http(&self) -> String {
        self.log("the router's address", |line| {
            (line["protocol"] == "http").then(|| line["address"].as_str().map(str::to_owned))?
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already where it was refused.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks an HTTP server with a JSON body; the answer's body, whatever its status.
///
/// # Panics
/// If it does not answer with JSON within `PATIENCE`.
pub fn post(address: &str, path: &str, body: &Value) -> Value {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time above 0");
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let (_, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {answer}"));
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// Takes a line from time to time while `then` runs, so that a long stream neither ends nor stands still; gives the lines.
pub fn read_slowly_while(reader: &mut (impl BufRead + Send), then: impl FnOnce()) -> String {
    /// The pace of this client.
    const EACH_LINE: Duration = Duration::from_millis(50);
    /// Sent when `then` is over, well or not.
    struct Over(mpsc::Sender<()>);
    impl Drop for Over {
        fn drop(&mut self) {
            // The reader may have come to the end.
            let _ = self.0.send(());
        }
    }
    let (over, is_over) = mpsc::channel();
    let over = Over(over);
    thread::scope(|scope| {
        let read = scope.spawn(move || {
            let mut lines = String::new();
            while is_over.recv_timeout(EACH_LINE) == Err(mpsc::RecvTimeoutError::Timeout)
                && reader.read_line(&mut lines).is_ok_and(|read| read > 0)
            {}
            lines
        });
        then();
        drop(over);
        read.join().expect("reading does not panic")
    })
}

/// What `deploy/make-secrets` makes for a trial, and what a client needs of it.
pub struct MadeSecrets {
    /// The Secrets, in YAML.
    pub yaml: String,
    /// The API key.
    pub key: String,
    /// The file of the authority that clients trust.
    pub authority: PathBuf,
    _folder: tempfile::TempDir,
}

impl MadeSecrets {
    /// For a model that clients reach by these names and addresses too.
    ///
    /// # Panics
    /// If the script fails.
    pub fn new(model: &str, hosts: &[&str]) -> Self {
        let made = Command::new(root().join("deploy/make-secrets"))
            .arg(model)
            .args(hosts)
            .output()
            .expect("bash is installed");
        let said = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(made.status.success(), "{said}");
        let key = said.lines().find_map(|line| line.strip_prefix("the API key: "));
        let authority = said.find("-----BEGIN CERTIFICATE-----").map(|at| &said[at..]);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("ca.crt");
        fs::write(&file, authority.expect("it tells the authority")).expect("the folder is ours");
        Self {
            yaml: String::from_utf8(made.stdout).expect("YAML is text"),
            key: key.expect("it tells the key").to_owned(),
            authority: file,
            _folder: folder,
        }
    }
}

/// curl's question to a server whose certificate is of this authority, with an API key.
pub fn https(url: &str, authority: &Path, key: Option<&str>, body: &Value) -> Command {
    let mut curl = Command::new("curl");
    curl.args([
        "--silent",
        "--show-error",
        "--no-buffer",
        "--max-time",
        "60",
        "--cacert",
    ])
    .arg(authority)
    .args(key.iter().flat_map(|&key| ["--oauth2-bearer", key]))
    .args(["--json", &body.to_string(), url]);
    curl
}

/// Asks it; the status and the body.
///
/// # Errors
/// curl's words, where there is no answer.
pub fn ask_https(
    url: &str,
    authority: &Path,
    key: Option<&str>,
    body: &Value,
) -> Result<(u16, Value), String> {
    let mut curl = https(url, authority, key, body);
    let done = curl.args(["--write-out", "\\n%{http_code}"]).output();
    let done = done.map_err(|error| format!("curl: {error}"))?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let text = String::from_utf8_lossy(&done.stdout);
    let answer = text.rsplit_once('\n').and_then(|(body, status)| {
        let body = serde_json::from_str(body).ok()?;
        Some((status.parse().ok()?, body))
    });
    answer.ok_or_else(|| format!("{text} {said}"))
}

/// Whether NVIDIA's driver is here.
pub fn has_gpu() -> bool {
    Path::new("/dev/nvidiactl").exists() || Path::new("/dev/dxg").exists()
}

/// All living descendants of a process, with their command lines.
pub fn children(parent: Pid) -> Vec<(Pid, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // After the last ')': state, parent.
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let (Some(state), Some(of)) = (
            fields.first(),
            fields.get(1).and_then(|of| of.parse::<i32>().ok()),
        ) else {
            continue;
        };
        if of == parent.as_raw() && *state != "Z" {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push((
                Pid::from_raw(pid),
                String::from_utf8_lossy(&command).replace('\0', " "),
            ));
            found.extend(children(Pid::from_raw(pid)));
        }
    }
    found
}

/// Whether a process lives (a zombie does not).
pub fn is_alive(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim_start()
            .starts_with(['Z', 'X'])
    })
}
