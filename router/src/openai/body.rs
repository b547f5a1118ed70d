//! A request's body as JSON, with a prompt of token ids taken as ids: as a `Value` each of them would be 32 bytes, to be
//! made, looked at and dropped.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::{Map, Value};

/// The field whose ids are taken so.
pub(super) const PROMPT: &str = "prompt";

/// The fields of an object.
#[derive(Debug, Default)]
pub(super) struct Body {
    pub fields: Map<String, Value>,
    /// The prompt, where it is a list of ids and nothing else; it is not among the fields then.
    pub ids: Option<Vec<u32>>,
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Body;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body, A::Error> {
                let mut body = Body::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name != PROMPT {
                        body.fields.insert(name, map.next_value()?);
                        continue;
                    }
                    // Of a field that is given twice the last word counts.
                    body.ids = None;
                    match map.next_value()? {
                        Prompt::Ids(ids) => {
                            body.fields.shift_remove(PROMPT);
                            body.ids = Some(ids);
                        }
                        other => {
                            body.fields.insert(name, other.into());
                        }
                    }
                }
                Ok(body)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// A prompt, or a part of one.
enum Prompt {
    Id(u32),
    Ids(Vec<u32>),
    Other(Value),
}

impl From<Prompt> for Value {
    fn from(prompt: Prompt) -> Self {
        match prompt {
            Prompt::Id(id) => id.into(),
            Prompt::Ids(ids) => ids.into(),
            Prompt::Other(value) => value,
        }
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Part)
    }
}

struct Part;

impl<'de> Visitor<'de> for Part {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Prompt, E> {
        let id = u32::try_from(number);
        Ok(id.map_or_else(|_| Prompt::Other(number.into()), Prompt::Id))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Prompt, E> {
        Ok(Prompt::Other(number.into()))
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<Prompt, E> {
        Ok(Prompt::Other(number.into()))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Prompt, E> {
        Ok(Prompt::Other(value.into()))
    }

    fn visit_unit<E: Error>(self) -> Result<Prompt, E> {
        Ok(Prompt::Other(Value::Null))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Other(text.into()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Prompt, E> {
        Ok(Prompt::Other(text.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Prompt, A::Error> {
        Value::deserialize(MapAccessDeserializer::new(map)).map(Prompt::Other)
    }

    /// What begins with an id is ids to its end, or an error: whoever reads the body then reads it anew, as values.
    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Prompt, A::Error> {
        let mut ids = Vec::new();
        match parts.next_element()? {
            None => {}
            Some(Prompt::Id(first)) => {
                ids.push(first);
                while let Some(id) = parts.next_element()? {
                    ids.push(id);
                }
            }
            Some(first) => {
                let mut values = vec![Value::from(first)];
                while let Some(value) = parts.next_element()? {
                    values.push(value);
                }
                return Ok(Prompt::Other(values.into()));
            }
        }
        Ok(Prompt::Ids(ids))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::{
        super::{fields::Fields, known::Page},
        PROMPT,
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
            r#"{"a": 1, "prompt": "x", "prompt": [3]}"#,
        ] {
            check(json, true);
        }
        for json in [
            r#"{}"#,
            r#"{"prompt": "text", "a": [1]}"#,
            r#"{"prompt": [1, -2, 3], "a": {"b": 1}}"#,
            r#"{"prompt": [1, 2.0, [3, 4], {"a": null}, true, "x"], "a": [1.5]}"#,
            r#"{"prompt": [1, 4294967296]}"#,
            r#"{"prompt": [4294967296, 1]}"#,
            r#"{"prompt": [[1, 2], [3]]}"#,
            r#"{"prompt": [[1, "x"], 3]}"#,
            r#"{"prompt": ["a", "b"]}"#,
            r#"{"prompt": null}"#,
            r#"{"prompt": {"a": [1]}}"#,
            r#"{"prompt": [1], "prompt": "x"}"#,
        ] {
            check(json, false);
        }
    }
}
