//! cuBLASLt: matrix products of bf16 numbers with fp32 sums.
//!
//! How a product is computed is chosen once for each shape of weights and each size of step, and kept, so the same step
//! gives the same bits again. Choices differ between sizes: a row's last bits depend on how many share its step. Sizes
//! are rounded up, so that there are few of them; the rows beyond the step's are computed and never read.

mod trial;

use std::{
    collections::HashMap,
    ffi::{c_char, c_int, c_void},
    mem, ptr,
    sync::{Arc, OnceLock},
};

use cudarc::{
    cublaslt::sys::{
        cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
        cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
        cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cudaDataType_t,
    },
    driver::sys::{CUdeviceptr, CUstream},
};

use super::{
    choices::Book,
    driver::Gpu,
    libs::{Library, LibraryError, Wanted, functions, string},
    memory::Memory,
};
use crate::device::DeviceError;

const CUBLASLT: Wanted = Wanted {
    what: "cuBLASLt",
    soname: "libcublasLt.so.13",
    companions: &[],
    advice: "install CUDA 13.0's cuBLAS (the Python wheel nvidia-cublas brings it)",
};
const CUBLASLT_VERSION: usize = 130_000;

functions! {
    /// What is used of cuBLASLt.
    CublasLt {
        version = c"cublasLtGetVersion" () -> usize;
        status_string = c"cublasLtGetStatusString" (c_int) -> *const c_char;
        create = c"cublasLtCreate" (*mut cublasLtHandle_t) -> c_int;
        desc_create = c"cublasLtMatmulDescCreate" (*mut cublasLtMatmulDesc_t, cublasComputeType_t, cudaDataType_t)
            -> c_int;
        desc_set = c"cublasLtMatmulDescSetAttribute" (cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t,
            *const c_void, usize) -> c_int;
        layout_create = c"cublasLtMatrixLayoutCreate" (*mut cublasLtMatrixLayout_t, cudaDataType_t, u64, u64, i64)
            -> c_int;
        layout_free = c"cublasLtMatrixLayoutDestroy" (cublasLtMatrixLayout_t) -> c_int;
        preference_create = c"cublasLtMatmulPreferenceCreate" (*mut cublasLtMatmulPreference_t) -> c_int;
        preference_set = c"cublasLtMatmulPreferenceSetAttribute" (cublasLtMatmulPreference_t,
            cublasLtMatmulPreferenceAttributes_t, *const c_void, usize) -> c_int;
        heuristic = c"cublasLtMatmulAlgoGetHeuristic" (cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
            cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, c_int,
            *mut cublasLtMatmulHeuristicResult_t, *mut c_int) -> c_int;
        algorithm_check = c"cublasLtMatmulAlgoCheck" (cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
            cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, *const cublasLtMatmulAlgo_t,
            *mut cublasLtMatmulHeuristicResult_t) -> c_int;
        matmul = c"cublasLtMatmul" (cublasLtHandle_t, cublasLtMatmulDesc_t, *const c_void, *const c_void,
            cublasLtMatrixLayout_t, *const c_void, cublasLtMatrixLayout_t, *const c_void, *const c_void,
            cublasLtMatrixLayout_t, *mut c_void, cublasLtMatrixLayout_t, *const cublasLtMatmulAlgo_t, *mut c_void,
            usize, CUstream) -> c_int;
    }
}

impl CublasLt {
    /// The library of this machine, opened once.
    ///
    /// # Errors
    /// It is missing or too old.
    pub(super) fn get() -> Result<&'static Self, LibraryError> {
        static CUBLASLT_ONCE: OnceLock<Result<CublasLt, LibraryError>> = OnceLock::new();
        CUBLASLT_ONCE
            .get_or_init(Self::open)
            .as_ref()
            .map_err(Clone::clone)
    }

    fn open() -> Result<Self, LibraryError> {
        let library = Library::open(CUBLASLT)?;
        let lt = Self::look_up(library)?;
        let version = lt.version_number();
        if version < CUBLASLT_VERSION {
            return Err(library.old(format!("{}.{}", version / 10_000, version / 100 % 100), "13.0"));
        }
        Ok(lt)
    }

    /// The library's version, as it counts: 130000 for 13.0.
    pub(super) fn version_number(&self) -> usize {
        // SAFETY: takes and changes nothing.
        unsafe { (self.version)() }
    }

    fn check(&self, code: c_int, call: &str) -> Result<(), DeviceError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: gives a constant text for any code.
        let text = string(unsafe { (self.status_string)(code) });
        Err(DeviceError::Cuda(format!("{call}: {text}")))
    }
}

/// The number format of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Out {
    /// Activations.
    Bf16,
    /// Logits.
    F32,
}

/// `out[m, n] = x[m, k] · w[n, k]ᵀ`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) out: Out,
}

/// Where the three matrices are; each dense and row-major.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) x: CUdeviceptr,
    pub(super) w: CUdeviceptr,
    pub(super) out: CUdeviceptr,
}

/// How a product of one shape is computed.
struct Plan {
    shape: Shape,
    w: cublasLtMatrixLayout_t,
    x: cublasLtMatrixLayout_t,
    out: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
    /// In the library's order.
    choices: Vec<cublasLtMatmulAlgo_t>,
}

/// One rank's matrix products.
pub(super) struct Blas {
    lt: &'static CublasLt,
    gpu: Arc<Gpu>,
    handle: cublasLtHandle_t,
    desc: cublasLtMatmulDesc_t,
    preference: cublasLtMatmulPreference_t,
    workspace: Memory,
    plans: HashMap<Shape, Plan>,
    book: Book,
}

// SAFETY: it is used by one thread at a time, its rank's.
unsafe impl Send for Blas {}

/// Choices that the library is asked for.
const CHOICES: usize = 8;

/// The size of a step that a product is computed for: `rows` or a little more.
pub(super) fn size(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=32 => rows.next_multiple_of(4),
        33..=64 => rows.next_multiple_of(8),
        65..=128 => rows.next_multiple_of(16),
        129..=512 => rows.next_multiple_of(32),
        513..=2048 => rows.next_multiple_of(64),
        _ => rows.next_multiple_of(128),
    }
}

/// Scratch of a product: what NVIDIA advises for Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// Plans that are kept. Steps have at most as many numbers of rows as their budget; this bounds what odd ones leave.
const PLANS_MAX: usize = 65_536;

impl Blas {
    /// `book` says how products are chosen.
    pub(super) fn new(gpu: &Arc<Gpu>, book: Book) -> Result<Self, DeviceError> {
        let lt = CublasLt::get()?;
        let (mut handle, mut desc, mut preference) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
        let transposed: c_int = 1;
        // SAFETY: each call writes one handle, or reads as many bytes as it is told.
        unsafe {
            lt.check((lt.create)(&mut handle), "cublasLtCreate")?;
            let code = (lt.desc_create)(
                &mut desc,
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cudaDataType_t::CUDA_R_32F,
            );
            lt.check(code, "cublasLtMatmulDescCreate")?;
            let code = (lt.desc_set)(
                desc,
                cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                ptr::from_ref(&transposed).cast(),
                size_of_val(&transposed),
            );
            lt.check(code, "cublasLtMatmulDescSetAttribute")?;
            lt.check(
                (lt.preference_create)(&mut preference),
                "cublasLtMatmulPreferenceCreate",
            )?;
            let code = (lt.preference_set)(
                preference,
                cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                ptr::from_ref(&WORKSPACE_BYTES).cast(),
                size_of_val(&WORKSPACE_BYTES),
            );
            lt.check(code, "cublasLtMatmulPreferenceSetAttribute")?;
        }
        Ok(Self {
            lt,
            gpu: Arc::clone(gpu),
            handle,
            desc,
            preference,
            workspace: gpu.alloc(WORKSPACE_BYTES, "matrix products")?,
            plans: HashMap::new(),
            book,
        })
    }

    /// Multiplies, in the stream's order.
    pub(super) fn multiply(&mut self, shape: Shape, operands: Operands) -> Result<(), DeviceError> {
        if !self.plans.contains_key(&shape) {
            if self.plans.len() >= PLANS_MAX {
                self.forget();
            }
            let mut plan = self.plan(shape)?;
            self.choose(&mut plan, shape, operands)?;
            self.plans.insert(shape, plan);
        }
        self.run(&self.plans[&shape], operands)
    }

    /// Chooses for weights of `(n, k)` and every step of up to `rows` rows, before anybody waits for one. Rows beyond
    /// `room` have no memory.
    pub(super) fn prepare(
        &mut self,
        rows: usize,
        room: usize,
        (n, k, out): (usize, usize, Out),
        operands: Operands,
    ) -> Result<(), DeviceError> {
        let mut sizes: Vec<usize> = (1..=rows).map(|rows| size(rows).min(room)).collect();
        sizes.dedup();
        for m in sizes {
            self.multiply(Shape { m, n, k, out }, operands)?;
        }
        Ok(())
    }

    fn run(&self, plan: &Plan, operands: Operands) -> Result<(), DeviceError> {
        let (one, zero) = (1f32, 0f32);
        // SAFETY: the operands are dense matrices of the shape's sizes, which the caller's types ensure; the plan was
        // made for this shape and workspace.
        let code = unsafe {
            (self.lt.matmul)(
                self.handle,
                self.desc,
                ptr::from_ref(&one).cast(),
                operands.w as *const c_void,
                plan.w,
                operands.x as *const c_void,
                plan.x,
                ptr::from_ref(&zero).cast(),
                operands.out as *const c_void,
                plan.out,
                operands.out as *mut c_void,
                plan.out,
                &plan.algorithm,
                self.workspace.address as *mut c_void,
                WORKSPACE_BYTES,
                self.gpu.stream,
            )
        };
        self.lt.check(code, "cublasLtMatmul")?;
        self.gpu.named(|| format!("cublasLtMatmul of {:?}", plan.shape))
    }

    /// The library's first choice. It knows columns first, so it is told `outᵀ = (wᵀ)ᵀ · xᵀ`.
    fn plan(&self, shape: Shape) -> Result<Plan, DeviceError> {
        let layout = |numbers, rows: usize, columns: usize| -> Result<cublasLtMatrixLayout_t, DeviceError> {
            let mut layout = ptr::null_mut();
            // SAFETY: writes one handle.
            let code = unsafe {
                (self.lt.layout_create)(&mut layout, numbers, rows as u64, columns as u64, rows as i64)
            };
            self.lt.check(code, "cublasLtMatrixLayoutCreate")?;
            Ok(layout)
        };
        let bf16 = cudaDataType_t::CUDA_R_16BF;
        let numbers = match shape.out {
            Out::Bf16 => bf16,
            Out::F32 => cudaDataType_t::CUDA_R_32F,
        };
        let (w, x) = (layout(bf16, shape.k, shape.n)?, layout(bf16, shape.k, shape.m)?);
        let out = layout(numbers, shape.n, shape.m)?;
        // SAFETY: plain numbers, for which zeros are a value.
        let mut choices: [cublasLtMatmulHeuristicResult_t; CHOICES] = unsafe { mem::zeroed() };
        let mut n = 0;
        // SAFETY: all handles live; there is room for as many choices as are asked for.
        let code = unsafe {
            (self.lt.heuristic)(
                self.handle,
                self.desc,
                w,
                x,
                out,
                out,
                self.preference,
                CHOICES as c_int,
                choices.as_mut_ptr(),
                &mut n,
            )
        };
        self.lt.check(code, "cublasLtMatmulAlgoGetHeuristic")?;
        let choices = &choices[..usize::try_from(n).unwrap_or(0)];
        let Some(first) = choices.first() else {
            return Err(DeviceError::Cuda(format!(
                "cuBLASLt has no way to multiply {} x {} by {} x {}",
                shape.m, shape.k, shape.k, shape.n
            )));
        };
        Ok(Plan {
            shape,
            w,
            x,
            out,
            algorithm: first.algo,
            choices: choices.iter().map(|choice| choice.algo).collect(),
        })
    }

    fn forget(&mut self) {
        for plan in self.plans.drain().map(|(_, plan)| plan) {
            for layout in [plan.w, plan.x, plan.out] {
                // SAFETY: made once, freed once; a product that runs has its own copy.
                unsafe { (self.lt.layout_free)(layout) };
            }
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.forget();
    }
}
