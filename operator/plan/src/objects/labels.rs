//! Labels, annotations and names of the objects of a model.

use std::collections::BTreeMap;

/// The model that an object belongs to.
pub const MODEL: &str = "serving.swallow.dev/model";
/// The part that a pod plays.
pub const ROLE: &str = "serving.swallow.dev/role";
/// The revision of a group.
pub const REVISION: &str = "serving.swallow.dev/revision";
/// The number of a group within its revision.
pub const INDEX: &str = "serving.swallow.dev/index";
/// The router that a pod belongs to.
pub const ROUTER: &str = "serving.swallow.dev/router";
/// Annotation: failures on record, RFC 3339 times joined by commas.
pub const CRASHES: &str = "serving.swallow.dev/crashes";

/// Annotation: a fingerprint of what was last applied.
pub const APPLIED: &str = "serving.swallow.dev/applied";
/// Annotation of a pod: it was ended by the plan, when and why, as JSON.
pub const FAILED: &str = "serving.swallow.dev/failed";
/// Selects everything that is made for models.
pub const MANAGED: &str = "app.kubernetes.io/managed-by=swallow-operator";

/// The name of what all workers of a model share.
pub fn worker_name(model: &str) -> String {
    format!("{model}-worker")
}

/// What selects the worker pods of a model.
pub fn of_workers(model: &str) -> BTreeMap<String, String> {
    map([(MODEL, model), (ROLE, "worker")])
}

/// What selects the pods of a router.
pub fn of_router(router: &str) -> BTreeMap<String, String> {
    map([(ROUTER, router), (ROLE, "router")])
}

/// `of_workers` as text, for the scale subresource.
pub fn selector(model: &str) -> String {
    format!("{MODEL}={model},{ROLE}=worker")
}

/// What tools expect on every object.
pub(super) fn with_common(mut labels: BTreeMap<String, String>, name: &str) -> BTreeMap<String, String> {
    labels.extend(map([
        ("app.kubernetes.io/name", name),
        ("app.kubernetes.io/managed-by", "swallow-operator"),
        #[cfg(feature = "another-rendering")]
        ("serving.swallow.dev/rendering", "another"),
    ]));
    labels
}

fn map<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}
