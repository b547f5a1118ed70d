//! The dispatcher against workers that fail in every way: over real sockets, with streams checked to the last token,
//! and nothing held when all is over.

mod admission;
mod api_server;
mod cancel;
mod discovery;
mod faults;
#[path = "../support/mock_worker.rs"]
mod mock_worker;
mod overload;
mod panics;
mod resume;
mod shim;
mod spread;
mod storms;
mod streams;
mod windows;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt;
use mock_worker::{Config, MockWorker};
use swallow_policy::{Limits, Why};
use swallow_router::{
    ask::{Ask, Event, Failure, Finish, Refusal, Sampling},
    discover::{Fixed, Replica},
    dispatch::{Counts, DispatchConfig, Dispatcher, Generation, Supervisor},
    keys::Share,
    observe::{MoveCause, Observer, ReplicaState},
};
use tokio::time::Instant;

/// How long a test waits for what must happen. Far above what it takes, for slow machines.
const LIMIT: Duration = Duration::from_secs(20);

/// What the dispatcher told.
#[derive(Default)]
struct Notes(Mutex<Told>);

#[derive(Clone, Debug, Default)]
struct Told {
    choices: BTreeMap<(String, &'static str), usize>,
    moves: Vec<MoveCause>,
    cancels: Vec<Duration>,
    slow_clients: usize,
    missed: usize,
    states: BTreeMap<String, ReplicaState>,
}

impl Observer for Notes {
    fn chose(&self, _: &str, replica: &str, why: &Why, _: Duration) {
        *self
            .0
            .lock()
            .expect("no panic")
            .choices
            .entry((replica.to_owned(), why.label()))
            .or_default() += 1;
    }
    fn moved(&self, _: &str, cause: MoveCause) {
        self.0.lock().expect("no panic").moves.push(cause);
    }
    fn cancelled(&self, _: &str, _: &str, after: Duration) {
        self.0.lock().expect("no panic").cancels.push(after);
    }
    fn slow_client(&self, _: &str) {
        self.0.lock().expect("no panic").slow_clients += 1;
    }
    fn cache_events_missed(&self, _: &str, _: &str) {
        self.0.lock().expect("no panic").missed += 1;
    }
    fn replica(&self, _: &str, replica: &str, state: ReplicaState) {
        self.0
            .lock()
            .expect("no panic")
            .states
            .insert(replica.to_owned(), state);
    }
}

/// A dispatcher before some workers.
struct House {
    dispatcher: Dispatcher,
    supervisor: Supervisor,
    notes: Arc<Notes>,
}

fn config() -> DispatchConfig {
    DispatchConfig {
        router_id: "test".into(),
        queue: Limits {
            requests: 1000,
            tokens: 1_000_000,
            bytes: 100 << 20,
        },
        max_queue_wait: LIMIT,
        max_buffered_tokens: 4096,
        max_buffered_bytes: 1 << 20,
        slow_client_limit: LIMIT,
        ping_every: Duration::from_millis(100),
        pong_limit: Duration::from_secs(10),
        reconnect: (Duration::from_millis(10), Duration::from_millis(50)),
        worker_tls: None,
    }
}

fn replica(address: &str, names: &[&str]) -> Replica {
    let served_names = names.iter().map(|&name| name.to_owned()).collect();
    Replica {
        id: address.to_owned(),
        incarnation: String::new(),
        served_names,
        address: address.to_owned(),
    }
}

/// All workers serve "m".
async fn house(workers: &[&MockWorker], change: impl FnOnce(&mut DispatchConfig)) -> House {
    let set = workers
        .iter()
        .map(|worker| replica(&worker.address.to_string(), &["m"]))
        .collect();
    let house = house_of(set, change);
    house.ready("m", workers.len()).await;
    house
}

fn house_of(set: Vec<Replica>, change: impl FnOnce(&mut DispatchConfig)) -> House {
    let mut config = config();
    change(&mut config);
    let notes = Arc::new(Notes::default());
    let (dispatcher, supervisor) =
        Dispatcher::start(config, Fixed(set), Arc::clone(&notes) as Arc<dyn Observer>);
    House {
        dispatcher,
        supervisor,
        notes,
    }
}

impl House {
    fn told(&self) -> Told {
        self.notes.0.lock().expect("no panic").clone()
    }

    async fn ready(&self, model: &str, replicas: usize) {
        let ready = || {
            self.dispatcher
                .model(model)
                .is_some_and(|entry| entry.ready_replicas == replicas)
        };
        until(&format!("{replicas} replicas of {model} are ready"), ready).await;
    }

    /// Nothing is held: no handle, no place in the queue, no work, and all `credits` are back.
    async fn settles(&self, credits: i64) {
        let rest = || {
            Counts {
                cached_keys: 0,
                ..self.dispatcher.counts()
            } == Counts {
                credits,
                ..Counts::default()
            }
        };
        let started = Instant::now();
        while !rest() {
            assert!(
                started.elapsed() < LIMIT,
                "still held: {:?}",
                self.dispatcher.counts()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn start(&self, ask: Ask) -> Generation {
        tokio::time::timeout(LIMIT, self.dispatcher.generate(ask))
            .await
            .expect("in time")
            .expect("accepted")
    }

    async fn refused(&self, ask: Ask) -> Refusal {
        let answer = tokio::time::timeout(LIMIT, self.dispatcher.generate(ask))
            .await
            .expect("in time");
        answer.expect_err("refused")
    }

    async fn run(&self, ask: Ask) -> Result<Answer, Failure> {
        answer(self.start(ask).await).await
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

/// A greedy request of one candidate.
fn ask(prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> Ask {
    Ask {
        model: "m".into(),
        uuid: uuid::Uuid::new_v4(),
        prompt: prompt.into_iter().collect(),
        candidates: 1,
        sampling: Sampling::default(),
        max_tokens,
        min_tokens: 0,
        stop_token_ids: vec![],
        ignore_eos: false,
        grammar: None,
        logprobs: None,
        prompt_logprobs: None,
        prompt_logprobs_from: 1,
        text_bytes: 0,
        cache_salt: 0,
        share: Share::default(),
        deadline: None,
        max_queue_wait: None,
    }
}

/// Everything that came of a request.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    cached_tokens: u32,
    prompt_scores: Option<usize>,
    /// By candidate.
    tokens: BTreeMap<u32, Vec<u32>>,
    scores: BTreeMap<u32, usize>,
    finishes: BTreeMap<u32, Finish>,
}

/// Reads a stream to its end and checks the order of its events.
async fn answer(generation: Generation) -> Result<Answer, Failure> {
    answer_after(Answer::default(), generation).await
}

/// Reads a stream until tokens have come, and gives what came.
async fn next_tokens(generation: &mut Generation) -> Answer {
    let mut answer = Answer::default();
    while answer.tokens.is_empty() {
        match generation.next().await.expect("no end").expect("no fault") {
            Event::Started { cached_tokens } => answer.cached_tokens = cached_tokens,
            Event::Tokens {
                candidate,
                tokens,
                scores,
            } => {
                answer.tokens.insert(candidate, tokens);
                answer.scores.insert(candidate, scores.len());
            }
            other => panic!("unexpected: {other:?}"),
        }
    }
    answer
}

/// Reads a stream to its end, where `answer` came of it before.
async fn answer_after(mut answer: Answer, mut generation: Generation) -> Result<Answer, Failure> {
    let mut first = answer == Answer::default();
    loop {
        let event = tokio::time::timeout(LIMIT, generation.next())
            .await
            .expect("in time");
        let Some(event) = event else { break };
        match event? {
            Event::Started { cached_tokens } => {
                assert!(first, "Started comes first");
                answer.cached_tokens = cached_tokens;
            }
            Event::PromptScores(scores) => {
                assert!(answer.tokens.is_empty() && answer.prompt_scores.is_none());
                answer.prompt_scores = Some(scores.len());
            }
            Event::Tokens {
                candidate,
                tokens,
                scores,
            } => {
                assert!(!tokens.is_empty() && !answer.finishes.contains_key(&candidate));
                answer.tokens.entry(candidate).or_default().extend(tokens);
                *answer.scores.entry(candidate).or_default() += scores.len();
            }
            Event::Finished { candidate, why } => {
                assert!(answer.finishes.insert(candidate, why).is_none(), "finished once");
            }
        }
        assert!(
            !std::mem::take(&mut first) || answer.tokens.is_empty(),
            "Started came first"
        );
    }
    assert!(generation.next().await.is_none(), "the end is the end");
    Ok(answer)
}

/// What the workers generate for an ask.
fn expected(ask: &Ask, candidate: u32) -> Vec<u32> {
    let seed = ask.sampling.seed.unwrap_or(0);
    (0..ask.max_tokens)
        .map(|index| mock_worker::token(&ask.prompt, seed, candidate, index))
        .collect()
}

/// A worker with the defaults.
fn worker() -> MockWorker {
    MockWorker::start(Config::default())
}

fn worker_with(change: impl FnOnce(&mut Config)) -> MockWorker {
    let mut config = Config::default();
    change(&mut config);
    MockWorker::start(config)
}

/// One of two workers, and the other one, by where the request went.
fn split(
    workers: &mut [MockWorker; 2],
    has: impl Fn(&MockWorker) -> bool,
) -> (&mut MockWorker, &mut MockWorker) {
    let [a, b] = workers;
    if has(a) { (a, b) } else { (b, a) }
}
