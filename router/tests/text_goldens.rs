//! The committed models' tokenizers and chat templates give what transformers gave on the same files.

use std::{fs, path::PathBuf};

use serde_json::{Map, Value};
use swallow_router::{
    fleet::{ModelFile, ModelFiles},
    models::ModelText,
    template::{Conversation, TemplateError},
};

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures"))
}

fn model(name: &str) -> ModelText {
    let file = |name: String, path: PathBuf| {
        let bytes = fs::read(path).expect("a fixture").into();
        (name.clone(), ModelFile { digest: name, bytes })
    };
    let files: ModelFiles = fs::read_dir(fixtures().join(name))
        .expect("a fixture's folder")
        .map(|entry| entry.expect("an entry"))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .filter(|(name, _)| name.ends_with(".json") || name.ends_with(".jinja"))
        .map(|(name, path)| file(name, path))
        .collect();
    ModelText::read(&files).expect("a model that gives text")
}

fn goldens(name: &str) -> Value {
    let text = fs::read(fixtures().join("goldens").join(format!("{name}.json"))).expect("goldens");
    serde_json::from_slice(&text).expect("JSON")
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name]
        .as_array()
        .unwrap_or_else(|| panic!("{name} is a list"))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

fn render(model: &ModelText, case: &Value, add_generation_prompt: bool) -> Result<String, TemplateError> {
    let template = model
        .template
        .as_ref()
        .expect("a chat template")
        .as_ref()
        .expect("one that compiles");
    let none = Map::new();
    let args = case["variables"].as_object().unwrap_or(&none);
    let conversation = Conversation {
        messages: list(case, "messages"),
        add_generation_prompt,
        args,
    };
    template.render(
        &conversation,
        &model.special,
        &"2024-05-03T00:00:00[UTC]".parse().expect("a time"),
    )
}

#[test]
fn conversations_render_and_tokenise_as_in_transformers() {
    for name in ["tiny", "odd"] {
        let (model, goldens) = (model(name), goldens(name));
        for case in list(&goldens, "conversations") {
            let rendered = render(&model, case, case["add_generation_prompt"] == true);
            if let Some(error) = case["error"].as_str() {
                assert_eq!(
                    rendered,
                    Err(TemplateError::Raised(error.to_owned())),
                    "{name}: {case}"
                );
                continue;
            }
            let rendered = rendered.unwrap_or_else(|error| panic!("{name}: {error}: {case}"));
            assert_eq!(rendered, case["text"].as_str().expect("text"), "{name}");
            assert_eq!(
                model.tokenizer.encode(&rendered, false).expect("text"),
                ids(&case["ids"]),
                "{name}"
            );
        }
        for case in list(&goldens, "prompts")
            .iter()
            .filter(|case| case["messages"].is_array())
        {
            let rendered = render(&model, case, true).expect("a conversation that it takes");
            let prompt = model.tokenizer.encode(&rendered, false).expect("text");
            assert_eq!(prompt, ids(&case["prompt_ids"]), "{name}: {}", case["name"]);
        }
    }
}

#[test]
fn texts_tokenise_and_come_back_as_in_transformers() {
    for name in ["tiny", "odd"] {
        let (model, goldens) = (model(name), goldens(name));
        let tokenizer = &model.tokenizer;
        for case in list(&goldens, "texts") {
            let text = case["text"].as_str().expect("text");
            let plain = ids(&case["ids_without_special_tokens"]);
            assert_eq!(
                tokenizer.encode(text, false).expect("text"),
                plain,
                "{name}: {text:?}"
            );
            // transformers writes a second beginning of sequence where the text has one; here a text never gets two.
            let written = tokenizer.bos().is_some() && plain.first() == tokenizer.bos().as_ref();
            let expected = if written { plain.clone() } else { ids(&case["ids"]) };
            assert_eq!(
                tokenizer.encode(text, true).expect("text"),
                expected,
                "{name}: {text:?}"
            );
            for (skip, field) in [(false, "decoded"), (true, "decoded_without_special_tokens")] {
                let decoded = String::from_utf8_lossy(&tokenizer.decode(&plain, skip)).into_owned();
                assert_eq!(decoded, case[field].as_str().expect("text"), "{name}: {text:?}");
            }
        }
    }
}
