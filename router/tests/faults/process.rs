//! The program itself, short of what it lives on: files, processor time, a reader of its log, memory for many streams.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStderr, Command, Stdio},
};

use futures::StreamExt;

use super::{support::http::get, *};

/// The program, ended with the test.
pub struct Router {
    pub child: Child,
    log: Option<BufReader<ChildStderr>>,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub probes: SocketAddr,
}

impl Drop for Router {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts it after some words of a shell, such as limits.
pub fn start(shell: &str, rust_log: &str, args: &[&str]) -> Router {
    let program = env!("CARGO_BIN_EXE_swallow-router");
    let mut child = Command::new("sh")
        .args(["-c", &format!("{shell} exec \"$0\" \"$@\""), program])
        .args([
            "--grpc-listen=127.0.0.1:0",
            "--http-listen=127.0.0.1:0",
            "--probe-listen=127.0.0.1:0",
            "--log-format=json",
        ])
        .args(args)
        .env("RUST_LOG", rust_log)
        .env_remove("KUBERNETES_SERVICE_HOST")
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program was built");
    let mut log = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    let mut address = |of: &str| loop {
        line.clear();
        assert!(log.read_line(&mut line).expect("UTF-8") > 0, "it ended early");
        let json: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
        if json["message"] == "listening" && json["protocol"] == of {
            return json["address"]
                .as_str()
                .and_then(|text| text.parse().ok())
                .expect("an address");
        }
    };
    let (probes, grpc, http) = (address("probes"), address("grpc"), address("http"));
    Router {
        child,
        log: Some(log),
        http,
        grpc,
        probes,
    }
}

impl Router {
    pub fn resident_bytes(&self) -> usize {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).expect("Linux");
        let pages = statm
            .split(' ')
            .nth(1)
            .and_then(|pages| pages.parse::<usize>().ok());
        pages.expect("a number") * 4096
    }

    /// Its log goes nowhere from now on, as fast as it comes.
    pub fn drain_log(&mut self) {
        let mut log = self.log.take().expect("not taken");
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    }

    pub async fn is_ready(&self, model: &str) {
        let ready = async {
            while !get(self.http, "/readyz")
                .await
                .body
                .contains(&format!("\"{model}\":1"))
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, ready)
            .await
            .expect("its replica is ready");
    }
}

/// One probe, from a thread that has nothing else to do.
pub fn probe(address: SocketAddr, path: &str) -> (Duration, String) {
    let began = std::time::Instant::now();
    let mut stream = std::net::TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(LIMIT)).expect("a socket");
    write!(stream, "GET {path} HTTP/1.1\r\nhost: p\r\n\r\n").expect("read");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    (began.elapsed(), answer)
}

#[test]
fn probes_are_answered_while_the_runtime_stands_still() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let worker = worker(|_| {});
    let house = runtime.block_on(runtime.spawn({
        let address = worker.address;
        async move { house_before([address].into_iter(), |_| {}).await }
    }));
    let house = house.expect("no panic");
    let address =
        swallow_router::probe::listen(([127, 0, 0, 1], 0).into(), house.door.clone()).expect("a port");
    until_probe(address, "/readyz", "200");
    // The only thread of the runtime is taken, as by a starved processor.
    let (end, ended) = std::sync::mpsc::channel::<()>();
    runtime.spawn(async move { ended.recv() });
    let mut took: Vec<Duration> = (0..20)
        .map(|i| {
            let (took, answer) = probe(address, if i % 2 == 0 { "/health" } else { "/readyz" });
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            took
        })
        .collect();
    took.sort_unstable();
    println!("median {:?}, longest {:?}", took[10], took[19]);
    assert!(took[10] < Duration::from_millis(50), "{took:?}");
    let ready = probe(address, "/readyz").1;
    assert!(
        ready.ends_with(r#"{"ready":true,"ready_replicas":{"m":1}}"#),
        "{ready}"
    );
    let metrics = probe(address, "/metrics").1;
    let (head, text) = metrics.split_once("\r\n\r\n").expect("a head and a body");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4")
            && head.contains(&format!("content-length: {}", text.len())),
        "{head}"
    );
    assert!(text.contains("# TYPE swallow_router_"), "{text}");
    house.door.leave();
    until_probe(address, "/readyz", "503");
    assert!(probe(address, "/nothing").1.starts_with("HTTP/1.1 404"));
    drop(end);
    runtime.shutdown_background();
}

fn until_probe(address: SocketAddr, path: &str, status: &str) {
    let began = std::time::Instant::now();
    while !probe(address, path).1.starts_with(&format!("HTTP/1.1 {status}")) {
        assert!(began.elapsed() < LIMIT, "{path} never is {status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_file_descriptors_clients_wait_and_probes_do_not() {
    let worker = worker(|_| {});
    let mut router = start(
        "ulimit -n 200;",
        "info",
        &[&format!("--replica=m={}", worker.address)],
    );
    router.drain_log();
    router.is_ready("m").await;
    // More than there are places; the last ones wait in the backlog.
    let hoarded: Vec<_> =
        futures::future::join_all((0..150).map(|_| tokio::net::TcpStream::connect(router.http)))
            .await
            .into_iter()
            .map(|stream| stream.expect("the backlog takes it"))
            .collect();
    let probes = router.probes;
    let probed = tokio::task::spawn_blocking(move || probe(probes, "/health"))
        .await
        .expect("no panic");
    assert!(probed.1.starts_with("HTTP/1.1 200"), "{}", probed.1);
    assert!(probed.0 < Duration::from_secs(1), "{:?}", probed.0);
    // What is kept back for sessions is enough for a new one.
    worker.break_sessions();
    worker
        .until("the session is made anew", |seen| seen.sessions == 2)
        .await;
    drop(hoarded);
    let served = tokio::time::timeout(LIMIT, get(router.http, "/health"))
        .await
        .expect("in time");
    assert_eq!(served.status, 200);
    let answer = channel(router.grpc)
        .await
        .generate(asked("p", 3))
        .await
        .expect("served");
    assert_eq!(answer.into_inner().candidates.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_nobody_reads_stops_nobody() {
    let worker = worker(|_| {});
    let router = start("", "trace", &[&format!("--replica=m={}", worker.address)]);
    router.is_ready("m").await;
    let mut client = channel(router.grpc).await;
    let dropped = async {
        loop {
            client.generate(asked("p", 3)).await.expect("served");
            let page = get(router.http, "/metrics").await.body;
            let series = "swallow_router_log_lines_dropped_total ";
            let value = page.lines().find_map(|line| line.strip_prefix(series));
            if value.is_some_and(|value| value != "0") {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), dropped)
        .await
        .expect("lines are dropped, and requests are served meanwhile");
    client.generate(asked("p", 3)).await.expect("served");
}

/// Streams that wait, over so many connections.
const IDLE: usize = 10_000;
const CONNECTIONS: usize = 12;
const ACTIVE: usize = 1_000;
/// A stream's memory in the router, beyond its prompt.
const STREAM_BYTES_MAX: usize = 20 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_streams_that_wait_cost_little_and_slow_nobody() {
    let worker = worker(|config| {
        (config.credits, config.max_running) = (12_000, 12_000);
        (config.step, config.step_tokens) = (Duration::from_millis(40), 1 << 20);
        config.stall_marker = Some(u32::from(b'!'));
    });
    let mut router = start(
        "",
        "warn,swallow_router=info",
        &[&format!("--replica=m={}", worker.address)],
    );
    router.drain_log();
    router.is_ready("m").await;
    let clients = futures::future::join_all((0..CONNECTIONS).map(|_| channel(router.grpc))).await;
    let open = |i: usize, prompt: &str, tokens| {
        let mut client = clients[i % CONNECTIONS].clone();
        let request = wire::StreamGenerateRequest {
            generate: Some(asked(prompt, tokens)),
            stream: None,
        };
        tokio::spawn(async move {
            let mut stream = client
                .stream_generate(request)
                .await
                .expect("accepted")
                .into_inner();
            let mut messages = 0;
            while stream.message().await.expect("no fault").is_some() {
                messages += 1;
            }
            messages
        })
    };
    let before = router.resident_bytes();
    let waiting: Vec<_> = (0..IDLE).map(|i| open(i, "! waits", 100)).collect();
    worker.until("all are there", |seen| seen.running == IDLE).await;
    let each = router.resident_bytes().saturating_sub(before) / IDLE;
    println!("{each} bytes a stream");
    assert!(each <= STREAM_BYTES_MAX, "{each} bytes a stream");

    let (probes, http) = (router.probes, router.http);
    let (end, mut ended) = tokio::sync::watch::channel(());
    let probing = tokio::spawn(async move {
        let mut took = Vec::new();
        loop {
            let one = tokio::task::spawn_blocking(move || probe(probes, "/health").0);
            took.push(one.await.expect("no panic"));
            assert_eq!(get(http, "/health").await.status, 200);
            if tokio::time::timeout(Duration::from_millis(20), ended.changed())
                .await
                .is_ok()
            {
                break;
            }
        }
        took.sort_unstable();
        took
    });
    let active = futures::stream::iter((0..ACTIVE).map(|i| open(i, &format!("goes {i}"), 20)));
    let messages: Vec<usize> = active
        .map(|run| async { run.await.expect("no panic") })
        .buffered(ACTIVE)
        .collect()
        .await;
    assert!(messages.iter().all(|&messages| messages >= 3));
    end.send_replace(());
    let took = probing.await.expect("no panic");
    println!("probes: median {:?} of {}", took[took.len() / 2], took.len());
    assert!(took[took.len() / 2] < Duration::from_millis(50), "{took:?}");
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    worker
        .until("all are cancelled", |seen| seen.confirmed as usize == IDLE)
        .await;
}
