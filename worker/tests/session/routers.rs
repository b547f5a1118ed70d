//! Several routers, and routers that misbehave: nobody suffers from another.

use std::time::Duration;

use swallow_proto::prefix;
use swallow_rpc::worker::v1::{Goodbye, Hello, Ping, Request, finished::Reason, session_request::Frame};
use tonic::Code;

use crate::{
    fake::echo,
    harness::{BLOCK_TOKENS, Setup, Worker, hello, request, soon},
};

/// The same handle in two sessions, with tickets of their own.
fn of_router(router: u8, request: Request) -> Request {
    let mut uuid = request.request_uuid;
    uuid[0] = router;
    Request {
        request_uuid: uuid,
        ..request
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_routers_share_and_each_hears_its_own() {
    let worker = Worker::ready(Setup::default()).await;
    let (mut a, mut b) = (worker.router().await, worker.router().await);
    assert!(
        a.credits >= 1 && b.credits >= 1 && a.credits + b.credits <= 4 + 4 + 2,
        "{} {}",
        a.credits,
        b.credits
    );
    a.submit(vec![of_router(1, request(1, &[1, 2, 3], 30))]).await;
    b.submit(vec![of_router(2, request(1, &[7, 8], 30))]).await;
    let (seen_a, seen_b) = tokio::join!(a.finished(1), b.finished(1));
    assert_eq!(
        seen_a.tokens,
        (0..30).map(|i| echo(&[1, 2, 3], i)).collect::<Vec<_>>()
    );
    assert_eq!(
        seen_b.tokens,
        (0..30).map(|i| echo(&[7, 8], i)).collect::<Vec<_>>()
    );
    assert_eq!((a.seen.len(), b.seen.len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credit_nothing_is_taken_and_credits_come_back() {
    let worker = Worker::ready(Setup {
        max_running: 2,
        max_waiting: 2,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    worker.controls.hold();
    router.submit(vec![request(0, &[1, 2], 3)]).await;
    worker.controls.held().await;
    // The first step hangs: these come to a worker with two slots and two waiting places.
    router
        .submit((1..=10).map(|n| request(n, &[3, 4], 3)).collect())
        .await;
    worker.controls.release();
    let mut rejected = 0;
    for n in 0..=10 {
        let seen = router.finished(n).await;
        if seen.reason() == Reason::Busy {
            assert_eq!(seen.message(), "no credit; send a request only against a credit");
            rejected += 1;
        } else {
            assert_eq!((seen.reason(), seen.tokens.len()), (Reason::Length, 3));
        }
    }
    assert!(
        (6..=10).contains(&rejected),
        "at most two slots and two places at a time: {rejected} were rejected"
    );
    worker.controls.empty().await;
    router.ping(1).await;
    // A request sent without a credit took none.
    let unspent = router.credits + rejected;
    assert!((1..=4).contains(&unspent), "{unspent} credits are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_worker_serves_many_more_requests_than_it_holds() {
    let worker = Worker::ready(Setup {
        max_running: 3,
        max_waiting: 2,
        n_blocks: 40,
        ..Setup::default()
    })
    .await;
    let mut routers = vec![
        worker.router().await,
        worker.router().await,
        worker.router().await,
    ];
    let mut next = [0_u32; 3];
    while next.iter().any(|sent| *sent < 60) {
        for (i, router) in routers.iter_mut().enumerate() {
            if next[i] == 60 {
                continue;
            }
            router.until("a credit", |router| router.credits > 0).await;
            let n = u32::try_from(router.credits).expect("positive").min(60 - next[i]);
            let base = next[i];
            let name = u8::try_from(i).expect("small");
            let requests =
                (base..base + n).map(|h| of_router(name, request(h, &[h + 1, h + 2, h + 3], 1 + h % 20)));
            router.submit(requests.collect()).await;
            next[i] += n;
        }
    }
    for router in &mut routers {
        for h in 0..60 {
            let seen = router.finished(h).await;
            assert_eq!(seen.reason(), Reason::Length, "{seen:?}");
            let expected: Vec<u32> = (0..=(h % 20) as usize)
                .map(|i| echo(&[h + 1, h + 2, h + 3], i))
                .collect();
            assert_eq!(seen.tokens, expected);
        }
    }
    worker.controls.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_goes_leaves_nothing_behind() {
    let worker = Worker::ready(Setup::default()).await;
    worker.controls.pace(Duration::from_millis(1));
    let (mut gone, mut polite, mut stays) = (
        worker.router().await,
        worker.router().await,
        worker.router().await,
    );
    gone.submit(vec![of_router(1, request(1, &[1, 2, 3], 500))]).await;
    polite
        .submit(vec![of_router(2, request(1, &[4, 5, 6], 500))])
        .await;
    stays.submit(vec![of_router(3, request(1, &[7, 8, 9], 20))]).await;
    let running =
        |router: &crate::harness::Router| router.seen.get(&1).is_some_and(|seen| !seen.tokens.is_empty());
    gone.until("a token", running).await;
    polite.until("a token", running).await;
    drop(gone);
    polite
        .send(Frame::Goodbye(Goodbye {
            reason: "test".into(),
        }))
        .await;
    polite.end().await.expect("a clean end");
    assert_eq!(stays.finished(1).await.tokens.len(), 20, "nobody else notices");
    worker.controls.empty().await;
    stays
        .until("an empty worker", |router| {
            (router.load.running, router.load.kv_blocks_used) == (0, 0)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_does_not_read_is_cut() {
    let worker = Worker::ready(Setup {
        outbox_bytes: 16 * 1024,
        ..Setup::default()
    })
    .await;
    let (mut stuck, mut healthy) = (worker.narrow_router().await, worker.router().await);
    // 20 alternatives for each of many tokens fill the connection's buffers and then the outbox.
    let cut = r#"swallow_worker_sessions_cut_total{engine="0",model_name="echo"} 1"#;
    let flood = async {
        for handle in 1.. {
            let loud = Request {
                logprobs: Some(20),
                prompt_logprobs: Some(20),
                ..request(handle, &[1; 100], 400)
            };
            stuck.try_submit(vec![of_router(1, loud)]);
            healthy.ping(handle.into()).await;
            if worker.get("/metrics").await.1.contains(cut) {
                break;
            }
        }
    };
    soon("the cut", flood).await;
    healthy.submit(vec![of_router(2, request(1, &[7, 8], 50))]).await;
    assert_eq!(healthy.finished(1).await.tokens.len(), 50);
    worker.controls.empty().await;
    let status = stuck.end().await.expect_err("cut");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    healthy.ping(99).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replayed_kv_events_equal_a_snapshot() {
    let worker = Worker::ready(Setup {
        n_blocks: 40,
        ..Setup::default()
    })
    .await;
    let with_events = || Hello {
        kv_events: true,
        ..hello()
    };
    let mut follower = worker.open(with_events()).await.expect("a session");
    let mut plain = worker.router().await;
    let prompts: Vec<Vec<u32>> = (0..12)
        .map(|n| (0..21).map(|i| 20 * n + i % 7).collect())
        .collect();
    for (handle, prompt) in (1..).zip(&prompts) {
        follower.until("a credit", |router| router.credits > 0).await;
        follower.submit(vec![request(handle, prompt, 10)]).await;
        follower.finished(handle).await;
    }
    follower.ping(1).await;
    let mut late = worker.open(with_events()).await.expect("a session");
    late.ping(1).await;
    assert!(!late.keys.is_empty());
    assert_eq!(
        follower.keys, late.keys,
        "40 blocks were too few for all: some left"
    );
    // Routers find a prompt by computing the keys themselves.
    let last = prefix::keys(0, BLOCK_TOKENS as usize, prompts.last().expect("some"));
    assert_eq!(last.len(), 5);
    assert!(last.iter().all(|key| late.keys.contains(key)));
    plain.ping(1).await;
    assert!(plain.keys.is_empty(), "it did not ask");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_is_answered_by_the_loop_alone() {
    let worker = Worker::ready(Setup::default()).await;
    let (mut busy, mut prober) = (worker.router().await, worker.router().await);
    worker.controls.pace(Duration::from_millis(1));
    busy.submit(vec![request(1, &[1, 2, 3], 500)]).await;
    prober.ping(1).await;
    worker.controls.hold();
    worker.controls.held().await;
    prober.send(Frame::Ping(Ping { nonce: 2 })).await;
    let wait = Duration::from_millis(300);
    let waited = tokio::time::timeout(wait, prober.until("Pong", |router| router.pongs.contains(&2))).await;
    assert!(waited.is_err(), "a wedged loop does not answer");
    assert_eq!(worker.get("/healthz").await.0, 200, "the process does");
    worker.controls.release();
    soon("Pong", prober.until("Pong", |router| router.pongs.contains(&2))).await;
    busy.cancel(&[1]).await;
    busy.finished(1).await;
}
