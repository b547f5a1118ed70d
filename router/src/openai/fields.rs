//! A JSON request, taken apart field by field, so that none is dropped unnoticed.
//!
//! What its parser has not taken is refused by name, or has no effect, as `known` says; what is left over then nobody
//! knows, and it is named in the response.

use serde_json::{Map, Number, Value};

use super::{
    body::{PROMPT, with_ids},
    known::{Fate, Page, known},
};
use crate::generate::Invalid;

/// The fields of a request that were not read yet.
#[derive(Debug)]
pub(super) struct Fields {
    page: Page,
    left: Map<String, Value>,
    /// The prompt, where it is token ids.
    prompt: Option<Vec<u32>>,
    /// Names inside of a field that was read, which nobody knows.
    unknown: Vec<String>,
    /// What was asked for, there or not.
    #[cfg(test)]
    pub(super) asked_for: Vec<String>,
}

type Taken<T> = Result<Option<T>, Invalid>;

impl Fields {
    /// From the body of a request to `page`.
    pub(super) fn parse(page: Page, body: &[u8]) -> Result<Self, Invalid> {
        if let Some((fields, ids)) = with_ids(body) {
            return Ok(Self {
                prompt: Some(ids),
                ..Self::of(page, fields)
            });
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self::of(page, fields)),
            Ok(_) => Err(Invalid::new("body", "must be a JSON object")),
            Err(error) => Err(Invalid::new("body", format!("is not JSON: {error}"))),
        }
    }

    fn of(page: Page, left: Map<String, Value>) -> Self {
        Self {
            page,
            left,
            prompt: None,
            unknown: Vec::new(),
            #[cfg(test)]
            asked_for: Vec::new(),
        }
    }

    /// The fields of an object inside of the request.
    pub(super) fn inner(&self, fields: Map<String, Value>) -> Self {
        Self::of(self.page, fields)
    }

    /// What nobody read of the object in field `name`, but for those that have no effect.
    pub(super) fn left_over(&mut self, name: &str, inner: Self, without_effect: &[&str]) {
        let left = inner.left.into_iter().filter(|(_, value)| !value.is_null());
        let unknown = left.filter(|(field, _)| !without_effect.contains(&field.as_str()));
        self.unknown
            .extend(unknown.map(|(field, _)| format!("{name}.{field}")));
    }

    /// A field as it is. null is as good as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        self.asked_for.push(name.to_owned());
        if let Some(ids) = self.prompt.take_if(|_| name == PROMPT) {
            return Some(ids.into());
        }
        self.left.shift_remove(name).filter(|value| !value.is_null())
    }

    /// The prompt, if it is a list of token ids and nothing else; otherwise it is a field like any other.
    pub(super) fn prompt_ids(&mut self) -> Option<Vec<u32>> {
        self.prompt.take()
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
        if let Some(ids) = self.prompt.take() {
            self.left.insert(PROMPT.to_owned(), ids.into());
        }
        let mut names = Vec::new();
        for (name, value) in self.left.into_iter().filter(|(_, value)| !value.is_null()) {
            match known(self.page, &name).map(|known| (known.name, known.fate, known.note)) {
                Some((name, Fate::Refused { harmless }, why)) if !asks_for_nothing(&value, harmless) => {
                    return Err(Invalid::unsupported(name, why));
                }
                Some((_, Fate::Refused { .. } | Fate::WithoutEffect, _)) => {}
                // Served, but not beside what else was given.
                Some((_, Fate::Served, _)) | None => names.push(name),
            }
        }
        names.extend(self.unknown);
        Ok(names)
    }
}

fn asks_for_nothing(value: &Value, harmless: &[&str]) -> bool {
    let empty = match value {
        Value::Bool(on) => !on,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    };
    let same = |text: &&str| serde_json::from_str::<Value>(text).is_ok_and(|harmless| harmless == *value);
    empty || harmless.iter().any(same)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(page: Page, json: &str) -> Result<Vec<String>, Invalid> {
        Fields::parse(page, json.as_bytes()).expect("an object").finish()
    }

    #[test]
    fn what_is_not_served_is_refused_unless_it_asks_for_nothing() {
        for (page, json) in [
            (Page::Chat, r#"{"audio": {"voice": "x"}}"#),
            (Page::Chat, r#"{"best_of": 3}"#),
            (Page::Chat, r#"{"echo": true}"#),
            (Page::Completions, r#"{"suffix": "s"}"#),
            (Page::Completions, r#"{"length_penalty": 0.5}"#),
        ] {
            let refused = finish(page, json).expect_err(json);
            assert!(json.contains(&*refused.field), "{json}: {refused}");
        }
        for (page, json) in [
            (
                Page::Chat,
                r#"{"modalities": ["text"], "best_of": 1, "echo": false, "audio": {}}"#,
            ),
            (
                Page::Completions,
                r#"{"suffix": "", "length_penalty": 1.0, "user": "u", "x": null, "early_stopping": false}"#,
            ),
        ] {
            assert_eq!(finish(page, json), Ok(Vec::new()), "{json}");
        }
        assert_eq!(
            finish(
                Page::Chat,
                r#"{"nobody": 1, "store": true, "suffix": "of another page"}"#
            ),
            Ok(vec!["nobody".to_owned(), "suffix".to_owned()])
        );
    }

    #[test]
    fn a_value_of_another_type_is_refused_with_the_type_that_is_expected() {
        let mut fields = Fields::parse(
            Page::Chat,
            br#"{"a": "x", "b": 1.5, "c": -1, "d": 16.0, "e": null}"#,
        )
        .expect("an object");
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
