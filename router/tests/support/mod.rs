//! What several tests use: a small tokenizer of single bytes, and random text that is hard on decoders.
#![allow(dead_code, reason = "each test binary uses its part of it")]

pub mod engine;
pub mod http;

use serde_json::{Value, json};

/// The texts of the added tokens of `byte_tokenizer`, from id 256.
pub const SPECIALS: [&str; 6] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<tool>",
];
/// Its beginning of sequence.
pub const BOS: u32 = 256;
/// Its first end of sequence.
pub const EOS: u32 = 257;
/// Its end of turn.
pub const EOT: u32 = 260;
/// An added token that is text.
pub const TOOL: u32 = 261;

/// A tokenizer.json with one token for each byte; id = byte. A text begins with BOS.
pub fn byte_tokenizer() -> Value {
    let mut stand_in = 0x100u32..;
    let vocab: serde_json::Map<String, Value> = (0..=255u8)
        .map(|byte| {
            let own = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if own {
                u32::from(byte)
            } else {
                stand_in.next().expect("endless")
            };
            (
                char::from_u32(code).expect("a character").to_string(),
                json!(byte),
            )
        })
        .collect();
    let added: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(i, content)| {
            json!({"id": 256 + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *content != "<tool>"})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": SPECIALS[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIALS[0]: {"id": SPECIALS[0], "ids": [BOS], "tokens": [SPECIALS[0]]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

/// A chat template in the manner of Llama 3.
pub const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + \
    '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

/// The tokenizer_config.json that goes with it.
pub fn tokenizer_config() -> Value {
    json!({"bos_token": SPECIALS[0], "eos_token": {"content": SPECIALS[1]}, "chat_template": TEMPLATE})
}

/// The seed of a random test, printed so that a failure can be repeated with `SWALLOW_TEST_SEED`.
pub fn rng(test: &str) -> fastrand::Rng {
    let seed = match std::env::var("SWALLOW_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SWALLOW_TEST_SEED is a number"),
        Err(_) => fastrand::u64(..),
    };
    println!("{test}: SWALLOW_TEST_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

const SCRAPS: [&str; 14] = [
    "a",
    "END",
    "日本",
    "語",
    "🇯🇵",
    "👨‍👩‍👧‍👦",
    "é",
    "e\u{301}",
    "\u{FFFD}",
    "𠮷",
    "한",
    "\n\n",
    " ",
    "ｶﾞ",
];

/// Text, emoji joined by ZWJ, and now and then bytes that are no text.
pub fn random_bytes(rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rng.usize(0..12) {
        match rng.u8(0..8) {
            0 => bytes.push(rng.u8(..)),
            1 => {
                let scrap = rng.choice(SCRAPS).expect("not empty").as_bytes();
                bytes.extend_from_slice(&scrap[..rng.usize(0..=scrap.len())]);
            }
            _ => bytes.extend_from_slice(rng.choice(SCRAPS).expect("not empty").as_bytes()),
        }
    }
    bytes
}

/// `bytes` cut at random places.
pub fn random_parts<'a>(rng: &mut fastrand::Rng, bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (part, after) = rest.split_at(rng.usize(1..=rest.len().min(5)));
        parts.push(part);
        rest = after;
    }
    parts
}
