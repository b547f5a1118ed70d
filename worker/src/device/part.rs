//! Part of a weight tensor on its way to a device, which takes it in the number format that it keeps.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use crate::checkpoint::TensorView;

/// Where numbers come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A tensor of a file.
    Tensor(TensorView<'a>),
    /// A formula.
    Random(RandomTensor),
    /// Ones.
    Ones,
}

/// `columns` of `rows` of a tensor.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The tensor.
    pub source: Source<'a>,
    /// Outputs.
    pub rows: Range<usize>,
    /// Inputs.
    pub columns: Range<usize>,
}

impl Part<'_> {
    /// Numbers.
    pub fn len(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In fp32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        match self.source {
            Source::Tensor(tensor) => {
                tensor.read_block_f32_into(self.rows.clone(), self.columns.clone(), &mut out);
            }
            Source::Random(tensor) => self.make(&mut out, |row, column| tensor.number(row, column).to_f32()),
            Source::Ones => out.fill(1.0),
        }
        out
    }

    /// Bits of bf16, row-major, into `out`, which must have room for exactly [`Part::len`] numbers.
    pub fn read_bf16_into(&self, out: &mut [u16]) {
        match self.source {
            Source::Tensor(tensor) => {
                tensor.read_block_bf16_into(self.rows.clone(), self.columns.clone(), out);
            }
            Source::Random(tensor) => self.make(out, |row, column| tensor.number(row, column).to_bits()),
            Source::Ones => out.fill(bf16::ONE.to_bits()),
        }
    }

    fn make<T: Send>(&self, out: &mut [T], number: impl Fn(usize, usize) -> T + Sync) {
        if self.is_empty() {
            return;
        }
        let rows = out.par_chunks_exact_mut(self.columns.len()).enumerate();
        rows.for_each(|(row, out)| {
            for (to, column) in out.iter_mut().zip(self.columns.clone()) {
                *to = number(self.rows.start + row, column);
            }
        });
    }
}

/// A tensor whose numbers are normal with variance 1 over its width, each a function of the tensor's name and its
/// place alone. The normal distribution is that of a sum of sixteen random bytes: whole numbers, so that every machine
/// and every kernel gets the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomTensor {
    /// Of the name.
    pub key: u64,
    /// Numbers in a whole row.
    pub width: usize,
    /// One unit of the sum of bytes.
    pub unit: f32,
}

/// Mean and standard deviation of a sum of sixteen bytes: 16 x 127.5, and the root of 16 x (256² - 1) / 12.
const MEAN: i32 = 2040;
const DEVIATION: f64 = 295.6;
/// Steps of the counter: the odd number nearest to 2^64 over the golden ratio.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

impl RandomTensor {
    /// The tensor of this name, with rows of this width.
    pub fn new(name: &str, width: usize) -> Self {
        Self {
            key: xxh3_64(name.as_bytes()),
            width,
            unit: (1.0 / (DEVIATION * (width as f64).sqrt())) as f32,
        }
    }

    /// The same with numbers `gain` times as large.
    pub fn amplified(self, gain: f32) -> Self {
        Self {
            unit: self.unit * gain,
            ..self
        }
    }

    /// One number.
    pub fn number(&self, row: usize, column: usize) -> bf16 {
        let place = (row * self.width + column) as u64;
        let bytes = |n: u64| mix(self.key.wrapping_add((2 * place + n).wrapping_mul(STEP)));
        let sum: i32 = [bytes(1), bytes(2)]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .map(i32::from)
            .sum();
        bf16::from_f32((sum - MEAN) as f32 * self.unit)
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_tensors_are_normal_and_do_not_depend_on_the_cut() {
        let tensor = RandomTensor::new("model.layers.0.mlp.up_proj.weight", 64);
        let whole = Part {
            source: Source::Random(tensor),
            rows: 0..1000,
            columns: 0..64,
        };
        let numbers = whole.to_f32();
        let mean = numbers.iter().sum::<f32>() / numbers.len() as f32;
        let variance = numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32;
        assert!(mean.abs() < 2e-3, "{mean}");
        assert!((variance * 64.0 - 1.0).abs() < 0.03, "{variance}");
        let beyond = numbers.iter().filter(|x| x.abs() > 2.0 / 8.0).count() as f32 / numbers.len() as f32;
        assert!(
            (beyond - 0.0455).abs() < 0.005,
            "{beyond} lie beyond two deviations"
        );

        let part = Part {
            rows: 10..12,
            columns: 32..64,
            ..whole
        };
        let want: Vec<f32> = (10..12)
            .flat_map(|row| numbers[row * 64 + 32..][..32].to_vec())
            .collect();
        assert_eq!(part.to_f32(), want);
        let mut bits = vec![0; part.len()];
        part.read_bf16_into(&mut bits);
        let back: Vec<f32> = bits.iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect();
        assert_eq!(back, want, "fp32 and bf16 are the same numbers");
    }
}
