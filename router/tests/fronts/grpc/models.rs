//! Models, tokens, health and reflection.

use super::*;

#[tokio::test]
async fn models_and_tokens() {
    let router = start(|ask| says(ask, "ok")).await;
    let mut models = ModelServiceClient::new(channel(&router).await);
    let mut names = Vec::new();
    let mut page_token = String::new();
    loop {
        let page = models
            .list_models(wire::ListModelsRequest {
                page_size: 2,
                page_token,
            })
            .await
            .expect("a page");
        let page = page.into_inner();
        names.extend(page.models.into_iter().map(|model| model.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["models/tiny", "models/absent", "models/mute"]);
    let bad = wire::ListModelsRequest {
        page_size: -1,
        ..Default::default()
    };
    assert_eq!(
        models.list_models(bad).await.expect_err("negative").code(),
        Code::InvalidArgument
    );
    let get = |name: &str| wire::GetModelRequest { name: name.into() };
    let model = models
        .get_model(get("models/org/alias"))
        .await
        .expect("served")
        .into_inner()
        .model
        .expect("a model");
    assert_eq!(
        (model.name.as_str(), &model.aliases[..]),
        ("models/tiny", &["org/alias".to_owned()][..])
    );
    assert_eq!(
        (model.max_context_tokens, model.vocab_size, model.bos_token_id),
        (CONTEXT, 262, Some(BOS))
    );
    assert_eq!((model.eos_token_ids, model.ready_replicas), (vec![EOS], 1));
    assert!(!model.tokenizer_digest.is_empty() && !model.chat_template_digest.is_empty());
    assert_eq!(
        models
            .get_model(get("models/nobody"))
            .await
            .expect_err("unknown")
            .code(),
        Code::NotFound
    );
    assert_eq!(
        models.get_model(get("tiny")).await.expect_err("no prefix").code(),
        Code::InvalidArgument
    );

    let mut tokens = TokenizationServiceClient::new(channel(&router).await);
    let request = wire::TokenizeRequest {
        model: "tiny".into(),
        input: Some(Input::Text("é".into())),
        add_special_tokens: None,
    };
    let got = tokens.tokenize(request).await.expect("text").into_inner();
    assert_eq!(
        (got.tokens.expect("ids").ids, got.max_context_tokens),
        (vec![BOS, 0xC3, 0xA9], CONTEXT)
    );
    let conversation = wire::tokenize_request::Conversation {
        messages: user("q"),
        tools: Vec::new(),
    };
    let request = wire::TokenizeRequest {
        model: "tiny".into(),
        input: Some(Input::Conversation(conversation)),
        add_special_tokens: None,
    };
    let got = tokens
        .tokenize(request)
        .await
        .expect("a conversation")
        .into_inner()
        .tokens
        .expect("ids")
        .ids;
    assert_eq!(got.iter().filter(|&&id| id == BOS).count(), 1);
    let ids = wire::TokenIds {
        ids: vec![BOS, 0xE6, 0x97],
    };
    let request = wire::DetokenizeRequest {
        model: "tiny".into(),
        tokens: Some(ids),
        skip_special_tokens: true,
    };
    let bytes = tokens.detokenize(request).await.expect("bytes").into_inner().text;
    assert_eq!(bytes, [0xE6, 0x97], "exact, though it is no text");
}

/// Asks until the answer is this one.
async fn reached(health: &mut HealthClient<Channel>, service: &str, status: ServingStatus) {
    let request = || HealthCheckRequest {
        service: service.into(),
    };
    let asked = async {
        while health
            .check(request())
            .await
            .map(|answer| answer.into_inner().status())
            .ok()
            != Some(status)
        {}
    };
    tokio::time::timeout(Duration::from_secs(10), asked)
        .await
        .expect(service);
}

#[tokio::test]
async fn ids_outside_of_the_vocabulary_are_no_text() {
    let router = start(|ask| says(ask, "ok")).await;
    let mut client = TokenizationServiceClient::new(channel(&router).await);
    let request = wire::DetokenizeRequest {
        model: "tiny".into(),
        tokens: Some(wire::TokenIds {
            ids: vec![1, 1 << 20],
        }),
        ..Default::default()
    };
    let status = client.detokenize(request).await.expect_err("no such token");
    assert_eq!(
        super::fields::refused(&status),
        (Code::InvalidArgument, "tokens".to_owned())
    );
}

#[tokio::test]
async fn health_is_told_by_service_and_by_model() {
    let router = start(|ask| says(ask, "ok")).await;
    let mut health = HealthClient::new(channel(&router).await);
    let request = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    // A model's files are read first.
    reached(&mut health, "models/tiny", ServingStatus::Serving).await;
    reached(&mut health, "models/mute", ServingStatus::NotServing).await;
    let mut watch = health
        .watch(request("models/tiny"))
        .await
        .expect("a watch")
        .into_inner();
    for (service, status) in [
        ("", ServingStatus::Serving),
        ("swallow.inference.v1.GenerationService", ServingStatus::Serving),
        ("swallow.inference.v1.ChatService", ServingStatus::Serving),
        ("models/org/alias", ServingStatus::Serving),
    ] {
        assert_eq!(
            health
                .check(request(service))
                .await
                .expect(service)
                .into_inner()
                .status(),
            status,
            "{service}"
        );
    }
    assert_eq!(
        health
            .check(request("models/nobody"))
            .await
            .expect_err("unknown")
            .code(),
        Code::NotFound
    );
    router.door.drain();
    while watch
        .message()
        .await
        .expect("no error")
        .expect("an update")
        .status()
        != ServingStatus::NotServing
    {}
    let status = GenerationServiceClient::new(channel(&router).await)
        .generate(text("p"))
        .await
        .expect_err("draining");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.get_error_details().retry_info().is_some());
}

#[tokio::test]
async fn reflection_lists_the_services() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let router = start(|ask| says(ask, "ok")).await;
    let mut client = ServerReflectionClient::new(channel(&router).await);
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = client
        .server_reflection_info(stream::iter([list]))
        .await
        .expect("accepted")
        .into_inner();
    let answer = answers
        .message()
        .await
        .expect("no error")
        .expect("an answer")
        .message_response
        .expect("a response");
    let MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in [
        "swallow.inference.v1.ChatService",
        "swallow.inference.v1.GenerationService",
        "grpc.health.v1.Health",
    ] {
        assert!(names.iter().any(|listed| listed == name), "{names:?}");
    }
}

#[tokio::test]
async fn a_health_watch_does_not_hold_up_the_end() {
    let router = start(|ask| says(ask, "ok")).await;
    let mut health = HealthClient::new(channel(&router).await);
    let request = HealthCheckRequest::default();
    let mut watch = health.watch(request).await.expect("a watch").into_inner();
    watch.message().await.expect("no error").expect("an update");
    router.shutdown.begin(Duration::from_secs(600));
    router.shutdown.begin(Duration::from_millis(50));
    for server in router.servers {
        server.await.expect("no panic");
    }
}
