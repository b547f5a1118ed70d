//! What this GPU gives at best: bytes copied, and multiplications of a large matrix product. Every measured speed is
//! told beside these, because GPUs of one name differ and a fraction travels better than milliseconds.

use super::{
    BF16,
    blas::{Blas, Operands, Out, Shape},
    choices::Book,
    driver::Gpu,
    ops::Kernels,
};
use crate::device::DeviceError;

/// Ceilings of one GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Peaks {
    /// What its maker calls it.
    pub name: String,
    /// A copy within the GPU's memory, bytes read and written.
    pub bytes_per_s: f64,
    /// Reading alone.
    pub read_bytes_per_s: f64,
    /// A matrix product of 8192 x 8192 x 8192 bf16 numbers, a multiplication with its addition as two.
    pub flops_per_s: f64,
}

const COPY_BYTES: usize = 2 << 30;
const SIDE: usize = 8192;
const ROUNDS: usize = 9;

/// Measures the first GPU.
///
/// # Errors
/// If there is none, or it has not got 4 GiB.
pub fn measure() -> Result<Peaks, DeviceError> {
    let gpu = Gpu::open(0, false)?;
    let kernels = Kernels::load(&gpu, false)?;
    let mut blas = Blas::new(&gpu, Book::first())?;
    let memory = [
        gpu.zeroed(COPY_BYTES, "a copy")?,
        gpu.zeroed(COPY_BYTES, "a copy")?,
    ];
    let [a, b] = memory.each_ref().map(|memory| memory.address);
    let copy = median(&gpu, || gpu.copy_within(b, a, COPY_BYTES))?;
    let read = median(&gpu, || read_stream(&gpu, &kernels, [a, b]))?;
    // Random numbers: zeros multiply faster.
    for (n, to) in [a, a + (SIDE * SIDE * BF16) as u64].into_iter().enumerate() {
        kernels.fill(&gpu, to, n as u64, (SIDE, SIDE))?;
    }
    let shape = Shape {
        m: SIDE,
        n: SIDE,
        k: SIDE,
        out: Out::Bf16,
    };
    let operands = Operands {
        x: a,
        w: a + (SIDE * SIDE * BF16) as u64,
        out: b,
    };
    let product = median(&gpu, || blas.multiply(shape, operands))?;
    Ok(Peaks {
        name: gpu.name.clone(),
        bytes_per_s: 2.0 * COPY_BYTES as f64 / copy,
        read_bytes_per_s: COPY_BYTES as f64 / read,
        flops_per_s: 2.0 * (SIDE as f64).powi(3) / product,
    })
}

fn read_stream(gpu: &Gpu, kernels: &Kernels, [from, sink]: [u64; 2]) -> Result<(), DeviceError> {
    /// Of a block; as many blocks as a multiprocessor holds.
    const THREADS: u32 = 512;
    const BLOCKS: u32 = 4;
    const VECTOR_BYTES: usize = 16;
    let mut arguments = [
        from.into(),
        ((COPY_BYTES / VECTOR_BYTES) as u64).into(),
        sink.into(),
    ];
    let grid = [BLOCKS * gpu.n_sm, 1, 1];
    // SAFETY: the parameters of `read_stream`; `from` has so many vectors, `sink` a word.
    unsafe { gpu.launch(&kernels.read_stream, grid, [THREADS, 1, 1], 0, &mut arguments) }
}

/// Median seconds of a launch, after three to warm up.
fn median(
    gpu: &std::sync::Arc<Gpu>,
    mut launch: impl FnMut() -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    let (start, end) = (gpu.event(true)?, gpu.event(true)?);
    let mut times = Vec::new();
    for round in 0..3 + ROUNDS {
        start.record()?;
        launch()?;
        end.record()?;
        end.wait()?;
        if round >= 3 {
            times.push(end.seconds_since(&start)?);
        }
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
