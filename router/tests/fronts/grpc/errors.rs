//! Deadlines, refusals, failures, cancels.

use super::*;

#[tokio::test]
async fn a_deadline_binds_the_whole_of_a_stream() {
    let router = start(|ask| then_hangs(vec![started(), tokens(ask, 0, &ids("a"))])).await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    let begun = Instant::now();
    let mut request = tonic::Request::new(wire::StreamGenerateRequest {
        generate: Some(text("p")),
        stream: None,
    });
    // The header alone: the client's library must not be the one that ends the call.
    request
        .metadata_mut()
        .insert("grpc-timeout", "300m".parse().expect("ASCII"));
    let mut stream = client
        .stream_generate(request)
        .await
        .expect("accepted")
        .into_inner();
    let status = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "not a clean end"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert_eq!(
        status
            .get_error_details()
            .error_info()
            .map(|info| info.reason.clone())
            .as_deref(),
        Some("DECODE_DEADLINE")
    );
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_millis(290) && took < Duration::from_secs(3),
        "{took:?}"
    );
    router.seen.all_dropped(1).await;
    let mut request = tonic::Request::new(text("p"));
    request
        .metadata_mut()
        .insert("grpc-timeout", "50m".parse().expect("ASCII"));
    let status = client.generate(request).await.expect_err("too late");
    // This client has a timer of its own, which may be the first one here.
    assert!(
        matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled),
        "{status}"
    );
    router.seen.all_dropped(2).await;
    let mut request = tonic::Request::new(text("p"));
    request
        .metadata_mut()
        .insert("grpc-timeout", "soon".parse().expect("ASCII"));
    assert_eq!(
        client.generate(request).await.expect_err("no time").code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn refusals_say_when_to_come_again_and_failures_end_a_stream() {
    let router = start(|ask| match ask.max_tokens {
        1 => Err(Refusal::QueueFull {
            what: "tokens",
            retry_after: Duration::from_millis(1500),
        }),
        _ => {
            let lost = Failure::ReplicaLost {
                replica: "r".into(),
                cause: "c".into(),
            };
            Ok(stream::iter([started(), tokens(ask, 0, &ids("a")), Err(lost)]).boxed())
        }
    })
    .await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    let one = wire::StopCriteria {
        max_output_tokens: Some(1),
        ..Default::default()
    };
    let status = client
        .generate(wire::GenerateRequest {
            stop: Some(one),
            ..text("p")
        })
        .await
        .expect_err("full");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(
        status
            .metadata()
            .get("grpc-retry-pushback-ms")
            .and_then(|ms| ms.to_str().ok()),
        Some("1500")
    );
    let details = status.get_error_details();
    assert_eq!(
        details.retry_info().and_then(|info| info.retry_delay),
        Some(Duration::from_millis(1500))
    );
    assert_eq!(
        details.error_info().map(|info| info.reason.as_str()),
        Some("QUEUE_FULL")
    );
    let request = wire::StreamGenerateRequest {
        generate: Some(text("p")),
        stream: None,
    };
    let mut stream = client
        .stream_generate(request)
        .await
        .expect("accepted")
        .into_inner();
    let mut messages = 0;
    let status = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "not a clean end"),
            Err(status) => break status,
        }
        messages += 1;
    };
    assert_eq!((status.code(), messages), (Code::Unavailable, 2));
    for (model, code) in [
        ("nobody", Code::NotFound),
        (ABSENT, Code::Unavailable),
        ("mute", Code::Internal),
    ] {
        let status = client
            .generate(wire::GenerateRequest {
                model: model.into(),
                ..text("p")
            })
            .await
            .expect_err(model);
        assert_eq!(status.code(), code, "{status}");
    }
}

#[tokio::test]
async fn a_client_that_cancels_cancels_what_runs_for_it() {
    let router = start(|ask| then_hangs(vec![started(), tokens(ask, 0, &ids("a"))])).await;
    let mut client = GenerationServiceClient::new(channel(&router).await);
    let request = wire::StreamGenerateRequest {
        generate: Some(text("p")),
        stream: None,
    };
    let mut stream = client
        .stream_generate(request)
        .await
        .expect("accepted")
        .into_inner();
    stream.message().await.expect("no error").expect("a message");
    drop(stream);
    router.seen.all_dropped(1).await;
    let unary = tokio::time::timeout(Duration::from_millis(100), client.generate(text("p"))).await;
    assert!(unary.is_err(), "it hangs until the client gives up");
    router.seen.all_dropped(2).await;
}
