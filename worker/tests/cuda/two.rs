//! Groups of two GPUs, where there are two and NCCL: within the same bounds of transformers as one GPU, with equal bits however
//! steps are launched. That all ranks hold the same residual stream the group checks in every step.

use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};
use swallow_worker::{device::cuda, sampling::SamplingParams};

use crate::{
    Request, dummy, gpus, ids, large_layers, on, scored, start,
    support::{Engine, fixture},
    teacher_forced,
};

const RANKS: usize = 2;

/// Whether this machine has what a group of two needs; what is left out and why is printed if not.
fn there_are_two(check: &str) -> bool {
    match cuda::survey(RANKS) {
        Ok(_) => true,
        Err(why) => {
            println!("{check}: left out, {why}");
            false
        }
    }
}

#[test]
#[ignore = "needs two GPUs; tests/gpu runs it"]
fn goldens_of_transformers_on_two() {
    if !there_are_two("goldens of transformers on two GPUs") {
        return;
    }
    let mut good = teacher_forced("tiny", &fixture("tiny"), RANKS);
    // Shards of the vocabulary of different sizes, and one head of keys for both ranks.
    good &= teacher_forced("odd", &fixture("odd"), RANKS);
    assert!(good);
}

#[test]
#[ignore = "needs two GPUs; tests/gpu runs it"]
fn a_model_of_large_layers_on_two() {
    if there_are_two("large layers on two GPUs") {
        large_layers(RANKS);
    }
}

/// Steps on, between and above recorded sizes; the same steps again.
#[test]
#[ignore = "needs two GPUs; tests/gpu runs it"]
fn recorded_launched_and_repeated_steps_are_equal_on_two() {
    if !there_are_two("recorded and launched steps on two GPUs") {
        return;
    }
    let run = |record: bool| {
        let mut spec = on(RANKS);
        spec.max_running = 40;
        spec.gpu.record = record;
        let mut engine = Engine::of(start(dummy(8, 2, 128), spec.clone()), spec, false);
        let mut batch = |n: u64| {
            let requests: Vec<Request> = (0..n)
                .map(|i| Request {
                    prompt: ids(1000 * n + i, 3 + 83 * i as usize % 1500, 2048),
                    max_tokens: 12,
                    params: SamplingParams {
                        logprobs: (i % 2 == 0).then_some(3),
                        ..SamplingParams::greedy()
                    },
                })
                .collect();
            let first = engine.run(&requests, 0);
            for _ in 1..5 {
                assert_eq!(engine.run(&requests, 0), first, "{n} sequences again");
            }
            first
        };
        [1, 3, 13, 33, 40].map(&mut batch)
    };
    assert_eq!(run(true), run(false));
    println!(
        "{}: recorded, launched and repeated steps have equal bits",
        gpus(RANKS)
    );
}

/// The time of exchanges is told of steps that are launched kernel by kernel, and of no others.
#[test]
#[ignore = "needs two GPUs; tests/gpu runs it"]
fn exchanges_of_launched_steps_are_timed() {
    if !there_are_two("the time of exchanges on two GPUs") {
        return;
    }
    let mut group = start(dummy(8, 2, 128), on(RANKS));
    let request = scored(ids(1, 100, 2048));
    group.admit(SeqId(1), SamplingParams::greedy(), request.prompt.clone().into());
    let mut run = |id: u64, start: u32, input: Input, sample: u32| {
        let rows = match &input {
            Input::Tokens(tokens) => tokens.len() as u32,
            Input::LastSampled => 1,
        };
        let work = Work {
            seq: SeqId(1),
            slot: Slot(0),
            start,
            input,
            blocks: (0..(start + rows).div_ceil(16)).map(BlockId).collect(),
            sample: Some(sample),
            prompt_logprobs: false,
        };
        let step = Step {
            id: StepId(id),
            works: vec![work],
        };
        group.run(&step).unwrap_or_else(|error| panic!("{error}"))
    };
    let launched = run(1, 0, Input::Tokens(request.prompt), 0);
    let exchanged = launched
        .exchanged
        .expect("a step of several rows is launched kernel by kernel");
    assert!(!launched.replayed && exchanged.as_secs_f64() > 0.0 && exchanged.as_secs_f64() < 1.0);
    let recorded = run(2, 100, Input::LastSampled, 1);
    assert_eq!((recorded.replayed, recorded.exchanged), (true, None));
    println!(
        "{}: the exchanges of a step of 100 rows took {exchanged:?}",
        gpus(RANKS)
    );
}
