//! One router: what becomes of its requests.

use std::time::Duration;

use prost_types::Duration as WireDuration;
use swallow_rpc::worker::v1::{
    GetModelFileRequest, Hello, Request, Submit, finished::Reason, session_request::Frame,
};
use tonic::Code;

use crate::{
    fake::echo,
    harness::{BLOCK_TOKENS, EOS, Router, Setup, VOCAB, Worker, hello, request, soon},
};

#[tokio::test(flavor = "multi_thread")]
async fn welcome_says_what_is_served() {
    let worker = Worker::ready(Setup::default()).await;
    let mut router = worker.router().await;
    let welcome = router.welcome.clone();
    assert_eq!((welcome.protocol, welcome.replica_id.as_str()), (1, "replica-0"));
    assert_eq!(welcome.boot_id, [9; 16]);
    assert!(welcome.submit_credits > 0);
    let model = welcome.model.expect("a model");
    assert_eq!(model.served_names, ["echo", "alias"]);
    assert_eq!(
        (model.max_model_len, model.vocab_size, model.eos_token_ids),
        (512, VOCAB, vec![EOS])
    );
    let files: Vec<_> = model
        .files
        .iter()
        .map(|file| (file.name.as_str(), file.size_bytes))
        .collect();
    assert_eq!(files, [("config.json", 2), ("tokenizer.json", 600_000)]);
    let capacity = welcome.capacity.expect("a capacity");
    assert_eq!(
        (capacity.tensor_parallel, capacity.max_running, capacity.n_blocks),
        (2, 4, 256)
    );
    assert_eq!(
        (capacity.block_tokens, capacity.max_step_tokens),
        (BLOCK_TOKENS, 32)
    );
    router
        .until("a load report", |router| router.load.kv_blocks_total == 256)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_come_in_order_and_every_end_has_its_reason() {
    let worker = Worker::ready(Setup {
        max_running: 8,
        max_waiting: 8,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    let stop = Request {
        stop_token_ids: vec![13],
        ..request(2, &[11, 12, 13, 14], 50)
    };
    let past_eos = Request {
        ignore_eos: true,
        ..request(3, &[21, EOS, 22], 7)
    };
    let at_least = Request {
        min_tokens: 3,
        ..request(4, &[EOS, 31], 50)
    };
    router
        .submit(vec![request(1, &[1, 2, EOS, 3], 50), stop, past_eos, at_least])
        .await;

    let seen = router.finished(1).await;
    assert_eq!(seen.tokens, [1, 2, EOS]);
    assert_eq!(
        (
            seen.reason(),
            seen.finished.as_ref().and_then(|end| end.stop_token_id)
        ),
        (Reason::Eos, Some(EOS))
    );
    assert_eq!(seen.finished.expect("finished").output_tokens, 3);
    let seen = router.finished(2).await;
    assert_eq!(seen.tokens, [11, 12, 13]);
    assert_eq!(
        (seen.reason(), seen.finished.and_then(|end| end.stop_token_id)),
        (Reason::StopToken, Some(13))
    );
    let seen = router.finished(3).await;
    assert_eq!(seen.tokens, [21, EOS, 22, 21, EOS, 22, 21]);
    assert_eq!(seen.reason(), Reason::Length);
    let seen = router.finished(4).await;
    assert_eq!(
        seen.tokens,
        [EOS, 31, EOS],
        "the echo cannot be kept from saying eos early; it only ends later"
    );
    assert_eq!(seen.reason(), Reason::Eos);
    worker.controls.empty().await;
    // One frame a step: all four ran side by side.
    assert!(
        router.step_frames.windows(2).all(|two| two[0] < two[1]),
        "{:?}",
        router.step_frames
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_carry_their_positions() {
    let worker = Worker::ready(Setup::default()).await;
    let mut router = worker.router().await;
    let prompt: Vec<u32> = (100..150).collect(); // Longer than one step may be.
    let scored = Request {
        logprobs: Some(2),
        prompt_logprobs: Some(0),
        ..request(1, &prompt, 3)
    };
    let prompt_alone = Request {
        prompt_logprobs: Some(1),
        ..request(2, &prompt, 0)
    };
    router.submit(vec![scored, prompt_alone]).await;

    let seen = router.finished(1).await;
    let of_prompt = (1..50).map(|at| (at, prompt[at as usize], -(at as f32), 0));
    let of_output = (0..3).map(|i| (50 + i, prompt[i as usize], -((50 + i) as f32), 2));
    assert_eq!(
        seen.scores,
        of_prompt.clone().chain(of_output).collect::<Vec<_>>()
    );
    let seen = router.finished(2).await;
    assert_eq!((seen.reason(), seen.tokens.len()), (Reason::Length, 0));
    assert_eq!(
        seen.scores,
        of_prompt
            .map(|(at, id, logprob, _)| (at, id, logprob, 1))
            .collect::<Vec<_>>()
    );
    let plain = request(3, &prompt, 2);
    router.submit(vec![plain]).await;
    let seen = router.finished(3).await;
    assert_eq!(seen.scores, [], "nobody asked");
    assert_eq!(
        seen.accepted.expect("accepted").cached_tokens,
        48,
        "whole blocks, and one token is left to compute"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_is_confirmed_and_frees_everything() {
    let worker = Worker::ready(Setup {
        max_running: 1,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    worker.controls.hold();
    router
        .submit(vec![request(1, &[1, 2, 3], 400), request(2, &[4, 5, 6], 400)])
        .await;
    worker.controls.held().await;
    // One runs, one waits; both are cancelled while a step is under way, and an unknown one with them.
    router.cancel(&[2, 1, 77]).await;
    worker.controls.pace(Duration::from_millis(5));
    worker.controls.release();
    for handle in [1, 2] {
        assert_eq!(router.finished(handle).await.reason(), Reason::Cancelled);
    }
    worker.controls.empty().await;
    router
        .until("an empty worker", |router| {
            let load = router.load;
            load.seq > 0 && (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
        })
        .await;
    assert!(!router.seen.contains_key(&77));
    assert!(router.seen[&1].tokens.len() < 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_that_runs_out_ends_the_request() {
    let worker = Worker::ready(Setup {
        max_running: 1,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    worker.controls.pace(Duration::from_millis(2));
    let budget = |seconds, nanos| Some(WireDuration { seconds, nanos });
    let running = Request {
        budget: budget(0, 50_000_000),
        ..request(1, &[1, 2, 3], 500)
    };
    let waiting = Request {
        budget: budget(0, 40_000_000),
        ..request(2, &[4, 5, 6], 500)
    };
    router.submit(vec![running, waiting]).await;
    let seen = router.finished(1).await;
    assert_eq!(seen.reason(), Reason::Deadline);
    assert!(!seen.tokens.is_empty() && seen.tokens.len() < 500);
    assert_eq!(router.finished(2).await.reason(), Reason::Deadline);
    let spent = Request {
        budget: budget(-1, 0),
        ..request(3, &[1, 2, 3], 5)
    };
    router.submit(vec![spent]).await;
    assert_eq!(router.finished(3).await.reason(), Reason::Deadline);
    worker.controls.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_request_is_rejected_and_its_neighbours_run() {
    let worker = Worker::ready(Setup::default()).await;
    let mut router = worker.router().await;
    let bad = Request {
        prompt_ids: vec![VOCAB],
        ..request(1, &[1], 5)
    };
    let long = request(2, &[1; 500], 13);
    router.submit(vec![bad, request(3, &[5, 6], 2), long]).await;
    assert_eq!(router.finished(1).await.reason(), Reason::Rejected);
    assert_eq!(
        router.seen[&1].message(),
        "prompt_ids[0] is 1000; ids are below 1000"
    );
    assert_eq!(router.finished(2).await.reason(), Reason::Rejected);
    assert_eq!(
        router.seen[&2].message(),
        "the prompt has 500 tokens and max_tokens is 13, together more than the model's 512; shorten one of them"
    );
    assert_eq!(router.finished(3).await.tokens, [5, 6]);
    // A handle is free once its Finished was sent.
    router.seen.clear();
    router
        .submit(vec![Request {
            attempt: 1,
            ..request(3, &[8, 9], 1)
        }])
        .await;
    assert_eq!(router.finished(3).await.tokens, [8]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_never_fit_is_rejected() {
    let worker = Worker::ready(Setup {
        n_blocks: 10,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    router.submit(vec![request(1, &[1, 2, 3], 100)]).await;
    let seen = router.finished(1).await;
    assert_eq!(seen.reason(), Reason::Rejected);
    assert!(seen.message().contains("blocks"), "{}", seen.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_never_runs_twice() {
    let worker = Worker::ready(Setup::default()).await;
    let mut first = worker.router().await;
    let mut second = worker.router().await;
    first.submit(vec![request(1, &[1, 2], 2)]).await;
    assert_eq!(first.finished(1).await.reason(), Reason::Length);
    second.submit(vec![request(1, &[1, 2], 2)]).await;
    let seen = second.finished(1).await;
    assert_eq!(seen.reason(), Reason::Rejected);
    assert!(seen.message().contains("raise attempt"), "{}", seen.message());
    second.seen.clear();
    let again = Request {
        attempt: 1,
        ..request(1, &[1, 2], 2)
    };
    let sibling = Request {
        handle: 2,
        candidate: 1,
        ..request(1, &[1, 2], 2)
    };
    second.submit(vec![again, sibling]).await;
    assert_eq!(second.finished(1).await.reason(), Reason::Length);
    assert_eq!(second.finished(2).await.reason(), Reason::Length);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_protocol_is_kept_or_the_session_ends() {
    let worker = Worker::ready(Setup::default()).await;
    let refused = |outcome: Result<Router, tonic::Status>| outcome.err().expect("refused");
    let status = refused(
        worker
            .open(Hello {
                protocol: 2,
                ..hello()
            })
            .await,
    );
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("protocol 2, this worker 1"), "{status}");
    let status = refused(Router::open(worker.client().await, Frame::Submit(Submit::default())).await);
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "the first frame must be Hello")
    );

    let mut twice = worker.router().await;
    twice.send(Frame::Hello(hello())).await;
    assert_eq!(
        twice.end().await.expect_err("ended").code(),
        Code::InvalidArgument
    );

    let mut same_handle = worker.router().await;
    worker.controls.pace(Duration::from_millis(5));
    same_handle.submit(vec![request(1, &[1, 2], 400)]).await;
    same_handle
        .submit(vec![Request {
            attempt: 1,
            ..request(1, &[1, 2], 400)
        }])
        .await;
    let status = same_handle.end().await.expect_err("ended");
    assert_eq!(
        status.message(),
        "handle 1 is in use; give each live request its own"
    );
    worker.controls.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn model_files_come_by_digest_in_chunks() {
    let worker = Worker::ready(Setup::default()).await;
    let mut client = worker.client().await;
    let digest = "bb".to_owned();
    let mut chunks = client
        .get_model_file(GetModelFileRequest { digest })
        .await
        .expect("known")
        .into_inner();
    let mut whole = Vec::new();
    while let Some(part) = soon("a chunk", chunks.message()).await.expect("a chunk") {
        assert!(part.chunk.len() <= 256 * 1024);
        whole.extend(part.chunk);
    }
    assert_eq!(whole, vec![7; 600_000]);
    let unknown = client
        .get_model_file(GetModelFileRequest { digest: "cc".into() })
        .await;
    assert_eq!(unknown.expect_err("unknown").code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn preemption_loses_and_doubles_nothing() {
    // Blocks for about two of the four at full length.
    let worker = Worker::ready(Setup {
        n_blocks: 30,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    let prompts: Vec<Vec<u32>> = (0..4)
        .map(|n| (0..9).map(|i| 100 * (n + 1) + i).collect())
        .collect();
    for (handle, prompt) in (1..).zip(&prompts) {
        router.until("a credit", |router| router.credits > 0).await;
        let scored = Request {
            logprobs: Some(0),
            prompt_logprobs: Some(0),
            ..request(handle, prompt, 60)
        };
        router.submit(vec![scored]).await;
    }
    for (handle, prompt) in (1..).zip(&prompts) {
        let seen = router.finished(handle).await;
        let expected: Vec<u32> = (0..60).map(|i| echo(prompt, i)).collect();
        assert_eq!(seen.tokens, expected);
        let positions: Vec<u32> = seen.scores.iter().map(|(position, ..)| *position).collect();
        assert_eq!(positions, (1..69).collect::<Vec<_>>());
    }
    router.ping(1).await;
    router
        .until("the last load report", |router| router.load.preemptions_total > 0)
        .await;
    worker.controls.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_whose_client_does_not_read_waits_for_it() {
    let worker = Worker::ready(Setup {
        max_running: 1,
        ..Setup::default()
    })
    .await;
    let mut router = worker.router().await;
    assert!(router.welcome.windows);
    let slow = Request {
        window_tokens: 5,
        ..request(1, &[1, 2, 3], 12)
    };
    // Resumed: two of its five tokens came from another replica.
    let moved = Request {
        window_tokens: 5,
        resumed_tokens: 2,
        ..request(2, &[1, 2, 3, 1, 2], 12)
    };
    router.submit(vec![slow, moved, request(3, &[4, 5], 6)]).await;
    // The only slot is free for the others while each of the first two waits.
    assert_eq!(router.finished(3).await.reason(), Reason::Length);
    router
        .until("both windows are full", |router| {
            let came = |handle| router.seen.get(&handle).map_or(0, |seen| seen.tokens.len());
            (came(1), came(2)) == (5, 3)
        })
        .await;
    router.ping(1).await;
    assert!(router.seen[&1].finished.is_none() && router.seen[&2].finished.is_none());
    let window = |handle: u32, tokens| {
        Frame::Window(swallow_rpc::worker::v1::Window {
            handle: vec![handle, 77],
            output_tokens: vec![tokens, 9],
        })
    };
    router.send(window(1, 8)).await;
    router
        .until("it goes on", |router| router.seen[&1].tokens.len() == 8)
        .await;
    router.send(window(1, 100)).await;
    router.send(window(2, 100)).await;
    let whole: Vec<u32> = (0..12).map(|index| echo(&[1, 2, 3], index)).collect();
    assert_eq!(router.finished(1).await.tokens, whole);
    assert_eq!(router.finished(2).await.tokens.len(), 10);
}
