//! The program in a cgroup with a fifth of a processor and little memory, under more than it can serve: it sheds, answers
//! probes in their time, is not killed, and is as before when the load is gone. Where there is no cgroup for us, signals
//! take its processor time away, and its memory is measured alone.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread::JoinHandle,
};

use futures::{StreamExt, stream::FuturesUnordered};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use tokio::io::AsyncReadExt;

use super::{
    cgroup::Cgroup,
    process::{Router, probe, start},
    support::http::send,
    *,
};

/// Of each of the scheduler's periods the program gets a fifth, as from a quota of 0.2 processors: stopped otherwise.
const RUNS: Duration = Duration::from_millis(20);
const PERIOD: Duration = Duration::from_millis(100);
/// What a small container has.
const MEMORY_MAX: usize = 64 << 20;
/// kubelet's usual patience with a probe.
const PROBE_MAX: Duration = Duration::from_secs(1);
const REQUESTS: usize = 400;
/// Those that the worker takes, and never ends.
const CREDITS: usize = 4;

/// The processor time of a machine without cgroups, until it is dropped.
struct Stopped {
    lifted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stopped {
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

impl Drop for Stopped {
    fn drop(&mut self) {
        self.lifted.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It says itself what went wrong.
            let _ = thread.join();
        }
    }
}

/// The status of an answer; `None` where the connection was cut, as of a client whose request came too slowly.
async fn status_of(http: SocketAddr, body: &serde_json::Value) -> Option<u16> {
    let mut stream = send(http, "POST", "/v1/completions", "", &body.to_string()).await;
    let mut answer = Vec::new();
    // What came before a reset counts.
    let _ = stream.read_to_end(&mut answer).await;
    std::str::from_utf8(answer.get(9..12)?).ok()?.parse().ok()
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
    let cgroup = Cgroup::new(MEMORY_MAX);
    let enter = cgroup.as_ref().map(Cgroup::enter).unwrap_or_default();
    let mut router = start(
        &enter,
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
    let stopped = cgroup.is_none().then(|| {
        println!("no cgroup can be made here: signals stop the program for four fifths of the time");
        Stopped::of(&router)
    });
    let body = serde_json::json!({"model": "m", "prompt": "p".repeat(4_000), "max_tokens": 3});
    let statuses = (0..REQUESTS).map(|_| {
        let (http, body) = (router.http, body.clone());
        tokio::spawn(async move { status_of(http, &body).await })
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
    let mut cut = 0;
    for _ in CREDITS..REQUESTS {
        let status = tokio::time::timeout(Duration::from_secs(60), statuses.next()).await;
        let status = status
            .expect("each is answered")
            .expect("so many were sent")
            .expect("no panic");
        match status {
            Some(status) => assert!([429, 503].contains(&status), "{status}"),
            None => cut += 1,
        }
    }
    println!("{cut} of {REQUESTS} were cut");
    assert!(cut < REQUESTS / 4, "{cut}");
    println!("peak {} MiB", peak_bytes(&router) >> 20);
    let peak = peak_bytes(&router);
    assert!(peak < MEMORY_MAX, "{peak} bytes");
    drop(stopped);
    if let Some(cgroup) = &cgroup {
        println!("throttled in {} periods", cgroup.throttled());
        assert!(cgroup.throttled() > 0, "it was short of processor time");
        cgroup.lift();
    }
    worker.set(|config| config.stall = false);
    while let Some(status) = statuses.next().await {
        assert_eq!(status.expect("no panic"), Some(200), "what was begun is finished");
    }
    let mut client = channel(router.grpc).await;
    for _ in 0..20 {
        client.generate(asked("p", 3)).await.expect("served");
    }
    assert_eq!(worker.seen().sessions, 1, "the session outlived it");
    assert_eq!(
        cgroup.as_ref().map_or(0, Cgroup::killed),
        0,
        "nothing was killed for memory"
    );
}
