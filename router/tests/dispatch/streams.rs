//! What comes out is what the worker made, whole and in order.

use swallow_router::ask::{Event, Score};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_streams_over_three_workers_are_exact() {
    let workers = [worker(), worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let seed = 7;
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let asks: Vec<Ask> = (0..200)
        .map(|_| {
            let prompt: Vec<u32> = (0..rng.usize(1..400)).map(|_| rng.u32(0..1000)).collect();
            let mut ask = ask(prompt, rng.u32(1..60));
            ask.sampling.seed = Some(rng.u64(..));
            ask.candidates = rng.u32(1..4);
            ask.logprobs = rng.bool().then(|| rng.u32(0..4));
            ask.prompt_logprobs = (rng.u8(0..4) == 0).then_some(2);
            ask
        })
        .collect();
    let runs = futures::future::join_all(asks.iter().map(|ask| house.run(ask.clone()))).await;
    for (ask, answer) in asks.iter().zip(runs) {
        let answer = answer.expect("no fault");
        assert_eq!(answer.tokens.len(), ask.candidates as usize);
        for candidate in 0..ask.candidates {
            let tokens = &answer.tokens[&candidate];
            assert_eq!(*tokens, expected(ask, candidate));
            assert_eq!(
                answer.scores[&candidate],
                if ask.logprobs.is_some() { tokens.len() } else { 0 }
            );
            assert_eq!(answer.finishes[&candidate], Finish::Length);
        }
        assert_eq!(
            answer.prompt_scores,
            ask.prompt_logprobs.map(|_| ask.prompt.len() - 1)
        );
    }
    house.settles(3 * 64).await;
    let seen: Vec<_> = workers.iter().map(MockWorker::seen).collect();
    for seen in &seen {
        assert!(
            seen.requests > 30,
            "every worker had its share: {}",
            seen.requests
        );
        assert!(!seen.overdrawn && seen.duplicates == 0);
        // As many as credits, and the candidates that follow later.
        assert!(
            seen.most_handles <= 64 + 2,
            "handles are used again: {}",
            seen.most_handles
        );
        assert!(seen.frames.len() as u64 <= seen.requests);
    }
    let batched = seen
        .iter()
        .flat_map(|seen| &seen.frames)
        .max()
        .expect("frames came");
    assert!(*batched > 1, "a burst travels in one frame");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scores_belong_to_their_tokens_and_a_stop_token_is_the_last() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    let mut ask = ask([5, 6, 7], 10);
    ask.logprobs = Some(2);
    ask.prompt_logprobs = Some(0);
    let all = expected(&ask, 0);
    ask.stop_token_ids = vec![all[4]];
    let mut generation = house.start(ask.clone()).await;
    let mut events = Vec::new();
    while let Some(event) = generation.next().await {
        events.push(event.expect("no fault"));
    }
    let score = |token: u32, top: usize| Score {
        token,
        logprob: mock_worker::logprob(token),
        rank: token % 5 + 1,
        top: (0..top).map(|i| (i as u32, -(i as f32))).collect(),
    };
    assert_eq!(events[0], Event::Started { cached_tokens: 0 });
    assert_eq!(events[1], Event::PromptScores(vec![score(6, 0), score(7, 0)]));
    let (mut tokens, mut scores) = (Vec::new(), Vec::new());
    for event in &events[2..events.len() - 1] {
        let Event::Tokens {
            tokens: t, scores: s, ..
        } = event
        else {
            panic!("{event:?}")
        };
        tokens.extend_from_slice(t);
        scores.extend_from_slice(s);
    }
    assert_eq!(tokens, all[..5]);
    assert_eq!(
        scores,
        all[..5].iter().map(|&token| score(token, 2)).collect::<Vec<_>>()
    );
    assert_eq!(
        events.last(),
        Some(&Event::Finished {
            candidate: 0,
            why: Finish::StopToken(all[4])
        })
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_can_be_scored_without_generating() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    for prompt in [vec![1], vec![1, 2, 3]] {
        let mut ask = ask(prompt.clone(), 0);
        ask.prompt_logprobs = Some(1);
        let answer = house.run(ask).await.expect("no fault");
        assert_eq!(answer.prompt_scores, Some(prompt.len() - 1));
        assert!(answer.tokens.is_empty());
        assert_eq!(answer.finishes[&0], Finish::Length);
    }
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_comes_with_its_files_once() {
    let workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let entry = house.dispatcher.model("m").expect("discovered");
    let files = entry.files.as_ref().expect("fetched");
    assert_eq!(files.get("tokenizer.json").expect("listed").bytes.len(), 400_000);
    assert_eq!(
        (entry.vocab_size, entry.max_model_len),
        (mock_worker::VOCABULARY, 32_768)
    );
    let fetches: u64 = workers.iter().map(|worker| worker.seen().file_fetches).sum();
    assert_eq!(
        fetches, 1,
        "the second replica's files are known by their digests"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_candidate_stops_and_the_other_goes_on() {
    let worker = worker_with(|config| config.step = Duration::from_millis(5));
    let house = house(&[&worker], |_| {}).await;
    let mut ask = ask([1, 2, 3], 60);
    ask.candidates = 2;
    let mut generation = house.start(ask.clone()).await;
    let mut other = Vec::new();
    let mut stopped = false;
    while let Some(event) = generation.next().await {
        match event.expect("no fault") {
            Event::Tokens { candidate: 0, .. } => {
                assert!(!stopped, "nothing comes of a stopped candidate");
                generation.stop(0);
                stopped = true;
            }
            Event::Tokens {
                candidate: 1, tokens, ..
            } => other.extend(tokens),
            Event::Finished { candidate, .. } => assert_eq!(candidate, 1),
            _ => {}
        }
    }
    assert_eq!(other, expected(&ask, 1));
    let seen = worker
        .until("the stop is confirmed", |seen| seen.confirmed == 1)
        .await;
    assert_eq!(
        seen.cancels[0].1,
        swallow_rpc::worker::v1::cancel::Reason::StopString as i32
    );
    drop(generation);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_cut_and_the_others_go_on() {
    let worker = worker();
    let house = house(&[&worker], |config| config.max_buffered_tokens = 100).await;
    let mut slow = house.start(ask([1, 2], 5_000)).await;
    let quick = ask([3, 4], 400);
    let answer = house.run(quick.clone()).await.expect("no fault");
    assert_eq!(answer.tokens[&0], expected(&quick, 0));
    worker
        .until("the slow one is cancelled", |seen| seen.confirmed == 1)
        .await;
    assert_eq!(
        slow.next().await,
        Some(Err(Failure::SlowClient { buffered: 100 }))
    );
    assert_eq!(slow.next().await, None);
    assert_eq!(house.told().slow_clients, 1);
    drop(slow);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_long_prompts_is_split_into_frames() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    worker.set(|config| config.hold = true);
    let asks: Vec<Ask> = (0..40)
        .map(|i| ask((0..20_000).map(|j| (i * 7 + j) % 5_000), 2))
        .collect();
    let runs = futures::future::join_all(asks.iter().map(|ask| house.run(ask.clone())));
    let release = async {
        let seen = worker.until("all came", |seen| seen.requests == 40).await;
        worker.set(|config| (config.hold, config.step_tokens) = (false, 1 << 20));
        seen
    };
    let (answers, seen) = tokio::join!(runs, release);
    for (ask, answer) in asks.iter().zip(answers) {
        assert_eq!(answer.expect("no fault").tokens[&0], expected(ask, 0));
    }
    assert!(
        seen.frames.iter().all(|&requests| requests <= 13),
        "a frame is bounded: {:?}",
        seen.frames
    );
    house.settles(64).await;
}
