//! A worker dies under streams of every kind, seen through both fronts: texts, stop strings, scores, ends and usage are
//! those of an undisturbed run.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{support::http::post, *};

const STREAMS: u32 = 150;
const TOKENS: u32 = 60;

/// What a client reads in the end, of each candidate: text, scored tokens, end.
type Read = (BTreeMap<u64, (String, usize, Value)>, Value);

fn asked_as(i: u32) -> (&'static str, Value) {
    let mut body = json!({
        "model": "m", "max_tokens": TOKENS, "stream": true, "stream_options": {"include_usage": true},
        "temperature": f64::from(i % 2), "seed": i, "n": 1 + i % 2,
    });
    match i % 4 {
        // Matched or not, on text that came from two workers.
        0 => {
            body["stop"] = json!([
                format!(
                    "{}{}",
                    char::from(b'a' + (i % 26) as u8),
                    char::from(b'b' + (i % 25) as u8)
                ),
                "q"
            ])
        }
        1 => {
            body["response_format"] =
                json!({"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}})
        }
        2 => body["presence_penalty"] = json!(0.5),
        _ => {}
    }
    if i.is_multiple_of(3) {
        body["messages"] = json!([{"role": "user", "content": format!("question {i}")}]);
        body["logprobs"] = json!(true);
        ("/v1/chat/completions", body)
    } else {
        body["prompt"] = json!(format!("prompt {i}"));
        body["logprobs"] = json!(1);
        ("/v1/completions", body)
    }
}

async fn read(http: SocketAddr, i: u32) -> Read {
    let (path, body) = asked_as(i);
    let chunks = post(http, path, &body).await.chunks();
    let (mut all, mut usage) = (BTreeMap::new(), Value::Null);
    for chunk in &chunks {
        if let Some(tokens) = chunk["usage"].as_object() {
            // What a cache spared may differ.
            usage = json!([tokens["prompt_tokens"], tokens["completion_tokens"]]);
        }
        for choice in chunk["choices"].as_array().expect("a list") {
            let index = choice["index"].as_u64().expect("a number");
            let (text, scored, end): &mut (String, usize, Value) = all.entry(index).or_default();
            let more = choice["text"].as_str().or(choice["delta"]["content"].as_str());
            text.push_str(more.unwrap_or_default());
            let scores = &choice["logprobs"];
            let scores = scores["tokens"].as_array().or(scores["content"].as_array());
            *scored += scores.map_or(0, Vec::len);
            if !choice["finish_reason"].is_null() {
                assert!(end.is_null(), "ended once");
                *end = json!([choice["finish_reason"], choice["stop_reason"]]);
            }
        }
    }
    (all, usage)
}

async fn read_all(house: &House) -> Vec<Read> {
    let reads = (0..STREAMS).map(|i| tokio::spawn(read(house.http, i)));
    let reads: Vec<_> = reads.collect();
    let reads = futures::future::join_all(reads).await;
    reads
        .into_iter()
        .map(|read| read.expect("a stream that is whole"))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_read_is_that_of_an_undisturbed_run() {
    let mut workers = [(); 3].map(|()| {
        worker(|config| {
            (config.credits, config.max_running) = (400, 400);
            config.step = Duration::from_millis(10);
        })
    });
    let house = house(&workers.each_ref(), |_| {}).await;
    let undisturbed = read_all(&house).await;
    let stopped = undisturbed
        .iter()
        .flat_map(|(candidates, _)| candidates.values())
        .filter(|(_, _, end)| end[1].is_string())
        .count();
    assert!(stopped > 10, "{stopped} ended at a stop string");
    house.settles(1200).await;

    let tokens = workers[0].seen().tokens;
    let killing = async {
        workers[0]
            .until("its streams have begun", |seen| seen.tokens > tokens + 500)
            .await;
    };
    let reading = read_all(&house);
    let mut reading = std::pin::pin!(reading);
    tokio::select! {
        () = killing => {}
        _ = &mut reading => panic!("it was too fast for the test"),
    }
    let live = workers[0].live();
    assert!(live > 10, "{live}");
    workers[0].kill();
    let disturbed = reading.await;
    for (i, (disturbed, undisturbed)) in disturbed.iter().zip(&undisturbed).enumerate() {
        assert_eq!(disturbed, undisturbed, "stream {i}");
    }
    // Each request that was there has moved, and none else: one of two candidates may have been over.
    let moved = house.metric("swallow_router_moves_total{cause=\"lost\",model=\"m\"}");
    let again: usize = workers[1..].iter().map(|worker| worker.seen().moved_here()).sum();
    println!("{moved} requests with {again} candidates moved; {live} were at the worker");
    assert!(
        moved > 5.0 && moved <= again as f64 && again <= live,
        "{moved}, {again}, {live}"
    );
    house.settles(800).await;
}
