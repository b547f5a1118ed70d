//! What a client that asks well gets.

use super::*;

#[tokio::test]
async fn both_fronts_and_both_forms_give_the_same_text() {
    let answer = "日本🇯🇵 END";
    let router = start(move |ask| says(ask, answer)).await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    let stop = wire::StopCriteria {
        max_output_tokens: Some(100),
        stop_strings: vec!["END".into()],
        ..wire::StopCriteria::default()
    };
    let request = wire::GenerateRequest {
        stop: Some(stop.clone()),
        request_id: "mine".into(),
        ..text("p")
    };
    let whole = client
        .generate(request.clone())
        .await
        .expect("an answer")
        .into_inner();
    assert_eq!(
        (whole.request_id.as_str(), whole.model.as_str()),
        ("mine", "tiny")
    );
    let candidate = &whole.candidates[0];
    assert_eq!(candidate.text, "日本🇯🇵 ");
    assert_eq!(candidate.token_ids, ids(answer));
    let finish = candidate.finish.as_ref().expect("an end");
    assert_eq!(finish.reason(), wire::FinishReason::StopString);
    assert_eq!(finish.matched, Some(Matched::StopString("END".into())));
    let usage = whole.usage.expect("usage");
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.cached_prompt_tokens,
            usage.output_tokens
        ),
        (2, 2, 18)
    );
    assert!(usage.time_to_first_token.is_some() && usage.queue_time.is_some());

    let events = events(&mut client, request, false).await;
    assert!(matches!(&events[0], Event::Started(started) if started.prompt_tokens == 2));
    let deltas: Vec<&str> = events
        .iter()
        .filter_map(|event| match event {
            Event::Delta(delta) => Some(delta.text.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(deltas, ["日", "本", "🇯", "🇵", " "]);
    assert!(matches!(events.last(), Some(Event::Completed(_))));

    let mut chat = ChatServiceClient::new(channel(&router).await);
    let request = wire::ChatRequest {
        model: "models/tiny".into(),
        messages: user("q"),
        stop: Some(stop),
        ..wire::ChatRequest::default()
    };
    let answer = chat.chat(request.clone()).await.expect("an answer").into_inner();
    let message = answer.candidates[0].message.as_ref().expect("a message");
    assert_eq!(
        (message.role(), message.content.as_str()),
        (wire::Role::Assistant, "日本🇯🇵 ")
    );
    let request = wire::StreamChatRequest {
        chat: Some(request),
        stream: None,
    };
    let streamed: Vec<_> = chat
        .stream_chat(request)
        .await
        .expect("accepted")
        .into_inner()
        .map(|m| m.expect("no error"))
        .collect()
        .await;
    let joined: String = streamed
        .iter()
        .filter_map(|message| match &message.event {
            Some(stream_chat_response::Event::Delta(delta)) => Some(delta.text.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(joined, "日本🇯🇵 ");
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "q"}], "stop": "END"});
    let http = post(router.http, "/v1/chat/completions", &body).await.json();
    assert_eq!(http["choices"][0]["message"]["content"], joined);
    let asks = router.seen.asks();
    assert!(
        asks[2..].iter().all(|ask| ask.prompt == asks[2].prompt),
        "the same prompt, however it comes"
    );
}

#[tokio::test]
async fn everything_asked_for_reaches_the_engine_and_scores_come_back_with_exact_bytes() {
    let router = start(|ask| says(ask, "é")).await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    let sampling = wire::SamplingParams {
        temperature: Some(0.0),
        top_k: Some(5),
        seed: Some(7),
        logit_bias: [(9, 1.0), (3, -1.0)].into(),
        ..wire::SamplingParams::default()
    };
    let stop = wire::StopCriteria {
        max_output_tokens: Some(9),
        stop_token_ids: vec![5],
        stop_strings: vec!["<|eot_id|>".into()],
        ignore_eos: true,
        min_output_tokens: Some(1),
        ..wire::StopCriteria::default()
    };
    let request = wire::GenerateRequest {
        prompt: Some(Prompt::TokenIds(wire::TokenIds { ids: vec![65, 0xE6] })),
        sampling: Some(sampling),
        stop: Some(stop),
        logprobs: Some(wire::LogprobOptions {
            output: true,
            top_n: 1,
            prompt: true,
            prompt_top_n: 2,
        }),
        policy: Some(wire::RequestPolicy {
            cache_salt: "s".into(),
            max_queue_wait: Duration::from_secs(3).try_into().ok(),
        }),
        candidate_count: 2,
        ..text("")
    };
    let answer = client
        .generate(request.clone())
        .await
        .expect("an answer")
        .into_inner();
    let ask = router.seen.ask();
    assert_eq!(ask.prompt[..], [65, 0xE6]);
    assert_eq!(
        (ask.sampling.temperature, ask.sampling.top_k, ask.sampling.top_p),
        (Some(0.0), Some(5), None)
    );
    assert_eq!(ask.sampling.logit_bias, [(3, -1.0), (9, 1.0)]);
    assert_eq!(
        (ask.max_tokens, ask.min_tokens, ask.ignore_eos, ask.candidates),
        (9, 1, true, 2)
    );
    assert_eq!(
        (ask.stop_token_ids, ask.max_queue_wait),
        (vec![5, EOT], Some(Duration::from_secs(3)))
    );
    assert_ne!(ask.cache_salt, 0);
    assert_eq!(answer.prompt_logprobs.len(), 2);
    assert_eq!(
        (
            answer.prompt_logprobs[0].logprob,
            answer.prompt_logprobs[1].logprob
        ),
        (None, Some(-0.5))
    );
    assert_eq!(
        (
            &answer.prompt_logprobs[1].bytes[..],
            answer.prompt_logprobs[1].top.len()
        ),
        (&[0xE6][..], 2)
    );
    let candidate = &answer.candidates[1];
    assert_eq!(
        (
            candidate.index,
            candidate.logprobs.len(),
            &candidate.logprobs[0].bytes[..]
        ),
        (1, 3, &[0xC3][..])
    );
    let events = events(&mut client, request, true).await;
    assert!(matches!(&events[0], Event::Started(started) if started.prompt_logprobs.len() == 2));
    let streamed: Vec<u32> = events
        .iter()
        .filter_map(|event| match event {
            Event::Delta(delta) if delta.index == 0 => Some(delta.token_ids.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(streamed, [0xC3, 0xA9, EOS]);
}

#[tokio::test]
async fn a_candidate_that_finishes_by_a_stop_token_says_which() {
    let router = start(|ask| {
        let events = vec![
            started(),
            tokens(ask, 0, &[b'a'.into(), 7]),
            finished(0, Finish::StopToken(7)),
        ];
        Ok(stream::iter(events).boxed())
    })
    .await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    for (include, expected) in [(false, "a"), (true, "a\u{7}")] {
        let stop = wire::StopCriteria {
            stop_token_ids: vec![7],
            include_stop_in_output: include,
            ..Default::default()
        };
        let answer = client
            .generate(wire::GenerateRequest {
                stop: Some(stop),
                ..text("p")
            })
            .await
            .expect("an answer");
        let candidate = answer.into_inner().candidates.remove(0);
        assert_eq!(candidate.text, expected);
        let finish = candidate.finish.expect("an end");
        assert_eq!(
            (finish.reason(), finish.matched),
            (wire::FinishReason::StopToken, Some(Matched::TokenId(7)))
        );
    }
}
