//! One scenario's namespace.

use std::{cell::RefCell, time::Duration};

use serde_json::Value;

use super::{Cluster, Door, Model, NODE, until};

/// Longer than anything here takes on two busy cores, a lost node included.
const PATIENCE: Duration = Duration::from_secs(120);

/// A namespace of the cluster, and what was found in it worth telling.
pub struct Space<'a> {
    pub cluster: &'a Cluster,
    pub name: String,
    facts: RefCell<Vec<String>>,
}

impl<'a> Space<'a> {
    /// The namespace of a scenario.
    pub fn name_of(scenario: &str) -> String {
        let words: String = scenario
            .chars()
            .map(|letter| {
                if letter.is_ascii_alphanumeric() {
                    letter
                } else {
                    '-'
                }
            })
            .take(50)
            .collect();
        format!("t-{}", words.trim_end_matches('-'))
    }

    /// Makes the namespace of a scenario, anew if it is there.
    pub fn new(cluster: &'a Cluster, scenario: &str) -> Self {
        let name = Self::name_of(scenario);
        let _ = cluster.kubectl(&[
            "delete",
            "namespace",
            &name,
            "--ignore-not-found",
            "--timeout=90s",
        ]);
        if let Err(error) = cluster.kubectl(&["create", "namespace", &name]) {
            println!("{error}");
        }
        Self {
            cluster,
            name,
            facts: RefCell::new(Vec::new()),
        }
    }

    /// Ends it without waiting, streams or not.
    pub fn remove(&self) {
        let _ = self
            .cluster
            .kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
        let all = [
            "delete",
            "pods",
            "--all",
            "--force",
            "--grace-period=0",
            "--wait=false",
        ];
        let _ = self.try_kubectl(&all);
    }

    /// Something to show beside the scenario's time.
    pub fn tell(&self, fact: impl Into<String>) {
        let fact = fact.into();
        println!("{fact}");
        self.facts.borrow_mut().push(fact);
    }

    /// What was told.
    pub fn facts(&self) -> Vec<String> {
        self.facts.borrow().clone()
    }

    /// kubectl in this namespace.
    ///
    /// # Panics
    /// If it fails.
    pub fn kubectl(&self, words: &[&str]) -> String {
        self.try_kubectl(words).unwrap_or_else(|error| panic!("{error}"))
    }

    /// kubectl in this namespace.
    pub fn try_kubectl(&self, words: &[&str]) -> Result<String, String> {
        let mut all = vec!["-n", &self.name];
        all.extend(words);
        self.cluster.kubectl(&all)
    }

    /// An object or a list.
    pub fn json(&self, words: &[&str]) -> Result<Value, String> {
        let mut all = vec!["-n", &self.name];
        all.extend(words);
        self.cluster.json(&all)
    }

    /// `kubectl apply`.
    pub fn apply(&self, model: &Model) {
        self.apply_value(&model.0);
    }

    /// `kubectl apply` of anything.
    pub fn apply_value(&self, object: &Value) {
        self.try_apply(object).unwrap_or_else(|error| panic!("{error}"));
    }

    /// `kubectl apply`, which may be refused.
    pub fn try_apply(&self, object: &Value) -> Result<String, String> {
        self.cluster
            .kubectl_with(&["-n", &self.name, "apply", "-f", "-"], &object.to_string())
    }

    /// `kubectl patch` of a model's spec.
    pub fn patch(&self, model: &str, patch: &Value) {
        let patch = patch.to_string();
        self.kubectl(&["patch", "swallowmodel", model, "--type=merge", "-p", &patch]);
    }

    /// Waits until the model is as `good` says; gives the model. `good` says what is missing.
    pub fn until_model(
        &self,
        name: &str,
        what: &str,
        mut good: impl FnMut(&Value) -> Result<(), String>,
    ) -> Value {
        until(&format!("{name}: {what}"), PATIENCE, || {
            let model = self.json(&["get", "swallowmodel", name])?;
            // Of an older spec it says nothing about this one.
            if model["status"]["observedGeneration"] != model["metadata"]["generation"] {
                return Err("a status of an older spec".into());
            }
            good(&model).map_err(|lacks| format!("{lacks} in {}", model["status"]))?;
            Ok(model)
        })
    }

    /// Waits until every group serves the current spec and nothing is changing.
    pub fn until_settled(&self, name: &str) -> Value {
        self.until_model(name, "every group serves and nothing changes", |model| {
            for kind in ["Ready", "FullyAvailable", "Settled"] {
                if condition(model, kind).0 != "True" {
                    return Err(format!("{kind} is not True"));
                }
            }
            if model["status"]["updatedReplicas"] != model["spec"]["replicas"] {
                return Err("not all are updated".into());
            }
            // The last thing that a group tells of itself.
            let groups = model["status"]["groups"].as_array().into_iter().flatten();
            groups
                .into_iter()
                .all(|group| group["memory"].is_object())
                .then_some(())
                .ok_or_else(|| "memory is not told".into())
        })
    }

    /// The worker pods that are not on their way out.
    pub fn worker_pods(&self, model: &str) -> Vec<Value> {
        let selector = format!("serving.swallow.dev/model={model},serving.swallow.dev/role=worker");
        let list = self
            .json(&["get", "pods", "-l", &selector])
            .expect("pods can be listed");
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        pods.into_iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
            .collect()
    }

    /// The addresses of the model's router, outside the cluster.
    pub fn door(&self, router: &str) -> Door {
        let port = |name| self.node_port(router, name);
        Door::new(self.cluster, port("grpc"), port("http"))
    }

    /// The address of a router whose OpenAI clients speak TLS, outside the cluster.
    pub fn https(&self, router: &str) -> String {
        format!("https://{NODE}:{}", self.node_port(router, "http"))
    }

    fn node_port(&self, router: &str, name: &str) -> u64 {
        let service = self
            .json(&["get", "service", router])
            .expect("the router has a Service");
        service["spec"]["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|port| port["name"] == name)
            .and_then(|port| port["nodePort"].as_u64())
            .unwrap_or_else(|| panic!("no node port {name} in {}", service["spec"]))
    }
}

/// Status, reason and message of a condition; empty where there is none.
pub fn condition<'v>(model: &'v Value, kind: &str) -> (&'v str, &'v str, &'v str) {
    let found = model["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == kind);
    let text = |name: &str| found.and_then(|it| it[name].as_str()).unwrap_or_default();
    (text("status"), text("reason"), text("message"))
}

/// State, reason and message of each group.
pub fn group_reasons(model: &Value) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    model["status"]["groups"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|group| {
            (
                text(&group["state"]),
                text(&group["reason"]),
                text(&group["message"]),
            )
        })
        .collect()
}
