//! What ends an answer, and what of it is shown.

use super::*;

#[tokio::test]
async fn a_stop_string_ends_its_candidate_and_nothing_of_it_is_shown() {
    let router = start(|ask| {
        let mut events = vec![started()];
        events.extend(["ab", "cE", "ND", "x"].map(|part| tokens(ask, 0, &ids(part))));
        then_hangs(events)
    })
    .await;
    for (include, expected) in [(false, "abc"), (true, "abcEND")] {
        let body = json!({"prompt": "p", "stop": ["nothing", "END"], "model": "tiny", "max_tokens": 50,
                          "include_stop_str_in_output": include});
        let choice = &post(router.http, TEXT, &body).await.json()["choices"][0];
        assert_eq!(choice["text"], expected);
        assert_eq!(
            (&choice["finish_reason"], &choice["stop_reason"]),
            (&json!("stop"), &json!("END"))
        );
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let chunks = post(router.http, TEXT, &streamed).await.chunks();
        let text: String = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
            .collect();
        assert_eq!(text, expected);
    }
    assert_eq!(router.seen.stopped(), [0; 4]);
    router.seen.all_dropped(4).await;
}

#[tokio::test]
async fn a_stop_string_that_is_a_special_token_is_a_stop_token() {
    let router = start(|ask| {
        let events = vec![
            started(),
            tokens(ask, 0, &ids("hi")),
            tokens(ask, 0, &[EOT]),
            finished(0, Finish::StopToken(EOT)),
        ];
        Ok(stream::iter(events).boxed())
    })
    .await;
    let body = json!({"messages": user("q"), "model": "tiny", "stop": "<|eot_id|>", "stop_token_ids": [7]});
    let response = post(router.http, CHAT, &body).await.json();
    assert_eq!(router.seen.ask().stop_token_ids, [7, EOT]);
    assert_eq!(response["choices"][0]["message"]["content"], "hi");
    assert_eq!(response["choices"][0]["stop_reason"], "<|eot_id|>");
    assert_eq!(response["usage"]["completion_tokens"], 3, "the stop token counts");
}

#[tokio::test]
async fn an_end_of_sequence_before_min_tokens_is_text_like_any_other() {
    let router = start(|ask| {
        let events = vec![
            started(),
            tokens(ask, 0, &[b'a'.into(), EOS]),
            tokens(ask, 0, &ids("b")),
            finished(0, Finish::Length),
        ];
        Ok(stream::iter(events).boxed())
    })
    .await;
    let body = json!({"prompt": "p", "max_tokens": 3, "min_tokens": 3, "skip_special_tokens": false});
    let error = post(router.http, TEXT, &body).await;
    assert_eq!(
        error.status, 400,
        "more than one model is served: one must be named"
    );
    let mut body = body.clone();
    body["model"] = json!("tiny");
    let response = post(router.http, TEXT, &body).await.json();
    assert_eq!(response["choices"][0]["text"], "a<|end_of_text|>b");
    assert_eq!(response["choices"][0]["finish_reason"], "length");
}
