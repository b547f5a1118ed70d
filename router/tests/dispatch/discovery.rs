//! Discovery by EndpointSlices: an API server that is slow, forgetful, away or wrong takes no replica away.

use axum::http::StatusCode;
use serde_json::{Value, json};
use swallow_router::{discover::Cluster, metrics::Metrics};

use super::{
    api_server::{ApiServer, Gone},
    *,
};

/// A slice with one pod in it: workers of a test differ by their ports.
fn slice(uid: &str, worker: &MockWorker, terminating: bool) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "ports": [{"name": "grpc", "port": worker.address.port()}],
        "endpoints": [{
            "addresses": [worker.address.ip().to_string()],
            "targetRef": {"kind": "Pod", "name": format!("pod-{uid}"), "uid": uid},
            "conditions": {"ready": true, "serving": !terminating, "terminating": terminating},
        }],
    })
}

/// A dispatcher that follows the API server, and what discovery tells.
fn cluster(api: &ApiServer) -> (House, Arc<Metrics>) {
    let metrics = Arc::new(Metrics::new());
    let cluster = Cluster {
        client: api.client(),
        namespace: "models".into(),
        targets: vec!["m,alias=m-worker".parse().expect("well formed")],
        fixed: Fixed(Vec::new()),
        observer: Arc::clone(&metrics) as Arc<dyn Observer>,
    };
    let notes = Arc::new(Notes::default());
    let (dispatcher, supervisor) =
        Dispatcher::start(config(), cluster, Arc::clone(&notes) as Arc<dyn Observer>);
    let house = House {
        dispatcher,
        supervisor,
        notes,
    };
    (house, metrics)
}

/// The value of a series without or with these labels, 0 if it is not there.
fn series(metrics: &Metrics, series: &str) -> f64 {
    let (text, _) = metrics.text();
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("swallow_router_{series} ")));
    found.map_or(0.0, |value| value.parse().expect("a number"))
}

const STALE: &str = "discovery_stale_seconds{model=\"m\"}";

fn ended(how: &str) -> String {
    format!("discovery_watch_ends_total{{end=\"{how}\",model=\"m\"}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_of_a_service_are_the_replicas_of_a_model() {
    let api = ApiServer::start();
    let workers = [worker(), worker()];
    let (house, metrics) = cluster(&api);
    // Known before it has a replica, and by all of its names.
    assert_eq!(house.dispatcher.model("alias").expect("declared").name, "m");
    until("the empty set is seen", || house.dispatcher.is_settled()).await;
    let refusal = house
        .refused(Ask {
            max_queue_wait: Some(Duration::from_millis(50)),
            ..ask([1], 5)
        })
        .await;
    assert!(matches!(refusal, Refusal::NoReplica { .. }), "{refusal:?}");

    api.put("one", slice("a", &workers[0], false));
    house.ready("m", 1).await;
    api.put("two", slice("b", &workers[1], false));
    house.ready("m", 2).await;
    assert_eq!(series(&metrics, "discovered_endpoints{model=\"m\"}"), 2.0);

    // A pod that is told to end, and then one that is gone, finish what they have.
    let running = ask([1, 2], 500);
    let generation = house.start(running.clone()).await;
    let at = workers
        .iter()
        .position(|worker| worker.live() > 0)
        .expect("one has it");
    let name = ["one", "two"][at];
    api.put(name, slice(["a", "b"][at], &workers[at], true));
    house.ready("m", 1).await;
    api.delete(name);
    let served = workers[at].seen().requests;
    for i in 0..10 {
        house.run(ask([1, 2, i], 2)).await.expect("the other serves");
    }
    assert_eq!(workers[at].seen().requests, served, "no new request");
    assert_eq!(
        answer(generation).await.expect("it finishes").tokens[&0],
        expected(&running, 0)
    );
    workers[at].until("goodbye", |seen| seen.goodbyes == 1).await;
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_pod_at_the_same_address_is_another_replica() {
    let api = ApiServer::start();
    let worker = worker();
    api.put("one", slice("a", &worker, false));
    let (house, _) = cluster(&api);
    house.ready("m", 1).await;
    api.put("one", slice("b", &worker, false));
    worker
        .until("the old one's session ended, a new one began", |seen| {
            seen.goodbyes == 1 && seen.sessions == 2
        })
        .await;
    house.ready("m", 1).await;
    until("they are told apart", || {
        let states = house.told().states;
        states.get("pod-a") == Some(&ReplicaState::Gone) && states.get("pod-b") == Some(&ReplicaState::Ready)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_version_begins_again_with_a_list() {
    let mut api = ApiServer::start();
    let workers = [worker(), worker(), worker()];
    let (house, metrics) = cluster(&api);
    api.put("one", slice("a", &workers[0], false));
    house.ready("m", 1).await;
    for (gone, name, worker, count) in [
        (Gone::Status, "two", &workers[1], 2),
        (Gone::Event, "three", &workers[2], 3),
    ] {
        // While nobody watches, a slice appears whose event nobody remembers.
        let lists = api.lists();
        api.go_away();
        api.put(name, slice(name, worker, false));
        api.compact(gone);
        api.come_back();
        house.ready("m", count).await;
        assert!(api.lists() > lists, "{gone:?}");
    }
    assert_eq!(series(&metrics, &ended("expired")), 2.0);
    // What was deleted meanwhile is gone after a list, too.
    api.go_away();
    api.delete("one");
    api.compact(Gone::Event);
    api.come_back();
    house.ready("m", 2).await;
    house.run(ask([1], 2)).await.expect("served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_api_server_is_away_the_last_set_stays() {
    let mut api = ApiServer::start();
    let mut workers = [worker(), worker(), worker()];
    api.put("one", slice("a", &workers[0], false));
    api.put("two", slice("b", &workers[1], false));
    let (house, metrics) = cluster(&api);
    house.ready("m", 2).await;
    assert_eq!(series(&metrics, STALE), 0.0);

    api.go_away();
    until("it is noticed", || series(&metrics, STALE) > 0.0).await;
    for i in 0..20 {
        house.run(ask([i], 2)).await.expect("served as before");
    }
    // A replica that dies is the session's matter, with or without an API server, and so is its return.
    let address = workers[0].address;
    workers[0].kill();
    house.ready("m", 1).await;
    house.run(ask([7], 2)).await.expect("by the other one");
    workers[0] = MockWorker::start_at(address, Config::default());
    house.ready("m", 2).await;

    // What changed meanwhile is followed when it is back, from the version that was known.
    let lists = api.lists();
    api.delete("two");
    api.put("three", slice("c", &workers[2], false));
    api.come_back();
    until("it is heard again", || series(&metrics, STALE) == 0.0).await;
    workers[1].until("goodbye", |seen| seen.goodbyes == 1).await;
    workers[2].until("a session", |seen| seen.sessions == 1).await;
    house.ready("m", 2).await;
    assert_eq!(api.lists(), lists, "nothing had to be listed again");
    assert!(series(&metrics, &ended("failed")) > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_that_end_or_say_nonsense_are_begun_again() {
    let api = ApiServer::start();
    let workers = [worker(), worker(), worker()];
    let (house, metrics) = cluster(&api);
    api.put("one", slice("a", &workers[0], false));
    house.ready("m", 1).await;
    api.end_watches();
    until("another watch", || api.opened() >= 2).await;
    api.put("two", slice("b", &workers[1], false));
    house.ready("m", 2).await;
    assert_eq!(series(&metrics, &ended("closed")), 1.0);
    let lists = api.lists();
    api.garble();
    until("another list", || api.lists() > lists).await;
    api.put("three", slice("c", &workers[2], false));
    house.ready("m", 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_may_not_look_is_not_settled() {
    let api = ApiServer::start();
    let worker = worker();
    api.put("one", slice("a", &worker, false));
    api.refuse(Some(StatusCode::FORBIDDEN));
    let (house, metrics) = cluster(&api);
    until("it was refused, and again", || {
        series(&metrics, &ended("failed")) >= 2.0
    })
    .await;
    assert!(!house.dispatcher.is_settled());
    api.refuse(None);
    until("it has looked", || house.dispatcher.is_settled()).await;
    // Settled means tried, so whoever is there serves at once.
    house.run(ask([1], 2)).await.expect("served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_names_serve_while_a_change_of_names_rolls_out() {
    let api = ApiServer::start();
    let old = worker();
    let new = worker_with(|config| config.served_names = vec!["m".into(), "alias".into()]);
    api.put("one", slice("a", &old, false));
    api.put("two", slice("b", &new, false));
    let (house, _) = cluster(&api);
    house.ready("m", 2).await;
    let by_alias = Ask {
        model: "alias".into(),
        ..ask([1], 2)
    };
    house.run(by_alias).await.expect("served");
}
