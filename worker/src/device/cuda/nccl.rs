//! NCCL: sums and gathers over the ranks of a group, in the order of each rank's stream.
//!
//! NVLink multicast stays off: a program that ends badly while it uses it can leave the machine's GPUs unusable.

use std::{
    ffi::{c_char, c_int, c_void},
    mem::MaybeUninit,
    ptr,
    sync::{Arc, OnceLock},
};

use cudarc::{
    driver::sys::{CUdeviceptr, CUstream},
    nccl::sys::{ncclComm_t, ncclUniqueId},
};

use super::{
    driver::Gpu,
    libs::{Library, LibraryError, Wanted, functions, string},
};
use crate::device::DeviceError;

const NCCL: Wanted = Wanted {
    what: "NCCL",
    soname: "libnccl.so.2",
    companions: &[],
    advice: "install NCCL 2.28 or later (the Python wheel nvidia-nccl-cu13 brings it), or use --tensor-parallel=1",
};
const NCCL_VERSION: c_int = 22_800;

functions! {
    /// What is used of NCCL.
    Nccl {
        version = c"ncclGetVersion" (*mut c_int) -> c_int;
        error_string = c"ncclGetErrorString" (c_int) -> *const c_char;
        unique_id = c"ncclGetUniqueId" (*mut ncclUniqueId) -> c_int;
        init_rank = c"ncclCommInitRank" (*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> c_int;
        abort = c"ncclCommAbort" (ncclComm_t) -> c_int;
        all_reduce = c"ncclAllReduce" (*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> c_int;
        all_gather = c"ncclAllGather" (*const c_void, *mut c_void, usize, c_int, ncclComm_t, CUstream) -> c_int;
    }
}

/// What a message is made of, as NCCL numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// Bytes.
    U8 = 1,
    /// fp32.
    F32 = 7,
    /// bf16.
    Bf16 = 9,
}

const SUM: c_int = 0;

impl Nccl {
    /// The library of this machine, opened once.
    ///
    /// # Errors
    /// It is missing or too old.
    pub(super) fn get() -> Result<&'static Self, LibraryError> {
        static NCCL_ONCE: OnceLock<Result<Nccl, LibraryError>> = OnceLock::new();
        NCCL_ONCE.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, LibraryError> {
        let library = Library::open(NCCL)?;
        let nccl = Self::look_up(library)?;
        let mut version = 0;
        // SAFETY: writes one number.
        unsafe { (nccl.version)(&mut version) };
        if version < NCCL_VERSION {
            let found = format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
            return Err(library.old(found, "2.28"));
        }
        Ok(nccl)
    }

    fn check(&self, code: c_int, call: &str) -> Result<(), DeviceError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: gives a constant text for any code.
        let text = string(unsafe { (self.error_string)(code) });
        Err(DeviceError::Cuda(format!("{call}: {text}")))
    }
}

/// What the ranks of one group know each other by.
#[derive(Clone, Copy)]
pub struct GroupId(ncclUniqueId);

impl GroupId {
    /// A new one, for one group.
    ///
    /// # Errors
    /// NCCL is missing, too old, or finds no network interface.
    pub fn new() -> Result<Self, DeviceError> {
        let nccl = Nccl::get()?;
        let mut id = MaybeUninit::uninit();
        // SAFETY: writes the identifier, or fails.
        unsafe {
            nccl.check((nccl.unique_id)(id.as_mut_ptr()), "ncclGetUniqueId")?;
            Ok(Self(id.assume_init()))
        }
    }
}

/// One rank's end of the group.
pub(super) struct Comm {
    nccl: &'static Nccl,
    gpu: Arc<Gpu>,
    comm: ncclComm_t,
    n_ranks: usize,
}

// SAFETY: it is used by one thread at a time, its rank's.
unsafe impl Send for Comm {}

impl Comm {
    /// Meets the other ranks; returns when all are there.
    pub(super) fn join(
        gpu: &Arc<Gpu>,
        id: GroupId,
        rank: usize,
        n_ranks: usize,
    ) -> Result<Self, DeviceError> {
        let nccl = Nccl::get()?;
        let number = |n: usize| c_int::try_from(n).expect("fewer than 64 ranks");
        let mut comm = ptr::null_mut();
        // SAFETY: writes one handle; the GPU of this rank is current.
        let code = unsafe { (nccl.init_rank)(&mut comm, number(n_ranks), id.0, number(rank)) };
        nccl.check(code, "ncclCommInitRank")?;
        Ok(Self {
            nccl,
            gpu: Arc::clone(gpu),
            comm,
            n_ranks,
        })
    }

    /// Ranks of the group.
    pub(super) fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    /// Replaces `n` numbers by their sums over ranks. All ranks get the same bits.
    pub(super) fn sum(&self, at: CUdeviceptr, n: usize, numbers: Numbers) -> Result<(), DeviceError> {
        // SAFETY: the caller's buffer has `n` numbers; sums may be taken in place.
        let code = unsafe {
            (self.nccl.all_reduce)(
                at as *const c_void,
                at as *mut c_void,
                n,
                numbers as c_int,
                SUM,
                self.comm,
                self.gpu.stream,
            )
        };
        self.nccl.check(code, "ncclAllReduce")
    }

    /// Puts every rank's `n` bytes one after the other into `to`, in the order of ranks.
    pub(super) fn gather(&self, from: CUdeviceptr, to: CUdeviceptr, n: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller's buffers have `n` bytes, and `n` for each rank.
        let code = unsafe {
            (self.nccl.all_gather)(
                from as *const c_void,
                to as *mut c_void,
                n,
                Numbers::U8 as c_int,
                self.comm,
                self.gpu.stream,
            )
        };
        self.nccl.check(code, "ncclAllGather")
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        // SAFETY: used by nobody any more. Ending the group in order would wait for ranks that may be gone.
        unsafe { (self.nccl.abort)(self.comm) };
    }
}
