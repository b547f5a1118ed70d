//! Why a group cannot run, or not any more. Every message names the rank, and the step if there was one.

use crate::device::{BadStep, DeviceError};

/// What ended a group, or kept it from starting.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GroupError {
    /// The group cannot be made like this.
    #[error("{0}")]
    Spec(String),
    /// A rank could not load its weights or allocate its memory.
    #[error("rank {rank} failed while loading: {cause}")]
    Load {
        /// Who.
        rank: usize,
        /// Why.
        cause: Cause,
    },
    /// The step does not fit the group; nothing has run.
    #[error(transparent)]
    Step(BadStep),
    /// A rank failed in a step.
    #[error("rank {rank} {cause} in step {step}")]
    Failed {
        /// Who.
        rank: usize,
        /// When.
        step: u64,
        /// Why.
        cause: Cause,
    },
    /// A rank does not answer.
    #[error("rank {rank} did not finish step {step} within {seconds} s")]
    Stalled {
        /// The one that the others wait for.
        rank: usize,
        /// When.
        step: u64,
        /// The time it had.
        seconds: f64,
    },
}

/// What happened on a rank.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Cause {
    /// A defect of the program.
    #[error("panicked ({0})")]
    Panicked(String),
    /// The system gave no thread.
    #[error("could not start its thread ({0})")]
    NoThread(String),
    /// The exchange was closed, so the cause is on another rank.
    #[error("was interrupted")]
    Interrupted,
    /// The device said so.
    #[error("failed ({0})")]
    Device(DeviceError),
}

impl From<DeviceError> for Cause {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Interrupted => Cause::Interrupted,
            other => Cause::Device(other),
        }
    }
}
