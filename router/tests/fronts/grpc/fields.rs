//! A field that is wrong is named, by its path in the message.

use super::*;

/// The code and the field of a refusal.
pub(super) fn refused(status: &Status) -> (Code, String) {
    let details = status.get_error_details();
    assert_eq!(
        details.error_info().map(|info| info.domain.as_str()),
        Some("swallow"),
        "{status}"
    );
    let violations = details
        .bad_request()
        .map(|bad| bad.field_violations.clone())
        .unwrap_or_default();
    (
        status.code(),
        violations.into_iter().map(|violation| violation.field).collect(),
    )
}

async fn check(cases: Vec<(wire::GenerateRequest, &str)>) {
    let router = start(|ask| says(ask, "ok")).await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    for (request, name) in cases {
        let status = client.generate(request).await.expect_err(name);
        assert_eq!(
            refused(&status),
            (Code::InvalidArgument, name.to_owned()),
            "{status}"
        );
    }
    assert!(router.seen.asks().is_empty());
}

#[tokio::test]
async fn sampling() {
    let with = |change: fn(&mut wire::SamplingParams)| {
        let mut params = wire::SamplingParams::default();
        change(&mut params);
        wire::GenerateRequest {
            sampling: Some(params),
            ..text("p")
        }
    };
    check(vec![
        (with(|s| s.temperature = Some(2.1)), "sampling.temperature"),
        (with(|s| s.temperature = Some(f32::NAN)), "sampling.temperature"),
        (with(|s| s.top_p = Some(0.0)), "sampling.top_p"),
        (with(|s| s.top_p = Some(1.5)), "sampling.top_p"),
        (with(|s| s.min_p = Some(-0.1)), "sampling.min_p"),
        (
            with(|s| s.presence_penalty = Some(-2.5)),
            "sampling.presence_penalty",
        ),
        (
            with(|s| s.frequency_penalty = Some(f32::INFINITY)),
            "sampling.frequency_penalty",
        ),
        (
            with(|s| s.repetition_penalty = Some(0.0)),
            "sampling.repetition_penalty",
        ),
        (
            with(|s| s.logit_bias = [(262, 1.0)].into()),
            "sampling.logit_bias",
        ),
        (
            with(|s| s.logit_bias = [(1, 100.5)].into()),
            "sampling.logit_bias",
        ),
        (
            with(|s| s.logit_bias = (0..1025).map(|id| (id, 1.0)).collect()),
            "sampling.logit_bias",
        ),
    ])
    .await;
}

#[tokio::test]
async fn stop_criteria() {
    let with = |change: fn(&mut wire::StopCriteria)| {
        let mut criteria = wire::StopCriteria::default();
        change(&mut criteria);
        wire::GenerateRequest {
            stop: Some(criteria),
            ..text("p")
        }
    };
    check(vec![
        (with(|s| s.max_output_tokens = Some(0)), "stop.max_output_tokens"),
        (
            with(|s| (s.max_output_tokens, s.min_output_tokens) = (Some(1), Some(2))),
            "stop.min_output_tokens",
        ),
        (
            with(|s| s.stop_strings = vec![String::new()]),
            "stop.stop_strings",
        ),
        (
            with(|s| s.stop_strings = vec!["x".into(); 257]),
            "stop.stop_strings",
        ),
        (
            with(|s| s.stop_strings = vec!["x".repeat(17 << 10)]),
            "stop.stop_strings",
        ),
        (with(|s| s.stop_token_ids = vec![262]), "stop.stop_token_ids"),
        (with(|s| s.max_output_tokens = Some(CONTEXT)), "prompt"),
    ])
    .await;
}

#[tokio::test]
async fn prompt_scores_and_policy() {
    let ids = |ids: Vec<u32>| wire::GenerateRequest {
        prompt: Some(Prompt::TokenIds(wire::TokenIds { ids })),
        ..text("")
    };
    let scores = |output, top_n, prompt, prompt_top_n| wire::GenerateRequest {
        logprobs: Some(wire::LogprobOptions {
            output,
            top_n,
            prompt,
            prompt_top_n,
        }),
        ..text("p")
    };
    let policy = wire::RequestPolicy {
        max_queue_wait: Some(prost_types::Duration {
            seconds: -1,
            nanos: 0,
        }),
        ..Default::default()
    };
    check(vec![
        (
            wire::GenerateRequest {
                prompt: None,
                ..text("p")
            },
            "prompt",
        ),
        (
            wire::GenerateRequest {
                add_special_tokens: Some(false),
                ..text("")
            },
            "prompt",
        ),
        (ids(vec![1, 262]), "prompt"),
        (ids(vec![]), "prompt"),
        (ids(vec![1; CONTEXT as usize]), "prompt"),
        (
            wire::GenerateRequest {
                add_special_tokens: Some(true),
                ..ids(vec![1])
            },
            "add_special_tokens",
        ),
        (scores(false, 1, false, 0), "logprobs.top_n"),
        (scores(true, 21, false, 0), "logprobs.top_n"),
        (scores(false, 0, true, 21), "logprobs.prompt_top_n"),
        (scores(false, 0, false, 1), "logprobs.prompt_top_n"),
        (
            wire::GenerateRequest {
                candidate_count: 129,
                ..text("p")
            },
            "candidate_count",
        ),
        (
            wire::GenerateRequest {
                request_id: "x".repeat(129),
                ..text("p")
            },
            "request_id",
        ),
        (
            wire::GenerateRequest {
                model: String::new(),
                ..text("p")
            },
            "model",
        ),
        (
            wire::GenerateRequest {
                policy: Some(policy),
                ..text("p")
            },
            "policy.max_queue_wait",
        ),
    ])
    .await;
}

#[tokio::test]
async fn conversations_and_streams() {
    let router = start(|ask| says(ask, "ok")).await;
    let mut generation = GenerationServiceClient::new(channel(&router).await);
    let mut chat = ChatServiceClient::new(channel(&router).await);
    let status = generation
        .stream_generate(wire::StreamGenerateRequest::default())
        .await
        .expect_err("nothing");
    assert_eq!(refused(&status), (Code::InvalidArgument, "generate".to_owned()));
    let generate = Some(wire::GenerateRequest {
        candidate_count: 129,
        ..text("p")
    });
    let status = generation
        .stream_generate(wire::StreamGenerateRequest {
            generate,
            stream: None,
        })
        .await;
    assert_eq!(
        refused(&status.expect_err("too many")).1,
        "generate.candidate_count"
    );
    let request = wire::ChatRequest {
        model: "tiny".into(),
        messages: user("q"),
        ..Default::default()
    };
    let scores = wire::LogprobOptions {
        prompt: true,
        ..Default::default()
    };
    let args = |name: &str| {
        let fields = [(name.to_owned(), prost_types::Value::default())];
        Some(prost_types::Struct {
            fields: fields.into(),
        })
    };
    for (request, name) in [
        (
            wire::ChatRequest {
                messages: Vec::new(),
                ..request.clone()
            },
            "messages",
        ),
        (
            wire::ChatRequest {
                messages: vec![wire::ChatMessage::default()],
                ..request.clone()
            },
            "messages[0].role",
        ),
        (
            wire::ChatRequest {
                template_args: args("messages"),
                ..request.clone()
            },
            "template_args",
        ),
        (
            wire::ChatRequest {
                template_args: args("tools"),
                ..request.clone()
            },
            "template_args",
        ),
        (
            wire::ChatRequest {
                logprobs: Some(scores),
                ..request
            },
            "logprobs.prompt",
        ),
    ] {
        let status = chat.chat(request).await.expect_err(name);
        assert_eq!(
            refused(&status),
            (Code::InvalidArgument, name.to_owned()),
            "{status}"
        );
    }
    assert!(router.seen.asks().is_empty());
}
