//! A Kubernetes API server that knows nothing but EndpointSlices, and fails when it is told to.
//!
//! Like `MockWorker` it runs on a runtime of its own, so that it can be gone without a word and come back.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// How a version that is too old is answered: real servers do both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    Status,
    Event,
}

#[derive(Default)]
struct Store {
    slices: BTreeMap<String, Value>,
    /// With the version of each.
    events: Vec<(u64, Value)>,
    version: u64,
    /// Versions before this are forgotten.
    oldest: u64,
    gone: Option<Gone>,
    refuse: Option<StatusCode>,
    watches: Vec<mpsc::UnboundedSender<String>>,
    lists: usize,
    opened: usize,
}

type Shared = Arc<Mutex<Store>>;

pub struct ApiServer {
    store: Shared,
    runtime: Option<Runtime>,
    pub address: SocketAddr,
}

fn lock(store: &Shared) -> MutexGuard<'_, Store> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ApiServer {
    pub fn start() -> Self {
        let mut server = Self {
            store: Shared::default(),
            runtime: None,
            address: "127.0.0.1:0".parse().expect("an address"),
        };
        server.come_back();
        server
    }

    /// Listens, at the old address if there was one.
    pub fn come_back(&mut self) {
        let socket = crate::mock_worker::socket(self.address);
        self.address = socket.local_addr().expect("it is bound");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let routes = Router::new()
            .route(
                "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
                get(answer),
            )
            .with_state(Arc::clone(&self.store));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(socket).expect("a listening socket");
            axum::serve(listener, routes).await
        });
        self.runtime = Some(runtime);
    }

    /// Gone, with every connection.
    pub fn go_away(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            lock(&self.store).watches.clear();
            runtime.shutdown_background();
        }
    }

    pub fn client(&self) -> kube::Client {
        let url = format!("http://{}", self.address).parse().expect("an address");
        kube::Client::try_from(kube::Config::new(url)).expect("plain HTTP needs nothing")
    }

    /// Creates a slice or changes it.
    pub fn put(&self, name: &str, slice: Value) {
        let mut store = lock(&self.store);
        let kind = if store.slices.contains_key(name) {
            "MODIFIED"
        } else {
            "ADDED"
        };
        let slice = store.change(kind, name, slice);
        store.slices.insert(name.to_owned(), slice);
    }

    pub fn delete(&self, name: &str) {
        let mut store = lock(&self.store);
        let slice = store.slices.remove(name).expect("it is there");
        store.change("DELETED", name, slice);
    }

    /// Forgets the past, and breaks every watch: none of their versions is known any more.
    pub fn compact(&self, gone: Gone) {
        let mut store = lock(&self.store);
        store.version += 1;
        store.oldest = store.version;
        store.events.clear();
        store.gone = Some(gone);
        store.watches.clear();
    }

    /// Ends every watch, as after its time.
    pub fn end_watches(&self) {
        lock(&self.store).watches.clear();
    }

    /// A line in every watch that is no event.
    pub fn garble(&self) {
        let store = lock(&self.store);
        let line = r#"{"type":"MODIFIED","object":{"metadata":5}}"#;
        store
            .watches
            .iter()
            .for_each(|watch| drop(watch.send(format!("{line}\n"))));
    }

    /// Answers everything with this status; `None`: no more.
    pub fn refuse(&self, status: Option<StatusCode>) {
        lock(&self.store).refuse = status;
    }

    /// Lists so far.
    pub fn lists(&self) -> usize {
        lock(&self.store).lists
    }

    /// Watches so far.
    pub fn opened(&self) -> usize {
        lock(&self.store).opened
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.go_away();
    }
}

impl Store {
    fn change(&mut self, kind: &str, name: &str, mut slice: Value) -> Value {
        self.version += 1;
        slice["metadata"]["name"] = name.into();
        slice["metadata"]["resourceVersion"] = self.version.to_string().into();
        let event = json!({"type": kind, "object": slice});
        self.watches
            .retain(|watch| watch.send(format!("{event}\n")).is_ok());
        self.events.push((self.version, event));
        slice
    }
}

fn status(code: StatusCode, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code.as_u16(),
           "reason": reason, "message": format!("the test says {reason}")})
}

async fn answer(
    State(store): State<Shared>,
    Path(namespace): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let mut store = lock(&store);
    assert_eq!(namespace, "models");
    assert_eq!(
        query.get("labelSelector").map(String::as_str),
        Some("kubernetes.io/service-name=m-worker")
    );
    if let Some(code) = store.refuse {
        return (code, Json(status(code, "Forbidden"))).into_response();
    }
    if !query.contains_key("watch") {
        store.lists += 1;
        let items: Vec<&Value> = store.slices.values().collect();
        let list = json!({"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1",
                          "metadata": {"resourceVersion": store.version.to_string()}, "items": items});
        return Json(list).into_response();
    }
    store.opened += 1;
    let version: u64 = query["resourceVersion"]
        .parse()
        .expect("a version that was given");
    if version < store.oldest {
        let expired = status(StatusCode::GONE, "Expired");
        return match store.gone {
            Some(Gone::Event) => format!("{}\n", json!({"type": "ERROR", "object": expired})).into_response(),
            _ => (StatusCode::GONE, Json(expired)).into_response(),
        };
    }
    let (sender, receiver) = mpsc::unbounded_channel();
    for (at, event) in &store.events {
        if *at > version {
            sender.send(format!("{event}\n")).expect("the receiver is here");
        }
    }
    store.watches.push(sender);
    let lines = UnboundedReceiverStream::new(receiver).map(Ok::<_, std::convert::Infallible>);
    Body::from_stream(lines).into_response()
}
