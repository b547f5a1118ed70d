//! Products of up to 256 rows by kernels of our own, where they are as fast as the library's.
//!
//! `skinny.cu` has up to 16 rows on any GPU, `product.cu` up to 256 on Hopper, where how many blocks share activations
//! and how many divide the sums depends on the matrix. What is fastest is found out at start, on the real weights, with
//! cold caches, and kept.

use std::{collections::HashMap, sync::Arc};

use super::{
    BF16, CudaDevice, F32,
    blas::{Blas, Operands, Out, Shape, TRIED_ROWS, size},
    driver::{Gpu, MAP_BYTES, Memory},
    ops::{Kernels, THREADS},
};
use crate::device::DeviceError;

/// Rows that `skinny.cu` multiplies at most.
const SKINNY_ROWS: usize = 16;
/// Numbers of a row of the matrix that it takes at a time.
const SKINNY_STEP: usize = 2048;
/// How much longer than the library's, alone, a product of ours may take: in a chain it begins before the kernel before
/// it is done, which no measurement of one product shows.
const SLACK: f64 = 1.05;
/// Rows of the matrix that a block of `product.cu` has.
const TILE: usize = 128;
/// Numbers of a row that it takes at a time.
const STEP: usize = 64;
/// Threads of such a block.
const HOPPER_THREADS: u32 = 288;
/// Most blocks of a cluster that every GPU has.
const CLUSTER_MAX: usize = 8;
/// Matrices, and activations of each size, that are described to the copy engine.
const MAPS_MAX: usize = 4096;
/// Memory of their descriptions.
pub(super) const MAPS_BYTES: usize = MAPS_MAX * MAP_BYTES;

/// A kernel of `product.cu`.
pub(super) struct HopperProduct {
    pub(super) name: &'static str,
    /// Of the activations.
    rows: usize,
    /// Copies that are under way or in use.
    stages: usize,
    /// Blocks of it that a multiprocessor has at a time.
    blocks: usize,
}

macro_rules! hopper_products {
    ($(($rows:literal, $stages:literal, $blocks:literal)),* $(,)?) => {
        &[$(HopperProduct {
            name: concat!("product_hopper_", $rows),
            rows: $rows,
            stages: $stages,
            blocks: $blocks,
        }),*]
    };
}

/// As `product.cu` has them, by rows.
pub(super) const HOPPER_PRODUCTS: &[HopperProduct] = hopper_products![
    (16, 6, 2),
    (32, 5, 2),
    (48, 5, 2),
    (64, 4, 2),
    (80, 4, 2),
    (96, 3, 2),
    (112, 3, 2),
    (128, 3, 2),
    (160, 6, 1),
    (192, 5, 1),
    (224, 5, 1),
    (256, 4, 1),
];

impl HopperProduct {
    /// Dynamic shared memory of a block, with what alignment may cost.
    pub(super) const fn shared(&self) -> u32 {
        (self.stages * (TILE + self.rows) * STEP * BF16 + 1024) as u32
    }
}

/// How a product is computed without the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    /// By `skinny.cu`.
    Skinny,
    /// By `product.cu`.
    Hopper {
        /// Which of its kernels.
        kernel: usize,
        /// Blocks of a cluster with the same part of the contiguous dimension.
        across: usize,
        /// Parts of the contiguous dimension.
        parts: usize,
    },
}

/// A launch, but for where the numbers are.
#[derive(Clone, Copy)]
struct Launch {
    own: Own,
    /// What the copy engine knows of matrix and activations.
    maps: [u64; 2],
}

/// What was chosen, and what it needs.
pub(super) struct Products {
    own: HashMap<Shape, Own>,
    maps: Memory,
    /// By address, rows, columns, and rows of a box.
    known: HashMap<(u64, [usize; 2], usize), u64>,
}

/// Whether `skinny.cu` has this shape.
fn is_skinny(shape: &Shape) -> bool {
    (1..=SKINNY_ROWS).contains(&shape.m) && shape.n.is_multiple_of(16) && shape.k.is_multiple_of(SKINNY_STEP)
}

/// Ways in which `product.cu` can be launched for a shape, the likeliest first.
fn hopper_ways(shape: &Shape, n_sm: usize) -> Vec<Own> {
    let Some(kernel) = HOPPER_PRODUCTS.iter().position(|product| product.rows >= shape.m) else {
        return Vec::new();
    };
    // The copy engine wants rows of sixteen bytes, and a row of the result begins where it likes.
    if !shape.k.is_multiple_of(STEP) {
        return Vec::new();
    }
    let slots = n_sm * HOPPER_PRODUCTS[kernel].blocks;
    let tiles = shape.n.div_ceil(TILE);
    let mut ways = Vec::new();
    for across in [2, 1] {
        for parts in [8, 4, 2, 1] {
            let blocks = tiles.next_multiple_of(across) * parts;
            let suits = blocks <= 2 * slots && 3 * blocks >= slots;
            if across * parts <= CLUSTER_MAX && shape.k / STEP >= parts && (suits || parts == 1) {
                let own = Own::Hopper {
                    kernel,
                    across,
                    parts,
                };
                ways.push((blocks > slots, across, own));
            }
        }
    }
    // One wave of blocks before several.
    ways.sort_by_key(|&(more, across, _)| (more, std::cmp::Reverse(across)));
    ways.into_iter().map(|(.., own)| own).collect()
}

impl Products {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, DeviceError> {
        Ok(Self {
            own: HashMap::new(),
            maps: gpu.alloc(MAPS_BYTES, "matrix products")?,
            known: HashMap::new(),
        })
    }

    pub(super) fn bytes(&self) -> usize {
        self.maps.bytes
    }

    /// Where a matrix is described to the copy engine, in boxes of so many rows; `None` if there is no room for one more.
    fn map(
        &mut self,
        gpu: &Gpu,
        address: u64,
        sizes: [usize; 2],
        box_rows: usize,
    ) -> Result<Option<u64>, DeviceError> {
        let key = (address, sizes, box_rows);
        if let Some(&known) = self.known.get(&key) {
            return Ok(Some(known));
        }
        if self.known.len() == MAPS_MAX {
            return Ok(None);
        }
        let map = gpu.matrix_map(address, sizes, [box_rows, STEP])?;
        let to = self.maps.at(self.known.len() * MAP_BYTES);
        // The driver takes it before the call returns: it is not in page-locked memory.
        gpu.copy_in(to, &map)?;
        self.known.insert(key, to);
        Ok(Some(to))
    }

    /// Makes ready for a product; `None` if it cannot be.
    fn launch(
        &mut self,
        gpu: &Gpu,
        own: Own,
        shape: Shape,
        operands: Operands,
    ) -> Result<Option<Launch>, DeviceError> {
        let Own::Hopper { kernel, across, .. } = own else {
            return Ok(Some(Launch { own, maps: [0; 2] }));
        };
        let w = self.map(gpu, operands.w, [shape.n, shape.k], TILE)?;
        let slice = HOPPER_PRODUCTS[kernel].rows / across;
        let x = self.map(gpu, operands.x, [shape.m, shape.k], slice)?;
        Ok(w.zip(x).map(|(w, x)| Launch { own, maps: [w, x] }))
    }
}

impl Kernels {
    /// A product by our own kernel.
    fn product(
        &self,
        gpu: &Gpu,
        launch: Launch,
        shape: Shape,
        operands: Operands,
    ) -> Result<(), DeviceError> {
        let Shape { m, n, k, out } = shape;
        let sizes = [(m as u32).into(), (n as u32).into(), (k as u32).into()];
        let wide = out == Out::F32;
        let (kernel, across, parts) = match launch.own {
            Own::Skinny => {
                assert!(is_skinny(&shape));
                let kernel = &self.products[usize::from(wide)][usize::from(m > 8)];
                let places = [operands.x.into(), operands.w.into(), operands.out.into()];
                let mut arguments = [places, sizes].concat();
                let grid = [(n / 16) as u32, 1, 1];
                // SAFETY: the parameters of the products; the operands are dense matrices of the shape's sizes, which the
                // caller's types ensure.
                return unsafe { gpu.launch(kernel, grid, [THREADS, 1, 1], 0, &mut arguments) };
            }
            Own::Hopper {
                kernel,
                across,
                parts,
            } => (kernel, across, parts),
        };
        assert!(m <= HOPPER_PRODUCTS[kernel].rows);
        let places = [launch.maps[0].into(), launch.maps[1].into(), operands.out.into()];
        let how = [
            (across as u32).into(),
            (parts as u32).into(),
            u32::from(wide).into(),
        ];
        let mut arguments = [places, sizes, how].concat();
        let blocks = n.div_ceil(TILE).next_multiple_of(across) * parts;
        // SAFETY: the parameters of `product_hopper`; the maps are of operands of the shape's sizes.
        unsafe {
            gpu.launch_clusters(
                &self.hopper_products[kernel],
                (across * parts) as u32,
                [blocks as u32, 1, 1],
                [HOPPER_THREADS, 1, 1],
                HOPPER_PRODUCTS[kernel].shared(),
                &mut arguments,
            )
        }
    }
}

impl CudaDevice {
    /// A product, by whichever kernel was found to be faster.
    pub(super) fn multiply(&mut self, shape: Shape, operands: Operands) -> Result<(), DeviceError> {
        if let Some(&own) = self.products.own.get(&shape)
            && let Some(launch) = self.products.launch(&self.gpu, own, shape, operands)?
        {
            return self.kernels.product(&self.gpu, launch, shape, operands);
        }
        self.blas.multiply(shape, operands)
    }

    /// Finds out for which sizes of step which kernel of ours is as fast as the library.
    pub(super) fn try_own(
        &mut self,
        room: usize,
        (n, k, out): (usize, usize, Out),
        operands: Operands,
    ) -> Result<(), DeviceError> {
        let hopper = !self.kernels.hopper_products.is_empty() && !self.spec.portable;
        let mut sizes: Vec<usize> = (1..=TRIED_ROWS).map(|rows| size(rows).min(room)).collect();
        sizes.dedup();
        for m in sizes {
            let shape = Shape { m, n, k, out };
            let mut ways: Vec<Own> = is_skinny(&shape).then_some(Own::Skinny).into_iter().collect();
            if hopper {
                ways.extend(hopper_ways(&shape, self.gpu.n_sm as usize));
            }
            let chosen = match self.spec.tuned {
                true => self.fastest(&ways, shape, operands)?,
                false => ways.first().copied(),
            };
            if let Some(own) = chosen {
                self.products.own.insert(shape, own);
            }
        }
        Ok(())
    }

    /// The fastest of our own ways, unless the library is faster by more than a chain makes up for.
    fn fastest(
        &mut self,
        ways: &[Own],
        shape: Shape,
        operands: Operands,
    ) -> Result<Option<Own>, DeviceError> {
        let mut best: Option<(f64, Own)> = None;
        for &own in ways {
            let Some(launch) = self.products.launch(&self.gpu, own, shape, operands)? else {
                continue;
            };
            let (kernels, gpu) = (&self.kernels, &self.gpu);
            let time = self
                .blas
                .timed(|| kernels.product(gpu, launch, shape, operands))?;
            tracing::trace!(
                ?shape,
                ?own,
                microseconds = time.map(|s| s * 1e6),
                "product tried"
            );
            if let Some(time) = time
                && best.is_none_or(|(least, _)| time < least)
            {
                best = Some((time, own));
            }
        }
        let (Some((time, own)), Some(library)) = (best, self.blas.seconds(shape, operands)?) else {
            return Ok(None);
        };
        tracing::debug!(
            ?shape,
            ?own,
            own_us = time * 1e6,
            library_us = library * 1e6,
            "product of our own tried"
        );
        Ok((time <= SLACK * library).then_some(own))
    }
}

/// How far a kernel of ours is from the library, for one shape.
#[derive(Clone, Debug)]
pub struct ProductCheck {
    /// Kernel, shape, and how it was launched.
    pub what: String,
    /// The largest difference, over the root mean square of the library's results.
    pub apart: f64,
    /// It wrote to each of its results, and to nothing else.
    pub whole: bool,
}

/// Numbers beyond a result that must stay as they are.
const GUARD: usize = 4096;
/// What a result is filled with before: not a number in either format.
const POISON: u8 = 0xff;

/// Computes random products of these `(m, n, k)` in every way there is, and by the library. For tests.
///
/// # Errors
/// As for [`CudaDevice::new`].
pub fn check_products(shapes: &[(usize, usize, usize)]) -> Result<Vec<ProductCheck>, DeviceError> {
    let gpu = Gpu::open(0)?;
    let kernels = Kernels::load(&gpu, true)?;
    let mut blas = Blas::new(&gpu, false)?;
    let mut products = Products::new(&gpu)?;
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
        let mut ways: Vec<Own> = is_skinny(&shape).then_some(Own::Skinny).into_iter().collect();
        if !kernels.hopper_products.is_empty() {
            ways.extend(hopper_ways(&shape, gpu.n_sm as usize));
        }
        for own in ways {
            let Some(launch) = products.launch(&gpu, own, shape, operands)? else {
                continue;
            };
            gpu.set_bytes(&result, POISON)?;
            kernels.product(&gpu, launch, shape, operands)?;
            let (got, guarded) = read()?;
            let apart = got.iter().zip(&want).map(|(a, b)| f64::from((a - b).abs()));
            checks.push(ProductCheck {
                what: format!("{own:?} {shape:?}"),
                apart: apart.fold(0.0, f64::max) / scale,
                whole: guarded && got.iter().all(|x| x.is_finite()),
            });
        }
        // Memory is freed below, and may come back at the same address for other sizes.
        gpu.wait()?;
        products = Products::new(&gpu)?;
    }
    Ok(checks)
}
