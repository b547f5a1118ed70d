//! How the operator fares with 500 models of four groups each, before a real API server and no node at all: how long until
//! everything exists and each status says why it waits, and what a restart costs.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use swallow_tests::program;

use crate::harness::{Cluster, Model, RELEASE, SYSTEM, Use, now, operator_uses, until};

const MODELS: usize = 500;
const GROUPS: u32 = 4;
/// After a restart the operator may take this much.
const RESYNC_CPU_SECONDS: f64 = 10.0;
const RESYNC_RSS_BYTES: u64 = 200 << 20;
/// How long is watched for writes after the restart.
const RESYNC_WATCH: Duration = Duration::from_secs(60);

/// The operator as a process of this machine, with the rights of the chart's account and no other.
struct Operator(Child);

impl Operator {
    fn start(cluster: &Cluster, kubeconfig: &str) -> Self {
        let log = fs::File::create(cluster.folder("bench").join("operator.log")).expect("the folder is ours");
        let child = Command::new(program("swallow-operator"))
            .args(["run", "--lease-namespace", SYSTEM, "--lease-name", RELEASE])
            .args(["--router-role", "swallow-system-swallow-router"])
            .env("KUBECONFIG", kubeconfig)
            .env("RUST_LOG", "warn")
            .stdout(Stdio::from(log.try_clone().expect("a file can be shared")))
            .stderr(Stdio::from(log))
            .spawn()
            .expect("the operator was built");
        Self(child)
    }

    fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).expect("the operator runs");
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let ticks: f64 = fields[11..=12]
            .iter()
            .filter_map(|field| field.parse::<f64>().ok())
            .sum();
        // Linux shows user space hundredths of a second, whatever its own clock is.
        ticks / 100.0
    }

    fn peak_rss_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("the operator runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("Linux tells it");
        line.trim()
            .trim_end_matches(" kB")
            .parse::<u64>()
            .expect("a number")
            * 1024
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs it; prints what it measured.
///
/// # Panics
/// If a bound is broken.
pub fn run(cluster: &Cluster) {
    let kubeconfig = account(cluster);
    cluster
        .kubectl(&["create", "namespace", "bench"])
        .expect("it is new");
    let models: Vec<Value> = (0..MODELS)
        .map(|nth| Model::tiny(&format!("m{nth:03}"), GROUPS).0)
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": models});

    let operator = Operator::start(cluster, &kubeconfig);
    let start = Instant::now();
    let words = ["-n", "bench", "create", "-f", "-"];
    cluster
        .kubectl_with(&words, &list.to_string())
        .expect("the models are sound");
    println!("{:8.1} s  {MODELS} models made", start.elapsed().as_secs_f64());
    until(
        "every object exists and every status gives its reason",
        Duration::from_secs(900),
        || reconciled(cluster),
    );
    println!(
        "{:8.1} s  reconciled: every object exists, every status says why it waits",
        start.elapsed().as_secs_f64()
    );
    println!(
        "{:8.1} CPU-seconds of the operator, {} MiB at most",
        operator.cpu_seconds(),
        operator.peak_rss_bytes() >> 20
    );
    let (used, refused) = operator_uses(cluster, "");
    println!("{:8} requests of the operator", used.len());
    assert!(refused.is_empty(), "{refused:?}");

    drop(operator);
    let since = now();
    let operator = Operator::start(cluster, &kubeconfig);
    std::thread::sleep(RESYNC_WATCH); // The measurement itself.
    let (used, _) = operator_uses(cluster, &since);
    let is_write = |one: &&Use| one.is_write() && one.resource != "coordination.k8s.io/leases";
    let writes: Vec<&Use> = used.iter().filter(is_write).collect();
    let (cpu, rss) = (operator.cpu_seconds(), operator.peak_rss_bytes());
    println!(
        "restart: {} writes, {cpu:.1} CPU-seconds and {} MiB at most within {} s",
        writes.len(),
        rss >> 20,
        RESYNC_WATCH.as_secs()
    );
    assert!(
        used.iter().any(|one| one.resource.ends_with("/swallowmodels")),
        "it leads and has looked"
    );
    assert!(writes.is_empty(), "{writes:?}");
    assert!(cpu <= RESYNC_CPU_SECONDS && rss <= RESYNC_RSS_BYTES);
}

/// The chart's rights without its pod, and a kubeconfig of its account.
fn account(cluster: &Cluster) -> String {
    cluster
        .install(&["--set", "replicas=0"])
        .expect("the chart can be installed");
    let token = cluster
        .kubectl(&["-n", SYSTEM, "create", "token", RELEASE, "--duration=2h"])
        .expect("the account exists");
    let mut config: Value = cluster
        .json(&["config", "view", "--raw"])
        .expect("kubectl has a configuration");
    for user in config["users"].as_array_mut().into_iter().flatten() {
        user["user"] = json!({"token": token.trim()});
    }
    let file = cluster.folder("account").join("kubeconfig");
    fs::write(&file, config.to_string()).expect("the folder is ours");
    file.display().to_string()
}

fn reconciled(cluster: &Cluster) -> Result<(), String> {
    let count = |kind: &str| -> Result<usize, String> {
        let names = cluster.kubectl(&["-n", "bench", "get", kind, "-o", "name", "--chunk-size=0"])?;
        Ok(names.lines().count())
    };
    let groups = MODELS * GROUPS as usize;
    for (kind, wanted) in [
        ("pods", groups),
        ("services", 2 * MODELS),
        ("deployments", MODELS),
        ("poddisruptionbudgets", MODELS),
        ("rolebindings", MODELS),
        ("controllerrevisions", MODELS),
    ] {
        let found = count(kind)?;
        if found < wanted {
            return Err(format!("{found} of {wanted} {kind}"));
        }
    }
    let models = cluster.json(&["-n", "bench", "get", "swallowmodels", "--chunk-size=0"])?;
    let waits = |group: &Value| group["state"] == "Pending" && group["reason"] == "Unschedulable";
    let told = models["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|model| {
            let groups = model["status"]["groups"].as_array().cloned().unwrap_or_default();
            groups.len() == GROUPS as usize && groups.iter().all(waits)
        })
        .count();
    if told == MODELS {
        Ok(())
    } else {
        Err(format!("{told} of {MODELS} statuses"))
    }
}
