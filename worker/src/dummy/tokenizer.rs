//! A tokenizer of any size, so that text flows through a model that nobody trained.
//!
//! Bytes come first, then pairs of letters, triples, and so on, each joined from two shorter tokens: any text can be
//! written, plain words take a token for a few letters, and every id that a model draws has letters to show.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoint::{CheckpointError, LlamaConfig};

/// Where a model's folder has it.
pub(super) const FILE: &str = "tokenizer.json";
/// How byte-level tokenizers write a space.
const SPACE: char = 'Ġ';
/// Every text is made of these.
const BYTES: usize = 256;

/// A made-up vocabulary and what belongs to it.
pub(super) struct Made {
    pub(super) tokenizer: Vec<u8>,
    pub(super) tokenizer_config: Vec<u8>,
    pub(super) generation_config: Vec<u8>,
}

/// Makes the tokenizer of a model of this shape; `place` is its config.json in messages.
///
/// # Errors
/// There are fewer ids than bytes and control tokens.
pub(super) fn make(place: &Path, config: &LlamaConfig) -> Result<Made, CheckpointError> {
    let controls = controls(config);
    let needed = BYTES + controls.len();
    if config.vocab_size < needed {
        return Err(CheckpointError::Value {
            file: place.into(),
            key: "vocab_size".into(),
            expected: format!("at least {needed}, one id for each byte and control token"),
            found: config.vocab_size.to_string(),
            advice: format!("; or put a {FILE} beside it"),
        });
    }
    Ok(Made {
        tokenizer: bytes(&tokenizer(config, &controls)),
        tokenizer_config: bytes(&tokenizer_config(config, &controls)),
        generation_config: bytes(&json!({
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_ids,
        })),
    })
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// Control tokens and their ids: the beginning, then the ends.
fn controls(config: &LlamaConfig) -> Vec<(u32, String)> {
    let mut controls: Vec<(u32, String)> = Vec::new();
    controls.extend(config.bos_token_id.map(|id| (id, "<|begin_of_text|>".to_owned())));
    for (n, &id) in config.eos_token_ids.iter().enumerate() {
        if controls.iter().all(|(other, _)| *other != id) {
            let text = match n {
                0 => "<|end_of_text|>".to_owned(),
                _ => format!("<|end_of_text_{n}|>"),
            };
            controls.push((id, text));
        }
    }
    controls
}

fn tokenizer(config: &LlamaConfig, controls: &[(u32, String)]) -> Value {
    let is_control = |id: &u32| controls.iter().any(|(control, _)| control == id);
    let last = u32::try_from(config.vocab_size).expect("config.json bounds the vocabulary");
    let mut ids = (0..last).filter(|id| !is_control(id));
    let mut vocabulary: Map<String, Value> = (0..=u8::MAX)
        .zip(&mut ids)
        .map(|(byte, id)| (letter(byte).to_string(), id.into()))
        .collect();
    let mut merges = Vec::new();
    for (id, (left, right)) in ids.zip(Words::new()) {
        vocabulary.insert(format!("{left}{right}"), id.into());
        merges.push(json!([left, right]));
    }
    let added: Vec<Value> = controls
        .iter()
        .map(|(id, text)| {
            json!({ "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": post_processor(config, controls),
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": merges,
        },
    })
}

/// Texts begin with the beginning-of-text token, where there is one.
fn post_processor(config: &LlamaConfig, controls: &[(u32, String)]) -> Value {
    let Some((id, text)) = controls.first().filter(|_| config.bos_token_id.is_some()) else {
        return Value::Null;
    };
    let sequence = |name: &str, kind: u32| json!({ "Sequence": { "id": name, "type_id": kind } });
    let begin = |kind: u32| json!({ "SpecialToken": { "id": text, "type_id": kind } });
    json!({
        "type": "TemplateProcessing",
        "single": [begin(0), sequence("A", 0)],
        "pair": [begin(0), sequence("A", 0), begin(1), sequence("B", 1)],
        "special_tokens": { text: { "id": text, "ids": [id], "tokens": [text] } },
    })
}

fn tokenizer_config(config: &LlamaConfig, controls: &[(u32, String)]) -> Value {
    let text = |id: Option<u32>| {
        let id = id?;
        controls
            .iter()
            .find(|(control, _)| *control == id)
            .map(|(_, text)| text.as_str())
    };
    let bos = text(config.bos_token_id);
    let begin = if bos.is_some() { "{{ bos_token }}" } else { "" };
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": text(config.eos_token_ids.first().copied()),
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
        "chat_template": format!(
            "{begin}{{% for message in messages %}}{{{{ message['role'] }}}}: {{{{ message['content'] }}}}\n\
             {{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
        ),
    })
}

/// How byte-level tokenizers write a byte: as itself if it shows, else as a letter of its own.
fn letter(byte: u8) -> char {
    let shows = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if shows(byte) {
        return char::from(byte);
    }
    let hidden = (0..byte).filter(|other| !shows(*other)).count();
    u32::try_from(0x100 + hidden)
        .ok()
        .and_then(char::from_u32)
        .expect("few bytes do not show")
}

/// Words and the two shorter ones that each is joined from, in the order in which a text's letters are joined. There
/// are more of them than any vocabulary has ids.
struct Words {
    /// Those of the length before, which the next are made from.
    shorter: Vec<String>,
    /// What is put behind them.
    ends: Vec<String>,
    next: usize,
}

impl Words {
    fn new() -> Self {
        let letters = || ('a'..='z').map(String::from);
        Self {
            shorter: std::iter::once(SPACE.to_string()).chain(letters()).collect(),
            ends: letters().collect(),
            next: 0,
        }
    }
}

impl Iterator for Words {
    type Item = (String, String);

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.shorter.len() * self.ends.len() {
            let ends = &self.ends;
            let longer = |word: &String| ends.iter().map(|end| format!("{word}{end}")).collect::<Vec<_>>();
            self.shorter = self.shorter.iter().flat_map(longer).collect();
            self.next = 0;
        }
        let (word, end) = (self.next / self.ends.len(), self.next % self.ends.len());
        self.next += 1;
        Some((self.shorter[word].clone(), self.ends[end].clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn config(vocabulary: usize, more: &str) -> LlamaConfig {
        let text = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
                "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": {vocabulary},
                "max_position_embeddings": 1024, "rms_norm_eps": 1e-5{more}}}"#
        );
        LlamaConfig::parse(Path::new("config.json"), text.as_bytes()).expect("a Llama")
    }

    #[test]
    fn every_id_has_a_token_and_every_merge_joins_tokens() {
        for (vocabulary, more, controls) in [
            (257, r#", "eos_token_id": 3"#, 1),
            (1000, r#", "bos_token_id": 7, "eos_token_id": [7, 999]"#, 2),
            (
                128_256,
                r#", "bos_token_id": 128000, "eos_token_id": [128001, 128009]"#,
                3,
            ),
            (20_000, "", 0),
        ] {
            let made = make(Path::new("config.json"), &config(vocabulary, more)).expect("it is large enough");
            let tokenizer: Value = serde_json::from_slice(&made.tokenizer).expect("JSON");
            let vocab = tokenizer["model"]["vocab"].as_object().expect("a vocabulary");
            let added = tokenizer["added_tokens"].as_array().expect("a list");
            assert_eq!(added.len(), controls);
            let ids: BTreeSet<u64> = vocab
                .values()
                .chain(added.iter().map(|token| &token["id"]))
                .filter_map(Value::as_u64)
                .collect();
            assert!(
                ids.into_iter().eq(0..vocabulary as u64),
                "{vocabulary}: each id once"
            );
            for merge in tokenizer["model"]["merges"].as_array().expect("a list") {
                let [left, right] = [0, 1].map(|n| merge[n].as_str().expect("a token"));
                for token in [left.to_owned(), right.to_owned(), format!("{left}{right}")] {
                    assert!(vocab.contains_key(&token), "{token}");
                }
            }
        }
    }

    #[test]
    fn a_vocabulary_without_room_for_bytes_is_refused() {
        let error = make(Path::new("config.json"), &config(200, r#", "eos_token_id": 3"#))
            .err()
            .expect("too small");
        assert_eq!(
            error.to_string(),
            "config.json: vocab_size: expected at least 257, one id for each byte and control token, found 200; or put a \
             tokenizer.json beside it"
        );
    }
}
