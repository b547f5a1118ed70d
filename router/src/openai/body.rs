//! A prompt of token ids, taken out of a request's body before that is parsed: as a JSON value each id would be 32 bytes,
//! to be made, looked at and dropped, and a parser of any JSON guesses wrong at most of their digits.
//!
//! What is found here is only believed if the parser agrees: it reads the body with a mark in the list's place, and the
//! prompt must be the mark.

use serde_json::{Map, Value};

/// The field whose ids are taken so.
pub(super) const PROMPT: &str = "prompt";
/// The same in a body.
const KEY: &[u8] = b"\"prompt\"";
/// What no client says.
const MARK: &str = "\u{1}ids\u{1}";

/// A body's fields but for its prompt, and the ids that the prompt is a list of; `None`: it is something else, or this is
/// no JSON object.
pub(super) fn with_ids(body: &[u8]) -> Option<(Map<String, Value>, Vec<u32>)> {
    let (list, ids) = find(body)?;
    let rest = [&body[..list.start], br#""\u0001ids\u0001""#, &body[list.end..]].concat();
    let mut fields: Map<String, Value> = serde_json::from_slice(&rest).ok()?;
    let prompt = fields.shift_remove(PROMPT)?;
    (prompt == MARK).then_some((fields, ids))
}

/// The list of ids of the body's only field of that name, wherever it is.
fn find(body: &[u8]) -> Option<(std::ops::Range<usize>, Vec<u32>)> {
    let finder = memchr::memmem::Finder::new(KEY);
    let key = finder.find(body)?;
    // Within a string its quotes would be escaped, but for one that ends a string, which no colon follows, or a name.
    if key.checked_sub(1).is_some_and(|before| body[before] == b'\\') {
        return None;
    }
    let mut cursor = Cursor {
        bytes: body,
        at: key + KEY.len(),
    };
    cursor.skip_space();
    cursor.take(b':')?;
    cursor.skip_space();
    let start = cursor.at;
    let ids = cursor.ids()?;
    // Of a field that is given twice the last one counts: that is the parser's matter.
    let twice = finder.find(&body[cursor.at..]).is_some();
    (!twice).then_some((start..cursor.at, ids))
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn skip_space(&mut self) {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.bytes.get(self.at) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        (self.bytes.get(self.at) == Some(&byte)).then(|| self.at += 1)
    }

    /// A list of ids and nothing else.
    fn ids(&mut self) -> Option<Vec<u32>> {
        self.take(b'[')?;
        let mut ids = Vec::with_capacity(ids_within(self.bytes.len() - self.at));
        self.skip_space();
        if self.take(b']').is_some() {
            return Some(ids);
        }
        loop {
            ids.push(self.id()?);
            self.skip_space();
            if self.take(b',').is_none() {
                return self.take(b']').map(|()| ids);
            }
            self.skip_space();
        }
    }

    /// Eight bytes at a time: how many digits an id has cannot be foreseen, and a loop over them would mispredict its end.
    fn id(&mut self) -> Option<u32> {
        let Some(eight) = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk) else {
            return self.long_id();
        };
        let (digits, value) = leading_digits(*eight);
        if digits == 8 {
            return self.long_id();
        }
        let leading_zero = eight[0] == b'0' && digits > 1;
        self.at += digits;
        (digits > 0 && !leading_zero).then_some(value)
    }

    fn long_id(&mut self) -> Option<u32> {
        let rest = &self.bytes[self.at..];
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += digits;
        let leading_zero = digits > 1 && rest[0] == b'0';
        let text = std::str::from_utf8(&rest[..digits]).ok()?;
        // Without digits that is no number either.
        text.parse().ok().filter(|_| !leading_zero)
    }
}

/// Room for the ids of so many bytes, of which an id mostly has six with its comma; more is made where it is needed.
fn ids_within(bytes: usize) -> usize {
    (bytes / 6 + 1).min(1 << 14)
}

/// How many of the bytes are digits before the first that is none, and the number that they are.
fn leading_digits(bytes: [u8; 8]) -> (usize, u32) {
    const EACH: u64 = 0x0101_0101_0101_0101;
    // 0 to 9 where there are digits.
    let values = u64::from_le_bytes(bytes) ^ (EACH * u64::from(b'0'));
    // The highest bit of a byte is set where it is more than 9.
    let others = (((values & (EACH * 0x7f)) + EACH * (0x80 - 10)) | values) & (EACH * 0x80);
    let digits = (others.trailing_zeros() / 8) as usize;
    if digits == 0 {
        return (0, 0);
    }
    // Zeros come first, so that the last digit is the last byte.
    let values = values << (64 - 8 * digits);
    // Pairs of digits, then fours, then all eight.
    let pairs = values.wrapping_mul(10).wrapping_add(values >> 8);
    let low = (pairs & 0x0000_00ff_0000_00ff).wrapping_mul(100 + (1_000_000 << 32));
    let high = ((pairs >> 16) & 0x0000_00ff_0000_00ff).wrapping_mul(1 + (10_000 << 32));
    (digits, (low.wrapping_add(high) >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{
        super::{fields::Fields, known::Page},
        PROMPT, leading_digits,
    };

    /// The same prompt and other fields as without ids.
    fn check(json: &str, has_ids: bool) {
        let parse = || Fields::parse(Page::Completions, json.as_bytes()).expect(json);
        assert_eq!(parse().prompt_ids().is_some(), has_ids, "{json}");
        let expected: Value = serde_json::from_str(json).expect(json);
        let expected = expected.as_object().expect("an object");
        let mut fields = parse();
        for name in [PROMPT, "a"] {
            let expected = expected.get(name).filter(|value| !value.is_null());
            assert_eq!(fields.take(name).as_ref(), expected, "{json}");
            assert_eq!(fields.take(name), None, "{json}");
        }
    }

    #[test]
    fn a_prompt_of_ids_alone_is_ids_and_all_else_is_as_it_was() {
        for json in [
            r#"{"prompt": [1, 4294967295]}"#,
            r#"{"prompt": [], "a": []}"#,
            r#"{"prompt":[1,23,456],"a":[ ]}"#,
            "{\"prompt\" : [ 0 ,\t1\r\n, 2 ]}",
            r#"{"prompt": [ ]}"#,
            r#"{"a": "prompt\"", "prompt": [12345678, 1234567, 7]}"#,
        ] {
            check(json, true);
        }
        for json in [
            r#"{}"#,
            r#"{"a": {"prompt": [3]}}"#,
            r#"{"a": {"prompt": [3]}, "prompt": [4]}"#,
            r#"{"a": "\"prompt\": [3]"}"#,
            r#"{"a\"prompt":[1,2]}"#,
            r#"{"a": "prompt"}"#,
            r#"{"prompt": "text", "a": [1]}"#,
            r#"{"a": 1, "prompt": "x", "prompt": [3]}"#,
            r#"{"prompt": [1], "prompt": "x"}"#,
            r#"{"prompt": [1, -2, 3], "a": {"b": 1}}"#,
            r#"{"prompt": [1, 2.0, [3, 4], {"a": null}, true, "x"], "a": [1.5]}"#,
            r#"{"prompt": [1, 4294967296]}"#,
            r#"{"prompt": [4294967296, 1]}"#,
            r#"{"prompt": [1, 99999999999999999999]}"#,
            r#"{"prompt": [1, 2e3]}"#,
            r#"{"prompt": [1, -0]}"#,
            r#"{"prompt": [[1, 2], [3]]}"#,
            r#"{"prompt": [[1, "x"], 3]}"#,
            r#"{"prompt": ["a", "b"]}"#,
            r#"{"prompt": null}"#,
            r#"{"prompt": {"a": [1]}}"#,
        ] {
            check(json, false);
        }
    }

    #[test]
    fn what_is_no_json_is_none_with_ids_either() {
        for body in [
            r#"{"prompt": [1, 02]}"#,
            r#"{"prompt": [00000000001]}"#,
            r#"{"prompt": [1,]}"#,
            r#"{"prompt": [,1]}"#,
            r#"{"prompt": [1"#,
            r#"{"prompt": [1]"#,
            r#"{"prompt": [1]} x"#,
            r#"{"prompt": [1 2]}"#,
            r#""prompt": [1]"#,
            r#"{"a" "prompt": [1]}"#,
            r#"["prompt"]"#,
        ] {
            assert!(
                Fields::parse(Page::Completions, body.as_bytes()).is_err(),
                "{body}"
            );
        }
    }

    #[test]
    fn eight_bytes_begin_with_the_number_that_they_show() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..100_000 {
            let digits = random.usize(..=8);
            let mut bytes = [0u8; 8];
            bytes.fill_with(|| random.u8(..));
            bytes[..digits].fill_with(|| random.u8(b'0'..=b'9'));
            let shown = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let expected = bytes[..shown]
                .iter()
                .fold(0, |value, byte| value * 10 + u32::from(byte - b'0'));
            assert_eq!(leading_digits(bytes), (shown, expected), "{bytes:?}");
        }
    }
}
