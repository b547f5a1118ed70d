//! A tensor where it lies in the file, and its slices converted to fp32.
//!
//! A rank asks for the rows or columns that are its own, so nothing but its slice is ever copied into memory. Row
//! slices are one contiguous range of the file; column slices are one short range per row.

use std::ops::Range;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// The number formats that weights may be stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit IEEE floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// The upper halves of 32-bit IEEE floats.
    BF16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// Reads a safetensors header's name for it.
    pub(crate) fn parse(name: &str) -> Option<Dtype> {
        match name {
            "F32" => Some(Dtype::F32),
            "F16" => Some(Dtype::F16),
            "BF16" => Some(Dtype::BF16),
            _ => None,
        }
    }
}

/// A tensor of one or two dimensions inside a mapped file, row-major and little-endian.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

// Conversions of at least this many numbers are spread over the current rayon pool; below, waking it costs more.
const PARALLEL_FROM: usize = 1 << 18;
const TASK: usize = 1 << 16;

impl<'a> TensorView<'a> {
    /// `bytes` must hold exactly the numbers of `shape`.
    pub(crate) fn new(name: &'a str, dtype: Dtype, shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
        assert!(
            matches!(shape.len(), 1 | 2),
            "{name} has {} dimensions",
            shape.len()
        );
        assert_eq!(
            shape.iter().product::<usize>() * dtype.size(),
            bytes.len(),
            "{name}: bytes fit shape and dtype"
        );
        TensorView {
            name,
            dtype,
            shape,
            bytes,
        }
    }

    /// The tensor's name in the checkpoint.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// How its numbers are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// `[n]` or `[rows, columns]`.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// All bytes, as stored.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Rows; a vector of n numbers is n rows of one.
    pub fn n_rows(&self) -> usize {
        self.shape[0]
    }

    /// Numbers in one row; 1 for a vector.
    pub fn row_len(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// The bytes of `rows`, as stored. Panics if the range leaves the tensor.
    pub fn row_bytes(&self, rows: Range<usize>) -> &'a [u8] {
        let row = self.row_len() * self.dtype.size();
        &self.bytes[rows.start * row..rows.end * row]
    }

    /// `rows` in fp32, row-major `[rows.len(), row_len]`. Panics if the range leaves the tensor.
    pub fn rows_f32(&self, rows: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() * self.row_len()];
        self.read_rows_f32_into(rows, &mut out);
        out
    }

    /// Writes `rows` in fp32 into `out`, which must have room for exactly `rows.len() * row_len` numbers.
    pub fn read_rows_f32_into(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(
            out.len(),
            rows.len() * self.row_len(),
            "{}: room for rows {rows:?}",
            self.name
        );
        let bytes = self.row_bytes(rows);
        if out.len() < PARALLEL_FROM {
            return convert(self.dtype, bytes, out);
        }
        let tasks = out
            .par_chunks_mut(TASK)
            .zip(bytes.par_chunks(TASK * self.dtype.size()));
        tasks.for_each(|(out, bytes)| convert(self.dtype, bytes, out));
    }

    /// `cols` of every row in fp32, row-major `[n_rows, cols.len()]`. Panics if the range leaves the tensor.
    pub fn cols_f32(&self, cols: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; self.n_rows() * cols.len()];
        self.read_cols_f32_into(cols, &mut out);
        out
    }

    /// Writes `cols` of every row in fp32 into `out`, which must have room for exactly `n_rows * cols.len()` numbers.
    pub fn read_cols_f32_into(&self, cols: Range<usize>, out: &mut [f32]) {
        let (width, size) = (cols.len(), self.dtype.size());
        assert_eq!(
            out.len(),
            self.n_rows() * width,
            "{}: room for columns {cols:?}",
            self.name
        );
        assert!(
            cols.end <= self.row_len(),
            "{} has {} columns, not {cols:?}",
            self.name,
            self.row_len()
        );
        if out.is_empty() {
            return;
        }
        let row_bytes = self.row_len() * size;
        let convert_rows = |first_row: usize, out: &mut [f32]| {
            let rows = self.bytes[first_row * row_bytes..].chunks_exact(row_bytes);
            for (out, row) in out.chunks_exact_mut(width).zip(rows) {
                convert(self.dtype, &row[cols.start * size..cols.end * size], out);
            }
        };
        if out.len() < PARALLEL_FROM {
            return convert_rows(0, out);
        }
        let rows_per_task = (TASK / width).max(1);
        let tasks = out.par_chunks_mut(rows_per_task * width).enumerate();
        tasks.for_each(|(n, out)| convert_rows(n * rows_per_task, out));
    }

    /// Writes `cols` of `rows` in fp32 into `out`, which must have room for exactly that many numbers.
    pub fn read_block_f32_into(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        self.read_block(rows, cols, out, convert);
    }

    /// Writes `cols` of `rows` into `out` as bits of bf16, rounded to nearest where they are stored wider.
    pub fn read_block_bf16_into(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [u16]) {
        self.read_block(rows, cols, out, convert_bf16);
    }

    fn read_block<T: Send>(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [T],
        convert: impl Fn(Dtype, &[u8], &mut [T]) + Sync,
    ) {
        let (width, size) = (cols.len(), self.dtype.size());
        assert_eq!(
            out.len(),
            rows.len() * width,
            "{}: room for rows {rows:?} and columns {cols:?}",
            self.name
        );
        assert!(cols.end <= self.row_len(), "{}: columns {cols:?}", self.name);
        if out.is_empty() {
            return;
        }
        let row_bytes = self.row_len() * size;
        let bytes = self.row_bytes(rows);
        let some_rows = |first: usize, out: &mut [T]| {
            if width == self.row_len() {
                let bytes = &bytes[first * row_bytes..][..out.len() * size];
                return convert(self.dtype, bytes, out);
            }
            let rows = bytes[first * row_bytes..].chunks_exact(row_bytes);
            for (out, row) in out.chunks_exact_mut(width).zip(rows) {
                convert(self.dtype, &row[cols.start * size..cols.end * size], out);
            }
        };
        let rows_per_task = (TASK / width).max(1);
        let tasks = out.par_chunks_mut(rows_per_task * width).enumerate();
        tasks.for_each(|(n, out)| some_rows(n * rows_per_task, out));
    }
}

impl std::fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {:?}", self.name, self.dtype, self.shape)
    }
}

/// Converts equally many numbers. `bytes` may lie at any address, which is why nothing is reinterpreted in place.
fn convert(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::BF16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        }
        Dtype::F16 => {
            const PART: usize = 512; // one kilobyte on the stack, enough to feed the F16C instructions
            let mut part = [f16::ZERO; PART];
            for (out, bytes) in out.chunks_mut(PART).zip(bytes.chunks(2 * PART)) {
                for (half, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                    *half = f16::from_le_bytes(*bytes);
                }
                part[..out.len()].convert_to_f32_slice(out);
            }
        }
    }
}

/// As `convert`, to bits of bf16.
fn convert_bf16(dtype: Dtype, bytes: &[u8], out: &mut [u16]) {
    if dtype == Dtype::BF16 {
        for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
            *out = u16::from_le_bytes(*bytes);
        }
        return;
    }
    const PART: usize = 512;
    let mut part = [0.0; PART];
    for (out, bytes) in out.chunks_mut(PART).zip(bytes.chunks(PART * dtype.size())) {
        let part = &mut part[..out.len()];
        convert(dtype, bytes, part);
        for (out, x) in out.iter_mut().zip(part) {
            *out = bf16::from_f32(*x).to_bits();
        }
    }
}
