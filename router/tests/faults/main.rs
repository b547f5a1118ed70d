//! The whole router, over real sockets at both ends: clients that leave, lie, flood, crawl and hang, and a machine that
//! runs out of what it has.

mod ages;
mod audit;
mod cgroup;
mod clients;
mod clocks;
mod crawlers;
mod floods;
mod garbage;
mod keys;
mod liars;
#[path = "../support/mock_worker.rs"]
mod mock_worker;
mod process;
#[path = "../../../tests/support/raw.rs"]
mod raw;
mod readers;
mod resumes;
#[path = "../dispatch/shim.rs"]
mod shim;
mod slow;
mod starved;
#[path = "../support/mod.rs"]
mod support;
mod tls;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mock_worker::{Config, MockWorker};
use swallow_router::{
    discover::{Fixed, Replica},
    dispatch::{BUFFERED_TOKENS_MAX, Counts, DispatchConfig, Dispatcher, Supervisor},
    generate::Door,
    grpc::{self, Health},
    http::{self, Limits, Places, Port, Protocol, ShutdownHandle},
    keys::ApiKeys,
    metrics::Metrics,
    openai,
    tls::Certificate,
};
use swallow_rpc::inference::v1::{
    self as wire, generate_request::Prompt, generation_service_client::GenerationServiceClient,
};
use tokio::{net::TcpListener, time::Instant};
use tonic::transport::Channel;

/// How long a test waits for what must happen. Far above what it takes, for slow machines.
const LIMIT: Duration = Duration::from_secs(20);
/// Largest request body.
const MAX_BODY: usize = 1 << 20;

/// A router before some workers.
struct House {
    http: SocketAddr,
    grpc: SocketAddr,
    dispatcher: Dispatcher,
    door: Door,
    shutdown: ShutdownHandle,
    _supervisor: Supervisor,
}

/// Workers that speak letters and take bytes.
fn worker(change: impl FnOnce(&mut Config)) -> MockWorker {
    let mut config = Config {
        letters: true,
        vocab_size: 262,
        files: [
            (
                "tokenizer.json".to_owned(),
                support::byte_tokenizer().to_string().into_bytes(),
            ),
            (
                "tokenizer_config.json".to_owned(),
                support::tokenizer_config().to_string().into_bytes(),
            ),
        ]
        .into(),
        ..Config::default()
    };
    change(&mut config);
    MockWorker::start(config)
}

/// All workers serve "m".
async fn house(workers: &[&MockWorker], change: impl Fn(&mut Limits)) -> House {
    let replicas = workers.iter().map(|worker| worker.address);
    house_before(replicas, change).await
}

async fn house_before(replicas: impl Iterator<Item = SocketAddr>, change: impl Fn(&mut Limits)) -> House {
    house_of(replicas, change, None, None).await
}

async fn house_of(
    replicas: impl Iterator<Item = SocketAddr>,
    change: impl Fn(&mut Limits),
    keys: Option<&ApiKeys>,
    tls: Option<&Certificate>,
) -> House {
    house_serving(
        replicas.map(|address| (address, "m")).collect(),
        change,
        keys,
        tls,
    )
    .await
}

/// Replicas, and the model that each serves.
async fn house_serving(
    replicas: Vec<(SocketAddr, &str)>,
    change: impl Fn(&mut Limits),
    keys: Option<&ApiKeys>,
    tls: Option<&Certificate>,
) -> House {
    let replica = |&(address, model): &(SocketAddr, &str)| Replica {
        id: address.to_string(),
        incarnation: String::new(),
        served_names: vec![model.into()],
        address: address.to_string(),
    };
    let set: Vec<Replica> = replicas.iter().map(replica).collect();
    let metrics = Arc::new(Metrics::new());
    let config = DispatchConfig {
        router_id: "test".into(),
        queue: swallow_policy::Limits {
            requests: 1000,
            tokens: 1_000_000,
            bytes: 100 << 20,
        },
        max_queue_wait: LIMIT,
        max_buffered_tokens: BUFFERED_TOKENS_MAX,
        max_buffered_bytes: 1 << 20,
        slow_client_limit: LIMIT,
        ping_every: Duration::from_millis(100),
        pong_limit: Duration::from_secs(10),
        reconnect: (Duration::from_millis(10), Duration::from_millis(50)),
        worker_tls: None,
    };
    let (dispatcher, supervisor) = Dispatcher::start(config, Fixed(set), metrics.clone());
    let door = Door::new(Arc::new(dispatcher.clone()), metrics);
    let (shutdown, watch) = ShutdownHandle::new();
    let health = Health::new();
    let places = Places::new(4096);
    let mut addresses = Vec::new();
    for (protocol, front) in [
        (Protocol::Http, openai::front(door.clone(), MAX_BODY)),
        (Protocol::Grpc, grpc::front(&door, &health, MAX_BODY)),
    ] {
        let front = match keys {
            Some(keys) => keys.guard(front, protocol),
            None => front,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        addresses.push(listener.local_addr().expect("bound"));
        let mut limits = Limits::of(protocol);
        change(&mut limits);
        let port = Port {
            listener,
            protocol,
            front,
            open: door.metrics().connections(protocol.label()),
            limits,
            places: places.clone(),
            tls: tls.map(|tls| tls.acceptor(protocol).expect("the usual versions")),
        };
        tokio::spawn(http::serve(port, watch.clone()));
    }
    let house = House {
        http: addresses[0],
        grpc: addresses[1],
        dispatcher,
        door,
        shutdown,
        _supervisor: supervisor,
    };
    for (_, model) in &replicas {
        let n_replicas = replicas.iter().filter(|(_, other)| other == model).count();
        house.are_ready(model, n_replicas).await;
    }
    house
}

impl House {
    /// Nothing is held: no handle, no place in the queue, no work, and all `credits` are back.
    async fn settles(&self, credits: i64) {
        let rest = Counts {
            credits,
            ..Counts::default()
        };
        let held = || Counts {
            cached_keys: 0,
            ..self.dispatcher.counts()
        };
        until(&format!("nothing is held; {:?}", held()), || held() == rest).await;
    }

    async fn are_ready(&self, model: &str, n_replicas: usize) {
        let ready = || self.dispatcher.model(model).map(|entry| entry.ready_replicas);
        until("the replicas are ready", || ready() == Some(n_replicas)).await;
    }

    async fn channel(&self) -> GenerationServiceClient<Channel> {
        channel(self.grpc).await
    }

    /// A series of the metrics page.
    fn metric(&self, series: &str) -> f64 {
        let (text, _) = self.door.metrics().text();
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0.0, |value| value.trim().parse().expect("a number"))
    }
}

async fn channel(address: SocketAddr) -> GenerationServiceClient<Channel> {
    let channel = Channel::from_shared(format!("http://{address}"))
        .expect("an address")
        .connect()
        .await
        .expect("the router listens");
    GenerationServiceClient::new(channel)
}

/// A request in bytes.
fn asked(prompt: &str, max_tokens: u32) -> wire::GenerateRequest {
    wire::GenerateRequest {
        model: "m".into(),
        prompt: Some(Prompt::TokenIds(wire::TokenIds {
            ids: prompt.bytes().map(u32::from).collect(),
        })),
        stop: Some(wire::StopCriteria {
            max_output_tokens: Some(max_tokens),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Waits for a condition that nobody announces.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LIMIT, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
