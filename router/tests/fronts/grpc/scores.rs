//! Log-likelihoods of continuations.

use swallow_router::ask::{Event as Heard, Score};

use super::{fields::refused, *};
use crate::support::engine::score;

fn continuations(texts: &[&str]) -> Vec<wire::score_request::Continuation> {
    use wire::score_request::continuation::Content;
    let one = |text: &&str| wire::score_request::Continuation {
        content: Some(Content::Text((*text).to_owned())),
    };
    texts.iter().map(one).collect()
}

#[tokio::test]
async fn scores_are_of_continuations_and_bound_to_a_context() {
    use wire::score_request::Context;
    let router = start(|ask| {
        let from = ask.prompt_logprobs_from as usize;
        let scores = ask.prompt[from..].iter().map(|&token| {
            // The second word is not what the model would say.
            let rank = if token == u32::from(b'x') { 2 } else { 1 };
            Score {
                rank,
                ..score(token, 0)
            }
        });
        let events = vec![
            started(),
            Ok(Heard::PromptScores(scores.collect())),
            finished(0, Finish::Length),
        ];
        Ok(stream::iter(events).boxed())
    })
    .await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    let request = wire::ScoreRequest {
        model: "tiny".into(),
        context: Some(Context::Text("The".into())),
        continuations: continuations(&[" cat", " x", "日"]),
        ..Default::default()
    };
    let answer = client.score(request).await.expect("sound").into_inner();
    let told: Vec<_> = answer
        .scores
        .iter()
        .map(|score| (score.logprob, score.is_greedy, score.token_count))
        .collect();
    assert_eq!(told, [(-2.0, true, 4), (-1.0, false, 2), (-1.5, true, 3)]);
    let asks = router.seen.asks();
    assert_eq!(asks.len(), 3);
    for ask in &asks {
        assert_eq!(
            (ask.prompt[0], ask.prompt_logprobs_from, ask.max_tokens),
            (BOS, 4, 0)
        );
    }
    assert_eq!(asks[0].prompt[4..], [32, 99, 97, 116], "the first goes alone");
    let usage = answer.usage.expect("usage");
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.cached_prompt_tokens,
            usage.output_tokens
        ),
        (8 + 6 + 7, 6, 0)
    );
}

#[tokio::test]
async fn what_is_wrong_with_a_score_is_named_where_it_is() {
    use wire::score_request::Context;
    let router = start(|ask| says(ask, "ok")).await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    let request = wire::ScoreRequest {
        model: "tiny".into(),
        context: Some(Context::Text("The".into())),
        continuations: continuations(&[" cat"]),
        ..Default::default()
    };
    for (request, name) in [
        (
            wire::ScoreRequest {
                context: None,
                ..request.clone()
            },
            "context",
        ),
        (
            wire::ScoreRequest {
                continuations: vec![],
                ..request.clone()
            },
            "continuations",
        ),
        (
            wire::ScoreRequest {
                continuations: continuations(&["a", ""]),
                ..request.clone()
            },
            "continuations[1]",
        ),
        (
            wire::ScoreRequest {
                context: Some(Context::TokenIds(wire::TokenIds { ids: vec![] })),
                ..request.clone()
            },
            "context",
        ),
        (
            wire::ScoreRequest {
                continuations: continuations(&["a", &"b".repeat(CONTEXT as usize)]),
                ..request.clone()
            },
            "continuations[1]",
        ),
        (
            wire::ScoreRequest {
                context: Some(Context::TokenIds(wire::TokenIds {
                    ids: vec![1, 1 << 20],
                })),
                ..request.clone()
            },
            "context",
        ),
        (
            wire::ScoreRequest {
                continuations: vec![wire::score_request::Continuation {
                    content: Some(wire::score_request::continuation::Content::TokenIds(
                        wire::TokenIds { ids: vec![1 << 20] },
                    )),
                }],
                ..request.clone()
            },
            "continuations[0]",
        ),
        (
            wire::ScoreRequest {
                continuations: vec![wire::score_request::Continuation::default()],
                ..request
            },
            "continuations[0]",
        ),
    ] {
        let status = client.score(request).await.expect_err(name);
        assert_eq!(
            refused(&status),
            (Code::InvalidArgument, name.to_owned()),
            "{status}"
        );
    }
}
