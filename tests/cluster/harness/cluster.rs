//! Two nodes with the operator installed, driven by the real kubectl and helm.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;
use swallow_tests::root;

use super::{Space, until};

/// The namespace of the operator.
pub const SYSTEM: &str = "swallow-system";
/// The Helm release.
pub const RELEASE: &str = "swallow";
/// The operator as the API server knows it.
pub const OPERATOR: &str = "system:serviceaccount:swallow-system:swallow";

/// What of a cluster is started.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Two nodes with the operator.
    Whole,
    /// The same, but a cluster that is up is taken.
    Reused,
    /// A control plane without nodes, and nothing installed.
    Control,
}

/// The cluster; ended when dropped, unless it is to be kept.
pub struct Cluster {
    bin: PathBuf,
    state: PathBuf,
    images: PathBuf,
    keep: bool,
    pub runtime: tokio::runtime::Runtime,
    /// There is one cluster on a machine, because nodes have fixed addresses.
    _lock: Flock<File>,
}

impl Cluster {
    /// Starts the cluster with the images of what was built beside this test.
    ///
    /// # Errors
    /// What is missing on this machine, or what a program said.
    pub fn start(form: Form, keep: bool) -> Result<Self, String> {
        let scripts = root().join("tests/cluster/nodes");
        let bin = PathBuf::from(output(&mut Command::new(scripts.join("build")))?.trim());
        let cache = bin.parent().ok_or("the programs are in a folder")?.to_owned();
        let lock =
            File::create(cache.join("lock")).map_err(|error| format!("{}: {error}", cache.display()))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|_| "another cluster test runs on this machine".to_owned())?;
        let images = cache.join("images");
        let programs = swallow_tests::program("swallow-operator");
        let programs = programs.parent().ok_or("programs are in a folder")?;
        let mut build = Command::new(root().join("deploy/images/build"));
        print!("{}", output(build.arg(&images).arg("--bin-dir").arg(programs))?);
        let archives =
            ["operator", "router", "worker"].map(|name| images.join(format!("swallow-{name}.tar")));
        let state = cache.join("state");
        let cluster = Self {
            runtime: tokio::runtime::Runtime::new().map_err(|error| error.to_string())?,
            bin,
            state,
            images,
            keep,
            _lock: lock,
        };
        if form == Form::Control {
            output(&mut Command::new(scripts.join("control")))?;
            return Ok(cluster);
        }
        if form == Form::Reused && cluster.kubectl(&["get", "nodes", "--request-timeout=2s"]).is_ok() {
            for node in ["n1", "n2"] {
                output(Command::new(scripts.join("images")).arg(node).args(&archives))?;
            }
        } else {
            output(Command::new(scripts.join("up")).args(&archives))?;
        }
        Ok(cluster)
    }

    /// Installs the operator of these images, and waits until it is ready.
    pub fn install_operator(&self) -> Result<(), String> {
        self.install(&[])?;
        // In a cluster that was taken, the same tag held another program before.
        self.kubectl(&["-n", SYSTEM, "rollout", "restart", "deployment/swallow"])?;
        self.kubectl(&[
            "-n",
            SYSTEM,
            "rollout",
            "status",
            "deployment/swallow",
            "--timeout=60s",
        ])?;
        Ok(())
    }

    /// Installs the chart, or upgrades it, with further arguments.
    pub fn install(&self, more: &[&str]) -> Result<String, String> {
        let chart = root().join("charts/swallow").display().to_string();
        let mut words = vec![
            "upgrade",
            "--install",
            RELEASE,
            &chart,
            "-n",
            SYSTEM,
            "--create-namespace",
        ];
        // A cluster that was taken may have the resource already, from somebody's kubectl.
        words.extend(["--take-ownership", "--wait", "--timeout", "60s"]);
        words.extend(more);
        self.helm(&words)
    }

    /// Runs kubectl.
    pub fn kubectl(&self, words: &[&str]) -> Result<String, String> {
        output(self.program("kubectl").args(words))
    }

    /// Runs helm.
    pub fn helm(&self, words: &[&str]) -> Result<String, String> {
        output(self.program("helm").args(words))
    }

    /// Runs kubectl with an object on its standard input.
    pub fn kubectl_with(&self, words: &[&str], input: &str) -> Result<String, String> {
        let mut child = self
            .program("kubectl")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let mut stdin = child.stdin.take().ok_or("it is piped")?;
        stdin
            .write_all(input.as_bytes())
            .map_err(|error| error.to_string())?;
        drop(stdin);
        let done = child.wait_with_output().map_err(|error| error.to_string())?;
        judged(words.join(" "), &done)
    }

    /// What kubectl gives as JSON.
    pub fn json(&self, words: &[&str]) -> Result<Value, String> {
        let mut all = words.to_vec();
        all.extend(["-o", "json"]);
        let text = self.kubectl(&all)?;
        serde_json::from_str(&text).map_err(|error| format!("{error} in {text}"))
    }

    /// `start` or `kill` of a node.
    pub fn node(&self, action: &str, node: &str, index: u32) {
        let script = root().join("tests/cluster/nodes/node");
        output(Command::new(script).args([action, node, &index.to_string()])).expect("nodes start and end");
        if action == "start" {
            let scripts = root().join("tests/cluster/nodes");
            let system = ["pause", "coredns", "metrics-server"]
                .map(|name| self.bin.join(format!("images/{name}.tar")));
            let ours =
                ["operator", "router", "worker"].map(|name| self.images.join(format!("swallow-{name}.tar")));
            output(
                Command::new(scripts.join("images"))
                    .arg(node)
                    .args(system)
                    .args(ours),
            )
            .expect("images are imported");
            self.kubectl(&["wait", "--for=condition=Ready", "node", node, "--timeout=60s"])
                .expect("a started node becomes ready");
        }
    }

    /// Builds an operator as another version would be, which renders otherwise, and loads its image; gives its tag.
    ///
    /// # Errors
    /// What a program said.
    pub fn load_another_operator(&self) -> Result<&'static str, String> {
        let tag = "of-another-version";
        let (programs, images) = (self.folder("another/bin"), self.folder("another/images"));
        output(Command::new(root().join("tests/cluster/another_operator")).arg(&programs))?;
        let mut build = Command::new(root().join("deploy/images/build"));
        build
            .arg(&images)
            .arg("--bin-dir")
            .arg(&programs)
            .args(["--tag", tag]);
        output(&mut build)?;
        for node in ["n1", "n2"] {
            let load = root().join("tests/cluster/nodes/images");
            output(
                Command::new(load)
                    .arg(node)
                    .arg(images.join("swallow-operator.tar")),
            )?;
        }
        Ok(tag)
    }

    /// Where the API server writes who asked for what.
    pub fn audit_log(&self) -> PathBuf {
        self.state.join("n1/log/audit.log")
    }

    /// The layers of the images.
    pub fn layers(&self) -> PathBuf {
        self.images.join("layers")
    }

    /// A folder on both nodes that a test may fill.
    pub fn folder(&self, name: &str) -> PathBuf {
        let folder = self.state.join("folders").join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("the state folder is ours");
        folder
    }

    /// The pid, on this machine, of the process with this command in a pod.
    pub fn pid(&self, pod_uid: &str, command: &str) -> i32 {
        until("the process of a pod", Duration::from_secs(20), || {
            fs::read_dir("/proc")
                .expect("/proc is mounted")
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
                .find(|pid| {
                    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                    let line = String::from_utf8_lossy(&read("cmdline")).into_owned();
                    let cgroup = String::from_utf8_lossy(&read("cgroup")).into_owned();
                    line.starts_with(command) && cgroup.contains(pod_uid)
                })
                .ok_or_else(|| format!("no {command} in pod {pod_uid}"))
        })
    }

    /// Saves what tells why a scenario failed.
    pub fn artefacts(&self, scenario: &str) -> PathBuf {
        let folder = self.bin.with_file_name("artefacts").join(scenario);
        let _ = fs::remove_dir_all(&folder);
        let _ = fs::create_dir_all(&folder);
        let space = Space::name_of(scenario);
        let views: [(&str, &[&str]); 7] = [
            ("pods.txt", &["get", "pods", "-A", "-o", "wide"]),
            ("nodes.txt", &["describe", "nodes"]),
            ("models.yaml", &["get", "swallowmodels", "-A", "-o", "yaml"]),
            ("models.txt", &["-n", &space, "describe", "swallowmodels"]),
            ("events.txt", &["get", "events", "-A", "--sort-by=.lastTimestamp"]),
            (
                "objects.yaml",
                &[
                    "-n",
                    &space,
                    "get",
                    "all,endpointslices,rolebindings,pdb,controllerrevisions",
                    "-o",
                    "yaml",
                ],
            ),
            (
                "operator.log",
                &[
                    "-n",
                    SYSTEM,
                    "logs",
                    "-l",
                    "app.kubernetes.io/name=swallow-operator",
                    "--tail=-1",
                ],
            ),
        ];
        for (file, words) in views {
            let text = self.kubectl(words).unwrap_or_else(|error| error);
            let _ = fs::write(folder.join(file), text);
        }
        let names = self
            .kubectl(&["-n", &space, "get", "pods", "-o", "name"])
            .unwrap_or_default();
        for pod in names.lines() {
            let logs = self.kubectl(&["-n", &space, "logs", pod, "--all-containers", "--tail=2000"]);
            let file = format!("{}.log", pod.replace('/', "-"));
            let _ = fs::write(folder.join(file), logs.unwrap_or_else(|error| error));
        }
        for node in ["n1", "n2"] {
            let _ = output(
                Command::new("cp")
                    .arg("-r")
                    .arg(self.state.join(node).join("log"))
                    .arg(folder.join(node)),
            );
        }
        folder
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.bin.join(name));
        command.env("KUBECONFIG", self.state.join("n1/pki/admin.conf"));
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.keep {
            println!("KUBECONFIG={}", self.state.join("n1/pki/admin.conf").display());
        } else if let Err(error) = output(&mut Command::new(root().join("tests/cluster/nodes/down"))) {
            eprintln!("{error}");
        }
    }
}

fn output(command: &mut Command) -> Result<String, String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    judged(format!("{command:?}"), &done)
}

fn judged(what: String, done: &std::process::Output) -> Result<String, String> {
    let stdout = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() {
        return Ok(stdout);
    }
    Err(format!(
        "{what}: {}\n{}{stdout}",
        done.status,
        String::from_utf8_lossy(&done.stderr)
    ))
}
