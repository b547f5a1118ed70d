//! What a client that asks well gets.

use super::*;

#[tokio::test]
async fn a_conversation_is_answered() {
    let router = start(|ask| says(ask, "日本です")).await;
    let messages = json!([{"role": "system", "content": "S"}, {"role": "user", "content":
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    let response = post(
        router.http,
        CHAT,
        &json!({"model": "org/alias", "messages": messages, "seed": -1}),
    )
    .await;
    let body = response.json();
    assert_eq!(response.status, 200, "{body}");
    let choice = &body["choices"][0];
    assert_eq!(
        choice["message"],
        json!({"role": "assistant", "content": "日本です", "refusal": null})
    );
    assert_eq!(
        (&choice["finish_reason"], &choice["logprobs"]),
        (&json!("stop"), &Value::Null)
    );
    assert_eq!(
        (&body["model"], &body["object"]),
        (&json!("tiny"), &json!("chat.completion"))
    );
    let ask = router.seen.ask();
    let rendered = "S<|eot_id|>";
    assert_eq!(
        ask.prompt[..2],
        [BOS, 258],
        "one beginning of sequence, from the template"
    );
    assert_eq!(
        ask.prompt.len() as u64,
        body["usage"]["prompt_tokens"].as_u64().expect("a count")
    );
    let text = "system\n\nS|user\n\na\nb|assistant\n\n".replace('|', "");
    assert_eq!(
        ask.prompt.iter().filter(|&&id| id < 256).count(),
        text.len(),
        "{rendered}"
    );
    assert_eq!(
        ask.max_tokens,
        CONTEXT - ask.prompt.len() as u32,
        "up to the context's end"
    );
    assert_eq!(ask.sampling.seed, Some(u64::MAX));
    assert_eq!(body["usage"]["completion_tokens"], 13);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
    assert!(ask.prompt.contains(&EOT));
}

#[tokio::test]
async fn a_conversation_streams_in_whole_characters() {
    let router = start(|ask| says(ask, "日本🇯🇵")).await;
    let body = json!({"messages": user("q"), "model": "tiny", "stream": true, "n": 2,
                      "stream_options": {"include_usage": true}});
    let response = post(router.http, CHAT, &body).await;
    let chunks = response.chunks();
    for index in 0..2 {
        let of: Vec<&Value> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        assert_eq!(of[0]["delta"], json!({"role": "assistant", "content": ""}));
        let deltas: Vec<&str> = of[1..]
            .iter()
            .filter_map(|choice| choice["delta"]["content"].as_str())
            .collect();
        assert_eq!(deltas, ["日", "本", "🇯", "🇵"]);
        assert_eq!(of.last().expect("an end")["finish_reason"], "stop");
    }
    let usage = chunks.last().expect("a last chunk");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 2 * 15);
    assert!(
        chunks[..chunks.len() - 1]
            .iter()
            .all(|chunk| chunk["usage"].is_null())
    );
    assert!(
        chunks
            .iter()
            .all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "chat.completion.chunk")
    );
}

#[tokio::test]
async fn prompts_come_in_four_forms_and_choices_are_numbered_prompt_by_prompt() {
    let router = start(|ask| says(ask, "ok")).await;
    let expected = |text: &str| [vec![BOS], ids(text)].concat();
    for (prompt, asked) in [
        (json!("ab"), vec![expected("ab")]),
        (
            json!(["a", "<|begin_of_text|>b"]),
            vec![expected("a"), expected("b")],
        ),
        (json!([65, 66.0]), vec![vec![65, 66]]),
        (json!([[65], [66, 67]]), vec![vec![65], vec![66, 67]]),
    ] {
        let before = router.seen.asks().len();
        let response = post(
            router.http,
            TEXT,
            &json!({"model": "tiny", "prompt": prompt, "n": 2}),
        )
        .await
        .json();
        let mut prompts: Vec<Vec<u32>> = router.seen.asks()[before..]
            .iter()
            .map(|ask| ask.prompt.to_vec())
            .collect();
        prompts.sort();
        let indices: Vec<u64> = response["choices"]
            .as_array()
            .expect("choices")
            .iter()
            .filter_map(|c| c["index"].as_u64())
            .collect();
        assert_eq!(indices, (0..2 * asked.len() as u64).collect::<Vec<_>>());
        let tokens: usize = asked.iter().map(Vec::len).sum();
        assert_eq!(response["usage"]["prompt_tokens"], tokens);
        assert_eq!(prompts, asked);
        assert_eq!(router.seen.ask().max_tokens, 16, "OpenAI's default");
    }
    for bad in [
        json!([]),
        json!(null),
        json!([1, "a"]),
        json!([[]]),
        json!([-1]),
        json!([262]),
        json!(7),
        json!([[1], 2]),
    ] {
        let response = post(router.http, TEXT, &json!({"model": "tiny", "prompt": bad})).await;
        assert_eq!(
            (response.status, &response.json()["error"]["param"]),
            (400, &json!("prompt")),
            "{bad}"
        );
    }
}

#[tokio::test]
async fn an_evaluation_gets_every_position_with_the_same_number_twice() {
    let router = start(|ask| says(ask, "!x")).await;
    for max_tokens in [0, 1, 2] {
        let body = json!({"model": "tiny", "prompt": [[BOS, 0xE6, 0x97, 65]], "temperature": 0, "echo": true,
                          "max_tokens": max_tokens, "logprobs": 2, "seed": 1234});
        let response = post(router.http, TEXT, &body).await.json();
        let choice = &response["choices"][0];
        let logprobs = &choice["logprobs"];
        let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(|list| {
            logprobs[list]
                .as_array()
                .unwrap_or_else(|| panic!("{list}: {response}"))
        });
        let length = 4 + max_tokens;
        assert!(lists.iter().all(|list| list.len() == length), "{response}");
        assert_eq!(
            (&lists[1][0], &lists[2][0]),
            (&Value::Null, &Value::Null),
            "nothing predicts the first token"
        );
        assert_eq!(
            lists[0][1], "bytes:\\xe6",
            "bytes that are no text are told apart"
        );
        for (chosen, top) in lists[1].iter().zip(lists[2]).skip(1) {
            let top = top.as_object().expect("an object");
            let largest = top.values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
            assert_eq!((chosen.as_f64(), top.len()), (Some(largest), 2));
        }
        assert_eq!(
            choice["text"].as_str(),
            Some(["\u{FFFD}A", "\u{FFFD}A!", "\u{FFFD}A!x"][max_tokens])
        );
        assert_eq!(
            lists[3][..4],
            [json!(0), json!(0), json!(0), json!(0)],
            "an unfinished character has no width yet"
        );
        let ask = router.seen.ask();
        assert_eq!(
            (ask.prompt_logprobs, ask.max_tokens),
            (Some(2), max_tokens as u32)
        );
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let chunks = post(router.http, TEXT, &streamed).await.chunks();
        let joined: Vec<Value> = chunks
            .iter()
            .flat_map(|chunk| {
                chunk["choices"][0]["logprobs"]["token_logprobs"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default()
            })
            .collect();
        assert_eq!(&joined, lists[1]);
    }
    // A control token that is written in a text has its place there; what is put around a text has none.
    for (prompt, expected) in [
        (json!("日<|eot_id|>b"), json!([0, 0, 0, 0, 1, 11])),
        (json!("<|eot_id|>b"), json!([0, 0, 10])),
        (json!("<|begin_of_text|>b"), json!([0, 17])),
        (json!([EOT, 98]), json!([0, 0])),
    ] {
        let scored = json!({"model": "tiny", "prompt": prompt, "echo": true, "max_tokens": 0, "logprobs": 0});
        let choice = &post(router.http, TEXT, &scored).await.json()["choices"][0];
        assert_eq!(choice["logprobs"]["text_offset"], expected, "{choice}");
    }
    let echo = json!({"model": "tiny", "prompt": "日本", "echo": true, "max_tokens": 0});
    let choice = &post(router.http, TEXT, &echo).await.json()["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["logprobs"]),
        (&json!("日本"), &Value::Null)
    );
}

#[tokio::test]
async fn the_end_of_sequence_is_a_scored_token_of_the_output() {
    let router = start(|ask| says(ask, "a")).await;
    let body = json!({"model": "tiny", "prompt": "p", "logprobs": 0});
    let choice = &post(router.http, TEXT, &body).await.json()["choices"][0];
    assert_eq!(choice["logprobs"]["tokens"], json!(["a", "<|end_of_text|>"]));
    assert_eq!(
        choice["logprobs"]["top_logprobs"][0],
        json!({"a": -0.5}),
        "the chosen token is always there"
    );
    assert_eq!(choice["text"], "a");
    let body = json!({"model": "tiny", "messages": user("q"), "logprobs": true, "top_logprobs": 2,
                      "prompt_logprobs": 1});
    let response = post(router.http, CHAT, &body).await.json();
    let content = &response["choices"][0]["logprobs"]["content"];
    assert_eq!(content[0]["token"], "a");
    assert_eq!(content[0]["bytes"], json!([97]));
    assert_eq!(
        content[0]["top_logprobs"][1],
        json!({"token": "b", "logprob": -1.5, "bytes": [98]})
    );
    assert_eq!(content.as_array().map(Vec::len), Some(2));
    assert_eq!(response["prompt_logprobs"][0], Value::Null);
    assert_eq!(
        response["prompt_logprobs"][1]["258"]["decoded_token"],
        "<|start_header_id|>"
    );
}
