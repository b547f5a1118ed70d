//! Nobody holds anybody up: decode rows are in every step, short prompts pass long ones, long ones keep moving.

use swallow_schedule::{Input, Limits, SeqId};

use crate::device::{ask, limits};
use crate::engine::{Engine, rows_of, text};

fn roomy() -> Limits {
    Limits {
        n_blocks: 4096,
        max_model_len: 8192,
        max_step_tokens: 64,
        prefix_cache: false,
        ..limits()
    }
}

#[test]
fn decode_is_in_every_step_of_a_long_prefill() {
    for lag in [0, 1] {
        let mut engine = Engine::new(roomy());
        for id in 1..=3 {
            engine.add(ask(id, &text(id as u32, 5), 200));
        }
        engine.turn(lag);
        engine.add(ask(9, &text(9, 5000), 4));
        let mut chunks = Vec::new();
        while engine.tokens(9).is_empty() {
            let step = engine.turn(lag).expect("there is work");
            for (at, id) in (1..=3).enumerate() {
                assert_eq!(step.works[at].seq, SeqId(id), "decode rows come first");
                assert_eq!(step.works[at].rows(), 1);
            }
            chunks.push(rows_of(&step, 9));
        }
        assert_eq!(chunks[..81], [61; 81], "the prefill has all that decode leaves");
    }
}

/// Two sequences go in step with the host and two do not; steps are planned one ahead. Whoever is in step misses the
/// step that is planned while its token is in flight, is fed a token that the host has seen, and nobody else misses any.
#[test]
fn only_sequences_in_step_wait_for_their_tokens() {
    let mut engine = Engine::new(roomy());
    for id in 1..=4 {
        engine.add(ask(id, &text(id as u32, 5), 60));
        if id > 2 {
            engine.scheduler.keep_in_step(SeqId(id));
        }
    }
    engine.plan().expect("the prompts' step");
    for turn in 0..50 {
        let step = engine
            .plan()
            .expect("there is work before the last step's tokens are seen");
        let rows = [1, 2, 3, 4].map(|id| rows_of(&step, id));
        let in_step = turn % 2;
        assert_eq!(
            rows,
            [1, 1, in_step, in_step],
            "step {turn} that is planned ahead"
        );
        for work in &step.works {
            let ahead = work.input == Input::LastSampled;
            assert_eq!(ahead, work.seq <= SeqId(2), "{work:?}");
        }
        engine.commit();
    }
    engine.commit();
    engine.drain(1);
    engine.assert_undisturbed();
    assert_eq!(engine.finished.len(), 4);
}

#[test]
fn a_short_prompt_passes_long_ones() {
    let mut engine = Engine::new(roomy());
    for id in 1..=3 {
        engine.add(ask(id, &text(id as u32, 4000), 1));
    }
    engine.turn(0);
    engine.add(ask(9, &text(9, 60), 1));
    let mut shares = Vec::new();
    while engine.tokens(9).is_empty() {
        let step = engine.turn(0).expect("there is work");
        shares.push((rows_of(&step, 1), rows_of(&step, 9)));
    }
    assert_eq!(
        shares,
        [(32, 32), (32, 28)],
        "half is for the oldest, the short one has the rest"
    );
}

#[test]
fn a_stream_of_short_prompts_does_not_starve_a_long_one() {
    let mut engine = Engine::new(roomy());
    engine.add(ask(1, &text(1, 3200), 1));
    let (mut n_steps, mut next_id) = (0, 1000);
    while engine.tokens(1).is_empty() {
        // More short work than a step can take.
        while engine.scheduler.load().waiting < 4 {
            engine.add(ask(next_id, &text(7, 40), 1));
            next_id += 1;
        }
        engine.turn(0);
        n_steps += 1;
    }
    assert!(
        n_steps <= 3200 / 32,
        "half the budget is its own: {n_steps} steps"
    );
}

#[test]
fn decode_rows_take_turns_when_they_are_more_than_a_step_has() {
    let mut engine = Engine::new(Limits {
        max_step_tokens: 3,
        max_running: 8,
        prefix_cache: false,
        ..limits()
    });
    for id in 1..=8 {
        engine.add(ask(id, &[id as u32], 12));
    }
    let mut least_and_most = (usize::MAX, 0);
    for _ in 0..24 {
        engine.turn(0);
        let counts: Vec<usize> = (1..=8).map(|id| engine.tokens(id).len()).collect();
        least_and_most = (
            *counts.iter().min().expect("eight"),
            *counts.iter().max().expect("eight"),
        );
        assert!(least_and_most.1 - least_and_most.0 <= 1, "{counts:?}");
    }
    assert_eq!(least_and_most, (9, 9));
}

#[test]
fn the_first_come_is_the_first_served() {
    let mut engine = Engine::new(Limits {
        max_running: 1,
        ..roomy()
    });
    for id in 1..=5 {
        engine.add(ask(id, &text(id as u32, 10), 2));
    }
    let mut order = Vec::new();
    for step in engine.drain(0) {
        for work in step.works {
            if !order.contains(&work.seq.0) {
                order.push(work.seq.0);
            }
        }
    }
    assert_eq!(order, [1, 2, 3, 4, 5]);
}
