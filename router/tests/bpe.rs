//! Our own byte-level BPE against the `tokenizers` library: the same ids for any text, whatever the merges.

mod support;

use std::{fs, path::Path};

use serde_json::{Value, json};
use support::{byte_tokenizer, rng};
use swallow_router::text::Tokenizer;

/// The fixture's tokenizer.json, which is of Llama 3's kind.
fn tiny() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny/tokenizer.json");
    serde_json::from_slice(&fs::read(path).expect("the fixture")).expect("JSON")
}

/// Both ways to the ids.
struct Pair {
    own: Tokenizer,
    library: tokenizers::Tokenizer,
}

impl Pair {
    fn new(file: &Value) -> Self {
        let text = file.to_string();
        let own = Tokenizer::load(text.as_bytes(), None, None).expect("a sound tokenizer");
        assert!(own.is_own(), "it is of the kind that is encoded here");
        let library = tokenizers::Tokenizer::from_bytes(text).expect("a sound tokenizer");
        Self { own, library }
    }

    fn check(&self, text: &str) {
        for add_special in [false, true] {
            let expected = self.library.encode_fast(text, add_special).expect("ids");
            let got = self.own.encode(text, add_special).expect("ids");
            assert_eq!(got, expected.get_ids(), "{text:?}");
        }
    }
}

const PIECES: [&str; 30] = [
    "a",
    "b",
    "ab",
    "aa",
    "the",
    " the",
    "question",
    " numbers",
    "A",
    "é",
    "日本",
    "語",
    "の",
    "😀",
    "1",
    "234",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "'",
    "!",
    "...",
    "<|",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "|>",
];

/// Words, runs of one thing, characters from anywhere, and long words of a few letters.
fn random_text(rng: &mut fastrand::Rng) -> String {
    let mut text = String::new();
    for _ in 0..rng.usize(0..10) {
        let piece = PIECES[rng.usize(..PIECES.len())];
        match rng.u8(0..8) {
            0 => text.push(rng.char(..)),
            1 => text += &piece.repeat(rng.usize(1..60)),
            2 => {
                text.extend((0..rng.usize(1..200)).map(|_| rng.choice(['a', 'b', 'c']).expect("one of them")))
            }
            _ => text += piece,
        }
    }
    text
}

#[test]
fn any_text_has_the_librarys_ids() {
    let mut rng = rng("bpe");
    let mut file = tiny();
    for ignore_merges in [true, false] {
        file["model"]["ignore_merges"] = json!(ignore_merges);
        let pair = Pair::new(&file);
        (0..10_000).for_each(|_| pair.check(&random_text(&mut rng)));
    }
}

/// Merges in any order, of tokens that come about in several ways: what no training gives, and a converted vocabulary
/// does.
fn random_merges(rng: &mut fastrand::Rng) -> Value {
    let mut file = byte_tokenizer();
    let tiny = tiny();
    file["pre_tokenizer"] = tiny["pre_tokenizer"].clone();
    let mut tokens: Vec<String> = ["a", "b", "c", "Ġ"].map(str::to_owned).to_vec();
    let mut merges: Vec<[String; 2]> = Vec::new();
    for _ in 0..rng.usize(1..60) {
        let pair = [0, 1].map(|_| tokens[rng.usize(..tokens.len())].clone());
        let new = pair.concat();
        if new.len() <= 12 && !tokens.contains(&new) {
            tokens.push(new);
        }
        merges.push(pair);
    }
    // All ways to each token, as in a vocabulary that was made from ranks.
    if rng.bool() {
        for token in tokens.clone() {
            for at in (1..token.len()).filter(|at| token.is_char_boundary(*at)) {
                let pair = [token[..at].to_owned(), token[at..].to_owned()];
                if pair.iter().all(|part| tokens.contains(part)) {
                    merges.push(pair);
                }
            }
        }
    }
    rng.shuffle(&mut merges);
    merges.retain(|pair| tokens.contains(&pair.concat()));
    for (id, token) in (300..).zip(tokens.iter().skip(4)) {
        file["model"]["vocab"][token] = json!(id);
    }
    file["model"]["merges"] = json!(merges);
    file["model"]["ignore_merges"] = json!(rng.bool());
    file
}

#[test]
fn merges_in_any_order_give_the_librarys_ids() {
    let mut rng = rng("merges");
    for _ in 0..200 {
        let pair = Pair::new(&random_merges(&mut rng));
        for _ in 0..50 {
            let letters = ['a', 'b', 'c', ' '];
            let length = rng.usize(0..300);
            let text: String = (0..length)
                .map(|_| rng.choice(letters).expect("one of them"))
                .collect();
            pair.check(&text);
            pair.check(&"abc"[..rng.usize(1..=3)].repeat(length));
        }
    }
}

#[test]
fn what_is_of_another_kind_is_the_librarys() {
    let load = |file: &Value| Tokenizer::load(file.to_string().as_bytes(), None, None).expect("sound");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut file = tiny();
        change(&mut file);
        load(&file).is_own()
    };
    assert!(with(&|_| {}));
    assert!(!with(&|file| file["normalizer"] = json!({"type": "NFC"})));
    assert!(!with(&|file| file["model"]["dropout"] = json!(0.1)));
    assert!(!with(&|file| file["added_tokens"][0]["lstrip"] = json!(true)));
    assert!(!with(&|file| file["added_tokens"][0]["normalized"] = json!(true)));
    assert!(!with(
        &|file| file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!("a+")
    ));
    assert!(!with(
        &|file| file["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = json!(true)
    ));
}
