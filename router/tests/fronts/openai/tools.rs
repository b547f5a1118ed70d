//! Functions that the model may call: what it is told of them, and what becomes of its calls.

use swallow_router::ask::Grammar;

use super::*;

const TEMPLATE: &str = "{% if tools is not none %}T{{ tools[0].function.name }}{% endif %}{% for m in messages %}\
    {% if m.tool_calls %}C{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.role[0] }}{{ m.content }}\
    {% endif %}{% endfor %}";
const CALL: &str = r#"{"name": "weather", "parameters": {"city": "東京", "days": 2}}"#;

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "description": "d", "parameters":
        {"type": "object", "properties": {"city": {"type": "string"}}}}}])
}

fn request(more: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": user("q"), "tools": tools()});
    for (name, value) in more.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn a_call_is_told_whole_and_in_pieces() {
    let router = start_with_template(TEMPLATE, |ask| says(ask, CALL)).await;
    let response = post(router.http, CHAT, &request(json!({}))).await.json();
    let choice = &response["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null)
    );
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["type"], "function");
    assert!(
        call["id"].as_str().is_some_and(|id| id.starts_with("call_")),
        "{call}"
    );
    assert_eq!(
        call["function"],
        json!({"name": "weather", "arguments": r#"{"city": "東京", "days": 2}"#})
    );
    assert_eq!(
        router.seen.ask().prompt[..],
        ids("Tweatheruq")[..],
        "the model is told"
    );
    assert_eq!(router.seen.ask().grammar, None, "and decides");

    let body = request(json!({"stream": true, "n": 2, "logprobs": true}));
    let chunks = post(router.http, CHAT, &body).await.chunks();
    for index in 0..2 {
        let of: Vec<&Value> = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|choice| choice["index"] == index)
            .collect();
        let calls: Vec<&Value> = of
            .iter()
            .filter_map(|choice| choice["delta"]["tool_calls"].get(0))
            .collect();
        assert_eq!(calls[0]["function"]["name"], "weather");
        assert!(calls[0]["id"].is_string() && calls[1]["id"].is_null());
        assert!(calls.len() > 10, "arguments come as they are generated");
        let arguments: String = calls
            .iter()
            .filter_map(|call| call["function"]["arguments"].as_str())
            .collect();
        assert_eq!(arguments, r#"{"city": "東京", "days": 2}"#);
        assert!(calls.iter().all(|call| call["index"] == 0));
        let text: String = of
            .iter()
            .filter_map(|choice| choice["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, "");
        assert_eq!(of.last().expect("an end")["finish_reason"], "tool_calls");
        let scored: usize = of
            .iter()
            .filter_map(|choice| choice["logprobs"]["content"].as_array().map(Vec::len))
            .sum();
        assert_eq!(scored, CALL.len() + 1, "every token is scored, told or withheld");
    }
}

#[tokio::test]
async fn an_answer_in_words_stays_one() {
    let answer = r#"{"weather": "fine"} I think."#;
    let router = start_with_template(TEMPLATE, move |ask| says(ask, answer)).await;
    for stream in [false, true] {
        let response = post(router.http, CHAT, &request(json!({"stream": stream}))).await;
        let (text, reason) = if stream {
            let chunks = response.chunks();
            let text: String = chunks
                .iter()
                .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
                .collect();
            let last = chunks.last().expect("an end");
            (text, last["choices"][0]["finish_reason"].clone())
        } else {
            let choice = response.json()["choices"][0].clone();
            assert!(choice["message"].get("tool_calls").is_none(), "{choice}");
            let text = choice["message"]["content"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
            (text, choice["finish_reason"].clone())
        };
        assert_eq!((text.as_str(), reason), (answer, json!("stop")));
    }
    let cut = request(json!({"max_tokens": 45}));
    let router = start_with_template(TEMPLATE, |ask| says(ask, CALL)).await;
    let choice = &post(router.http, CHAT, &cut).await.json()["choices"][0];
    assert_eq!(choice["finish_reason"], "length", "cut in the middle of a call");
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "weather");
}

#[tokio::test]
async fn the_choice_hides_the_tools_or_binds_the_answer() {
    let router = start_with_template(TEMPLATE, |ask| says(ask, CALL)).await;
    let none = post(router.http, CHAT, &request(json!({"tool_choice": "none"})))
        .await
        .json();
    assert_eq!(
        none["choices"][0]["message"]["content"], CALL,
        "nothing is a call"
    );
    assert_eq!(router.seen.ask().prompt[..], ids("uq")[..]);
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for choice in [json!("required"), named] {
        let response = post(router.http, CHAT, &request(json!({"tool_choice": choice}))).await;
        assert_eq!(response.json()["choices"][0]["finish_reason"], "tool_calls");
        let grammar = router.seen.ask().grammar.expect("the answer must be a call");
        assert!(
            matches!(&*grammar, Grammar::JsonSchema(schema) if schema.contains(r#"{"const":"weather"}"#)),
            "{grammar:?}"
        );
    }
}

#[tokio::test]
async fn a_conversation_goes_on_after_a_call() {
    let router = start_with_template(TEMPLATE, |ask| says(ask, "fine")).await;
    let call = json!({"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"A\"}"}});
    let messages = json!([
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]);
    let response = post(router.http, CHAT, &request(json!({"messages": messages})))
        .await
        .json();
    assert_eq!(response["choices"][0]["message"]["content"], "fine");
    let seen = router.seen.ask().prompt.to_vec();
    assert_eq!(seen, ids("TweatheruqC{\"city\": \"A\"}tsunny"));
    let counted = json!({"model": "tiny", "messages": messages, "tools": tools()});
    assert_eq!(
        post(router.http, "/tokenize", &counted).await.json()["tokens"],
        json!(seen)
    );
    // The model's own template, which shows no calls.
    let router = start(|ask| says(ask, "x")).await;
    let body = json!({"model": "tiny", "messages": messages});
    let refused = post(router.http, CHAT, &body).await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("messages"))
    );
}
