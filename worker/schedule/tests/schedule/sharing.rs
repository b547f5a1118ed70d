//! A shared prefix is computed once and lies in memory once.

use std::collections::BTreeSet;

use swallow_schedule::{Ask, Limits, SeqId};

use crate::device::{ask, limits};
use crate::engine::{Engine, rows_of, text};

/// A prompt of ten shared blocks and a tail of its own.
fn prompt(id: u64) -> Vec<u32> {
    let mut prompt = text(1, 40);
    prompt.extend(text(100 + id as u32, 3));
    prompt
}

#[test]
fn a_shared_prefix_takes_memory_once() {
    let held = |prefix_cache: bool| {
        let mut engine = Engine::new(Limits {
            n_blocks: 128,
            max_step_tokens: 400,
            prefix_cache,
            ..limits()
        });
        for id in 1..=8 {
            engine.add(ask(id, &prompt(id), 8));
        }
        // The first prefill, then everybody's: all eight run now.
        engine.turn(0);
        engine.turn(0);
        let load = engine.scheduler.load();
        assert_eq!(load.running, 8);
        engine.drain(0);
        engine.assert_undisturbed();
        load.blocks_held
    };
    assert_eq!(held(true), 10 + 8, "ten blocks of prefix, and one each");
    // Without the cache, eight prompts of 43 tokens and the room for the token that each generated.
    assert_eq!(held(false), 8 * 11);
}

#[test]
fn candidates_that_arrive_together_compute_their_prompt_once() {
    for lag in [0, 1] {
        for max_step_tokens in [7, 16, 400] {
            let mut engine = Engine::new(Limits {
                n_blocks: 128,
                max_step_tokens,
                ..limits()
            });
            for id in 1..=6 {
                engine.add(ask(id, &text(1, 42), 1));
            }
            let steps = engine.drain(lag);
            engine.assert_undisturbed();
            let rows: u32 = steps
                .iter()
                .flat_map(|step| &step.works)
                .map(swallow_schedule::Work::rows)
                .sum();
            assert_eq!(rows, 42 + 5 * 2, "the last, unfilled block is everybody's own");
            for id in 2..=6 {
                assert_eq!(engine.cached_tokens[&SeqId(id)], 40);
            }
        }
    }
}

#[test]
fn whoever_waited_for_a_block_goes_on_without_it() {
    // The first one is cancelled while it computes the prefix; the second must not wait for ever.
    for lag in [0, 1] {
        let mut engine = Engine::new(Limits {
            max_step_tokens: 8,
            ..limits()
        });
        engine.add(ask(1, &text(1, 42), 4));
        engine.add(ask(2, &text(1, 42), 4));
        let step = engine.plan().expect("the first chunk");
        assert_eq!((rows_of(&step, 1), rows_of(&step, 2)), (8, 0));
        engine.cancel(1);
        engine.commit();
        engine.drain(lag);
        engine.assert_undisturbed();
        assert_eq!(engine.tokens(2).len(), 4);
        assert_eq!(
            engine.cached_tokens[&SeqId(2)],
            8,
            "what the first one had computed is good"
        );
    }
}

#[test]
fn an_answer_is_a_prefix_of_the_next_question() {
    let mut engine = Engine::new(limits());
    engine.add(ask(1, &text(1, 10), 7));
    engine.drain(0);
    let mut conversation = text(1, 10);
    conversation.extend(engine.tokens(1));
    conversation.extend(text(2, 5));
    engine.add(ask(2, &conversation, 1));
    engine.drain(0);
    // 16 of the first 17 tokens were fed, in four whole blocks.
    assert_eq!(engine.cached_tokens[&SeqId(2)], 16);
    engine.assert_undisturbed();
}

#[test]
fn roots_do_not_share() {
    let mut engine = Engine::new(limits());
    engine.add(ask(1, &text(1, 20), 1));
    engine.drain(0);
    engine.add(Ask {
        root_key: 8,
        ..ask(2, &text(1, 20), 1)
    });
    engine.drain(0);
    assert_eq!(engine.cached_tokens[&SeqId(2)], 0);
    engine.assert_undisturbed();
}

#[test]
fn prompts_whose_keys_collide_never_share() {
    // The worst key function there is: one key for everything. The second prompt of each pair would find the block
    // that the first one left, were the key all that counts.
    let joined = |parts: &[Vec<u32>]| parts.concat();
    let (x, y, z) = (text(1, 4), text(2, 4), text(3, 4));
    let pairs = [
        (
            joined(&[x.clone(), z.clone()]),
            joined(&[y.clone(), z.clone()]),
            "other tokens",
        ),
        (
            joined(&[x, y.clone(), z.clone()]),
            joined(&[y, z]),
            "the same tokens elsewhere",
        ),
    ];
    for (first, second, why) in pairs {
        let mut engine = Engine::new(Limits {
            key_of: |_, _| 1,
            ..limits()
        });
        for (id, prompt) in [(1, first), (2, second)] {
            engine.add(ask(id, &prompt[..prompt.len() - 3], 1));
            engine.drain(0); // The device checks every read.
            assert_eq!(engine.cached_tokens[&SeqId(id)], 0, "{why}");
            assert_eq!(engine.scheduler.cached_keys(), [1]);
        }
        engine.assert_undisturbed();
    }
}

#[test]
fn a_block_is_findable_only_when_its_step_is_committed() {
    let mut engine = Engine::new(Limits {
        max_step_tokens: 8,
        ..limits()
    });
    engine.add(ask(1, &text(1, 20), 1));
    engine.plan();
    engine.plan();
    assert_eq!(
        engine.scheduler.cached_keys().len(),
        0,
        "two chunks are in flight"
    );
    engine.commit();
    assert_eq!(engine.scheduler.cached_keys().len(), 2, "one is");
    engine.commit();
    assert_eq!(engine.scheduler.cached_keys().len(), 4);
}

#[test]
fn memory_forgets_the_oldest_prefix_and_its_tail_first() {
    let mut engine = Engine::new(Limits {
        n_blocks: 8,
        ..limits()
    });
    for (id, salt) in [(1, 1), (2, 2)] {
        engine.add(ask(id, &text(salt, 13), 1)); // Three findable blocks each, and one that is not.
        engine.drain(0);
    }
    let before: BTreeSet<u64> = engine.scheduler.cached_keys().into_iter().collect();
    assert_eq!(before.len(), 6);
    engine.scheduler.take_kv_delta();
    engine.add(ask(3, &text(3, 13), 1)); // Four blocks, two are free.
    engine.drain(0);
    let delta = engine.scheduler.take_kv_delta();
    assert_eq!((delta.stored.len(), delta.removed.len()), (3, 2));
    engine.add(ask(4, &text(1, 13), 1));
    engine.add(ask(5, &text(2, 13), 1));
    engine.plan();
    assert_eq!(
        engine.cached_tokens[&SeqId(4)],
        4,
        "the oldest prefix lost its tail"
    );
}

#[test]
fn a_key_that_came_and_went_is_not_reported() {
    let mut engine = Engine::new(Limits {
        n_blocks: 4,
        ..limits()
    });
    for salt in 1..=3 {
        engine.add(ask(u64::from(salt), &text(salt, 13), 1));
        engine.drain(0);
    }
    let delta = engine.scheduler.take_kv_delta();
    assert_eq!(delta.stored, engine.scheduler.cached_keys());
    assert!(delta.removed.is_empty(), "the first two came and went");
    assert_eq!(
        engine.scheduler.take_kv_delta(),
        swallow_schedule::KvDelta::default()
    );
}
