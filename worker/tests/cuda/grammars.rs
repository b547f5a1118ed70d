//! Sequences that are held to a grammar on the GPU, beside others: what they say follows it, and the others hear nothing.

use swallow_worker::{
    checkpoint::LlamaConfig,
    grammar::{Grammars, Source},
    group::{GroupSpec, Machine},
    sampling::SamplingParams,
};

use crate::{
    ids, spec,
    support::{Engine, Outcome, Request, checkpoint, fixture},
};

const TOKENS: u32 = 40;

/// More of them than a step answers after it has landed, so that both ways are taken; and greedy sequences beside them,
/// which say what they say alone.
#[test]
#[ignore = "needs a GPU; tests/gpu runs it"]
fn constrained_rows_follow_their_grammar_and_the_others_go_on() {
    let folder = fixture("tiny");
    let config = std::fs::read(folder.join("config.json")).expect("a fixture");
    let config = LlamaConfig::parse(&folder.join("config.json"), &config).expect("a Llama");
    let n_vocab = u32::try_from(config.vocab_size).expect("few");
    let tokenizer = std::fs::read(folder.join("tokenizer.json")).expect("a fixture");
    let grammars = Grammars::new(tokenizer.into(), n_vocab, [n_vocab - 1].into());
    let source = Source::Regex("[0-9]{200}".into());
    let cuda = GroupSpec {
        max_running: 128,
        ..spec(Machine::Cuda)
    };
    let group = crate::start(checkpoint(&folder, 1), cuda.clone());
    let mut engine = Engine::of(group, cuda, false);
    let plain: Vec<Request> = (0..8)
        .map(|n| Request::greedy(&ids(n, 20, n_vocab), TOKENS))
        .collect();
    let alone: Vec<Outcome> = engine.run(&plain, 0);
    for n_constrained in [1, 3, 100] {
        let constrained = |seed: u64| Request {
            prompt: ids(seed, 20, n_vocab),
            max_tokens: TOKENS,
            params: SamplingParams {
                temperature: 1.0,
                seed,
                logprobs: Some(2),
                grammar: Some(grammars.constraint(&source, &[]).expect("digits")),
                ..SamplingParams::greedy()
            },
        };
        let mut requests = plain.clone();
        requests.extend((0..n_constrained).map(constrained));
        let before = engine.steps;
        let outcomes = engine.run(&requests, 0);
        let steps = engine.steps - before;
        for outcome in &outcomes[plain.len()..] {
            assert_eq!(
                (outcome.tokens.len(), outcome.scores.len()),
                (TOKENS as usize, TOKENS as usize)
            );
            grammars
                .constraint(&source, &outcome.tokens)
                .expect("digits alone");
        }
        // Rounding in batches of another size may tip near-equal tokens; a lost or doubled row would tip them all.
        let same = |(a, b): &(&Outcome, &Outcome)| a.tokens == b.tokens;
        let n_same = alone.iter().zip(&outcomes).filter(same).count();
        println!("{n_constrained} constrained beside 8: {n_same} of 8 as alone, {steps} steps");
        assert!(n_same >= 6, "{n_same} of 8");
        // While the others are there, in each step, a constrained sequence is in every other one; later in each.
        assert!((58..=64).contains(&steps), "{steps} steps");
    }
}
