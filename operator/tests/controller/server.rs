//! An API server for one test binary, a namespace for each test, and operators as processes.

use std::{
    env, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::LazyLock,
    time::{Duration, Instant},
};

use k8s_openapi::{
    NamespaceResourceScope, api::core::v1::Namespace,
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, Resource,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use swallow_plan::model::{SwallowModel, crd};
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(40);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Runs both programs until its standard input ends, which it does with the tests, however these end.
const UNTIL_EOF: &str = r#"
cd "$1"
openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out sa.key && openssl pkey -in sa.key -pubout -out sa.pub
"$2/etcd" --data-dir etcd --unsafe-no-fsync --listen-client-urls "http://127.0.0.1:$3" --advertise-client-urls "http://127.0.0.1:$3" \
  --listen-peer-urls "http://127.0.0.1:$4" --initial-advertise-peer-urls "http://127.0.0.1:$4" --initial-cluster "default=http://127.0.0.1:$4" >etcd.log 2>&1 &
etcd=$!
"$2/kube-apiserver" --etcd-servers "http://127.0.0.1:$3" --bind-address 127.0.0.1 --secure-port "$5" --cert-dir certs --service-cluster-ip-range 10.97.0.0/16 \
  --token-auth-file tokens --authorization-mode RBAC --service-account-issuer https://tests --service-account-key-file sa.pub \
  --service-account-signing-key-file sa.key --disable-admission-plugins ServiceAccount >apiserver.log 2>&1 &
api=$!
cat >/dev/null
kill -9 $api $etcd
"#;

static SERVER: LazyLock<Server> = LazyLock::new(Server::start);

struct Server {
    folder: TempDir,
    /// Its standard input keeps the server alive.
    _shell: Child,
}

impl Server {
    fn start() -> Self {
        let bin = binaries();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let ports: Vec<TcpListener> = (0..3)
            .map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"))
            .collect();
        let ports: Vec<String> = ports
            .iter()
            .map(|port| port.local_addr().expect("it is bound").port().to_string())
            .collect();
        fs::write(folder.path().join("tokens"), "t,admin,admin,system:masters\n")
            .expect("the folder is ours");
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": {
                "server": format!("https://127.0.0.1:{}", ports[2]), "insecure-skip-tls-verify": true } }],
            "users": [{ "name": "u", "user": { "token": "t" } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        });
        fs::write(folder.path().join("kubeconfig"), kubeconfig.to_string()).expect("the folder is ours");
        let shell = Command::new("sh")
            .args(["-c", UNTIL_EOF, "sh"])
            .arg(folder.path())
            .arg(bin)
            .args(&ports)
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell starts");
        Self {
            folder,
            _shell: shell,
        }
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }
}

/// Where etcd and kube-apiserver are.
fn binaries() -> PathBuf {
    let given = env::var_os("SWALLOW_CLUSTER_BIN").map(PathBuf::from);
    let cache = env::var_os("SWALLOW_CLUSTER_CACHE").map_or_else(
        || Path::new(&env::var_os("HOME").unwrap_or_default()).join(".cache/swallow/cluster"),
        PathBuf::from,
    );
    let built = || {
        let folders = fs::read_dir(&cache).ok()?;
        folders
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.join("complete").exists())
            .max()
    };
    let bin = given.or_else(built).unwrap_or_else(|| cache.join("bin"));
    for name in ["etcd", "kube-apiserver"] {
        assert!(
            bin.join(name).exists(),
            "{name} is not in {}: run tests/cluster/nodes/build, or set SWALLOW_CLUSTER_BIN",
            bin.display()
        );
    }
    bin
}

/// A namespace of its own.
pub struct Space {
    /// Its name.
    pub name: String,
    client: Client,
}

impl Space {
    /// Makes the namespace, when the API server answers and knows SwallowModels.
    pub async fn new(name: &str) -> Self {
        let config = Kubeconfig::read_from(SERVER.kubeconfig()).expect("it was written");
        let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default())
            .await
            .expect("it is sound");
        let client = Client::try_from(config).expect("it is sound");
        let space = Self {
            name: name.to_owned(),
            client,
        };
        let namespaces: Api<Namespace> = Api::all(space.client.clone());
        let namespace = serde_json::from_value(json!({ "metadata": { "name": name } })).expect("it is one");
        space
            .until("the API server", async || {
                namespaces.create(&PostParams::default(), &namespace).await.ok()
            })
            .await;
        let definitions: Api<CustomResourceDefinition> = Api::all(space.client.clone());
        let definition = crd();
        let known = definition.metadata.name.clone().expect("it has a name");
        let params = PatchParams::apply("test").force();
        definitions
            .patch(&known, &params, &Patch::Apply(&definition))
            .await
            .expect("the definition is taken");
        space
            .until("SwallowModels", async || {
                space.models().list(&Default::default()).await.ok()
            })
            .await;
        space
    }

    /// The objects of a kind.
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.name)
    }

    /// Its models.
    pub fn models(&self) -> Api<SwallowModel> {
        self.api()
    }

    /// Pods must keep to the restricted standard from now on.
    pub async fn enforce_restricted(&self) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let labels = json!({ "pod-security.kubernetes.io/enforce": "restricted" });
        let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
        namespaces
            .patch(&self.name, &PatchParams::default(), &patch)
            .await
            .expect("the label is taken");
    }

    /// Waits for something.
    pub async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = look().await {
                return found;
            }
            if begun.elapsed() > PATIENCE {
                let logs = SERVER.folder.path();
                let tail = fs::read_to_string(logs.join(format!("{}.log", self.name))).unwrap_or_default();
                panic!("{}: waited in vain for {what}\n{tail}", self.name);
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// An operator for one namespace; it is killed when it is dropped.
pub struct Operator {
    child: Child,
    port: u16,
}

impl Operator {
    /// Starts one.
    pub fn start(space: &Space, args: &[&str]) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("it is bound").port();
        drop(free);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(SERVER.folder.path().join(format!("{}.log", space.name)))
            .expect("the folder is ours");
        let child = Command::new(env!("CARGO_BIN_EXE_swallow-operator"))
            .args(["run", "--log-format=text"])
            .arg(format!("--namespace={}", space.name))
            .arg(format!("--http-listen=127.0.0.1:{port}"))
            .args(args)
            .env("KUBECONFIG", SERVER.kubeconfig())
            .stderr(log)
            .spawn()
            .expect("the operator starts");
        Self { child, port }
    }

    /// The sum of the metrics whose names begin so; `None` when there is none.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let port = self.port;
        let text = tokio::task::spawn_blocking(move || {
            let mut response = ureq::get(format!("http://127.0.0.1:{port}/metrics"))
                .call()
                .ok()?;
            response.body_mut().read_to_string().ok()
        })
        .await
        .expect("it does not panic")?;
        let begin = format!("swallow_operator_{name}");
        let values: Vec<f64> = text
            .lines()
            .filter(|line| line.starts_with(&begin))
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// Whether nothing is due, and nothing was looked at for half a second.
    pub async fn idle(&self) -> bool {
        let before = self.metric("reconciles_total").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        self.metric("queue_length").await == Some(0.0) && self.metric("reconciles_total").await == before
    }

    /// Stops it as a kubelet would, and waits for its end.
    pub fn stop(mut self, within: Duration) {
        let pid = i32::try_from(self.child.id()).expect("pids are small");
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is ours");
        let begun = Instant::now();
        while begun.elapsed() < within {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                assert!(status.success(), "{status}");
                return;
            }
            std::thread::sleep(LOOK);
        }
        panic!("it did not stop within {within:?}");
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
