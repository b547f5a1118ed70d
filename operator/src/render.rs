//! What a plan would create, as YAML: the first plan of each model in an empty cluster, carried out on paper.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, Write as _},
    path::Path,
};

use serde_json::Value;
use swallow_plan::{
    Action, Images, Observed, Refused, Timestamp, Valid, counted,
    launch::RouterLaunch,
    memory::Size,
    model::{Device, SwallowModel, crd_value},
    objects, plan as decide, validate,
};
use swallow_proto::launch::{DiscoverTarget, RouterArgs};

use crate::file::{Errors, model_name, shape};

/// The CustomResourceDefinition.
pub fn crd() -> String {
    yaml(&crd_value())
}

/// Writes to standard output; a reader that has had enough is no error.
pub fn print(text: &str) -> Result<(), Errors> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(vec![format!("standard output: {error}")])
        }
        _ => Ok(()),
    }
}

/// The objects of all models: memory plans as comments, then what surrounds the groups, the groups, the routers.
///
/// # Errors
/// A line for each problem of each model.
pub fn plan(models: &[SwallowModel], images: &Images) -> Result<String, Errors> {
    let mut errors = Vec::new();
    let mut text = String::new();
    let mut routers = Routers::default();
    for model in models {
        let name = model_name(model);
        let seen = Observed {
            images: images.clone(),
            shape: read_shape(model),
            ..Observed::default()
        };
        match validate(model, seen.shape.as_ref()) {
            Err(refused) => errors.extend(lines(name, &refused)),
            Ok(valid) => {
                describe(&mut text, &valid);
                // Nothing exists yet, so no time plays a part.
                for action in decide(model, &seen, Timestamp::UNIX_EPOCH).actions {
                    carry_out(action, &valid, &mut text, &mut routers, &mut errors);
                }
            }
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    routers.write(&mut text);
    Ok(text)
}

/// One line for each problem of a model.
pub fn lines(name: &str, refused: &Refused) -> Errors {
    refused
        .lines()
        .into_iter()
        .map(|line| format!("{name}: {line}"))
        .collect()
}

/// Routers by namespace and name, with all models that share them.
#[derive(Default)]
struct Routers(BTreeMap<(String, String), SharedRouter>);

struct SharedRouter {
    first: Valid,
    launch: RouterLaunch,
    targets: Vec<DiscoverTarget>,
}

impl Routers {
    fn add(&mut self, valid: &Valid, launch: RouterLaunch) -> Result<(), String> {
        let key = (valid.namespace.clone(), launch.name.clone());
        let target = objects::discover_target(valid);
        let Some(shared) = self.0.get_mut(&key) else {
            let first = SharedRouter {
                first: valid.clone(),
                launch,
                targets: vec![target],
            };
            self.0.insert(key, first);
            return Ok(());
        };
        // How long streams may finish is each model's own; the first one's holds for the router.
        let args = RouterLaunch {
            args: shared.launch.args.clone(),
            ..launch.clone()
        };
        let settings = |args: &RouterArgs| RouterArgs {
            drain_timeout_seconds: 0,
            ..args.clone()
        };
        let limits_agree = settings(&launch.args) == settings(&shared.launch.args);
        if limits_agree && args == shared.launch {
            shared.targets.push(target);
            return Ok(());
        }
        Err(format!(
            "{}: spec.router: does not agree with the one of {}, which shares router {}: write the same",
            valid.name, shared.first.name, launch.name
        ))
    }

    fn write(&self, text: &mut String) {
        for shared in self.0.values() {
            for object in objects::router_objects(&shared.first, &shared.launch, &shared.targets) {
                document(text, &object);
            }
        }
    }
}

fn carry_out(action: Action, valid: &Valid, text: &mut String, routers: &mut Routers, errors: &mut Errors) {
    match action {
        Action::ApplySurroundings { .. } => {
            for object in objects::surroundings_value(valid)
                .as_array()
                .into_iter()
                .flatten()
            {
                document(text, object);
            }
        }
        Action::ApplyRouter { router, .. } => {
            if let Err(error) = routers.add(valid, *router) {
                errors.push(error);
            }
        }
        Action::CreateGroup { group, .. } => {
            document(text, &objects::plain(&objects::pod(valid, &group)));
        }
        // An empty cluster has nothing to drain, fail or remove.
        Action::RemoveRouter { .. }
        | Action::DrainGroup { .. }
        | Action::FailGroup { .. }
        | Action::DeleteGroup { .. }
        | Action::ForgetRevision { .. } => {}
    }
}

/// The model in a few lines of comment.
fn describe(text: &mut String, valid: &Valid) {
    let spec = &valid.spec;
    let device = match spec.accelerator.device {
        Device::GPU => "GPU",
        Device::CPU => "CPU",
    };
    let mut say = |line: String| writeln!(text, "# {line}").expect("writing to memory does not fail");
    say(format!(
        "{}/{}: {} of {} on {device}, revision {}{}",
        valid.namespace,
        valid.name,
        counted(spec.replicas.unsigned_abs().into(), "group"),
        counted(spec.parallelism.tensor.into(), "rank"),
        valid.revision,
        if spec.suspend { ", suspended" } else { "" }
    ));
    say(format!("served as {}", valid.served_names.join(", ")));
    let Some(memory) = &valid.memory else {
        say("memory plan: none, because the model's size is unknown: set spec.model.shape".into());
        return;
    };
    say(format!(
        "memory plan: {} parameters of {} bytes",
        memory.parameters, memory.number_bytes
    ));
    say(format!(
        "  each rank: {} weights, {} workspace, {} KV cache at {} bytes a token{}",
        Size(memory.weights_bytes),
        Size(memory.overhead_bytes),
        Size(memory.kv_cache_bytes),
        memory.kv_bytes_per_token,
        match memory.budget_bytes {
            Some(budget) => format!("; {} may be used", Size(budget)),
            None => String::new(),
        }
    ));
    let context = valid.shape.map_or(1, |shape| shape.max_position_embeddings);
    let length = u64::from(spec.engine.max_model_len.unwrap_or(context))
        .min(memory.kv_tokens)
        .max(1);
    say(format!(
        "  each group: {} in all, {} KV tokens: {} of {length}",
        Size(memory.group_bytes()),
        memory.kv_tokens,
        counted(memory.kv_tokens / length, "sequence")
    ));
}

/// The model's size, where its folder happens to be on this machine.
fn read_shape(model: &SwallowModel) -> Option<swallow_plan::topology::Shape> {
    let host = model.spec.model.source.as_ref()?.host_path.as_ref()?;
    shape(Path::new(&host.path))
}

fn document(text: &mut String, object: &Value) {
    text.push_str("---\n");
    text.push_str(&yaml(object));
}

fn yaml(value: &Value) -> String {
    serde_yaml_ng::to_string(value).expect("plain data is YAML")
}
