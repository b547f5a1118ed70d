//! A model that nobody has: the whole chain serves it from its size alone, and text flows both ways.

use serde_json::{Value, json};
use swallow_tests::{Local, post};

/// A SwallowModel that is a size and nothing else.
fn made(tensor: u32, more: &str) -> String {
    format!(
        "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata:\n  name: made\nspec:\n  model:\n    \
         shape:\n      numbers: {{hiddenSize: 64, layers: 2, attentionHeads: 8, keyValueHeads: 4, intermediateSize: 96, \
         vocabularySize: 2000, maxPositionEmbeddings: 1024}}\n{more}  engine:\n    loadFormat: Dummy\n    kvCache:\n      \
         bytes: 64Mi\n  accelerator:\n    device: CPU\n  parallelism:\n    tensor: {tensor}\n"
    )
}

/// What the model says: a completion of text, its tokens counted, and an answer in a chat.
fn answers(tensor: u32) -> [Value; 3] {
    let mut local = Local::start(&made(tensor, ""), &[]);
    let (_, http) = local.ready();
    let completion = post(
        &http,
        "/v1/completions",
        &json!({ "model": "made", "prompt": "the swallow flies south", "max_tokens": 24, "temperature": 0 }),
    );
    let chat = post(
        &http,
        "/v1/chat/completions",
        &json!({ "model": "made", "messages": [{ "role": "user", "content": "hello there" }], "max_tokens": 24,
                 "temperature": 0 }),
    );
    [
        completion["choices"][0]["text"].clone(),
        completion["usage"].clone(),
        chat["choices"][0]["message"]["content"].clone(),
    ]
}

#[test]
fn text_flows_through_a_model_that_is_a_size_alone_and_ranks_change_nothing() {
    let one = answers(1);
    let [text, usage, chat] = &one;
    for text in [text, chat] {
        let text = text.as_str().expect("text");
        assert!(
            text.chars().filter(char::is_ascii_lowercase).count() > 20,
            "'{text}'"
        );
    }
    let prompt = usage["prompt_tokens"].as_u64().expect("a count");
    assert!(
        (5..23).contains(&prompt),
        "tokens are longer than letters: {usage}"
    );
    assert_eq!(answers(2), one, "two ranks");
}

/// On a machine without GPUs.
#[test]
fn a_missing_driver_is_told_in_the_workers_words() {
    if swallow_tests::has_gpu() {
        return;
    }
    let mut local = Local::start(&made(1, "").replace("device: CPU", "device: GPU"), &[]);
    assert!(!local.wait().success());
    let words = local.stderr();
    assert!(
        words.contains("--device=cuda: ") && words.contains("driver") && words.contains("libcuda.so.1"),
        "{words}"
    );
}

#[test]
fn a_dummy_that_would_fetch_weights_is_refused() {
    let source = "    source:\n      type: HuggingFace\n      huggingFace: {repo: o/n, revision: \
                  0123456789012345678901234567890123456789}\n";
    let mut local = Local::start(&made(1, source), &[]);
    assert!(!local.wait().success());
    let words = local.stderr();
    assert!(
        words.contains(
            "made: spec.model.source.type: is HuggingFace, whose weights a Dummy model would fetch"
        ),
        "{words}"
    );
}
