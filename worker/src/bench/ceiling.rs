//! What the processors could do if nothing else limited them: the same vector instructions as the kernels, from
//! registers, and reads as long as memory.

use std::{
    sync::Barrier,
    time::{Duration, Instant},
};

use crate::device::cpu::{Isa, Kernel, LANES, Lanes};

/// Well beyond the last-level cache of any processor's one socket.
const BUFFER_BYTES: usize = 1 << 30;
/// A ceiling is the best of several short measurements: whatever else the machine does only lowers them.
const ROUNDS: usize = 6;
const ROUND: Duration = Duration::from_millis(100);

/// Floating-point operations a second of all threads together; a fused multiply-add is two.
pub(super) fn flops(threads: usize) -> f64 {
    const CALL: usize = 100_000;
    let isa = Isa::detect();
    let per_call = (2 * CALL * CHAINS * LANES) as f64;
    rate(threads, per_call, |_| isa.run(Fma { rounds: CALL }))
}

/// Bytes a second that all threads together read from memory.
pub(super) fn read_bandwidth(threads: usize) -> f64 {
    let isa = Isa::detect();
    let per_thread = BUFFER_BYTES / 4 / threads;
    // Not zeros: untouched zero pages would all be one page of memory.
    let buffer = vec![1.0f32; per_thread * threads];
    let parts: Vec<&[f32]> = buffer.chunks_exact(per_thread).collect();
    rate(threads, (4 * per_thread) as f64, |thread| {
        isa.run(Sum(parts[thread]))
    })
}

/// Calls `work` on every thread for a while; `amount` a call, summed over threads, over seconds.
fn rate(threads: usize, amount: f64, work: impl Fn(usize) -> f32 + Sync) -> f64 {
    let start = Barrier::new(threads);
    let round = |thread: usize| {
        start.wait();
        let (began, mut calls) = (Instant::now(), 0.0);
        while began.elapsed() < ROUND {
            std::hint::black_box(work(thread));
            calls += 1.0;
        }
        calls * amount / began.elapsed().as_secs_f64()
    };
    let measure = |thread: usize| -> Vec<f64> { (0..ROUNDS).map(|_| round(thread)).collect() };
    let measure = &measure;
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || measure(thread)))
            .collect();
        let rates: Vec<Vec<f64>> = running
            .into_iter()
            .map(|thread| thread.join().expect("arithmetic does not panic"))
            .collect();
        (0..ROUNDS)
            .map(|n| rates.iter().map(|thread| thread[n]).sum())
            .fold(0.0, f64::max)
    })
}

/// Independent sums: enough to hide the latency of an instruction, few enough for the registers.
const CHAINS: usize = 12;

struct Fma {
    rounds: usize,
}

impl Kernel for Fma {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<S: Lanes>(self) -> f32 {
        // SAFETY: the instruction set is the caller's; `out` has room for a vector.
        unsafe {
            let (a, b) = (
                S::splat(std::hint::black_box(0.999)),
                S::splat(std::hint::black_box(1e-3)),
            );
            let mut acc = [b; CHAINS];
            for _ in 0..self.rounds {
                for x in &mut acc {
                    *x = S::fma(*x, a, b);
                }
            }
            let mut out = [0.0; LANES];
            let sum = acc.into_iter().fold(S::splat(0.0), |sum, x| S::add(sum, x));
            S::store(sum, out.as_mut_ptr());
            out[0]
        }
    }
}

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<S: Lanes>(self) -> f32 {
        const WIDTH: usize = 8 * LANES;
        // SAFETY: the instruction set is the caller's; each chunk has WIDTH numbers, `out` room for a vector.
        unsafe {
            let mut acc = [S::splat(0.0); 8];
            for chunk in self.0.as_chunks::<WIDTH>().0 {
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = S::add(*acc, S::load(chunk.as_ptr().add(i * LANES)));
                }
            }
            let mut out = [0.0; LANES];
            let sum = acc.into_iter().fold(S::splat(0.0), |sum, x| S::add(sum, x));
            S::store(sum, out.as_mut_ptr());
            out[0]
        }
    }
}
