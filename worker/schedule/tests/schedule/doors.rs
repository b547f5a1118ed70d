//! Coming in and leaving: refusals, stop rules, cancelling in every state, deadlines.

use swallow_schedule::{Ask, Finish, Limits, Micros, Output, Scheduler, SeqId, StepId};

use crate::device::{NOW, ask, limits};
use crate::engine::{Engine, text};

fn refusal(ask: Ask) -> String {
    let mut scheduler = Scheduler::new(Limits {
        max_waiting: 1,
        n_blocks: 8,
        ..limits()
    });
    scheduler
        .add(Ask {
            id: SeqId(1),
            ..crate::device::ask(1, &[1], 1)
        })
        .expect("the first one waits");
    scheduler.add(ask).expect_err("it is refused").to_string()
}

#[test]
fn refusals_say_what_to_change() {
    assert_eq!(
        refusal(ask(2, &[], 1)),
        "the prompt is empty; send at least one token"
    );
    assert_eq!(
        refusal(ask(2, &[1], 0)),
        "max_tokens is 0 without prompt log-probabilities; nothing would be computed"
    );
    assert_eq!(
        refusal(ask(2, &[1; 250], 7)),
        "the prompt has 250 tokens and max_tokens is 7, together more than the model's 256"
    );
    assert_eq!(
        refusal(ask(2, &[1], u32::MAX)),
        "the prompt has 1 tokens and max_tokens is 4294967295, together more than the model's 256"
    );
    assert_eq!(
        refusal(ask(2, &[1; 30], 4)),
        "9 blocks of keys and values are needed, the pool has 8; shorten the request or give the worker more memory"
    );
    assert_eq!(refusal(ask(1, &[1], 1)), "sequence SeqId(1) is alive already");
    assert_eq!(refusal(ask(2, &[1], 1)), "1 sequences wait already");
}

#[test]
fn the_last_token_needs_no_block() {
    // 30 + 3 tokens, of which 32 are fed: exactly 8 blocks.
    let mut engine = Engine::new(Limits {
        n_blocks: 8,
        ..limits()
    });
    engine.add(ask(1, &text(1, 30), 3));
    engine.drain(0);
    assert_eq!(engine.tokens(1).len(), 3);
}

#[test]
#[should_panic(expected = "max_step_tokens is 0")]
fn a_zero_limit_is_the_callers_mistake() {
    Scheduler::new(Limits {
        max_step_tokens: 0,
        ..limits()
    });
}

/// Commits whatever is planned with the given ids until nothing is left; lag 0.
fn finish_with(scheduler: &mut Scheduler, mut ids: impl Iterator<Item = u32>) -> Vec<Output> {
    while let Some(step) = scheduler.step(NOW) {
        let n = step.works.iter().filter(|work| work.sample.is_some()).count();
        let sampled: Vec<u32> = ids.by_ref().take(n).collect();
        scheduler.commit(step.id, &sampled);
    }
    scheduler.take_outputs()
}

fn end_of(ask: Ask) -> (Finish, u32) {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(ask).expect("it fits");
    match finish_with(&mut scheduler, 100..).last() {
        Some(Output::Finished { why, n_tokens, .. }) => (*why, *n_tokens),
        other => panic!("{other:?} is no end"),
    }
}

#[test]
fn the_stop_rule_is_exact() {
    // Generated tokens are 100, 101, 102, ...
    let stop_at = |id: u32| Ask {
        stop_ids: [id].into(),
        ..ask(1, &[1, 2, 3], 5)
    };
    assert_eq!(end_of(ask(1, &[1, 2, 3], 5)), (Finish::Length, 5));
    assert_eq!(end_of(ask(1, &[1, 2, 3], 1)), (Finish::Length, 1));
    assert_eq!(end_of(stop_at(102)), (Finish::Stop, 3));
    assert_eq!(
        end_of(stop_at(104)),
        (Finish::Stop, 5),
        "a stop token at the limit is a stop"
    );
    assert_eq!(
        end_of(stop_at(3)),
        (Finish::Length, 5),
        "stop ids in the prompt mean nothing"
    );
    assert_eq!(
        end_of(Ask {
            min_tokens: 3,
            ..stop_at(102)
        }),
        (Finish::Stop, 3)
    );
    assert_eq!(
        end_of(Ask {
            min_tokens: 4,
            ..stop_at(102)
        }),
        (Finish::Length, 5),
        "it came too early to count"
    );
    assert_eq!(
        end_of(Ask {
            min_tokens: 9,
            ..stop_at(104)
        }),
        (Finish::Length, 5)
    );
}

#[test]
fn a_prompt_alone_is_scored_once() {
    let mut engine = Engine::new(Limits {
        max_step_tokens: 4,
        ..limits()
    });
    engine.add(Ask {
        prompt_logprobs: true,
        ..ask(1, &text(1, 10), 0)
    });
    let steps = engine.drain(1);
    let works: Vec<_> = steps.iter().flat_map(|step| &step.works).collect();
    assert_eq!(
        works.iter().map(|work| work.rows()).collect::<Vec<_>>(),
        [4, 4, 2]
    );
    assert!(
        works
            .iter()
            .all(|work| work.prompt_logprobs && work.sample.is_none())
    );
    assert_eq!(engine.finished[&SeqId(1)], Finish::Length);
    assert!(engine.tokens(1).is_empty());
}

#[test]
fn prompt_logprobs_take_no_prefix_but_leave_one() {
    let mut engine = Engine::new(limits());
    let prompt = text(1, 17);
    for id in 1..=2 {
        engine.add(Ask {
            prompt_logprobs: true,
            ..ask(id, &prompt, 1)
        });
        engine.drain(0);
        assert_eq!(engine.cached_tokens[&SeqId(id)], 0);
    }
    engine.add(ask(3, &prompt, 1));
    engine.drain(0);
    assert_eq!(engine.cached_tokens[&SeqId(3)], 16);
    let load = engine.scheduler.load();
    assert_eq!((load.prefix_query_tokens, load.prefix_hit_tokens), (17, 16));
}

#[test]
fn a_cached_prefix_stands_for_positions_that_nobody_asks_for() {
    let mut engine = Engine::new(limits());
    let prompt = text(1, 17);
    let from = |id, prompt_logprobs_from| Ask {
        prompt_logprobs: true,
        prompt_logprobs_from,
        ..ask(id, &prompt, 0)
    };
    engine.add(from(1, 14));
    let first = engine.drain(0);
    engine.add(from(2, 14));
    let second = engine.drain(0);
    assert_eq!(engine.cached_tokens[&SeqId(2)], 12);
    for (steps, rows) in [(first, [13, 4]), (second, [1, 4])] {
        let works: Vec<_> = steps.iter().flat_map(|step| &step.works).collect();
        let asked: Vec<_> = works
            .iter()
            .map(|work| (work.rows(), work.prompt_logprobs))
            .collect();
        assert_eq!(
            asked,
            [(rows[0], false), (rows[1], true)],
            "row 13 predicts position 14"
        );
    }
}

#[test]
fn cancel_ends_a_sequence_in_any_state() {
    let mut engine = Engine::new(Limits {
        max_running: 1,
        ..limits()
    });
    engine.add(ask(1, &text(1, 60), 8));
    engine.add(ask(2, &text(2, 60), 8));
    engine.plan();
    engine.cancel(2); // Waiting.
    assert_eq!(engine.finished[&SeqId(2)], Finish::Cancelled);
    engine.plan();
    engine.cancel(1); // Running, two steps in flight.
    assert_eq!(engine.finished[&SeqId(1)], Finish::Cancelled);
    engine.cancel(1);
    engine.cancel(77);
    assert!(
        engine.scheduler.load().blocks_held > 0,
        "the device still writes to them"
    );
    assert_eq!(engine.scheduler.load().running, 1, "and to its slot");
    engine.commit();
    assert!(engine.scheduler.load().blocks_held > 0);
    engine.commit();
    assert_eq!(engine.scheduler.load().blocks_held, 0);
    assert!(engine.scheduler.is_idle());
    assert!(engine.tokens(1).is_empty() && engine.tokens(2).is_empty());
}

#[test]
fn an_id_is_free_again_after_its_end() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(ask(1, &[1, 2, 3], 8)).expect("it fits");
    let first = scheduler.step(NOW).expect("a prefill");
    scheduler.cancel(SeqId(1));
    scheduler
        .add(ask(1, &[4, 5], 1))
        .expect("the name is free although a step is in flight");
    let second = scheduler.step(NOW).expect("the new one's prefill");
    assert_ne!(first.works[0].slot, second.works[0].slot);
    scheduler.commit(first.id, &[100]);
    scheduler.commit(second.id, &[200]);
    scheduler.audit();
    let seq = SeqId(1);
    assert_eq!(
        scheduler.take_outputs(),
        [
            Output::Started {
                seq,
                cached_tokens: 0
            },
            Output::Finished {
                seq,
                why: Finish::Cancelled,
                n_tokens: 0
            },
            Output::Started {
                seq,
                cached_tokens: 0
            },
            Output::Token {
                seq,
                index: 0,
                token: 200
            },
            Output::Finished {
                seq,
                why: Finish::Length,
                n_tokens: 1
            },
        ]
    );
}

#[test]
fn deadlines_end_a_sequence_wherever_it_is() {
    let mut scheduler = Scheduler::new(Limits {
        max_running: 1,
        ..limits()
    });
    let late = |id: u64, at: u64| Ask {
        deadline: Some(Micros(at)),
        ..ask(id, &[1, 2, 3], 100)
    };
    scheduler.add(late(1, 300)).expect("it fits");
    scheduler.add(late(2, 200)).expect("it fits");
    assert_eq!(scheduler.next_deadline(), Some(Micros(200)));
    let step = scheduler.step(Micros(199)).expect("the first runs");
    scheduler.commit(step.id, &[100]);
    let in_flight = scheduler.step(Micros(200)).expect("the first runs on");
    assert_eq!(scheduler.next_deadline(), Some(Micros(300)));
    assert_eq!(scheduler.step(Micros(300)), None, "both are too late");
    assert_eq!(scheduler.next_deadline(), None);
    scheduler.commit(in_flight.id, &[101]);
    assert!(scheduler.is_idle());
    let ends: Vec<_> = scheduler
        .take_outputs()
        .into_iter()
        .filter(|output| matches!(output, Output::Finished { .. }))
        .collect();
    assert_eq!(
        ends,
        [
            Output::Finished {
                seq: SeqId(2),
                why: Finish::Deadline,
                n_tokens: 0
            },
            Output::Finished {
                seq: SeqId(1),
                why: Finish::Deadline,
                n_tokens: 1
            },
        ]
    );
}

#[test]
fn a_deadline_that_has_passed_already_costs_nothing() {
    let mut scheduler = Scheduler::new(limits());
    scheduler
        .add(Ask {
            deadline: Some(Micros(5)),
            ..ask(1, &[1], 1)
        })
        .expect("it fits");
    assert_eq!(scheduler.step(Micros(9)), None);
    let why = Finish::Deadline;
    assert_eq!(
        scheduler.take_outputs(),
        [Output::Finished {
            seq: SeqId(1),
            why,
            n_tokens: 0
        }]
    );
}

#[test]
#[should_panic(expected = "commit in the order")]
fn steps_commit_in_order() {
    let mut scheduler = Scheduler::new(limits());
    scheduler.add(ask(1, &[1], 5)).expect("it fits");
    let _first = scheduler.step(NOW).expect("a prefill");
    scheduler.commit(StepId(2), &[1]);
}

#[test]
fn a_full_window_costs_no_step_and_leaves_its_slot_to_others() {
    for lag in [0, 1] {
        let mut engine = Engine::new(Limits {
            max_running: 1,
            ..limits()
        });
        engine.add(ask(1, &[5, 6, 7], 12));
        engine.scheduler.set_window(SeqId(1), 4);
        for _ in 0..20 {
            engine.turn(lag);
        }
        assert_eq!(engine.tokens(1).len(), 4);
        let load = engine.scheduler.load();
        assert_eq!(
            (load.running, load.waiting, load.parked, load.blocks_held),
            (0, 0, 1, 0)
        );
        assert!(!engine.scheduler.is_idle() && engine.scheduler.step(NOW).is_none());
        // The only slot is free.
        engine.add(ask(2, &[8, 9], 5));
        for _ in 0..20 {
            engine.turn(lag);
        }
        assert_eq!(engine.finished[&SeqId(2)], Finish::Length);
        // Smaller than before is no window; a larger one lets it go on where it was.
        engine.scheduler.set_window(SeqId(1), 2);
        assert_eq!(engine.scheduler.load().parked, 1);
        engine.scheduler.set_window(SeqId(1), 100);
        engine.drain(lag);
        assert_eq!(engine.tokens(1).len(), 12);
        engine.assert_undisturbed();
        // One that is parked can be cancelled.
        engine.add(ask(3, &[5, 6, 7], 12));
        engine.scheduler.set_window(SeqId(3), 1);
        for _ in 0..20 {
            engine.turn(lag);
        }
        engine.cancel(3);
        assert!(engine.scheduler.is_idle());
        assert_eq!(engine.finished[&SeqId(3)], Finish::Cancelled);
    }
}
