//! Random numbers without state: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
//!
//! A block cipher over a counter: the same (key, counter) gives the same words on every machine, at any batch size, in
//! any order. The tests hold the known answers published with the Random123 library.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words for a key and a counter.
pub fn philox4x32_10(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut k, mut c) = (key, counter);
    for _ in 0..ROUNDS {
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(c[0]);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(c[2]);
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// A number in `[0, 1)` with 53 random bits, for the token at `position` of a sequence (prompt tokens count).
pub fn uniform(seed: u64, candidate: u32, position: u32) -> f64 {
    uniform_bits(seed, candidate, position) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The 53 bits of [`uniform`].
pub fn uniform_bits(seed: u64, candidate: u32, position: u32) -> u64 {
    let words = philox4x32_10([seed as u32, (seed >> 32) as u32], [position, candidate, 0, 0]);
    (u64::from(words[0]) << 32 | u64::from(words[1])) >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let check = |key, counter, want| assert_eq!(philox4x32_10(key, counter), want);
        check(
            [0; 2],
            [0; 4],
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
        );
        check(
            [u32::MAX; 2],
            [u32::MAX; 4],
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
        );
        check(
            [0xa409_3822, 0x299f_31d0],
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        );
    }

    #[test]
    fn uniform_stays_below_one_and_differs_by_every_input() {
        let base = uniform(7, 0, 0);
        assert!((0.0..1.0).contains(&base));
        for other in [
            uniform(8, 0, 0),
            uniform(7 + (1 << 32), 0, 0),
            uniform(7, 1, 0),
            uniform(7, 0, 1),
        ] {
            assert_ne!(base, other);
        }
    }
}
