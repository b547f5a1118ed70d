//! Sixteen fp32 lanes, on whatever the processor has, chosen once at run time.
//!
//! Kernels are written once over [`Lanes`] and compiled for each instruction set; [`Isa::run`] enters the compiled copy.
//! Every set computes the same operations in the same order on sixteen logical lanes, so AVX-512 and AVX2 give equal
//! bits. Processors without fused multiply-add round twice and differ in last places.

use std::sync::OnceLock;

/// Numbers in one vector.
pub const LANES: usize = 16;

/// One vector's worth of numbers, aligned to a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [f32; LANES]);

/// Operations on one vector. Callers of the functions must run on a processor that has the instruction set.
pub trait Lanes: Copy {
    /// A vector of sixteen numbers.
    type V: Copy;
    /// Rows of the tallest register tile of a matrix product.
    const TALL: usize;
    /// Vectors side by side in that tile.
    const WIDE: usize;

    /// # Safety
    /// The instruction set is there.
    unsafe fn splat(x: f32) -> Self::V;
    /// # Safety
    /// The instruction set is there; sixteen numbers may be read at `from`.
    unsafe fn load(from: *const f32) -> Self::V;
    /// # Safety
    /// The instruction set is there; sixteen numbers may be written at `to`.
    unsafe fn store(v: Self::V, to: *mut f32);
    /// # Safety
    /// The instruction set is there.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// # Safety
    /// The instruction set is there.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    ///
    /// # Safety
    /// The instruction set is there.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// One lane of [`Lanes::fma`], rounded the same way.
    fn fma1(a: f32, b: f32, c: f32) -> f32;
    /// Asks for the cache line at `at` to be brought into the second-level cache. Any address will do.
    fn prefetch(at: *const f32);
}

/// Code that can be compiled for every instruction set. Mark `run` and what it calls `#[inline(always)]`.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// # Safety
    /// The processor has the instruction set of `S`.
    unsafe fn run<S: Lanes>(self) -> Self::Out;
}

/// An instruction set that this processor was found to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Set);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Set {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best there is.
    pub fn detect() -> Isa {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| Self::available()[0])
    }

    /// All there are, best first.
    pub fn available() -> Vec<Isa> {
        let mut sets = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw");
            if fma && wide {
                sets.push(Isa(Set::Avx512));
            }
            if fma {
                sets.push(Isa(Set::Avx2));
            }
        }
        sets.push(Isa(Set::Portable));
        sets
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "avx2",
            Set::Portable => "portable",
        }
    }

    /// Runs the copy of `kernel` that is compiled for this set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self.0 {
            // SAFETY: the set is only made after its features were detected.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: needs nothing beyond the compilation target.
            Set::Portable => unsafe { kernel.run::<Portable>() },
        }
    }
}

/// Plain arrays, for the compiler to vectorise as it can.
#[derive(Clone, Copy)]
pub struct Portable;

impl Lanes for Portable {
    type V = [f32; LANES];
    const TALL: usize = 2;
    const WIDE: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller promises sixteen readable numbers; an array of them needs no more alignment than one.
        unsafe { from.cast::<[f32; LANES]>().read() }
    }
    #[inline(always)]
    unsafe fn store(v: Self::V, to: *mut f32) {
        // SAFETY: as for `load`, writable.
        unsafe { to.cast::<[f32; LANES]>().write(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| Self::fma1(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn fma1(a: f32, b: f32, c: f32) -> f32 {
        // Where fused multiply-add is not an instruction it would be a slow call.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            a.mul_add(b, c)
        } else {
            a * b + c
        }
    }
    #[inline(always)]
    fn prefetch(_at: *const f32) {} // the hardware's own prefetching is left to it
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Kernel, Lanes};

    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
    pub(super) unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Out {
        // SAFETY: the caller detected the features.
        unsafe { kernel.run::<Avx512>() }
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Out {
        // SAFETY: the caller detected the features.
        unsafe { kernel.run::<Avx2>() }
    }

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    // SAFETY of all functions: the trait's contract is that of the intrinsics.
    impl Lanes for Avx512 {
        type V = __m512;
        const TALL: usize = 8;
        const WIDE: usize = 3; // 24 accumulators, 3 weights and a broadcast of 32 registers

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: see the impl.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            // SAFETY: see the impl.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(v: Self::V, to: *mut f32) {
            // SAFETY: see the impl.
            unsafe { _mm512_storeu_ps(to, v) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see the impl.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see the impl.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: see the impl.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn fma1(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn prefetch(at: *const f32) {
            // SAFETY: a hint; it does not access memory.
            unsafe { _mm_prefetch(at.cast(), _MM_HINT_T1) }
        }
    }

    /// Two 256-bit registers.
    #[derive(Clone, Copy)]
    pub struct Avx2;

    // SAFETY of all functions: the trait's contract is that of the intrinsics, for both halves.
    impl Lanes for Avx2 {
        type V = [__m256; 2];
        const TALL: usize = 4;
        const WIDE: usize = 1; // 8 accumulators, 2 weights and a broadcast of 16 registers

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            // SAFETY: see the impl.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            // SAFETY: see the impl.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(v: Self::V, to: *mut f32) {
            // SAFETY: see the impl.
            unsafe {
                _mm256_storeu_ps(to, v[0]);
                _mm256_storeu_ps(to.add(8), v[1]);
            }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see the impl.
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            // SAFETY: see the impl.
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            // SAFETY: see the impl.
            unsafe {
                [
                    _mm256_fmadd_ps(a[0], b[0], c[0]),
                    _mm256_fmadd_ps(a[1], b[1], c[1]),
                ]
            }
        }
        #[inline(always)]
        fn fma1(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        fn prefetch(at: *const f32) {
            // SAFETY: a hint; it does not access memory.
            unsafe { _mm_prefetch(at.cast(), _MM_HINT_T1) }
        }
    }
}

/// Sum of sixteen lanes, always in the same order.
#[inline(always)]
pub fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// `e^x` for `x <= 0` (and anything that does not overflow), within 2 units in the last place; 0 below -87.3.
///
/// `x = n ln 2 + r`, a polynomial for `e^r` (the Taylor series to degree 7 on |r| <= ln 2 / 2, error 1e-8), and the
/// power of two put together from bits, all without branches so that loops over it vectorise.
#[inline(always)]
pub fn exp<S: Lanes>(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = S::fma1(clamped, std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = S::fma1(n, -0.693_359_4, clamped); // ln 2 in two parts: the first has few enough bits to be exact
    let r = S::fma1(n, 2.121_944_4e-4, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = S::fma1(p, r, c);
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { p * power }
}
