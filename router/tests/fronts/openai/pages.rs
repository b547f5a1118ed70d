//! Models, tokens, and what probes read.

use super::*;
use crate::support::{SPECIALS, TEMPLATE};

#[tokio::test]
async fn tokens_and_text_are_told_as_vllm_tells_them() {
    let router = start(|ask| says(ask, "ok")).await;
    let response = post(
        router.http,
        "/tokenize",
        &json!({"model": "tiny", "prompt": "é", "return_token_strs": true}),
    )
    .await;
    assert_eq!(
        response.json(),
        json!({"count": 3, "max_model_len": CONTEXT, "token_strs": ["<|begin_of_text|>", "\u{FFFD}", "\u{FFFD}"],
               "tokens": [BOS, 0xC3, 0xA9]})
    );
    let response = post(
        router.http,
        "/tokenize",
        &json!({"model": "tiny", "prompt": "", "add_special_tokens": false}),
    )
    .await;
    assert_eq!(response.json()["tokens"], json!([]));
    let response = post(
        router.http,
        "/tokenize",
        &json!({"model": "tiny", "messages": user("q")}),
    )
    .await
    .json();
    assert_eq!(response["tokens"][0], BOS);
    let back = post(
        router.http,
        "/detokenize",
        &json!({"model": "tiny", "tokens": response["tokens"]}),
    )
    .await
    .json();
    assert_eq!(
        back["prompt"],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
}

#[tokio::test]
async fn models_pages_and_ids() {
    let router = start(|ask| says(ask, "ok")).await;
    let models = get(router.http, "/v1/models").await.json();
    let names: Vec<&str> = models["data"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|m| m["id"].as_str())
        .collect();
    assert_eq!(names, ["tiny", "org/alias", ABSENT, "mute"]);
    let model = get(router.http, "/v1/models/org/alias").await.json();
    assert_eq!(
        (&model["id"], &model["root"], &model["max_model_len"]),
        (&json!("org/alias"), &json!("tiny"), &json!(CONTEXT))
    );
    let missing = get(router.http, "/v1/models/nobody").await;
    assert_eq!(
        (missing.status, &missing.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    assert_eq!(get(router.http, "/health").await.status, 200);
    let unknown = get(router.http, "/nothing").await;
    assert_eq!(
        (unknown.status, unknown.json()["error"]["type"].as_str()),
        (404, Some("invalid_request_error"))
    );
    assert_eq!(get(router.http, CHAT).await.status, 405);
    let body = json!({"model": "tiny", "prompt": "p"}).to_string();
    let given = receive(
        send(
            router.http,
            "POST",
            TEXT,
            "x-request-id: my-id\r\nauthorization: Bearer any\r\n",
            &body,
        )
        .await,
    )
    .await;
    assert_eq!(given.headers["x-request-id"], "my-id");
    assert_eq!(given.json()["id"], "cmpl-my-id");
    let made = receive(send(router.http, "POST", TEXT, "x-request-id: a b\r\n", &body).await).await;
    assert_eq!(
        made.headers["x-request-id"].len(),
        32,
        "one with a space is replaced"
    );
}

#[tokio::test]
async fn what_a_tokenizer_is_made_of_is_told_where_the_operator_lets_it() {
    let router = start(|ask| says(ask, "ok")).await;
    let hidden = get(router.http, "/tokenizer_info?model=tiny").await;
    assert_eq!(hidden.status, 404);
    assert!(hidden.body.contains("--tokenizer-info"), "{}", hidden.body);

    let settings = Settings {
        tokenizer_info: true,
        ..Settings::new(MAX_BODY)
    };
    let router = start_set(settings, |ask| says(ask, "ok")).await;
    let info = get(router.http, "/tokenizer_info?model=tiny").await;
    assert_eq!(info.status, 200, "{}", info.body);
    let info = info.json();
    assert_eq!(info["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(info["bos_token"], SPECIALS[0]);
    assert_eq!(info["eos_token"]["content"], SPECIALS[1]);
    assert_eq!(info["chat_template"], TEMPLATE);
    for (path, status) in [
        ("/tokenizer_info?model=org/alias", 200),
        // Several models: one has to be named.
        ("/tokenizer_info", 400),
        ("/tokenizer_info?model=nobody", 404),
        ("/tokenizer_info?model=absent", 503),
    ] {
        assert_eq!(get(router.http, path).await.status, status, "{path}");
    }
}
