//! The operations of a forward pass, each one or two launches.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::{
    BF16, CudaDevice, CudaStep, F32, Kv, Matrix, Rows, Vector, attention,
    attention::{HOPPER_SHARED, tile_shared},
    blas::{Operands, Out, Shape, size},
    driver::Gpu,
    kernels::{KernelError, SOURCES, SourceFile, arch, machine_code},
    launch::{Arg, Kernel, Module},
    memory::Memory,
    nccl::{Comm, Numbers},
    stopwatch::Stopwatch,
};
use crate::device::{
    Allocated, Device, DeviceError, Heads, KvShape, Landed, MachineMemory, Norm, Part, RandomTensor, Source,
    StepMeta, VocabSplit,
};

/// Threads of a block of most kernels.
pub(super) const THREADS: u32 = 256;
/// Sizes of steps up to this are made ready for at start; of longer ones the first of each size takes a little longer.
const PREPARED_ROWS: usize = 2048;
/// Widths that kernels read and write sixteen bytes at a time.
const VECTOR: usize = 8;

/// All kernels of one GPU.
pub(super) struct Kernels {
    pub(super) embed: Kernel,
    pub(super) fill_random: Kernel,
    pub(super) read_stream: Kernel,
    pub(super) add_norm: Kernel,
    pub(super) silu_mul: Kernel,
    turns: Kernel,
    rope_write: Kernel,
    /// For head sizes of 64 and 128.
    single: [Kernel; 2],
    tiles: [Kernel; 2],
    /// For Hopper, and some shapes: see `attention.rs`.
    pub(super) hopper_tiles: Option<Kernel>,
    pub(super) attend_any: Kernel,
    pub(super) merge_parts: Kernel,
    pub(super) gather_rows: Kernel,
    pub(super) argmax_parts: Kernel,
    pub(super) argmax_merge: Kernel,
    pub(super) fingerprint: Kernel,
    pub(super) survey_rows: Kernel,
    pub(super) sample_rows: Kernel,
    pub(super) count_tokens: Kernel,
    /// Of few rows: by the numbers of the result, bf16 and fp32, and up to 8 and 16 rows.
    pub(super) products: [[Kernel; 2]; 2],
}

impl Kernels {
    /// Loads all kernels, compiling what no cache has.
    /// Those of the forward pass are chained where the architecture can do it and `chain` allows it.
    pub(super) fn load(gpu: &Gpu, chain: bool) -> Result<Self, DeviceError> {
        // Ranks start together; the first compiles, the others find its files.
        static ONE_COMPILES: Mutex<()> = Mutex::new(());
        let arch = arch(gpu.capability);
        let files: Vec<&SourceFile> = SOURCES.iter().filter(|file| file.is_for(&arch)).collect();
        let has = |file: &str| files.iter().any(|known| known.name == file);
        let code: Vec<Result<Vec<u8>, KernelError>> = {
            let _one = ONE_COMPILES.lock().unwrap_or_else(PoisonError::into_inner);
            files.par_iter().map(|file| machine_code(file, &arch)).collect()
        };
        let mut modules = Vec::new();
        for (file, code) in files.iter().zip(code) {
            let code = code.map_err(|error| DeviceError::Cuda(error.to_string()))?;
            modules.push((file.name, gpu.module(&code, file.name)?));
        }
        let kernel = |file: &str, name: &'static str, shared: u32| -> Result<Kernel, DeviceError> {
            let module: &Module = modules
                .iter()
                .find_map(|(name, module)| (*name == file).then_some(module))
                .expect("files that are not for every architecture are asked for where they are");
            gpu.kernel(module, name, shared)
        };
        let chain = chain && gpu.capability >= 90;
        let chained = |file: &str, name| kernel(file, name, 0).map(|kernel| kernel.chained(chain));
        Ok(Self {
            embed: chained("embed", "embed")?,
            fill_random: kernel("fill", "fill_random", 0)?,
            read_stream: kernel("stream", "read_stream", 0)?,
            add_norm: chained("norm", "add_norm")?,
            silu_mul: chained("norm", "silu_mul")?,
            turns: chained("rope", "turns")?,
            rope_write: chained("rope", "rope_write")?,
            single: [
                chained("attention", "attend_single_64")?,
                chained("attention", "attend_single_128")?,
            ],
            tiles: [
                kernel("prefill", "attend_tiles_64", tile_shared(64))?,
                kernel("prefill", "attend_tiles_128", tile_shared(128))?,
            ],
            hopper_tiles: has("hopper")
                .then(|| kernel("hopper", "attend_tiles_hopper", HOPPER_SHARED))
                .transpose()?,
            attend_any: kernel("attention", "attend_any", 0)?,
            merge_parts: chained("attention", "merge_parts")?,
            gather_rows: chained("head", "gather_rows")?,
            argmax_parts: chained("head", "argmax_parts")?,
            argmax_merge: chained("head", "argmax_merge")?,
            fingerprint: kernel("head", "fingerprint", 0)?,
            survey_rows: kernel("sample", "survey_rows", 0)?,
            sample_rows: kernel("sample", "sample_rows", 0)?,
            count_tokens: kernel("sample", "count_tokens", 0)?,
            products: [
                [chained("skinny", "product_8")?, chained("skinny", "product_16")?],
                [
                    chained("skinny", "product_8_f32")?,
                    chained("skinny", "product_16_f32")?,
                ],
            ],
        })
    }

    /// Attention of single rows with this head size.
    pub(super) fn attend_single(&self, dim: usize) -> &Kernel {
        &self.single[usize::from(dim == 128)]
    }

    /// Attention of tiles with this head size.
    pub(super) fn attend_tiles(&self, dim: usize) -> &Kernel {
        &self.tiles[usize::from(dim == 128)]
    }
}

impl Kernels {
    /// Puts part of a random tensor to `to`.
    fn fill_part(
        &self,
        gpu: &Gpu,
        to: u64,
        tensor: RandomTensor,
        part: &Part<'_>,
    ) -> Result<(), DeviceError> {
        let n = part.len() as u64;
        let mut arguments = [
            to.into(),
            tensor.key.into(),
            (part.rows.start as u64).into(),
            (part.columns.start as u64).into(),
            (tensor.width as u64).into(),
            (part.columns.len() as u64).into(),
            n.into(),
            tensor.unit.into(),
        ];
        let blocks = n.div_ceil(u64::from(THREADS)).min(16 * u64::from(gpu.n_sm)) as u32;
        // SAFETY: the parameters of `fill_random`; the caller has room for the part.
        unsafe {
            gpu.launch(
                &self.fill_random,
                [blocks.max(1), 1, 1],
                [THREADS, 1, 1],
                0,
                &mut arguments,
            )
        }
    }

    /// Puts a whole random matrix to `to`.
    pub(super) fn fill(
        &self,
        gpu: &Gpu,
        to: u64,
        key: u64,
        (rows, columns): (usize, usize),
    ) -> Result<(), DeviceError> {
        let tensor = RandomTensor {
            key,
            ..RandomTensor::new("", columns)
        };
        let part = Part {
            source: Source::Random(tensor),
            rows: 0..rows,
            columns: 0..columns,
        };
        self.fill_part(gpu, to, tensor, &part)
    }
}

/// Whether rows of this width can be read sixteen bytes at a time.
fn vectors(width: usize) -> u32 {
    u32::from(width.is_multiple_of(VECTOR))
}

impl CudaDevice {
    /// `residual +=` a sum over ranks that is there already, or nothing; `normed` becomes its norm.
    fn add_norm(
        &self,
        step: &CudaStep,
        partial: Option<&Rows>,
        norm: &Norm<Vector>,
        residual: &Rows,
        normed: &Rows,
    ) -> Result<(), DeviceError> {
        let width = residual.width;
        assert!(normed.width == width && norm.weight.len == width);
        let mut arguments = [
            (&residual.memory).into(),
            partial.map_or(0, |rows| rows.memory.address).into(),
            (&norm.weight.memory).into(),
            (&normed.memory).into(),
            norm.eps.into(),
            (width as u32).into(),
            vectors(width).into(),
        ];
        // SAFETY: the parameters of `add_norm`; the rows have room for the largest step.
        unsafe { self.row_blocks(&self.kernels.add_norm, step, &mut arguments) }
    }

    /// One block a row of the step.
    ///
    /// # Safety
    /// As for [`Gpu::launch`].
    unsafe fn row_blocks(
        &self,
        kernel: &Kernel,
        step: &CudaStep,
        arguments: &mut [Arg],
    ) -> Result<(), DeviceError> {
        let grid = [step.n_rows() as u32, 1, 1];
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(kernel, grid, [THREADS, 1, 1], 0, arguments) }
    }
}

impl Device for CudaDevice {
    type Matrix = Matrix;
    type Vector = Vector;
    type Rows = Rows;
    type Kv = Kv;
    type Step = CudaStep;

    fn matrix(&mut self, outs: usize, ins: usize) -> Result<Matrix, DeviceError> {
        let memory = self.gpu.alloc(outs * ins * BF16, "weights")?;
        self.allocated.weights += memory.bytes as u64;
        Ok(Matrix { outs, ins, memory })
    }

    fn fill(&mut self, matrix: &mut Matrix, first_out: usize, part: &Part<'_>) -> Result<(), DeviceError> {
        assert!(part.columns.len() == matrix.ins && first_out + part.rows.len() <= matrix.outs);
        let to = matrix.memory.at(first_out * matrix.ins * BF16);
        let Source::Random(tensor) = part.source else {
            return self.staging.copy(&self.gpu, to, part);
        };
        self.kernels.fill_part(&self.gpu, to, tensor, part)
    }

    fn vector(&mut self, values: &[f32]) -> Result<Vector, DeviceError> {
        let memory = self.gpu.alloc(size_of_val(values), "weights")?;
        self.gpu.copy_in(memory.address, values)?;
        self.gpu.wait()?; // the caller's numbers may go
        self.allocated.weights += memory.bytes as u64;
        Ok(Vector {
            len: values.len(),
            memory,
        })
    }

    fn rows(&mut self, width: usize) -> Result<Rows, DeviceError> {
        self.activations(width, BF16)
    }

    fn residual(&mut self, width: usize) -> Result<Rows, DeviceError> {
        self.activations(width, F32)
    }

    fn kv(&mut self, shape: KvShape) -> Result<Kv, DeviceError> {
        if !shape.block_tokens.is_power_of_two() {
            return Err(DeviceError::Cuda(format!(
                "blocks of {} tokens: on a GPU their number must be a power of two",
                shape.block_tokens
            )));
        }
        let spare = shape.n_blocks.checked_mul(shape.block_tokens);
        if spare.is_none_or(|place| u32::try_from(place).is_err()) {
            return Err(DeviceError::Cuda(format!(
                "{} blocks of {} tokens are too many to be numbered; lower the memory for keys and values",
                shape.n_blocks, shape.block_tokens
            )));
        }
        self.spare_block = shape.n_blocks as u32;
        self.make_stopwatch(shape.n_layers);
        let bytes = 2 * shape.n_layers * Kv::half_bytes(&shape);
        // Finite from the start: tiles read beyond a sequence's end, with weights of zero.
        let memory = self.gpu.zeroed(bytes, "keys and values")?;
        self.allocated.kv += bytes as u64;
        let mut kv = Kv {
            shape,
            memory,
            maps: None,
        };
        if self.kernels.hopper_tiles.is_some()
            && !self.spec.options.portable
            && attention::suits_hopper(&shape)
        {
            kv.maps = Some(self.maps(&kv)?);
        }
        tracing::info!(
            rank = self.spec.shard.rank,
            of_tiles = attention::chosen(&kv),
            "attention kernels chosen"
        );
        Ok(kv)
    }

    fn randomise(&mut self, kv: &mut Kv) -> Result<(), DeviceError> {
        let heads = kv.shape.heads;
        let rows = (kv.shape.n_blocks + 1) * kv.shape.block_tokens * heads.n_kv;
        for half in 0..2 * kv.shape.n_layers {
            let to = kv.memory.address + (half * Kv::half_bytes(&kv.shape)) as u64;
            self.kernels.fill(&self.gpu, to, half as u64, (rows, heads.dim))?;
        }
        Ok(())
    }

    fn allocated(&self) -> Allocated {
        self.allocated
    }

    fn memory(&self) -> Result<MachineMemory, DeviceError> {
        let (free, total) = self.gpu.memory()?;
        Ok(MachineMemory {
            total: total as u64,
            free: free as u64,
        })
    }

    fn disturb(&mut self) {
        self.disturbed = true;
    }

    fn begin(
        &mut self,
        meta: Arc<StepMeta>,
        inv_freq: &Vector,
        half: usize,
    ) -> Result<CudaStep, DeviceError> {
        let side = self.take_side();
        let layout = self.recorded_layout(&meta);
        self.begin_profile()?;
        let uploaded = self.uploads.upload(&self.gpu, &meta, side, layout)?;
        self.mark("upload", 0, 0)?;
        Ok(self.step(meta, side, uploaded, (inv_freq.memory.address, half)))
    }

    fn embed_norm(
        &mut self,
        step: &CudaStep,
        table: &Matrix,
        split: &VocabSplit,
        norm: &Norm<Vector>,
        residual: &mut Rows,
        normed: &mut Rows,
    ) -> Result<(), DeviceError> {
        let mine = split.range(self.spec.shard.rank);
        assert!(table.outs == mine.len() && table.ins == residual.width);
        let (inv_freq, half) = step.inv_freq;
        let mut arguments = [
            (&self.turns).into(),
            inv_freq.into(),
            step.on_gpu.positions.into(),
            (half as u32).into(),
        ];
        // SAFETY: the parameters of `turns`; there is room for the largest step.
        unsafe { self.row_blocks(&self.kernels.turns, step, &mut arguments)? };
        let mut arguments = [
            (&residual.memory).into(),
            (&table.memory).into(),
            step.on_gpu.tokens.into(),
            self.head.last().into(),
            (residual.width as u32).into(),
            (mine.start as u32).into(),
            (mine.len() as u32).into(),
        ];
        // SAFETY: the parameters of `embed`; tokens were checked against the vocabulary.
        unsafe { self.row_blocks(&self.kernels.embed, step, &mut arguments)? };
        // All ranks but one add zeros, so the sum is exact.
        let (at, n) = (residual.memory.address, step.n_rows() * residual.width);
        self.between_ranks("ncclAllReduce", |comm| comm.sum(at, n, Numbers::F32))?;
        self.add_norm(step, None, norm, residual, normed)?;
        self.mark(
            "embedding and first norm",
            step.n_rows() * residual.width * 3 * BF16,
            0,
        )
    }

    fn linear(&mut self, step: &CudaStep, x: &Rows, w: &Matrix, out: &mut Rows) -> Result<(), DeviceError> {
        assert!(x.width == w.ins && out.width == w.outs);
        let shape = Shape {
            m: size(step.n_rows()).min(self.spec.max_rows),
            n: w.outs,
            k: w.ins,
            out: Out::Bf16,
        };
        let operands = Operands {
            x: x.memory.address,
            w: w.memory.address,
            out: out.memory.address,
        };
        self.multiply(shape, operands)?;
        self.mark_product(shape)
    }

    fn prepare(&mut self, x: &Rows, w: &Matrix, out: &Rows) -> Result<(), DeviceError> {
        assert!(x.width == w.ins && out.width == w.outs);
        let operands = Operands {
            x: x.memory.address,
            w: w.memory.address,
            out: out.memory.address,
        };
        let most = self.spec.max_rows.min(PREPARED_ROWS);
        let weights = (w.outs, w.ins, Out::Bf16);
        self.blas.prepare(most, self.spec.max_rows, weights, operands)?;
        self.try_own(self.spec.max_rows, weights, operands)
    }

    fn prepare_head(&mut self, head: &Matrix) -> Result<(), DeviceError> {
        let operands = self.head.operands(head);
        let most = self.head.batch();
        let weights = (head.outs, head.ins, Out::F32);
        self.blas.prepare(most, most, weights, operands)?;
        self.try_own(most, weights, operands)?;
        self.keep_choices();
        Ok(())
    }

    fn rope_write(
        &mut self,
        step: &CudaStep,
        layer: usize,
        heads: Heads,
        qkv: &mut Rows,
        kv: &mut Kv,
    ) -> Result<(), DeviceError> {
        assert_eq!(qkv.width, heads.qkv_width());
        let [keys, values] = kv.layer(layer);
        let mut arguments = [
            (&qkv.memory).into(),
            keys.into(),
            values.into(),
            (&self.turns).into(),
            step.on_gpu.places.into(),
            (heads.n_q as u32).into(),
            (heads.n_kv as u32).into(),
            (heads.dim as u32).into(),
            (kv.shape.block_tokens as u32).into(),
        ];
        let pairs = (heads.n_q + 2 * heads.n_kv) * heads.dim / 2;
        let grid = [
            step.n_rows() as u32,
            pairs.div_ceil(2 * THREADS as usize) as u32,
            1,
        ];
        // SAFETY: the parameters of `rope_write`; places were checked against the pool, and differ between rows.
        unsafe {
            self.gpu
                .launch(&self.kernels.rope_write, grid, [THREADS, 1, 1], 0, &mut arguments)?;
        }
        self.mark("rope_write", 2 * step.n_rows() * qkv.width * BF16, 0)
    }

    fn attention(
        &mut self,
        step: &CudaStep,
        layer: usize,
        heads: Heads,
        qkv: &Rows,
        kv: &Kv,
        out: &mut Rows,
    ) -> Result<(), DeviceError> {
        assert!(qkv.width == heads.qkv_width() && out.width == heads.n_q * heads.dim);
        let on = (&*self.gpu, &self.kernels);
        self.attention.attend(on, step, layer, qkv, kv, out)?;
        self.mark_attention(step, kv, [qkv, out])
    }

    fn silu_mul(&mut self, step: &CudaStep, gate_up: &Rows, out: &mut Rows) -> Result<(), DeviceError> {
        let width = out.width;
        assert_eq!(gate_up.width, 2 * width);
        let mut arguments = [
            (&gate_up.memory).into(),
            (&out.memory).into(),
            (width as u32).into(),
            vectors(width).into(),
        ];
        let a_block = THREADS as usize * if vectors(width) == 1 { VECTOR } else { 1 };
        let grid = [width.div_ceil(a_block) as u32, step.n_rows() as u32, 1];
        // SAFETY: the parameters of `silu_mul`.
        unsafe {
            self.gpu
                .launch(&self.kernels.silu_mul, grid, [THREADS, 1, 1], 0, &mut arguments)?;
        }
        self.mark("silu_mul", 3 * step.n_rows() * width * BF16, 0)
    }

    fn reduce_add_norm(
        &mut self,
        step: &CudaStep,
        partial: &Rows,
        norm: &Norm<Vector>,
        residual: &mut Rows,
        normed: &mut Rows,
    ) -> Result<(), DeviceError> {
        assert_eq!(partial.width, residual.width);
        if self.disturbed {
            self.gpu.copy_in(residual.memory.address, &[1f32])?;
            self.gpu.wait()?;
        }
        let (at, n) = (partial.memory.address, step.n_rows() * partial.width);
        self.between_ranks("ncclAllReduce", |comm| comm.sum(at, n, Numbers::Bf16))?;
        if self.comm.is_some() {
            self.mark("sum over ranks", 2 * step.n_rows() * partial.width * BF16, 0)?;
        }
        self.add_norm(step, Some(partial), norm, residual, normed)?;
        // The residual stream is read and written in fp32.
        self.mark("add_norm", step.n_rows() * residual.width * 2 * (F32 + BF16), 0)
    }

    fn recordable(&self) -> Vec<usize> {
        self.sizes()
    }

    fn record(
        &mut self,
        rows: usize,
        rotary: (&Vector, usize),
        pass: impl FnMut(&mut Self, &CudaStep) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        self.record_pass(rows, rotary, pass)
    }

    fn replay(&mut self, step: &CudaStep) -> Result<bool, DeviceError> {
        self.replay_pass(step)
    }

    fn head(
        &mut self,
        step: &CudaStep,
        residual: &Rows,
        normed: &Rows,
        head: &Matrix,
        split: &VocabSplit,
    ) -> Result<(), DeviceError> {
        assert_eq!(head.outs, split.range(self.spec.shard.rank).len());
        self.fingerprint(step, residual)?;
        let n = step.n_asks.min(self.head.batch());
        self.logits(step, 0, n, normed, head)?;
        self.mark("likeliest tokens", n * head.outs * F32, 0)
    }

    fn head_sample(
        &mut self,
        step: CudaStep,
        _residual: &Rows,
        normed: &Rows,
        head: &Matrix,
        _split: &VocabSplit,
    ) -> Result<(), DeviceError> {
        self.sample(&step, normed, head)?;
        self.mark("drawing and copies", 0, 0)
    }

    fn explain(&self, error: DeviceError, launching: Option<&StepMeta>) -> DeviceError {
        self.explain_fault(error, launching)
    }

    fn land(&mut self) -> Result<Option<Landed>, DeviceError> {
        if let Some(landed) = self.landed.pop_front() {
            return Ok(Some(landed));
        }
        self.land_if_done()
    }
}

impl CudaDevice {
    /// An exchange between ranks, if there are several.
    pub(super) fn between_ranks(
        &mut self,
        what: &str,
        exchange: impl FnOnce(&Comm) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(comm) = &self.comm else {
            return Ok(());
        };
        self.stopwatch.around(|| exchange(comm))?;
        if !self.spec.options.debug {
            return Ok(());
        }
        // Not by waiting for the stream: a rank that has failed would never come.
        self.settle().map_err(|error| match error {
            DeviceError::Fault(fault) => fault.of(what),
            other => other,
        })
    }

    /// Where ranks exchange anything, and nobody looks at every operation anyway.
    fn make_stopwatch(&mut self, n_layers: usize) {
        if self.comm.is_none() || self.profile.is_some() {
            return;
        }
        self.stopwatch = Stopwatch::new(n_layers, || self.gpu.event(true)).unwrap_or_else(|error| {
            tracing::warn!("exchanges between ranks are not timed: {error}");
            Stopwatch::off()
        });
    }

    /// Descriptions of every layer's keys and values for the copy engine.
    fn maps(&self, kv: &Kv) -> Result<Memory, DeviceError> {
        let shape = &kv.shape;
        let rows = (shape.n_blocks + 1) * shape.block_tokens * shape.heads.n_kv;
        let mut maps = Vec::new();
        for address in (0..shape.n_layers).flat_map(|layer| kv.layer(layer)) {
            let map = self.gpu.matrix_map(
                address,
                [rows, shape.heads.dim],
                [
                    shape.block_tokens.min(attention::HOPPER_KEYS),
                    attention::HOPPER_COLUMNS,
                ],
            )?;
            maps.extend(map);
        }
        let memory = self.gpu.alloc(size_of_val(&maps[..]), "keys and values")?;
        self.gpu.copy_in(memory.address, &maps)?;
        self.gpu.wait()?; // the numbers here may go
        Ok(memory)
    }

    fn activations(&mut self, width: usize, number: usize) -> Result<Rows, DeviceError> {
        // Zeros at first, so that nothing ever reads what another process left.
        let memory = self
            .gpu
            .zeroed(self.spec.max_rows * width * number, "activations")?;
        self.allocated.workspace += memory.bytes as u64;
        Ok(Rows { width, memory })
    }
}
