//! The public gRPC service over real sockets, before an engine that says what the test wants.

mod answers;
mod errors;
mod fields;
mod models;
mod scores;
mod tools;

use std::time::{Duration, Instant};

use crate::support::{
    BOS, EOS, EOT,
    engine::{ABSENT, CONTEXT, Router, finished, says, start, started, then_hangs, tokens},
    http::post,
};
use futures::{StreamExt, stream};
use serde_json::json;
use swallow_router::ask::{Failure, Finish, Refusal};
use swallow_rpc::inference::v1::{
    self as wire, chat_service_client::ChatServiceClient, finish::Matched, generate_request::Prompt,
    generation_service_client::GenerationServiceClient, model_service_client::ModelServiceClient,
    stream_chat_response, stream_generate_response::Event,
    tokenization_service_client::TokenizationServiceClient, tokenize_request::Input,
};
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_types::StatusExt;

async fn channel(router: &Router) -> Channel {
    let endpoint = Channel::from_shared(format!("http://{}", router.grpc)).expect("an address");
    endpoint.connect().await.expect("the router listens")
}

fn text(prompt: &str) -> wire::GenerateRequest {
    wire::GenerateRequest {
        model: "tiny".into(),
        prompt: Some(Prompt::Text(prompt.into())),
        ..wire::GenerateRequest::default()
    }
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn user(content: &str) -> Vec<wire::ChatMessage> {
    vec![wire::ChatMessage {
        role: wire::Role::User.into(),
        content: content.into(),
        ..wire::ChatMessage::default()
    }]
}

async fn events(
    client: &mut GenerationServiceClient<Channel>,
    generate: wire::GenerateRequest,
    token_ids: bool,
) -> Vec<Event> {
    let stream = Some(wire::StreamOptions { token_ids });
    let request = wire::StreamGenerateRequest {
        generate: Some(generate),
        stream,
    };
    let mut stream = client
        .stream_generate(request)
        .await
        .expect("accepted")
        .into_inner();
    let mut events = Vec::new();
    while let Some(message) = stream.message().await.expect("no error") {
        assert_eq!(message.sequence, events.len() as u64 + 1, "dense from 1");
        events.push(message.event.expect("an event"));
    }
    events
}
