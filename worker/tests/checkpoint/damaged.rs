//! Files with random damage: no panic, no message of two lines, nothing accepted that the format forbids.

use std::{fs, path::Path};

use serde_json::json;
use swallow_worker::checkpoint::{Checkpoint, LlamaConfig};

use crate::folder::{Folder, ONE, safetensors_bytes, small_config};

#[test]
fn damaged_headers_never_pass_where_the_formats_own_library_refuses() {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let folder = Folder::small();
    let good = safetensors_bytes(&folder.shards[ONE]);
    let header_end = 8 + u64::from_le_bytes(good[..8].try_into().expect("eight bytes")) as usize;
    let dir = folder.write();
    let mut opened = 0;
    for _ in 0..500 {
        let mut bytes = good.clone();
        match random.u8(0..4) {
            0 => bytes.truncate(random.usize(0..bytes.len())),
            1 => bytes.extend(std::iter::repeat_n(0, random.usize(1..20))),
            _ => {
                for _ in 0..random.usize(1..4) {
                    let digits = b"0123456789[]{}\",:BF";
                    bytes[random.usize(0..header_end)] = digits[random.usize(0..digits.len())];
                }
            }
        }
        fs::write(dir.path().join(ONE), &bytes).expect("a written file");
        match Checkpoint::open(dir.path(), 1) {
            Ok(_) => {
                opened += 1;
                let reference = safetensors::SafeTensors::deserialize(&bytes);
                assert!(reference.is_ok(), "{:?}", reference.err());
            }
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
    }
    // Some damage lands in the metadata or repeats what was there.
    assert!(opened < 50, "{opened} of 500 damaged files opened");
}

#[test]
fn damaged_configs_never_panic() {
    let seed = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut config = small_config();
    config["rope_parameters"] = json!({"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let good = config.to_string().into_bytes();
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..random.usize(1..4) {
            let letters = b"0123456789-.e[]{}\",:nult ";
            let at = random.usize(0..bytes.len());
            bytes[at] = letters[random.usize(0..letters.len())];
        }
        match LlamaConfig::parse(Path::new("config.json"), &bytes) {
            Ok(config) => assert!(config.n_heads % config.n_kv_heads == 0 && config.head_dim % 2 == 0),
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
    }
}
