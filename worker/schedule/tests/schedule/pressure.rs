//! When memory runs out: newest first, nothing lost, and everybody finishes.

use swallow_schedule::{Finish, Limits};

use crate::device::{ask, limits};
use crate::engine::{Engine, rows_of, text};

/// Pools from "one sequence at a time" to "almost enough", each with more sequences than fit.
#[test]
fn everybody_finishes_however_small_the_pool() {
    for lag in [0, 1] {
        for prefix_cache in [false, true] {
            for n_blocks in [12, 13, 17, 24, 40, 90] {
                let limits = Limits {
                    n_blocks,
                    prefix_cache,
                    max_running: 16,
                    ..limits()
                };
                let mut engine = Engine::new(limits);
                for id in 1..=16 {
                    // 8 + 40 tokens fill twelve blocks.
                    engine.add(ask(id, &text(id as u32, 8), 40));
                }
                let steps = engine.drain(lag);
                engine.assert_undisturbed();
                assert_eq!(engine.finished.len(), 16);
                assert!(engine.finished.values().all(|&why| why == Finish::Length));
                // Recomputing is bounded: the oldest one always moves, so there are at most that many steps a token.
                assert!(steps.len() <= 16 * 50 * 2, "{} steps", steps.len());
            }
        }
    }
}

#[test]
fn the_newest_is_preempted_and_the_oldest_never() {
    for lag in [0, 1] {
        let mut engine = Engine::new(Limits {
            n_blocks: 20,
            prefix_cache: false,
            ..limits()
        });
        for id in 1..=4 {
            engine.add(ask(id, &text(id as u32, 8), 40));
        }
        let mut restarts = [0; 5];
        let mut started = [false; 5];
        for step in engine.drain(lag) {
            for work in step.works {
                let id = work.seq.0 as usize;
                if work.start == 0 && std::mem::replace(&mut started[id], true) {
                    restarts[id] += 1;
                }
            }
        }
        engine.assert_undisturbed();
        assert_eq!(restarts[1], 0, "the oldest is never the victim");
        assert!(restarts[4] >= restarts[2], "{restarts:?}");
        assert!(engine.scheduler.load().preemptions > 0);
    }
}

/// A long prompt in chunks is always in flight; with lag it must pause before it can make way.
#[test]
fn a_prefill_makes_way_for_an_older_decode() {
    for lag in [0, 1] {
        let limits = Limits {
            block_tokens: 2,
            n_blocks: 16,
            max_step_tokens: 3,
            prefix_cache: false,
            ..limits()
        };
        let mut engine = Engine::new(limits);
        engine.add(ask(1, &text(1, 2), 20));
        engine.add(ask(2, &text(2, 22), 2));
        let mut idle_steps = 0;
        while engine.tokens(1).len() < 19 {
            let step = engine.turn(lag);
            idle_steps += u32::from(step.is_none_or(|step| rows_of(&step, 1) == 0));
        }
        assert!(engine.tokens(2).is_empty() && engine.scheduler.load().preemptions == 1);
        assert!(idle_steps <= 1, "the older one paused for {idle_steps} steps");
        engine.drain(lag);
        engine.assert_undisturbed();
    }
}

/// Without the reserve for growth, sequences come in to be thrown out again: 67 preemptions here instead of 20.
#[test]
fn admission_leaves_room_to_grow() {
    let mut engine = Engine::new(Limits {
        n_blocks: 32,
        prefix_cache: false,
        max_running: 32,
        ..limits()
    });
    for id in 1..=32 {
        engine.add(ask(id, &text(id as u32, 4), 24));
    }
    engine.drain(0);
    engine.assert_undisturbed();
    let preemptions = engine.scheduler.load().preemptions;
    assert!(preemptions <= 32, "{preemptions} preemptions for 32 sequences");
}

/// A sequence that needs the whole pool runs, and what was cached makes way.
#[test]
fn the_largest_sequence_runs_alone() {
    let mut engine = Engine::new(Limits {
        n_blocks: 16,
        ..limits()
    });
    engine.add(ask(1, &text(1, 60), 5));
    engine.drain(0);
    engine.add(ask(2, &text(2, 30), 35));
    engine.add(ask(3, &text(3, 64), 1));
    engine.add(ask(4, &text(4, 1), 64));
    engine.drain(1);
    engine.assert_undisturbed();
    assert_eq!(engine.finished.len(), 4);
}
