//! The frequencies of the rotary embedding, as the `transformers` library computes them, single precision throughout.
//!
//! An angle is position times frequency; at position 100,000 one unit in a frequency's last place is 0.006 radians. So
//! every rounding is in the same place as where the checkpoints were trained.

use crate::checkpoint::{Rope, RopeScaling};

/// One frequency for each pair of numbers of a head of `dim`.
pub fn inverse_frequencies(rope: &Rope, dim: usize) -> Vec<f32> {
    let plain = (0..dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / dim as f32;
        1.0 / rope.theta.powf(f64::from(exponent)) as f32
    });
    match rope.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let (factor, low, high) = (factor as f32, low_freq_factor as f32, high_freq_factor as f32);
            let context = original_max_position_embeddings as f32;
            plain.map(|f| llama3(f, factor, low, high, context)).collect()
        }
    }
}

/// Long waves are stretched by `factor`, short ones kept, those between blended.
fn llama3(frequency: f32, factor: f32, low: f32, high: f32, context: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / frequency;
    if wavelength < context / high {
        frequency
    } else if wavelength > context / low {
        frequency / factor
    } else {
        let smooth = (context / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(scaling: RopeScaling, want: &[(usize, f64)]) {
        let got = inverse_frequencies(
            &Rope {
                theta: 500_000.0,
                scaling,
            },
            128,
        );
        assert_eq!(got.len(), 64);
        for &(i, want) in want {
            let error = (f64::from(got[i]) / want - 1.0).abs();
            assert!(error < 3e-7, "frequency {i}: {} is not {want}", got[i]);
        }
    }

    #[test]
    fn plain() {
        let want = [
            (0, 1.0),
            (1, 0.8146172338565447),
            (32, 0.001414213562373095),
            (63, 2.455140791131609e-06),
        ];
        check(RopeScaling::None, &want);
    }

    #[test]
    fn linear() {
        check(
            RopeScaling::Linear { factor: 4.0 },
            &[(0, 0.25), (32, 0.001414213562373095 / 4.0)],
        );
    }

    /// Llama 3.1's numbers: kept, blended and stretched frequencies.
    #[test]
    fn llama3() {
        let want = [
            (0, 1.0),
            (16, 0.03760603093086393),
            (28, 0.003211445994752591),
            (30, 0.0013718935677611381),
            (32, 0.0005248461609929547),
            (34, 0.0001785078127679964),
            (36, 7.78465527393245e-05),
            (40, 3.428102195952591e-05),
            (63, 3.068925988914511e-07),
        ];
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        check(scaling, &want);
    }
}
