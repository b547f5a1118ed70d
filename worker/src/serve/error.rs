//! Every way in which `serve` ends other than by a drain.

use std::net::SocketAddr;

use super::TlsError;
use crate::{
    checkpoint::CheckpointError, config::ConfigError, device::DeviceError, engine::EngineError,
    group::GroupError,
};

/// Why `serve` ended other than by a drain.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A flag cannot be carried out.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address cannot be listened on.
    #[error("--{flag}={address}: {source}")]
    Listen {
        /// The flag without its dashes.
        flag: &'static str,
        /// What was asked for.
        address: SocketAddr,
        /// The system's word.
        source: std::io::Error,
    },
    /// The model's folder cannot be served.
    #[error(transparent)]
    Checkpoint(Box<CheckpointError>),
    /// The GPUs, or the libraries that drive them, cannot be used.
    #[error("--device=cuda: {0}")]
    Device(#[from] DeviceError),
    /// The group did not start.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The group failed while it served.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The loop's thread ended without a word: it panicked, and the panic was logged.
    #[error("the engine's thread panicked; see the line before")]
    EngineGone,
    /// The system refused a thread, a signal handler or a socket.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's word.
        source: std::io::Error,
    },
    /// Certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A server ended by itself.
    #[error("the gRPC server ended: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// A server's task panicked; the panic was logged.
    #[error("a server's task panicked; see the line before")]
    ServerGone,
    /// Metrics could not be made.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// A second signal came.
    #[error("ended by a second signal before the drain was done")]
    Interrupted,
}

impl From<CheckpointError> for ServeError {
    fn from(error: CheckpointError) -> Self {
        Self::Checkpoint(Box::new(error))
    }
}

impl ServeError {
    /// 2 for what the command line asks and 3 for a folder that cannot be served, which no restart mends; 1 for
    /// what happened.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Tls(_) => 2,
            Self::Checkpoint(_) => 3,
            _ => 1,
        }
    }
}
