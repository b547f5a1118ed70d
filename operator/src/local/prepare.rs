//! Everything that can go wrong before the first process starts, found and said in one line each.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process,
};

use swallow_plan::{
    Images, Valid,
    launch::{self, ModelSource, RouterLaunch},
    model::{Device, Placement, Source, SwallowModel},
    topology::Shape,
    validate,
};

use super::{
    LocalArgs,
    gpus::{self, Demand, Pool},
    ports::{self, Chooser, Held},
    process::find,
    secrets::{GroupSecrets, Mounted},
};
use crate::{
    file::{self, Contents, Errors, model_name, shape},
    render,
};

/// All that is needed to start processes.
#[derive(Debug)]
pub struct Prepared {
    /// In the order of the file.
    pub models: Vec<PreparedModel>,
    /// What the shared router is started with, apart from addresses.
    pub router: RouterLaunch,
    /// Where the router listens for gRPC clients.
    pub grpc: Held,
    /// Where the router listens for OpenAI clients.
    pub http: Held,
    /// Where the router is asked how it is, by this process, without TLS or a key.
    pub probes: Held,
    /// The worker's program.
    pub worker_program: PathBuf,
    /// The router's program.
    pub router_program: PathBuf,
    /// Where fetched models are kept.
    pub cache_dir: PathBuf,
    /// The files of Secrets.
    pub secrets: Mounted,
    /// Where logs go.
    pub logs: Logs,
    /// What has no meaning here, said once.
    pub notes: Vec<String>,
}

/// One model and the places of its groups.
#[derive(Debug)]
pub struct PreparedModel {
    /// As read.
    pub model: SwallowModel,
    /// Its names, its own first.
    pub served_names: Vec<String>,
    /// Its size, if its config.json is here.
    pub shape: Option<Shape>,
    /// Ports and GPUs for each group.
    pub slots: Vec<Slot>,
    /// What its groups read of Secrets.
    pub secrets: GroupSecrets,
}

/// Where a group listens and computes. It keeps its ports through restarts, so that the router's list stays right, and
/// its GPUs, so that no other group is on them.
#[derive(Debug)]
pub struct Slot {
    /// For the router.
    pub grpc: Held,
    /// For probes, metrics and state.
    pub http: Held,
    /// The GPUs that it sees; `None` on the CPU.
    pub gpus: Option<String>,
}

/// The folder of logs.
#[derive(Debug)]
pub struct Logs {
    path: PathBuf,
    temporary: bool,
}

impl Logs {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes a folder that nobody asked to keep.
    pub fn discard(&self) {
        if self.temporary {
            // What is left in a temporary folder harms nobody.
            let _ = fs::remove_dir_all(&self.path);
        }
    }

    fn new(asked: Option<PathBuf>) -> Result<Self, Errors> {
        let temporary = asked.is_none();
        let path = asked.unwrap_or_else(|| env::temp_dir().join(format!("swallow-local-{}", process::id())));
        fs::create_dir_all(&path)
            .map_err(|error| vec![format!("{}: {error}; choose --log-dir", path.display())])?;
        Ok(Self { path, temporary })
    }
}

impl Prepared {
    /// Reads, checks and reserves.
    ///
    /// # Errors
    /// A line for each thing that is wrong.
    pub fn new(args: LocalArgs) -> Result<Self, Errors> {
        let Contents { models, secrets } = file::read(&args.file)?;
        let mut errors = Vec::new();
        let mut checked = Vec::new();
        for model in models {
            match check(&model) {
                Ok((valid, shape)) => checked.push((model, valid, shape)),
                Err(lines) => errors.extend(lines),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let valids: Vec<&Valid> = checked.iter().map(|(_, valid, _)| valid).collect();
        check_names(&valids)?;
        let token_file = args.token_file.as_deref();
        let secrets = Mounted::new(&valids, &secrets, token_file.is_some())?;
        let router = shared_router(&valids, &secrets)?;
        let of_groups: Vec<GroupSecrets> = valids
            .iter()
            .map(|valid| secrets.of_groups(valid, token_file))
            .collect();
        let notes = valids.iter().flat_map(|valid| without_meaning(valid)).collect();
        let demands: Vec<Demand<'_>> = valids.iter().map(|valid| demand(valid)).collect();
        let gpus = gpus::assign(&Pool::of_this_machine(), &demands).map_err(|line| vec![line])?;
        let bin_dir = bin_dir(args.bin_dir)?;
        let worker_program = find(&bin_dir, "swallow-worker").map_err(|error| vec![error])?;
        let router_program = find(&bin_dir, "swallow-router").map_err(|error| vec![error])?;
        let cache_dir = cache_dir(args.cache_dir)?;
        let mut chooser = Chooser::new(process::id());
        let grpc = ports::hold("grpc-port", args.grpc_port, &mut chooser).map_err(|error| vec![error])?;
        let http = ports::hold("http-port", args.http_port, &mut chooser).map_err(|error| vec![error])?;
        let probes = chooser
            .next()
            .map_err(|error| vec![format!("no free port for the router's probes: {error}")])?;
        let models = checked
            .into_iter()
            .zip(gpus)
            .zip(of_groups)
            .map(|(((model, valid, shape), gpus), secrets)| {
                let slots = slots(&model, gpus, &mut chooser)?;
                Ok(PreparedModel {
                    model,
                    served_names: valid.served_names,
                    shape,
                    slots,
                    secrets,
                })
            })
            .collect::<Result<_, Errors>>()?;
        let logs = Logs::new(args.log_dir)?;
        Ok(Self {
            models,
            router,
            grpc,
            http,
            probes,
            worker_program,
            router_program,
            cache_dir,
            secrets,
            logs,
            notes,
        })
    }
}

/// Checks one model: what this machine cannot do, then what no machine could.
fn check(model: &SwallowModel) -> Result<(Valid, Option<Shape>), Errors> {
    let name = model_name(model);
    let refuse = |line: String| Err(vec![format!("{name}: {line}")]);
    let source = model.spec.model.source.as_ref();
    if let Some(line) = source.and_then(needs_cluster) {
        return refuse(line);
    }
    let shape = source
        .and_then(|source| source.host_path.as_ref())
        .and_then(|host| shape(Path::new(&host.path)));
    match validate(model, shape.as_ref()) {
        Ok(valid) => Ok((valid, shape)),
        Err(refused) => Err(render::lines(name, &refused)),
    }
}

/// What this machine lacks for a source.
fn needs_cluster(source: &Source) -> Option<String> {
    if source.persistent_volume_claim.is_some() {
        return Some(
            "spec.model.source.type: PersistentVolumeClaim needs a cluster: use HostPath or HuggingFace here"
                .into(),
        );
    }
    if let Some(host) = &source.host_path {
        let config = Path::new(&host.path).join("config.json");
        if let Err(error) = fs::metadata(&config) {
            return Some(format!(
                "spec.model.source.hostPath.path: {}: {error}",
                config.display()
            ));
        }
    }
    let fetched = source.hugging_face.as_ref()?;
    fetched.ca_config_map_ref.is_some().then(|| {
        "spec.model.source.huggingFace.caConfigMapRef: ConfigMaps need a cluster: leave it out, and fetch the files \
         with `swallow-worker fetch --ca-file` into a folder for a HostPath source"
            .into()
    })
}

/// One router serves all models, so no two may have a name in common.
fn check_names(valids: &[&Valid]) -> Result<(), Errors> {
    let mut owners: BTreeMap<&str, &str> = BTreeMap::new();
    let mut groups = BTreeSet::new();
    for valid in valids {
        for served in &valid.served_names {
            if let Some(other) = owners.insert(served, &valid.name) {
                let line = format!(
                    "{}: spec.model.servedNames: '{served}' is served by {other} too",
                    valid.name
                );
                return Err(vec![line]);
            }
        }
        if !groups.insert(&valid.name) {
            return Err(vec![format!(
                "{}: metadata.name: is there in two namespaces; here they are one",
                valid.name
            )]);
        }
    }
    Ok(())
}

/// The one router of all models; its settings must be agreed on, its patience is that of the most patient.
fn shared_router(valids: &[&Valid], secrets: &Mounted) -> Result<RouterLaunch, Errors> {
    let images = Images::default();
    let wanted = |valid: &Valid| {
        let mut router = launch::router(valid, &images);
        secrets.of_router(valid, &mut router);
        router
    };
    let (first, others) = valids.split_first().expect("a file with models holds one");
    let mut shared = wanted(first);
    for valid in others {
        let mut other = wanted(valid).args;
        let patience = other.drain_timeout_seconds;
        other.drain_timeout_seconds = shared.args.drain_timeout_seconds;
        if other != shared.args {
            let line = format!(
                "{}: spec.router: limits, connection times or Secrets do not agree with those of {}: one router stands before \
                 both, write the same",
                valid.name, first.name
            );
            return Err(vec![line]);
        }
        shared.args.drain_timeout_seconds = shared.args.drain_timeout_seconds.max(patience);
    }
    Ok(shared)
}

/// Fields that only a cluster can honour.
fn without_meaning(valid: &Valid) -> Option<String> {
    let spec = &valid.spec;
    let fields = [
        ("placement", spec.placement != Placement::default()),
        ("imagePullSecrets", !spec.image_pull_secrets.is_empty()),
        ("engine.image", spec.engine.image.is_some()),
        ("router.replicas", spec.router.replicas != 1),
        ("router.image", spec.router.image.is_some()),
        (
            "model.cache",
            matches!(&valid.source, ModelSource::Fetch { .. }) && spec.model.cache.is_some(),
        ),
    ];
    let named: Vec<&str> = fields
        .iter()
        .filter(|(_, set)| *set)
        .map(|(name, _)| *name)
        .collect();
    (!named.is_empty()).then(|| format!("{}: note: only a cluster reads {}", valid.name, named.join(", ")))
}

/// The GPUs of a model's groups.
fn demand(valid: &Valid) -> Demand<'_> {
    let spec = &valid.spec;
    let groups = if spec.suspend { 0 } else { spec.replicas };
    Demand {
        model: &valid.name,
        groups: usize::try_from(groups).unwrap_or_default(),
        ranks: match spec.accelerator.device {
            Device::GPU => usize::try_from(spec.parallelism.tensor).unwrap_or(usize::MAX),
            Device::CPU => 0,
        },
    }
}

/// A slot for each group that is wanted.
fn slots(
    model: &SwallowModel,
    gpus: Vec<Option<String>>,
    chooser: &mut Chooser,
) -> Result<Vec<Slot>, Errors> {
    gpus.into_iter()
        .map(|gpus| {
            Ok(Slot {
                grpc: chooser.next()?,
                http: chooser.next()?,
                gpus,
            })
        })
        .collect::<std::io::Result<_>>()
        .map_err(|error| {
            vec![format!(
                "{}: no free ports for its groups: {error}",
                model_name(model)
            )]
        })
}

fn bin_dir(asked: Option<PathBuf>) -> Result<PathBuf, Errors> {
    if let Some(folder) = asked {
        return Ok(folder);
    }
    let own =
        env::current_exe().map_err(|error| vec![format!("where this program is, is unknown: {error}")])?;
    Ok(own.parent().map(Path::to_owned).unwrap_or_default())
}

fn cache_dir(asked: Option<PathBuf>) -> Result<PathBuf, Errors> {
    if let Some(folder) = asked {
        return Ok(folder);
    }
    let base = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| env::home_dir().map(|home| home.join(".cache")))
        .ok_or_else(|| vec!["there is no home folder to keep models in: give --cache-dir".to_owned()])?;
    Ok(base.join("swallow/models"))
}
