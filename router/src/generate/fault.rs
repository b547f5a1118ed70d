//! Why a request got no answer, or not a whole one; and the one table from that to status codes.

use std::{borrow::Cow, time::Duration};

use tonic::Code;

use crate::ask::{Failure, Refusal};

/// A field with a value that can't be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Invalid {
    /// The field by its OpenAI name; the gRPC front has its own names for them.
    pub field: Cow<'static, str>,
    /// What is wrong and what would be right.
    pub why: String,
    /// For programs.
    pub reason: &'static str,
}

/// A value out of its range.
pub const BAD_VALUE: &str = "BAD_VALUE";
/// The prompt, or prompt and output together, exceed the context.
pub const PROMPT_TOO_LONG: &str = "PROMPT_TOO_LONG";
/// Known, but not served.
pub const UNSUPPORTED: &str = "UNSUPPORTED_FIELD";

impl Invalid {
    /// A value out of its range.
    pub fn new(field: impl Into<Cow<'static, str>>, why: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            why: why.into(),
            reason: BAD_VALUE,
        }
    }

    /// Known, but not served here.
    pub fn unsupported(field: impl Into<Cow<'static, str>>, why: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            why: why.into(),
            reason: UNSUPPORTED,
        }
    }
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    /// The request's own fault.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// It did not start.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It started and can't go on.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The model's files give no text.
    #[error("model '{model}' can't be used with text: {why}")]
    Model {
        /// Which.
        model: String,
        /// What is wrong with its files.
        why: String,
    },
}

impl Fault {
    /// The canonical code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) | Self::Refused(Refusal::Invalid(_)) => Code::InvalidArgument,
            Self::Refused(Refusal::UnknownModel(_)) => Code::NotFound,
            Self::Refused(Refusal::NoReplica { .. } | Refusal::ShuttingDown) => Code::Unavailable,
            Self::Refused(Refusal::QueueFull { .. } | Refusal::QueueTimeout { .. }) => {
                Code::ResourceExhausted
            }
            Self::Refused(Refusal::Deadline) | Self::Failed(Failure::Deadline { .. }) => {
                Code::DeadlineExceeded
            }
            Self::Failed(Failure::ReplicaLost { .. }) => Code::Unavailable,
            Self::Failed(Failure::SlowClient { .. }) => Code::ResourceExhausted,
            Self::Failed(Failure::Worker(_)) | Self::Model { .. } => Code::Internal,
        }
    }

    /// For programs: stable, in capitals.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(invalid) => invalid.reason,
            Self::Refused(Refusal::Invalid(_)) => BAD_VALUE,
            Self::Refused(Refusal::UnknownModel(_)) => "MODEL_NOT_FOUND",
            Self::Refused(Refusal::NoReplica { .. }) => "NO_REPLICA",
            Self::Refused(Refusal::ShuttingDown) => "DRAINING",
            Self::Refused(Refusal::QueueFull { .. }) => "QUEUE_FULL",
            Self::Refused(Refusal::QueueTimeout { .. }) => "QUEUE_TIMEOUT",
            Self::Refused(Refusal::Deadline) => "QUEUE_DEADLINE",
            Self::Failed(Failure::Deadline { .. }) => "DECODE_DEADLINE",
            Self::Failed(Failure::ReplicaLost { .. }) => "REPLICA_LOST",
            Self::Failed(Failure::SlowClient { .. }) => "SLOW_CLIENT",
            Self::Failed(Failure::Worker(_)) => "WORKER_ERROR",
            Self::Model { .. } => "MODEL_UNUSABLE",
        }
    }

    /// When another try may succeed; at least a millisecond. `None`: the same request will not.
    pub fn retry_after(&self) -> Option<Duration> {
        let after = match self {
            Self::Refused(
                Refusal::NoReplica { retry_after, .. }
                | Refusal::QueueFull { retry_after, .. }
                | Refusal::QueueTimeout { retry_after, .. },
            ) => *retry_after,
            // Another router, or another replica, can take it at once.
            Self::Refused(Refusal::ShuttingDown) | Self::Failed(Failure::ReplicaLost { .. }) => {
                Duration::from_secs(1)
            }
            _ => return None,
        };
        Some(after.max(Duration::from_millis(1)))
    }
}
