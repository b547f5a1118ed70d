//! A JSON request, taken apart field by field, so that none is dropped unnoticed.
//!
//! Every field of OpenAI's interface, and of vLLM's additions to it, is served, refused by name, or listed as having
//! no effect on the output. What is left over nobody knows: it is named in the response.

use serde_json::{Map, Number, Value};

use crate::generate::Invalid;

/// The fields of a request that were not read yet.
#[derive(Debug)]
pub(super) struct Fields {
    left: Map<String, Value>,
    /// Names inside of a field that was read, which nobody knows.
    unknown: Vec<String>,
}

type Taken<T> = Result<Option<T>, Invalid>;

impl Fields {
    /// From a request's body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Invalid> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self::of(fields)),
            Ok(_) => Err(Invalid::new("body", "must be a JSON object")),
            Err(error) => Err(Invalid::new("body", format!("is not JSON: {error}"))),
        }
    }

    /// From a part of a request.
    pub(super) fn of(fields: Map<String, Value>) -> Self {
        Self {
            left: fields,
            unknown: Vec::new(),
        }
    }

    /// What was not read of the object in field `name`.
    pub(super) fn left_over(&mut self, name: &str, inner: Self) {
        let inner = inner.left.into_iter().filter(|(_, value)| !value.is_null());
        self.unknown.extend(
            inner
                .filter(|(field, _)| !WITHOUT_EFFECT.contains(&field.as_str()))
                .map(|(field, _)| format!("{name}.{field}")),
        );
    }

    /// A field as it is. null is as good as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.left.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn bool(&mut self, name: &'static str) -> Taken<bool> {
        self.typed(name, "true or false", |value| value.as_bool())
    }

    pub(super) fn float(&mut self, name: &'static str) -> Taken<f32> {
        self.typed(name, "a number", |value| value.as_f64().map(|value| value as f32))
    }

    pub(super) fn int(&mut self, name: &'static str) -> Taken<i64> {
        self.typed(name, "an integer", |value| value.as_number().and_then(integer))
    }

    pub(super) fn count(&mut self, name: &'static str) -> Taken<u32> {
        self.typed(name, "an integer from 0 to 4294967295", count)
    }

    pub(super) fn string(&mut self, name: &'static str) -> Taken<String> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(super) fn object(&mut self, name: &'static str) -> Taken<Map<String, Value>> {
        self.typed(name, "an object", |value| value.as_object().cloned())
    }

    pub(super) fn array(&mut self, name: &'static str) -> Taken<Vec<Value>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => Err(Invalid::new(name, "must be a list")),
        }
    }

    /// One string, or a list of strings.
    pub(super) fn strings(&mut self, name: &'static str) -> Taken<Vec<String>> {
        self.typed(name, "a string or a list of strings", |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(items) => items
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect(),
            _ => None,
        })
    }

    pub(super) fn ids(&mut self, name: &'static str) -> Taken<Vec<u32>> {
        self.typed(name, "a list of token ids", |value| {
            value.as_array().and_then(|items| ids(items))
        })
    }

    fn typed<T>(
        &mut self,
        name: &'static str,
        form: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Taken<T> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => read(&value)
                .map(Some)
                .ok_or_else(|| Invalid::new(name, format!("must be {form}"))),
        }
    }

    /// What is left: refuses what is known and not served, and gives the names of what nobody knows.
    pub(super) fn finish(mut self) -> Result<Vec<String>, Invalid> {
        for Unserved { name, harmless, why } in UNSERVED {
            let Some(value) = self.take(name) else { continue };
            let empty = match &value {
                Value::Bool(on) => !on,
                Value::Array(items) => items.is_empty(),
                Value::Object(entries) => entries.is_empty(),
                Value::String(text) => text.is_empty(),
                _ => false,
            };
            if !empty
                && !harmless
                    .iter()
                    .any(|text| serde_json::from_str::<Value>(text).is_ok_and(|v| v == value))
            {
                return Err(Invalid::unsupported(*name, *why));
            }
        }
        self.left
            .retain(|name, value| !value.is_null() && !WITHOUT_EFFECT.contains(&name.as_str()));
        let names = self.left.into_iter().map(|(name, _)| name);
        Ok(names.chain(self.unknown).collect())
    }
}

/// Numbers like 16.0 are integers, as JSON has one kind of number only.
fn integer(number: &Number) -> Option<i64> {
    number.as_i64().or_else(|| {
        let float = number.as_f64()?;
        (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
    })
}

fn count(value: &Value) -> Option<u32> {
    u32::try_from(integer(value.as_number()?)?).ok()
}

/// A list of token ids.
pub(super) fn ids(items: &[Value]) -> Option<Vec<u32>> {
    items.iter().map(count).collect()
}

/// A field that is known and not served.
struct Unserved {
    name: &'static str,
    /// Values that ask for nothing, beside false and empty ones, as JSON.
    harmless: &'static [&'static str],
    why: &'static str,
}

const fn unserved(name: &'static str, harmless: &'static [&'static str], why: &'static str) -> Unserved {
    Unserved { name, harmless, why }
}

const TOOLS: &str = "tool calls are not supported";
const CONSTRAINED: &str = "constrained decoding is not supported";
const TEXT_ONLY: &str = "only text goes in and out";
const BEAMS: &str = "beam search is not supported";

const UNSERVED: &[Unserved] = &[
    unserved("tools", &[], TOOLS),
    unserved("tool_choice", &["\"none\""], TOOLS),
    unserved("functions", &[], TOOLS),
    unserved("function_call", &["\"none\""], TOOLS),
    unserved("response_format", &["{\"type\":\"text\"}"], CONSTRAINED),
    unserved("structured_outputs", &[], CONSTRAINED),
    unserved("guided_json", &[], CONSTRAINED),
    unserved("guided_regex", &[], CONSTRAINED),
    unserved("guided_choice", &[], CONSTRAINED),
    unserved("guided_grammar", &[], CONSTRAINED),
    unserved("guided_whitespace_pattern", &[], CONSTRAINED),
    unserved("allowed_token_ids", &[], CONSTRAINED),
    unserved("bad_words", &[], CONSTRAINED),
    unserved("logits_processors", &[], CONSTRAINED),
    unserved("audio", &[], TEXT_ONLY),
    unserved("modalities", &["[\"text\"]"], TEXT_ONLY),
    unserved("mm_processor_kwargs", &[], TEXT_ONLY),
    unserved("prompt_embeds", &[], "prompts are text or token ids"),
    unserved("web_search_options", &[], "there is no web search"),
    unserved(
        "suffix",
        &[],
        "there is no infilling: the model continues a prompt",
    ),
    unserved("use_beam_search", &[], BEAMS),
    unserved("early_stopping", &[], BEAMS),
    unserved("length_penalty", &["1", "1.0"], BEAMS),
    unserved(
        "best_of",
        &["1"],
        "choosing among more answers than are returned is not supported; use n",
    ),
    unserved("echo", &[], "a conversation is not echoed; use plain completions"),
    unserved("chat_template", &[], "the model's own chat template is used"),
    unserved(
        "documents",
        &[],
        "pass what the template reads in chat_template_kwargs",
    ),
    unserved("truncate_prompt_tokens", &[], "a prompt is never cut; shorten it"),
    unserved("priority", &["0"], "requests have no priorities"),
    unserved("kv_transfer_params", &[], "caches are not moved between replicas"),
    unserved("vllm_xargs", &[], "there are no custom sampling arguments"),
];

/// Known, and without effect on the output.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "store",
    "metadata",
    "service_tier",
    "reasoning_effort",
    "include_reasoning",
    "verbosity",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "parallel_tool_calls",
    "spaces_between_special_tokens",
    "guided_decoding_backend",
    "include_obfuscation",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(json: &str) -> Result<Vec<String>, Invalid> {
        Fields::parse(json.as_bytes()).expect("an object").finish()
    }

    #[test]
    fn what_is_not_served_is_refused_unless_it_asks_for_nothing() {
        for json in [
            r#"{"tools": [{"type": "function"}]}"#,
            r#"{"response_format": {"type": "json_object"}}"#,
            r#"{"tool_choice": "auto"}"#,
            r#"{"best_of": 3}"#,
            r#"{"echo": true}"#,
        ] {
            let refused = finish(json).expect_err(json);
            assert!(json.contains(&*refused.field), "{json}: {refused}");
        }
        for json in [
            r#"{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}"#,
            r#"{"suffix": "", "best_of": 1, "length_penalty": 1.0, "user": "u", "x": null, "early_stopping": false}"#,
        ] {
            assert_eq!(finish(json), Ok(Vec::new()), "{json}");
        }
        assert_eq!(
            finish(r#"{"nobody": 1, "store": true}"#),
            Ok(vec!["nobody".to_owned()])
        );
    }

    #[test]
    fn a_value_of_another_type_is_refused_with_the_type_that_is_expected() {
        let mut fields =
            Fields::parse(br#"{"a": "x", "b": 1.5, "c": -1, "d": 16.0, "e": null}"#).expect("an object");
        assert_eq!(
            fields.float("a").expect_err("text").to_string(),
            "a: must be a number"
        );
        assert_eq!(
            fields.int("b").expect_err("no integer").to_string(),
            "b: must be an integer"
        );
        assert!(fields.count("c").is_err());
        assert_eq!(
            (fields.count("d"), fields.count("e"), fields.count("f")),
            (Ok(Some(16)), Ok(None), Ok(None))
        );
    }
}
