//! Memory that is allocated once, touched at once, aligned to cache lines, and counted.
//!
//! Touching it at start means that a machine with too little memory fails while loading, not in the middle of a request.

use std::ops::{Deref, DerefMut};

use super::simd::{LANES, Line};
use crate::device::DeviceError;

/// Zeroed numbers; the length is rounded up to whole cache lines.
pub struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// At least `len` zeros.
    ///
    /// # Errors
    /// If memory runs out; `what` says for what.
    pub fn new(len: usize, what: &'static str) -> Result<Self, DeviceError> {
        let n_lines = len.div_ceil(LANES);
        let mut lines = Vec::new();
        lines
            .try_reserve_exact(n_lines)
            .map_err(|_| DeviceError::OutOfMemory {
                bytes: n_lines * size_of::<Line>(),
                what,
            })?;
        lines.resize(n_lines, Line([0.0; LANES]));
        Ok(Self { lines })
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> u64 {
        (self.lines.capacity() * size_of::<Line>()) as u64
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: a `Line` is sixteen numbers and nothing else (`repr(C)`, size 64), so n lines are 16 n numbers.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * LANES) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * LANES) }
    }
}

/// Activations: one row for each row of the largest step. Rows start at cache lines, so whole vectors may be stored
/// past the width.
pub struct Rows {
    pub(super) data: Buffer,
    pub(super) width: usize,
    pub(super) stride: usize,
}

impl Rows {
    pub(super) fn new(n_rows: usize, width: usize) -> Result<Self, DeviceError> {
        let stride = width.next_multiple_of(LANES);
        Ok(Self {
            data: Buffer::new(n_rows * stride, "activations")?,
            width,
            stride,
        })
    }

    /// All of it, with rows `stride` numbers apart.
    pub(in crate::device) fn all_mut(&mut self) -> (&mut [f32], usize) {
        let stride = self.stride;
        (&mut self.data, stride)
    }

    /// One row.
    pub(in crate::device) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..][..self.width]
    }

    /// Where it all starts, for operations whose threads write disjoint parts.
    pub(super) fn shared(&mut self) -> SharedRows {
        SharedRows {
            to: self.data.as_mut_ptr(),
            len: self.data.len(),
            width: self.width,
            stride: self.stride,
        }
    }
}

/// Rows that several threads write at once, each its own part.
#[derive(Clone, Copy)]
pub(super) struct SharedRows {
    to: *mut f32,
    len: usize,
    pub(super) width: usize,
    pub(super) stride: usize,
}

// SAFETY: it is an address; whoever writes through it promises that nobody else uses that part.
unsafe impl Send for SharedRows {}
// SAFETY: as above.
unsafe impl Sync for SharedRows {}

impl SharedRows {
    /// The part of a row from `column` on, to the end of its width.
    ///
    /// # Safety
    /// The rows still live, and no other thread uses this part of the row while the result lives.
    #[inline(always)]
    pub(super) unsafe fn part<'a>(self, row: usize, column: usize) -> &'a mut [f32] {
        assert!(
            (row + 1) * self.stride <= self.len && column <= self.width,
            "row {row} is within the buffer"
        );
        // SAFETY: within the allocation by the assertion; exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.to.add(row * self.stride + column), self.width - column)
        }
    }

    /// The address of a row's column, with room to the end of the stride.
    #[inline(always)]
    pub(super) fn at(self, row: usize, column: usize) -> *mut f32 {
        assert!(
            (row + 1) * self.stride <= self.len && column <= self.stride,
            "row {row} is within the buffer"
        );
        // Within the allocation by the assertion.
        self.to.wrapping_add(row * self.stride + column)
    }
}
