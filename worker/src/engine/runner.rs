//! What the engine needs of a device: state for a sequence, a step, and no more.

use std::{error::Error, sync::Arc};

use swallow_schedule::{SeqId, Step};

use crate::{
    group::{Group, GroupError, MemoryReport, StepResult},
    sampling::SamplingParams,
};

/// A tensor-parallel group, or what stands in for one in a test.
pub trait Runner {
    /// Names what failed and in which step. After an error the runner is not used again.
    type Error: Error;

    /// Sets up the sampler of a sequence, before its first step.
    fn admit(&mut self, seq: SeqId, params: SamplingParams, prompt: Arc<[u32]>);

    /// Forgets a sequence; no step that is launched from now on names it.
    fn retire(&mut self, seq: SeqId);

    /// Steps that may be launched before the first of them is finished; at least 1.
    fn steps_ahead(&self) -> usize;

    /// Bytes that it has allocated.
    fn memory(&self) -> MemoryReport {
        MemoryReport::default()
    }

    /// Begins a step.
    ///
    /// # Errors
    /// The step cannot run, or an earlier one has failed.
    fn launch(&mut self, step: &Step) -> Result<(), Self::Error>;

    /// What came of the oldest launched step, blocking.
    ///
    /// # Errors
    /// A rank failed or stalled.
    fn finish(&mut self) -> Result<StepResult, Self::Error>;
}

impl Runner for Group {
    type Error = GroupError;

    fn admit(&mut self, seq: SeqId, params: SamplingParams, prompt: Arc<[u32]>) {
        Group::admit(self, seq, params, prompt);
    }

    fn retire(&mut self, seq: SeqId) {
        Group::retire(self, seq);
    }

    fn steps_ahead(&self) -> usize {
        Group::steps_ahead(self)
    }

    fn memory(&self) -> MemoryReport {
        Group::memory(self).clone()
    }

    fn launch(&mut self, step: &Step) -> Result<(), GroupError> {
        Group::launch(self, step)
    }

    fn finish(&mut self) -> Result<StepResult, GroupError> {
        Group::finish(self)
    }
}
