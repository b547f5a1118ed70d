//! How a worker ends: drained, killed, or broken.

use std::time::Duration;

use swallow_rpc::worker::v1::{finished::Reason, load_report::Health};
use swallow_worker::serve::ServeError;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{Setup, Worker, hello, request};

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_finishes_what_runs_and_takes_nothing_new() {
    let worker = Worker::ready(Setup::default()).await;
    let (mut router, mut health) = (worker.router().await, worker.health().await);
    health.until(ServingStatus::Serving).await;
    worker.controls.hold();
    router.submit(vec![request(1, &[1, 2, 3], 20)]).await;
    worker.controls.held().await;
    worker.stop.drain.cancel();
    health.until(ServingStatus::NotServing).await;
    let (status, body) = worker.get("/readyz").await;
    assert_eq!((status, body.as_str()), (503, "draining\n"));
    assert_eq!(
        worker.open(hello()).await.err().expect("refused").code(),
        Code::Unavailable
    );
    worker.controls.pace(Duration::from_millis(5));
    worker.controls.release();
    router.until("GoAway", |router| router.go_away.is_some()).await;
    assert!(
        router
            .go_away
            .as_ref()
            .and_then(|go| go.drain)
            .is_some_and(|drain| drain.seconds > 0)
    );
    router.submit(vec![request(2, &[4, 5], 3)]).await;
    let refused = router.finished(2).await;
    assert_eq!(refused.reason(), Reason::Busy);
    assert_eq!(
        refused.message(),
        "the replica is draining; send the request to another one"
    );
    let seen = router.finished(1).await;
    assert_eq!((seen.reason(), seen.tokens.len()), (Reason::Length, 20));
    assert_eq!(router.load.health(), Health::Draining);
    router.end().await.expect("a clean end");
    worker.ended().await.expect("a drain is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_drains_at_once() {
    let worker = Worker::ready(Setup::default()).await;
    let mut router = worker.router().await;
    worker.stop.drain.cancel();
    router.end().await.expect("a clean end");
    assert!(router.go_away.is_some());
    worker.ended().await.expect("a drain is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_outlives_the_drain_is_told() {
    let setup = Setup {
        drain_timeout: Duration::from_millis(100),
        ..Setup::default()
    };
    let worker = Worker::ready(setup).await;
    let mut router = worker.router().await;
    worker.controls.pace(Duration::from_millis(5));
    router.submit(vec![request(1, &[1, 2, 3], 500)]).await;
    worker.controls.begun(1).await;
    worker.stop.drain.cancel();
    let seen = router.finished(1).await;
    assert_eq!(seen.reason(), Reason::Error);
    assert!(seen.message().contains("shut down"), "{}", seen.message());
    assert_eq!(
        seen.finished.expect("finished").output_tokens as usize,
        seen.tokens.len()
    );
    worker.ended().await.expect("a drain is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_at_once() {
    let worker = Worker::ready(Setup::default()).await;
    let mut router = worker.router().await;
    worker.controls.hold();
    router.submit(vec![request(1, &[1, 2, 3], 500)]).await;
    worker.controls.held().await;
    worker.stop.drain.cancel();
    worker.stop.now.cancel();
    let controls = worker.controls.clone();
    assert!(matches!(worker.ended().await, Err(ServeError::Interrupted)));
    controls.release();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_rank_ends_readiness_requests_and_process() {
    let worker = Worker::ready(Setup::default()).await;
    let (mut router, mut health) = (worker.router().await, worker.health().await);
    health.until(ServingStatus::Serving).await;
    worker.controls.hold();
    router
        .submit(vec![request(1, &[1, 2, 3], 20), request(2, &[1, 2, 3], 20)])
        .await;
    worker.controls.held().await;
    worker.controls.break_next();
    worker.controls.release();
    health.until(ServingStatus::NotServing).await;
    for handle in [1, 2] {
        let seen = router.finished(handle).await;
        assert_eq!(seen.reason(), Reason::Error);
        assert_eq!(seen.message(), "rank 1 panicked in step 1: injected");
    }
    let status = router.end().await.expect_err("a failure is no clean end");
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "rank 1 panicked in step 1: injected")
    );
    let error = worker.ended().await.expect_err("a failure");
    assert_eq!(
        (error.to_string().as_str(), error.exit_code()),
        ("rank 1 panicked in step 1: injected", 1)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_that_panics_ends_sessions_and_process() {
    let worker = Worker::ready(Setup::default()).await;
    let mut router = worker.router().await;
    worker.controls.panic_next();
    router.submit(vec![request(1, &[1, 2, 3], 20)]).await;
    assert_eq!(
        router.end().await.expect_err("a failure is no clean end").code(),
        Code::Unavailable
    );
    assert!(matches!(worker.ended().await, Err(ServeError::EngineGone)));
}
