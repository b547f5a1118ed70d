//! The driver: one GPU, its context and stream, its memory, and points in the stream's order.
//!
//! Everything that belongs to a rank is used from that rank's thread alone, on one stream, so order is the order of the
//! calls. Errors of the driver carry the name of the call or of the kernel that gave them; those that a kernel before gave
//! are in `faults.rs`. A GPU that reported one is not used again.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
    sync::{Arc, OnceLock},
};

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUfunction_attribute_enum,
    CUgraph, CUgraphExec, CUgraphNode, CUlaunchConfig, CUmodule, CUstream, CUtensorMap,
};

use super::{
    faults::{KernelFault, is_of_a_kernel},
    libs::{Library, LibraryError, Wanted, functions, string},
    memory::{Memory, Pinned, Plain},
};
use crate::device::DeviceError;

const DRIVER: Wanted = Wanted {
    what: "NVIDIA's driver",
    soname: "libcuda.so.1",
    companions: &[],
    advice: "install NVIDIA's driver 580 or later, or use --device=cpu",
};
/// The driver interface of CUDA 13.0.
const DRIVER_VERSION: c_int = 13_000;

functions! {
    /// What is used of the driver.
    Driver {
        init = c"cuInit" (c_uint) -> c_int;
        version = c"cuDriverGetVersion" (*mut c_int) -> c_int;
        error_name = c"cuGetErrorName" (c_int, *mut *const c_char) -> c_int;
        error_string = c"cuGetErrorString" (c_int, *mut *const c_char) -> c_int;
        device_count = c"cuDeviceGetCount" (*mut c_int) -> c_int;
        device_get = c"cuDeviceGet" (*mut CUdevice, c_int) -> c_int;
        device_name = c"cuDeviceGetName" (*mut c_char, c_int, CUdevice) -> c_int;
        device_attribute = c"cuDeviceGetAttribute" (*mut c_int, CUdevice_attribute, CUdevice) -> c_int;
        context_retain = c"cuDevicePrimaryCtxRetain" (*mut CUcontext, CUdevice) -> c_int;
        context_set = c"cuCtxSetCurrent" (CUcontext) -> c_int;
        memory_info = c"cuMemGetInfo_v2" (*mut usize, *mut usize) -> c_int;
        memory_alloc = c"cuMemAlloc_v2" (*mut CUdeviceptr, usize) -> c_int;
        memory_free = c"cuMemFree_v2" (CUdeviceptr) -> c_int;
        host_alloc = c"cuMemHostAlloc" (*mut *mut c_void, usize, c_uint) -> c_int;
        host_free = c"cuMemFreeHost" (*mut c_void) -> c_int;
        host_register = c"cuMemHostRegister_v2" (*mut c_void, usize, c_uint) -> c_int;
        host_unregister = c"cuMemHostUnregister" (*mut c_void) -> c_int;
        copy_in = c"cuMemcpyHtoDAsync_v2" (CUdeviceptr, *const c_void, usize, CUstream) -> c_int;
        copy_out = c"cuMemcpyDtoHAsync_v2" (*mut c_void, CUdeviceptr, usize, CUstream) -> c_int;
        copy_within = c"cuMemcpyDtoDAsync_v2" (CUdeviceptr, CUdeviceptr, usize, CUstream) -> c_int;
        set_bytes = c"cuMemsetD8Async" (CUdeviceptr, u8, usize, CUstream) -> c_int;
        stream_create = c"cuStreamCreate" (*mut CUstream, c_uint) -> c_int;
        stream_wait = c"cuStreamSynchronize" (CUstream) -> c_int;
        capture_begin = c"cuStreamBeginCapture_v2" (CUstream, c_int) -> c_int;
        capture_end = c"cuStreamEndCapture" (CUstream, *mut CUgraph) -> c_int;
        graph_nodes = c"cuGraphGetNodes" (CUgraph, *mut CUgraphNode, *mut usize) -> c_int;
        graph_instantiate = c"cuGraphInstantiateWithFlags" (*mut CUgraphExec, CUgraph, u64) -> c_int;
        graph_destroy = c"cuGraphDestroy" (CUgraph) -> c_int;
        graph_upload = c"cuGraphUpload" (CUgraphExec, CUstream) -> c_int;
        graph_launch = c"cuGraphLaunch" (CUgraphExec, CUstream) -> c_int;
        graph_exec_destroy = c"cuGraphExecDestroy" (CUgraphExec) -> c_int;
        tensor_map = c"cuTensorMapEncodeTiled" (*mut CUtensorMap, c_int, u32, *mut c_void, *const u64, *const u64,
            *const u32, *const u32, c_int, c_int, c_int, c_int) -> c_int;
        event_create = c"cuEventCreate" (*mut CUevent, c_uint) -> c_int;
        event_destroy = c"cuEventDestroy_v2" (CUevent) -> c_int;
        event_record = c"cuEventRecord" (CUevent, CUstream) -> c_int;
        event_query = c"cuEventQuery" (CUevent) -> c_int;
        event_wait = c"cuEventSynchronize" (CUevent) -> c_int;
        event_elapsed = c"cuEventElapsedTime_v2" (*mut f32, CUevent, CUevent) -> c_int;
        module_load = c"cuModuleLoadData" (*mut CUmodule, *const c_void) -> c_int;
        module_function = c"cuModuleGetFunction" (*mut CUfunction, CUmodule, *const c_char) -> c_int;
        function_set = c"cuFuncSetAttribute" (CUfunction, CUfunction_attribute_enum, c_int) -> c_int;
        launch_with = c"cuLaunchKernelEx" (*const CUlaunchConfig, CUfunction, *mut *mut c_void, *mut *mut c_void) -> c_int;
        launch = c"cuLaunchKernel" (CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
            *mut *mut c_void, *mut *mut c_void) -> c_int;
    }
}

/// Of a description for the copy engine.
pub(super) const MAP_BYTES: usize = 128;
const SUCCESS: c_int = 0;
const OUT_OF_MEMORY: c_int = 2;
const NOT_READY: c_int = 600;
/// Host memory that every context may copy from at full speed.
const HOST_PORTABLE: c_uint = 1;
/// A stream that does not wait for the default one.
const STREAM_NON_BLOCKING: c_uint = 1;
const EVENT_WITHOUT_TIME: c_uint = 2;

impl Driver {
    /// The driver of this machine, opened once.
    ///
    /// # Errors
    /// It is missing, too old, or does not start.
    pub(super) fn get() -> Result<&'static Self, LibraryError> {
        static DRIVER_ONCE: OnceLock<Result<Driver, LibraryError>> = OnceLock::new();
        DRIVER_ONCE.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, LibraryError> {
        let library = Library::open(DRIVER)?;
        let driver = Self::look_up(library)?;
        let mut version = 0;
        // SAFETY: the call writes one number, and is allowed before `cuInit`.
        unsafe { (driver.version)(&mut version) };
        if version < DRIVER_VERSION {
            return Err(library.old(
                format!("for CUDA {}.{}", version / 1000, version % 1000 / 10),
                "CUDA 13.0",
            ));
        }
        // SAFETY: 0 is the one flag there is.
        let code = unsafe { (driver.init)(0) };
        driver
            .check(code, "cuInit")
            .map_err(|error| library.start(error))?;
        Ok(driver)
    }

    fn check(&self, code: c_int, call: &str) -> Result<(), DeviceError> {
        match code {
            SUCCESS => Ok(()),
            code if is_of_a_kernel(code) => Err(KernelFault::new(self.words(code), call).into()),
            code => Err(DeviceError::Cuda(format!("{call}: {}", self.words(code)))),
        }
    }

    fn words(&self, code: c_int) -> String {
        let (mut name, mut text) = (ptr::null(), ptr::null());
        // SAFETY: each writes the address of a constant string, or null for a code it does not know.
        unsafe {
            (self.error_name)(code, &mut name);
            (self.error_string)(code, &mut text);
        }
        match (string(name), string(text)) {
            (name, _) if name.is_empty() => format!("error {code}"),
            (name, text) => format!("{name}, {text}"),
        }
    }

    /// GPUs that this process sees.
    pub(super) fn count(&self) -> Result<usize, DeviceError> {
        let mut count = 0;
        // SAFETY: writes one number.
        self.check(unsafe { (self.device_count)(&mut count) }, "cuDeviceGetCount")?;
        Ok(usize::try_from(count).unwrap_or(0))
    }
}

/// One GPU with its context and the stream of its rank.
pub(super) struct Gpu {
    pub(super) driver: &'static Driver,
    context: CUcontext,
    pub(super) stream: CUstream,
    /// The name that its maker gave it.
    pub(super) name: String,
    /// Compute capability: 90 for 9.0.
    pub(super) capability: u32,
    /// Multiprocessors.
    pub(super) n_sm: u32,
    /// Every kernel is waited for after its launch.
    pub(super) debug: bool,
}

// SAFETY: the driver takes contexts and streams from any thread; a rank's thread makes the context current first.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Opens a GPU and makes it the calling thread's. With `debug`, kernels that fail are named, and everything is slow.
    pub(super) fn open(ordinal: usize, debug: bool) -> Result<Arc<Self>, DeviceError> {
        let driver = Driver::get()?;
        let n = driver.count()?;
        if ordinal >= n {
            return Err(DeviceError::Cuda(format!(
                "rank {ordinal} has no GPU: this process sees {n}; lower --tensor-parallel or give it more GPUs"
            )));
        }
        let mut device = 0;
        let mut context = ptr::null_mut();
        let mut stream = ptr::null_mut();
        let ordinal = c_int::try_from(ordinal).expect("fewer than 64 ranks");
        // SAFETY: each call writes the one value it is given the address of; the device exists.
        unsafe {
            driver.check((driver.device_get)(&mut device, ordinal), "cuDeviceGet")?;
            driver.check(
                (driver.context_retain)(&mut context, device),
                "cuDevicePrimaryCtxRetain",
            )?;
            driver.check((driver.context_set)(context), "cuCtxSetCurrent")?;
            driver.check(
                (driver.stream_create)(&mut stream, STREAM_NON_BLOCKING),
                "cuStreamCreate",
            )?;
        }
        let ask = |attribute| -> Result<u32, DeviceError> {
            let mut value = 0;
            // SAFETY: writes one number; the device exists.
            let code = unsafe { (driver.device_attribute)(&mut value, attribute, device) };
            driver.check(code, "cuDeviceGetAttribute")?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        use CUdevice_attribute as Of;
        let (major, minor) = (
            ask(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        Ok(Arc::new(Self {
            name: driver.name(device)?,
            capability: 10 * major + minor,
            n_sm: ask(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            driver,
            context,
            stream,
            debug,
        }))
    }

    /// Makes it the calling thread's.
    pub(super) fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context lives as long as the process.
        self.check(
            unsafe { (self.driver.context_set)(self.context) },
            "cuCtxSetCurrent",
        )
    }

    pub(super) fn check(&self, code: c_int, call: &str) -> Result<(), DeviceError> {
        self.driver.check(code, call)
    }

    /// Free and all memory, in bytes.
    pub(super) fn memory(&self) -> Result<(usize, usize), DeviceError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        let code = unsafe { (self.driver.memory_info)(&mut free, &mut total) };
        self.check(code, "cuMemGetInfo")?;
        Ok((free, total))
    }

    /// Memory with undefined contents.
    pub(super) fn alloc(self: &Arc<Self>, bytes: usize, what: &'static str) -> Result<Memory, DeviceError> {
        let mut address = 0;
        // SAFETY: writes one address. An empty allocation is not one to the driver.
        match unsafe { (self.driver.memory_alloc)(&mut address, bytes.max(1)) } {
            OUT_OF_MEMORY => return Err(DeviceError::OutOfMemory { bytes, what }),
            code => self.check(code, "cuMemAlloc")?,
        }
        Ok(Memory {
            gpu: Arc::clone(self),
            address,
            bytes,
        })
    }

    /// Memory filled with zero bytes.
    pub(super) fn zeroed(self: &Arc<Self>, bytes: usize, what: &'static str) -> Result<Memory, DeviceError> {
        let memory = self.alloc(bytes, what)?;
        self.clear(&memory)?;
        Ok(memory)
    }

    /// Fills an allocation with zero bytes, in the stream's order.
    pub(super) fn clear(&self, memory: &Memory) -> Result<(), DeviceError> {
        self.clear_part(memory, 0, memory.bytes)
    }

    /// Fills an allocation with a byte, in the stream's order.
    pub(super) fn set_bytes(&self, memory: &Memory, byte: u8) -> Result<(), DeviceError> {
        // SAFETY: the range is the allocation.
        let code = unsafe { (self.driver.set_bytes)(memory.address, byte, memory.bytes, self.stream) };
        self.check(code, "cuMemsetD8Async")
    }

    /// Fills part of an allocation with zero bytes, in the stream's order.
    pub(super) fn clear_part(&self, memory: &Memory, from: usize, bytes: usize) -> Result<(), DeviceError> {
        memory.at(from + bytes); // is within
        // SAFETY: the range is within the allocation.
        let code = unsafe { (self.driver.set_bytes)(memory.at(from), 0, bytes, self.stream) };
        self.check(code, "cuMemsetD8Async")
    }

    /// Locks host memory that lives until the process ends or [`Gpu::unlock`], so that the GPU copies to it by itself.
    pub(super) fn lock(&self, memory: &mut [f32]) -> Result<(), DeviceError> {
        // SAFETY: the range is the slice.
        let code = unsafe {
            (self.driver.host_register)(memory.as_mut_ptr().cast(), size_of_val(memory), HOST_PORTABLE)
        };
        self.check(code, "cuMemHostRegister")
    }

    /// Undoes [`Gpu::lock`].
    pub(super) fn unlock(&self, memory: &mut [f32]) {
        if self.bind().is_ok() {
            // SAFETY: it was locked, and the stream is done with it: the caller waited.
            unsafe { (self.driver.host_unregister)(memory.as_mut_ptr().cast()) };
        }
    }

    /// Host memory that the GPU copies from and to by itself. Zeroed.
    pub(super) fn pinned<T: Plain>(self: &Arc<Self>, len: usize) -> Result<Pinned<T>, DeviceError> {
        let bytes = len * size_of::<T>();
        let mut at = ptr::null_mut();
        // SAFETY: writes one address.
        match unsafe { (self.driver.host_alloc)(&mut at, bytes.max(1), HOST_PORTABLE) } {
            OUT_OF_MEMORY => {
                return Err(DeviceError::OutOfMemory {
                    bytes,
                    what: "page-locked host memory",
                });
            }
            code => self.check(code, "cuMemHostAlloc")?,
        }
        // SAFETY: the allocation has this many bytes.
        unsafe { ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Pinned {
            gpu: Arc::clone(self),
            at: at.cast(),
            len,
        })
    }

    /// Copies in, in the stream's order. `from` must be left alone until then.
    pub(super) fn copy_in<T: Plain>(&self, to: CUdeviceptr, from: &[T]) -> Result<(), DeviceError> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: `from` is readable for its size; `to` is the caller's allocation.
        let code = unsafe { (self.driver.copy_in)(to, from.as_ptr().cast(), size_of_val(from), self.stream) };
        self.check(code, "cuMemcpyHtoDAsync")
    }

    /// Copies out, in the stream's order. `to` must be left alone until then.
    pub(super) fn copy_out<T: Plain>(&self, to: &mut [T], from: CUdeviceptr) -> Result<(), DeviceError> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` is writable for its size; `from` is the caller's allocation.
        let code =
            unsafe { (self.driver.copy_out)(to.as_mut_ptr().cast(), from, size_of_val(to), self.stream) };
        self.check(code, "cuMemcpyDtoHAsync")
    }

    /// Copies within the GPU, in the stream's order.
    pub(super) fn copy_within(
        &self,
        to: CUdeviceptr,
        from: CUdeviceptr,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        // SAFETY: both are the caller's allocations.
        let code = unsafe { (self.driver.copy_within)(to, from, bytes, self.stream) };
        self.check(code, "cuMemcpyDtoDAsync")
    }

    /// Describes a dense matrix of bf16 numbers, `[rows, columns]`, to the copy engine, which will bring boxes of it and
    /// swizzle their rows of at most 128 bytes. Only Hopper and later have it.
    pub(super) fn matrix_map(
        &self,
        address: CUdeviceptr,
        [rows, columns]: [usize; 2],
        boxes: [usize; 2],
    ) -> Result<[u64; MAP_BYTES / 8], DeviceError> {
        const BF16: c_int = 9;
        const SWIZZLE_128: c_int = 3;
        const L2_256: c_int = 3;
        let sizes = [columns as u64, rows as u64];
        let pitch = [columns as u64 * 2];
        let boxes = boxes.map(|n| u32::try_from(n).expect("boxes have at most 256 rows"));
        let mut map = CUtensorMap {
            opaque: [0; MAP_BYTES / 8],
        };
        // SAFETY: writes one description; the arrays have as many numbers as two dimensions need.
        let code = unsafe {
            (self.driver.tensor_map)(
                &mut map,
                BF16,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                pitch.as_ptr(),
                [boxes[1], boxes[0]].as_ptr(),
                [1, 1].as_ptr(),
                0,
                SWIZZLE_128,
                L2_256,
                0,
            )
        };
        self.check(code, "cuTensorMapEncodeTiled")?;
        Ok(map.opaque)
    }

    /// Waits until the stream has done everything.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream lives.
        self.check(
            unsafe { (self.driver.stream_wait)(self.stream) },
            "cuStreamSynchronize",
        )
    }

    /// An event; `timed` ones can be subtracted.
    pub(super) fn event(self: &Arc<Self>, timed: bool) -> Result<Event, DeviceError> {
        let mut event = ptr::null_mut();
        let flags = if timed { 0 } else { EVENT_WITHOUT_TIME };
        // SAFETY: writes one handle.
        let code = unsafe { (self.driver.event_create)(&mut event, flags) };
        self.check(code, "cuEventCreate")?;
        Ok(Event {
            gpu: Arc::clone(self),
            event,
        })
    }
}

impl Driver {
    fn name(&self, device: CUdevice) -> Result<String, DeviceError> {
        let mut name = [0 as c_char; 128];
        let room = c_int::try_from(name.len() - 1).expect("small");
        // SAFETY: the room is the buffer's, less a last zero.
        let code = unsafe { (self.device_name)(name.as_mut_ptr(), room, device) };
        self.check(code, "cuDeviceGetName")?;
        // SAFETY: the last byte is zero.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }
            .to_string_lossy()
            .into_owned())
    }
}

/// A point in the stream's order.
pub(super) struct Event {
    gpu: Arc<Gpu>,
    event: CUevent,
}

impl Event {
    /// Sets it after everything that was given to the stream.
    pub(super) fn record(&self) -> Result<(), DeviceError> {
        // SAFETY: both handles live.
        let code = unsafe { (self.gpu.driver.event_record)(self.event, self.gpu.stream) };
        self.gpu.check(code, "cuEventRecord")
    }

    /// Whether the stream has come to it.
    pub(super) fn reached(&self) -> Result<bool, DeviceError> {
        // SAFETY: the handle lives.
        match unsafe { (self.gpu.driver.event_query)(self.event) } {
            NOT_READY => Ok(false),
            code => self.gpu.check(code, "the end of a step").map(|()| true),
        }
    }

    /// Waits for it.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the handle lives.
        self.gpu.check(
            unsafe { (self.gpu.driver.event_wait)(self.event) },
            "cuEventSynchronize",
        )
    }

    /// Seconds from `earlier` to this one; both are timed and reached.
    pub(super) fn seconds_since(&self, earlier: &Event) -> Result<f64, DeviceError> {
        let mut ms = 0.0;
        // SAFETY: writes one number; both handles live.
        let code = unsafe { (self.gpu.driver.event_elapsed)(&mut ms, earlier.event, self.event) };
        self.gpu.check(code, "cuEventElapsedTime")?;
        Ok(f64::from(ms) * 1e-3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver lets it live until it was reached.
        unsafe { (self.gpu.driver.event_destroy)(self.event) };
    }
}
