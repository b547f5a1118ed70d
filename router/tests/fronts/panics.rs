//! A bug that one request meets: that request ends with an error in its protocol's form, and nobody else notices.

use futures::{StreamExt, stream};
use serde_json::json;
use swallow_router::ask::Ask;
use swallow_rpc::inference::v1::{
    self as wire, generate_request::Prompt, generation_service_client::GenerationServiceClient,
};
use tonic::{Code, transport::Channel};

use crate::support::{
    engine::{Events, Router, says, start, started, tokens},
    http::{get, post},
};

const TEXT: &str = "/v1/completions";

/// A prompt of one letter panics before it starts, one of two letters after its first token.
async fn fragile() -> Router {
    start(|ask| match ask.prompt.len() {
        2 => panic!("the test broke it"),
        3 => Ok(breaks(ask)),
        _ => says(ask, "ok"),
    })
    .await
}

fn breaks(ask: &Ask) -> Events {
    let begun = stream::iter([started(), tokens(ask, 0, &[b'a'.into()])]);
    begun
        .chain(stream::poll_fn(|_| panic!("the test broke it")))
        .boxed()
}

async fn counted(router: &Router, protocol: &str) -> String {
    let text = get(router.http, "/metrics").await.body;
    let series = format!("swallow_router_request_panics_total{{protocol=\"{protocol}\"}} ");
    text.lines()
        .find_map(|line| line.strip_prefix(&series))
        .expect("counted")
        .to_owned()
}

#[tokio::test]
async fn over_http() {
    let router = fragile().await;
    let ask = |prompt: &str, stream: bool| json!({"model": "tiny", "prompt": prompt, "stream": stream});
    for prompt in ["p", "pp"] {
        let answer = post(router.http, TEXT, &ask(prompt, false)).await;
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (500, &json!("internal")),
            "{prompt}"
        );
    }
    let events = post(router.http, TEXT, &ask("pp", true)).await.events();
    let last = events.last().expect("events");
    assert!(last.contains("\"internal\""), "{events:?}");
    assert!(!events.iter().any(|event| event == "[DONE]"), "{events:?}");
    assert!(events[0].contains("\"a\""), "{events:?}");
    assert_eq!(counted(&router, "http").await, "3");
    router.seen.all_dropped(2).await;
    let answer = post(router.http, TEXT, &ask("ppp", false)).await;
    assert_eq!(answer.json()["choices"][0]["text"], "ok");
}

#[tokio::test]
async fn over_grpc() {
    let router = fragile().await;
    let channel = Channel::from_shared(format!("http://{}", router.grpc)).expect("an address");
    let mut client = GenerationServiceClient::new(channel.connect().await.expect("it listens"));
    let ask = |prompt: &str| wire::GenerateRequest {
        model: "tiny".into(),
        prompt: Some(Prompt::Text(prompt.into())),
        ..wire::GenerateRequest::default()
    };
    for prompt in ["p", "pp"] {
        let status = client.generate(ask(prompt)).await.expect_err("a bug");
        assert_eq!(status.code(), Code::Internal, "{status:?}");
        assert!(status.message().contains("bug"), "{status:?}");
    }
    let request = wire::StreamGenerateRequest {
        generate: Some(ask("pp")),
        stream: None,
    };
    let mut answer = client
        .stream_generate(request)
        .await
        .expect("it starts")
        .into_inner();
    let status = loop {
        match answer.message().await {
            Ok(message) => assert!(message.is_some(), "a clean end"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    assert_eq!(counted(&router, "grpc").await, "3");
    // On the same connection.
    client.generate(ask("ppp")).await.expect("the others go on");
}
