//! What the router is compared with: a tonic server and an axum server that do nothing but hand a request on, one
//! upstream call each, and hand back what comes. The backends behind them answer as the router would.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::post,
    serve::ListenerExt,
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use hyper_util::{client::legacy, client::legacy::connect::HttpConnector, rt::TokioExecutor};
use swallow_rpc::inference::v1::{
    self as wire,
    generation_service_client::GenerationServiceClient,
    generation_service_server::{GenerationService, GenerationServiceServer},
    stream_generate_response as stream,
};
use tokio::{net::TcpListener, sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Status, transport::Channel};

use super::{
    load::WORD,
    process::{Outcome, say, until_alone},
};

/// Connections of a relay to its backend.
const CONNECTIONS: usize = 8;

/// Serves both; says where: gRPC, then HTTP.
async fn serve(service: impl GenerationService, router: axum::Router) -> Outcome<()> {
    let grpc = TcpListener::bind("127.0.0.1:0").await?;
    let http = TcpListener::bind("127.0.0.1:0").await?;
    let addresses = (grpc.local_addr()?, http.local_addr()?);
    tokio::spawn(
        tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .add_service(GenerationServiceServer::new(service))
            .serve_with_incoming(TcpListenerStream::new(grpc).map(|accepted| {
                let stream = accepted?;
                stream.set_nodelay(true)?;
                Ok::<_, std::io::Error>(stream)
            })),
    );
    // Without it, every token would wait for the acknowledgement of the last one. What fails shows in its stream.
    let http = http.tap_io(|stream| drop(stream.set_nodelay(true)));
    tokio::spawn(async move { axum::serve(http, router).await });
    say(&addresses)?;
    tokio::task::spawn_blocking(until_alone).await?;
    Ok(())
}

/// Streams that get a word each step.
#[derive(Clone, Default)]
struct Steps(Arc<Mutex<Vec<mpsc::UnboundedSender<()>>>>);

impl Steps {
    fn start(step: Duration) -> Self {
        let steps = Self::default();
        let those = steps.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(step.max(Duration::from_millis(1)));
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let mut streams = those.0.lock().expect("no panic");
                streams.retain(|stream| stream.send(()).is_ok());
            }
        });
        steps
    }

    /// The first at once, then one each step.
    fn words(&self, most: usize) -> impl Stream<Item = ()> + Send + use<> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let first = sender.send(());
        debug_assert!(first.is_ok(), "the receiver is here");
        self.0.lock().expect("no panic").push(sender);
        UnboundedReceiverStream::new(receiver).take(most)
    }
}

struct Backend(Steps);

type Messages = Pin<Box<dyn Stream<Item = Result<wire::StreamGenerateResponse, Status>> + Send>>;

fn message(sequence: u64, event: stream::Event) -> Result<wire::StreamGenerateResponse, Status> {
    Ok(wire::StreamGenerateResponse {
        sequence,
        event: Some(event),
    })
}

fn most(request: &wire::GenerateRequest) -> u32 {
    let stop = request.stop.as_ref();
    stop.and_then(|stop| stop.max_output_tokens).unwrap_or(1)
}

#[tonic::async_trait]
impl GenerationService for Backend {
    type StreamGenerateStream = Messages;

    async fn generate(
        &self,
        _: tonic::Request<wire::GenerateRequest>,
    ) -> Result<tonic::Response<wire::GenerateResponse>, Status> {
        let candidate = wire::generate_response::Candidate {
            text: WORD.into(),
            token_ids: vec![1],
            ..Default::default()
        };
        Ok(tonic::Response::new(wire::GenerateResponse {
            request_id: "4f2a0c5e4d5b4f0c8e0e6a4a1f6f3b1d".into(),
            model: "bench".into(),
            candidates: vec![candidate],
            usage: Some(wire::Usage::default()),
            ..Default::default()
        }))
    }

    async fn score(
        &self,
        _: tonic::Request<wire::ScoreRequest>,
    ) -> Result<tonic::Response<wire::ScoreResponse>, Status> {
        Err(Status::unimplemented("the benchmark scores nothing"))
    }

    async fn stream_generate(
        &self,
        request: tonic::Request<wire::StreamGenerateRequest>,
    ) -> Result<tonic::Response<Messages>, Status> {
        let most = most(&request.into_inner().generate.unwrap_or_default());
        let started = message(1, stream::Event::Started(stream::Started::default()));
        let last = message(
            u64::from(most) + 2,
            stream::Event::Completed(stream::Completed::default()),
        );
        let words = self.0.words(most as usize);
        let deltas = words.enumerate().map(|(index, ())| {
            let delta = stream::Delta {
                text: WORD.into(),
                ..Default::default()
            };
            message(index as u64 + 2, stream::Event::Delta(delta))
        });
        let messages = futures::stream::iter([started]).chain(deltas);
        let messages = messages.chain(futures::stream::iter([last]));
        Ok(tonic::Response::new(Box::pin(messages)))
    }
}

/// A chunk as the router writes it.
const CHUNK: &str = r#"data: {"id":"cmpl-4f2a0c5e4d5b4f0c8e0e6a4a1f6f3b1d","object":"text_completion","created":1750000000,"model":"bench","choices":[{"index":0,"text":"WORD","logprobs":null,"finish_reason":null,"stop_reason":null}]}"#;
const WHOLE: &str = r#"{"id":"cmpl-4f2a0c5e4d5b4f0c8e0e6a4a1f6f3b1d","object":"chat.completion","created":1750000000,"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":" a"},"logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":512,"total_tokens":513,"completion_tokens":1}}"#;

async fn backend_http(State(steps): State<Steps>, body: Bytes) -> Response {
    #[derive(serde::Deserialize)]
    struct Asked {
        #[serde(default)]
        stream: bool,
        max_tokens: usize,
    }
    match serde_json::from_slice::<Asked>(&body) {
        Ok(asked) if asked.stream => {
            let chunk = Bytes::from(format!("{}\n\n", CHUNK.replace("WORD", WORD)));
            let words = steps.words(asked.max_tokens).map(move |()| chunk.clone());
            let last = futures::stream::iter([Bytes::from_static(b"data: [DONE]\n\n")]);
            let events = words.chain(last).map(Ok::<_, Infallible>);
            let headers = [("content-type", "text/event-stream; charset=utf-8")];
            (headers, Body::from_stream(events)).into_response()
        }
        Ok(_) => ([("content-type", "application/json")], WHOLE).into_response(),
        Err(error) => (http::StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

/// What answers behind a relay: a word to every stream each step.
pub async fn backend(step: Duration) -> Outcome<()> {
    let steps = Steps::start(step);
    let routes = axum::Router::new()
        .route("/v1/completions", post(backend_http))
        .route("/v1/chat/completions", post(backend_http));
    serve(Backend(steps.clone()), routes.with_state(steps)).await
}

struct Relay {
    clients: Vec<GenerationServiceClient<Channel>>,
    next: AtomicUsize,
}

impl Relay {
    fn client(&self) -> GenerationServiceClient<Channel> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        self.clients[next % self.clients.len()].clone()
    }
}

#[tonic::async_trait]
impl GenerationService for Relay {
    type StreamGenerateStream = tonic::Streaming<wire::StreamGenerateResponse>;

    async fn generate(
        &self,
        request: tonic::Request<wire::GenerateRequest>,
    ) -> Result<tonic::Response<wire::GenerateResponse>, Status> {
        self.client().generate(request).await
    }

    async fn score(
        &self,
        request: tonic::Request<wire::ScoreRequest>,
    ) -> Result<tonic::Response<wire::ScoreResponse>, Status> {
        self.client().score(request).await
    }

    async fn stream_generate(
        &self,
        request: tonic::Request<wire::StreamGenerateRequest>,
    ) -> Result<tonic::Response<Self::StreamGenerateStream>, Status> {
        self.client().stream_generate(request).await
    }
}

#[derive(Clone)]
struct RelayHttp {
    client: legacy::Client<HttpConnector, Body>,
    backend: SocketAddr,
}

async fn relay_http(State(relay): State<RelayHttp>, request: Request) -> Response {
    let target = format!("http://{}{}", relay.backend, request.uri().path());
    let (parts, body) = request.into_parts();
    let mut request = Request::new(body);
    *request.method_mut() = parts.method;
    *request.uri_mut() = target.parse().expect("an address and a path");
    match relay.client.request(request).await {
        Ok(response) => response.map(Body::new).into_response(),
        Err(error) => (http::StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    }
}

/// The bare relays to a backend.
pub async fn relay(grpc: SocketAddr, http: SocketAddr) -> Outcome<()> {
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        let channel = Channel::from_shared(format!("http://{grpc}"))?;
        let channel = channel.tcp_nodelay(true).connect().await?;
        clients.push(GenerationServiceClient::new(channel));
    }
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let relay = RelayHttp {
        client: legacy::Client::builder(TokioExecutor::new()).build(connector),
        backend: http,
    };
    let routes = axum::Router::new()
        .route("/v1/completions", post(relay_http))
        .route("/v1/chat/completions", post(relay_http));
    let next = AtomicUsize::new(0);
    serve(Relay { clients, next }, routes.with_state(relay)).await
}
