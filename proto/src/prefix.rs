//! The name of a block of tokens: a hash chained over everything before it.
//!
//! Router and worker compute it from token ids alone and must agree, for ever, across builds and machines: a router
//! counts on finding the same key in a worker's cache events. A wrong key costs speed, never another user's
//! cache, because a worker computes its own keys from the tokens it was given.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The parent of a sequence's first block: requests of different salts share no key.
pub fn root(salt: u64) -> u64 {
    xxh3_64_with_seed(b"swallow-prefix-v1", salt)
}

/// A client's salt text as the number that travels to the worker; the empty text is 0, the common salt.
pub fn salt(text: &str) -> u64 {
    if text.is_empty() {
        0
    } else {
        xxh3_64_with_seed(text.as_bytes(), 0)
    }
}

/// The key of `block`, whose predecessor's key is `parent`.
pub fn next(parent: u64, block: &[u32]) -> u64 {
    // Little-endian on every machine, so that keys may cross machines.
    let bytes: Vec<u8> = block.iter().flat_map(|token| token.to_le_bytes()).collect();
    xxh3_64_with_seed(&bytes, parent)
}

/// The keys of all whole blocks of `tokens`, in order; a last partial block has none.
///
/// # Panics
/// If `block_tokens` is 0.
pub fn keys(salt: u64, block_tokens: usize, tokens: &[u32]) -> Vec<u64> {
    let mut parent = root(salt);
    tokens
        .chunks_exact(block_tokens)
        .map(|block| {
            parent = next(parent, block);
            parent
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_same_in_every_build() {
        // Written down once: a change here empties every router's picture of every worker.
        let tokens: Vec<u32> = (128_000..128_040).collect();
        assert_eq!(keys(0, 16, &tokens), KNOWN);
    }

    const KNOWN: [u64; 2] = [3_353_417_280_539_794_444, 6_722_160_524_309_888_854];

    #[test]
    fn a_key_names_everything_before_it() {
        let a: Vec<u32> = (0..48).collect();
        let mut b = a.clone();
        b[0] = 99;
        let (ka, kb) = (keys(0, 16, &a), keys(0, 16, &b));
        assert!(ka.iter().zip(&kb).all(|(x, y)| x != y));
        assert_eq!(keys(0, 16, &a[..47]), ka[..2]);
        assert_ne!(keys(1, 16, &a), ka);
        assert_eq!(salt(""), 0);
        assert_ne!(salt("a"), salt("b"));
    }
}
