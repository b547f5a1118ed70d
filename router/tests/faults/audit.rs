//! What a router believed of a cache, and what its worker then said: a difference is seen.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_believed_of_a_cache_is_compared_with_what_was_found() {
    for (lost, predicted, under) in [(false, 64.0, 0.0), (true, 0.0, 64.0)] {
        // The event that tells of the first prompt's blocks is lost.
        let worker = worker(|config| config.skip_kv_event = lost);
        let house = house(&[&worker], |_| {}).await;
        let mut client = house.channel().await;
        // Four blocks of 16 tokens, and some more.
        let prompt = "p".repeat(70);
        client.generate(asked(&prompt, 1)).await.expect("served");
        until("its blocks are known, where they are told of", || {
            lost || house.dispatcher.counts().cached_keys == 4
        })
        .await;
        client.generate(asked(&prompt, 1)).await.expect("served");
        let wrong = |direction: &str| {
            let series = "swallow_router_cache_misprediction_tokens_total";
            house.metric(&format!("{series}{{direction=\"{direction}\",model=\"m\"}}"))
        };
        assert_eq!(
            house.metric("swallow_router_predicted_cached_tokens_total{model=\"m\"}"),
            predicted
        );
        assert_eq!((wrong("over"), wrong("under")), (0.0, under), "lost: {lost}");
        assert_eq!(
            house.metric("swallow_router_cached_tokens_total{model=\"m\"}"),
            64.0
        );
    }
}
