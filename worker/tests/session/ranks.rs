//! A real group whose rank panics or stalls: what routers and the process see of it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use swallow_rpc::worker::v1::{Request, finished::Reason};
use swallow_worker::{
    checkpoint::Checkpoint,
    device::cuda::Options,
    group::{Fault, FaultKind, Group, GroupSpec, Machine},
    serve::Loaded,
    state::{Memory, State},
};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    fake::Controls,
    harness::{Setup, Worker, limits, model, request},
};

/// Ranks of the tiny model; rank 1 fails in step 3.
async fn failing(kind: FaultKind, step_timeout: Duration) -> Worker {
    let setup = Setup::default();
    let sizes = limits(&setup);
    let to_usize = |n: u32| usize::try_from(n).expect("small");
    let spec = GroupSpec {
        machine: Machine::Cpu,
        tensor_parallel: 2,
        rank_alone: false,
        threads: 2,
        block_tokens: to_usize(sizes.block_tokens),
        n_blocks: to_usize(sizes.n_blocks),
        max_running: to_usize(sizes.max_running),
        max_step_tokens: to_usize(sizes.max_step_tokens),
        max_model_len: to_usize(sizes.max_model_len),
        step_timeout,
        steps_ahead: 1,
        gpu: Options::default(),
        random_kv: false,
        fault: Some(Fault {
            rank: 1,
            step: 3,
            kind,
        }),
    };
    let (limits, facts, door) = model(&setup);
    let load = move |state: &State| {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny");
        let checkpoint = Arc::new(Checkpoint::open(&folder, 2)?);
        let runner = Group::start(checkpoint, spec, state.loading())?;
        Ok(Loaded {
            runner,
            limits,
            pace: None,
            facts,
            door,
            measured: Memory::default(),
        })
    };
    let worker = Worker::launch(&setup, Controls::default(), load).await;
    worker.health().await.until(ServingStatus::Serving).await;
    worker
}

async fn ends_naming(worker: Worker, named: &[&str]) {
    let (mut router, mut health) = (worker.router().await, worker.health().await);
    let endless = |handle, prompt: &[u32]| Request {
        ignore_eos: true,
        ..request(handle, prompt, 400)
    };
    router
        .submit(vec![endless(1, &[1, 2, 3]), endless(2, &[4, 5, 6])])
        .await;
    for handle in [1, 2] {
        let seen = router.finished(handle).await;
        assert_eq!(seen.reason(), Reason::Error);
        assert!(
            named.iter().all(|name| seen.message().contains(name)),
            "{}",
            seen.message()
        );
        assert!(
            (1..=2).contains(&seen.tokens.len()),
            "two steps were done: {seen:?}"
        );
    }
    health.until(ServingStatus::NotServing).await;
    assert_eq!(
        router.end().await.expect_err("a failure").code(),
        Code::Unavailable
    );
    let error = worker.ended().await.expect_err("a failure");
    assert_eq!(error.exit_code(), 1);
    assert!(
        named.iter().all(|name| error.to_string().contains(name)),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_panics_is_named() {
    let worker = failing(FaultKind::Panic, Duration::from_secs(30)).await;
    ends_naming(worker, &["rank 1", "step 3"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_stalls_is_named() {
    let worker = failing(FaultKind::Stall, Duration::from_millis(500)).await;
    ends_naming(worker, &["rank 1", "step 3", "0.5 s"]).await;
}
