//! Requests go where their prefix is, until that replica has too much to do.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_stays_where_its_prefix_is() {
    let workers = [worker(), worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let mut prompt: Vec<u32> = (0..320).collect();
    for turn in 0..6 {
        let answer = house.run(ask(prompt.clone(), 4)).await.expect("no fault");
        if turn > 0 {
            assert!(
                answer.cached_tokens as usize >= prompt.len() - 48,
                "turn {turn}: {answer:?}"
            );
        }
        prompt.extend(&answer.tokens[&0]);
        prompt.extend((0..16).map(|i| 1_000 + turn * 16 + i));
    }
    let had: Vec<u64> = workers.iter().map(|worker| worker.seen().requests).collect();
    assert_eq!(had.iter().sum::<u64>(), 6);
    assert!(had.contains(&6), "one replica had all turns: {had:?}");
    let choices = house.told().choices;
    let cached: usize = choices
        .iter()
        .filter(|((_, why), _)| *why == "cached_blocks")
        .map(|(_, n)| n)
        .sum();
    assert_eq!(cached, 5, "{choices:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_prefix_spills_over_to_the_others() {
    // Saturated is half a second of prefill: 500 tokens here.
    let slow = || worker_with(|config| (config.prefill_tokens_per_second, config.credits) = (1_000, 200));
    let workers = [slow(), slow(), slow()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let hot: Vec<u32> = (0..512).collect();
    house.run(ask(hot.clone(), 2)).await.expect("no fault");
    workers
        .iter()
        .for_each(|worker| worker.set(|config| config.stall = true));
    let asks: Vec<Ask> = (0..150)
        .map(|i| ask(hot.iter().copied().chain([9_000 + i]), 50))
        .collect();
    let runs = futures::future::join_all(asks.iter().map(|ask| house.run(ask.clone())));
    let release = async {
        let all = || workers.iter().map(|worker| worker.seen().requests).sum::<u64>() == 151;
        until("all are placed", all).await;
        workers
            .iter()
            .for_each(|worker| worker.set(|config| config.stall = false));
    };
    let (answers, ()) = tokio::join!(runs, release);
    for (ask, answer) in asks.iter().zip(answers) {
        assert_eq!(answer.expect("no fault").tokens[&0], expected(ask, 0));
    }
    let tokens = |seen: mock_worker::Seen| seen.prefill_tokens + seen.tokens;
    let had: Vec<u64> = workers.iter().map(|worker| tokens(worker.seen())).collect();
    let (most, total) = (*had.iter().max().expect("three"), had.iter().sum::<u64>());
    let choices = house.told().choices;
    assert!(
        most * 3 <= total * 3 / 2,
        "max/mean of the tokens is at most 1.5: {had:?}, {choices:?}"
    );
    assert!(choices.keys().any(|(_, why)| *why == "spill"), "{choices:?}");
    house.settles(600).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missed_cache_event_is_noticed() {
    let worker = worker_with(|config| config.skip_kv_event = true);
    let house = house(&[&worker], |_| {}).await;
    house.run(ask(0..64, 2)).await.expect("no fault");
    assert_eq!(house.told().missed, 0);
    house.run(ask(100..164, 2)).await.expect("no fault");
    until("the gap is seen", || house.told().missed == 1).await;
    // The session begins anew with a snapshot.
    worker.break_sessions();
    worker.until("it is back", |seen| seen.sessions == 2).await;
    house.ready("m", 1).await;
    until("the snapshot came", || {
        house.dispatcher.counts().cached_keys >= worker.cached().len()
    })
    .await;
}
