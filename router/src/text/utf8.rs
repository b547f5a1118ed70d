//! Bytes that arrive in pieces become whole code points.
//!
//! Whatever the pieces, the concatenated output is `String::from_utf8_lossy` of the concatenated input: a code point
//! waits for its last byte, a byte that can't belong to one becomes U+FFFD as soon as that is certain.

/// The bytes of a code point that is not whole yet.
#[derive(Clone, Debug, Default)]
pub struct Utf8Assembler {
    /// At most three bytes, a proper prefix of a code point.
    held: Vec<u8>,
}

impl Utf8Assembler {
    /// Appends what became whole to `out`.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.held.is_empty() {
            let rest = decode(bytes, out);
            self.held.extend_from_slice(rest);
        } else {
            self.held.extend_from_slice(bytes);
            let joined = std::mem::take(&mut self.held);
            let rest = decode(&joined, out);
            self.held.extend_from_slice(rest);
        }
    }

    /// No more bytes come: an unfinished code point becomes one U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            self.held.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Appends all that is decided; returns the unfinished rest.
fn decode<'a>(mut bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                return &[];
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                out.push_str(std::str::from_utf8(valid).expect("valid up to here, says the error"));
                let Some(bad) = error.error_len() else { return rest };
                out.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[bad..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let mut assembler = Utf8Assembler::default();
        let mut said: Vec<String> = parts
            .into_iter()
            .map(|part| {
                let mut out = String::new();
                assembler.push(part, &mut out);
                out
            })
            .collect();
        let mut last = String::new();
        assembler.finish(&mut last);
        said.push(last);
        said
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let bytes = "日本".as_bytes();
        assert_eq!(pieces(bytes.chunks(1)), ["", "", "日", "", "", "本", ""]);
        assert_eq!(pieces(bytes.chunks(4)), ["日", "本", ""]);
    }

    #[test]
    fn what_never_becomes_whole_is_one_replacement() {
        assert_eq!(pieces([&b"a\xE6\x97"[..]]), ["a", "\u{FFFD}"]);
        assert_eq!(
            pieces([&b"\xF0"[..], &b"\x9F"[..], &b"x"[..]]),
            ["", "", "\u{FFFD}x", ""]
        );
    }
}
