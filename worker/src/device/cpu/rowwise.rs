//! Operations on one row at a time: norm, rotary embedding, gated activation. All limited by bytes, and small beside
//! the matrix products.

use super::simd::{Kernel, LANES, Lanes, exp, sum_lanes};

/// `normed = row / sqrt(mean(row²) + eps) * weight`.
pub(super) struct RmsNorm<'a> {
    pub(super) row: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) eps: f32,
    pub(super) normed: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = self.row.as_chunks::<LANES>();
        for chunk in chunks {
            for (sum, &x) in lanes.iter_mut().zip(chunk) {
                *sum = S::fma1(x, x, *sum);
            }
        }
        for (sum, &x) in lanes.iter_mut().zip(rest) {
            *sum = S::fma1(x, x, *sum);
        }
        let mean = sum_lanes(lanes) / self.row.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        for ((to, &x), &w) in self.normed.iter_mut().zip(self.row).zip(self.weight) {
            *to = w * (x * scale);
        }
    }
}

/// `to += from`.
pub(super) struct Add<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) from: &'a [f32],
}

impl Kernel for Add<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        for (to, &from) in self.to.iter_mut().zip(self.from) {
            *to += from;
        }
    }
}

/// `out = silu(gate) * up`, where `silu(x) = x / (1 + e^-x)`.
pub(super) struct SiluMul<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Lanes>(self) {
        for ((out, &gate), &up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            // Of the two signs the one whose exponential cannot overflow.
            let e = exp::<S>(-gate.abs());
            let sigmoid = if gate >= 0.0 { 1.0 } else { e } / (1.0 + e);
            *out = gate * sigmoid * up;
        }
    }
}

/// Rotates one head: pairs are (i, i + half), as in the checkpoints of the Hugging Face layout.
#[inline]
pub(super) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), &cos), &sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
