//! From a spec as written to a `Valid` one: nothing unresolved is left, and building objects from it cannot fail.
//!
//! Every problem names its field and what to write. The schema and the CEL rules refuse most of these before they get
//! here; files and what needs the model's shape do not pass through them.

mod size;
mod source;

use crate::{
    RETRY_ANNOTATION,
    launch::ModelSource,
    memory::{KvSizing, MemoryPlan, Misfit},
    model::{
        Device, EngineDtype, EngineKernels, Model, NAME_MAX, Problem, Quantity, Resources, SwallowModel,
        SwallowModelSpec, TolerationOperator, check_schema,
    },
    topology::Shape,
};
use size::{check_shape, kv_sizing, memory, shape, threads};
use source::source;

/// A spec in which nothing is left to check.
#[derive(Clone, Debug, PartialEq)]
pub struct Valid {
    /// The model's name.
    pub name: String,
    /// Its namespace; `default` where none is written.
    pub namespace: String,
    /// Its uid, once it is stored in a cluster.
    pub uid: Option<String>,
    /// Names that clients ask for, its own first.
    pub served_names: Vec<String>,
    /// Where its files come from.
    pub source: ModelSource,
    /// Its size, if known.
    pub shape: Option<Shape>,
    /// How memory is divided, if the size is known.
    pub memory: Option<MemoryPlan>,
    /// KV cache of a group, in bytes.
    pub kv_bytes: u64,
    /// Compute threads of a group on CPU.
    pub threads: Option<u32>,
    /// Memory of waiting requests in a router, in bytes.
    pub max_queued_bytes: u64,
    /// The revision of its groups.
    pub revision: String,
    /// Value of the annotation that lifts quarantines.
    pub retry: Option<String>,
    /// The rest, as written.
    pub spec: SwallowModelSpec,
}

/// Why a spec cannot be carried out.
#[derive(Clone, Debug, PartialEq)]
pub enum Refused {
    /// Fields are wrong.
    Invalid(Vec<Problem>),
    /// Fields are right, and the devices are too small.
    DoesNotFit {
        /// What is too small.
        misfit: Misfit,
        /// The model's size.
        shape: Shape,
    },
}

impl Refused {
    /// One line for each problem.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Refused::Invalid(problems) => problems.iter().map(Problem::to_string).collect(),
            Refused::DoesNotFit { misfit, .. } => vec![format!("spec: not enough memory: {misfit}")],
        }
    }
}

/// Checks a model; `read_shape` is its size as its config.json gives it, where that could be read.
///
/// # Errors
/// Every problem that was found, each with what to write.
pub fn validate(model: &SwallowModel, read_shape: Option<&Shape>) -> Result<Valid, Refused> {
    let spec = &model.spec;
    let mut problems = Problems(check_schema(spec));
    let name = model.metadata.name.clone().unwrap_or_default();
    check_name(&name, &mut problems);
    let served_names = served_names(&spec.model, &name, &mut problems);
    let shape = shape(spec.model.shape.as_ref(), read_shape, &mut problems);
    let source = source(spec, shape.as_ref(), &mut problems);
    check_numbers(spec, &mut problems);
    check_placement(spec, &mut problems);
    check_mutual_tls(spec, &mut problems);
    if let Some(shape) = &shape {
        check_shape(shape, spec, &mut problems);
    }
    let threads = threads(spec, &mut problems);
    let max_queued_bytes = problems
        .whole(
            "spec.router.limits.maxQueuedSize",
            Some(&spec.router.limits.max_queued_size),
        )
        .unwrap_or(1);
    if max_queued_bytes == 0 {
        problems.add(
            "spec.router.limits.maxQueuedSize",
            "is 0: write how much memory waiting requests may take",
        );
    }
    for (path, resources) in [
        ("spec.resources", &spec.resources),
        ("spec.router.resources", &spec.router.resources),
    ] {
        check_resources(path, resources, &mut problems);
    }
    let (kv, budget) = kv_sizing(spec, shape.is_some(), &mut problems);
    let (Some(source), true) = (source, problems.0.is_empty()) else {
        return Err(Refused::Invalid(problems.0));
    };
    let memory = match shape {
        None => None,
        Some(shape) => Some(memory(spec, shape, kv, budget)?),
    };
    let kv_bytes = match (kv, &memory) {
        (KvSizing::Bytes(bytes), _) => bytes,
        (KvSizing::Rest, memory) => memory.as_ref().map_or(0, MemoryPlan::group_kv_bytes),
    };
    Ok(Valid {
        namespace: model
            .metadata
            .namespace
            .clone()
            .unwrap_or_else(|| "default".into()),
        uid: model.metadata.uid.clone(),
        name,
        served_names,
        source,
        shape,
        memory,
        kv_bytes,
        threads,
        max_queued_bytes,
        revision: crate::launch::revision(spec, kv == KvSizing::Rest),
        retry: model
            .metadata
            .annotations
            .as_ref()
            .and_then(|all| all.get(RETRY_ANNOTATION))
            .cloned(),
        spec: spec.clone(),
    })
}

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem::new(field, message));
    }

    fn check(&mut self, good: bool, field: &str, message: &str) {
        if !good {
            self.add(field, message);
        }
    }

    /// The bytes of a quantity; `None` when there is none or it is wrong.
    fn whole(&mut self, field: &str, quantity: Option<&Quantity>) -> Option<u64> {
        let quantity = quantity?;
        quantity
            .whole()
            .map_err(|error| self.add(field, format!("'{quantity}' {error}")))
            .ok()
    }
}

fn check_name(name: &str, problems: &mut Problems) {
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let good = name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.chars().all(letters)
        && name.len() <= NAME_MAX;
    problems.check(
        good,
        "metadata.name",
        "write 1 to 40 lower-case letters, digits and -, beginning with a letter and not ending with -",
    );
}

fn served_names(model: &Model, name: &str, problems: &mut Problems) -> Vec<String> {
    if model.served_names.is_empty() {
        return vec![name.to_owned()];
    }
    for (i, served) in model.served_names.iter().enumerate() {
        let field = format!("spec.model.servedNames[{i}]");
        let first = served.starts_with(|c: char| c.is_ascii_alphanumeric());
        let all = served
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-/:@".contains(c));
        if !first || !all || served.len() > 200 {
            problems.add(
                &field,
                "write 1 to 200 letters, digits and ._-/:@, beginning with a letter or digit",
            );
        }
        if model.served_names[..i].contains(served) {
            problems.add(field, format!("'{served}' is there twice: write each name once"));
        }
    }
    model.served_names.clone()
}

/// What no schema can say: numbers that depend on one another.
fn check_numbers(spec: &SwallowModelSpec, problems: &mut Problems) {
    let engine = &spec.engine;
    problems.check(
        engine.max_step_tokens >= engine.max_concurrent_sequences,
        "spec.engine.maxStepTokens",
        &format!(
            "is {}: write at least maxConcurrentSequences ({}), because each running sequence takes one",
            engine.max_step_tokens, engine.max_concurrent_sequences
        ),
    );
    problems.check(
        spec.rollout.max_surge > 0 || spec.rollout.max_unavailable > 0,
        "spec.rollout",
        "maxSurge and maxUnavailable are both 0: write 1 for one of them, or no group could ever be replaced",
    );
    problems.check(
        spec.recovery.backoff.max_seconds >= spec.recovery.backoff.initial_seconds,
        "spec.recovery.backoff.maxSeconds",
        "is less than initialSeconds: write at least that",
    );
    problems.check(
        spec.accelerator.device != Device::CPU || engine.dtype != EngineDtype::BF16,
        "spec.engine.dtype",
        "is BF16, and the CPU computes FP32: write Auto or FP32",
    );
    problems.check(
        spec.accelerator.device != Device::CPU || engine.kernels != EngineKernels::Portable,
        "spec.engine.kernels",
        "is Portable, which is for GPU: leave it out on CPU",
    );
}

/// TLS between routers and workers.
fn check_mutual_tls(spec: &SwallowModelSpec, problems: &mut Problems) {
    let Some(tls) = &spec.router.mutual_tls else {
        return;
    };
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = tls.server_name.as_ref().is_none_or(|name| {
        name.starts_with(edge) && name.ends_with(edge) && name.chars().all(|c| edge(c) || ".-".contains(c))
    });
    problems.check(
        good,
        "spec.router.mutualTls.serverName",
        "write a DNS name in lower case, such as swallow-worker",
    );
    problems.check(
        tls.worker_secret_name != tls.router_secret_name,
        "spec.router.mutualTls.routerSecretName",
        "is the workers' too: write another, because who holds a worker's key could pass for a router",
    );
}

fn check_placement(spec: &SwallowModelSpec, problems: &mut Problems) {
    for (i, toleration) in spec.placement.tolerations.iter().enumerate() {
        let field = format!("spec.placement.tolerations[{i}]");
        let exists = toleration.operator == TolerationOperator::Exists;
        problems.check(
            !exists || toleration.value.is_none(),
            &format!("{field}.value"),
            "is only for operator Equal: leave it out",
        );
        problems.check(
            exists || toleration.key.as_ref().is_some_and(|key| !key.is_empty()),
            &format!("{field}.key"),
            "is missing: it is needed when operator is Equal",
        );
    }
    if let Some(name) = &spec.router.name {
        let good = name.starts_with(|c: char| c.is_ascii_lowercase())
            && !name.ends_with('-')
            && name.len() <= 50
            && !name.ends_with("-worker")
            && name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        problems.check(
            good,
            "spec.router.name",
            "write 1 to 50 lower-case letters, digits and -, beginning with a letter and not ending with - or -worker, \
             which is how names of workers' objects end",
        );
    }
}

fn check_resources(path: &str, resources: &Resources, problems: &mut Problems) {
    for (side, quantities) in [("requests", &resources.requests), ("limits", &resources.limits)] {
        for (name, quantity) in quantities {
            let field = format!("{path}.{side}.{name}");
            if let Err(error) = quantity.thousandths() {
                problems.add(&field, format!("'{quantity}' {error}"));
            }
            if name.ends_with("/gpu") {
                problems.add(&field, "GPUs are asked for by parallelism.tensor: leave it out");
            }
        }
    }
    for (name, request) in &resources.requests {
        let limit = resources
            .limits
            .get(name)
            .and_then(|limit| limit.thousandths().ok());
        if let (Some(limit), Ok(request)) = (limit, request.thousandths())
            && request > limit
        {
            problems.add(
                format!("{path}.requests.{name}"),
                "is more than the limit: write at most that",
            );
        }
    }
}
