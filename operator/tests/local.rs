//! The local mode with stand-ins for its processes: what it does when they start, fail, vanish, or will not go.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of the repository that the stand-in fetches.
const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";

/// A folder with the stand-ins, models and a SwallowModel file.
struct Stage {
    folder: TempDir,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let stage = Self { folder };
        fs::create_dir(stage.path("bin")).expect("the folder is ours");
        for program in ["swallow-worker", "swallow-router"] {
            let script = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/standin")
                .join(program);
            let copy = stage.path("bin").join(program);
            fs::copy(&script, &copy).expect("the stand-in is there");
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("the copy is ours");
        }
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A model's folder with what the stand-in should do.
    fn model(&self, name: &str, behaviour: &str) -> String {
        let folder = self.path(name);
        fs::create_dir(&folder).expect("the folder is ours");
        fs::write(folder.join("config.json"), "{}").expect("the folder is ours");
        fs::write(folder.join("behaviour.json"), behaviour).expect("the folder is ours");
        self.yaml(
            name,
            &format!("type: HostPath, hostPath: {{path: {}}}", folder.display()),
        )
    }

    fn yaml(&self, name: &str, source: &str) -> String {
        format!(
            "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata: {{name: {name}}}\nspec:\n  model: \
             {{source: {{{source}}}}}\n  accelerator: {{device: CPU}}\n  replicas: 2\n"
        )
    }

    fn command(&self, yaml: &str) -> Command {
        let file = self.path("model.yaml");
        fs::write(&file, yaml).expect("the folder is ours");
        let mut command = Command::new(env!("CARGO_BIN_EXE_swallow-operator"));
        command
            .args(["local", "--grpc-port=0", "--http-port=0", "-f"])
            .arg(file);
        command.arg("--bin-dir").arg(self.path("bin"));
        command.arg("--cache-dir").arg(self.path("cache"));
        command.env("TMPDIR", self.folder.path());
        command
    }

    /// Runs it to its end, which must come by itself.
    fn run(&self, yaml: &str) -> Output {
        self.command(yaml).output().expect("the operator starts")
    }

    fn start(&self, yaml: &str) -> Local {
        self.start_command(self.command(yaml))
    }

    fn start_command(&self, mut command: Command) -> Local {
        let stderr = fs::File::create(self.path("stderr")).expect("the folder is ours");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(stderr)
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
        Local {
            child,
            lines,
            said: Vec::new(),
        }
    }

    /// What the stand-ins of a folder wrote down.
    fn events(&self, folder: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(folder).join("events")).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).expect("stand-ins write JSON"))
            .collect()
    }

    fn stderr(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// Folders of logs that were left behind.
    fn logs(&self) -> usize {
        let entries = fs::read_dir(self.folder.path()).expect("the folder is ours");
        entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("swallow-local-"))
            .count()
    }
}

struct Local {
    child: Child,
    lines: mpsc::Receiver<String>,
    said: Vec<String>,
}

impl Local {
    /// The next line that contains all of these words.
    fn line(&mut self, words: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("no line with {words:?}\n{}", self.said.join("\n")));
            self.said.push(line.clone());
            if words.iter().all(|word| line.contains(word)) {
                return line;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids are small");
        kill(Pid::from_raw(pid), signal).expect("it is our child");
    }

    fn wait(&mut self) -> ExitStatus {
        wait_for("the end of the operator", || {
            self.child.try_wait().expect("it is our child")
        })
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10)); // Between two looks at a condition.
    }
}

fn pid(event: &Value) -> Pid {
    let pid = event["pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok())
        .expect("events have a pid");
    Pid::from_raw(pid)
}

fn is_alive(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim_start()
            .starts_with(['Z', 'X'])
    })
}

fn all_gone(events: &[Value]) {
    wait_for("the end of all processes", || {
        events.iter().all(|event| !is_alive(pid(event))).then_some(())
    });
}

#[test]
fn models_get_groups_and_one_router_and_go_in_good_order() {
    let stage = Stage::new();
    let yaml = format!("{}---\n{}", stage.model("one", "{}"), stage.model("two", "{}"));
    let mut local = stage.start(&yaml);
    let ready = local.line(&[
        "ready",
        "grpc=127.0.0.1:",
        "http=http://127.0.0.1:",
        "models=one,two",
    ]);
    assert!(ready.starts_with("ready "), "{ready}");
    let router = stage.events("bin");
    assert_eq!(router.len(), 1);
    let workers = [stage.events("one"), stage.events("two")].concat();
    assert_eq!(workers.len(), 4);
    let replicas = router[0]["replicas"].as_array().expect("a list");
    for worker in &workers {
        let address = &worker["grpc-listen"];
        assert!(
            replicas
                .iter()
                .any(|replica| replica[0] == worker["served-name"] && replica[1] == *address)
        );
    }
    local.signal(Signal::SIGTERM);
    local.line(&["draining"]);
    assert!(local.wait().success(), "{}", stage.stderr());
    assert_eq!(
        stage.events("bin").last().expect("it wrote")["what"],
        "told to end"
    );
    for model in ["one", "two"] {
        assert_eq!(
            stage
                .events(model)
                .iter()
                .filter(|event| event["what"] == "told to end")
                .count(),
            2
        );
    }
    all_gone(&[router, workers].concat());
    assert_eq!(stage.logs(), 0, "logs of a good end are removed");
}

#[test]
fn a_killed_worker_comes_back_at_its_ports() {
    let stage = Stage::new();
    let mut local = stage.start(&stage.model("one", "{}"));
    local.line(&["ready "]);
    let before = stage.events("one");
    kill(pid(&before[0]), Signal::SIGKILL).expect("it lives");
    local.line(&["GroupFailed", "SIGKILL"]);
    local.line(&["CreateGroup", "restart 1 of 5"]);
    local.line(&["GroupServing"]);
    let after = stage.events("one");
    assert_eq!(after.len(), 3, "the other one was left alone");
    assert_eq!(after[2]["grpc-listen"], before[0]["grpc-listen"]);
    assert_eq!(after[2]["http-listen"], before[0]["http-listen"]);
    assert!(is_alive(pid(&before[1])));
    assert_eq!(stage.events("bin").len(), 1, "the router's list stayed right");
}

#[test]
fn a_killed_router_comes_back() {
    let stage = Stage::new();
    let mut local = stage.start(&stage.model("one", "{}"));
    local.line(&["ready "]);
    kill(pid(&stage.events("bin")[0]), Signal::SIGKILL).expect("it lives");
    local.line(&["NotReady", "RouterNotReady"]);
    wait_for("another router", || {
        (stage.events("bin").len() == 2).then_some(())
    });
    local.line(&["Ready", "AllGroupsServing"]);
}

#[test]
fn a_second_signal_ends_what_will_not_go() {
    let stage = Stage::new();
    let mut local = stage.start(&stage.model("one", r#"{"stubborn": true}"#));
    local.line(&["ready "]);
    local.signal(Signal::SIGINT);
    local.line(&["draining"]);
    wait_for("workers that were told to end", || {
        let told = stage
            .events("one")
            .iter()
            .filter(|event| event["what"] == "told to end")
            .count();
        (told == 2).then_some(())
    });
    local.signal(Signal::SIGINT);
    assert!(!local.wait().success());
    assert_eq!(stage.stderr().lines().count(), 1, "{}", stage.stderr());
    all_gone(&[stage.events("bin"), stage.events("one")].concat());
}

#[test]
fn nothing_outlives_a_killed_operator() {
    let stage = Stage::new();
    let mut local = stage.start(&stage.model("one", r#"{"stubborn": true}"#));
    local.line(&["ready "]);
    local.signal(Signal::SIGKILL);
    local.wait();
    all_gone(&[stage.events("bin"), stage.events("one")].concat());
}

#[test]
fn broken_files_end_it_with_the_workers_own_words() {
    let stage = Stage::new();
    let yaml = stage.model(
        "one",
        r#"{"exit": 1, "words": "model.safetensors: lm_head.weight is missing"}"#,
    );
    let output = stage.run(&yaml);
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains("one: model.safetensors: lm_head.weight is missing"),
        "{stderr}"
    );
    all_gone(&[stage.events("bin"), stage.events("one")].concat());
    assert_eq!(stage.logs(), 1, "logs of a bad end are kept");
}

#[test]
fn a_model_is_fetched_once_into_the_cache() {
    let stage = Stage::new();
    let source =
        |repo: &str| format!("type: HuggingFace, huggingFace: {{repo: {repo}, revision: \"{REVISION}\"}}");
    let mut local = stage.start(&stage.yaml("one", &source("owner/name")));
    local.line(&["ready "]);
    let folder = format!("cache/owner--name/{REVISION}");
    assert!(stage.path(&folder).join("config.json").is_file());
    assert_eq!(stage.events(&folder).len(), 2);
    local.signal(Signal::SIGTERM);
    assert!(local.wait().success());

    let output = stage.run(&stage.yaml("one", &source("owner/missing")));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.lines().count() == 1,
        "{stderr}"
    );
    assert!(
        stderr.contains("one: swallow-worker: not found (HTTP 404)"),
        "{stderr}"
    );
}

#[test]
fn programs_that_are_missing_or_broken_are_one_line() {
    let stage = Stage::new();
    let yaml = stage.model("one", "{}");
    let router = stage.path("bin/swallow-router");
    fs::remove_file(&router).expect("the stand-in is ours");
    let output = stage.run(&yaml);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.lines().count() == 1,
        "{stderr}"
    );
    assert!(stderr.contains("swallow-router is missing: build it"), "{stderr}");
    symlink("/bin/false", &router).expect("the folder is ours");
    let output = stage.run(&yaml);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.lines().count() == 1,
        "{stderr}"
    );
    assert!(
        stderr.contains("swallow-router ended with exit code 1"),
        "{stderr}"
    );
    all_gone(&stage.events("one"));
}

/// The same model on GPUs.
fn on_gpus(yaml: &str) -> String {
    yaml.replace(
        "device: CPU}",
        "device: GPU}\n  engine: {kvCache: {bytes: 1Gi}}\n  parallelism: {tensor: 2}",
    )
}

#[test]
fn each_group_sees_gpus_of_its_own() {
    let stage = Stage::new();
    let yaml = on_gpus(&stage.model("one", "{}"));
    let mut command = stage.command(&yaml);
    command.env("CUDA_VISIBLE_DEVICES", "6,4,2,0");
    let mut local = stage.start_command(command);
    local.line(&["ready"]);
    let mut gpus: Vec<String> = stage
        .events("one")
        .iter()
        .filter(|event| event["what"] == "start")
        .map(|event| event["gpus"].as_str().expect("it is set").to_owned())
        .collect();
    gpus.sort();
    assert_eq!(gpus, ["2,0", "6,4"]);

    let mut command = stage.command(&yaml);
    command.env("CUDA_VISIBLE_DEVICES", "0,1,2");
    let output = command.output().expect("the operator starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(
        stderr.contains("4 GPUs are needed for one (2 x 2)")
            && stderr.contains("CUDA_VISIBLE_DEVICES names 3"),
        "{stderr}"
    );
}

#[test]
fn what_needs_a_cluster_is_refused() {
    let stage = Stage::new();
    let good = stage.model("one", "{}");
    for (from, to, words) in [
        (
            "replicas: 2",
            "replcas: 2",
            "spec.replcas: there is no such field; did you mean replicas?",
        ),
        (
            "type: HostPath, hostPath: {path: ",
            "type: HostPath, hostPath: {path: /nowhere",
            "/nowhere",
        ),
        (
            "type: HostPath, hostPath: {path: ",
            "type: PersistentVolumeClaim, persistentVolumeClaim: {claimName: models, path: x",
            "PersistentVolumeClaim needs a cluster",
        ),
    ] {
        let output = stage.run(&good.replace(from, to));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && stderr.lines().count() == 1,
            "{to}: {stderr}"
        );
        assert!(stderr.contains(words), "{to}: {stderr}");
        assert_eq!(stage.logs(), 0, "nothing was started");
    }
    let twice = format!(
        "{good}---\n{}",
        stage.yaml("two", "type: HostPath, hostPath: {path: /x}")
    )
    .replace("metadata: {name: two}", "metadata: {name: two}")
    .replace("path: /x", &format!("path: {}", stage.path("one").display()))
    .replace("spec:\n  model: {", "spec:\n  model: {servedNames: [same], ");
    let output = stage.run(&twice);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("two: spec.model.servedNames: 'same' is served by one too"),
        "{stderr}"
    );
}

const SECURED: &str = "  router: {apiKeysSecretRef: {name: keys}, tlsSecretName: front, mutualTls: {workerSecretName: \
                       workers, routerSecretName: routers}}\n";

fn secret(name: &str, entries: &[&str]) -> String {
    let data: String = entries
        .iter()
        .map(|entry| format!("  {entry}: {name} {entry}\n"))
        .collect();
    format!("---\napiVersion: v1\nkind: Secret\nmetadata: {{name: {name}}}\nstringData:\n{data}")
}

fn secrets() -> String {
    [
        secret("keys", &["keys.json"]),
        secret("front", &["tls.crt", "tls.key"]),
        secret("workers", &["tls.crt", "tls.key", "ca.crt"]),
        secret("routers", &["tls.crt", "tls.key", "ca.crt"]),
    ]
    .concat()
}

/// What a flag's file holds, which nobody else may read.
fn private(flags: &Value, flag: &str) -> String {
    let path = Path::new(
        flags[flag]
            .as_str()
            .unwrap_or_else(|| panic!("--{flag} in {flags}")),
    );
    let mode = |path: &Path| {
        let metadata = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        metadata.permissions().mode() & 0o777
    };
    let folder = path.parent().expect("a file is in a folder");
    assert_eq!((mode(path), mode(folder)), (0o600, 0o700), "{}", path.display());
    fs::read_to_string(path).expect("it is ours")
}

#[test]
fn secrets_of_the_file_are_files_for_as_long_as_it_runs() {
    let stage = Stage::new();
    let yaml = stage.model("one", "{}") + SECURED + &secrets();
    let mut local = stage.start(&yaml);
    let ready = local.line(&["ready", "models=one"]);
    assert!(ready.contains("http=https://127.0.0.1:"), "{ready}");
    let router = &stage.events("bin")[0]["flags"];
    for (flag, holds) in [
        ("api-keys", "keys keys.json"),
        ("tls-cert", "front tls.crt"),
        ("tls-key", "front tls.key"),
        ("worker-ca", "routers ca.crt"),
        ("worker-cert", "routers tls.crt"),
        ("worker-key", "routers tls.key"),
    ] {
        assert_eq!(private(router, flag), holds);
    }
    let worker = &stage.events("one")[0];
    for (flag, holds) in [
        ("tls-cert", "workers tls.crt"),
        ("tls-key", "workers tls.key"),
        ("tls-client-ca", "workers ca.crt"),
    ] {
        assert_eq!(private(worker, flag), holds);
    }
    local.signal(Signal::SIGTERM);
    assert!(local.wait().success(), "{}", stage.stderr());
    let left = fs::read_dir(stage.folder.path())
        .expect("the folder is ours")
        .flatten();
    let left: Vec<PathBuf> = left
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().contains("swallow-secrets-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn secrets_that_are_not_in_the_file_are_named() {
    let stage = Stage::new();
    let model = stage.model("one", "{}") + SECURED;
    let all = secrets();
    for (secrets, words) in [
        (
            all.replace("{name: front}", "{name: front, namespace: other}"),
            "one: spec.router.tlsSecretName: there is no Secret front of namespace default in the file: add it as a document \
             of its own",
        ),
        (
            all.replace("  keys.json: keys keys.json\n", "  tenants.json: x\n  more: y\n"),
            "one: spec.router.apiKeysSecretRef: Secret keys has no keys.json; it has more, tenants.json",
        ),
        (
            all.replace("  ca.crt: workers ca.crt\n", ""),
            "one: spec.router.mutualTls.workerSecretName: Secret workers has no ca.crt; it has tls.crt, tls.key",
        ),
    ] {
        let output = stage.run(&format!("{model}{secrets}"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{words}");
        assert_eq!(stderr.trim(), format!("swallow-operator: {words}"));
        assert_eq!(stage.logs(), 0, "nothing was started");
    }
    let token = stage.yaml(
        "two",
        &format!(
            "type: HuggingFace, huggingFace: {{repo: a/b, revision: \"{REVISION}\", tokenSecretRef: {{name: hub}}}}"
        ),
    );
    let output = stage.run(&token);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("tokenSecretRef: there is no Secret hub of namespace default in the file")
            && stderr.contains("or give --token-file"),
        "{stderr}"
    );
    let mut local = stage.start(&(token + &secret("hub", &["token"])));
    local.line(&["ready", "models=two"]);
    local.signal(Signal::SIGTERM);
    assert!(local.wait().success(), "{}", stage.stderr());
}
