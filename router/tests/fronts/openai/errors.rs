//! What a client that asks for too much gets.

use super::*;

#[tokio::test]
async fn what_is_not_served_is_refused_by_name() {
    let router = start(|ask| says(ask, "ok")).await;
    for (field, value) in [
        ("tools", json!([{"type": "function", "function": {"name": "f"}}])),
        ("tools[0].function.name", json!([{"type": "function"}])),
        ("tool_choice", json!("auto")),
        ("documents", json!([{"text": "t"}])),
        ("response_format.type", json!({"type": "xml"})),
        ("response_format", json!({"type": "regex", "regex": ""})),
        ("audio", json!({"voice": "x"})),
        ("temperature", json!(2.5)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_k", json!(-2)),
        ("min_p", json!(1.5)),
        ("presence_penalty", json!(3)),
        ("repetition_penalty", json!(1e300)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("min_tokens", json!(30)),
        ("top_logprobs", json!(5)),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"262": 1})),
        ("logit_bias", json!({"1": 101})),
        ("stop", json!([""])),
        ("stop", json!([1])),
        ("stop", json!(vec!["x"; 10_000])),
        ("stop_token_ids", json!([262])),
        ("stream_options", json!({"include_usage": true})),
        (
            "messages[0].content[0]",
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
        ),
        ("messages[0].role", json!([{"content": "x"}])),
        ("messages", json!([])),
        ("chat_template_kwargs", json!({"messages": 1})),
        ("chat_template", json!("{{ x }}")),
        ("prompt_logprobs", json!(21)),
    ] {
        let mut body = json!({"model": "tiny", "messages": user("q"), "max_tokens": 20});
        let key = field.split(['[', '.']).next().expect("a name");
        body[key] = value.clone();
        let response = post(router.http, CHAT, &body).await;
        let error = &response.json()["error"];
        assert_eq!(
            (response.status, &error["param"]),
            (400, &json!(field)),
            "{value} {error}"
        );
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert!(router.seen.asks().is_empty());
    let huge = json!({"model": "tiny", "prompt": "a".repeat(CONTEXT as usize)});
    let error = post(router.http, TEXT, &huge).await.json();
    assert_eq!(error["error"]["code"], "prompt_too_long", "{error}");
    let sum = json!({"model": "tiny", "prompt": "abc", "max_tokens": CONTEXT});
    let error = post(router.http, TEXT, &sum).await.json();
    assert!(
        error["error"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("at most 508")),
        "{error}"
    );
    let body = receive(send(router.http, "POST", CHAT, "", "{nonsense").await).await;
    assert_eq!(
        (body.status, body.json()["error"]["param"].as_str()),
        (400, Some("body"))
    );
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(
        receive(send(router.http, "POST", CHAT, "", &deep).await)
            .await
            .status,
        400
    );
    let large = "x".repeat(MAX_BODY + 1);
    assert_eq!(
        receive(send(router.http, "POST", CHAT, "", &large).await)
            .await
            .status,
        413
    );
}

#[tokio::test]
async fn unknown_fields_are_named_and_known_ones_without_effect_are_not() {
    let router = start(|ask| says(ask, "ok")).await;
    let body = json!({"model": "tiny", "messages": user("q"), "user": "u", "reasoning_effort": "high", "tools": null,
                      "surprise": 1, "wei,rd": 2});
    let response = post(router.http, CHAT, &body).await;
    assert_eq!(response.status, 200);
    assert_eq!(response.headers["x-swallow-ignored-fields"], "surprise, wei?rd");
    let metrics = get(router.http, "/metrics").await.body;
    assert!(
        metrics.contains("swallow_router_ignored_fields_total{method=\"chat.completions\"} 2"),
        "{metrics}"
    );
}

#[tokio::test]
async fn refusals_and_failures_have_their_statuses() {
    let router = start(|ask| match ask.max_tokens {
        1 => Err(Refusal::QueueFull {
            what: "requests",
            retry_after: Duration::from_millis(1500),
        }),
        2 => Err(Refusal::NoReplica {
            model: "tiny".into(),
            retry_after: Duration::from_secs(3),
        }),
        3 => Err(Refusal::Deadline),
        4 => Err(Refusal::ShuttingDown),
        _ => {
            let lost = Failure::ReplicaLost {
                replica: "r".into(),
                cause: "c".into(),
            };
            Ok(stream::iter([started(), tokens(ask, 0, &ids("par")), Err(lost)]).boxed())
        }
    })
    .await;
    let ask = |max_tokens: u32, stream: bool| json!({"model": "tiny", "prompt": "p", "max_tokens": max_tokens, "stream": stream});
    for stream in [false, true] {
        for (max_tokens, status, after) in [
            (1, 429, Some("2")),
            (2, 503, Some("3")),
            (3, 504, None),
            (4, 503, Some("1")),
        ] {
            let response = post(router.http, TEXT, &ask(max_tokens, stream)).await;
            assert_eq!(response.status, status);
            assert_eq!(
                response.headers.get("retry-after").map(String::as_str),
                after,
                "{max_tokens}"
            );
            assert!(response.json()["error"]["message"].is_string());
        }
    }
    assert_eq!(
        post(router.http, TEXT, &ask(5, false)).await.status,
        503,
        "a cut answer is no answer"
    );
    for (path, body) in [
        (TEXT, ask(5, true)),
        (
            CHAT,
            json!({"model": "tiny", "messages": user("q"), "stream": true}),
        ),
    ] {
        let events = post(router.http, path, &body).await.events();
        assert!(!events.contains(&"[DONE]".to_owned()), "{events:?}");
        let last: Value = serde_json::from_str(events.last().expect("an event")).expect("JSON");
        assert_eq!(last["error"]["code"], "replica_lost");
        assert!(
            events[..events.len() - 1]
                .iter()
                .any(|event| event.contains("par")),
            "{events:?}"
        );
    }
    for (model, status, code) in [
        ("nobody", 404, "model_not_found"),
        (ABSENT, 503, "no_replica"),
        ("mute", 500, "model_unusable"),
    ] {
        let response = post(router.http, TEXT, &json!({"model": model, "prompt": "p"})).await;
        assert_eq!(
            (response.status, &response.json()["error"]["code"]),
            (status, &json!(code))
        );
    }
    let metrics = get(router.http, "/metrics").await.body;
    for line in [
        "swallow_router_requests_total{code=\"RESOURCE_EXHAUSTED\",method=\"completions\",model=\"tiny\"} 2",
        "swallow_router_requests_total{code=\"UNAVAILABLE\",method=\"chat.completions\",model=\"tiny\"} 1",
        "swallow_router_requests_total{code=\"NOT_FOUND\",method=\"completions\",model=\"other\"} 1",
        "swallow_router_open_streams{method=\"completions\"} 0",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn one_prompt_that_fails_ends_the_others_of_its_request() {
    let router = start(|ask| match ask.prompt[1] {
        98 => Err(Refusal::QueueFull {
            what: "requests",
            retry_after: Duration::from_secs(1),
        }),
        _ => then_hangs(vec![started(), tokens(ask, 0, &ids("x"))]),
    })
    .await;
    let response = post(router.http, TEXT, &json!({"model": "tiny", "prompt": ["a", "b"]})).await;
    assert_eq!(response.status, 429);
    router.seen.all_dropped(1).await;
}
