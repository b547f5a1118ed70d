//! Samplers that are held to a grammar: on random logits, which want anything but to follow one.

mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use swallow_worker::{
    grammar::{Constraint, GrammarError, Grammars, Source},
    sampling::{Sampler, SamplingParams},
};

const MOST: usize = 400;

struct Model {
    grammars: Grammars,
    /// Of each token; special ones begin with 0xFF.
    bytes: Vec<Vec<u8>>,
    eos: Vec<u32>,
}

impl Model {
    fn tiny() -> Self {
        let file = std::fs::read(support::fixture("tiny/tokenizer.json")).expect("a fixture");
        let json = serde_json::from_slice(&file).expect("JSON");
        let bytes = llguidance::token_bytes_from_tokenizer_json(&json).expect("byte-level");
        let named = |text: &str| {
            let found = bytes
                .iter()
                .position(|token| token.get(1..) == Some(text.as_bytes()));
            u32::try_from(found.expect("a token of Llama 3's")).expect("few")
        };
        let eos = vec![named("<|end_of_text|>"), named("<|eot_id|>")];
        let n_vocab = u32::try_from(bytes.len()).expect("few");
        Self {
            grammars: Grammars::new(file.into(), n_vocab, eos.clone().into()),
            bytes,
            eos,
        }
    }

    fn constraint(&self, source: &Source, said: &[u32]) -> Constraint {
        self.grammars
            .constraint(source, said)
            .unwrap_or_else(|error| panic!("{source:?}: {error}"))
    }

    /// The same numbers for the same seed and position, from a distribution in which every token has its chance.
    fn logits(&self, seed: u64, position: usize) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(seed ^ (position as u64) << 32);
        self.bytes.iter().map(|_| rng.f32() * 6.0).collect()
    }

    fn params(&self, grammar: Constraint, seed: u64, resumed: usize) -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            seed,
            stop_ids: self.eos.clone().into(),
            resumed: u32::try_from(resumed).expect("few"),
            grammar: Some(grammar),
            ..SamplingParams::greedy()
        }
    }

    /// All tokens, those in `said` among them.
    fn generate(&self, source: &Source, seed: u64, said: &[u32]) -> Vec<u32> {
        let grammar = self.constraint(source, said);
        let prompt: Arc<[u32]> = [&[2], said].concat().into();
        let mut sampler = Sampler::new(self.params(grammar.clone(), seed, said.len()), prompt);
        let mut tokens = said.to_vec();
        while tokens.len() < MOST && !tokens.last().is_some_and(|token| self.eos.contains(token)) {
            let mut row = self.logits(seed, tokens.len());
            let position = u32::try_from(tokens.len()).expect("few");
            let index = position - u32::try_from(said.len()).expect("few");
            let (token, _) = sampler.sample(&mut row, index, position).expect("finite");
            assert_eq!(grammar.failure(), None, "{source:?} after {tokens:?}");
            tokens.push(token);
        }
        tokens
    }

    /// The text, if the output is complete.
    fn text(&self, tokens: &[u32]) -> Option<String> {
        let (last, said) = tokens.split_last().expect("a token");
        self.eos.contains(last).then(|| {
            let bytes = said.iter().flat_map(|&token| &self.bytes[token as usize]);
            String::from_utf8(bytes.copied().collect()).expect("whole characters")
        })
    }
}

fn person() -> Value {
    json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"], "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "maxItems": 3, "items": {"$ref": "#/$defs/tag"}}},
        "$defs": {"tag": {"enum": ["red", "青い", "\"q\""]}}})
}

fn is_person(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).expect(text);
    let tags = value["tags"].as_array().expect("tags");
    value.as_object().is_some_and(|fields| fields.len() == 3)
        && value["name"]
            .as_str()
            .is_some_and(|name| name.chars().count() <= 12)
        && value["age"].as_u64().is_some_and(|age| age <= 150)
        && tags.len() <= 3
        && tags
            .iter()
            .all(|tag| ["red", "青い", "\"q\""].contains(&tag.as_str().unwrap_or_default()))
}

fn schema(schema: &Value) -> Source {
    Source::JsonSchema(schema.to_string())
}

#[test]
fn what_is_complete_follows_its_grammar() {
    let model = Model::tiny();
    let lark = r#"start: ("yes" | "いいえ") " "? NUMBER
        NUMBER: /[0-9]{1,3}/"#;
    type Follows = fn(&str) -> bool;
    let cases: [(Source, Follows); 5] = [
        (schema(&person()), is_person),
        (schema(&json!({"type": "object"})), |text| {
            serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object())
        }),
        (Source::Regex("(春|夏){2,5}[0-9]+x?".into()), |text| {
            let seasons = text.chars().take_while(|c| "春夏".contains(*c)).count();
            let rest: String = text.chars().skip(seasons).collect();
            (2..=5).contains(&seasons)
                && rest
                    .trim_end_matches('x')
                    .bytes()
                    .all(|byte| byte.is_ascii_digit())
                && rest.starts_with(|c: char| c.is_ascii_digit())
        }),
        (Source::Lark(lark.into()), |text| {
            text.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end() == "yes"
                || text.starts_with("いいえ")
        }),
        (Source::Lark(r#"start: "left" | "right""#.into()), |text| {
            text == "left" || text == "right"
        }),
    ];
    for (source, follows) in cases {
        let mut complete = 0;
        for seed in 0..30 {
            if let Some(text) = model.text(&model.generate(&source, seed, &[])) {
                assert!(follows(&text), "{source:?}, seed {seed}: {text}");
                complete += 1;
            }
        }
        assert!(complete >= 10, "{source:?}: {complete} of 30 are complete");
    }
}

#[test]
fn white_space_comes_to_an_end() {
    let model = Model::tiny();
    let source = schema(&json!({"type": "array", "minItems": 2, "maxItems": 2, "items": {"const": 1}}));
    let grammar = model.constraint(&source, &[]);
    let mut sampler = Sampler::new(model.params(grammar, 1, 0), Arc::from([2]));
    let space = model
        .bytes
        .iter()
        .position(|token| token == b" ")
        .expect("a token");
    let mut text = String::new();
    for at in 0..200 {
        // It wants nothing but space.
        let mut row = model.logits(1, at as usize);
        row[space] = 50.0;
        let token = sampler.sample(&mut row, at, at).expect("finite").0;
        if model.eos.contains(&token) {
            break;
        }
        text += std::str::from_utf8(&model.bytes[token as usize]).expect("ASCII");
    }
    assert_eq!(serde_json::from_str::<Value>(&text).expect(&text), json!([1, 1]));
    assert!(text.len() > 100, "it wrote what it might: {text:?}");
}

#[test]
fn another_replica_goes_on_with_the_same_tokens() {
    let model = Model::tiny();
    for source in [schema(&person()), Source::Regex("(春|夏){2,5}[0-9]+x?".into())] {
        for seed in 0..5 {
            let whole = model.generate(&source, seed, &[]);
            for cut in (1..whole.len()).step_by(3) {
                // A replica of its own has its own compiler.
                let other = Model::tiny();
                assert_eq!(
                    other.generate(&source, seed, &whole[..cut]),
                    whole,
                    "cut at {cut}"
                );
            }
        }
    }
    let broken = model.grammars.constraint(
        &Source::Regex("a+".into()),
        &model.generate(&schema(&person()), 1, &[])[..3],
    );
    assert!(matches!(broken, Err(GrammarError::Resumed { .. })), "{broken:?}");
}

#[test]
fn tokens_that_are_drawn_again_are_the_same() {
    let model = Model::tiny();
    let source = schema(&person());
    let whole = model.generate(&source, 3, &[]);
    let grammar = model.constraint(&source, &[]);
    let mut sampler = Sampler::new(model.params(grammar, 3, 0), Arc::from([2]));
    let mut draw = |at: usize| {
        let position = u32::try_from(at).expect("few");
        sampler
            .sample(&mut model.logits(3, at), position, position)
            .expect("finite")
            .0
    };
    // Preempted in the middle, and at its very end.
    let n = whole.len();
    let order = (0..n / 2).chain(n / 4..n).chain(1..n);
    for at in order {
        assert_eq!(draw(at), whole[at], "token {at}");
    }
}

#[test]
fn a_complete_output_ends_even_where_stops_are_banned_and_what_is_behind_the_end_is_harmless() {
    let model = Model::tiny();
    let grammar = model.constraint(&Source::Regex("a".into()), &[]);
    let params = SamplingParams {
        min_tokens: 10,
        ..model.params(grammar.clone(), 1, 0)
    };
    let mut sampler = Sampler::new(params, Arc::from([2]));
    let tokens: Vec<u32> = (0..4)
        .map(|at| {
            sampler
                .sample(&mut model.logits(1, at as usize), at, at)
                .expect("finite")
                .0
        })
        .collect();
    assert_eq!(model.bytes[tokens[0] as usize], b"a");
    assert!(
        tokens[1..].iter().all(|token| model.eos.contains(token)),
        "{tokens:?}"
    );
    assert_eq!(grammar.failure(), None);
}

#[test]
fn an_output_without_a_way_on_fails_alone() {
    let model = Model::tiny();
    let source = Source::Regex("ab".into());
    let (grammar, other) = (model.constraint(&source, &[]), model.constraint(&source, &[]));
    let mut sampler = Sampler::new(model.params(grammar.clone(), 1, 0), Arc::from([2]));
    // The model can say nothing but its end.
    let mut row = vec![f32::NEG_INFINITY; model.bytes.len()];
    row[model.eos[0] as usize] = 1.0;
    for index in 0..2 {
        sampler
            .sample(&mut row.clone(), index, index)
            .expect("no defect of the group");
        let failure = grammar.failure().expect("it failed");
        assert!(failure.contains("can't go on by its grammar"), "{failure}");
    }
    assert_eq!(other.failure(), None);
    assert!(other.mask(0, &mut model.logits(1, 0)));
}

#[test]
fn what_is_no_grammar_is_refused_by_what_is_wrong_with_it() {
    let model = Model::tiny();
    for (source, named) in [
        (Source::JsonSchema("{".into()), "EOF"),
        (schema(&json!({"type": "nothing"})), "nothing"),
        (schema(&json!({"$ref": "http://elsewhere/schema"})), "elsewhere"),
        (
            schema(&json!({"type": "string", "oneOf": [{"minLength": 1}, {"maxLength": 3}]})),
            "oneOf",
        ),
        (Source::Regex("a(?=b)".into()), "a(?=b)"),
        (Source::Regex("(".into()), "regex"),
        (Source::Lark("begin: \"a\"".into()), "start"),
        (Source::Lark("start: missing".into()), "missing"),
        (Source::Regex("a".repeat(200_000)), "200000 bytes"),
    ] {
        let refused = model.grammars.constraint(&source, &[]);
        let text = format!("{source:?}").chars().take(80).collect::<String>();
        let error = refused.expect_err(&text).to_string();
        assert!(error.contains(named), "{text}: {error}");
        assert!(error.len() < 700 && !error.contains('\n'), "{error}");
    }
    let none =
        Grammars::new(b"no JSON".to_vec().into(), 4, [1].into()).constraint(&Source::Regex("a".into()), &[]);
    assert!(matches!(none, Err(GrammarError::Model(_))), "{none:?}");
    let endless = std::fs::read(support::fixture("tiny/tokenizer.json")).expect("a fixture");
    let endless = Grammars::new(endless.into(), 1536, [].into()).constraint(&Source::Regex("a".into()), &[]);
    assert!(endless.is_err_and(|error| error.to_string().contains("end-of-text")));
}

fn costly() -> Vec<Source> {
    let words: Vec<String> = (0..3000).map(|i| format!("word{i}[a-z]{{1,9}}x")).collect();
    let nested = (0..6).fold("[a-z]".to_owned(), |inner, _| format!("({inner}{{1,30}}b?)"));
    let wide: serde_json::Map<String, Value> = (0..400)
        .map(|i| {
            (
                format!("k{i}"),
                json!({"type": "string", "pattern": format!("^(a|b){{{i},900}}$")}),
            )
        })
        .collect();
    let deep = (0..100).fold(
        json!({"type": "string"}),
        |inner, _| json!({"type": "array", "items": inner, "maxItems": 9}),
    );
    let rules: String = (0..2200)
        .map(|i| format!("r{i}: r{} r{} | \"a\"\n", (i * 7 + 1) % 2200, (i * 3 + 2) % 2200))
        .collect();
    let chain = |n: usize, rule: fn(usize) -> String| -> String { (0..n).map(rule).collect() };
    let rule_chain = chain(3000, |i| format!("r{i}: \"a\" r{}\n", i + 1));
    let terminal_chain = chain(2500, |i| format!("T{i}: \"a\" T{} | \"b\"\n", i + 1));
    let refs: serde_json::Map<String, Value> = (0..1500)
        .map(|i| {
            (
                format!("d{i}"),
                json!({"allOf": [{"$ref": format!("#/$defs/d{}", i + 1)}]}),
            )
        })
        .chain([("d1500".to_owned(), json!({"type": "null"}))])
        .collect();
    vec![
        Source::Lark(format!("start: r0\n{rule_chain}r3000: \"z\"\n")),
        Source::Lark(format!("start: T0\n{terminal_chain}T2500: \"z\"\n")),
        Source::Lark(format!(
            "start: {}\"a\"{}",
            "(".repeat(20_000),
            ")".repeat(20_000)
        )),
        Source::Regex("(".repeat(20_000) + "a" + &")".repeat(20_000)),
        Source::JsonSchema("[".repeat(20_000)),
        Source::Regex("a|".repeat(20_000) + "b"),
        Source::Regex("a?".repeat(20_000) + "b"),
        schema(&json!({"$ref": "#/$defs/d0", "$defs": refs})),
        Source::Regex(words.join("|")),
        Source::Regex(nested),
        Source::Regex("(.*a.{60}){3}".into()),
        Source::Regex(".*(a|b).{1000}".into()),
        schema(&json!({"type": "object", "properties": wide, "required": ["k1", "k2"]})),
        schema(&deep),
        schema(&json!({"type": "array", "minItems": 100_000, "items": {"type": "integer"}})),
        Source::Lark(format!("start: r0\n{rules}")),
        Source::Lark(format!("start: {}", "(\"a\" | \"b\")* ".repeat(3000))),
        Source::Lark("start: x\nx: x x | x x x | \"a\" | \"aa\" | \"\"".into()),
    ]
}

/// Grammars that are made to cost: they are refused, or fail, or are walked, and all of it in time.
#[test]
fn whatever_a_grammar_costs_is_bounded() {
    let model = Model::tiny();
    let mut refused = 0;
    for source in costly() {
        let text = format!("{source:?}").chars().take(60).collect::<String>();
        let begun = Instant::now();
        let outcome = model.grammars.constraint(&source, &[]);
        let compiled = begun.elapsed();
        assert!(compiled.as_secs() < 10, "{text}: {compiled:?}");
        let grammar = match outcome {
            Err(error) => {
                println!("{text}: {compiled:?}, {error}");
                refused += 1;
                continue;
            }
            Ok(grammar) => grammar,
        };
        let mut sampler = Sampler::new(model.params(grammar.clone(), 7, 0), Arc::from([2]));
        let mut slowest = Duration::ZERO;
        for at in 0..100 {
            let mut row = model.logits(7, at as usize);
            let step = Instant::now();
            sampler.sample(&mut row, at, at).expect("no defect of the group");
            slowest = slowest.max(step.elapsed());
        }
        println!(
            "{text}: {compiled:?}, slowest mask {slowest:?}, {:?}",
            grammar.failure()
        );
        assert!(slowest.as_millis() < 500, "{text}: a step waited {slowest:?}");
    }
    assert!(refused >= 2, "{refused}");
}
