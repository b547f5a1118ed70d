//! How a worker or a router is started: typed arguments to and from a command line.
//!
//! The operator builds these values and renders them with `argv`; the binaries parse the same types. Nothing else
//! configures them, so what `kubectl get pod -o yaml` shows is the whole configuration.

mod fetch;
mod router;
mod worker;

pub use fetch::{FetchArgs, HUGGING_FACE, ProgressFormat};
pub use router::{DiscoverTarget, GRPC_PORT_NAME, ReplicaAddress, RouterArgs, WORKER_TLS_NAME};
pub use worker::{DeviceKind, Dtype, GenerationDefaults, Kernels, LoadFormat, PrefixCache, WorkerArgs};

use clap::ValueEnum;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// A command line in the making.
struct Argv(Vec<String>);

impl Argv {
    fn flag(&mut self, name: &str, value: impl ToString) {
        self.0.push(format!("--{name}={}", value.to_string()));
    }

    fn optional(&mut self, name: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.flag(name, value);
        }
    }

    fn switch(&mut self, name: &str, on: bool) {
        if on {
            self.0.push(format!("--{name}"));
        }
    }

    fn each(&mut self, name: &str, values: impl IntoIterator<Item = impl ToString>) {
        for value in values {
            self.flag(name, value);
        }
    }

    fn choice(&mut self, name: &str, value: impl ValueEnum) {
        let value = value.to_possible_value().expect("no variant is skipped");
        self.flag(name, value.get_name());
    }
}
