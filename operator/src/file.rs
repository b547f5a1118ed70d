//! SwallowModels from a file, and the Secrets beside them: YAML, one or more documents, read strictly. An error is a list of
//! lines, each naming the file, the object and the field.

mod secret;

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read},
    path::Path,
};

use serde::Deserialize;
use serde_json::Value;
use swallow_plan::{
    model::{self, Problem, SwallowModel},
    topology::Shape,
};

/// The most bytes of a file with models: it is written by hand.
const FILE_MAX: u64 = 4 << 20;
/// The most models of a file, and the most Secrets.
const OBJECTS_MAX: usize = 256;

pub use secret::{Place, Secrets};

/// Lines that say what is wrong.
pub type Errors = Vec<String>;

/// What a file holds.
#[derive(Debug)]
pub struct Contents {
    /// At least one, in their order.
    pub models: Vec<SwallowModel>,
    /// By name.
    pub secrets: Secrets,
}

/// Reads every SwallowModel and every Secret of a file; `-` is standard input.
pub fn read(path: &Path) -> Result<Contents, Errors> {
    let name = path.display();
    let text = text(path).map_err(|error| vec![format!("{name}: {error}")])?;
    let (mut models, mut secrets) = (Vec::new(), Secrets::default());
    let mut errors = Vec::new();
    for (i, document) in serde_yaml_ng::Deserializer::from_str(&text).enumerate() {
        let value = match Value::deserialize(document) {
            Ok(Value::Null) => continue,
            Ok(value) => value,
            // What follows a syntax error means nothing.
            Err(error) => return Err(vec![format!("{name}: is not YAML: {error}")]),
        };
        let called = value.pointer("/metadata/name").and_then(Value::as_str);
        let who = called.map_or_else(|| format!("document {}", i + 1), str::to_owned);
        if secret::is_secret(&value) {
            if let Err(problem) = secrets.add(&value) {
                errors.push(format!("{name}: {who}: {problem}"));
            }
        } else {
            match model::read(&value) {
                Ok(model) => models.push(model),
                Err(problems) => {
                    errors.extend(problems.iter().map(|problem| format!("{name}: {who}: {problem}")))
                }
            }
        }
        if models.len().max(secrets.len()) > OBJECTS_MAX {
            return Err(vec![format!(
                "{name}: holds more than {OBJECTS_MAX} models or Secrets: split it"
            )]);
        }
    }
    let mut seen = BTreeSet::new();
    for model in &models {
        let key = (model.metadata.namespace.clone(), model.metadata.name.clone());
        if !seen.insert(key) {
            let problem = Problem::new(
                "metadata.name",
                "is there twice: give each model a name of its own",
            );
            errors.push(format!("{name}: {}: {problem}", model_name(model)));
        }
    }
    if models.is_empty() && errors.is_empty() {
        errors.push(format!("{name}: holds no SwallowModel"));
    }
    if errors.is_empty() {
        Ok(Contents { models, secrets })
    } else {
        Err(errors)
    }
}

/// A model's name, for people.
pub fn model_name(model: &SwallowModel) -> &str {
    model.metadata.name.as_deref().unwrap_or_default()
}

/// The size that the config.json of a model's folder gives, if it can be read.
pub fn shape(folder: &Path) -> Option<Shape> {
    let text = fs::read_to_string(folder.join("config.json")).ok()?;
    Shape::from_config(&serde_json::from_str(&text).ok()?)
}

fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let limit = FILE_MAX + 1;
    let read = if path == Path::new("-") {
        io::stdin().lock().take(limit).read_to_string(&mut text)?
    } else {
        fs::File::open(path)?.take(limit).read_to_string(&mut text)?
    };
    if read as u64 > FILE_MAX {
        return Err(io::Error::other(format!(
            "is larger than {FILE_MAX} bytes: no file of SwallowModels is"
        )));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(text: &str) -> Errors {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("model.yaml");
        fs::write(&file, text).expect("the folder is ours");
        let prefix = format!("{}: ", file.display());
        let errors = read(&file).expect_err("must be refused");
        errors
            .iter()
            .map(|line| {
                line.strip_prefix(&prefix)
                    .expect("each names the file")
                    .to_owned()
            })
            .collect()
    }

    fn model(name: &str) -> String {
        format!(
            "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata: {{name: {name}}}\nspec:\n  \
             model: {{source: {{type: HostPath, hostPath: {{path: /m}}}}}}\n"
        )
    }

    #[test]
    fn each_mistake_is_a_line() {
        assert_eq!(errors(""), ["holds no SwallowModel"]);
        assert_eq!(errors("---\n---\n"), ["holds no SwallowModel"]);
        assert!(errors("][")[0].starts_with("is not YAML: "));
        assert_eq!(
            errors("kind: Pod"),
            [
                "document 1: apiVersion: is missing: write serving.swallow.dev/v1alpha1",
                "document 1: kind: is 'Pod': write SwallowModel"
            ]
        );
        let two = format!("{}---\n{}  replcas: 2\n", model("a"), model("b"));
        assert_eq!(
            errors(&two),
            ["b: spec.replcas: there is no such field; did you mean replicas?"]
        );
        let twice = format!("{}---\n{}", model("a"), model("a"));
        assert_eq!(
            errors(&twice),
            ["a: metadata.name: is there twice: give each model a name of its own"]
        );
    }

    #[test]
    fn secrets_are_read_beside_models() {
        let secret =
            "apiVersion: v1\nkind: Secret\nmetadata: {name: s, namespace: team}\nstringData: {a: b}\n";
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("model.yaml");
        fs::write(&file, format!("{secret}---\n{}", model("m"))).expect("the folder is ours");
        let contents = read(&file).expect("both can be read");
        assert_eq!(contents.models.len(), 1);
        let entries = contents.secrets.get(&("team".into(), "s".into()));
        assert_eq!(entries.and_then(|it| it.get("a")), Some(b"b".as_slice()));
        assert_eq!(errors(secret), ["holds no SwallowModel"]);
        let wrong = format!("{}---\n{}", model("m"), secret.replace("stringData", "strings"));
        assert_eq!(errors(&wrong), ["s: strings: a Secret has no such field"]);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let lines = read(Path::new("/nowhere/model.yaml")).expect_err("not there");
        assert_eq!(
            lines,
            ["/nowhere/model.yaml: No such file or directory (os error 2)"]
        );
    }
}
