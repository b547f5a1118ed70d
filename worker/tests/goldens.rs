//! The forward pass against two references: transformers in fp32 on the committed models, and candle-transformers on
//! random ones; at every degree of tensor parallelism, chunk size and batch mix, with and without a prefix hit.

mod support;

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use support::{
    Engine, Outcome, Request, fixture,
    goldens::{self, Golden, Goldens},
    random_model::{Traits, llama3_scaling},
    spec,
};
use swallow_schedule::Finish;
use swallow_worker::sampling::SamplingParams;

/// Largest difference of a log-probability, and of the two likeliest tokens for their order to be certain.
const TOLERANCE: f64 = 1e-3;

fn requests(goldens: &Goldens, prompt_logprobs: bool) -> Vec<Request> {
    let request = |golden: &Golden| Request {
        prompt: golden.prompt_ids.clone(),
        max_tokens: golden.output_ids.len().max(1) as u32,
        params: SamplingParams {
            logprobs: Some(5),
            prompt_logprobs: prompt_logprobs.then_some(0),
            stop_ids: goldens.stop_ids.clone().into(),
            ..SamplingParams::greedy()
        },
    };
    goldens.prompts.iter().map(request).collect()
}

/// Compares one outcome; returns the largest difference of a log-probability.
fn compare(golden: &Golden, outcome: &Outcome, context: &str) -> f64 {
    let name = format!("{:?} at {context}", golden.name);
    let mut worst: f64 = 0.0;
    let mut close = |got: f32, want: f64, what: &str| {
        let difference = (f64::from(got) - want).abs();
        assert!(difference <= TOLERANCE, "{name}: {what}: {got} is not {want}");
        worst = worst.max(difference);
    };
    if !outcome.prompt_scores.is_empty() {
        assert_eq!(
            outcome.prompt_scores.len() + 1,
            golden.prompt_logprobs.len(),
            "{name}"
        );
        for (i, (score, want)) in outcome
            .prompt_scores
            .iter()
            .zip(&golden.prompt_logprobs[1..])
            .enumerate()
        {
            assert_eq!(score.token, golden.prompt_ids[i + 1], "{name}");
            close(
                score.logprob,
                want.expect("only the first is null"),
                &format!("prompt token {}", i + 1),
            );
        }
    }
    // After a near-tie the two may go different ways, each rightly; up to it everything is compared.
    let mut agreed = true;
    for (i, score) in outcome.scores.iter().enumerate() {
        let top = &golden.top[i];
        assert_eq!(score.token, outcome.tokens[i], "{name}");
        if score.token != golden.output_ids[i] {
            assert!(
                top[0].1 - top[1].1 <= TOLERANCE,
                "{name}: token {i} is {}, not {}",
                score.token,
                top[0].0
            );
            agreed = false;
            break;
        }
        close(score.logprob, golden.output_logprobs[i], &format!("token {i}"));
        for (id, want) in top {
            if let Some((_, got)) = score.top.iter().find(|(other, _)| other == id) {
                close(*got, *want, &format!("token {i}, candidate {id}"));
            }
        }
    }
    if golden.min_gap > TOLERANCE {
        assert!(agreed, "{name}");
    }
    if agreed {
        assert_eq!(outcome.tokens, golden.output_ids, "{name}");
        let want = if golden.finish == "stop" {
            Finish::Stop
        } else {
            Finish::Length
        };
        assert_eq!(outcome.finish, Some(want), "{name}");
    }
    worst
}

fn check(goldens: &Goldens, outcomes: &[Outcome], context: &str) {
    assert_eq!(goldens.prompts.len(), outcomes.len());
    let worst = goldens
        .prompts
        .iter()
        .zip(outcomes)
        .map(|(g, o)| compare(g, o, context))
        .fold(0.0, f64::max);
    println!(
        "{context}: {} prompts, largest difference {worst:.1e}",
        outcomes.len()
    );
}

fn transformers(name: &str, degrees: &[usize]) {
    let goldens = goldens::read(name);
    assert!(!goldens.prompts.is_empty(), "{name} has goldens");
    goldens.check_weights(&fixture(name));
    for &tp in degrees {
        let mut engine = Engine::start(&fixture(name), spec(tp));
        let outcomes = engine.run(&requests(&goldens, true), 0);
        check(&goldens, &outcomes, &format!("{name}, TP {tp}, full steps"));
        // Again: prompts asked for without their scores may come from the cache.
        let again = engine.run(&requests(&goldens, false), 0);
        assert!(
            again.iter().any(|outcome| outcome.cached_tokens > 0),
            "long prompts hit the cache"
        );
        check(&goldens, &again, &format!("{name}, TP {tp}, cached prefixes"));
        for chunk in [17, 64] {
            engine.reset(chunk, true);
            let outcomes = engine.run(&requests(&goldens, true), 2);
            check(
                &goldens,
                &outcomes,
                &format!("{name}, TP {tp}, steps of {chunk}, staggered"),
            );
        }
    }
}

#[test]
fn transformers_tiny() {
    transformers("tiny", &[1, 2, 4]);
}

#[test]
fn transformers_odd() {
    transformers("odd", &[1, 2, 3, 6]);
}

/// A model that was not made here. It is not committed: `tests/fixtures/smollm2.py` fetches it into the cache.
#[test]
fn transformers_smollm2() {
    let goldens = goldens::read("smollm2");
    let Some(dir) = goldens::cached("smollm2") else {
        println!("skipped: transformers_smollm2: run tests/fixtures/smollm2.py first");
        return;
    };
    goldens.check_weights(&dir);
    for tp in [1, 3] {
        let outcomes = Engine::start(&dir, spec(tp)).run(&requests(&goldens, true), 0);
        check(&goldens, &outcomes, &format!("smollm2, TP {tp}"));
    }
}

/// One row a step, so every prompt token is a step of its own; with the shorter prompts only.
#[test]
fn transformers_one_row_a_step() {
    for (name, tp) in [("tiny", 2), ("odd", 1)] {
        let mut goldens = goldens::read(name);
        goldens.prompts.retain(|golden| golden.prompt_ids.len() <= 40);
        goldens.prompts.truncate(12);
        let mut engine = Engine::start_with(&fixture(name), spec(tp), false);
        engine.reset(1, false);
        let outcomes = engine.run(&requests(&goldens, true), 0);
        check(&goldens, &outcomes, &format!("{name}, TP {tp}, steps of 1"));
    }
}

/// Greedy ids and log-probabilities of candle's Llama, computed token by token.
fn candle_outputs(dir: &std::path::Path, prompt: &[u32], n: usize) -> (Vec<u32>, Vec<f32>, f32) {
    let text = std::fs::read(dir.join("config.json")).expect("written");
    let config: LlamaConfig = serde_json::from_slice(&text).expect("candle reads the config");
    let config = config.into_config(false);
    let files = [dir.join("model.safetensors")];
    // SAFETY: nobody changes the file while it is mapped.
    let weights = unsafe { candle_nn::VarBuilder::from_mmaped_safetensors(&files, DType::F32, &Device::Cpu) };
    let llama = Llama::load(weights.expect("readable"), &config).expect("candle loads the model");
    let mut cache = Cache::new(true, DType::F32, &config, &Device::Cpu).expect("a cache");
    let (mut ids, mut logprobs, mut gap) = (prompt.to_vec(), Vec::new(), f32::INFINITY);
    for i in 0..prompt.len() + n - 1 {
        let input = Tensor::new(&[ids[i]], &Device::Cpu)
            .and_then(|t| t.unsqueeze(0))
            .expect("a tensor");
        let logits = llama.forward(&input, i, &mut cache).expect("a step");
        let row: Vec<f32> = logits.i(0).and_then(|row| row.to_vec1()).expect("a row");
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let log_sum = row.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln() as f32;
        if i + 1 >= prompt.len() {
            let best = row.iter().position(|&x| x == max).expect("there is a maximum");
            let second = row
                .iter()
                .enumerate()
                .filter(|(id, _)| *id != best)
                .map(|(_, &x)| x);
            gap = gap.min(max - second.fold(f32::NEG_INFINITY, f32::max));
            ids.push(best as u32);
        }
        logprobs.push(row[ids[i + 1] as usize] - max - log_sum);
    }
    (ids.split_off(prompt.len()), logprobs, gap)
}

#[test]
fn candle_on_random_models() {
    let base = Traits::default();
    let models = [
        (
            Traits {
                seed: 2,
                ..base.clone()
            },
            vec![1, 2, 4, 8],
        ),
        (
            Traits {
                seed: 3,
                rope_scaling: Some(llama3_scaling()),
                ..base.clone()
            },
            vec![1, 2],
        ),
        (
            Traits {
                seed: 4,
                tied: true,
                n_kv_heads: 8,
                ..base.clone()
            },
            vec![1, 4],
        ),
        (
            Traits {
                seed: 5,
                n_kv_heads: 1,
                vocab: 53,
                hidden: 96,
                inner: 80,
                ..base.clone()
            },
            vec![1, 2],
        ),
        (
            Traits {
                seed: 6,
                n_kv_heads: 2,
                n_layers: 1,
                hidden: 128,
                inner: 200,
                ..base
            },
            vec![1, 8],
        ),
    ];
    for (traits, degrees) in models {
        println!("{traits:?}");
        let dir = tempfile::tempdir().expect("a folder");
        traits.write(dir.path());
        let mut random = fastrand::Rng::with_seed(traits.seed);
        let prompts: Vec<Vec<u32>> = [1, 5, 33, 90]
            .iter()
            .map(|&n| (0..n).map(|_| random.u32(0..traits.vocab as u32)).collect())
            .collect();
        let wanted: Vec<_> = prompts
            .iter()
            .map(|prompt| candle_outputs(dir.path(), prompt, 12))
            .collect();
        let requests: Vec<Request> = prompts
            .iter()
            .map(|prompt| {
                let mut request = Request::greedy(prompt, 12);
                request.params.logprobs = Some(0);
                request.params.prompt_logprobs = Some(0);
                request
            })
            .collect();
        for tp in degrees {
            let outcomes = Engine::start(dir.path(), spec(tp)).run(&requests, 1);
            for (outcome, (ids, logprobs, gap)) in outcomes.iter().zip(&wanted) {
                if f64::from(*gap) > TOLERANCE {
                    assert_eq!(&outcome.tokens, ids, "TP {tp}");
                }
                let scores = outcome.prompt_scores.iter().chain(&outcome.scores);
                for (i, (score, want)) in scores.zip(logprobs).enumerate() {
                    let close = f64::from((score.logprob - want).abs()) <= TOLERANCE;
                    assert!(
                        close,
                        "TP {tp}, position {}: {} is not {want}",
                        i + 1,
                        score.logprob
                    );
                }
            }
        }
    }
}
