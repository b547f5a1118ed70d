//! Which way to multiply is fastest. Steps of few rows are limited by the bytes of the weights, and the library's first
//! choice is often not its best: its choices are tried, on the real weights, with cold caches. What comes of it differs
//! from start to start, which is why it is kept.

use std::{mem, mem::MaybeUninit};

use cudarc::cublaslt::sys::{cublasLtMatmulAlgo_t, cublasLtMatmulHeuristicResult_t};

use super::{Blas, Operands, Plan, Shape, WORKSPACE_BYTES};
use crate::device::{
    DeviceError,
    cuda::choices::{Book, Way},
};

/// Rows up to which choices are tried.
const TRIED_ROWS: usize = 256;
/// Runs of each choice; the median counts.
const TRIES: usize = 5;
/// Writing this much leaves nothing of the weights in the caches of any GPU so far.
const FLUSH_BYTES: usize = 192 << 20;

impl Blas {
    /// Sets how a product is computed from now on: as it is known, or as the library is fastest, or its first way.
    pub(super) fn choose(
        &mut self,
        plan: &mut Plan,
        shape: Shape,
        operands: Operands,
    ) -> Result<(), DeviceError> {
        if shape.m > TRIED_ROWS {
            return Ok(());
        }
        match self.book.way(shape)? {
            // The library is not asked then.
            Some(Way::Own) => return Ok(()),
            Some(Way::Library(data)) => {
                let algorithm = cublasLtMatmulAlgo_t { data };
                match self.accepts(plan, &algorithm) {
                    Ok(()) => {
                        plan.algorithm = algorithm;
                        return Ok(());
                    }
                    Err(why) => self.book.refused(shape, why)?,
                }
            }
            None => {}
        }
        if self.book.measures() && self.try_choices(plan, shape, operands)? {
            self.book.found(shape, Way::Library(plan.algorithm.data));
        }
        Ok(())
    }

    /// Whether the library can compute a product in this way, which it may not have said itself in this process.
    fn accepts(&self, plan: &Plan, algorithm: &cublasLtMatmulAlgo_t) -> Result<(), DeviceError> {
        let mut answer = MaybeUninit::<cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: the handles live; the call reads the algorithm and writes its answer.
        let bytes = unsafe {
            let code = (self.lt.algorithm_check)(
                self.handle,
                self.desc,
                plan.w,
                plan.x,
                plan.out,
                plan.out,
                algorithm,
                answer.as_mut_ptr(),
            );
            self.lt.check(code, "cublasLtMatmulAlgoCheck")?;
            (&raw const (*answer.as_ptr()).workspaceSize).read()
        };
        match bytes <= WORKSPACE_BYTES {
            true => Ok(()),
            false => Err(DeviceError::Cuda(format!("it needs {bytes} bytes of workspace"))),
        }
    }

    /// Takes the fastest choice, measured on these operands. Where no memory is left to empty the caches with, the
    /// first choice stays, and the answer is false.
    fn try_choices(&self, plan: &mut Plan, shape: Shape, operands: Operands) -> Result<bool, DeviceError> {
        let mut best = f64::INFINITY;
        for choice in mem::take(&mut plan.choices) {
            let candidate = Plan {
                algorithm: choice,
                choices: Vec::new(),
                ..*plan
            };
            let Some(time) = self.timed(|| self.run(&candidate, operands))? else {
                return Ok(false);
            };
            if time < best {
                best = time;
                plan.algorithm = choice;
            }
        }
        tracing::debug!(?shape, microseconds = best * 1e6, "matrix product chosen");
        Ok(true)
    }

    /// Median seconds of a launch with cold caches; `None` where no memory is left to empty them with.
    pub(in crate::device::cuda) fn timed(
        &self,
        launch: impl Fn() -> Result<(), DeviceError>,
    ) -> Result<Option<f64>, DeviceError> {
        let Ok(flush) = self.gpu.alloc(FLUSH_BYTES, "emptying caches") else {
            return Ok(None);
        };
        let (start, end) = (self.gpu.event(true)?, self.gpu.event(true)?);
        let mut times = [0.0; TRIES];
        for time in &mut times {
            self.gpu.clear(&flush)?;
            start.record()?;
            launch()?;
            end.record()?;
            end.wait()?;
            *time = end.seconds_since(&start)?;
        }
        times.sort_unstable_by(f64::total_cmp);
        Ok(Some(times[TRIES / 2]))
    }

    /// Seconds of the library's product of this shape.
    pub(in crate::device::cuda) fn seconds(
        &mut self,
        shape: Shape,
        operands: Operands,
    ) -> Result<Option<f64>, DeviceError> {
        self.multiply(shape, operands)?;
        self.timed(|| self.run(&self.plans[&shape], operands))
    }

    /// The choices.
    pub(in crate::device::cuda) fn book(&mut self) -> &mut Book {
        &mut self.book
    }
}
