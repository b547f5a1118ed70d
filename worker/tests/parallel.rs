//! The group as a whole: results that depend on nothing but the sequence, memory that is there once, and failures that
//! name rank and step.

mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use support::{
    Engine, Outcome, Request, checkpoint, fixture,
    random_model::{Traits, llama3_scaling},
    spec, start,
};
use swallow_schedule::{BlockId, CostModel, Input, Micros, Pace, SeqId, Slot, Step, StepId, Work};
use swallow_worker::{
    group::{Cause, Fault, FaultKind, Group, GroupError, GroupSpec, LoadProgress},
    sampling::SamplingParams,
};

const SEED: u64 = 20;

/// Sequences of many lengths, some sampled, some greedy, all scored.
fn mixed(n: usize, n_vocab: u32) -> Vec<Request> {
    println!("seed {SEED}");
    let mut random = fastrand::Rng::with_seed(SEED);
    (0..n)
        .map(|i| {
            let params = SamplingParams {
                temperature: if i % 3 == 0 { 0.0 } else { 0.9 },
                top_p: if i % 2 == 0 { 0.95 } else { 1.0 },
                repetition_penalty: if i % 4 == 1 { 1.2 } else { 1.0 },
                seed: i as u64 / 2, // pairs share a seed and differ by candidate
                candidate: i as u32 % 2,
                logprobs: Some(3),
                prompt_logprobs: (i % 5 == 0).then_some(2),
                ..SamplingParams::greedy()
            };
            let prompt = (0..random.usize(1..150))
                .map(|_| random.u32(0..n_vocab))
                .collect();
            Request {
                prompt,
                max_tokens: random.u32(1..40),
                params,
            }
        })
        .collect()
}

/// Everything about an outcome that must not depend on its company; `PartialEq` on floats is equality of values, and
/// none here is a NaN.
fn essence(outcome: &Outcome) -> Outcome {
    Outcome {
        cached_tokens: 0,
        ..outcome.clone()
    }
}

fn all(outcomes: &[Outcome]) -> Vec<Outcome> {
    outcomes.iter().map(essence).collect()
}

/// Same bits alone and in company, at any chunk size, with or without the prefix cache, at any number of threads, after
/// preemption and after a restart.
#[test]
fn results_do_not_depend_on_the_batch() {
    for tp in [1, 2] {
        let requests = mixed(14, 1536);
        let base = spec(tp);
        let mut engine = Engine::start_with(&fixture("tiny"), base.clone(), false);
        let alone: Vec<Outcome> = requests
            .iter()
            .map(|r| engine.run(std::slice::from_ref(r), 0).remove(0))
            .collect();
        let alone = all(&alone);
        assert_eq!(alone, all(&engine.run(&requests, 0)), "TP {tp}: together");
        for chunk in [7, 64] {
            engine.reset(chunk, false);
            assert_eq!(
                alone,
                all(&engine.run(&requests, 1)),
                "TP {tp}: steps of {chunk} rows"
            );
        }
        engine.reset(512, false);
        engine.scheduler.set_pace(Pace {
            target: Micros(1),
            rows_min: 13,
            costs: CostModel::new(),
        });
        assert_eq!(
            alone,
            all(&engine.run(&requests, 1)),
            "TP {tp}: prompts cut where decoding would wait"
        );
        engine.reset(512, true);
        engine.run(&requests, 0);
        assert_eq!(alone, all(&engine.run(&requests, 3)), "TP {tp}: from the cache");
        drop(engine);
        let threads = GroupSpec {
            threads: 5,
            n_blocks: 14,
            ..base
        };
        let ahead = GroupSpec {
            steps_ahead: 2,
            ..threads.clone()
        };
        let mut engine = Engine::start(&fixture("tiny"), ahead);
        assert_eq!(
            alone,
            all(&engine.run(&requests, 1)),
            "TP {tp}: a step ahead of the host, little memory"
        );
        assert!(engine.scheduler.load().preemptions > 0);
        let mut engine = Engine::start(&fixture("tiny"), threads);
        assert_eq!(
            alone,
            all(&engine.run(&requests, 0)),
            "TP {tp}: 5 threads, little memory"
        );
        assert!(
            engine.scheduler.load().preemptions > 0,
            "so little memory that sequences were preempted"
        );
    }
}

/// Seeds give the same tokens at every degree. Logits differ in last places between degrees, so this holds wherever no
/// draw falls within 1e-6 of a border; these prompts and seeds have no such draw.
#[test]
fn seeds_give_the_same_tokens_at_every_degree() {
    let requests = mixed(12, 1536);
    let tokens = |tp| {
        let outcomes = Engine::start(&fixture("tiny"), spec(tp)).run(&requests, 0);
        outcomes.into_iter().map(|o| o.tokens).collect::<Vec<_>>()
    };
    let one = tokens(1);
    assert_eq!(one, tokens(2));
    assert_eq!(one, tokens(4));
}

/// Each weight is in memory once, norms and shared heads aside, and keys and values take what the blocks need.
#[test]
fn memory_holds_each_slice_once() {
    for (name, degrees) in [("tiny", vec![1, 2, 4]), ("odd", vec![1, 2, 3])] {
        let checkpoint = checkpoint(&fixture(name), 1);
        let config = checkpoint.config().clone();
        // The fixtures are bf16 on disk and fp32 in memory.
        let whole = 2 * checkpoint.weight_bytes();
        for tp in degrees {
            let spec = spec(tp);
            let group = start(&fixture(name), spec.clone());
            let memory = group.memory();
            let norms = (4 * config.hidden_size * (2 * config.n_layers + 1) * (tp - 1)) as u64;
            let kv_per_rank = (config.n_kv_heads / tp).max(1);
            let shared = kv_per_rank * tp - config.n_kv_heads;
            let shared = (4 * 2 * config.n_layers * shared * config.head_dim * config.hidden_size) as u64;
            // Beyond that, outputs are padded to sixteen.
            let matrices = 3 * config.n_layers + 2;
            let padding = (tp * matrices * 16 * 4 * config.intermediate_size.max(config.hidden_size)) as u64;
            let got = memory.total.weights_bytes;
            let least = whole + norms + shared;
            assert!(
                (least..=least + padding).contains(&got),
                "{name}, TP {tp}: {got}, not {least} + {padding}"
            );
            let block = 2 * config.n_layers * kv_per_rank * config.head_dim * 4 * spec.block_tokens;
            assert_eq!(
                memory.total.kv_bytes,
                (block * spec.n_blocks * tp) as u64,
                "{name}, TP {tp}"
            );
            assert_eq!(memory.ranks.len(), tp);
            assert!(memory.ranks.iter().all(|rank| rank.workspace_bytes > 0));
            println!("{name}, TP {tp}: {:?}", memory.total);
        }
    }
}

#[test]
fn loading_reports_every_byte() {
    for tp in [1, 2, 4] {
        let progress = Arc::new(LoadProgress::default());
        let checkpoint = checkpoint(&fixture("tiny"), tp);
        let on_disk = checkpoint.weight_bytes();
        Group::start(checkpoint, spec(tp), progress.clone()).expect("starts");
        let (total, done) = (
            progress.bytes_total.load(Ordering::Relaxed),
            progress.bytes_done.load(Ordering::Relaxed),
        );
        assert_eq!(total, done);
        assert!(
            total >= on_disk && total < on_disk + on_disk / 10,
            "norms alone are read by several ranks"
        );
    }
}

/// Sequences that share a prefix hold its blocks together, and compute it once.
#[test]
fn a_shared_prefix_shares_memory() {
    let prefix: Vec<u32> = (0..320).map(|i| i % 1000).collect();
    let requests: Vec<Request> = (0..8)
        .map(|i| Request::greedy(&[&prefix[..], &[1000 + i, 1001 + i]].concat(), 8))
        .collect();
    let blocks_alone = 330u32.div_ceil(16);
    let mut engine = Engine::start(&fixture("tiny"), spec(2));
    let first = engine.run(&requests[..1], 0);
    engine.most_blocks = 0;
    let outcomes = engine.run(&requests, 0);
    assert_eq!(outcomes[0].tokens, first[0].tokens);
    assert!(
        outcomes.iter().all(|o| o.cached_tokens == 320),
        "20 whole blocks come from the cache"
    );
    assert_eq!(
        engine.most_blocks,
        20 + 8 * (blocks_alone - 20),
        "one copy of the prefix"
    );
}

fn one_row(id: u64, token: u32) -> Step {
    let work = Work {
        seq: SeqId(1),
        slot: Slot(0),
        start: 0,
        input: Input::Tokens(vec![token]),
        blocks: vec![BlockId(0)],
        sample: Some(0),
        prompt_logprobs: false,
    };
    Step {
        id: StepId(id),
        works: vec![work],
    }
}

/// Runs one-row steps until one fails.
fn run_into(fault: Fault, step_timeout: Duration) -> (GroupError, Group) {
    let mut group = start(
        &fixture("tiny"),
        GroupSpec {
            fault: Some(fault),
            step_timeout,
            ..spec(4)
        },
    );
    group.admit(SeqId(1), SamplingParams::greedy(), vec![5].into());
    for step in 1..fault.step {
        group.run(&one_row(step, 5)).expect("nothing has happened yet");
    }
    let error = group.run(&one_row(fault.step, 5)).expect_err("the rank fails");
    assert_eq!(
        group.run(&one_row(fault.step + 1, 5)),
        Err(error.clone()),
        "the group stays unusable"
    );
    (error, group)
}

#[test]
fn a_panic_names_rank_and_step() {
    let fault = Fault {
        rank: 2,
        step: 17,
        kind: FaultKind::Panic,
    };
    let (error, _) = run_into(fault, Duration::from_secs(60));
    assert_eq!(
        error.to_string(),
        "rank 2 panicked (asked to by a test) in step 17"
    );
}

#[test]
fn a_stall_names_rank_and_step() {
    let fault = Fault {
        rank: 1,
        step: 3,
        kind: FaultKind::Stall,
    };
    let started = Instant::now();
    let (error, _) = run_into(fault, Duration::from_millis(1500));
    assert_eq!(error.to_string(), "rank 1 did not finish step 3 within 1.5 s");
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn ranks_that_disagree_are_found_in_the_same_step() {
    let fault = Fault {
        rank: 3,
        step: 4,
        kind: FaultKind::Diverge,
    };
    let (error, _) = run_into(fault, Duration::from_secs(60));
    assert_eq!(
        error.to_string(),
        "rank 3 failed (its residual stream differs from rank 0's) in step 4"
    );
}

#[test]
fn a_step_that_does_not_fit_is_refused_and_harms_nobody() {
    let mut group = start(&fixture("tiny"), spec(2));
    group.admit(SeqId(1), SamplingParams::greedy(), vec![5].into());
    let before = group.run(&one_row(1, 5)).expect("fits");
    let bad = |change: fn(&mut Work)| {
        let mut step = one_row(2, 5);
        change(&mut step.works[0]);
        step
    };
    let cases = [
        (
            bad(|w| w.input = Input::Tokens(vec![1536])),
            "token 1536 is not one of 1536",
        ),
        (
            bad(|w| w.blocks = vec![BlockId(512)]),
            "block 512 is not one of 512",
        ),
        (bad(|w| w.blocks = vec![]), "0 blocks for 1 tokens"),
        (
            bad(|w| w.start = 4096),
            "position 4096 is beyond the model's 4096",
        ),
        (bad(|w| w.slot = Slot(16)), "slot 16 is not one of 16"),
        (bad(|w| w.seq = SeqId(9)), "sequence 9 was not admitted"),
        (bad(|w| w.input = Input::Tokens(vec![])), "no rows"),
        (
            Step {
                works: vec![],
                ..one_row(2, 5)
            },
            "0 works, not 1 to 16",
        ),
        (
            Step {
                works: vec![one_row(2, 5).works[0].clone(); 2],
                ..one_row(2, 5)
            },
            "block 0 is written twice",
        ),
    ];
    for (step, want) in cases {
        let error = group.run(&step).expect_err(want);
        assert!(matches!(error, GroupError::Step(_)), "{error}");
        assert!(error.to_string().contains(want), "{error} does not say: {want}");
    }
    let after = group.run(&one_row(3, 5)).expect("still fits");
    assert_eq!(after.sampled, before.sampled);
}

/// Weights that are not numbers end in an error at start, on whichever rank samples first.
#[test]
fn logits_that_are_not_numbers_stop_the_group() {
    let dir = tempfile::tempdir().expect("a folder");
    Traits::default().write(dir.path());
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("written");
    let end = bytes.len();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    for number in bytes[header..end].chunks_exact_mut(2) {
        number.copy_from_slice(&[0xC0, 0x7F]); // bf16 NaN
    }
    std::fs::write(&path, bytes).expect("writable");
    for tp in [1, 2] {
        let result = Group::start(checkpoint(dir.path(), tp), spec(tp), Arc::default());
        match result.err().expect("must not start") {
            GroupError::Failed {
                rank: 0,
                step: 0,
                cause: Cause::Device(error),
            } => {
                assert!(error.to_string().contains("not finite"), "{error}");
            }
            other => panic!("{other}"),
        }
    }
}

/// Shards of a vocabulary that no degree divides, and heads of keys and values that several ranks share.
#[test]
fn every_degree_agrees_on_awkward_shapes() {
    let traits = Traits {
        seed: 9,
        vocab: 103,
        n_kv_heads: 2,
        inner: 88,
        rope_scaling: Some(llama3_scaling()),
        ..Traits::default()
    };
    let dir = tempfile::tempdir().expect("a folder");
    traits.write(dir.path());
    let mut requests = mixed(6, 103);
    requests.iter_mut().for_each(|r| r.params.temperature = 0.0);
    let one = Engine::start(dir.path(), spec(1)).run(&requests, 0);
    for tp in [2, 4, 8] {
        let other = Engine::start(dir.path(), spec(tp)).run(&requests, 0);
        for (a, b) in one.iter().zip(&other) {
            assert_eq!(a.tokens, b.tokens, "TP {tp}");
            let scores = |o: &Outcome| {
                o.prompt_scores
                    .iter()
                    .chain(&o.scores)
                    .cloned()
                    .collect::<Vec<_>>()
            };
            for (a, b) in scores(a).iter().zip(scores(b)) {
                assert!(
                    (a.logprob - b.logprob).abs() < 1e-3,
                    "TP {tp}: {} and {}",
                    a.logprob,
                    b.logprob
                );
            }
        }
    }
}

#[test]
fn impossible_groups_are_refused() {
    let refuse = |spec: GroupSpec, want: &str| {
        let error = Group::start(checkpoint(&fixture("tiny"), 1), spec, Arc::default())
            .err()
            .expect(want);
        assert!(error.to_string().contains(want), "{error}");
    };
    refuse(
        GroupSpec {
            n_blocks: 0,
            ..spec(1)
        },
        "n_blocks is 0",
    );
    refuse(
        GroupSpec {
            n_blocks: 1 << 40,
            ..spec(1)
        },
        "more than 2^32 tokens",
    );
    assert!(Group::start(checkpoint(&fixture("tiny"), 1), spec(3), Arc::default()).is_err());
}
