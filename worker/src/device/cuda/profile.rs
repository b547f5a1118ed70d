//! Where the time of a step goes: a point in the stream after every operation, for a benchmark.
//!
//! Launching takes longer than small kernels run. The stream is given something long to do first, so that by the time it
//! comes to the step all of it is queued, and the time between two points is the GPU's alone. Kernels that are chained
//! in a recording are not here: a point between them parts them.

use std::sync::Arc;

use super::{
    CudaDevice, CudaStep, Kv, Rows,
    blas::{Out, Shape},
    driver::{Event, Gpu},
    memory::Memory,
};
use crate::device::{DeviceError, OpTime};

/// What keeps the stream busy while a step is queued.
const HOLD_BYTES: usize = 192 << 20;
/// So often: some ten milliseconds.
const HOLD_TIMES: usize = 200;

/// Points of the steps of one rank.
pub(super) struct Profile {
    gpu: Arc<Gpu>,
    hold: Memory,
    start: Event,
    marks: Vec<Mark>,
}

struct Mark {
    op: String,
    bytes: usize,
    flops: usize,
    after: Event,
}

impl Profile {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, DeviceError> {
        Ok(Self {
            gpu: Arc::clone(gpu),
            hold: gpu.alloc(HOLD_BYTES, "profiling")?,
            start: gpu.event(true)?,
            marks: Vec::new(),
        })
    }

    /// A step begins.
    fn begin(&mut self) -> Result<(), DeviceError> {
        self.marks.clear();
        for _ in 0..HOLD_TIMES {
            self.gpu.clear(&self.hold)?;
        }
        self.start.record()
    }

    fn mark(&mut self, op: String, [bytes, flops]: [usize; 2]) -> Result<(), DeviceError> {
        let after = self.gpu.event(true)?;
        after.record()?;
        self.marks.push(Mark {
            op,
            bytes,
            flops,
            after,
        });
        Ok(())
    }

    /// Times of a step that is done; operations of one name together.
    fn times(&mut self) -> Result<Vec<OpTime>, DeviceError> {
        let mut times: Vec<OpTime> = Vec::new();
        let mut last = &self.start;
        for mark in &self.marks {
            let seconds = mark.after.seconds_since(last)?;
            last = &mark.after;
            let time = match times.iter().position(|time| time.op == mark.op) {
                Some(known) => &mut times[known],
                None => {
                    times.push(OpTime {
                        op: mark.op.clone(),
                        ..OpTime::default()
                    });
                    times.last_mut().expect("pushed just now")
                }
            };
            time.calls += 1;
            time.seconds += seconds;
            time.bytes += mark.bytes as f64;
            time.flops += mark.flops as f64;
        }
        Ok(times)
    }
}

impl CudaDevice {
    pub(super) fn begin_profile(&mut self) -> Result<(), DeviceError> {
        self.profile.as_mut().map_or(Ok(()), Profile::begin)
    }

    /// An operation is queued: its name, and the bytes and operations that it cannot do without.
    pub(super) fn mark(&mut self, op: &str, bytes: usize, flops: usize) -> Result<(), DeviceError> {
        self.profile
            .as_mut()
            .map_or(Ok(()), |profile| profile.mark(op.to_owned(), [bytes, flops]))
    }

    pub(super) fn mark_product(&mut self, shape: Shape) -> Result<(), DeviceError> {
        let Some(profile) = &mut self.profile else {
            return Ok(());
        };
        let Shape { m, n, k, out } = shape;
        let number = match out {
            Out::Bf16 => 2,
            Out::F32 => 4,
        };
        let bytes = 2 * (n * k + m * k) + number * m * n;
        profile.mark(format!("product {k} x {n}"), [bytes, 2 * m * n * k])
    }

    /// Keys and values that the rows see, each read once a work, queries and results.
    pub(super) fn mark_attention(
        &mut self,
        step: &CudaStep,
        kv: &Kv,
        [qkv, out]: [&Rows; 2],
    ) -> Result<(), DeviceError> {
        if self.profile.is_none() {
            return Ok(());
        }
        let heads = kv.shape.heads;
        let works = &step.meta.works;
        let seen: usize = works.iter().map(|work| work.start + work.rows.len()).sum();
        let pairs = |rows: usize, start: usize| rows * start + rows * (rows + 1) / 2;
        let pairs: usize = works.iter().map(|work| pairs(work.rows.len(), work.start)).sum();
        let bytes = 2 * (2 * seen * heads.n_kv * heads.dim + step.n_rows() * (qkv.width + out.width));
        self.mark("attention", bytes, 4 * pairs * heads.n_q * heads.dim)
    }

    /// Of the step that has landed just now.
    pub(super) fn op_times(&mut self) -> Result<Vec<OpTime>, DeviceError> {
        self.profile.as_mut().map_or(Ok(Vec::new()), Profile::times)
    }
}
