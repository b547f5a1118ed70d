//! A runner that is given the next step before the tokens of the last one are seen: clients notice nothing.

use std::time::Duration;

use swallow_rpc::worker::v1::{Request, finished::Reason};

use crate::{
    fake::echo,
    harness::{Setup, Worker, request},
};

const CLIENTS: u32 = 24;

/// A prompt whose echo says `stop` first at output token `at`.
fn prompt(handle: u32, at: usize) -> Vec<u32> {
    let stop = stop_of(handle);
    let mut prompt: Vec<u32> = (0..40).map(|i| 100 + (handle * 7 + i) % 300).collect();
    prompt[at] = stop;
    prompt
}

fn stop_of(handle: u32) -> u32 {
    500 + handle
}

/// Requests that stop, that reach their length, and that are cancelled, in too little memory for all: every stream is
/// exactly its echo up to its end, and nothing comes after.
#[tokio::test(flavor = "multi_thread")]
async fn no_token_is_lost_doubled_or_said_after_the_end() {
    let worker = Worker::ready(Setup {
        n_blocks: 48,
        max_waiting: CLIENTS,
        steps_ahead: 2,
        ..Setup::default()
    })
    .await;
    worker.controls.pace(Duration::from_micros(200));
    let mut router = worker.router().await;
    for handle in 1..=CLIENTS {
        router.until("a credit", |router| router.credits > 0).await;
        let stopping = Request {
            stop_token_ids: vec![stop_of(handle)],
            logprobs: Some(0),
            ..request(handle, &prompt(handle, (handle % 30) as usize), 35)
        };
        router.submit(vec![stopping]).await;
        if handle % 5 == 0 {
            router.cancel(&[handle - 1]).await;
        }
    }
    for handle in 1..=CLIENTS {
        let seen = router.finished(handle).await;
        let at = (handle % 30) as usize;
        let told: Vec<u32> = (0..=at).map(|i| echo(&prompt(handle, at), i)).collect();
        match seen.reason() {
            Reason::StopToken => assert_eq!(seen.tokens, told, "request {handle}"),
            Reason::Cancelled => {
                assert_eq!(handle % 5, 4, "request {handle} was not cancelled");
                assert_eq!(seen.tokens, told[..seen.tokens.len()], "request {handle}");
            }
            other => panic!("request {handle} ended with {other:?}"),
        }
        let scored: Vec<u32> = seen.scores.iter().map(|(position, ..)| *position).collect();
        let expected: Vec<u32> = (40..).take(seen.tokens.len()).collect();
        assert_eq!(scored, expected, "a score for every token");
    }
    router.ping(1).await;
    router
        .until("the last load report", |router| {
            router.load.preemptions_total > 0 && router.load.running == 0
        })
        .await;
    worker.controls.empty().await;
    assert_eq!(worker.controls.most_launched(), 2, "steps did run ahead");
}

/// While a step is held, the next one is launched, and no third.
#[tokio::test(flavor = "multi_thread")]
async fn one_step_runs_ahead_and_a_cancel_reaches_it() {
    for steps_ahead in [1, 2] {
        let worker = Worker::ready(Setup {
            steps_ahead,
            ..Setup::default()
        })
        .await;
        let mut router = worker.router().await;
        worker.controls.hold();
        router.submit(vec![request(1, &[1, 2, 3], 400)]).await;
        worker.controls.held().await;
        assert_eq!(worker.controls.most_launched(), steps_ahead);
        router.cancel(&[1]).await;
        worker.controls.pace(Duration::from_millis(5));
        worker.controls.release();
        let seen = router.finished(1).await;
        assert_eq!(seen.reason(), Reason::Cancelled);
        let told: Vec<u32> = (0..seen.tokens.len()).map(|i| echo(&[1, 2, 3], i)).collect();
        assert_eq!(seen.tokens, told);
        worker.controls.empty().await;
        router
            .until("an empty worker", |router| {
                let load = router.load;
                load.seq > 0 && (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
            })
            .await;
    }
}

/// A failure while two steps are launched is told once, to everybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_failure_with_two_steps_under_way_ends_all() {
    let worker = Worker::ready(Setup {
        steps_ahead: 2,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    worker.controls.hold();
    router
        .submit(vec![request(1, &[1, 2, 3], 400), request(2, &[4, 5], 400)])
        .await;
    worker.controls.held().await;
    worker.controls.break_next();
    worker.controls.release();
    for handle in [1, 2] {
        assert_eq!(router.finished(handle).await.reason(), Reason::Error);
    }
    assert!(router.end().await.is_err());
    let error = worker.ended().await.expect_err("a failure");
    assert!(error.to_string().contains("injected"), "{error}");
}
