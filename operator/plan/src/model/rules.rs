//! Rules that the API server checks on every write, in CEL, so that a mistake is refused by `kubectl apply` with the
//! words below. `validate` checks the same in Rust, for files and for what CEL cannot see; a test keeps them in step.

use serde_json::{Value, json};

/// A CEL rule at one place of the schema.
pub(super) struct Rule {
    /// Path of properties below the root of the resource; empty for the root itself.
    pub at: &'static [&'static str],
    /// The expression that must be true.
    pub rule: &'static str,
    /// What the user reads when it is not.
    pub message: &'static str,
}

pub(super) const RULES: &[Rule] = &[
    Rule {
        at: &[],
        rule: "self.metadata.name.size() <= 40",
        message: "metadata.name must be at most 40 characters, because names of pods add to it",
    },
    Rule {
        at: &["spec", "model"],
        rule: "!has(self.servedNames) || self.servedNames.all(n, n.matches('^[A-Za-z0-9][A-Za-z0-9._/:@-]*$'))",
        message: "servedNames are made of letters, digits and ._-/:@, and begin with a letter or digit",
    },
    Rule {
        at: &["spec", "model"],
        rule: "!has(self.cache) || (has(self.source) && self.source.type == 'HuggingFace')",
        message: "cache is for a source of type HuggingFace: leave it out",
    },
    Rule {
        at: &["spec", "model"],
        rule: "has(self.source) == has(oldSelf.source)",
        message: "source cannot be added or removed: a model with another source is another SwallowModel",
    },
    Rule {
        at: &["spec"],
        rule: "has(self.model.source) || (self.engine.loadFormat == 'Dummy' && has(self.model.shape))",
        message: "set model.source, or both engine.loadFormat Dummy and model.shape",
    },
    Rule {
        at: &["spec"],
        rule: "self.engine.loadFormat != 'Dummy' || !has(self.model.source) || self.model.source.type != 'HuggingFace'",
        message: "engine.loadFormat Dummy needs no weights, and a HuggingFace source would fetch them: set model.shape \
                  instead of model.source, or a folder",
    },
    Rule {
        at: &["spec"],
        rule: "self.engine.kernels != 'Portable' || self.accelerator.device == 'GPU'",
        message: "engine.kernels Portable is for GPU: leave it out on CPU",
    },
    Rule {
        at: &["spec", "model", "source"],
        rule: "has(self.hostPath) == (self.type == 'HostPath') && has(self.persistentVolumeClaim) == (self.type == \
               'PersistentVolumeClaim') && has(self.huggingFace) == (self.type == 'HuggingFace')",
        message: "set exactly the member that type names: hostPath, persistentVolumeClaim or huggingFace",
    },
    Rule {
        at: &["spec", "model", "source"],
        rule: "self.type == oldSelf.type",
        message: "type is immutable: another kind of source is another SwallowModel",
    },
    Rule {
        at: &["spec", "model", "source", "hostPath"],
        rule: "self.path.startsWith('/') && !self.path.split('/').exists(p, p == '..')",
        message: "path must be absolute and without ..",
    },
    Rule {
        at: &["spec", "model", "source", "persistentVolumeClaim"],
        rule: "!has(self.path) || (!self.path.startsWith('/') && !self.path.split('/').exists(p, p == '..'))",
        message: "path must be relative to the volume's root and without ..",
    },
    Rule {
        at: &["spec", "model", "source", "huggingFace"],
        rule: "self.revision.matches('^[0-9a-f]{40}$')",
        message: "revision must be a full commit: 40 hexadecimal digits in lower case",
    },
    Rule {
        at: &["spec", "model", "source", "huggingFace"],
        rule: "self.repo.matches('^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$')",
        message: "repo must be OWNER/NAME",
    },
    Rule {
        at: &["spec", "model", "source", "huggingFace"],
        rule: "!has(self.endpoint) || self.endpoint.matches('^https?://[^ ?#@]+$')",
        message: "endpoint must be a URL such as https://mirror.example, without user, query or fragment",
    },
    Rule {
        at: &["spec", "model", "cache"],
        rule: "has(self.persistentVolumeClaim) == (self.type == 'PersistentVolumeClaim') && (!has(self.emptyDir) || \
               self.type == 'EmptyDir')",
        message: "set exactly the member that type names: persistentVolumeClaim, or emptyDir, which may be left out",
    },
    Rule {
        at: &["spec", "model", "shape"],
        rule: "has(self.preset) != has(self.numbers)",
        message: "set preset or numbers, one of them",
    },
    Rule {
        at: &["spec", "engine"],
        rule: "self.maxStepTokens >= self.maxConcurrentSequences",
        message: "maxStepTokens must be at least maxConcurrentSequences, because each running sequence takes one",
    },
    Rule {
        at: &["spec", "engine", "kvCache"],
        rule: "!has(self.bytes) || !has(self.deviceMemoryPercent)",
        message: "set bytes or deviceMemoryPercent, not both",
    },
    Rule {
        at: &["spec"],
        rule: "self.accelerator.device != 'CPU' || !has(self.engine.kvCache.deviceMemoryPercent)",
        message: "engine.kvCache.deviceMemoryPercent is for GPU: on CPU set engine.kvCache.bytes",
    },
    Rule {
        at: &["spec"],
        rule: "self.accelerator.device != 'CPU' || self.engine.dtype != 'BF16'",
        message: "engine.dtype BF16 is for GPU: the CPU computes FP32, so set Auto or FP32",
    },
    Rule {
        at: &["spec"],
        rule: "self.accelerator.device != 'GPU' || has(self.accelerator.deviceMemory) || \
               has(self.engine.kvCache.bytes)",
        message: "on GPU set accelerator.deviceMemory (the memory of one GPU, such as 80Gi) or engine.kvCache.bytes",
    },
    Rule {
        at: &["spec", "accelerator"],
        rule: "self.device != 'CPU' || !has(self.deviceMemory)",
        message: "deviceMemory is for GPU: leave it out on CPU",
    },
    Rule {
        at: &["spec", "rollout"],
        rule: "self.maxSurge > 0 || self.maxUnavailable > 0",
        message: "maxSurge and maxUnavailable cannot both be zero: no group could ever be replaced",
    },
    Rule {
        at: &["spec", "recovery", "backoff"],
        rule: "self.maxSeconds >= self.initialSeconds",
        message: "maxSeconds must be at least initialSeconds",
    },
    Rule {
        at: &["spec", "router"],
        rule: "!has(self.name) || (self.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$') && \
               !self.name.endsWith('-worker'))",
        message: "name must be lower-case letters, digits and -, begin with a letter and not end with -worker",
    },
    Rule {
        at: &["spec", "router", "mutualTls"],
        rule: "!has(self.serverName) || self.serverName.matches('^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$')",
        message: "serverName must be a DNS name in lower case, such as swallow-worker",
    },
    Rule {
        at: &["spec", "router", "mutualTls"],
        rule: "self.workerSecretName != self.routerSecretName",
        message: "workerSecretName and routerSecretName must differ: who holds a worker's key could pass for a router",
    },
    Rule {
        at: &["spec", "router"],
        rule: "has(self.name) == has(oldSelf.name) && (!has(self.name) || self.name == oldSelf.name)",
        message: "name is immutable, because clients know the address",
    },
];

impl Rule {
    pub(super) fn to_value(&self) -> Value {
        json!({ "rule": self.rule, "message": self.message })
    }
}
