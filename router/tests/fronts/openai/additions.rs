//! vLLM's additions to OpenAI's interface, streamed and not: prompts' scores, token ids, usage in every chunk, and
//! messages that are continued.

use super::*;

/// The choices of all chunks, in order.
fn choices(chunks: &[Value]) -> Vec<&Value> {
    chunks
        .iter()
        .flat_map(|chunk| chunk["choices"].as_array().into_iter().flatten())
        .collect()
}

fn joined(choices: &[&Value], list: &str) -> Vec<Value> {
    let lists = choices.iter().filter_map(|choice| choice[list].as_array());
    lists.flatten().cloned().collect()
}

#[tokio::test]
async fn a_stream_begins_with_the_prompts_scores_and_ids() {
    let router = start(|ask| says(ask, "hé")).await;
    for (path, body) in [
        (TEXT, json!({"prompt": "ab"})),
        (CHAT, json!({"messages": user("q")})),
    ] {
        let mut body = body;
        body["model"] = json!("tiny");
        body["n"] = json!(2);
        body["prompt_logprobs"] = json!(1);
        body["return_token_ids"] = json!(true);
        let whole = post(router.http, path, &body).await.json();
        body["stream"] = json!(true);
        let chunks = post(router.http, path, &body).await.chunks();
        let all = choices(&chunks);
        for index in 0..2 {
            let of: Vec<&Value> = all
                .iter()
                .copied()
                .filter(|choice| choice["index"] == index)
                .collect();
            // Plain completions carry the prompt in each choice, conversations once.
            let (first, wanted) = if path == TEXT {
                (of[0], &whole["choices"][index])
            } else {
                (&chunks[0], &whole)
            };
            for field in ["prompt_logprobs", "prompt_token_ids"] {
                assert!(first[field].is_array(), "{field}: {first}");
                assert_eq!(first[field], wanted[field], "{field}");
            }
            assert_eq!(first["prompt_logprobs"][0], Value::Null);
            assert_eq!(
                first["prompt_logprobs"].as_array().map(Vec::len),
                first["prompt_token_ids"].as_array().map(Vec::len)
            );
            let ids = joined(&of, "token_ids");
            assert_eq!(
                ids,
                [104, 0xC3, 0xA9, EOS].map(Value::from),
                "the end is a token too"
            );
            assert_eq!(json!(ids), whole["choices"][index]["token_ids"]);
        }
    }
}

#[tokio::test]
async fn what_is_not_asked_for_is_not_there() {
    let router = start(|ask| says(ask, "ok")).await;
    for (path, body) in [
        (TEXT, json!({"model": "tiny", "prompt": "ab"})),
        (CHAT, json!({"model": "tiny", "messages": user("q")})),
    ] {
        let whole = post(router.http, path, &body).await.body;
        let mut streamed = body;
        streamed["stream"] = json!(true);
        let stream = post(router.http, path, &streamed).await.body;
        for absent in ["token_ids", "prompt_logprobs"] {
            assert!(
                !whole.contains(absent) && !stream.contains(absent),
                "{absent}: {whole}"
            );
        }
        assert!(!stream.contains("usage"), "{stream}");
    }
}

#[tokio::test]
async fn usage_in_every_chunk_grows_to_the_last_one() {
    let router = start(|ask| says(ask, "four")).await;
    for (path, body, prompts) in [
        (TEXT, json!({"prompt": ["a", "bc"]}), 2),
        (CHAT, json!({"messages": user("q")}), 1),
    ] {
        let mut body = body;
        body["model"] = json!("tiny");
        body["stream"] = json!(true);
        body["stream_options"] =
            json!({"include_usage": true, "continuous_usage_stats": true, "include_obfuscation": false});
        let chunks = post(router.http, path, &body).await.chunks();
        let counts: Vec<u64> = chunks
            .iter()
            .map(|chunk| {
                chunk["usage"]["completion_tokens"]
                    .as_u64()
                    .unwrap_or_else(|| panic!("no usage: {chunk}"))
            })
            .collect();
        assert!(counts.is_sorted(), "{counts:?}");
        assert_eq!(counts.last(), Some(&(5 * prompts)));
        let last = chunks.last().expect("a last chunk");
        assert_eq!(last["choices"], json!([]));
        let total = last["usage"]["total_tokens"].as_u64().expect("a count");
        assert_eq!(last["usage"]["prompt_tokens"], total - 5 * prompts);
    }
}

#[tokio::test]
async fn unknown_options_of_a_stream_are_named_too() {
    let router = start(|ask| says(ask, "ok")).await;
    let body = json!({"model": "tiny", "prompt": "p", "stream": true, "stream_options": {"colour": 1}});
    let response = post(router.http, TEXT, &body).await;
    assert_eq!(
        response.headers["x-swallow-ignored-fields"],
        "stream_options.colour"
    );
}

#[tokio::test]
async fn the_model_goes_on_with_the_last_message() {
    let router = start(|ask| says(ask, " sat")).await;
    let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "The cat "}]);
    let body = json!({"model": "tiny", "messages": messages, "continue_final_message": true});
    let response = post(router.http, CHAT, &body).await.json();
    assert_eq!(
        response["choices"][0]["message"]["content"], " sat",
        "what is new"
    );
    let prompt = router.seen.ask().prompt.to_vec();
    let end = ids("The cat");
    assert_eq!(
        prompt[prompt.len() - end.len()..],
        end,
        "the template trims, and nothing is behind it"
    );
    let tokens = post(router.http, "/tokenize", &body).await.json();
    assert_eq!(tokens["tokens"], json!(prompt));
    for (field, more) in [
        ("add_generation_prompt", json!({"add_generation_prompt": true})),
        ("continue_final_message", json!({"messages": user(" \n")})),
    ] {
        let mut body = body.clone();
        for (name, value) in more.as_object().expect("an object") {
            body[name] = value.clone();
        }
        let refused = post(router.http, CHAT, &body).await;
        assert_eq!(
            (refused.status, &refused.json()["error"]["param"]),
            (400, &json!(field)),
            "{more}"
        );
    }
}
