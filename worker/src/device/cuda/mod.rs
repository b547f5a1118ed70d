//! The CUDA device: one NVIDIA GPU a rank, weights, activations, keys and values in bf16, the residual stream in fp32.
//!
//! Matrix products are cuBLASLt's, sums over ranks NCCL's, everything else kernels of this repository. A step is a
//! sequence of launches on one stream after one copy of metadata, and nothing in it waits for the host: sampled ids stay
//! on the GPU for the next step, and a copy of them is on its way. Tokens are drawn and scored on the GPU; rows that want
//! more than there is room for are sampled by the host from their logits, with the code of the CPU device. A step with
//! such a row waits for the host once.

mod attention;
mod blas;
mod cache;
mod choices;
mod draws;
mod driver;
mod faults;
mod head;
mod kernels;
mod launch;
mod libs;
mod load;
mod memory;
mod nccl;
mod nvrtc;
mod ops;
mod options;
mod peaks;
mod product;
mod profile;
mod recording;
mod stopwatch;
mod upload;

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use self::{
    attention::Attention,
    blas::{Blas, CublasLt, Shape},
    choices::{Book, Identity},
    draws::Draws,
    driver::{Event, Gpu},
    head::{Flight, Head},
    load::Staging,
    memory::Memory,
    nccl::Comm,
    ops::Kernels,
    profile::Profile,
    recording::Recordings,
    stopwatch::Stopwatch,
    upload::Uploads,
};
use super::{AHEAD_MAX, Allocated, DeviceError, Heads, KvShape, Landed, StepMeta, VocabSplit, cpu::Exchange};
use crate::model::Shard;

pub use self::{
    choices::{ChoicesError, Products, Unfit},
    faults::KernelFault,
    kernels::{KernelError, KernelsArgs, make as make_kernels},
    libs::LibraryError,
    nccl::GroupId,
    options::{Chain, Options},
    peaks::{Peaks, measure as measure_peaks},
    product::{ProductCheck, check_products},
};

/// Sets what NVIDIA's libraries read when they are opened. No NVLink multicast: a program that ends badly while it uses
/// that can leave the machine's GPUs unusable. All connections between ranks at the start: made at first use, they would
/// make a rank wait for another one in the middle of a step.
///
/// # Safety
/// The process has one thread.
pub unsafe fn prepare_environment() {
    // SAFETY: the caller's promise.
    unsafe {
        std::env::set_var("NCCL_NVLS_ENABLE", "0");
        std::env::set_var("NCCL_RUNTIME_CONNECT", "0");
    }
}

/// Bytes of a bf16 number.
const BF16: usize = 2;
/// Bytes of an fp32 number.
const F32: usize = 4;

/// What a rank's device is made of.
#[derive(Clone, Debug)]
pub struct CudaSpec {
    /// This rank of those that run; it has the GPU of its number.
    pub shard: Shard,
    /// Ranks that the model is divided among: more than run where one of them is measured alone.
    pub divided: usize,
    /// Tokens of the model, which may be more than the ranks that run have.
    pub vocabulary: usize,
    /// Slots, and works in one step.
    pub max_running: usize,
    /// Rows of the largest step.
    pub max_rows: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Tokens in one block.
    pub block_tokens: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Of this rank.
    pub heads: Heads,
    /// Neurons of this rank in a layer's feed-forward network.
    pub inner: usize,
    /// The vocabulary over the ranks.
    pub split: VocabSplit,
    /// How it computes.
    pub options: Options,
}

impl CudaSpec {
    /// What choices of ways to multiply hold for: the same on all ranks of a group.
    fn identity(&self, gpu: &Gpu, library: &CublasLt) -> Identity {
        let heads = self.heads;
        Identity(vec![
            format!("gpu {}", gpu.name),
            format!("architecture {}", kernels::arch(gpu.capability)),
            format!("multiprocessors {}", gpu.n_sm),
            format!("cublaslt {}", library.version_number()),
            format!("kernel {}", kernels::source_hash(product::SOURCE)),
            format!(
                "model ranks={} hidden={} query-heads={} key-heads={} head={} inner={} vocabulary={}",
                self.divided, self.hidden, heads.n_q, heads.n_kv, heads.dim, self.inner, self.vocabulary
            ),
        ])
    }
}

/// One rank on one GPU.
pub struct CudaDevice {
    spec: CudaSpec,
    gpu: Arc<Gpu>,
    kernels: Kernels,
    blas: Blas,
    /// Products that our own kernel computes.
    own_products: HashSet<Shape>,
    /// In a group of several.
    comm: Option<Comm>,
    exchange: Arc<Exchange>,
    staging: Staging,
    /// Cosines and sines of a step's rows.
    turns: Memory,
    uploads: Uploads,
    attention: Attention,
    head: Head,
    draws: Draws,
    recordings: Recordings,
    /// Of exchanges between ranks; off in a group of one.
    stopwatch: Stopwatch<Event>,
    /// The block that rows without meaning write to.
    spare_block: u32,
    /// A point that the host waits for within a step.
    reached: Event,
    /// Queued steps that have not landed, oldest first.
    flights: VecDeque<Flight>,
    /// Steps that landed early, because the host had to see their tokens.
    landed: VecDeque<Landed>,
    /// Which of the buffers that take turns the next step has.
    side: usize,
    allocated: Allocated,
    disturbed: bool,
    profile: Option<Profile>,
}

/// Weights `[outs, ins]`.
pub struct Matrix {
    outs: usize,
    ins: usize,
    memory: Memory,
}

/// fp32 numbers.
pub struct Vector {
    len: usize,
    memory: Memory,
}

/// Activations: dense rows.
pub struct Rows {
    width: usize,
    memory: Memory,
}

/// Keys and values: for each layer all keys, then all values, `[block][head][token][dim]` each.
pub struct Kv {
    shape: KvShape,
    memory: Memory,
    /// For the copy engine, a layer's keys and its values after each other; where a kernel uses it.
    maps: Option<Memory>,
}

impl Kv {
    /// Bytes of one layer's keys, with those of a block that nobody reads.
    fn half_bytes(shape: &KvShape) -> usize {
        (shape.n_blocks + 1) * shape.block_tokens * shape.heads.n_kv * shape.heads.dim * BF16
    }

    /// Where a layer's keys and values begin.
    fn layer(&self, layer: usize) -> [u64; 2] {
        let half = Self::half_bytes(&self.shape);
        [2 * layer * half, (2 * layer + 1) * half].map(|at| self.memory.at(at))
    }
}

/// An uploaded step.
pub struct CudaStep {
    meta: Arc<StepMeta>,
    /// Which of the buffers that take turns it has.
    side: usize,
    /// Where its arrays are on the GPU.
    on_gpu: upload::Arrays,
    /// Rows, with those that only fill a recorded size.
    n_rows: usize,
    /// Asked rows, with those that only fill a recorded size.
    n_asks: usize,
    /// Works of one row, which come first among the uploaded works.
    n_single: u32,
    /// Tiles of the works of several rows.
    n_tiles: u32,
    /// Laid out as a recording has it.
    fixed: bool,
    /// Rotary frequencies, and how many.
    inv_freq: (u64, usize),
}

impl CudaStep {
    fn n_rows(&self) -> usize {
        self.n_rows
    }
}

impl CudaDevice {
    /// Opens the rank's GPU, loads or compiles the kernels, and meets the other ranks. Call it on the thread that will
    /// use the device.
    ///
    /// # Errors
    /// The driver, a library or the GPU is missing or too old, kernels cannot be made, or memory runs out.
    pub fn new(spec: CudaSpec, id: Option<GroupId>, exchange: Arc<Exchange>) -> Result<Self, DeviceError> {
        let rank = spec.shard.rank;
        let gpu = Gpu::open(rank, spec.options.debug)?;
        let kernels = Kernels::load(&gpu, spec.options.chains(spec.divided))?;
        let identity = spec.identity(&gpu, CublasLt::get()?);
        let folder = cache::folder("products");
        let book = Book::open(&spec.options.products, identity, rank, folder, product::is_skinny)?;
        let blas = Blas::new(&gpu, book)?;
        let comm = id
            .map(|id| Comm::join(&gpu, id, rank, spec.shard.of))
            .transpose()?;
        // SAFETY: ranks use each other's areas only after a meeting, and this rank has not been to one yet.
        unsafe {
            exchange.allocate_logits(rank, spec.split.range(rank).len())?;
            gpu.lock(exchange.logits_mut(rank).all_mut().0)?;
        }
        let uploads = Uploads::new(&gpu, &spec)?;
        let attention = Attention::new(&gpu, &spec)?;
        let head = Head::new(&gpu, &spec)?;
        let draws = Draws::new(&gpu, &spec)?;
        let staging = Staging::new(&gpu)?;
        let turns = gpu.alloc(turns_bytes(&spec), "rotary embedding")?;
        let workspace = blas::WORKSPACE_BYTES
            + turns.bytes
            + uploads.bytes()
            + attention.bytes()
            + head.bytes()
            + draws.bytes();
        tracing::info!(
            rank,
            gpu = gpu.name,
            compute_capability = format!("{}.{}", gpu.capability / 10, gpu.capability % 10),
            "GPU opened"
        );
        Ok(Self {
            reached: gpu.event(false)?,
            flights: VecDeque::new(),
            landed: VecDeque::new(),
            side: 0,
            recordings: Recordings::default(),
            stopwatch: Stopwatch::off(),
            spare_block: 0,
            allocated: Allocated {
                workspace: workspace as u64,
                ..Allocated::default()
            },
            disturbed: false,
            profile: spec.options.profile.then(|| Profile::new(&gpu)).transpose()?,
            spec,
            gpu,
            kernels,
            blas,
            own_products: HashSet::new(),
            comm,
            exchange,
            staging,
            turns,
            uploads,
            attention,
            head,
            draws,
        })
    }

    /// Waits until the GPU has done everything so far, or another rank has failed.
    fn settle(&self) -> Result<(), DeviceError> {
        self.reached.record()?;
        self.await_event(&self.reached)
    }

    fn await_event(&self, event: &Event) -> Result<(), DeviceError> {
        while !event.reached()? {
            if self.exchange.is_closed() {
                return Err(DeviceError::Interrupted);
            }
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// An error with the steps that it may have come from, where a kernel has failed: calls of libraries say only that they
    /// did.
    fn explain_fault(&self, error: DeviceError, launching: Option<&StepMeta>) -> DeviceError {
        let debug = self.spec.options.debug;
        let fault = match error {
            // Kernels were waited for, so it is the call's own.
            DeviceError::Fault(fault) if debug => return fault.of_the_call(),
            DeviceError::Fault(fault) => fault,
            DeviceError::Cuda(text) if !debug => match self.reached.reached() {
                Err(DeviceError::Fault(fault)) => fault.told_by(&text),
                _ => return DeviceError::Cuda(text),
            },
            other => return other,
        };
        let flights = self.flights.iter();
        let queued = flights.map(|flight| faults::describe(&flight.meta, flight.replayed));
        let launching = launching.map(|meta| faults::describe(meta, self.recorded_layout(meta).is_some()));
        fault.in_steps(queued.chain(launching).collect()).into()
    }

    /// The buffers of the next step, which no step uses any more.
    fn take_side(&mut self) -> usize {
        assert!(
            self.flights.len() + self.landed.len() < AHEAD_MAX,
            "a step lands before so many more are queued"
        );
        self.side = (self.side + 1) % AHEAD_MAX;
        self.side
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // An exchange that waits for a rank that has failed ends when the group is left, and not before. Recordings hold
        // exchanges, so they go first.
        if self.comm.is_some() && self.settle().is_err() {
            self.recordings = Recordings::default();
            self.comm = None;
        }
        // A GPU that failed does not come to the end; then nothing is copied any more either.
        let _ = self.gpu.wait();
        // SAFETY: the ranks' threads end one after the other, and this rank's area is its own.
        let (area, _) = unsafe { self.exchange.logits_mut(self.spec.shard.rank) }.all_mut();
        self.gpu.unlock(area);
    }
}

/// A cosine and a sine for each pair of a head, for the rows of the largest step.
fn turns_bytes(spec: &CudaSpec) -> usize {
    spec.max_rows * spec.heads.dim * F32
}

/// Bytes that a rank's device will allocate beside weights, keys and values.
pub fn workspace_bytes(spec: &CudaSpec) -> u64 {
    let heads = spec.heads;
    // Normed and partial rows, queries with keys and values, attention's output, gate with up, and their product.
    let row = 2 * spec.hidden + heads.qkv_width() + heads.n_q * heads.dim + 3 * spec.inner;
    let activations = spec.max_rows * (row * BF16 + spec.hidden * F32);
    let others = blas::WORKSPACE_BYTES
        + turns_bytes(spec)
        + upload::planned_bytes(spec)
        + attention::planned_bytes(spec)
        + head::planned_bytes(spec)
        + draws::planned_bytes(spec);
    (activations + others) as u64
}

/// GPUs of this machine, as a group of `n_ranks` finds them.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Of the smallest.
    pub total_bytes: u64,
    /// Of the fullest.
    pub free_bytes: u64,
    /// Of the first.
    pub name: String,
}

/// Opens the driver, every library, and each rank's GPU, and looks at their memory.
///
/// # Errors
/// The first thing that is missing, too old, or does not work.
pub fn survey(n_ranks: usize) -> Result<Survey, DeviceError> {
    driver::Driver::get()?; // first: without it nothing else matters
    blas::CublasLt::get()?;
    if n_ranks > 1 {
        nccl::Nccl::get()?;
    }
    let mut survey: Option<Survey> = None;
    for rank in 0..n_ranks {
        let gpu = Gpu::open(rank, false)?;
        let (free, total) = gpu.memory()?;
        let so_far = survey.get_or_insert_with(|| Survey {
            total_bytes: u64::MAX,
            free_bytes: u64::MAX,
            name: gpu.name.clone(),
        });
        so_far.total_bytes = so_far.total_bytes.min(total as u64);
        so_far.free_bytes = so_far.free_bytes.min(free as u64);
    }
    survey.ok_or_else(|| DeviceError::Cuda("a group has at least one rank".into()))
}

/// Whether this machine has a GPU that can be used; what is wrong if not.
///
/// # Errors
/// As for [`survey`].
pub fn available() -> Result<(), DeviceError> {
    survey(1).map(drop)
}
