//! Models that are made up: the same in memory and as files, at any degree of tensor parallelism; and nobody's files
//! are touched.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use serde_json::Value;
use support::{Engine, Outcome, Request, random_model::Traits, spec};
use swallow_worker::{
    checkpoint::{CheckpointError, TextFiles},
    dummy::{DummyModel, MakeArgs, MakeError, make_checkpoint},
    group::{Group, LoadProgress},
};

/// A folder with a config.json and nothing else.
fn shape(folder: &Path, vocab: usize) -> PathBuf {
    let dir = folder.join("shape");
    fs::create_dir(&dir).expect("a fresh folder");
    let traits = Traits {
        vocab,
        ..Traits::default()
    };
    fs::write(dir.join("config.json"), traits.config().to_string()).expect("the folder is ours");
    dir
}

fn requests() -> Vec<Request> {
    (0..4_u32)
        .map(|n| Request::greedy(&(0..20 + n).map(|i| (7 * i + n) % 300).collect::<Vec<_>>(), 24))
        .collect()
}

fn tokens(outcomes: &[Outcome]) -> Vec<Vec<u32>> {
    outcomes.iter().map(|outcome| outcome.tokens.clone()).collect()
}

fn of_formula(shape: &Path, tensor_parallel: usize) -> Vec<Vec<u32>> {
    let model = DummyModel::open(shape, tensor_parallel).expect("a shape");
    let spec = spec(tensor_parallel);
    let group = Group::start(model.config, spec.clone(), Arc::new(LoadProgress::default()))
        .unwrap_or_else(|error| panic!("{error}"));
    tokens(&Engine::of(group, spec, true).run(&requests(), 0))
}

#[test]
fn a_checkpoint_that_was_made_is_the_dummy_model_of_its_shape() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shape = shape(folder.path(), 400);
    let out = folder.path().join("made");
    make_checkpoint(&MakeArgs {
        shape: shape.clone(),
        out: out.clone(),
    })
    .expect("it is made");
    let one = of_formula(&shape, 1);
    assert!(one.iter().all(|tokens| tokens.len() > 8), "{one:?}");
    assert_eq!(of_formula(&shape, 2), one, "two ranks");
    for ranks in [1, 2] {
        let made = Engine::start(&out, spec(ranks)).run(&requests(), 0);
        assert_eq!(tokens(&made), one, "from files, {ranks} ranks");
    }
    let text = TextFiles::read(&out).expect("all text files are there");
    let dummy = DummyModel::open(&shape, 1).expect("a shape").text;
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        let [made, dummy] = [&text, &dummy].map(|text| &text.get(name).expect("it was made").digest);
        assert_eq!(made, dummy, "{name}");
    }
}

#[test]
fn what_is_there_is_left_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shape = shape(folder.path(), 400);
    let error = make_checkpoint(&MakeArgs {
        shape: shape.clone(),
        out: shape.clone(),
    })
    .expect_err("it is not empty");
    assert!(matches!(error, MakeError::NotEmpty(_)), "{error}");
    assert_eq!(fs::read_dir(&shape).expect("it is there").count(), 1);
}

#[test]
fn a_disk_without_room_is_told_before_the_first_byte() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shape = folder.path().join("config");
    fs::create_dir(&shape).expect("a fresh folder");
    let huge = Traits {
        hidden: 1 << 16,
        n_layers: 1000,
        n_heads: 512,
        inner: 1 << 19,
        ..Traits::default()
    };
    fs::write(shape.join("config.json"), huge.config().to_string()).expect("the folder is ours");
    let out = folder.path().join("made");
    let error = make_checkpoint(&MakeArgs {
        shape,
        out: out.clone(),
    })
    .expect_err("hundreds of terabytes");
    assert!(matches!(error, MakeError::NoSpace { .. }), "{error}");
    assert_eq!(fs::read_dir(out).expect("it is there").count(), 0);
}

#[test]
fn a_folder_with_a_tokenizer_keeps_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let tiny = support::fixture("tiny");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tiny.join(name), folder.path().join(name)).expect("a fixture");
    }
    let text = DummyModel::open(folder.path(), 1).expect("a shape").text;
    let own = TextFiles::read(&tiny).expect("a fixture");
    let digest = |text: &TextFiles, name| text.get(name).expect("it is there").digest.clone();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(digest(&text, name), digest(&own, name));
    }
    assert!(
        text.get("generation_config.json").is_none(),
        "none is made beside it"
    );
}

#[test]
fn what_is_no_shape_is_refused_with_what_to_write() {
    let said = |model: &str, ranks| {
        let error: CheckpointError = DummyModel::open(Path::new(model), ranks).expect_err(model);
        error.to_string()
    };
    let error = said("llama-9", 1);
    assert!(
        error.contains("give the name of a shape (llama-3-8b, llama-3.3-70b)"),
        "{error}"
    );
    assert!(
        said("llama-3-8b", 3).contains("degree 3 does not fit"),
        "heads are cut"
    );
    assert!(
        said(r#"{"model_type": "gpt2"}"#, 1).contains("architectures"),
        "not a Llama"
    );
    let small = Traits::default().config().to_string().replace("301", "200");
    assert!(
        said(&small, 1).contains("vocab_size: expected at least 258"),
        "no room for bytes"
    );
}

#[test]
fn the_programs_words_name_the_flag() {
    let output = Command::new(env!("CARGO_BIN_EXE_swallow-worker"))
        .args(["make-checkpoint", "--shape=llama-9", "--out=/nowhere/at/all"])
        .output()
        .expect("the binary starts");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && words.contains("--shape=llama-9: "),
        "{words}"
    );
}

#[test]
fn a_made_tokenizer_is_one_for_grammars_too() {
    let model = DummyModel::open(Path::new("llama-3-8b"), 1).expect("a shape");
    let file = model.text.get("tokenizer.json").expect("it was made");
    let tokenizer: Value = serde_json::from_slice(&file.bytes).expect("JSON");
    let words = llguidance::token_bytes_from_tokenizer_json(&tokenizer).expect("bytes of tokens");
    assert_eq!(words.len(), 128_256);
    assert!(
        words.iter().all(|word| !word.is_empty()),
        "every id shows something"
    );
}
