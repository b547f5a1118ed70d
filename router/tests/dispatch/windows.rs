//! Clients that read slowly, or not at all: the worker stops computing for them, nobody else notices, and what they
//! read is whole.

use super::*;

/// Tokens that a request without log-probabilities may have before its client reads.
const WINDOW: usize = 256;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_slow_clients_cost_their_window_and_no_more() {
    let worker = worker_with(|config| {
        (config.credits, config.max_running) = (600, 600);
        config.step = Duration::from_millis(2);
    });
    let house = house(&[&worker], |_| {}).await;
    let asks: Vec<Ask> = (0..200).map(|i| ask([1, i], 2_000)).collect();
    let slow = futures::future::join_all(asks.iter().map(|asked| house.start(asked.clone()))).await;
    worker
        .until("all windows are full", |seen| seen.tokens == 200 * WINDOW as u64)
        .await;
    // Others are served, and nothing comes of the slow ones meanwhile.
    let quick: Vec<Ask> = (0..200).map(|i| ask([2, i], 600)).collect();
    let answers = futures::future::join_all(quick.iter().map(|asked| house.run(asked.clone()))).await;
    for (asked, answer) in quick.iter().zip(answers) {
        assert_eq!(answer.expect("no fault").tokens[&0], expected(asked, 0));
    }
    assert_eq!(worker.seen().tokens, 200 * (WINDOW as u64 + 600));
    // Whoever reads at last has the whole of it.
    let mut slow = slow.into_iter();
    let first = slow.next().expect("two hundred");
    assert_eq!(
        answer(first).await.expect("no fault").tokens[&0],
        expected(&asks[0], 0)
    );
    drop(slow);
    house.settles(600).await;
    assert_eq!(worker.live(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_nothing_for_too_long_is_told_so() {
    let worker = worker();
    let limit = Duration::from_millis(300);
    let house = house(&[&worker], |config| config.slow_client_limit = limit).await;
    let mut gone = house.start(ask([1], 5_000)).await;
    let began = Instant::now();
    worker.until("it is cancelled", |seen| seen.confirmed == 1).await;
    assert!(began.elapsed() >= limit, "{:?}", began.elapsed());
    assert_eq!(
        gone.next().await,
        Some(Err(Failure::SlowClient { buffered: WINDOW }))
    );
    assert_eq!(gone.next().await, None);
    assert_eq!(house.told().slow_clients, 1);
    drop(gone);
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_stream_moves_with_its_window() {
    let mut workers = [worker(), worker()];
    let house = house(&workers.each_ref(), |_| {}).await;
    let asked = Ask {
        candidates: 2,
        logprobs: Some(20),
        ..ask([1, 2], 1_000)
    };
    let mut generation = house.start(asked.clone()).await;
    let first = next_tokens(&mut generation).await;
    let (its, other) = split(&mut workers, |worker| worker.live() > 0);
    its.until("it waits for its client", |seen| seen.tokens >= 2 * WINDOW as u64)
        .await;
    its.kill();
    other.until("it is there", |seen| seen.requests == 2).await;
    let answer = answer_after(first, generation).await.expect("it goes on");
    for candidate in 0..2 {
        assert_eq!(answer.tokens[&candidate], expected(&asked, candidate));
        assert_eq!(answer.scores[&candidate], 1_000);
    }
    assert!(
        other.seen().tokens < 2_000 - 2 * WINDOW as u64 + 10,
        "nothing is generated twice"
    );
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_knows_no_windows_is_not_told_of_any() {
    // The mock would panic at one.
    let worker = worker_with(|config| config.windows = false);
    let house = house(&[&worker], |_| {}).await;
    let asked = ask([1, 2], 1_500);
    let mut generation = house.start(asked.clone()).await;
    let first = next_tokens(&mut generation).await;
    worker.until("it runs ahead", |seen| seen.tokens == 1_500).await;
    let answer = answer_after(first, generation).await.expect("no fault");
    assert_eq!(answer.tokens[&0], expected(&asked, 0));
    house.settles(64).await;
}
