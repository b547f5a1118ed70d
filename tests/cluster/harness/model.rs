//! SwallowModels as a user would write them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use swallow_tests::root;

/// The folder of the small model.
pub fn fixture() -> PathBuf {
    root().join("tests/fixtures/tiny")
}

/// A SwallowModel in the making.
#[derive(Clone)]
pub struct Model(pub Value);

impl Model {
    /// The small model on the CPU: groups of two ranks, reached from outside through a port of the nodes.
    pub fn tiny(name: &str, replicas: u32) -> Self {
        Self::at(name, replicas, &fixture())
    }

    /// The same with the files of another folder.
    pub fn at(name: &str, replicas: u32, folder: &Path) -> Self {
        Self(json!({
            "apiVersion": "serving.swallow.dev/v1alpha1",
            "kind": "SwallowModel",
            "metadata": {"name": name},
            "spec": {
                "model": {"source": {"type": "HostPath", "hostPath": {"path": folder}}},
                // Room for twenty streams of thousands of tokens in one group.
                "engine": {"kvCache": {"bytes": "256Mi"}},
                "accelerator": {"device": "CPU"},
                "parallelism": {"tensor": 2},
                "replicas": replicas,
                "router": {"serviceType": "NodePort"},
            },
        }))
    }

    /// With one field set; `path` is like `engine.maxStepTokens`.
    pub fn with(mut self, path: &str, value: Value) -> Self {
        let mut at = &mut self.0["spec"];
        for name in path.split('.') {
            at = &mut at[name];
        }
        *at = value;
        self
    }
}
