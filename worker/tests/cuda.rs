//! The CUDA device against references, on a machine that has a GPU: `tests/gpu` runs these, and prints what they print.
//!
//! The references are transformers in fp32 (the committed goldens) and the CPU device, which is held to those goldens
//! itself. A difference in bf16 is measured against the difference that transformers has in bf16, where a file of it
//! is given; bounds without such a file are stated beside each check. Two checks break the computation on purpose, so
//! that a bound that would let everything pass is seen.

#[path = "cuda/draws.rs"]
mod draws;
#[path = "cuda/grammars.rs"]
mod grammars;
mod support;
#[path = "cuda/two.rs"]
mod two;

use std::{path::PathBuf, sync::Arc};

use serde::Deserialize;
use support::{
    Engine, Outcome, Request, fixture,
    goldens::{self, Goldens},
};
use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};
use swallow_worker::{
    checkpoint::LlamaConfig,
    device::{
        AHEAD_MAX,
        cuda::{GroupId, Options, Products, check_products},
    },
    group::{Group, GroupSpec, LoadProgress, Machine},
    model::{Dummy, Weights},
    sampling::SamplingParams,
};

/// How far |ours - fp32| may exceed |transformers in bf16 - fp32|.
const TRIANGLE: f64 = 1.15;
/// Bounds of |ours - fp32| without a file of transformers in bf16: mean and 99th percentile of log-probabilities.
const MEAN: f64 = 0.03;
const P99: f64 = 0.15;

/// Standard deviation of attention's scores in models of formula weights.
const QUERY_GAIN: f32 = 4.0;

/// Bounds for such models, whose sharp attention makes more of bf16's rounding; what a wrong position does is ten times
/// as much, as the last check shows.
const SHARP: (f64, f64) = (0.08, 0.35);

fn spec(machine: Machine) -> GroupSpec {
    GroupSpec {
        machine,
        threads: std::thread::available_parallelism().map_or(2, usize::from),
        n_blocks: 2048,
        max_step_tokens: 2048,
        max_model_len: 16_384,
        steps_ahead: match machine {
            Machine::Cpu => 1,
            Machine::Cuda => AHEAD_MAX,
        },
        gpu: Options {
            portable: std::env::var_os("SWALLOW_GPU_PORTABLE").is_some(),
            products: Products::First,
            ..Options::default()
        },
        ..support::spec(1)
    }
}

/// A group of so many GPUs.
fn on(ranks: usize) -> GroupSpec {
    GroupSpec {
        tensor_parallel: ranks,
        ..spec(Machine::Cuda)
    }
}

/// A model of formula weights whose attention looks at few positions.
fn dummy(heads: usize, kv_heads: usize, dim: usize) -> Weights {
    dummy_of(heads, kv_heads, dim, 2048)
}

fn dummy_of(heads: usize, kv_heads: usize, dim: usize, vocab: usize) -> Weights {
    let text = format!(
        r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 512,
            "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "head_dim": {dim}, "vocab_size": {vocab},
            "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": {{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048}}, "tie_word_embeddings": false}}"#
    );
    let config = LlamaConfig::parse(std::path::Path::new("config.json"), text.as_bytes()).expect("a Llama");
    Weights::Dummy(Arc::new(Dummy {
        config,
        query_gain: QUERY_GAIN,
    }))
}

fn start(weights: impl Into<Weights>, spec: GroupSpec) -> Group {
    Group::start(weights, spec, Arc::new(LoadProgress::default())).unwrap_or_else(|error| panic!("{error}"))
}

/// Pseudo-random ids.
fn ids(seed: u64, n: usize, vocab: u32) -> Vec<u32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| random.u32(0..vocab)).collect()
}

/// A request that scores its prompt and generates one token.
fn scored(prompt: Vec<u32>) -> Request {
    Request {
        prompt,
        max_tokens: 1,
        params: SamplingParams {
            prompt_logprobs: Some(0),
            ..SamplingParams::greedy()
        },
    }
}

fn logprobs(outcome: &Outcome) -> Vec<f64> {
    outcome
        .prompt_scores
        .iter()
        .map(|score| f64::from(score.logprob))
        .collect()
}

/// Mean and 99th percentile of absolute differences.
fn apart(got: &[f64], want: &[f64]) -> (f64, f64) {
    assert_eq!(got.len(), want.len());
    assert!(!got.is_empty());
    let mut apart: Vec<f64> = got
        .iter()
        .zip(want)
        .map(|(got, want)| (got - want).abs())
        .collect();
    assert!(apart.iter().all(|x| x.is_finite()));
    apart.sort_unstable_by(f64::total_cmp);
    let mean = apart.iter().sum::<f64>() / apart.len() as f64;
    (mean, apart[(apart.len() * 99).div_ceil(100) - 1])
}

/// Prints a line of the table; whether the bound holds.
fn row(what: &str, (mean, p99): (f64, f64), (mean_bound, p99_bound): (f64, f64)) -> bool {
    let good = mean <= mean_bound && p99 <= p99_bound;
    let verdict = if good { "ok" } else { "FAILED" };
    println!("{what:<58} mean {mean:.5} <= {mean_bound:.5}   p99 {p99:.5} <= {p99_bound:.5}   {verdict}");
    good
}

/// What transformers gives in bf16 on the goldens' sequences, one list a prompt; see `tests/gpu_reference.py`.
#[derive(Deserialize)]
struct Bf16(Vec<Vec<f64>>);

fn transformers_bf16(name: &str) -> Option<Bf16> {
    let folder = PathBuf::from(std::env::var_os("SWALLOW_GPU_REFERENCE")?);
    let path = folder.join(format!("{name}.json"));
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Some(serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

fn teacher_forced(name: &str, folder: &std::path::Path, ranks: usize) -> bool {
    let goldens: Goldens = goldens::read(name);
    goldens.check_weights(folder);
    let (requests, want): (Vec<Request>, Vec<Vec<f64>>) = goldens
        .prompts
        .iter()
        .map(|golden| {
            let prompt = golden
                .prompt_ids
                .iter()
                .chain(&golden.output_ids)
                .copied()
                .collect();
            let known = golden.prompt_logprobs[1..].iter().flatten();
            (
                scored(prompt),
                known.chain(&golden.output_logprobs).copied().collect(),
            )
        })
        .unzip();
    let mut engine = Engine::start_with(folder, on(ranks), false);
    let got: Vec<Vec<f64>> = engine.run(&requests, 0).iter().map(logprobs).collect();
    let (got, want) = (got.concat(), want.concat());
    let bounds = transformers_bf16(name).map(|Bf16(lists)| {
        let theirs = apart(&lists.concat(), &want);
        (TRIANGLE * theirs.0, TRIANGLE * theirs.1)
    });
    let against = if bounds.is_some() {
        "1.15 x transformers in bf16"
    } else {
        "stated bound"
    };
    row(
        &format!(
            "{name}, {}: {} log-probabilities, {against}",
            gpus(ranks),
            got.len()
        ),
        apart(&got, &want),
        bounds.unwrap_or((MEAN, P99)),
    )
}

/// In words.
fn gpus(n: usize) -> String {
    if n == 1 {
        "a GPU".into()
    } else {
        format!("{n} GPUs")
    }
}

#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn goldens_of_transformers() {
    let mut good = teacher_forced("tiny", &fixture("tiny"), 1);
    good &= teacher_forced("odd", &fixture("odd"), 1);
    if let Some(folder) = goldens::cached("smollm2") {
        good &= teacher_forced("smollm2", &folder, 1);
    } else {
        println!("smollm2: not in the cache of models, left out");
    }
    assert!(good);
}

/// Texts of a model as large as Llama 3 8B in every layer, and what transformers makes of them.
#[derive(Deserialize)]
struct Large {
    texts: Vec<Vec<u32>>,
    bf16: Vec<Vec<f64>>,
    fp32: Vec<Vec<f64>>,
}

#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn a_model_of_large_layers() {
    large_layers(1);
}

/// However prompts are cut into steps, and beyond the positions that rotary frequencies were made for.
fn large_layers(ranks: usize) {
    let Some(folder) = std::env::var_os("SWALLOW_GPU_REFERENCE").map(PathBuf::from) else {
        println!("transformers' texts of a model of large layers are not here, left out");
        return;
    };
    let text = std::fs::read(folder.join("large.json")).expect("tests/gpu_reference.py wrote it");
    let large: Large = serde_json::from_slice(&text).expect("tests/gpu_reference.py wrote it");
    let want = large.fp32.concat();
    let theirs = apart(&large.bf16.concat(), &want);
    let bounds = (TRIANGLE * theirs.0, TRIANGLE * theirs.1);
    let requests: Vec<Request> = large.texts.into_iter().map(scored).collect();
    let spec = GroupSpec {
        max_step_tokens: 16_384,
        ..on(ranks)
    };
    let mut engine = Engine::start_with(&folder.join("large"), spec, false);
    let mut good = true;
    for chunk in [16_384, 1024, 256, 128] {
        engine.reset(chunk, false);
        let got: Vec<Vec<f64>> = engine.run(&requests, 0).iter().map(logprobs).collect();
        let what = format!("large layers, {}, steps of {chunk}, 1.15 x bf16", gpus(ranks));
        good &= row(&what, apart(&got.concat(), &want), bounds);
        // The longest alone, so that its far positions are not outnumbered.
        let (far, of) = (got.last().expect("several"), large.fp32.last().expect("several"));
        let theirs = apart(&large.bf16.last().expect("several")[8192..], &of[8192..]);
        let what = format!("large layers, {}, steps of {chunk}, beyond 8,192", gpus(ranks));
        let bounds = (TRIANGLE * theirs.0, TRIANGLE * theirs.1);
        good &= row(&what, apart(&far[8192..], &of[8192..]), bounds);
    }
    assert!(good);
}

/// The shapes whose kernels differ: head sizes, and query heads that share keys.
const SHAPES: [(usize, usize, usize); 6] = [
    (4, 1, 128),
    (8, 1, 128),
    (8, 2, 128),
    (8, 8, 64),
    (9, 3, 64),
    (6, 2, 80),
];

#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn the_cpu_device() {
    let mut good = true;
    for (heads, kv_heads, dim) in SHAPES {
        let requests: Vec<Request> = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 700, 3000]
            .iter()
            .map(|&n| scored(ids(n as u64, n, 2048)))
            .collect();
        let run = |machine| -> Vec<f64> {
            let mut fastest = spec(machine);
            fastest.gpu.products = Products::Measured;
            let group = start(dummy(heads, kv_heads, dim), fastest);
            let mut engine = Engine::of(group, spec(machine), false);
            engine.run(&requests, 1).iter().flat_map(logprobs).collect()
        };
        let what = format!("{heads} heads, {kv_heads} of keys, {dim} numbers: GPU and CPU");
        good &= row(&what, apart(&run(Machine::Cuda), &run(Machine::Cpu)), SHARP);
    }
    assert!(good);
}

/// Greedy generation, scored: decode steps of many sequences beside prefill chunks of others.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn decoding_follows_the_scores_of_the_same_text() {
    let mut good = true;
    for (heads, kv_heads, dim) in SHAPES {
        let group = start(dummy(heads, kv_heads, dim), spec(Machine::Cuda));
        let mut engine = Engine::of(group, spec(Machine::Cuda), false);
        let requests: Vec<Request> = (0..12)
            .map(|i| Request {
                prompt: ids(i, 5 + 97 * i as usize, 2048),
                max_tokens: 40,
                params: SamplingParams {
                    logprobs: Some(0),
                    ..SamplingParams::greedy()
                },
            })
            .collect();
        let outcomes = engine.run(&requests, 2);
        let again: Vec<Request> = requests
            .iter()
            .zip(&outcomes)
            .map(|(request, outcome)| scored([&request.prompt[..], &outcome.tokens].concat()))
            .collect();
        let forced = engine.run(&again, 0);
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for ((request, outcome), forced) in requests.iter().zip(&outcomes).zip(&forced) {
            got.extend(outcome.scores.iter().map(|score| f64::from(score.logprob)));
            want.extend(&logprobs(forced)[request.prompt.len() - 1..]);
        }
        let what = format!("{heads} heads, {kv_heads} of keys, {dim} numbers: decoded and scored");
        good &= row(&what, apart(&got, &want), (MEAN, P99));
    }
    assert!(good);
}

#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn chunks_prefixes_and_preemption() {
    let spec = spec(Machine::Cuda);
    let group = start(dummy(4, 1, 128), spec.clone());
    let mut engine = Engine::of(group, spec.clone(), false);
    let prompt = ids(7, 2000, 2048);
    let whole = logprobs(&engine.run(&[scored(prompt.clone())], 0)[0]);
    let mut good = true;
    for chunk in [1024, 256, 128, 17] {
        engine.reset(chunk, false);
        let got = logprobs(&engine.run(&[scored(prompt.clone())], 0)[0]);
        good &= row(
            &format!("chunks of {chunk} and whole"),
            apart(&got, &whole),
            (MEAN, P99),
        );
    }
    engine.reset(2048, false);
    let others: Vec<Request> = (1..8)
        .map(|i| scored(ids(100 + i, 90 * i as usize, 2048)))
        .collect();
    let mixed = [&[scored(prompt.clone())][..], &others].concat();
    let got = logprobs(&engine.run(&mixed, 1)[0]);
    good &= row("in steps with others and alone", apart(&got, &whole), (MEAN, P99));

    // A prefix that is there already: the scores of what is generated after it.
    let generate = |prompt: &[u32]| Request {
        prompt: prompt.to_vec(),
        max_tokens: 30,
        params: SamplingParams {
            logprobs: Some(0),
            ..SamplingParams::greedy()
        },
    };
    let scores = |outcome: &Outcome| -> Vec<f64> {
        outcome
            .scores
            .iter()
            .map(|score| f64::from(score.logprob))
            .collect()
    };
    engine.reset(2048, true);
    let cold = engine.run(&[generate(&prompt)], 0).remove(0);
    let warm = engine.run(&[generate(&prompt)], 0).remove(0);
    assert!(warm.cached_tokens >= 1900, "{} cached", warm.cached_tokens);
    good &= compare_generated("a prefix that is there and a cold one", &warm, &cold, &scores);

    // Too few blocks for all: some are preempted and computed again.
    let tight = GroupSpec {
        n_blocks: 150,
        ..spec
    };
    let mut engine = Engine::of(start(dummy(4, 1, 128), tight.clone()), tight, false);
    let requests: Vec<Request> = (0..6).map(|i| generate(&ids(300 + i, 380, 2048))).collect();
    let crowded = engine.run(&requests, 0);
    for (request, crowded) in requests.iter().zip(&crowded) {
        let alone = engine.run(std::slice::from_ref(request), 0).remove(0);
        good &= compare_generated("crowded and alone", crowded, &alone, &scores);
    }
    assert!(good);
}

/// A block is a piece of memory and nothing else: its size changes no bit.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn blocks_of_any_size_give_the_same_bits() {
    for (heads, kv_heads, dim) in [(8, 2, 128), (9, 3, 64), (6, 2, 80)] {
        let run = |block_tokens: usize| -> Vec<f64> {
            let spec = GroupSpec {
                block_tokens,
                n_blocks: 2048 * 16 / block_tokens,
                ..spec(Machine::Cuda)
            };
            let mut engine = Engine::of(start(dummy(heads, kv_heads, dim), spec.clone()), spec, false);
            let requests: Vec<Request> = [5, 130, 900, 1300]
                .iter()
                .map(|&n| scored(ids(n as u64, n, 2048)))
                .collect();
            engine.run(&requests, 1).iter().flat_map(logprobs).collect()
        };
        let of_16 = run(16);
        for block_tokens in [8, 64, 256] {
            assert_eq!(
                run(block_tokens),
                of_16,
                "blocks of {block_tokens}, {dim} numbers"
            );
        }
        println!(
            "{heads} heads, {kv_heads} of keys, {dim} numbers: blocks of 8, 16, 64 and 256 tokens give equal bits"
        );
    }
}

/// Compares up to where near-equal tokens send the two different ways.
fn compare_generated(
    what: &str,
    got: &Outcome,
    want: &Outcome,
    scores: &impl Fn(&Outcome) -> Vec<f64>,
) -> bool {
    let same = got
        .tokens
        .iter()
        .zip(&want.tokens)
        .take_while(|(a, b)| a == b)
        .count();
    assert!(same > 0, "{what}: the first token differs");
    row(
        &format!("{what}: {same} of {} tokens", want.tokens.len()),
        apart(&scores(got)[..same], &scores(want)[..same]),
        (MEAN, P99),
    )
}

/// A recorded step and one that is launched kernel by kernel give the same bits, at sizes on, below and above those that
/// are recorded.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn recorded_and_launched_steps_are_equal() {
    for (heads, kv_heads, dim) in [(8, 1, 128), (9, 3, 64), (6, 2, 80)] {
        let run = |record| {
            let mut spec = GroupSpec {
                max_running: 40,
                ..spec(Machine::Cuda)
            };
            spec.gpu.record = record;
            let group = start(dummy(heads, kv_heads, dim), spec.clone());
            let mut engine = Engine::of(group, spec, false);
            let mut outcomes = Vec::new();
            for n in [1, 2, 3, 5, 12, 13, 33, 40] {
                let requests: Vec<Request> = (0..n)
                    .map(|i| Request {
                        prompt: ids(1000 * n + i, 3 + 83 * i as usize % 1500, 2048),
                        max_tokens: 12,
                        params: SamplingParams {
                            // Half of them come to the host as logits, the others as tokens alone.
                            logprobs: (i % 2 == 0).then_some(3),
                            ..SamplingParams::greedy()
                        },
                    })
                    .collect();
                outcomes.push(engine.run(&requests, 0));
            }
            outcomes
        };
        assert_eq!(
            run(true),
            run(false),
            "{heads} heads, {kv_heads} of keys, {dim} numbers"
        );
        println!(
            "{heads} heads, {kv_heads} of keys, {dim} numbers: recorded and launched steps have equal bits"
        );
    }
}

/// The same steps give the same bits.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn a_hundred_runs_of_one_batch_are_equal() {
    let group = start(dummy(8, 1, 128), spec(Machine::Cuda));
    let mut engine = Engine::of(group, spec(Machine::Cuda), false);
    let requests: Vec<Request> = (0..8)
        .map(|i| scored(ids(i, 10 + 61 * i as usize, 2048)))
        .collect();
    let first = engine.run(&requests, 0);
    for _ in 1..100 {
        assert_eq!(engine.run(&requests, 0), first);
    }
    println!("100 runs of a batch of 8: equal bits");
}

/// Log-probabilities of the second half of a text, computed in two steps; the second half is put `shift` positions further
/// on, and the second step's block table goes through `change` first.
fn in_two_steps(
    group: &mut Group,
    prompt: &[u32],
    shift: usize,
    change: impl FnOnce(&mut Vec<BlockId>),
) -> Vec<f64> {
    let (seq, half) = (SeqId(1), prompt.len() / 2);
    let params = SamplingParams {
        prompt_logprobs: Some(0),
        ..SamplingParams::greedy()
    };
    let spread = [&prompt[..half], &vec![0; shift][..], &prompt[half..]].concat();
    group.admit(seq, params, spread.clone().into());
    let blocks = |n: usize| (0..n.div_ceil(16) as u32).map(BlockId).collect::<Vec<_>>();
    let mut later = blocks(spread.len());
    change(&mut later);
    let mut run = |id, start: usize, end: usize, blocks| {
        let work = Work {
            seq,
            slot: Slot(0),
            start: start as u32,
            input: Input::Tokens(spread[start..end].to_vec()),
            blocks,
            sample: None,
            prompt_logprobs: true,
        };
        let step = Step {
            id: StepId(id),
            works: vec![work],
        };
        group
            .run(&step)
            .unwrap_or_else(|error| panic!("{error}"))
            .prompt_scores
    };
    run(1, 0, half, blocks(half));
    let scores = run(2, half + shift, spread.len(), later);
    group.retire(seq);
    scores[0]
        .scores
        .iter()
        .map(|score| f64::from(score.logprob))
        .collect()
}

/// What a group of several GPUs needs is found and new enough, also where there is one GPU.
#[test]
#[ignore = "needs NCCL; tests/gpu runs it"]
fn ranks_could_meet() {
    if let Err(error) = GroupId::new() {
        panic!("{error}");
    }
    println!("NCCL opened");
}

/// The checks have teeth: each of these computations is a little wrong, and none is within the bounds.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn wrong_computations_are_far_out_of_bounds() {
    let mut group = start(dummy(4, 1, 128), spec(Machine::Cuda));
    let prompt = ids(11, 256, 2048);
    let right = in_two_steps(&mut group, &prompt, 0, |_| {});
    // Keys carry their positions, so the order of blocks that are seen whole does not matter, but what they hold does.
    let mistaken = in_two_steps(&mut group, &prompt, 0, |blocks| blocks[3] = blocks[2]);
    let mut shorter = prompt.clone();
    shorter.remove(20);
    let dropped = in_two_steps(&mut group, &shorter, 0, |_| {});
    let shifted = in_two_steps(&mut group, &prompt, 1, |_| {});
    let tail = |x: &[f64]| x[x.len() - 100..].to_vec();
    for (what, wrong) in [
        ("one block taken for another", mistaken),
        ("one position dropped", dropped),
        ("positions shifted by one", shifted),
    ] {
        let apart = apart(&tail(&wrong), &tail(&right));
        println!("{what}: mean {:.3}, p99 {:.3}", apart.0, apart.1);
        assert!(
            apart.0 > 3.0 * SHARP.0 && apart.1 > 3.0 * SHARP.1,
            "{what} is not seen"
        );
    }
}

/// Products of our own give what the library gives, and write nothing else: matrices of real models and small ones.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn products_of_our_own() {
    let sizes = [1, 2, 3, 4, 7, 8, 9, 12, 15, 16];
    let matrices = [
        (16, 2048),
        (528, 4096),
        (4096, 4096),
        (6144, 4096),
        (4096, 14_336),
        (16_032, 2048),
    ];
    let shapes: Vec<_> = sizes
        .iter()
        .flat_map(|&m| matrices.iter().map(move |&(n, k)| (m, n, k)))
        .collect();
    let checks = check_products(&shapes).unwrap_or_else(|error| panic!("{error}"));
    // Sums in another order differ in the last bits; in bf16 by one of its steps, of results several times the mean.
    let good = |what: &str, apart: f64| apart <= if what.contains("F32") { 1e-4 } else { 0.04 };
    let bad: Vec<_> = checks
        .iter()
        .filter(|check| !check.whole || !good(&check.what, check.apart))
        .collect();
    let worst = checks.iter().map(|check| check.apart).fold(0.0, f64::max);
    println!(
        "{} products of our own: at most {worst:.5} from the library",
        checks.len()
    );
    assert!(
        !checks.is_empty() && bad.is_empty(),
        "{} are wrong: {:#?}",
        bad.len(),
        &bad[..bad.len().min(10)]
    );
}
