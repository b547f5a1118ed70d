//! What the engine needs of a device: state for a sequence, a step, and no more.

use std::{error::Error, sync::Arc};

use swallow_schedule::{SeqId, Step};

use crate::{
    group::{Group, GroupError, StepResult},
    sampling::SamplingParams,
};

/// A tensor-parallel group, or what stands in for one in a test.
pub trait Runner {
    /// Names what failed and in which step. After an error the runner is not used again.
    type Error: Error;

    /// Sets up the sampler of a sequence, before its first step.
    fn admit(&mut self, seq: SeqId, params: SamplingParams, prompt: Arc<[u32]>);

    /// Forgets a sequence; no step that is still to come names it.
    fn retire(&mut self, seq: SeqId);

    /// Computes one step, blocking.
    ///
    /// # Errors
    /// A rank panicked or stalled.
    fn run(&mut self, step: &Step) -> Result<StepResult, Self::Error>;
}

impl Runner for Group {
    type Error = GroupError;

    fn admit(&mut self, seq: SeqId, params: SamplingParams, prompt: Arc<[u32]>) {
        Group::admit(self, seq, params, prompt);
    }

    fn retire(&mut self, seq: SeqId) {
        Group::retire(self, seq);
    }

    fn run(&mut self, step: &Step) -> Result<StepResult, GroupError> {
        Group::run(self, step)
    }
}
