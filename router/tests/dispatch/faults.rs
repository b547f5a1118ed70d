//! Replicas hang, break, restart, push back and lie; nothing of it ends as if it were whole.

use swallow_rpc::worker::v1::finished::Reason;

use super::{shim::Shim, *};

/// Asks until a worker has finished so many.
async fn until_served(house: &House, worker: &MockWorker, finished: u64) {
    let started = Instant::now();
    while worker.seen().finished < finished {
        assert!(started.elapsed() < LIMIT, "it is never chosen again");
        house
            .run(ask([fastrand::u32(0..1000)], 2))
            .await
            .expect("no fault");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wedged_engine_is_lost_though_its_connection_lives() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |config| {
        config.pong_limit = Duration::from_millis(400)
    })
    .await;
    workers
        .iter()
        .for_each(|worker| worker.set(|config| config.hold = true));
    let asked = ask([1, 2, 3], 10);
    let run = tokio::spawn({
        let dispatcher = house.dispatcher.clone();
        let asked = asked.clone();
        async move { answer(dispatcher.generate(asked).await.expect("accepted")).await }
    });
    until("it is at a worker", || {
        workers.iter().any(|worker| worker.live() > 0)
    })
    .await;
    let (its, other) = split(&mut workers, |worker| worker.live() > 0);
    other.set(|config| config.hold = false);
    its.set(|config| config.wedged = true);
    let answer = run.await.expect("no panic").expect("moved");
    assert_eq!(answer.tokens[&0], expected(&asked, 0));
    assert_eq!(other.seen().attempts, [1]);
    assert_eq!(house.told().moves, [MoveCause::Lost]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_gone_without_a_word_is_noticed() {
    // Nobody answers pings of either kind; the connection stays open.
    let mut shim = Shim::before(worker()).await;
    let house = house_of(vec![replica(&shim.address.to_string(), &["m"])], |config| {
        config.max_queue_wait = Duration::from_millis(300);
    });
    house.ready("m", 1).await;
    let mut generation = house.start(ask([1, 2], 1_000_000)).await;
    while !matches!(generation.next().await, Some(Ok(Event::Tokens { .. }))) {}
    let silent = Instant::now();
    shim.swallow();
    let failure = loop {
        match generation.next().await.expect("no clean end") {
            Ok(_) => {}
            Err(failure) => break failure,
        }
    };
    assert!(matches!(&failure, Failure::ReplicaLost { .. }), "{failure:?}");
    assert!(
        silent.elapsed() < Duration::from_secs(12),
        "{:?}",
        silent.elapsed()
    );
    drop(generation);
    house.settles(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_worker_is_found_again_with_an_empty_cache() {
    let mut worker = worker();
    let house = house(&[&worker], |_| {}).await;
    let prompt: Vec<u32> = (0..160).collect();
    house.run(ask(prompt.clone(), 2)).await.expect("no fault");
    assert_eq!(
        house
            .run(ask(prompt.clone(), 2))
            .await
            .expect("no fault")
            .cached_tokens,
        159
    );
    until("its cache is known", || {
        house.dispatcher.counts().cached_keys == 10
    })
    .await;
    let address = worker.address;
    worker.kill();
    house.ready("m", 0).await;
    let worker = MockWorker::start_at(address, Config::default());
    house.ready("m", 1).await;
    assert_eq!(
        house.dispatcher.counts().cached_keys,
        0,
        "a new process has an empty cache"
    );
    assert_eq!(
        house.run(ask(prompt, 2)).await.expect("no fault").cached_tokens,
        0
    );
    assert_eq!(worker.seen().sessions, 1);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_session_is_made_again_and_its_requests_are_tried_again() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    worker.set(|config| config.hold = true);
    let asked = ask([1, 2, 3], 10);
    let run = house.run(asked.clone());
    let cut = async {
        worker.until("it waits", |seen| seen.requests == 1).await;
        worker.break_sessions();
        worker.set(|config| config.hold = false);
    };
    let (answer, ()) = tokio::join!(run, cut);
    assert_eq!(answer.expect("tried again").tokens[&0], expected(&asked, 0));
    assert_eq!(worker.seen().attempts, [0, 1], "never the same attempt twice");
    house.settles(64).await;
}

/// Requests that were not sent, that wait, that run and that are done, whichever there are when the session breaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_breaks_at_any_moment_runs_no_attempt_twice() {
    const REQUESTS: u32 = 30;
    let mut again = 0;
    for breaks_after in (1..=u64::from(REQUESTS)).step_by(3) {
        let worker = worker_with(|config| (config.max_running, config.credits) = (4, 12));
        let house = house(&[&worker], |_| {}).await;
        let asks: Vec<Ask> = (0..REQUESTS).map(|i| ask([i, 5, 7], 12)).collect();
        let runs = asks.iter().map(|asked| {
            let (dispatcher, asked) = (house.dispatcher.clone(), asked.clone());
            tokio::spawn(async move { answer(dispatcher.generate(asked).await.expect("accepted")).await })
        });
        let runs: Vec<_> = runs.collect();
        worker
            .until("so many were sent", |seen| seen.requests >= breaks_after)
            .await;
        worker.break_sessions();
        for (asked, run) in asks.iter().zip(runs) {
            let answer = run.await.expect("no panic").expect("tried again");
            assert_eq!(answer.tokens[&0], expected(asked, 0));
        }
        let seen = worker.seen();
        assert_eq!(seen.duplicates, 0, "never the same attempt twice");
        assert!(
            seen.attempts.iter().all(|&attempt| attempt <= 1),
            "{:?}",
            seen.attempts
        );
        again += seen.attempts.iter().filter(|&&attempt| attempt == 1).count();
        house.settles(12).await;
    }
    assert!(again >= 10, "{again} were tried again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_goes_away_finishes_its_streams_and_gets_no_new_ones() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let running = ask([1, 2], 500);
    let generation = house.start(running.clone()).await;
    let (its, other) = split(&mut workers, |worker| worker.live() > 0);
    its.go_away();
    house.ready("m", 1).await;
    for i in 0..10 {
        let asked = ask([1, 2, i], 5);
        assert_eq!(
            house.run(asked.clone()).await.expect("no fault").tokens[&0],
            expected(&asked, 0)
        );
    }
    assert_eq!(other.seen().requests, 10);
    assert_eq!(
        answer(generation).await.expect("it finishes").tokens[&0],
        expected(&running, 0)
    );
    its.until("goodbye", |seen| seen.goodbyes == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_room_after_all_sends_a_request_elsewhere_and_is_no_failure() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let busy = |n| Some((n, Reason::Busy, "no room".to_owned()));
    workers
        .iter()
        .for_each(|worker| worker.set(|config| config.turn_away = busy(1)));
    let asked = ask([1, 2], 5);
    // Both turn it away once: nobody is left to try.
    let refusal = house.refused(asked.clone()).await;
    assert!(matches!(refusal, Refusal::QueueFull { .. }), "{refusal:?}");
    assert_eq!(house.told().moves, [MoveCause::Busy, MoveCause::Busy]);

    let (busy_one, other) = workers.split_at_mut(1);
    busy_one[0].set(|config| config.turn_away = busy(usize::MAX));
    for i in 0..8 {
        let asked = ask([1, 2, i], 5);
        assert_eq!(
            house.run(asked.clone()).await.expect("moved").tokens[&0],
            expected(&asked, 0)
        );
    }
    assert_eq!(other[0].seen().finished, 8);
    // However often: a replica that pushes back is healthy, so it is asked again as soon as it may have room.
    busy_one[0].set(|config| config.turn_away = None);
    until_served(&house, &busy_one[0], 1).await;
    house.settles(128).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_budget_stops_a_storm() {
    let workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let busy = Some((usize::MAX, Reason::Busy, "no room".to_owned()));
    workers
        .iter()
        .for_each(|worker| worker.set(|config| config.turn_away = busy.clone()));
    for i in 0..200 {
        house.refused(ask([1, i], 5)).await;
    }
    let tried: u64 = workers.iter().map(|worker| worker.seen().requests).sum();
    assert!(
        (200..=232).contains(&tried),
        "retries are a tenth of the load and ten: {tried}"
    );
    house.settles(128).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_refuses_is_refused_with_its_words() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    worker.set(|config| config.turn_away = Some((1, Reason::Rejected, "prompt_ids: too long by 5".into())));
    assert_eq!(
        house.refused(ask([1], 5)).await,
        Refusal::Invalid("prompt_ids: too long by 5".into())
    );
    worker.set(|config| config.turn_away = Some((1, Reason::Error, "step 9 failed".into())));
    let failure = house
        .run(ask([1], 5))
        .await
        .expect_err("it failed, and there is no other");
    assert!(
        matches!(&failure, Failure::ReplicaLost { cause, .. } if cause.contains("step 9 failed")),
        "{failure:?}"
    );
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_keeps_failing_rests() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let (bad, good) = split(&mut workers, |_| true);
    bad.set(|config| config.turn_away = Some((usize::MAX, Reason::Error, "broken".into())));
    while bad.seen().requests < 3 {
        house
            .run(ask([fastrand::u32(0..1000)], 2))
            .await
            .expect("the other one goes on with it");
    }
    // Now and then one request tries it; the others are spared.
    let before = bad.seen().requests;
    for i in 0..50 {
        house.run(ask([1, i], 2)).await.expect("no fault");
    }
    let probes = (bad.seen().requests - before) as usize;
    assert!(probes <= 4, "rests double: {probes}");
    assert!(good.seen().finished >= 46);
    // It works again: one more probe, and it is back.
    bad.set(|config| config.turn_away = None);
    until_served(&house, bad, 2).await;
    let told = house.told();
    let tried = told.choices.get(&(bad.address.to_string(), "probe"));
    assert_eq!(tried, Some(&(probes + 1)), "{:?}", told.choices);
    house.settles(128).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_serves_something_else_is_not_used() {
    let stranger = worker_with(|config| config.served_names = vec!["other".into()]);
    let newer = worker_with(|config| config.protocol = 2);
    let corrupt = worker_with(|config| config.corrupt_files = true);
    let set = [&stranger, &newer, &corrupt].map(|worker| replica(&worker.address.to_string(), &["m"]));
    let house = house_of(set.into(), |_| {});
    for worker in [&stranger, &newer, &corrupt] {
        worker.until("it was asked", |seen| seen.sessions >= 1).await;
    }
    let refusal = house
        .refused(Ask {
            max_queue_wait: Some(Duration::from_millis(300)),
            ..ask([1], 5)
        })
        .await;
    assert!(matches!(refusal, Refusal::NoReplica { .. }), "{refusal:?}");
    assert_eq!(house.dispatcher.model("m").expect("known").files, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_with_other_files_wait_until_the_old_ones_are_gone() {
    let mut old = worker();
    let new = worker_with(|config| {
        config.files.insert("chat_template.jinja".into(), b"new".to_vec());
    });
    let house_replicas = [&old, &new].map(|worker| replica(&worker.address.to_string(), &["m"]));
    let (sets, changes) = tokio::sync::watch::channel(vec![house_replicas[0].clone()]);
    let (dispatcher, supervisor) = Dispatcher::start(config(), changes, Arc::new(()));
    let house = House {
        dispatcher,
        supervisor,
        notes: Arc::default(),
    };
    house.ready("m", 1).await;
    let files = || {
        house
            .dispatcher
            .model("m")
            .expect("known")
            .files
            .clone()
            .expect("fetched")
    };
    assert!(files().get("chat_template.jinja").is_none());
    sets.send_replace(house_replicas.to_vec());
    new.until("its files were fetched", |seen| seen.file_fetches >= 1)
        .await;
    for i in 0..10 {
        house.run(ask([1, i], 2)).await.expect("no fault");
    }
    assert_eq!(new.seen().requests, 0, "prompts are made for the old files");
    old.kill();
    until("the new files are the model's", || {
        files().get("chat_template.jinja").is_some()
    })
    .await;
    house.ready("m", 1).await;
    house.run(ask([1], 2)).await.expect("no fault");
    assert_eq!(new.seen().requests, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_leaves_discovery_finishes_its_streams() {
    let workers = [worker(), worker()];
    let set: Vec<Replica> = workers
        .iter()
        .map(|worker| replica(&worker.address.to_string(), &["m"]))
        .collect();
    let (sets, changes) = tokio::sync::watch::channel(set.clone());
    let notes = Arc::new(Notes::default());
    let (dispatcher, supervisor) =
        Dispatcher::start(config(), changes, Arc::clone(&notes) as Arc<dyn Observer>);
    let house = House {
        dispatcher,
        supervisor,
        notes,
    };
    house.ready("m", 2).await;
    let running = ask([1, 2], 500);
    let generation = house.start(running.clone()).await;
    let leaves = workers
        .iter()
        .position(|worker| worker.live() > 0)
        .expect("one has it");
    sets.send_replace(vec![set[1 - leaves].clone()]);
    house.ready("m", 1).await;
    house.run(ask([3], 2)).await.expect("the other serves");
    assert_eq!(
        answer(generation).await.expect("it finishes").tokens[&0],
        expected(&running, 0)
    );
    workers[leaves].until("goodbye", |seen| seen.goodbyes == 1).await;
    until("it is gone", || {
        house.told().states.get(&set[leaves].id) == Some(&ReplicaState::Gone)
    })
    .await;
    // And back.
    sets.send_replace(set);
    house.ready("m", 2).await;
    house.settles(128).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_lost_a_token_does_not_look_whole() {
    let worker = worker_with(|config| config.miscount = true);
    let house = house(&[&worker], |_| {}).await;
    let failure = house.run(ask([1, 2], 5)).await.expect_err("the counts differ");
    assert!(
        matches!(&failure, Failure::Worker(text) if text.contains("4 tokens, 5 came")),
        "{failure:?}"
    );
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_random_life_leaves_nothing_behind() {
    let seed = 11;
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut workers: Vec<MockWorker> = (0..3)
        .map(|_| worker_with(|config| (config.credits, config.max_running) = (24, 16)))
        .collect();
    let house = house(&workers.iter().collect::<Vec<_>>(), |config| {
        config.max_buffered_tokens = 200
    })
    .await;
    let (mut whole, mut failed, mut refused, mut hit) = (0, 0, 0, 0);
    for round in 0..6 {
        let runs = (0..60).map(|i| {
            let mut ask = ask((0..rng.u32(1..200)).map(|j| j % 40), rng.u32(1..80));
            ask.sampling.seed = Some(round * 100 + i);
            ask.candidates = rng.u32(1..3);
            ask.deadline =
                (rng.u8(0..5) == 0).then(|| Instant::now() + Duration::from_millis(rng.u64(1..80)));
            let leaves = (rng.u8(0..4) == 0).then(|| rng.usize(0..30));
            let dispatcher = house.dispatcher.clone();
            tokio::spawn(async move { (ask.clone(), run_or_leave(&dispatcher, ask, leaves).await) })
        });
        let runs: Vec<_> = runs.collect();
        let victim = rng.usize(0..3);
        // It may rest all the while, for what was done to it before.
        let seen = workers[victim]
            .until("it is in use, or the others have done it all", |seen| {
                seen.tokens > 100 || runs.iter().all(tokio::task::JoinHandle::is_finished)
            })
            .await;
        hit += usize::from(seen.tokens > 100);
        match round % 3 {
            0 => workers[victim].break_sessions(),
            1 => workers[victim].go_away(),
            _ => workers[victim].set(|config| config.turn_away = Some((5, Reason::Busy, "full".into()))),
        }
        for run in runs {
            match run.await.expect("no panic") {
                (ask, Ok(Some(answer))) => {
                    whole += 1;
                    (0..ask.candidates).for_each(|c| assert_eq!(answer.tokens[&c], expected(&ask, c)));
                }
                (_, Ok(None)) => {}
                (_, Err(Ok(_failure))) => failed += 1,
                (_, Err(Err(_refusal))) => refused += 1,
            }
        }
        let address = workers[victim].address;
        let replacement = |config: &mut Config| (config.credits, config.max_running) = (24, 16);
        workers[victim].kill();
        let mut config = Config::default();
        replacement(&mut config);
        workers[victim] = MockWorker::start_at(address, config);
        let fresh = &workers[victim];
        fresh.until("it is back", |seen| seen.sessions == 1).await;
        house.ready("m", 3).await;
        house.settles(72).await;
        assert!(workers.iter().all(|worker| worker.live() == 0));
    }
    println!("{whole} whole, {failed} failed, {refused} refused");
    assert!(whole > 100);
    assert!(
        hit >= 3,
        "only {hit} workers were in use when something was done to them"
    );
}

/// `Ok(None)`: the client left after so many events.
async fn run_or_leave(
    dispatcher: &Dispatcher,
    ask: Ask,
    leaves: Option<usize>,
) -> Result<Option<Answer>, Result<Failure, Refusal>> {
    let mut generation = dispatcher.generate(ask).await.map_err(Err)?;
    if let Some(events) = leaves {
        for _ in 0..events {
            let _ = generation.next().await;
        }
        return Ok(None);
    }
    answer(generation).await.map(Some).map_err(Ok)
}
