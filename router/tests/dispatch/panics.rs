//! A task that nothing works without and that panics is reported, by name: the process ends itself then.

use std::sync::atomic::{AtomicBool, Ordering};

use futures::{Stream, stream};
use swallow_policy::Load;
use swallow_router::{discover::Discover, vital::Panicked};

use super::*;

async fn panicked(supervisor: &Supervisor) -> Panicked {
    tokio::time::timeout(LIMIT, supervisor.vitals().panicked())
        .await
        .expect("reported")
}

struct Broken;

impl Discover for Broken {
    fn changes(self) -> impl Stream<Item = Vec<Replica>> + Send + 'static {
        stream::poll_fn(|_| panic!("the test broke it"))
    }
}

#[tokio::test]
async fn discovery() {
    let (_dispatcher, supervisor) = Dispatcher::start(config(), Broken, Arc::new(()));
    let seen = panicked(&supervisor).await;
    assert_eq!(
        seen.to_string(),
        "the task 'discovery' panicked: the test broke it"
    );
}

/// Panics where it is told.
#[derive(Default)]
struct Fragile {
    on_load: bool,
    on_choice: AtomicBool,
}

impl Observer for Fragile {
    fn load(&self, _: &str, _: &str, _: Load) {
        assert!(!self.on_load, "the test broke it");
    }
    fn chose(&self, _: &str, _: &str, _: &Why, _: Duration) {
        assert!(!self.on_choice.load(Ordering::Acquire), "the test broke it");
    }
}

fn fragile(worker: &MockWorker, observer: &Arc<Fragile>) -> (Dispatcher, Supervisor) {
    let set = vec![replica(&worker.address.to_string(), &["m"])];
    Dispatcher::start(config(), Fixed(set), Arc::clone(observer) as Arc<dyn Observer>)
}

async fn ready(dispatcher: &Dispatcher) {
    until("a replica is ready", || {
        dispatcher
            .model("m")
            .is_some_and(|entry| entry.ready_replicas == 1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session() {
    let worker = worker();
    let observer = Arc::new(Fragile {
        on_load: true,
        ..Fragile::default()
    });
    let (dispatcher, supervisor) = fragile(&worker, &observer);
    // A model that discovery has not told of yet is refused. The worker reports its load with the first step.
    ready(&dispatcher).await;
    let generation = tokio::spawn(async move { dispatcher.generate(ask([1], 500)).await });
    let seen = panicked(&supervisor).await;
    assert_eq!(seen.task, format!("session with {}", worker.address));
    generation.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_that_a_request_was_making() {
    let worker = worker();
    let observer = Arc::new(Fragile::default());
    let (dispatcher, supervisor) = fragile(&worker, &observer);
    ready(&dispatcher).await;
    observer.on_choice.store(true, Ordering::Release);
    let request = tokio::spawn({
        let dispatcher = dispatcher.clone();
        async move { dispatcher.generate(ask([1], 5)).await.map(drop) }
    });
    assert!(request.await.expect_err("its own task sees the panic").is_panic());
    // Found by whoever decides next.
    dispatcher.counts();
    assert_eq!(panicked(&supervisor).await.task, "dispatcher");
}
