//! Faults under load: five hundred streams and a dead worker, a device that hangs in the middle, replicas that push
//! back, names that do not resolve, a cache as large as caches get.

use swallow_rpc::worker::v1::finished::Reason;

use super::{shim::Shim, *};

/// What came of one stream, and the longest time without anything.
async fn timed(dispatcher: Dispatcher, asked: Ask) -> (Answer, Duration) {
    let mut generation = dispatcher.generate(asked).await.expect("accepted");
    let (mut answer, mut longest, mut last) = (Answer::default(), Duration::ZERO, Instant::now());
    while let Some(event) = generation.next().await {
        longest = longest.max(last.elapsed());
        last = Instant::now();
        match event.expect("no fault") {
            Event::Tokens {
                candidate,
                tokens,
                scores,
            } => {
                answer.tokens.entry(candidate).or_default().extend(tokens);
                *answer.scores.entry(candidate).or_default() += scores.len();
            }
            Event::Finished { candidate, why } => {
                assert!(answer.finishes.insert(candidate, why).is_none(), "finished once");
            }
            Event::Started { cached_tokens } => answer.cached_tokens = cached_tokens,
            Event::PromptScores(_) => panic!("nobody asked"),
        }
    }
    (answer, longest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_streams_survive_one_of_three_workers() {
    let start = || {
        worker_with(|config| {
            (config.credits, config.max_running) = (600, 600);
            config.step = Duration::from_millis(10);
        })
    };
    let mut workers = [start(), start(), start()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let asks: Vec<Ask> = (0..500)
        .map(|i| {
            let mut asked = ask([i, i / 7, 3], 60);
            asked.sampling.seed = (i % 2 == 0).then_some(u64::from(i));
            asked.candidates = 1 + u32::from(i % 5 == 0);
            asked.logprobs = (i % 3 == 0).then_some(2);
            if i % 4 == 0 {
                asked.stop_token_ids = vec![expected(&asked, 0)[40]];
            }
            asked
        })
        .collect();
    let runs = asks
        .iter()
        .map(|asked| tokio::spawn(timed(house.dispatcher.clone(), asked.clone())));
    let runs: Vec<_> = runs.collect();
    workers[0]
        .until("all streams have begun", |seen| seen.tokens > 2_000)
        .await;
    let on_board = workers[0].live();
    assert!(on_board > 50, "{on_board}");
    workers[0].kill();
    let mut gaps = Vec::new();
    for (asked, run) in asks.iter().zip(runs) {
        let (answer, gap) = run.await.expect("no panic");
        gaps.push(gap);
        for candidate in 0..asked.candidates {
            let whole = expected(asked, candidate);
            let stop = whole
                .iter()
                .position(|token| asked.stop_token_ids.contains(token));
            let tokens = &answer.tokens[&candidate];
            assert_eq!(tokens, &whole[..stop.map_or(whole.len(), |at| at + 1)]);
            let scores = if asked.logprobs.is_some() { tokens.len() } else { 0 };
            assert_eq!(answer.scores[&candidate], scores);
        }
    }
    let again: usize = workers[1..].iter().map(|worker| worker.seen().moved_here()).sum();
    assert!(again > 0 && again <= on_board, "{again} of {on_board} ran again");
    let moves = house.told().moves;
    assert!(moves.len() <= again && moves.iter().all(|cause| *cause == MoveCause::Lost));
    gaps.sort_unstable();
    println!(
        "{} moved; gap p50 {:?}, p99 {:?}",
        moves.len(),
        gaps[250],
        gaps[495]
    );
    assert!(gaps[495] < Duration::from_secs(1), "{:?}", gaps[495]);
    house.settles(1200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_hangs_in_a_stream_is_left_after_two_seconds() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |config| config.pong_limit = LIMIT).await;
    let asked = ask([1, 2], 400);
    let mut generation = house.start(asked.clone()).await;
    let first = next_tokens(&mut generation).await;
    let (its, other) = split(&mut workers, |worker| worker.live() > 0);
    its.set(|config| config.wedged = true);
    let wedged = Instant::now();
    let others = async {
        other.until("it goes on there", |seen| seen.tokens > 0).await;
        wedged.elapsed()
    };
    let (answer, after) = tokio::join!(answer_after(first, generation), others);
    assert_eq!(answer.expect("it goes on").tokens[&0], expected(&asked, 0));
    assert!(after < Duration::from_millis(3_500), "{after:?}");
    assert_eq!(other.seen().attempts, [1], "and once");
    assert_eq!(house.told().moves, [MoveCause::Lost]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_replica_of_three_that_pushes_back_costs_a_tenth_at_most() {
    let workers = [worker(), worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    workers[0].set(|config| config.turn_away = Some((usize::MAX, Reason::Busy, "no room".into())));
    let (mut served, load) = (0u64, 300);
    for i in 0..load {
        let answer = house.dispatcher.generate(ask([i, 7], 3)).await;
        if let Ok(generation) = answer {
            super::answer(generation).await.expect("no fault");
            served += 1;
        }
    }
    let tried: u64 = workers.iter().map(|worker| worker.seen().requests).sum();
    let retries = tried - u64::from(load);
    println!("{served} of {load} served, {retries} retries");
    assert_eq!(served, u64::from(load), "the others have room");
    assert!(retries <= u64::from(load) / 10 + 10, "{retries}");
    // Its pushing back is no failure: it is never taken for a broken one.
    assert!(house.told().choices.keys().all(|(_, why)| *why != "probe"));
    house.settles(192).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_looked_up_for_a_session_and_never_for_a_request() {
    let shim = Shim::before(worker()).await;
    let named = format!("localhost:{}", shim.address.port());
    // This one never resolves: its session tries again and again, and nobody else notices.
    let set = vec![replica(&named, &["m"]), replica("nowhere.invalid:1", &["m"])];
    let house = house_of(set, |_| {});
    house.ready("m", 1).await;
    for i in 0..100 {
        house.run(ask([i], 2)).await.expect("no fault");
    }
    assert_eq!(shim.accepted(), 1, "one connection carries all");
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_of_a_hundred_thousand_blocks_is_known_in_a_moment() {
    let blocks = 100_000;
    let worker = worker_with(|config| (config.n_blocks, config.cached_blocks) = (blocks, blocks));
    let house = house(&[&worker], |_| {}).await;
    let known = || house.dispatcher.counts().cached_keys == blocks as usize;
    until("the first snapshot is in", known).await;
    let mut best = Duration::MAX;
    for round in 2..5 {
        worker.break_sessions();
        worker.until("it is back", |seen| seen.sessions == round).await;
        let welcome = Instant::now();
        house.ready("m", 1).await;
        until("the snapshot is in", known).await;
        best = best.min(welcome.elapsed());
    }
    println!("{best:?}");
    assert!(best < Duration::from_millis(200), "{best:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_of_the_next_version_is_understood_as_far_as_this_one_goes() {
    let worker = worker_with(|config| config.unknown_frames = true);
    let house = house(&[&worker], |_| {}).await;
    let asked = ask([1, 2], 20);
    assert_eq!(
        house.run(asked.clone()).await.expect("served").tokens[&0],
        expected(&asked, 0)
    );
    assert_eq!(
        worker.seen().sessions,
        1,
        "frames that nobody knows end no session"
    );
    house.settles(64).await;
}
