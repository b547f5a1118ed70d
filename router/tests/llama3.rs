//! With Llama 3's own tokenizer and templates, the ids that transformers gives come out.
//!
//! The files are under Meta's licence and not part of this repository: their folder is given by an environment
//! variable, and without it each test says that it was skipped.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
};

use serde_json::{Map, Value, json};
use swallow_router::{
    template::{ChatTemplate, Conversation, SpecialTokens},
    text::{StopSet, Tokenizer, Transcript, Wording},
};

const FOLDER: &str = "SWALLOW_LLAMA3_DIR";

fn folder(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os(FOLDER).map(PathBuf::from);
    if folder.is_none() {
        // Past the capture of passing tests' output, so that the summary has it.
        writeln!(io::stderr(), "skipped: {test}: {FOLDER} is not set").expect("standard error is open");
    }
    folder
}

/// Unpacked and read once.
fn tokenizer(folder: &Path) -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let load = || {
        let out = Command::new("xz")
            .arg("-dc")
            .arg(folder.join("llama3_tokenizer.json.xz"))
            .output();
        let out = out.expect("xz, to unpack the tokenizer");
        assert!(
            out.status.success(),
            "xz: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        let tokenizer = Tokenizer::load(&out.stdout, Some("<|begin_of_text|>"), None);
        let tokenizer = tokenizer.expect("Llama 3's tokenizer");
        assert!(tokenizer.is_own(), "it is what our own BPE is for");
        Arc::new(tokenizer)
    };
    TOKENIZER.get_or_init(load).clone()
}

fn specials() -> SpecialTokens {
    SpecialTokens::parse(
        &json!({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
        &Value::Null,
    )
}

fn render(template: &ChatTemplate, messages: &Value, specials: &SpecialTokens) -> String {
    let now = "2024-07-26T00:00:00[UTC]".parse().expect("a time");
    let messages = messages.as_array().expect("a list");
    let conversation = Conversation {
        messages,
        add_generation_prompt: true,
        args: &Map::new(),
    };
    template
        .render(&conversation, specials, &now)
        .expect("a conversation that it takes")
}

fn known(folder: &Path) -> Value {
    let text = fs::read(folder.join("prompts_and_ids.json")).expect("prompts_and_ids.json");
    serde_json::from_slice(&text).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("ids")
}

#[test]
fn the_cards_prompts_have_the_known_ids() {
    let Some(folder) = folder("the_cards_prompts_have_the_known_ids") else {
        return;
    };
    let tokenizer = tokenizer(&folder);
    let known = known(&folder);
    let compile = |name: &str| {
        ChatTemplate::compile(&fs::read_to_string(folder.join("templates").join(name)).expect(name))
            .expect(name)
    };
    let short = compile("meta-llama_Meta-Llama-3-8B-Instruct.jinja");
    let long = compile("meta-llama_Llama-3.1_and_3.3_Instruct.official.jinja");
    let system = known["system"]["text"].as_str().expect("text");
    let mut checked = 0;
    for (name, case) in known.as_object().expect("an object") {
        if let (Some(text), Some(_)) = (case["text"].as_str(), case["ids"].as_array()) {
            assert_eq!(
                tokenizer.encode(text, false).expect("text"),
                ids(&case["ids"]),
                "{name}"
            );
            assert_eq!(
                tokenizer.decode(&ids(&case["ids"]), true),
                text.as_bytes(),
                "{name}"
            );
            checked += 1;
        }
        let Some(prompt) = case["prompt"].as_str() else {
            continue;
        };
        let user = if name.contains("8b") {
            &known["user_8b"]
        } else {
            &known["user_70b"]
        };
        let messages =
            json!([{"role": "system", "content": system}, {"role": "user", "content": user["text"]}]);
        let template = if name.contains("llama31_template") {
            &long
        } else {
            &short
        };
        assert_eq!(render(template, &messages, &specials()), prompt, "{name}");
        let single = ids(&case["ids_chat_single_bos"]);
        assert_eq!(tokenizer.encode(prompt, false).expect("text"), single, "{name}");
        // A text that begins with the token's own text doesn't get a second one.
        assert_eq!(tokenizer.encode(prompt, true).expect("text"), single, "{name}");
        checked += 1;
    }
    assert!(checked >= 7, "{checked} cases of the file were understood");
}

/// Messages that every template takes.
fn conversation() -> Value {
    json!([{"role": "system", "content": "S"}, {"role": "user", "content": " U "},
           {"role": "assistant", "content": "A"}, {"role": "user", "content": "日本"}])
}

#[test]
fn every_known_template_renders() {
    let Some(folder) = folder("every_known_template_renders") else {
        return;
    };
    let llama3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user\
        <|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>\
        <|start_header_id|>user<|end_header_id|>\n\n日本<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";
    let dated = llama3.replacen(
        "\n\nS<",
        "\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nS<",
        1,
    );
    let chatml = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n U <|im_end|>\n<|im_start|>assistant\nA\
        <|im_end|>\n<|im_start|>user\n日本<|im_end|>\n<|im_start|>assistant\n";
    // A backslash and an n, not a line break: the template's own text has it so.
    let llama2 =
        "<|begin_of_text|>[INST] <<SYS>>\\nS\\n<</SYS>>\\n\\n U [/INST] A<|eot_id|>[INST] 日本 [/INST] ";
    let expected: BTreeMap<&str, &str> = BTreeMap::from([
        ("Qwen_Qwen2-72B-Instruct.jinja", chatml),
        ("Qwen_Qwen2-7B-Instruct.jinja", chatml),
        (
            "Rakuten_RakutenAI-7B-chat.jinja",
            "<|begin_of_text|>S USER:  U  ASSISTANT: A<|eot_id|> USER: 日本 ASSISTANT: ",
        ),
        (
            "cyberagent_calm2-7b-chat.jinja",
            "USER:  U \nASSISTANT: A<|eot_id|>\nUSER: 日本\nASSISTANT: ",
        ),
        (
            "meta-llama_Llama-3.1_and_3.3_Instruct.official.jinja",
            dated.as_str(),
        ),
        ("meta-llama_Meta-Llama-3-8B-Instruct.jinja", llama3),
        ("tokyotech-llm_Llama-3-Swallow-70B-Instruct-v0.1.jinja", llama3),
        ("tokyotech-llm_Llama-3-Swallow-8B-Instruct-v0.1.jinja", llama3),
        ("tokyotech-llm_Swallow-7b-instruct-v0.1.jinja", llama2),
        ("tokyotech-llm_Swallow-MS-7b-instruct-v0.1.jinja", llama2),
        ("vllm0.29_tool_chat_template_llama3.1_json.jinja", dated.as_str()),
    ]);
    let mut seen = 0;
    for entry in fs::read_dir(folder.join("templates")).expect("templates") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if !name.ends_with(".jinja") {
            continue;
        }
        let template = ChatTemplate::compile(&fs::read_to_string(&path).expect("text")).expect(&name);
        let text = render(&template, &conversation(), &specials());
        match expected.get(name.as_str()) {
            Some(expected) => assert_eq!(text, *expected, "{name}"),
            None => assert!(!text.is_empty(), "{name}"),
        }
        seen += 1;
    }
    assert!(seen >= expected.len(), "{seen} templates");
}

#[test]
fn japanese_streams_in_whole_characters() {
    let Some(folder) = folder("japanese_streams_in_whole_characters") else {
        return;
    };
    let tokenizer = tokenizer(&folder);
    let text = "𠮷野家で👨‍👩‍👧‍👦と東京の夜空に打ち上がっている花火を見た。";
    let ids = tokenizer.encode(text, false).expect("text");
    assert_eq!(
        ids[..4],
        [172, 254, 106, 115],
        "the first character is split over four tokens"
    );
    let wording = Wording {
        skip_special: true,
        shown: None,
        include_stop: false,
        min_tokens: 0,
        stops: StopSet::new(vec![]).into(),
    };
    let mut transcript = Transcript::new(tokenizer.clone(), Arc::new(wording));
    let mut whole = String::new();
    for id in ids {
        let mut delta = String::new();
        transcript.push(id, &mut delta);
        assert!(!delta.contains('\u{FFFD}'));
        whole.push_str(&delta);
    }
    assert_eq!(transcript.finish(&mut whole), None);
    assert_eq!(whole, text);
    assert_eq!(tokenizer.added_token("<|eot_id|>"), Some(128_009));
}

/// tiktoken is another implementation of the same tokenizer, in the environment of the evaluation tests.
#[test]
fn random_texts_have_the_ids_that_the_reference_gives() {
    const TEST: &str = "random_texts_have_the_ids_that_the_reference_gives";
    const COUNT: usize = 100_000;
    let Some(folder) = folder(TEST) else { return };
    let python = std::env::var_os("SWALLOW_CACHE")
        .map(|cache| PathBuf::from(cache).join("evaluation-venv/bin/python"))
        .filter(|python| python.exists());
    let Some(python) = python else {
        writeln!(
            io::stderr(),
            "skipped: {TEST}: there is no evaluation-venv in SWALLOW_CACHE"
        )
        .expect("standard error is open");
        return;
    };
    let seed = fastrand::u32(..).to_string();
    println!("{TEST}: seed {seed}");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/llama3_reference.py");
    let out = Command::new(python)
        .arg(script)
        .arg(&folder)
        .args([&seed, &COUNT.to_string()])
        .output()
        .expect("python runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let (tokenizer, mut checked) = (tokenizer(&folder), 0);
    for line in String::from_utf8(out.stdout).expect("ASCII").lines() {
        let (text, expected): (String, Vec<u32>) = serde_json::from_str(line).expect("a pair");
        assert_eq!(
            tokenizer.encode(&text, false).expect("text"),
            expected,
            "{text:?}"
        );
        assert_eq!(tokenizer.decode(&expected, false), text.as_bytes(), "{text:?}");
        checked += 1;
    }
    assert_eq!(checked, COUNT);
}
