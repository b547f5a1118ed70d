//! What is told of a kernel that fails. A launch only queues a kernel; when it fails, whatever call comes next is told, and
//! every call after that. Which kernel it was, nobody knows: one of the steps that are under way. With `--debug-kernels`
//! every kernel is waited for after its launch, and the error names it.

use std::fmt::{self, Display};

use cudarc::driver::sys::cudaError_enum as Code;

use crate::device::{DeviceError, StepMeta};

/// What the driver says at any call when a kernel has failed before. Nothing works on that GPU from then on.
const OF_KERNELS: [Code; 11] = [
    Code::CUDA_ERROR_ECC_UNCORRECTABLE,
    Code::CUDA_ERROR_NVLINK_UNCORRECTABLE,
    Code::CUDA_ERROR_ILLEGAL_ADDRESS,
    Code::CUDA_ERROR_LAUNCH_TIMEOUT,
    Code::CUDA_ERROR_ASSERT,
    Code::CUDA_ERROR_HARDWARE_STACK_ERROR,
    Code::CUDA_ERROR_ILLEGAL_INSTRUCTION,
    Code::CUDA_ERROR_MISALIGNED_ADDRESS,
    Code::CUDA_ERROR_INVALID_ADDRESS_SPACE,
    Code::CUDA_ERROR_INVALID_PC,
    Code::CUDA_ERROR_LAUNCH_FAILED,
];

/// Whether an error is one of a kernel that ran before, not of the call that gave it.
pub(super) fn is_of_a_kernel(code: i32) -> bool {
    OF_KERNELS.iter().any(|&known| known as i32 == code)
}

/// A kernel failed, and it is not known which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFault {
    /// The driver's.
    words: String,
    /// The call that was told.
    told: String,
    /// Where the kernel may have been.
    steps: Vec<String>,
}

impl KernelFault {
    pub(super) fn new(words: String, told: &str) -> Self {
        Self {
            words,
            told: told.to_owned(),
            steps: Vec::new(),
        }
    }

    /// As another call was told it.
    pub(super) fn told_by(self, told: &str) -> Self {
        Self {
            told: told.to_owned(),
            ..self
        }
    }

    /// With the steps that were under way.
    pub(super) fn in_steps(self, steps: Vec<String>) -> Self {
        Self { steps, ..self }
    }

    /// As an error of the call that was told.
    pub(super) fn of_the_call(self) -> DeviceError {
        let call = self.told.clone();
        self.of(&call)
    }

    /// As an error of a kernel that is known.
    pub(super) fn of(self, kernel: &str) -> DeviceError {
        DeviceError::Cuda(format!("{kernel}: {}", self.words))
    }
}

impl Display for KernelFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a kernel before {} failed: {}", self.told, self.words)?;
        if !self.steps.is_empty() {
            write!(f, ", in {}", self.steps.join(" or "))?;
        }
        write!(f, "; --debug-kernels names it")
    }
}

/// A step, for people who look for a fault.
pub(super) fn describe(meta: &StepMeta, recorded: bool) -> String {
    let single = meta.works.iter().filter(|work| work.rows.len() == 1).count();
    let several = meta.works.len() - single;
    let how = if recorded {
        "recorded"
    } else {
        "launched kernel by kernel"
    };
    format!(
        "step {} ({how}; {} rows of {single} sequences with one and {several} with several, {} asked)",
        meta.id.0,
        meta.n_rows(),
        meta.asks.len()
    )
}

#[cfg(test)]
mod tests {
    use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};

    use super::*;
    use crate::device::StepShape;

    fn step(id: u64, rows: &[usize]) -> StepMeta {
        let shape = StepShape {
            block_tokens: 16,
            n_blocks: 8,
            max_running: 4,
            max_rows: 64,
            max_model_len: 16,
            n_vocab: 9,
        };
        let work = |(n, &rows): (usize, &usize)| Work {
            seq: SeqId(n as u64),
            slot: Slot(n as u32),
            start: 0,
            input: Input::Tokens(vec![0; rows]),
            blocks: vec![BlockId(n as u32)],
            sample: None,
            prompt_logprobs: false,
        };
        let step = Step {
            id: StepId(id),
            works: rows.iter().enumerate().map(work).collect(),
        };
        StepMeta::build(&step, &shape, |_| None).expect("within the bounds")
    }

    #[test]
    fn a_fault_is_told_with_the_steps_it_may_be_of_and_what_to_do() {
        let words = "CUDA_ERROR_ILLEGAL_ADDRESS, an illegal memory access was encountered";
        let fault = KernelFault::new(words.into(), "rope_write");
        assert_eq!(
            fault.to_string(),
            format!("a kernel before rope_write failed: {words}; --debug-kernels names it")
        );
        let steps = vec![
            describe(&step(7, &[1, 1]), true),
            describe(&step(8, &[1, 9]), false),
        ];
        assert_eq!(
            DeviceError::from(fault.clone().in_steps(steps)).to_string(),
            format!(
                "a kernel before rope_write failed: {words}, in step 7 (recorded; 2 rows of 2 sequences with one and 0 with \
                 several, 0 asked) or step 8 (launched kernel by kernel; 10 rows of 1 sequences with one and 1 with \
                 several, 0 asked); --debug-kernels names it"
            )
        );
        assert_eq!(
            fault.of("attend_single_128").to_string(),
            format!("attend_single_128: {words}")
        );
    }

    #[test]
    fn errors_of_calls_are_not_blamed_on_kernels() {
        for code in [Code::CUDA_ERROR_ILLEGAL_ADDRESS, Code::CUDA_ERROR_LAUNCH_FAILED] {
            assert!(is_of_a_kernel(code as i32), "{code:?}");
        }
        for code in [
            Code::CUDA_SUCCESS,
            Code::CUDA_ERROR_NOT_READY,
            Code::CUDA_ERROR_INVALID_VALUE,
            Code::CUDA_ERROR_OUT_OF_MEMORY,
            Code::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
        ] {
            assert!(!is_of_a_kernel(code as i32), "{code:?}");
        }
    }
}
