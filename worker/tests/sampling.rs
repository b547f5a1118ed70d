//! The sampler against exact distributions and hand-worked examples. Seeds are printed, and fixed.

use std::{collections::HashSet, sync::Arc};

use swallow_worker::sampling::{Sampler, SamplingParams};

const DRAWS: u64 = 40_000;

fn sampler(params: SamplingParams, prompt: &[u32]) -> Sampler {
    Sampler::new(params, Arc::from(prompt))
}

/// One draw with a fresh history.
fn draw(params: &SamplingParams, logits: &[f32], position: u32) -> u32 {
    let mut row = logits.to_vec();
    sampler(params.clone(), &[0])
        .sample(&mut row, 0, position)
        .expect("finite logits")
        .0
}

fn random_params(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        seed,
        ..SamplingParams::greedy()
    }
}

/// Softmax of the logits over `temperature`, restricted to `kept`.
fn distribution(logits: &[f32], temperature: f64, kept: &[usize]) -> Vec<f64> {
    let weight = |i: usize| {
        if kept.contains(&i) {
            (f64::from(logits[i]) / temperature).exp()
        } else {
            0.0
        }
    };
    let total: f64 = (0..logits.len()).map(weight).sum();
    (0..logits.len()).map(|i| weight(i) / total).collect()
}

/// Draws at many positions and compares the counts with the exact probabilities. The bound is passed by chance about
/// once in a million: mean plus five deviations of the chi-square distribution.
fn chi_square(name: &str, params: &SamplingParams, logits: &[f32], want: &[f64]) {
    let mut counts = vec![0u64; logits.len()];
    for position in 0..DRAWS {
        counts[draw(params, logits, position as u32) as usize] += 1;
    }
    let mut statistic = 0.0;
    for (i, (&count, &p)) in counts.iter().zip(want).enumerate() {
        if p == 0.0 {
            assert_eq!(count, 0, "{name}: token {i} was removed");
        } else {
            let expected = p * DRAWS as f64;
            statistic += (count as f64 - expected).powi(2) / expected;
        }
    }
    let freedom = want.iter().filter(|&&p| p > 0.0).count() as f64 - 1.0;
    println!(
        "{name}: seed {}, chi-square {statistic:.1} with {freedom} degrees of freedom",
        params.seed
    );
    assert!(
        statistic <= freedom + 5.0 * (2.0 * freedom).sqrt(),
        "{name}: {statistic}"
    );
}

const LOGITS: [f32; 8] = [0.0, 2.0, 1.5, -1.0, 1.0, 0.5, -3.0, 1.9];

#[test]
fn draws_follow_the_distribution() {
    let all: Vec<usize> = (0..8).collect();
    for (n, temperature) in [(0, 1.0), (1, 0.5), (2, 1.7)] {
        let params = SamplingParams {
            temperature,
            ..random_params(11 + n)
        };
        let want = distribution(&LOGITS, f64::from(temperature), &all);
        chi_square(&format!("temperature {temperature}"), &params, &LOGITS, &want);
    }
    let base = random_params(21);
    let kept = |params: SamplingParams, kept: &[usize], name: &str| {
        chi_square(
            name,
            &params,
            &LOGITS,
            &distribution(&LOGITS, f64::from(params.temperature), kept),
        );
    };
    kept(
        SamplingParams {
            top_k: 3,
            ..base.clone()
        },
        &[1, 2, 7],
        "top_k 3",
    );
    // Probabilities: 1: .304, 7: .275, 2: .184, 4: .112, 5: .068, 0: .041, ...
    kept(
        SamplingParams {
            top_p: 0.7,
            ..base.clone()
        },
        &[1, 2, 7],
        "top_p 0.7",
    );
    kept(
        SamplingParams {
            top_p: 0.8,
            ..base.clone()
        },
        &[1, 2, 4, 7],
        "top_p 0.8",
    );
    // Ratios to the likeliest: 7: .905, 2: .607, 4: .368, 5: .223, 0: .135, 3: .050.
    kept(
        SamplingParams {
            min_p: 0.2,
            ..base.clone()
        },
        &[1, 2, 4, 5, 7],
        "min_p 0.2",
    );
    kept(
        SamplingParams {
            top_k: 5,
            top_p: 0.9,
            min_p: 0.3,
            ..base.clone()
        },
        &[1, 2, 4, 7],
        "all three",
    );
    // Temperature comes before top_p: at 2 the distribution is flatter and more tokens are needed.
    kept(
        SamplingParams {
            temperature: 2.0,
            top_p: 0.7,
            ..base
        },
        &[1, 2, 4, 7],
        "top_p at temperature 2",
    );
}

#[test]
fn biases_and_penalties_shift_the_distribution() {
    let params = SamplingParams {
        logit_bias: vec![(6, 5.0), (1, -100.0), (99, 3.0)],
        ..random_params(31)
    };
    let mut logits = LOGITS;
    logits[6] += 5.0;
    logits[1] -= 100.0;
    chi_square(
        "logit_bias",
        &params,
        &LOGITS,
        &distribution(&logits, 1.0, &[0, 2, 3, 4, 5, 6, 7]),
    );
}

#[test]
fn seeds_candidates_and_positions_draw_apart() {
    let flat = [0.0; 64];
    let draws = |seed, candidate, first: u32| -> Vec<u32> {
        let params = SamplingParams {
            candidate,
            ..random_params(seed)
        };
        (first..first + 32)
            .map(|position| draw(&params, &flat, position))
            .collect()
    };
    assert_eq!(draws(1, 0, 0), draws(1, 0, 0));
    assert_eq!(draws(1, 0, 0)[5..], draws(1, 0, 5)[..27]);
    for other in [
        draws(2, 0, 0),
        draws(1 << 32 | 1, 0, 0),
        draws(1, 1, 0),
        draws(1, 0, 32),
    ] {
        let same = draws(1, 0, 0).iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(same <= 5, "{same} of 32 draws from 64 tokens agree");
    }
}

/// Greedy choices reveal the penalised logits: each example is worked out beside it.
#[test]
fn penalties_by_hand() {
    let greedy = SamplingParams::greedy();
    let second = |params: SamplingParams, prompt: &[u32], logits: &[f32]| {
        let mut sampler = sampler(params, prompt);
        let first = sampler.sample(&mut logits.to_vec(), 0, 1).expect("finite").0;
        (
            first,
            sampler.sample(&mut logits.to_vec(), 1, 2).expect("finite").0,
        )
    };
    // Presence: 1.0 - 0.6 = 0.4 < 0.5.
    let presence = |by| SamplingParams {
        presence_penalty: by,
        ..greedy.clone()
    };
    assert_eq!(second(presence(0.6), &[3], &[0.5, 1.0, 0.0, 0.2]), (1, 0));
    assert_eq!(second(presence(0.4), &[3], &[0.5, 1.0, 0.0, 0.2]), (1, 1));
    // It counts the output alone: token 1 in the prompt changes nothing.
    assert_eq!(second(presence(0.6), &[1, 1], &[0.5, 1.0, 0.0, 0.2]), (1, 0));
    // Frequency: 1.0 - 0.3 n stays above 0.5 once, not twice; presence would never end.
    let mut frequency = sampler(
        SamplingParams {
            frequency_penalty: 0.3,
            ..greedy.clone()
        },
        &[1],
    );
    let tokens: Vec<u32> = (0..4)
        .map(|i| {
            frequency
                .sample(&mut [0.5, 1.0, 0.0, 0.2], i, i + 1)
                .expect("finite")
                .0
        })
        .collect();
    assert_eq!(tokens, [1, 1, 0, 1]); // then 0: 0.5 - 0.3 = 0.2, 1: 1.0 - 0.6 = 0.4
    // Repetition counts prompt and output: 1.0 / 2.5 = 0.4 < 0.5 at once if token 1 is in the prompt.
    let repetition = SamplingParams {
        repetition_penalty: 2.5,
        ..greedy.clone()
    };
    assert_eq!(second(repetition.clone(), &[1], &[0.5, 1.0, 0.0, 0.2]), (0, 1)); // then 0: 0.2, 1: 0.4
    assert_eq!(second(repetition.clone(), &[3], &[0.5, 1.0, 0.0, 0.2]), (1, 0));
    // Negative logits are multiplied, so they fall too: -0.1 * 2.5 = -0.25 < -0.2.
    assert_eq!(second(repetition, &[0], &[-0.1, -0.2, -9.0, -9.0]).0, 1);
    // A bias comes before the penalties: (0.2 + 1.0) / 2.5 = 0.48 < 0.5.
    let both = SamplingParams {
        logit_bias: vec![(3, 1.0)],
        repetition_penalty: 2.5,
        ..greedy
    };
    assert_eq!(second(both, &[3], &[0.5, 0.1, 0.0, 0.2]).0, 0);
}

#[test]
fn stop_tokens_wait_for_min_tokens() {
    let params = SamplingParams {
        min_tokens: 2,
        stop_ids: Arc::from([1, 77]),
        ..SamplingParams::greedy()
    };
    let mut sampler = sampler(params, &[0]);
    let tokens: Vec<u32> = (0..3)
        .map(|i| sampler.sample(&mut [0.5, 1.0, 0.0], i, i + 1).expect("finite").0)
        .collect();
    assert_eq!(tokens, [0, 0, 1]);
}

#[test]
fn a_ban_that_leaves_nothing_is_not_applied() {
    let params = SamplingParams {
        min_tokens: 1,
        stop_ids: Arc::from([0, 1]),
        ..SamplingParams::greedy()
    };
    assert_eq!(
        sampler(params, &[0])
            .sample(&mut [0.5, 1.0], 0, 1)
            .expect("finite")
            .0,
        1
    );
}

#[test]
fn greedy_ties_take_the_lowest_id() {
    assert_eq!(draw(&SamplingParams::greedy(), &[1.0, 3.0, 3.0, 3.0], 1), 1);
    assert_eq!(draw(&SamplingParams::greedy(), &[-0.0, 0.0], 1), 0);
    // So small a temperature that the quotient overflows: the limit.
    assert_eq!(
        draw(
            &SamplingParams {
                temperature: 1e-40,
                ..random_params(1)
            },
            &[1.0, 3.0, 2.0],
            1
        ),
        1
    );
}

/// After preemption indices repeat: the history is cut, so counts and draws come out as before.
#[test]
fn repeated_indices_give_the_same_tokens() {
    let params = SamplingParams {
        frequency_penalty: 0.7,
        repetition_penalty: 1.3,
        presence_penalty: 0.2,
        ..random_params(5)
    };
    let mut sampler = sampler(params, &[2, 3]);
    let mut at = |index: u32| {
        sampler
            .sample(&mut LOGITS.to_vec(), index, index + 2)
            .expect("finite")
            .0
    };
    let first: Vec<u32> = (0..20).map(&mut at).collect();
    let again: Vec<u32> = (7..20).map(&mut at).collect();
    assert_eq!(first[7..], again);
}

/// Scores are of the raw logits, whatever was done to choose.
#[test]
fn scores_ignore_how_the_token_was_chosen() {
    let exact: Vec<f64> = distribution(&LOGITS, 1.0, &(0..8).collect::<Vec<_>>());
    let params = SamplingParams {
        logprobs: Some(3),
        temperature: 0.3,
        top_k: 2,
        logit_bias: vec![(3, 50.0)],
        ..random_params(9)
    };
    let (token, score) = sampler(params, &[1])
        .sample(&mut LOGITS.to_vec(), 0, 1)
        .expect("finite");
    let score = score.expect("asked for");
    assert_eq!((token, score.token, score.rank), (3, 3, 7));
    assert!((f64::from(score.logprob) - exact[3].ln()).abs() < 1e-6);
    assert_eq!(score.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 7, 2]);
    for (id, logprob) in score.top {
        assert!((f64::from(logprob) - exact[id as usize].ln()).abs() < 1e-6);
    }
}

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    for bad in [f32::NAN, f32::INFINITY] {
        for params in [SamplingParams::greedy(), random_params(1)] {
            assert!(sampler(params, &[0]).sample(&mut [0.0, bad, 1.0], 0, 1).is_err());
        }
        assert!(
            sampler(random_params(1), &[0])
                .score_prompt(&[0.0, bad, 1.0], 0)
                .is_err()
        );
    }
}

/// A large vocabulary, filtered: every token drawn is one of the exact set, which a full sort computes here.
#[test]
fn filters_agree_with_a_full_sort() {
    let seed = 77;
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..20 {
        let logits: Vec<f32> = (0..5000).map(|_| random.f32() * 6.0).collect();
        let (top_k, top_p) = (random.u32(1..3000), 0.3 + 0.69 * random.f32());
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        order.truncate(top_k as usize);
        let weight = |i: usize| f64::from(logits[i]).exp();
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut sum = 0.0;
        let n = 1 + order
            .iter()
            .position(|&i| {
                sum += weight(i);
                sum >= f64::from(top_p) * total
            })
            .expect("reached");
        // A token at the border may fall either way by rounding.
        let allowed: HashSet<usize> = order[..(n + 1).min(order.len())].iter().copied().collect();
        let params = SamplingParams {
            top_k,
            top_p,
            ..random_params(round)
        };
        for position in 0..50 {
            let token = draw(&params, &logits, position) as usize;
            assert!(allowed.contains(&token), "round {round}: {token}");
        }
    }
}
