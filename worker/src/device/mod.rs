//! What a forward pass needs of a machine: seven operations, each over all rows of a step.
//!
//! The grain is that of fused GPU kernels, so that one trait serves CPUs and GPUs: buffers are opaque and allocated once, a step's metadata is uploaded once, nothing returns to the host but sampled
//! tokens and asked-for scores. An implementation belongs to one rank of a tensor-parallel group and exchanges data
//! with the other ranks inside the operations that say so; ranks call them in the same order.
//!
//! Two promises bind every implementation. A row's result does not depend on which other rows share the step, nor on
//! where a prompt is cut into chunks: to the last bit on CPUs, within the rounding of bf16 on GPUs, whose libraries
//! multiply few rows in another order than many. And after each exchange all ranks hold the same bits.

pub mod cpu;
pub mod cuda;
mod part;
mod step;

use std::{ops::Range, sync::Arc};

pub use part::{Part, RandomTensor, Source};
pub use step::{BadStep, HeadAsk, HeadOut, HeadUse, Landed, OpTime, RowToken, StepMeta, StepShape, WorkMeta};

/// Steps that a device may have been given before the first of them has landed.
pub const AHEAD_MAX: usize = 2;

/// Heads of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n_q: usize,
    /// Heads of keys and values; divides `n_q`.
    pub n_kv: usize,
    /// Numbers in one head; even.
    pub dim: usize,
}

impl Heads {
    /// Numbers in a row of queries, then keys, then values.
    pub fn qkv_width(&self) -> usize {
        (self.n_q + 2 * self.n_kv) * self.dim
    }
}

/// The pool of keys and values of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of the model.
    pub n_layers: usize,
    /// Blocks in the pool.
    pub n_blocks: usize,
    /// Tokens in one block.
    pub block_tokens: usize,
    /// Heads of this rank.
    pub heads: Heads,
}

/// How the ranks divide a vocabulary: rank `r` holds tokens `bounds[r]..bounds[r + 1]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabSplit {
    bounds: Vec<usize>,
}

impl VocabSplit {
    /// As even as any vocabulary size allows; shards differ by one token at most.
    pub fn new(n_vocab: usize, n_ranks: usize) -> Self {
        Self {
            bounds: (0..=n_ranks).map(|rank| n_vocab * rank / n_ranks).collect(),
        }
    }

    /// Tokens of one rank.
    pub fn range(&self, rank: usize) -> Range<usize> {
        self.bounds[rank]..self.bounds[rank + 1]
    }

    /// The rank that holds `token`.
    pub fn owner(&self, token: usize) -> usize {
        self.bounds.partition_point(|&bound| bound <= token) - 1
    }

    /// All tokens.
    pub fn n_vocab(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }

    /// Tokens of the largest shard.
    pub fn widest(&self) -> usize {
        self.bounds.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0)
    }
}

/// A root-mean-square norm: its weights and its epsilon.
pub struct Norm<V> {
    /// One weight a column.
    pub weight: V,
    /// Added to the mean square.
    pub eps: f32,
}

/// Why a step could not be finished on a rank.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The exchange was closed under this rank; the cause is elsewhere.
    #[error("another rank failed")]
    Interrupted,
    /// Ranks that must agree do not.
    #[error("its residual stream differs from rank {0}'s")]
    Diverged(usize),
    /// The model computed something that is not a number.
    #[error("the logits of sequence {seq} at position {position} are not finite numbers")]
    NotFinite {
        /// Whose.
        seq: u64,
        /// Of the row in its sequence.
        position: u32,
    },
    /// The ways to multiply are not those that were asked for.
    #[error(transparent)]
    Choices(#[from] cuda::ChoicesError),
    /// A GPU, or a library that drives it, failed. The message names the call or the kernel.
    #[error("{0}")]
    Cuda(String),
    /// A kernel of a GPU failed some time after its launch.
    #[error("{0}")]
    Fault(cuda::KernelFault),
    /// A library that drives GPUs cannot be used.
    #[error(transparent)]
    Library(#[from] cuda::LibraryError),
    /// Memory ran out while buffers were made.
    #[error("{bytes} bytes for {what} could not be allocated; lower the memory for keys and values")]
    OutOfMemory {
        /// Of the refused allocation.
        bytes: usize,
        /// What it was for.
        what: &'static str,
    },
}

impl From<cuda::KernelFault> for DeviceError {
    fn from(fault: cuda::KernelFault) -> Self {
        Self::Fault(fault)
    }
}

/// Bytes that a device has allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Weights.
    pub weights: u64,
    /// Keys and values.
    pub kv: u64,
    /// Activations, scratch, and this rank's part of the exchange.
    pub workspace: u64,
}

/// Bytes of a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineMemory {
    /// All.
    pub total: u64,
    /// Used by nobody.
    pub free: u64,
}

/// One rank's machine.
///
/// Widths and row counts must fit the buffers; implementations assert it. `Rows` have room for the largest step.
pub trait Device {
    /// A weight matrix `[outs, ins]` of a linear map, or an embedding table; laid out as the device likes.
    type Matrix;
    /// A vector of weights.
    type Vector;
    /// Activations: one row of fixed width for each row of a step.
    type Rows;
    /// Keys and values of all layers: one allocation for the life of the device.
    type Kv;
    /// A step's metadata, uploaded.
    type Step;

    /// An all-zero matrix to be filled.
    ///
    /// # Errors
    /// If memory runs out.
    fn matrix(&mut self, outs: usize, ins: usize) -> Result<Self::Matrix, DeviceError>;

    /// Sets outputs `first_out..` to the rows of `part`, whose width is the matrix's.
    ///
    /// # Errors
    /// If the device fails.
    fn fill(
        &mut self,
        matrix: &mut Self::Matrix,
        first_out: usize,
        part: &Part<'_>,
    ) -> Result<(), DeviceError>;

    /// A vector with these values.
    ///
    /// # Errors
    /// If memory runs out.
    fn vector(&mut self, values: &[f32]) -> Result<Self::Vector, DeviceError>;

    /// Activations of this width, for the largest step.
    ///
    /// # Errors
    /// If memory runs out.
    fn rows(&mut self, width: usize) -> Result<Self::Rows, DeviceError>;

    /// The residual stream, which sums many small numbers: a device may keep it in more digits than other rows.
    ///
    /// # Errors
    /// If memory runs out.
    fn residual(&mut self, width: usize) -> Result<Self::Rows, DeviceError> {
        self.rows(width)
    }

    /// The pool of keys and values.
    ///
    /// # Errors
    /// If memory runs out.
    fn kv(&mut self, shape: KvShape) -> Result<Self::Kv, DeviceError>;

    /// Fills the pool with random numbers, for measuring attention over what nobody computed.
    ///
    /// # Errors
    /// If the device fails.
    fn randomise(&mut self, kv: &mut Self::Kv) -> Result<(), DeviceError>;

    /// Bytes allocated so far.
    fn allocated(&self) -> Allocated;

    /// Memory of the machine, where it is the rank's own.
    ///
    /// # Errors
    /// If the device fails.
    fn memory(&self) -> Result<MachineMemory, DeviceError> {
        Ok(MachineMemory::default())
    }

    /// Test instrument: makes this rank's residual stream differ from the others' from now on.
    fn disturb(&mut self);

    /// Uploads a step: once, for all layers. `inv_freq` holds the `half` rotary frequencies of a head.
    ///
    /// # Errors
    /// If the device fails.
    fn begin(
        &mut self,
        meta: Arc<StepMeta>,
        inv_freq: &Self::Vector,
        half: usize,
    ) -> Result<Self::Step, DeviceError>;

    /// Exchange. `residual` becomes the rows' embeddings, `normed` their norm. `table` holds this rank's tokens.
    ///
    /// # Errors
    /// If another rank failed.
    fn embed_norm(
        &mut self,
        step: &Self::Step,
        table: &Self::Matrix,
        split: &VocabSplit,
        norm: &Norm<Self::Vector>,
        residual: &mut Self::Rows,
        normed: &mut Self::Rows,
    ) -> Result<(), DeviceError>;

    /// `out = x · wᵀ`, one matrix product over all rows of the step.
    ///
    /// # Errors
    /// If the device fails.
    fn linear(
        &mut self,
        step: &Self::Step,
        x: &Self::Rows,
        w: &Self::Matrix,
        out: &mut Self::Rows,
    ) -> Result<(), DeviceError>;

    /// Makes ready for products of these shapes, with steps of any size, before the first step. All ranks call it alike.
    ///
    /// # Errors
    /// If the device fails.
    fn prepare(&mut self, _x: &Self::Rows, _w: &Self::Matrix, _out: &Self::Rows) -> Result<(), DeviceError> {
        Ok(())
    }

    /// As [`Device::prepare`], for the head, which comes last.
    ///
    /// # Errors
    /// If the device fails.
    fn prepare_head(&mut self, _head: &Self::Matrix) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Rotates queries (in place) and keys, and writes keys and values to the rows' places in the pool.
    ///
    /// # Errors
    /// If the device fails.
    fn rope_write(
        &mut self,
        step: &Self::Step,
        layer: usize,
        heads: Heads,
        qkv: &mut Self::Rows,
        kv: &mut Self::Kv,
    ) -> Result<(), DeviceError>;

    /// Causal attention of every row over the blocks of its sequence; `out` is `[rows, n_q * dim]`.
    ///
    /// # Errors
    /// If the device fails.
    fn attention(
        &mut self,
        step: &Self::Step,
        layer: usize,
        heads: Heads,
        qkv: &Self::Rows,
        kv: &Self::Kv,
        out: &mut Self::Rows,
    ) -> Result<(), DeviceError>;

    /// `out = silu(gate) * up`; `gate_up` holds both side by side.
    ///
    /// # Errors
    /// If the device fails.
    fn silu_mul(
        &mut self,
        step: &Self::Step,
        gate_up: &Self::Rows,
        out: &mut Self::Rows,
    ) -> Result<(), DeviceError>;

    /// Exchange. `residual +=` the sum over ranks of `partial`, in rank order; `normed` becomes its norm.
    ///
    /// # Errors
    /// If another rank failed.
    fn reduce_add_norm(
        &mut self,
        step: &Self::Step,
        partial: &Self::Rows,
        norm: &Norm<Self::Vector>,
        residual: &mut Self::Rows,
        normed: &mut Self::Rows,
    ) -> Result<(), DeviceError>;

    /// Sizes of steps of single rows whose forward pass this device wants recorded before the first step.
    fn recordable(&self) -> Vec<usize> {
        Vec::new()
    }

    /// Lets `pass` run a step of `rows` rows that mean nothing, and keeps what it launches, to be run again at once by
    /// [`Device::replay`]. All ranks call it alike.
    ///
    /// # Errors
    /// If the device fails. What cannot be recorded is not, and its steps are launched as any others.
    fn record(
        &mut self,
        _rows: usize,
        _rotary: (&Self::Vector, usize),
        _pass: impl FnMut(&mut Self, &Self::Step) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError>
    where
        Self: Sized,
    {
        Ok(())
    }

    /// Runs a step's whole forward pass from a recording; false if there is none for it, and nothing was done.
    ///
    /// # Errors
    /// If the device fails.
    fn replay(&mut self, _step: &Self::Step) -> Result<bool, DeviceError> {
        Ok(false)
    }

    /// Exchange. The part of [`Device::head_sample`] that can be recorded with the layers before it.
    ///
    /// # Errors
    /// If another rank failed.
    fn head(
        &mut self,
        _step: &Self::Step,
        _residual: &Self::Rows,
        _normed: &Self::Rows,
        _head: &Self::Matrix,
        _split: &VocabSplit,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Exchange. Logits of the asked rows alone, from the vocabulary-sharded head; samples and scores them, and keeps
    /// each slot's sampled token for the next step. This ends a step: what came of it is fetched with
    /// [`Device::land`], and a device that runs by itself may return before it has computed anything.
    ///
    /// # Errors
    /// If another rank failed, or logits are not finite.
    fn head_sample(
        &mut self,
        step: Self::Step,
        residual: &Self::Rows,
        normed: &Self::Rows,
        head: &Self::Matrix,
        split: &VocabSplit,
    ) -> Result<(), DeviceError>;

    /// An error of a step with what is known of where it comes from; `launching` is the step that was being given when it
    /// came.
    fn explain(&self, error: DeviceError, _launching: Option<&StepMeta>) -> DeviceError {
        error
    }

    /// What came of the oldest step that has not landed; `None` if it is still computed. At most [`AHEAD_MAX`] steps
    /// may be waiting to land.
    ///
    /// # Errors
    /// If another rank failed, the device failed, or logits are not finite.
    fn land(&mut self) -> Result<Option<Landed>, DeviceError>;
}
