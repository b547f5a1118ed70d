//! The program with a fifth of a processor and little memory, under more than it can serve: it sheds, answers probes in
//! their time, and is as before when the load is gone.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread::JoinHandle,
};

use futures::{StreamExt, stream::FuturesUnordered};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    process::{Router, probe, start},
    support::http::post,
    *,
};

/// Of each of the scheduler's periods the program gets a fifth, as from a quota of 0.2 processors: stopped otherwise.
const RUNS: Duration = Duration::from_millis(20);
const PERIOD: Duration = Duration::from_millis(100);
/// What a small container has.
const MEMORY_MAX: usize = 64 << 20;
/// kubelet's usual patience with a probe.
const PROBE_MAX: Duration = Duration::from_secs(1);
const REQUESTS: usize = 1000;
/// Those that the worker takes, and never ends.
const CREDITS: usize = 4;

/// A quota, until it is dropped.
struct Quota {
    lifted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Quota {
    fn of(router: &Router) -> Self {
        let pid = Pid::from_raw(i32::try_from(router.child.id()).expect("a pid"));
        let lifted = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&lifted);
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                for (signal, time) in [(Signal::SIGSTOP, PERIOD - RUNS), (Signal::SIGCONT, RUNS)] {
                    kill(pid, signal).expect("it lives");
                    std::thread::sleep(time); // The quota itself; nothing waits for it to pass.
                }
            }
        });
        Self {
            lifted,
            thread: Some(thread),
        }
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        self.lifted.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It says itself what went wrong.
            let _ = thread.join();
        }
    }
}

/// The most memory that it ever had.
fn peak_bytes(router: &Router) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", router.child.id())).expect("Linux");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("a peak");
    let kilobytes = line
        .trim()
        .strip_suffix(" kB")
        .and_then(|kb| kb.trim().parse::<usize>().ok());
    kilobytes.expect("a number") << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_fifth_of_a_processor_and_little_memory_it_sheds_and_lives() {
    let worker = worker(|config| (config.credits, config.max_running) = (CREDITS as u32, CREDITS as u32));
    // What clients can make it hold is bounded by how many may be connected.
    let mut router = start(
        "ulimit -n 300;",
        "warn,swallow_router=info",
        &[
            &format!("--replica=m={}", worker.address),
            "--max-queued-requests=100",
            "--max-queued-bytes=4194304",
            "--max-queue-seconds=2",
        ],
    );
    router.drain_log();
    router.is_ready("m").await;
    worker.set(|config| config.stall = true);
    let quota = Quota::of(&router);
    let body = serde_json::json!({"model": "m", "prompt": "p".repeat(20_000), "max_tokens": 3});
    let statuses = (0..REQUESTS).map(|_| {
        let (http, body) = (router.http, body.clone());
        tokio::spawn(async move { post(http, "/v1/completions", &body).await.status })
    });
    let statuses: Vec<_> = statuses.collect();
    let probes = router.probes;
    let probing = tokio::task::spawn_blocking(move || {
        let mut took: Vec<Duration> = (0..30)
            .map(|i| {
                let (took, answer) = probe(probes, if i % 2 == 0 { "/health" } else { "/readyz" });
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                took
            })
            .collect();
        took.sort_unstable();
        took
    });
    let took = probing.await.expect("every probe is answered");
    println!("probes: median {:?}, longest {:?}", took[15], took[29]);
    assert!(took[29] < PROBE_MAX, "{took:?}");
    // The worker has what it has credits for; all others are told that they were too many.
    let mut statuses: FuturesUnordered<_> = statuses.into_iter().collect();
    for _ in CREDITS..REQUESTS {
        let status = tokio::time::timeout(Duration::from_secs(60), statuses.next()).await;
        let status = status
            .expect("each is answered")
            .expect("so many were sent")
            .expect("no panic");
        assert!([429, 503].contains(&status), "{status}");
    }
    println!("peak {} MiB", peak_bytes(&router) >> 20);
    let peak = peak_bytes(&router);
    assert!(peak < MEMORY_MAX, "{peak} bytes");
    drop(quota);
    worker.set(|config| config.stall = false);
    while let Some(status) = statuses.next().await {
        assert_eq!(status.expect("no panic"), 200, "what was begun is finished");
    }
    let mut client = channel(router.grpc).await;
    for _ in 0..20 {
        client.generate(asked("p", 3)).await.expect("served");
    }
    assert_eq!(worker.seen().sessions, 1, "the session outlived it");
}
