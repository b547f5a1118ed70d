//! Secrets beside the models that name them, in the form that `kubectl apply` takes, read strictly.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
};

use k8s_openapi::api::core::v1::Secret as KubeSecret;
use serde_json::Value;

/// What a Secret may have; a member that is none of these was mistyped.
const MEMBERS: [&str; 7] = [
    "apiVersion",
    "kind",
    "metadata",
    "type",
    "data",
    "stringData",
    "immutable",
];
/// The longest name of an object or an entry, in bytes.
const NAME_MAX: usize = 253;
/// Where an object is that names no namespace.
pub const NAMESPACE: &str = "default";

/// The Secrets of a file.
#[derive(Clone, Debug, Default)]
pub struct Secrets(BTreeMap<Place, Entries>);

/// Namespace and name; both may be parts of a path.
pub type Place = (String, String);

/// The entries of a Secret; each name may be that of a file.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Entries(BTreeMap<String, Vec<u8>>);

/// What is secret is not shown.
impl fmt::Debug for Entries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Entries {
    /// One of them.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }
}

impl Secrets {
    /// The Secret of this name.
    pub fn get(&self, place: &Place) -> Option<&Entries> {
        self.0.get(place)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes one more.
    ///
    /// # Errors
    /// It is none, or there is one of its name. No word of it is secret.
    pub fn add(&mut self, document: &Value) -> Result<(), String> {
        let (place, entries) = read(document)?;
        match self.0.entry(place) {
            Entry::Occupied(_) => {
                Err("metadata.name: is there twice: give each Secret a name of its own".into())
            }
            Entry::Vacant(free) => {
                free.insert(entries);
                Ok(())
            }
        }
    }
}

/// Whether a document says that it is a Secret.
pub fn is_secret(document: &Value) -> bool {
    document["kind"] == "Secret"
}

fn read(document: &Value) -> Result<(Place, Entries), String> {
    if document["apiVersion"] != "v1" {
        return Err("apiVersion: of a Secret is v1".into());
    }
    let members = document.as_object().into_iter().flatten();
    if let Some((unknown, _)) = members
        .into_iter()
        .find(|(name, _)| !MEMBERS.contains(&name.as_str()))
    {
        return Err(format!("{unknown}: a Secret has no such field"));
    }
    let mut data = BTreeMap::new();
    for (name, text) in entries(document, "data")? {
        // One by one: the error of a whole Secret could quote it.
        let alone = serde_json::json!({"data": {"entry": text}});
        let decoded = serde_json::from_value::<KubeSecret>(alone)
            .ok()
            .and_then(|secret| secret.data?.remove("entry"))
            .ok_or_else(|| format!("data.{name}: is not base64; text as it is belongs into stringData"))?;
        data.insert(name.to_owned(), decoded.0);
    }
    for (name, text) in entries(document, "stringData")? {
        data.insert(name.to_owned(), text.as_bytes().to_vec());
    }
    let metadata = &document["metadata"];
    let name = metadata["name"].as_str().unwrap_or_default();
    let namespace = match &metadata["namespace"] {
        Value::Null => NAMESPACE,
        given => given.as_str().unwrap_or_default(),
    };
    for (field, text) in [("name", name), ("namespace", namespace)] {
        if !is_name(text) {
            return Err(format!(
                "metadata.{field}: must be lower-case letters, digits, - and ., and begin and end with a letter or digit"
            ));
        }
    }
    Ok(((namespace.to_owned(), name.to_owned()), Entries(data)))
}

/// The texts of `data` or `stringData`.
fn entries<'v>(document: &'v Value, member: &str) -> Result<Vec<(&'v str, &'v str)>, String> {
    let found = match &document[member] {
        Value::Null => return Ok(Vec::new()),
        Value::Object(found) => found,
        _ => return Err(format!("{member}: must have a name for each entry")),
    };
    found
        .iter()
        .map(|(name, value)| {
            if !is_entry(name) {
                return Err(format!("{member}: '{name}' must be letters, digits, -, _ and ."));
            }
            let text = value.as_str();
            let text = text.ok_or_else(|| format!("{member}.{name}: must be text: write it in quotes"))?;
            Ok((name.as_str(), text))
        })
        .collect()
}

fn is_name(text: &str) -> bool {
    let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
    text.len() <= NAME_MAX
        && text.starts_with(plain)
        && text.ends_with(plain)
        && text
            .chars()
            .all(|letter| plain(letter) || letter == '-' || letter == '.')
}

fn is_entry(text: &str) -> bool {
    (1..=NAME_MAX).contains(&text.len())
        && !matches!(text, "." | "..")
        && text
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn added(document: &Value) -> Result<Secrets, String> {
        let mut secrets = Secrets::default();
        secrets.add(document).map(|()| secrets)
    }

    fn secret(more: &Value) -> Value {
        let mut document = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}});
        for (name, value) in more.as_object().expect("members") {
            document[name] = value.clone();
        }
        document
    }

    #[test]
    fn data_is_decoded_and_text_goes_before_it() {
        let secrets = added(&secret(&json!({
            "type": "Opaque",
            "data": {"a": "b2xk", "b": "AP8="},
            "stringData": {"a": "new"},
        })))
        .expect("it is one");
        let place = ("default".to_owned(), "keys".to_owned());
        let entries = secrets.get(&place).expect("of the default namespace");
        assert_eq!(entries.get("a"), Some(b"new".as_slice()));
        assert_eq!(entries.get("b"), Some([0, 255].as_slice()));
        assert_eq!(format!("{entries:?}"), r#"{"a", "b"}"#, "nothing secret is shown");
    }

    #[test]
    fn mistakes_are_named_without_what_is_secret() {
        let cases = [
            (
                json!({"data": {"k": "hunter2!"}}),
                "data.k: is not base64; text as it is belongs into stringData",
            ),
            (
                json!({"stringdata": {}}),
                "stringdata: a Secret has no such field",
            ),
            (
                json!({"stringData": {"k": 7}}),
                "stringData.k: must be text: write it in quotes",
            ),
            (
                json!({"stringData": {"../k": "v"}}),
                "stringData: '../k' must be letters, digits, -, _ and .",
            ),
            (
                json!({"stringData": {"..": "v"}}),
                "stringData: '..' must be letters, digits, -, _ and .",
            ),
            (json!({"apiVersion": "v2"}), "apiVersion: of a Secret is v1"),
            (
                json!({"metadata": {"name": "../keys"}}),
                "metadata.name: must be lower-case letters, digits, - and ., and begin and end with a letter or digit",
            ),
            (
                json!({"metadata": {"name": "keys", "namespace": "a/b"}}),
                "metadata.namespace: must be lower-case letters, digits, - and ., and begin and end with a letter or digit",
            ),
        ];
        for (more, words) in cases {
            assert_eq!(added(&secret(&more)).expect_err("it is none"), words);
        }
        let mut twice = added(&secret(&json!({}))).expect("it is one");
        let words = twice.add(&secret(&json!({}))).expect_err("it is there twice");
        assert_eq!(
            words,
            "metadata.name: is there twice: give each Secret a name of its own"
        );
    }
}
