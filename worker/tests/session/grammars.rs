//! Requests with a grammar: they wait for it outside of the loop, and each has one last word.

use std::time::Duration;

use swallow_rpc::worker::v1::{Grammar, Request, finished::Reason, grammar::Source};
use swallow_worker::{serve::Loaded, state::Memory};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    fake::{Controls, Fake, echo},
    harness::{Setup, Worker, model, request},
};

/// A worker whose runner takes no notice of grammars, with the tiny model's tokenizer.
async fn worker(steps_ahead: usize) -> Worker {
    let setup = Setup {
        steps_ahead,
        ..Setup::default()
    };
    let controls = Controls::default();
    let (limits, mut facts, door) = model(&setup);
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/fixtures/tiny/tokenizer.json"
    );
    let tokenizer = std::fs::read(path).expect("a fixture");
    for file in facts
        .files
        .iter_mut()
        .filter(|file| file.name == "tokenizer.json")
    {
        file.bytes = tokenizer.clone().into();
    }
    let runner = Fake::new(controls.clone(), steps_ahead);
    let load = move |_: &_| {
        Ok(Loaded {
            runner,
            limits,
            pace: None,
            facts,
            door,
            measured: Memory::default(),
        })
    };
    let worker = Worker::launch(&setup, controls, load).await;
    worker.health().await.until(ServingStatus::Serving).await;
    worker
}

fn constrained(handle: u32, prompt: &[u32], regex: &str) -> Request {
    let source = Some(Source::Regex(regex.to_owned()));
    Request {
        grammar: Some(Grammar { source }),
        ..request(handle, prompt, 400)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_compiled_is_refused_and_the_others_run() {
    let worker = worker(1).await;
    let mut router = worker.router().await;
    let resumed = Request {
        resumed_tokens: 1,
        ..constrained(4, &[1, 2, 500], "[0-9]{3}")
    };
    router
        .submit(vec![
            constrained(1, &[1, 2], "a(?=b)"),
            constrained(2, &[3, 4], "[0-9]+"),
            request(3, &[5, 6], 9),
            resumed,
        ])
        .await;
    for (handle, named) in [
        (1, "look-around"),
        (4, "does not follow the grammar, from token 0"),
    ] {
        let seen = router.finished(handle).await;
        assert_eq!((seen.reason(), seen.tokens.len()), (Reason::Rejected, 0));
        assert!(seen.message().contains(named), "{}", seen.message());
    }
    for (handle, prompt, n) in [(2, [3, 4], 400), (3, [5, 6], 9)] {
        let expected: Vec<u32> = (0..n).map(|i| echo(&prompt, i)).collect();
        assert_eq!(router.finished(handle).await.tokens, expected);
    }
    worker.controls.empty().await;
    let (_, metrics) = worker.get("/metrics").await;
    for (outcome, count) in [("compiled", 1), ("refused", 2)] {
        let counted = |line: &&str| {
            line.starts_with("swallow_worker_grammar_compile_seconds_count")
                && line.contains(&format!("outcome=\"{outcome}\""))
        };
        let line = metrics.lines().find(counted).expect("a series");
        assert!(line.ends_with(&format!(" {count}")), "{line}");
    }
}

/// Beside two requests with grammars, one without is in every step, and the next step is launched before anybody has seen
/// the tokens of the last.
#[tokio::test(flavor = "multi_thread")]
async fn only_requests_with_grammars_wait_for_their_tokens() {
    let worker = worker(2).await;
    let mut router = worker.router().await;
    let (plain, prompt) = (3, [7, 8, 9]);
    router
        .submit(vec![
            constrained(1, &[1, 2], "[0-9]+"),
            constrained(2, &[3, 4], "[a-z]+"),
            request(plain, &prompt, 400),
        ])
        .await;
    for (handle, prompt) in [(1, &[1, 2][..]), (2, &[3, 4]), (plain, &prompt)] {
        let expected: Vec<u32> = (0..400).map(|i| echo(prompt, i)).collect();
        assert_eq!(router.finished(handle).await.tokens, expected, "request {handle}");
    }
    assert_eq!(worker.controls.most_launched(), 2);
    let ahead = worker.controls.ahead();
    // All of its tokens but the first come of rows, and all but the first of those rows follow a step under way.
    assert!(ahead.free >= 398, "{ahead:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_cancelled_while_it_waits_is_cancelled_once() {
    let worker = worker(1).await;
    worker.controls.pace(Duration::from_millis(5));
    let mut router = worker.router().await;
    for handle in 1..=8 {
        router.until("a credit", |router| router.credits > 0).await;
        // The first waits for the vocabulary too, those of odd numbers for a compilation of their own.
        let regex = format!("(a|b){{1,{}}}", 500 + handle % 2 * handle);
        router.submit(vec![constrained(handle, &[1, 2], &regex)]).await;
        router.cancel(&[handle]).await;
        assert_eq!(router.finished(handle).await.reason(), Reason::Cancelled);
    }
    worker.controls.empty().await;
}
