//! OpenAI's HTTP interface, with vLLM's additions to it, and the pages that probes and scrapers read.
//!
//! A field that is known is served or refused by name; one that nobody knows is named in the response's header
//! `x-swallow-ignored-fields`. A client's deadline, in the header `x-request-timeout-ms` or `grpc-timeout`, binds the whole
//! request, streams too. Any bearer token will do: who may ask is not decided here.

mod body;
mod chat;
mod completions;
mod error;
mod fields;
mod format;
mod known;
mod logprobs;
mod params;
mod render;
mod tokens;
mod waiting;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tower::{Service, service_fn};
use uuid::Uuid;

use crate::{
    ask::Refusal,
    fleet::ModelEntry,
    generate::{Door, Fault, Invalid},
    guard::guarded,
    http::{Front, Protocol, read_body},
    metrics::{Call, Stage},
};
pub(crate) use error::Problem;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// How long the client waits, in milliseconds.
const TIMEOUT_MS: &str = "x-request-timeout-ms";
/// The same as gRPC writes it, for gateways that translate.
const GRPC_TIMEOUT: &str = "grpc-timeout";
const IGNORED_FIELDS: HeaderName = HeaderName::from_static("x-swallow-ignored-fields");
const MAX_REQUEST_ID_BYTES: usize = 128;
/// Unknown fields that a response names.
const MAX_NAMED: usize = 32;
/// Of an unknown field's name.
const MAX_NAME_BYTES: usize = 64;

/// What handlers share.
#[derive(Clone)]
struct Api {
    door: Door,
    settings: Settings,
}

/// What an operator decides.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Of a request.
    pub max_body_bytes: usize,
    /// Tell what a model's tokenizer is made of, at /tokenizer_info.
    pub tokenizer_info: bool,
    /// A stream whose first piece takes longer begins with comments, one each such time.
    pub quiet: Duration,
}

impl Settings {
    /// The usual ones.
    pub fn new(max_body_bytes: usize) -> Self {
        Self {
            max_body_bytes,
            tokenizer_info: false,
            quiet: waiting::QUIET,
        }
    }
}

/// All routes, with the usual settings.
pub fn front(door: Door, max_body_bytes: usize) -> Front {
    front_with(door, Settings::new(max_body_bytes))
}

/// All routes.
pub fn front_with(door: Door, settings: Settings) -> Front {
    let panics = door.metrics().panics(Protocol::Http.label());
    let api = Api { door, settings };
    let routes = Router::new()
        .route(
            "/v1/chat/completions",
            post(|state, request| answer(state, request, "chat.completions")),
        )
        .route(
            "/v1/completions",
            post(|state, request| answer(state, request, "completions")),
        )
        .route(
            "/tokenize",
            post(|state, request| answer(state, request, "tokenize")),
        )
        .route(
            "/detokenize",
            post(|state, request| answer(state, request, "detokenize")),
        )
        .route("/tokenizer_info", get(tokens::tokenizer_info))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/health", get(|| async { StatusCode::OK }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(api);
    let front = guarded(routes, Protocol::Http, panics);
    Front::new(service_fn(move |request| with_request_id(request, front.clone())))
}

/// A fault of the router itself.
pub(crate) fn internal(text: &'static str) -> Problem {
    Problem::Internal(text)
}

/// A request's parts that handlers need.
struct Asked {
    id: String,
    body: Bytes,
    method: &'static str,
    /// When all of it was here.
    at: Instant,
    /// The client gives up then.
    deadline: Option<tokio::time::Instant>,
}

/// Fields of a request that nobody knows.
struct Ignored(Vec<String>);

impl Asked {
    /// It is read; `names` are the fields that nobody knows.
    fn parsed(&self, api: &Api, names: Vec<String>) -> Ignored {
        api.door.metrics().stage(Stage::Parse, self.at.elapsed());
        if !names.is_empty() {
            api.door.metrics().ignored_fields(self.method, names.len());
            tracing::info!(request_id = self.id, method = self.method, fields = ?named(&names), "unknown fields ignored");
        }
        Ignored(names)
    }
}

impl Ignored {
    fn named_in(self, mut response: Response) -> Response {
        let names = named(&self.0).join(", ");
        if let (false, Ok(value)) = (names.is_empty(), HeaderValue::from_str(&names)) {
            response.headers_mut().insert(IGNORED_FIELDS, value);
        }
        response
    }
}

/// Names fit for a header and a log line: the client chose them.
fn named(names: &[String]) -> Vec<String> {
    let plain = |c: char| if c.is_ascii_graphic() && c != ',' { c } else { '?' };
    names
        .iter()
        .take(MAX_NAMED)
        .map(|name| name.chars().take(MAX_NAME_BYTES).map(plain).collect())
        .collect()
}

type Handled<'a> = BoxFuture<'a, Result<Response, Problem>>;

async fn answer(State(api): State<Api>, request: Request, method: &'static str) -> Response {
    let mut call = Some(api.door.metrics().call(method));
    match handle(&api, request, method, &mut call).await {
        Ok(response) => {
            // Where the response is a stream, the stream has the call.
            if let Some(call) = &mut call {
                call.ended(tonic::Code::Ok);
            }
            response
        }
        Err(problem) => {
            if let Some(call) = &mut call {
                call.ended(problem.code());
            }
            tracing::debug!(method, %problem, "refused");
            problem.into_response()
        }
    }
}

async fn handle(
    api: &Api,
    request: Request,
    method: &'static str,
    call: &mut Option<Call>,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let deadline = deadline(&parts.headers)?;
    let RequestId(id) = parts.extensions.get().cloned().unwrap_or_default();
    // Its headers share the connection's buffer, which could not be used again meanwhile.
    drop(parts);
    let body = read_body(body, api.settings.max_body_bytes).await?;
    let asked = Asked {
        id,
        body,
        method,
        at: Instant::now(),
        deadline,
    };
    let handled: Handled<'_> = match method {
        "chat.completions" => Box::pin(chat::chat(api, asked, call)),
        "completions" => Box::pin(completions::completions(api, asked, call)),
        "tokenize" => Box::pin(tokens::tokenize(api, asked, call)),
        _ => Box::pin(tokens::detokenize(api, asked, call)),
    };
    handled.await
}

/// When the client gives up, by its headers; the sooner counts where both are given.
fn deadline(headers: &HeaderMap) -> Result<Option<tokio::time::Instant>, Invalid> {
    let read = |name: &'static str, read: fn(&str) -> Option<Duration>, why: &'static str| {
        let Some(value) = headers.get(name) else {
            return Ok(None);
        };
        let timeout = value.to_str().ok().and_then(read);
        timeout.map(Some).ok_or_else(|| Invalid::new(name, why))
    };
    let plain = read(TIMEOUT_MS, milliseconds, "must be 1 to 18 digits: milliseconds")?;
    let grpc = read(GRPC_TIMEOUT, crate::grpc::timeout, crate::grpc::TIMEOUT_FORM)?;
    let timeout = [plain, grpc].into_iter().flatten().min();
    Ok(timeout.and_then(|timeout| tokio::time::Instant::now().checked_add(timeout)))
}

fn milliseconds(text: &str) -> Option<Duration> {
    let digits = (1..=18).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok().map(Duration::from_millis))?
}

/// The client's own id, or one made here; the response carries it.
#[derive(Clone, Debug, Default)]
struct RequestId(String);

async fn with_request_id(mut request: Request, mut front: Front) -> Result<Response, Infallible> {
    let id = given_id(request.headers()).unwrap_or_else(|| Uuid::new_v4().simple().to_string());
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = front.call(request).await?;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    Ok(response)
}

fn given_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(&REQUEST_ID)?.to_str().ok()?;
    (!id.is_empty() && id.len() <= MAX_REQUEST_ID_BYTES && id.bytes().all(|byte| byte.is_ascii_graphic()))
        .then(|| id.to_owned())
}

/// A stream of server-sent events.
fn sse(body: Body) -> Response {
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // A buffering proxy would undo the streaming.
        (
            HeaderName::from_static("x-accel-buffering"),
            HeaderValue::from_static("no"),
        ),
    ];
    (headers, body).into_response()
}

fn described(entry: &ModelEntry, id: &str) -> Value {
    json!({
        "id": id, "object": "model", "created": 0, "owned_by": "swallow", "root": entry.name, "parent": null,
        "max_model_len": entry.max_model_len,
    })
}

async fn models(State(api): State<Api>) -> Response {
    let entries = api.door.models();
    let all = entries.iter().flat_map(|entry| {
        std::iter::once(&entry.name)
            .chain(&entry.aliases)
            .map(|id| described(entry, id))
    });
    Json(json!({"object": "list", "data": all.collect::<Vec<Value>>()})).into_response()
}

async fn model(State(api): State<Api>, Path(id): Path<String>) -> Response {
    match api.door.model(&id) {
        Ok(entry) => Json(described(&entry, &id)).into_response(),
        Err(fault) => Problem::from(fault).into_response(),
    }
}

/// Ready means: requests may be sent here. A router is ready once it has looked for replicas, however many it found,
/// until it is told to end: a model without any is that model's own matter, told here and by 503 with Retry-After,
/// and no reason to take the other models away.
async fn readyz(State(api): State<Api>) -> Response {
    if api.door.is_leaving() {
        return Problem::from(Fault::from(Refusal::ShuttingDown)).into_response();
    }
    let ready: BTreeMap<String, usize> = api
        .door
        .models()
        .iter()
        .map(|entry| (entry.name.clone(), entry.ready_replicas))
        .collect();
    if api.door.is_ready() {
        return Json(json!({"ready": true, "ready_replicas": ready})).into_response();
    }
    let body = json!({"ready": false, "reason": "looking for replicas", "ready_replicas": ready});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

async fn metrics(State(api): State<Api>) -> Response {
    let (text, content_type) = api.door.metrics().text();
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

async fn no_route(uri: Uri) -> Response {
    Problem::NoRoute(format!("there is nothing at {}", uri.path())).into_response()
}

async fn no_method(method: Method, uri: Uri) -> Response {
    Problem::NoMethod(format!("{method} is not allowed at {}", uri.path())).into_response()
}
