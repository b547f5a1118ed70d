//! Products of few rows by a kernel of our own, where it is as fast as the library's: found out at start, on the real
//! weights, with cold caches, and kept for the next start.

use super::{
    BF16, CudaDevice, F32,
    blas::{Blas, Operands, Out, Shape, size},
    choices::{Book, Way},
    driver::Gpu,
    ops::{Kernels, THREADS},
};
use crate::device::DeviceError;

/// The file of our kernel.
pub(super) const SOURCE: &str = "skinny";
/// Rows that `skinny.cu` multiplies at most.
const SKINNY_ROWS: usize = 16;
/// Numbers of a row of the matrix that it takes at a time.
const SKINNY_STEP: usize = 2048;
/// How much longer than the library's, alone, a product of ours may take: in a chain it begins before the kernel before
/// it is done, which no measurement of one product shows.
const SKINNY_SLACK: f64 = 1.05;

/// Whether `skinny.cu` has this shape.
pub(super) fn is_skinny(shape: &Shape) -> bool {
    (1..=SKINNY_ROWS).contains(&shape.m) && shape.n.is_multiple_of(16) && shape.k.is_multiple_of(SKINNY_STEP)
}

impl Kernels {
    /// A product of few rows by our own kernel.
    fn product(&self, gpu: &Gpu, shape: Shape, operands: Operands) -> Result<(), DeviceError> {
        assert!(is_skinny(&shape));
        let kernel = &self.products[usize::from(shape.out == Out::F32)][usize::from(shape.m > 8)];
        let mut arguments = [
            operands.x.into(),
            operands.w.into(),
            operands.out.into(),
            (shape.m as u32).into(),
            (shape.n as u32).into(),
            (shape.k as u32).into(),
        ];
        let grid = [(shape.n / 16) as u32, 1, 1];
        // SAFETY: the parameters of the products; the operands are dense matrices of the shape's sizes, which the caller's
        // types ensure.
        unsafe { gpu.launch(kernel, grid, [THREADS, 1, 1], 0, &mut arguments) }
    }
}

impl CudaDevice {
    /// A product, by whichever kernel was found to be faster.
    pub(super) fn multiply(&mut self, shape: Shape, operands: Operands) -> Result<(), DeviceError> {
        if self.own_products.contains(&shape) {
            return self.kernels.product(&self.gpu, shape, operands);
        }
        self.blas.multiply(shape, operands)
    }

    /// Finds out for which sizes of step our own kernel is as fast as the library.
    pub(super) fn try_own(
        &mut self,
        room: usize,
        (n, k, out): (usize, usize, Out),
        operands: Operands,
    ) -> Result<(), DeviceError> {
        let mut sizes: Vec<usize> = (1..=SKINNY_ROWS).map(|rows| size(rows).min(room)).collect();
        sizes.dedup();
        for shape in sizes
            .into_iter()
            .map(|m| Shape { m, n, k, out })
            .filter(is_skinny)
        {
            match self.blas.book().way(shape)? {
                Some(way) => {
                    if way == Way::Own {
                        self.own_products.insert(shape);
                    }
                    continue;
                }
                None if !self.blas.book().measures() => {
                    self.own_products.insert(shape);
                    continue;
                }
                None => {}
            }
            let (kernels, gpu) = (&self.kernels, &self.gpu);
            let library = self.blas.seconds(shape, operands)?;
            let own = self.blas.timed(|| kernels.product(gpu, shape, operands))?;
            let (Some(library), Some(own)) = (library, own) else {
                continue;
            };
            tracing::debug!(
                ?shape,
                library_us = library * 1e6,
                own_us = own * 1e6,
                "product of few rows tried"
            );
            if own <= SKINNY_SLACK * library {
                self.own_products.insert(shape);
                self.blas.book().found(shape, Way::Own);
            }
        }
        Ok(())
    }

    /// All products are chosen: keeps what was found.
    pub(super) fn keep_choices(&mut self) {
        let rank = self.spec.shard.rank;
        let [known, refused, measured] = self.blas.book().counts();
        tracing::info!(rank, known, refused, measured, "ways to multiply chosen");
        // Times of kernels that are waited for one by one are not times to keep.
        if !self.spec.options.debug {
            self.blas.book().keep();
        }
    }
}

/// How far our kernel is from the library, for one shape.
#[derive(Clone, Debug)]
pub struct ProductCheck {
    /// The shape, and the numbers of the result.
    pub what: String,
    /// The largest difference, over the root mean square of the library's results.
    pub apart: f64,
    /// It wrote to each of its results, and to nothing else.
    pub whole: bool,
}

/// Bytes beyond a result that must stay as they are.
const GUARD: usize = 4096;
/// What a result is filled with before: not a number in either format.
const POISON: u8 = 0xff;

/// Computes random products of these `(m, n, k)` by our kernel, which must have them, and by the library. For tests.
///
/// # Errors
/// The first GPU cannot be used, or fails.
pub fn check_products(shapes: &[(usize, usize, usize)]) -> Result<Vec<ProductCheck>, DeviceError> {
    let gpu = Gpu::open(0, false)?;
    let kernels = Kernels::load(&gpu, true)?;
    let mut blas = Blas::new(&gpu, Book::first())?;
    let mut checks = Vec::new();
    for (&(m, n, k), out) in shapes.iter().flat_map(|s| [(s, Out::Bf16), (s, Out::F32)]) {
        let shape = Shape { m, n, k, out };
        let number = if out == Out::F32 { F32 } else { BF16 };
        let x = gpu.alloc(m * k * BF16, "activations")?;
        let w = gpu.alloc(n * k * BF16, "weights")?;
        let result = gpu.alloc(m * n * number + GUARD, "results")?;
        kernels.fill(&gpu, x.address, 1, (m, k))?;
        kernels.fill(&gpu, w.address, 2, (n, k))?;
        let operands = Operands {
            x: x.address,
            w: w.address,
            out: result.address,
        };
        let read = || -> Result<(Vec<f32>, bool), DeviceError> {
            let mut bytes = vec![0u8; result.bytes];
            gpu.copy_out(&mut bytes, result.address)?;
            gpu.wait()?;
            let (numbers, guard) = bytes.split_at(m * n * number);
            let wide = |b: &[u8]| match *b {
                [a, b] => f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16),
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                _ => unreachable!("numbers have two or four bytes"),
            };
            let numbers = numbers.chunks(number).map(wide).collect();
            Ok((numbers, guard.iter().all(|&byte| byte == POISON)))
        };
        blas.multiply(shape, operands)?;
        let (want, _) = read()?;
        let square = |x: f32| f64::from(x) * f64::from(x);
        let scale = (want.iter().map(|&x| square(x)).sum::<f64>() / want.len() as f64).sqrt();
        gpu.set_bytes(&result, POISON)?;
        kernels.product(&gpu, shape, operands)?;
        let (got, guarded) = read()?;
        let apart = got.iter().zip(&want).map(|(a, b)| f64::from((a - b).abs()));
        checks.push(ProductCheck {
            what: format!("{shape:?}"),
            apart: apart.fold(0.0, f64::max) / scale,
            whole: guarded && got.iter().all(|x| x.is_finite()),
        });
    }
    Ok(checks)
}
