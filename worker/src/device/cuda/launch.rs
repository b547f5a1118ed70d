//! Kernels: loading them and launching them on a rank's stream.

use std::{
    ffi::{CString, c_int, c_void},
    ptr,
};

use cudarc::driver::sys::{
    CUfunction, CUfunction_attribute_enum, CUlaunchAttribute, CUlaunchAttributeID_enum,
    CUlaunchAttributeValue, CUlaunchConfig, CUmodule,
};

use super::{driver::Gpu, memory::Memory};
use crate::device::DeviceError;

impl Gpu {
    /// Loads a compiled file of kernels; it stays loaded.
    pub(super) fn module(&self, cubin: &[u8], what: &str) -> Result<Module, DeviceError> {
        let mut module = ptr::null_mut();
        // SAFETY: a cubin describes its own length; it was made by NVRTC, and its hash was checked when it was read.
        let code = unsafe { (self.driver.module_load)(&mut module, cubin.as_ptr().cast()) };
        self.check(code, &format!("loading the kernels of {what}"))?;
        Ok(Module(module))
    }

    /// A kernel of a loaded file; `shared` is the most dynamic shared memory it will be launched with.
    pub(super) fn kernel(
        &self,
        module: &Module,
        name: &'static str,
        shared: u32,
    ) -> Result<Kernel, DeviceError> {
        let mut function = ptr::null_mut();
        let c_name = CString::new(name).expect("names of kernels have no zero byte");
        // SAFETY: writes one handle; the module stays loaded.
        let code = unsafe { (self.driver.module_function)(&mut function, module.0, c_name.as_ptr()) };
        self.check(code, name)?;
        if shared > 48 << 10 {
            let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = c_int::try_from(shared).expect("shared memory is a few hundred KiB");
            // SAFETY: the function is loaded.
            self.check(unsafe { (self.driver.function_set)(function, most, bytes) }, name)?;
        }
        Ok(Kernel {
            function,
            name,
            chained: false,
        })
    }

    /// Launches a kernel on the rank's stream.
    ///
    /// # Safety
    /// The arguments are the kernel's parameters in order, of their sizes, and all its accesses are within allocations.
    pub(super) unsafe fn launch(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &mut [Arg],
    ) -> Result<(), DeviceError> {
        const MOST: usize = 40;
        let mut addresses = [ptr::null_mut::<c_void>(); MOST];
        assert!(
            arguments.len() <= MOST,
            "{} takes too many arguments",
            kernel.name
        );
        for (address, argument) in addresses.iter_mut().zip(arguments) {
            *address = ptr::from_mut(&mut argument.0).cast();
        }
        if kernel.chained {
            // SAFETY: the caller's promise, and a chained kernel waits for its predecessor by itself.
            let code = unsafe { self.launch_chained(kernel, grid, block, shared, addresses.as_mut_ptr()) };
            self.check(code, kernel.name)?;
            return self.named(|| kernel.name.to_owned());
        }
        // SAFETY: the addresses live until the call returns, which copies what they point to; the rest is the caller's
        // promise.
        let code = unsafe {
            (self.driver.launch)(
                kernel.function,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                shared,
                self.stream,
                addresses.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.check(code, kernel.name)?;
        self.named(|| kernel.name.to_owned())
    }

    /// When faults are looked for: waits for what was launched just now, and gives its failure its name.
    pub(super) fn named(&self, name: impl FnOnce() -> String) -> Result<(), DeviceError> {
        if !self.debug {
            return Ok(());
        }
        self.wait().map_err(|error| match error {
            DeviceError::Fault(fault) => fault.of(&name()),
            other => other,
        })
    }
}

impl Gpu {
    /// Launches a kernel that may begin before the one before it is done.
    ///
    /// # Safety
    /// As for [`Gpu::launch`], and the kernel waits before it touches what others wrote.
    unsafe fn launch_chained(
        &self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: *mut *mut c_void,
    ) -> c_int {
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: shared,
            hStream: self.stream,
            attrs: &mut early,
            numAttrs: 1,
        };
        // SAFETY: config and addresses live until the call returns; the rest is the caller's promise.
        unsafe { (self.driver.launch_with)(&config, kernel.function, arguments, ptr::null_mut()) }
    }
}

/// A loaded file of kernels.
pub(super) struct Module(CUmodule);

/// A kernel, ready to launch.
pub(super) struct Kernel {
    function: CUfunction,
    /// For errors.
    pub(super) name: &'static str,
    /// It may begin before the kernel before it is done, and waits by itself.
    chained: bool,
}

impl Kernel {
    /// One that waits for the kernel before it by itself, where `on`.
    pub(super) fn chained(self, on: bool) -> Self {
        Self { chained: on, ..self }
    }
}

/// One argument of a kernel: its bits, from the lowest byte on, which is where a little-endian machine looks for an
/// argument of any size.
#[derive(Clone, Copy)]
pub(super) struct Arg(u64);

macro_rules! argument {
    ($($from:ty => |$x:ident| $bits:expr;)*) => {
        $(impl From<$from> for Arg {
            fn from($x: $from) -> Self {
                Self($bits)
            }
        })*
    };
}

argument! {
    u64 => |x| x;
    u32 => |x| u64::from(x);
    i32 => |x| u64::from(x as u32);
    f32 => |x| u64::from(x.to_bits());
    &Memory => |x| x.address;
}
