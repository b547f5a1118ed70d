//! Recordings of forward passes: CUDA graphs of decode steps, one for each size of step, made before the first request.
//!
//! A recorded pass is launched at once instead of kernel by kernel, and its kernels follow each other in a microsecond
//! instead of several. Everything that changes from step to step is read from memory, at addresses that do not change:
//! a step's metadata, the keys and values, what was sampled last. A step has the recording of the next size; its last
//! rows may have no meaning. The same kernels run with the same grids when a step is launched by hand, so both give the
//! same bits.

use std::{collections::BTreeMap, ptr, sync::Arc, time::Instant};

use cudarc::driver::sys::{CUgraph, CUgraphExec};
use swallow_schedule::StepId;

use super::{
    CudaDevice, CudaStep, Vector,
    blas::size,
    driver::Gpu,
    upload::{Fixed, Uploaded},
};
use crate::device::{DeviceError, StepMeta};

/// Rows of the largest recording.
pub(super) const RECORDED_ROWS: usize = 256;
/// Only calls of the recording thread are kept from what would break the recording.
const THREAD_LOCAL: i32 = 1;

/// All of a rank, by rows.
#[derive(Default)]
pub(super) struct Recordings {
    by_rows: BTreeMap<usize, Recording>,
    /// Rows of the largest that may be made.
    most: usize,
}

/// A recorded pass.
struct Recording {
    gpu: Arc<Gpu>,
    exec: CUgraphExec,
}

// SAFETY: used by one thread at a time, its rank's.
unsafe impl Send for Recording {}

impl Recording {
    fn launch(&self) -> Result<(), DeviceError> {
        let gpu = &self.gpu;
        // SAFETY: the recording's kernels use what the rank's device holds as long as its recordings.
        let code = unsafe { (gpu.driver.graph_launch)(self.exec, gpu.stream) };
        gpu.check(code, "cuGraphLaunch")
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: made once, destroyed once; the driver lets a running one end.
            unsafe { (self.gpu.driver.graph_exec_destroy)(self.exec) };
        }
    }
}

/// Records what `launches` launches, and how many launches that are.
fn record(
    gpu: &Arc<Gpu>,
    launches: impl FnOnce() -> Result<(), DeviceError>,
) -> Result<(Recording, usize), DeviceError> {
    let driver = gpu.driver;
    // SAFETY: the stream lives, and is this thread's.
    let code = unsafe { (driver.capture_begin)(gpu.stream, THREAD_LOCAL) };
    gpu.check(code, "cuStreamBeginCapture")?;
    let launched = launches();
    let mut graph: CUgraph = ptr::null_mut();
    // SAFETY: writes one handle. The recording is ended whatever came of the launches.
    let code = unsafe { (driver.capture_end)(gpu.stream, &mut graph) };
    launched?;
    gpu.check(code, "cuStreamEndCapture")?;
    let (mut n, mut exec) = (0, ptr::null_mut());
    // SAFETY: the graph lives; the first call writes a number, the second a handle.
    let codes = unsafe {
        let counted = (driver.graph_nodes)(graph, ptr::null_mut(), &mut n);
        let made = (driver.graph_instantiate)(&mut exec, graph, 0);
        (driver.graph_destroy)(graph);
        [(counted, "cuGraphGetNodes"), (made, "cuGraphInstantiate")]
    };
    codes
        .into_iter()
        .try_for_each(|(code, call)| gpu.check(code, call))?;
    // SAFETY: both handles live.
    let code = unsafe { (driver.graph_upload)(exec, gpu.stream) };
    let recording = Recording {
        gpu: Arc::clone(gpu),
        exec,
    };
    gpu.check(code, "cuGraphUpload")?;
    Ok((recording, n))
}

impl CudaDevice {
    /// Sizes of decode steps, ascending.
    pub(super) fn sizes(&self) -> Vec<usize> {
        if !self.spec.options.records() {
            return Vec::new();
        }
        let most = self.spec.max_running.min(RECORDED_ROWS);
        let mut sizes: Vec<usize> = (1..=most).map(|rows| self.padded(rows)).collect();
        sizes.dedup();
        sizes
    }

    /// Rows that a step of so many single rows is launched with when it is recorded.
    pub(super) fn padded(&self, rows: usize) -> usize {
        size(rows).min(self.spec.max_rows)
    }

    fn fixed(&self, rows: usize) -> Fixed {
        Fixed {
            rows,
            most: self.recordings.most,
            spare_block: self.spare_block,
            block_tokens: self.spec.block_tokens,
        }
    }

    /// How a step is laid out if there is a recording for it: each of its works is one row.
    pub(super) fn recorded_layout(&self, meta: &StepMeta) -> Option<Fixed> {
        let n = meta.n_rows();
        let rows = self.padded(n);
        let single = n == meta.works.len();
        (single && self.recordings.by_rows.contains_key(&rows)).then(|| self.fixed(rows))
    }

    pub(super) fn record_pass(
        &mut self,
        rows: usize,
        (inv_freq, half): (&Vector, usize),
        mut pass: impl FnMut(&mut Self, &CudaStep) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let begun = Instant::now();
        self.recordings.most = self.sizes().last().copied().unwrap_or(0);
        let nothing = Arc::new(StepMeta::empty(StepId(0)));
        let side = self.take_side();
        let uploaded = self
            .uploads
            .upload(&self.gpu, &nothing, side, Some(self.fixed(rows)))?;
        let step = self.step(nothing, side, uploaded, (inv_freq.memory.address, half));
        // Once by hand: kernels are loaded, and ranks connected, at first use.
        pass(self, &step)?;
        self.settle()?;
        let gpu = Arc::clone(&self.gpu);
        match record(&gpu, || pass(self, &step)) {
            Ok((recording, launches)) => {
                let ms = begun.elapsed().as_millis() as u64;
                tracing::debug!(rows, launches, ms, "decode steps recorded");
                self.recordings.by_rows.insert(rows, recording);
            }
            Err(error) => tracing::warn!(rows, "decode steps of this size are not recorded: {error}"),
        }
        self.settle()
    }

    /// Launches a step's recording, if it is laid out for one.
    pub(super) fn replay_pass(&self, step: &CudaStep) -> Result<bool, DeviceError> {
        match step
            .fixed
            .then(|| self.recordings.by_rows.get(&step.n_rows))
            .flatten()
        {
            Some(recording) => recording.launch().map(|()| true),
            None => Ok(false),
        }
    }

    pub(super) fn step(
        &mut self,
        meta: Arc<StepMeta>,
        side: usize,
        uploaded: Uploaded,
        inv_freq: (u64, usize),
    ) -> CudaStep {
        assert_eq!(inv_freq.1, self.spec.heads.dim / 2);
        self.stopwatch.begin(side, !uploaded.fixed);
        CudaStep {
            meta,
            side,
            on_gpu: uploaded.arrays,
            n_rows: uploaded.n_rows,
            n_asks: uploaded.n_asks,
            n_single: uploaded.n_single,
            n_tiles: uploaded.n_tiles,
            fixed: uploaded.fixed,
            inv_freq,
        }
    }
}
