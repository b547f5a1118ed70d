//! Memory that a rank owns: of its GPU, and of the host where the GPU copies by itself.

use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;

use super::driver::Gpu;

/// Numbers that may be copied as bytes: every bit pattern is a value.
pub(super) trait Plain: Copy + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for i32 {}
impl Plain for u64 {}
impl Plain for f32 {}

/// An allocation of a GPU.
pub(super) struct Memory {
    pub(super) gpu: Arc<Gpu>,
    pub(super) address: CUdeviceptr,
    pub(super) bytes: usize,
}

impl Memory {
    /// The address `bytes` after the start.
    pub(super) fn at(&self, bytes: usize) -> CUdeviceptr {
        assert!(bytes <= self.bytes, "{bytes} is within {} bytes", self.bytes);
        self.address + bytes as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A GPU that failed gives nothing back; the process is about to end.
        if self.gpu.bind().is_ok() {
            // SAFETY: it was allocated and is freed once; the driver waits for kernels that use it.
            unsafe { (self.gpu.driver.memory_free)(self.address) };
        }
    }
}

/// Page-locked host memory.
pub(super) struct Pinned<T> {
    pub(super) gpu: Arc<Gpu>,
    pub(super) at: *mut T,
    pub(super) len: usize,
}

// SAFETY: it owns its memory, like a Vec.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T> std::ops::Deref for Pinned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: allocated for `len` and zeroed, of a type that any bytes are.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl<T> std::ops::DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: it was allocated so and is freed once.
            unsafe { (self.gpu.driver.host_free)(self.at.cast()) };
        }
    }
}
