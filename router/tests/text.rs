//! Text in pieces equals text as a whole: code points, stop strings, tokens and their bytes, over random splits.

mod support;

use std::{sync::Arc, time::Instant};

use serde_json::json;
use support::{BOS, EOS, EOT, TOOL, byte_tokenizer, random_bytes, random_parts, rng};
use swallow_router::text::{StopCursor, StopSet, Tokenizer, Transcript, Utf8Assembler, Wording};

fn tokenizer() -> Tokenizer {
    load(&byte_tokenizer(), Some("<|begin_of_text|>"), None)
}

fn load(json: &serde_json::Value, bos: Option<&str>, add_bos: Option<bool>) -> Tokenizer {
    Tokenizer::load(json.to_string().as_bytes(), bos, add_bos).expect("a sound tokenizer")
}

#[test]
fn bytes_in_any_pieces_decode_as_the_whole_does() {
    let mut rng = rng("utf8");
    for _ in 0..20_000 {
        let bytes = random_bytes(&mut rng);
        let mut assembler = Utf8Assembler::default();
        let mut out = String::new();
        for part in random_parts(&mut rng, &bytes) {
            assembler.push(part, &mut out);
        }
        assembler.finish(&mut out);
        assert_eq!(out, String::from_utf8_lossy(&bytes), "{bytes:x?}");
    }
}

/// What the stop strings' contract says, the slow way: the first match to be complete, of equal ends the longest.
fn naive_stop(text: &str, stops: &[String]) -> Option<(usize, usize)> {
    (1..=text.len())
        .filter(|end| text.is_char_boundary(*end))
        .find_map(|end| {
            let found = stops
                .iter()
                .filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
            found.map(|stop| end - stop.len()).min().map(|start| (start, end))
        })
}

fn random_stops(rng: &mut fastrand::Rng) -> Vec<String> {
    (0..rng.usize(1..4))
        .map(|_| {
            let text = String::from_utf8_lossy(&random_bytes(rng)).into_owned();
            text.chars().take(rng.usize(0..4)).collect()
        })
        .collect()
}

#[test]
fn stop_strings_in_any_pieces_are_found_where_a_search_of_the_whole_finds_them() {
    let mut rng = rng("stops");
    let mut hits = 0;
    for _ in 0..20_000 {
        let text = String::from_utf8_lossy(&random_bytes(&mut rng)).into_owned();
        let stops = random_stops(&mut rng);
        let include = rng.bool();
        let set = StopSet::new(stops.clone());
        let (mut cursor, mut out, mut hit) = (StopCursor::default(), String::new(), None);
        let chars: Vec<String> = text.chars().map(String::from).collect();
        let mut seen = 0;
        for part in chars.chunks(rng.usize(1..4)) {
            let part = part.concat();
            seen += part.len();
            hit = cursor.push(&set, &part, include, &mut out);
            if hit.is_some() {
                break;
            }
            // Withheld is exactly the longest end of the text that begins a stop string: no more, no less.
            let begins = |from: &usize| stops.iter().any(|stop| stop.starts_with(&text[*from..seen]));
            let free = (0..=seen)
                .filter(|from| text.is_char_boundary(*from))
                .find(begins)
                .expect("the empty end");
            assert_eq!(out, text[..free], "{text:?} {stops:?}");
        }
        match (hit, naive_stop(&text, &stops)) {
            (Some(which), Some((start, end))) => {
                hits += 1;
                assert_eq!(
                    out,
                    text[..if include { end } else { start }],
                    "{text:?} {stops:?}"
                );
                assert_eq!(stops[which], text[start..end]);
            }
            (None, None) => {
                cursor.finish(&mut out);
                assert_eq!(out, text);
            }
            (got, expected) => panic!("{text:?} {stops:?}: found {got:?}, expected {expected:?}"),
        }
    }
    assert!(hits > 2_000, "the test must see matches, and saw {hits}");
}

#[test]
fn ten_thousand_overlapping_stop_strings_cost_one_pass() {
    let stops: Vec<String> = (0..10_000)
        .map(|i| format!("{}{i}!", "a".repeat(i % 100)))
        .collect();
    let set = StopSet::new(stops);
    let mut cursor = StopCursor::default();
    let mut out = String::new();
    let text = "a".repeat(1 << 20);
    let started = Instant::now();
    assert_eq!(cursor.push(&set, &text, false, &mut out), None);
    // A search per string would be 10^10 comparisons.
    assert!(started.elapsed().as_secs_f64() < 1.0, "{:?}", started.elapsed());
    assert!(text.len() - out.len() < 100);
}

fn transcript(wording: Wording) -> Transcript {
    Transcript::new(Arc::new(tokenizer()), Arc::new(wording))
}

fn wording(stops: &[&str]) -> Wording {
    Wording {
        skip_special: true,
        shown: None,
        include_stop: false,
        min_tokens: 0,
        stops: StopSet::new(stops.iter().map(ToString::to_string).collect()).into(),
    }
}

fn say(transcript: &mut Transcript, ids: impl IntoIterator<Item = u32>) -> (String, Option<usize>) {
    let mut out = String::new();
    for id in ids {
        let shown = transcript.push(id, &mut out);
        if shown.stop.is_some() {
            return (out, shown.stop);
        }
    }
    (out, None)
}

fn bytes(text: &str) -> impl Iterator<Item = u32> {
    text.bytes().map(u32::from)
}

#[test]
fn control_tokens_are_left_out_and_stop_strings_match_across_tokens() {
    let mut spoken = transcript(wording(&["語!"]));
    let ids: Vec<u32> = bytes("日本").chain([EOT]).chain(bytes("語")).collect();
    assert_eq!(say(&mut spoken, ids), ("日本".into(), None));
    assert_eq!(say(&mut spoken, bytes("?x語!y")), ("語?x".into(), Some(0)));
    let mut spoken = transcript(Wording {
        skip_special: false,
        shown: None,
        ..wording(&[])
    });
    assert_eq!(say(&mut spoken, [b'a'.into(), EOT, TOOL]).0, "a<|eot_id|><tool>");
    let mut spoken = transcript(Wording {
        shown: Some(EOT),
        ..wording(&[])
    });
    assert_eq!(say(&mut spoken, [BOS, b'a'.into(), EOT]).0, "a<|eot_id|>");
}

#[test]
fn a_stop_token_is_shown_only_where_asked_for() {
    for (include_stop, skip_special, named, expected) in [
        (false, true, true, "a"),
        (true, true, true, "a<|end_of_text|>"),
        (true, true, false, "a"),
        (true, false, false, "a<|end_of_text|>"),
    ] {
        let mut spoken = transcript(Wording {
            include_stop,
            skip_special,
            shown: None,
            ..wording(&["ax"])
        });
        let mut out = String::new();
        spoken.push(u32::from(b'a'), &mut out);
        assert_eq!(out, "", "the beginning of a stop string waits");
        let shown = spoken.stop_token(EOS, named, &mut out);
        assert_eq!((out.as_str(), shown.stop, shown.offset), (expected, None, 1));
    }
}

#[test]
fn stop_strings_count_only_after_min_tokens() {
    let tokenizer = Arc::new(tokenizer());
    let stops = ["ab", "ba", "aab", "b", "abba"];
    for number in 0..1_u32 << 7 {
        let text: String = (0..7)
            .map(|i| if number >> i & 1 == 1 { 'a' } else { 'b' })
            .collect();
        for chosen in 0..1_u32 << stops.len() {
            let chosen = (0..stops.len())
                .filter(|i| chosen >> i & 1 == 1)
                .map(|i| stops[i]);
            let chosen: Vec<&str> = chosen.collect();
            for min_tokens in 0..=text.len() {
                let wording = Wording {
                    min_tokens: min_tokens as u32,
                    ..wording(&chosen)
                };
                let mut spoken = Transcript::new(Arc::clone(&tokenizer), Arc::new(wording));
                let (mut said, stop) = say(&mut spoken, bytes(&text));
                if stop.is_none() {
                    assert_eq!(spoken.finish(&mut said), None);
                }
                // A token is a character here.
                let starts = |end: usize| {
                    let ending = chosen.iter().filter(|stop| text[..end].ends_with(**stop));
                    ending.map(|stop| end - stop.len()).min()
                };
                let cut = (min_tokens + 1..=text.len()).find_map(starts);
                assert_eq!(
                    said,
                    text[..cut.unwrap_or(text.len())],
                    "{text} {chosen:?} {min_tokens}"
                );
                assert_eq!(stop.is_some(), cut.is_some(), "{text} {chosen:?} {min_tokens}");
            }
        }
    }
}

#[test]
fn any_transcript_is_the_whole_output_cut_at_its_first_stop_string() {
    let mut rng = rng("transcripts");
    let tokenizer = Arc::new(tokenizer());
    let mut hits = 0;
    for _ in 0..20_000 {
        let bytes = random_bytes(&mut rng);
        let stops = random_stops(&mut rng);
        let wording = Wording {
            include_stop: rng.bool(),
            stops: StopSet::new(stops.clone()).into(),
            ..wording(&[])
        };
        let include = wording.include_stop;
        let mut spoken = Transcript::new(Arc::clone(&tokenizer), Arc::new(wording));
        let mut out = String::new();
        let mut stop = None;
        for &byte in &bytes {
            let before = out.len();
            stop = spoken.push(byte.into(), &mut out).stop;
            if stop.is_some() {
                break;
            }
            // A control token now and then changes nothing.
            if rng.u8(0..9) == 0 {
                spoken.push(EOT, &mut out);
            }
            assert!(out.is_char_boundary(before));
        }
        if stop.is_none() {
            stop = spoken.finish(&mut out);
        }
        let whole = String::from_utf8_lossy(&bytes);
        let expected = match naive_stop(&whole, &stops) {
            Some((start, end)) => &whole[..if include { end } else { start }],
            None => &whole,
        };
        assert_eq!(out, expected, "{bytes:x?} {stops:?}");
        hits += usize::from(stop.is_some());
    }
    assert!(hits > 2_000, "the test must see matches, and saw {hits}");
}

#[test]
fn offsets_count_whole_characters() {
    let mut spoken = transcript(wording(&[]));
    let mut out = String::new();
    let offsets: Vec<u32> = bytes("日aé").map(|id| spoken.push(id, &mut out).offset).collect();
    assert_eq!(offsets, [0, 0, 0, 1, 2, 2]);
    let mut out = String::new();
    spoken.push(0xE6, &mut out);
    assert_eq!(spoken.finish(&mut out), None);
    assert_eq!((out.as_str(), spoken.chars()), ("\u{FFFD}", 4));
}

#[test]
fn a_text_gets_one_beginning_of_sequence() {
    let hi = [u32::from(b'h'), u32::from(b'i')];
    let with_bos = [BOS, hi[0], hi[1]];
    for (add_bos, special, text, expected) in [
        (None, true, "hi", &with_bos[..]),
        (None, false, "hi", &hi[..]),
        (None, true, "<|begin_of_text|>hi", &with_bos[..]),
        (None, false, "<|begin_of_text|>hi", &with_bos[..]),
        (Some(false), true, "hi", &hi[..]),
        (Some(false), true, "<|begin_of_text|>hi", &with_bos[..]),
        (Some(true), true, "hi", &with_bos[..]),
    ] {
        let tokenizer = load(&byte_tokenizer(), Some("<|begin_of_text|>"), add_bos);
        let ids = tokenizer.encode(text, special).expect("text");
        assert_eq!(ids, expected, "{add_bos:?} {special} {text}");
    }
    let mut bare = byte_tokenizer();
    bare["post_processor"] = json!(null);
    for (add_bos, expected) in [
        (None, &hi[..]),
        (Some(true), &with_bos[..]),
        (Some(false), &hi[..]),
    ] {
        let tokenizer = load(&bare, Some("<|begin_of_text|>"), add_bos);
        assert_eq!(
            tokenizer.encode("hi", true).expect("text"),
            expected,
            "{add_bos:?}"
        );
        assert_eq!(
            tokenizer.encode("<|begin_of_text|>hi", true).expect("text"),
            with_bos,
            "{add_bos:?}"
        );
    }
}

#[test]
fn ids_are_bytes_and_back() {
    let tokenizer = tokenizer();
    let text = "日本語 <tool>\n👨‍👩‍👧‍👦";
    let ids = tokenizer.encode(text, false).expect("text");
    assert_eq!(tokenizer.decode(&ids, true), text.as_bytes());
    assert_eq!(
        tokenizer.decode(&[BOS, 0xE6, 0x97, EOT], false),
        b"<|begin_of_text|>\xE6\x97<|eot_id|>"
    );
    assert_eq!(tokenizer.decode(&[BOS, 0xE6, 0x97, EOT], true), b"\xE6\x97");
    assert_eq!(tokenizer.token_bytes(9_999), b"");
    assert_eq!(tokenizer.added_token("<|eot_id|>"), Some(EOT));
    assert_eq!(tokenizer.added_token("<|eot_id|> "), None);
    assert_eq!(
        tokenizer.least_tokens(1900),
        100,
        "no token has more than 19 bytes"
    );
}

#[test]
fn a_leading_space_of_sentencepiece_goes_only_at_the_beginning_of_a_text() {
    let vocab = json!([
        ["<unk>", 0.0],
        ["▁hi", -1.0],
        ["▁", -2.0],
        ["<0xE6>", -3.0],
        ["x", -4.0]
    ]);
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": false}
    });
    let tokenizer = load(&tokenizer, None, None);
    assert_eq!(tokenizer.decode(&[1, 1, 3], true), b"hi hi\xE6");
    assert_eq!(tokenizer.decode(&[2, 1], true), b" hi");
    assert_eq!(tokenizer.token_bytes(1), b" hi");
}

/// What this thread has computed, in seconds: what others do meanwhile does not count.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux counts it");
    let nanoseconds: u64 = text
        .split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .expect("a number");
    nanoseconds as f64 / 1e9
}

/// Four times the text takes at most five times the time, of one character over and over too, which is one word.
#[test]
fn tokenising_takes_time_in_proportion_to_the_text() {
    const BYTES: usize = 1 << 16;
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/fixtures/tiny/tokenizer.json"
    );
    let file = std::fs::read(file).expect("a fixture");
    let tokenizer = Tokenizer::load(&file, None, None).expect("Llama 3's kind");
    assert!(tokenizer.is_own());
    // The count moves with the clock's ticks, of a few milliseconds: it takes many runs.
    let seconds = |text: &str| {
        let (started, mut runs) = (cpu_seconds(), 0);
        loop {
            for _ in 0..8 {
                assert!(!tokenizer.encode(text, false).expect("text").is_empty());
            }
            runs += 8;
            let took = cpu_seconds() - started;
            if took > 0.08 {
                break took / f64::from(runs);
            }
        }
    };
    let mut rng = rng("tokenising_takes_time_in_proportion_to_the_text");
    let mut words = String::new();
    while words.len() < BYTES {
        words += rng
            .choice(["What ", "三十五", "is,", "\n\n", "12 ", "plus"])
            .expect("some");
    }
    let repeated = |unit: &str| unit.repeat(BYTES / unit.len());
    let pieces = ["7", "a "].map(repeated).into_iter().chain([words]);
    let one_word = ["a", "A", " ", "\n", "、", "あ", "🌸"].map(repeated);
    for text in pieces.chain(one_word) {
        let quarter = text.chars().count() / 4;
        let end = text.char_indices().nth(quarter).expect("long enough").0;
        let (mut short, mut long) = (f64::INFINITY, f64::INFINITY);
        // What else the machine does costs caches: it can only be too much by chance.
        for _ in 0..12 {
            short = short.min(seconds(&text[..end]));
            long = long.min(seconds(&text));
            if long <= 5.0 * short {
                break;
            }
        }
        let name: String = text.chars().take(9).collect();
        println!("{name:?}: {:.1} times", long / short);
        assert!(
            long <= 5.0 * short,
            "{name:?}: {short} s, and {long} s for four times as much"
        );
    }
}
