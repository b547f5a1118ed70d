//! The text-side files: sampling defaults, what ends a text, and what routers are handed.

use std::{fs, path::Path};

use serde_json::json;
use swallow_worker::checkpoint::{
    CheckpointError, GenerationConfig, LlamaConfig, TextFiles, eos_union, tokenizer_eos,
};
use tempfile::TempDir;

use crate::folder::small_config;

#[test]
fn generation_defaults_are_what_the_file_says() {
    let parse = |text: &str| GenerationConfig::parse(Path::new("generation_config.json"), text.as_bytes());
    let llama = r#"{"_from_model_config": true, "bos_token_id": 1, "do_sample": true, "eos_token_id": [5, 9],
        "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.46.3", "num_beams": 1, "typical_p": 0.9}"#;
    assert_eq!(
        parse(llama).expect("a good file"),
        GenerationConfig {
            temperature: Some(0.6),
            top_p: Some(0.9),
            do_sample: Some(true),
            eos_token_ids: vec![5, 9],
            unused: vec!["typical_p".into()],
            ..GenerationConfig::default()
        }
    );
    let all = r#"{"do_sample": false, "temperature": 1, "top_k": 50, "min_p": 0.05, "repetition_penalty": 1.1,
        "eos_token_id": 2}"#;
    let all = parse(all).expect("a good file");
    assert_eq!(
        (all.temperature, all.top_k, all.min_p),
        (Some(1.0), Some(50), Some(0.05))
    );
    assert_eq!((all.repetition_penalty, all.eos_token_ids), (Some(1.1), vec![2]));
    for (text, expected) in [
        (
            r#"{"temperature": -1}"#,
            "temperature: expected a number of at least 0, found -1",
        ),
        (
            r#"{"top_p": 0}"#,
            "top_p: expected a number above 0 and at most 1, found 0",
        ),
        (
            r#"{"top_k": -1}"#,
            "top_k: expected a whole number of at least 0, found -1",
        ),
        (r#"{"min_p": 2}"#, "min_p: expected a number from 0 to 1, found 2"),
        (
            r#"{"repetition_penalty": 0}"#,
            "repetition_penalty: expected a number above 0, found 0",
        ),
        (
            r#"{"eos_token_id": -1}"#,
            "eos_token_id: expected token ids from 0 to 4294967294, found -1",
        ),
        (
            r#"{"do_sample": 1}"#,
            "do_sample: expected true or false, found 1",
        ),
        (
            "nothing",
            "expected JSON, found expected ident at line 1 column 2; download the file again or repair it",
        ),
    ] {
        let error = parse(text).expect_err("a bad file").to_string();
        assert_eq!(error, format!("generation_config.json: {expected}"));
    }
}

/// A folder of text files and nothing else.
fn text_folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in files {
        fs::write(dir.path().join(name), text).expect("a written file");
    }
    dir
}

const TOKENIZER: &str = r#"{"added_tokens": [{"id": 128009, "content": "<|eot_id|>", "special": true}],
    "model": {"type": "BPE", "vocab": {"</s>": 7}, "merges": []}}"#;

#[test]
fn text_files_are_found_by_name_and_digest() {
    let dir = text_folder(&[
        ("config.json", "{}"),
        ("tokenizer.json", TOKENIZER),
        ("chat_template.jinja", "abc"),
        ("README.md", "not one of them"),
    ]);
    let files = TextFiles::read(dir.path()).expect("a good folder");
    let names: Vec<&str> = files.files().iter().map(|file| file.name).collect();
    assert_eq!(names, ["config.json", "tokenizer.json", "chat_template.jinja"]);
    let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"; // of "abc", from FIPS 180-2
    let template = files.by_digest(digest).expect("a file of that digest");
    assert_eq!(
        (template.name, &template.bytes[..]),
        ("chat_template.jinja", &b"abc"[..])
    );
    assert!(files.get("tokenizer_config.json").is_none() && files.by_digest("00").is_none());

    fs::remove_file(dir.path().join("tokenizer.json")).expect("a removed file");
    let error = TextFiles::read(dir.path()).expect_err("no tokenizer").to_string();
    let end = "tokenizer.json: cannot be read: No such file or directory (os error 2); clients send text, \
               so the model's folder must hold the tokenizer.json of its fast tokenizer";
    assert!(error.ends_with(end), "{error}");
    let large = fs::File::create(dir.path().join("tokenizer.json")).expect("a created file");
    large.set_len(1 << 28).expect("a sparse file");
    let error = TextFiles::read(dir.path())
        .expect_err("a huge tokenizer")
        .to_string();
    assert!(
        error.contains("tokenizer.json: expected at most 134217728 bytes, found a longer file"),
        "{error}"
    );
}

#[test]
fn every_file_has_a_say_in_what_ends_a_text() {
    let eos = |tokenizer_config: &str| -> Result<Option<u32>, CheckpointError> {
        let dir = text_folder(&[
            ("config.json", "{}"),
            ("tokenizer.json", TOKENIZER),
            ("tokenizer_config.json", tokenizer_config),
        ]);
        tokenizer_eos(&TextFiles::read(dir.path()).expect("a good folder"))
    };
    for (text, expected) in [
        (r#"{"eos_token": "<|eot_id|>"}"#, Some(128_009)),
        (
            r#"{"eos_token": {"__type": "AddedToken", "content": "<|eot_id|>"}}"#,
            Some(128_009),
        ),
        (r#"{"eos_token": "</s>"}"#, Some(7)),
        (r#"{"eos_token": null}"#, None),
        ("{}", None),
    ] {
        assert_eq!(eos(text).expect("good files"), expected, "{text}");
    }
    for (text, expected) in [
        (
            r#"{"eos_token": "<|end|>"}"#,
            "eos_token: expected a token of tokenizer.json, found \"<|end|>\"; the two files must be of one model",
        ),
        (
            r#"{"eos_token": 3}"#,
            "eos_token: expected a string, or an object with a string `content`, found 3",
        ),
    ] {
        let error = eos(text).expect_err("bad files").to_string();
        assert!(error.ends_with(expected), "{error}");
    }
    let mut config = small_config();
    config["eos_token_id"] = json!([9, 2]);
    let config =
        LlamaConfig::parse(Path::new("config.json"), config.to_string().as_bytes()).expect("a good config");
    let generation = GenerationConfig {
        eos_token_ids: vec![2, 5],
        ..GenerationConfig::default()
    };
    assert_eq!(eos_union(&config, &generation, Some(128_009)), [2, 5, 9, 128_009]);
    assert_eq!(eos_union(&config, &GenerationConfig::default(), None), [2, 9]);
}
