//! Replicas die under requests. What showed nothing starts over elsewhere; what showed something goes on elsewhere,
//! token for token, or fails.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_showed_nothing_moves_when_its_replica_dies() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    workers
        .iter()
        .for_each(|worker| worker.set(|config| config.stall = true));
    let asks: Vec<Ask> = (0..20)
        .map(|i| Ask {
            candidates: 2,
            ..ask([1, 2, i], 8)
        })
        .collect();
    // All are accepted, none has a token.
    let runs = futures::future::join_all(asks.iter().map(|ask| house.start(ask.clone()))).await;
    let on_first = workers[0].live();
    assert!(on_first > 0 && on_first < 40, "both have some: {on_first}");
    workers[0].kill();
    workers[1]
        .until("all are there", |seen| seen.requests == 40)
        .await;
    workers[1].set(|config| config.stall = false);
    for (ask, run) in asks.iter().zip(runs) {
        let answer = answer(run).await.expect("moved");
        for candidate in 0..2 {
            assert_eq!(answer.tokens[&candidate], expected(ask, candidate));
        }
    }
    let seen = workers[1].seen();
    assert_eq!(
        seen.attempts.iter().filter(|&&attempt| attempt == 1).count(),
        on_first
    );
    assert_eq!(house.told().moves, vec![MoveCause::Lost; on_first / 2]);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_started_stream_goes_on_elsewhere_when_its_replica_dies() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let asked = Ask {
        candidates: 3,
        logprobs: Some(2),
        sampling: Sampling {
            seed: Some(7),
            ..Sampling::default()
        },
        ..ask([1, 2], 400)
    };
    let mut generation = house.start(asked.clone()).await;
    let first = next_tokens(&mut generation).await;
    let (its, other) = split(&mut workers, |worker| worker.live() > 0);
    its.kill();
    let answer = answer_after(first, generation).await.expect("it goes on");
    for candidate in 0..3 {
        assert_eq!(answer.tokens[&candidate], expected(&asked, candidate));
        assert_eq!(answer.scores[&candidate], 400, "each token has its own score");
    }
    let seen = other.seen();
    assert_eq!(seen.attempts, [1, 1, 1]);
    assert!(
        seen.tokens < 3 * 400,
        "nothing is generated twice: {}",
        seen.tokens
    );
    assert_eq!(house.told().moves, [MoveCause::Lost]);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn candidates_that_are_over_are_not_run_again() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let asked = Ask {
        candidates: 3,
        ..ask([1, 2], 400)
    };
    let mut generation = house.start(asked.clone()).await;
    let first = next_tokens(&mut generation).await;
    generation.stop(1);
    let (its, other) = split(&mut workers, |worker| worker.live() > 0);
    its.kill();
    let answer = answer_after(first, generation).await.expect("it goes on");
    assert_eq!(other.seen().requests, 2, "candidate 1 was stopped");
    for candidate in [0, 2] {
        assert_eq!(answer.tokens[&candidate], expected(&asked, candidate));
    }
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_started_stream_waits_for_a_replica_and_fails_when_none_comes() {
    let mut worker = worker();
    let house = house(&[&worker], |config| {
        config.max_queue_wait = Duration::from_millis(300)
    })
    .await;
    let mut generation = house.start(ask([1, 2], 100_000)).await;
    next_tokens(&mut generation).await;
    let address = worker.address.to_string();
    worker.kill();
    let failure = loop {
        match generation.next().await.expect("no clean end") {
            Ok(Event::Finished { .. }) => panic!("no clean end"),
            Ok(_) => {}
            Err(failure) => break failure,
        }
    };
    assert!(
        matches!(&failure, Failure::ReplicaLost { replica, .. } if *replica == address),
        "{failure:?}"
    );
    assert_eq!(generation.next().await, None);
    drop(generation);
    house.settles(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_started_stream_that_loses_two_replicas_is_not_tried_on_a_third() {
    let mut workers = [worker(), worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let mut generation = house.start(ask([1, 2], 100_000)).await;
    for attempt in 0..2 {
        next_tokens(&mut generation).await;
        let its = |worker: &&mut MockWorker| worker.seen().attempts == [attempt];
        until("it is placed", || {
            workers.iter().any(|worker| worker.seen().attempts == [attempt])
        })
        .await;
        workers.iter_mut().find(its).expect("it was placed").kill();
    }
    let failure = loop {
        match generation.next().await.expect("no clean end") {
            Ok(Event::Finished { .. }) => panic!("no clean end"),
            Ok(_) => {}
            Err(failure) => break failure,
        }
    };
    assert!(
        matches!(&failure, Failure::ReplicaLost { cause, .. } if cause.contains("second")),
        "{failure:?}"
    );
    drop(generation);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_fails_hands_its_streams_over() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let asked = ask([1, 2], 300);
    let mut generation = house.start(asked.clone()).await;
    let first = next_tokens(&mut generation).await;
    let (its, other) = split(&mut workers, |worker| worker.live() > 0);
    its.fail("rank 1 panicked in step 9");
    let answer = answer_after(first, generation).await.expect("it goes on");
    assert_eq!(answer.tokens[&0], expected(&asked, 0));
    assert_eq!(other.seen().attempts, [1]);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_kills_replicas_is_refused_after_the_second() {
    let workers = [worker(), worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let failure = house
        .run(ask([mock_worker::POISON, 1], 5))
        .await
        .expect_err("it kills");
    assert!(
        matches!(&failure, Failure::ReplicaLost { cause, .. } if cause.contains("second")),
        "{failure:?}"
    );
    let hit = workers.iter().filter(|worker| worker.seen().requests > 0).count();
    assert_eq!(hit, 2, "the third replica lives");
    house.ready("m", 1).await;
    let after = ask([1, 2], 5);
    assert_eq!(
        house.run(after.clone()).await.expect("served").tokens[&0],
        expected(&after, 0)
    );
    house.settles(64).await;
}
