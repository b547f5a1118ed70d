//! Clients leave and deadlines pass, in every phase: the worker is told at once, and nothing is held.

use super::*;

/// What a cancel may take to reach the worker. The target is 50 ms; a shared machine gets slack where time is measured
/// from outside.
const CANCEL_LIMIT: Duration = Duration::from_millis(50);

/// The best of a few tries, so that a machine that stands still for a moment fails nobody.
async fn cancelled_within(house: &House, worker: &MockWorker, phase: &str) {
    let mut best = Duration::MAX;
    for round in 0..5 {
        let before = worker.seen();
        let ask = ask([1, 2, 3, round], 100_000);
        let dispatcher = house.dispatcher.clone();
        let (waiting, decoding) = (phase == "prefill", phase == "decode");
        let left = if waiting {
            let running = tokio::spawn(async move { dispatcher.generate(ask).await.map(drop) });
            worker
                .until("it waits at the worker", |seen| {
                    seen.requests == before.requests + 1
                })
                .await;
            let left = Instant::now();
            running.abort();
            left
        } else {
            let mut generation = house.start(ask).await;
            while decoding && !matches!(generation.next().await, Some(Ok(Event::Tokens { .. }))) {}
            let left = Instant::now();
            drop(generation);
            left
        };
        let seen = worker
            .until("a cancel came", |seen| seen.cancels.len() > before.cancels.len())
            .await;
        best = best.min(seen.cancels.last().expect("it came").2 - left);
        worker
            .until("it is confirmed", |seen| seen.confirmed > before.confirmed)
            .await;
    }
    println!("{phase}: the cancel reached the worker in {best:?}");
    assert!(best < CANCEL_LIMIT, "{phase}: {best:?}");
    house.settles(64).await;
    assert_eq!(worker.live(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_a_cancel_within_50_ms_in_decode() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    cancelled_within(&house, &worker, "decode").await;
    let told = house.told();
    assert_eq!(told.cancels.len(), 5, "each was confirmed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_is_a_cancel_within_50_ms_in_prefill() {
    let worker = worker_with(|config| config.hold = true);
    let house = house(&[&worker], |_| {}).await;
    cancelled_within(&house, &worker, "prefill").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_the_queue_was_never_at_a_worker() {
    let worker = worker_with(|config| config.credits = 0);
    let house = house(&[&worker], |_| {}).await;
    let mut waiting = Box::pin(house.dispatcher.generate(ask([1], 5)));
    assert!(futures::poll!(&mut waiting).is_pending());
    assert_eq!(house.dispatcher.counts().queued.requests, 1);
    drop(waiting);
    house.settles(0).await;
    assert_eq!(worker.seen().requests, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_leave_at_once_and_share_frames() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    let runs = (0..50).map(|i| house.start(ask([1, i], 100_000)));
    let generations = futures::future::join_all(runs).await;
    drop(generations);
    let seen = worker
        .until("all are confirmed", |seen| seen.confirmed == 50)
        .await;
    assert_eq!(seen.cancels.len(), 50);
    house.settles(64).await;
}

fn within(ms: u64) -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(ms))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_binds_in_the_queue() {
    let worker = worker_with(|config| config.credits = 0);
    let house = house(&[&worker], |_| {}).await;
    let started = Instant::now();
    let late = Ask {
        deadline: within(100),
        ..ask([1], 5)
    };
    assert_eq!(house.refused(late).await, Refusal::Deadline);
    assert!(started.elapsed() >= Duration::from_millis(100));
    let passed = Ask {
        deadline: Some(started),
        ..ask([1], 5)
    };
    assert_eq!(house.refused(passed).await, Refusal::Deadline);
    house.settles(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_binds_in_prefill() {
    // The engine stands still, so that only the router can keep the deadline.
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    worker.set(|config| config.wedged = true);
    let late = Ask {
        deadline: within(100),
        ..ask([1], 5)
    };
    assert_eq!(house.refused(late).await, Refusal::Deadline);
    let seen = worker
        .until("the worker is told", |seen| seen.cancels.len() == 1)
        .await;
    assert_eq!(
        seen.cancels[0].1,
        swallow_rpc::worker::v1::cancel::Reason::Deadline as i32
    );
    worker.set(|config| config.wedged = false);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_binds_in_decode() {
    let worker = worker_with(|config| config.step = Duration::from_millis(5));
    let house = house(&[&worker], |_| {}).await;
    let late = Ask {
        deadline: within(200),
        ..ask([1], 100_000)
    };
    let mut generation = house.start(late.clone()).await;
    let mut tokens = 0;
    let failure = loop {
        match generation.next().await.expect("no clean end") {
            Ok(Event::Tokens { tokens: new, .. }) => tokens += new.len() as u32,
            Ok(_) => {}
            Err(failure) => break failure,
        }
    };
    assert_eq!(failure, Failure::Deadline { tokens });
    assert!(tokens > 0);
    assert_eq!(generation.next().await, None);
    drop(generation);
    house.settles(64).await;
    assert_eq!(worker.live(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_was_ready_is_not_late() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    let deadline = within(300);
    let mut generation = house
        .start(Ask {
            deadline,
            ..ask([1], 3)
        })
        .await;
    while !matches!(generation.next().await, Some(Ok(Event::Finished { .. }))) {}
    tokio::time::sleep_until(deadline.expect("given above")).await;
    assert_eq!(generation.next().await, None, "all was read before the deadline");
}
