//! The exact bytes of each token, derived from a tokenizer's `decoder` section.
//!
//! Two families are in use by Llama-architecture models: byte-level BPE, whose vocabulary writes each byte as a
//! printable character, and SentencePiece pieces with `▁` for a space and `<0xE3>` for a byte. Anything else is
//! refused by name: its text could only be guessed.

use std::collections::HashMap;

use serde_json::Value;

/// A decoder that gives tokens no bytes of their own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "tokenizer.json's decoder is not supported: {0}; supported are ByteLevel, and Replace, ByteFallback, Fuse, Strip and Metaspace as SentencePiece models use them"
)]
pub struct UnsupportedDecoder(pub String);

/// How a vocabulary entry becomes bytes.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Decoder {
    /// Each character stands for one byte.
    ByteLevel(ByteLevel),
    /// The piece is the text, after replacements.
    Pieces {
        /// What is written how.
        replace: Vec<(String, String)>,
        /// `<0xE3>` is one byte.
        byte_fallback: bool,
        /// Spaces that are dropped at the very beginning of a text.
        strip_start: usize,
    },
}

impl Decoder {
    /// From the `decoder` value of tokenizer.json.
    pub(super) fn parse(spec: &Value) -> Result<Self, UnsupportedDecoder> {
        let steps: Vec<&Value> = match kind(spec) {
            "Sequence" => spec["decoders"]
                .as_array()
                .map(|steps| steps.iter().collect())
                .unwrap_or_default(),
            _ => vec![spec],
        };
        if steps.iter().any(|step| kind(step) == "ByteLevel") {
            return match steps
                .iter()
                .find(|step| !matches!(kind(step), "ByteLevel" | "Fuse"))
            {
                Some(step) => Err(UnsupportedDecoder(format!("{} beside ByteLevel", kind(step)))),
                None => Ok(Self::ByteLevel(ByteLevel::new())),
            };
        }
        if spec.is_null() {
            return Err(UnsupportedDecoder("it is missing".into()));
        }
        let mut pieces = (Vec::new(), false, 0);
        let mut fused = false;
        for step in &steps {
            piece_step(step, &mut fused, &mut pieces)?;
        }
        let (replace, byte_fallback, strip_start) = pieces;
        if replace.is_empty() && !byte_fallback {
            return Err(UnsupportedDecoder(spec.to_string()));
        }
        Ok(Self::Pieces {
            replace,
            byte_fallback,
            strip_start,
        })
    }

    /// What the vocabulary entry `token` stands for.
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel(map) => map.bytes(token),
            Self::Pieces {
                replace,
                byte_fallback,
                ..
            } => {
                if let (true, Some(byte)) = (byte_fallback, fallback_byte(token)) {
                    return vec![byte];
                }
                let text = replace
                    .iter()
                    .fold(token.to_owned(), |text, (from, to)| text.replace(from, to));
                text.into_bytes()
            }
        }
    }

    /// Spaces that are dropped at the very beginning of a text.
    pub(super) fn strip_start(&self) -> usize {
        match self {
            Self::ByteLevel(_) => 0,
            Self::Pieces { strip_start, .. } => *strip_start,
        }
    }
}

fn kind(step: &Value) -> &str {
    step["type"].as_str().unwrap_or("")
}

fn piece_step(
    step: &Value,
    fused: &mut bool,
    (replace, byte_fallback, strip_start): &mut (Vec<(String, String)>, bool, usize),
) -> Result<(), UnsupportedDecoder> {
    let refused = || Err(UnsupportedDecoder(step.to_string()));
    match kind(step) {
        // After Fuse a replacement could match across tokens.
        "Replace" if !*fused => match (step["pattern"]["String"].as_str(), step["content"].as_str()) {
            (Some(from), Some(to)) if !from.is_empty() => replace.push((from.into(), to.into())),
            _ => return refused(),
        },
        "ByteFallback" if !*fused => *byte_fallback = true,
        "Fuse" => *fused = true,
        "Strip" if *fused && step["content"] == " " && step["stop"].as_u64() == Some(0) => {
            *strip_start = step["start"].as_u64().unwrap_or(0) as usize;
        }
        "Metaspace" if !*fused => {
            let Some(mark) = step["replacement"].as_str() else {
                return refused();
            };
            replace.push((mark.into(), " ".into()));
            // `add_prefix_space` is how files from before `prepend_scheme` say it.
            let prepends = match step["prepend_scheme"].as_str() {
                Some(scheme) => scheme != "never",
                None => step["add_prefix_space"].as_bool().unwrap_or(true),
            };
            *strip_start = usize::from(prepends);
        }
        _ => return refused(),
    }
    Ok(())
}

/// `<0xE3>` is the byte E3.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The byte that each character of a byte-level vocabulary stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ByteLevel {
    byte: HashMap<char, u8>,
}

impl ByteLevel {
    /// Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 and up.
    pub(super) fn new() -> Self {
        let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let mut stand_in = 0x100..;
        let byte = (0..=u8::MAX)
            .map(|byte| {
                let code = if printable(byte) {
                    u32::from(byte)
                } else {
                    stand_in.next().expect("there are more code points than bytes")
                };
                (char::from_u32(code).expect("below the surrogates"), byte)
            })
            .collect();
        Self { byte }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        self.exact(token).unwrap_or_else(|| token.as_bytes().to_vec())
    }

    /// The bytes of a token that is made of these characters alone.
    pub(super) fn exact(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|c| self.byte.get(&c).copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn byte_level_tokens_are_their_bytes() {
        let decoder = Decoder::parse(&json!({"type": "ByteLevel"})).expect("supported");
        assert_eq!(decoder.bytes("Ġhi"), b" hi");
        assert_eq!(decoder.bytes("æĹ¥"), "日".as_bytes());
        assert_eq!(decoder.bytes("æĹ"), &"日".as_bytes()[..2]);
        assert_eq!(decoder.bytes("Ċ"), b"\n");
    }

    #[test]
    fn sentencepiece_tokens_are_text_or_one_byte() {
        let decoder = Decoder::parse(&json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}))
        .expect("supported");
        assert_eq!(decoder.bytes("▁日本"), " 日本".as_bytes());
        assert_eq!(decoder.bytes("<0xE6>"), [0xE6]);
        assert_eq!(decoder.bytes("<0xGG>"), b"<0xGG>");
        assert_eq!(decoder.strip_start(), 1);
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"});
        let decoder = Decoder::parse(&metaspace).expect("supported");
        assert_eq!((decoder.bytes("▁a"), decoder.strip_start()), (b" a".to_vec(), 0));
    }

    #[test]
    fn a_decoder_without_exact_bytes_is_refused_by_name() {
        for (spec, named) in [
            (
                json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
                "WordPiece",
            ),
            (
                json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Replace",
                "pattern": {"String": "a"}, "content": ""}]}),
                "Replace",
            ),
            (
                json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}),
                "Regex",
            ),
            (
                json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "CTC"}]}),
                "CTC",
            ),
            (Value::Null, "missing"),
        ] {
            let error = Decoder::parse(&spec).expect_err(named);
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}
