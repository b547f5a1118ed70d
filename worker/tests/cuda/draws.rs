//! Drawing and scoring on the GPU, against the distribution, and against the sampler on the same logits.

use swallow_worker::{
    group::{GroupSpec, Machine},
    sampling::SamplingParams,
};

use crate::{
    dummy, dummy_of, ids, spec, start,
    support::{Engine, Outcome, Request},
};

/// Draws at temperature 1 against the distribution that the CPU device computes; where only the likeliest may be drawn,
/// against that of the GPU, since rounding decides which of near-equal tokens is the last of them.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn draws_follow_the_distribution() {
    const DRAWS: usize = 4000;
    let prompt = ids(9, 50, 2048);
    let request = |seed: u64, params: SamplingParams| Request {
        prompt: prompt.clone(),
        max_tokens: 1,
        params: SamplingParams { seed, ..params },
    };
    let weights = dummy(4, 1, 128);
    let mut cpu = Engine::of(
        start(weights.clone(), spec(Machine::Cpu)),
        spec(Machine::Cpu),
        false,
    );
    let all = SamplingParams {
        logprobs: Some(2048),
        ..SamplingParams::greedy()
    };
    let top = |engine: &mut Engine| {
        engine
            .run(&[request(0, all.clone())], 0)
            .remove(0)
            .scores
            .remove(0)
            .top
    };
    let exact = top(&mut cpu);
    let mut gpu = Engine::of(start(weights, spec(Machine::Cuda)), spec(Machine::Cuda), true);
    let own = top(&mut gpu);
    for (name, top_k, kept, top) in [("everything", 0, 2048, exact), ("the 20 likeliest", 20, 20, own)] {
        let params = SamplingParams {
            temperature: 1.0,
            top_k,
            ..SamplingParams::greedy()
        };
        let requests: Vec<Request> = (0..DRAWS as u64)
            .map(|seed| request(seed, params.clone()))
            .collect();
        let mut counts = vec![0u32; 2048];
        for some in requests.chunks(1000) {
            for outcome in gpu.run(some, 0) {
                counts[outcome.tokens[0] as usize] += 1;
            }
        }
        let total: f64 = top[..kept]
            .iter()
            .map(|(_, logprob)| f64::from(*logprob).exp())
            .sum();
        // Tokens expected at least ten times are cells of their own, the others one together.
        let (mut cells, mut rest) = (Vec::new(), (0.0, 0.0));
        for (id, logprob) in &top[..kept] {
            let expected = f64::from(*logprob).exp() / total * DRAWS as f64;
            let seen = f64::from(counts[*id as usize]);
            if expected >= 10.0 {
                cells.push((seen, expected));
            } else {
                rest = (rest.0 + seen, rest.1 + expected);
            }
        }
        cells.push(rest);
        let seen: f64 = cells.iter().map(|cell| cell.0).sum();
        assert_eq!(seen as usize, DRAWS, "{name}: nothing else is drawn");
        let chi: f64 = cells
            .iter()
            .filter(|cell| cell.1 > 0.0)
            .map(|(seen, expected)| (seen - expected).powi(2) / expected)
            .sum();
        let freedom = cells.len() as f64 - 1.0;
        // Wilson and Hilferty's approximation of the 99.99th percentile.
        let bound = freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.719 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
        println!(
            "{DRAWS} draws of {name}: chi-square {chi:.1} <= {bound:.1} with {freedom} degrees of freedom"
        );
        assert!(chi <= bound, "{name}");
    }
}

/// So many listed alternatives that the host's sampler answers, from logits that the GPU computed.
const ASK_THE_SAMPLER: u32 = 200;

/// Every way to choose a token, in company.
fn ways(vocab: u32) -> Vec<SamplingParams> {
    let greedy = SamplingParams::greedy();
    let warm = |temperature| SamplingParams {
        temperature,
        ..greedy.clone()
    };
    let mut ways = vec![greedy.clone(), warm(0.3), warm(1.0), warm(3.0)];
    for (top_k, top_p, min_p) in [
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (50, 0.9, 0.0),
        (0, 0.9, 0.0),
        (0, 0.5, 0.0),
        (0, 0.0, 0.0),
        (0, 0.999, 0.0),
        (0, 1.0, 0.2),
        (40, 0.95, 0.05),
        (vocab - 1, 0.99, 0.0),
    ] {
        ways.push(SamplingParams {
            top_k,
            top_p,
            min_p,
            ..warm(1.3)
        });
    }
    for (repetition_penalty, frequency_penalty, presence_penalty) in [
        (1.5, 0.0, 0.0),
        (0.8, 0.0, 0.0),
        (1.0, 0.7, 0.0),
        (1.0, 0.0, 1.1),
        (1.2, 0.3, -0.4),
    ] {
        for temperature in [0.0, 0.9] {
            ways.push(SamplingParams {
                repetition_penalty,
                frequency_penalty,
                presence_penalty,
                ..warm(temperature)
            });
        }
    }
    ways.push(SamplingParams {
        logit_bias: (0..40).map(|i| (i * 7 % vocab, 4.0 - i as f32 / 4.0)).collect(),
        top_p: 0.8,
        ..warm(1.0)
    });
    ways.push(SamplingParams {
        min_tokens: 6,
        stop_ids: (0..vocab / 2).collect(),
        ..greedy
    });
    ways
}

/// The GPU draws the tokens that the sampler draws from the same logits, and scores them alike.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn draws_are_those_of_the_sampler() {
    for vocab in [2048, 50_257] {
        let run = |n_top: u32| {
            let spec = GroupSpec {
                max_running: 64,
                ..spec(Machine::Cuda)
            };
            let group = start(dummy_of(4, 1, 128, vocab), spec.clone());
            let mut engine = Engine::of(group, spec, false);
            let ways = ways(vocab as u32);
            let requests: Vec<Request> = (0..3 * ways.len() as u64)
                .map(|i| Request {
                    // Few tokens, so that penalties find what they count.
                    prompt: ids(i, 4 + 13 * (i as usize % 20), 30),
                    max_tokens: 24,
                    params: SamplingParams {
                        seed: i,
                        logprobs: Some(n_top),
                        prompt_logprobs: (i % 4 == 0).then_some(n_top),
                        ..ways[i as usize % ways.len()].clone()
                    },
                })
                .collect();
            engine.run(&requests, 1)
        };
        let (own, samplers) = (run(5), run(ASK_THE_SAMPLER));
        let mut n = 0;
        for (i, (own, sampler)) in own.iter().zip(&samplers).enumerate() {
            assert_eq!(own.tokens, sampler.tokens, "request {i}");
            let scores = |outcome: &Outcome| [&outcome.prompt_scores[..], &outcome.scores].concat();
            assert_eq!(scores(own).len(), scores(sampler).len());
            for (a, b) in scores(own).iter().zip(&scores(sampler)) {
                assert_eq!((a.token, a.rank), (b.token, b.rank), "request {i}");
                assert!((a.logprob - b.logprob).abs() < 1e-5, "request {i}: {a:?} {b:?}");
                let ids = |top: &[(u32, f32)]| top.iter().map(|entry| entry.0).collect::<Vec<_>>();
                assert_eq!(ids(&a.top), ids(&b.top[..5]), "request {i}");
                n += 1;
            }
        }
        println!("{vocab} tokens: {n} choices and scores of the GPU are the sampler's");
    }
}

/// Without scores tokens take another way to the host, and are the same.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn scores_change_no_token_and_preemption_counts_anew() {
    let run = |logprobs, n_blocks| {
        let spec = GroupSpec {
            n_blocks,
            ..spec(Machine::Cuda)
        };
        let mut engine = Engine::of(start(dummy(4, 1, 128), spec.clone()), spec, false);
        let requests: Vec<Request> = (0..8)
            .map(|i| Request {
                prompt: ids(50 + i, 200, 40),
                max_tokens: 120,
                params: SamplingParams {
                    temperature: 0.8,
                    seed: i,
                    repetition_penalty: 1.3,
                    presence_penalty: 0.2,
                    logprobs,
                    ..SamplingParams::greedy()
                },
            })
            .collect();
        let outcomes = engine.run(&requests, 0);
        let tokens: Vec<Vec<u32>> = outcomes.into_iter().map(|outcome| outcome.tokens).collect();
        (tokens, engine.scheduler.load().preemptions)
    };
    let (scored, _) = run(Some(2), 2048);
    let (plain, none) = run(None, 2048);
    assert_eq!((scored, none), (plain.clone(), 0));
    let (crowded, some) = run(None, 90);
    assert!(some > 0, "so little memory that sequences were preempted");
    // Computed again in other steps, a row's last bits differ, so not every draw needs to be the same.
    let same = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    let kept: usize = plain.iter().zip(&crowded).map(|(a, b)| same(a, b)).sum();
    println!(
        "{some} preemptions: {kept} of {} drawn tokens before any differs",
        8 * 120
    );
    assert!(kept > 8 * 60);
}
