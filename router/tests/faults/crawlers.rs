//! Five thousand clients that crawl before the program, and a thousand TLS handshakes: they are a process of their own,
//! so that the clients which measure the router's health share no runtime with them. The limits are those of production.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    process::{Router, probe, start},
    slow::HELLO,
    support::http::{get, post},
    tls::{FIRST, Files},
    *,
};

/// A way to crawl: over which port, what is sent first, and a byte of what every few seconds, over and over.
struct Attack {
    name: &'static str,
    /// Of the addresses in `TARGETS`.
    target: usize,
    first: &'static [u8],
    then: &'static [u8],
    sockets: usize,
    /// When it is cut.
    limit: Duration,
}

/// What of a request's head, a preface or a handshake may take, and what of a body: `Limits::of`.
const HEAD: Duration = Duration::from_secs(10);
const BODY: Duration = Duration::from_secs(30);
/// What a busy machine may add to them.
const LATE_MAX: Duration = Duration::from_secs(5);
const BYTE_EVERY: Duration = Duration::from_secs(4);

const HTTP: usize = 0;
const GRPC: usize = 1;
const HTTPS: usize = 2;
const GRPCS: usize = 3;
const ATTACKS: [Attack; 8] = [
    Attack::of("request line", HTTP, b"G", b"ET ", 1000, HEAD),
    Attack::of("headers", HTTP, b"GET /health HTTP/1.1\r\nx: ", b"y", 1000, HEAD),
    Attack::of("body", HTTP, BODY_HEAD, b" ", 1000, BODY),
    Attack::of("silence", GRPC, b"", b"PRI", 1000, HEAD),
    Attack::of("preface", GRPC, b"PRI * HTTP/2.0", b"\r\n\r", 1000, HEAD),
    Attack::of("handshake", HTTPS, HELLO, &[0], 400, HEAD),
    Attack::of("silence before a handshake", HTTPS, b"", HELLO, 200, HEAD),
    Attack::of("gRPC handshake", GRPCS, HELLO, &[0], 400, HEAD),
];
const BODY_HEAD: &[u8] = b"POST /v1/completions HTTP/1.1\r\nhost: m\r\ncontent-length: 5000\r\n\r\n{";
const PLAIN: usize = 5000;
const SECURE: usize = 1000;

/// Addresses for the process of the crawlers, by `Attack::target`.
const TARGETS: &str = "SWALLOW_CRAWL";

impl Attack {
    const fn of(
        name: &'static str,
        target: usize,
        first: &'static [u8],
        then: &'static [u8],
        sockets: usize,
        limit: Duration,
    ) -> Self {
        Self {
            name,
            target,
            first,
            then,
            sockets,
            limit,
        }
    }
}

/// Sends a byte now and then until it is cut: after how long, and whether it was told why.
async fn crawl(mut stream: TcpStream, then: &'static [u8]) -> (Duration, bool) {
    let began = Instant::now();
    let (mut reader, mut writer) = stream.split();
    let crawling = async {
        for (i, byte) in (1..).zip(then.iter().cycle()) {
            tokio::time::sleep_until(began + BYTE_EVERY * i).await;
            if writer.write_all(&[*byte]).await.is_err() {
                break;
            }
        }
        // It is cut: the reader sees it.
        std::future::pending::<()>().await;
    };
    let mut told = Vec::new();
    tokio::select! {
        // A reset is an end like any other.
        _ = reader.read_to_end(&mut told) => {}
        () = crawling => {}
    }
    (began.elapsed(), told.starts_with(b"HTTP/1.1 408"))
}

/// A line for the test, whatever else is on standard output.
fn say(what: &Value) {
    println!("\n{what}");
}

#[test]
#[ignore = "the process of the crawlers, which the test below starts"]
fn crawlers() {
    let targets = std::env::var(TARGETS).expect("the test below gives the addresses");
    let targets: Vec<SocketAddr> = targets
        .split(' ')
        .map(|target| target.parse().expect("an address"))
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let began = Instant::now();
        let sockets = ATTACKS
            .iter()
            .flat_map(|attack| std::iter::repeat_n(attack, attack.sockets));
        let mut crawling = Vec::new();
        for attack in sockets {
            let mut stream = TcpStream::connect(targets[attack.target])
                .await
                .expect("it listens");
            stream.write_all(attack.first).await.expect("it is taken");
            crawling.push((attack.name, tokio::spawn(crawl(stream, attack.then))));
        }
        say(&json!({"open": crawling.len(), "within_ms": began.elapsed().as_millis() as u64}));
        let mut ends: std::collections::BTreeMap<&str, Vec<(Duration, bool)>> = Default::default();
        for (name, crawling) in crawling {
            ends.entry(name)
                .or_default()
                .push(crawling.await.expect("no panic"));
        }
        for (name, ends) in ends {
            let after = |took: Option<Duration>| took.expect("there are some").as_millis();
            say(&json!({
                "attack": name,
                "sockets": ends.len(),
                "first_ms": after(ends.iter().map(|(took, _)| *took).min()) as u64,
                "last_ms": after(ends.iter().map(|(took, _)| *took).max()) as u64,
                "told": ends.iter().filter(|(_, told)| *told).count(),
            }));
        }
    });
}

/// The other process.
struct Crawlers {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Crawlers {
    fn before(plain: &Router, secure: &Router) -> Self {
        let targets = [plain.http, plain.grpc, secure.http, secure.grpc].map(|target| target.to_string());
        let this = std::env::current_exe().expect("a running test has a path");
        let mut child = Command::new("sh")
            .args(["-c", "ulimit -n $(ulimit -Hn) && exec \"$0\" \"$@\""])
            .arg(this)
            .args(["--exact", "crawlers::crawlers", "--ignored", "--nocapture"])
            .env(TARGETS, targets.join(" "))
            .stdout(Stdio::piped())
            .spawn()
            .expect("this very program");
        let said = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, said }
    }

    /// What it says next; `None`: it ended.
    fn next(&mut self) -> Option<Value> {
        loop {
            let mut line = String::new();
            if self.said.read_line(&mut line).expect("text") == 0 {
                return None;
            }
            if line.starts_with('{') {
                return Some(serde_json::from_str(&line).expect("as `say` writes it"));
            }
        }
    }
}

impl Drop for Crawlers {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its clients' connections, as the program counts them.
async fn connections(router: &Router) -> usize {
    let page = get(router.http, "/metrics").await.body;
    let open = |line: &str| line.rsplit(' ').next().and_then(|n| n.parse::<usize>().ok());
    page.lines()
        .filter(|line| line.starts_with("swallow_router_connections{"))
        .map(|line| open(line).expect("a count"))
        .sum()
}

fn files(router: &Router) -> usize {
    let open = std::fs::read_dir(format!("/proc/{}/fd", router.child.id()));
    open.expect("Linux").count()
}

/// Requests over every front, each on a new connection, until `end`: how long each took.
async fn served(
    plain: SocketAddr,
    grpc: SocketAddr,
    secure: SocketAddr,
    end: Arc<tokio::sync::Notify>,
) -> Vec<Duration> {
    let mut took = Vec::new();
    let mut end = std::pin::pin!(end.notified());
    loop {
        let began = Instant::now();
        let body = json!({"model": "m", "prompt": "p", "max_tokens": 3});
        assert_eq!(post(plain, "/v1/completions", &body).await.status, 200);
        channel(grpc).await.generate(asked("p", 3)).await.expect("served");
        let mut stream = super::tls::connect(secure, b"http/1.1").await;
        let request = b"GET /health HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.expect("read");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.expect("answered");
        assert_eq!(&answer, b"HTTP/1.1 200");
        took.push(began.elapsed());
        // The pace of some clients.
        if tokio::time::timeout(Duration::from_millis(50), &mut end)
            .await
            .is_ok()
        {
            return took;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_that_crawl_are_cut_in_time_and_the_others_are_served() {
    let worker = worker(|_| {});
    let certificate = Files::new(FIRST);
    let replica = format!("--replica=m={}", worker.address);
    let mut plain = start("", "warn,swallow_router=info", &[&replica]);
    let [cert, key] = certificate.flags();
    let mut secure = start("", "warn,swallow_router=info", &[&replica, &cert, &key]);
    plain.drain_log();
    secure.drain_log();
    plain.is_ready("m").await;
    let before = files(&plain);

    let mut crawlers = Crawlers::before(&plain, &secure);
    let (open, mut crawlers) = tokio::task::spawn_blocking(move || (crawlers.next(), crawlers))
        .await
        .expect("no panic");
    let open = open.expect("it says when all of its sockets are open");
    assert_eq!(open["open"], PLAIN + SECURE, "{open}");
    // The accept loop goes on: all of them are let in, and cost a descriptor each.
    let began = Instant::now();
    while connections(&plain).await < PLAIN || files(&plain) < before + PLAIN || files(&secure) < SECURE {
        assert!(began.elapsed() < HEAD, "{} are in", connections(&plain).await);
        tokio::time::sleep(Duration::from_millis(5)).await; // Between two looks.
    }

    let end = Arc::new(tokio::sync::Notify::new());
    let serving = tokio::spawn(served(plain.http, plain.grpc, secure.http, Arc::clone(&end)));
    let probes = [plain.probes, secure.probes];
    let ends = tokio::task::spawn_blocking(move || {
        for address in probes {
            assert!(probe(address, "/health").0 < Duration::from_secs(1));
        }
        let mut ends = Vec::new();
        while let Some(said) = crawlers.next() {
            ends.push(said);
        }
        ends
    });
    let ends = ends.await.expect("no panic");
    end.notify_one();
    let mut took = serving.await.expect("everybody is served");
    took.sort_unstable();
    println!(
        "{} rounds of three requests: median {:?}, longest {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() - 1]
    );
    assert!(took.len() > 100, "{} rounds", took.len());
    assert!(
        took[took.len() / 2] < Duration::from_millis(300) && took[took.len() - 1] < Duration::from_secs(5)
    );

    assert_eq!(ends.len(), ATTACKS.len());
    for attack in &ATTACKS {
        let end = ends
            .iter()
            .find(|end| end["attack"] == attack.name)
            .expect("each is told");
        println!("{end}");
        assert_eq!(end["sockets"], attack.sockets);
        let [first, last] = ["first_ms", "last_ms"]
            .map(|field| Duration::from_millis(end[field].as_u64().expect("a number")));
        assert!(
            first >= attack.limit - Duration::from_millis(200) && last <= attack.limit + LATE_MAX,
            "{end}"
        );
        // Bodies that crawl belong to a request, which has an answer.
        let told = if attack.limit == BODY { attack.sockets } else { 0 };
        assert_eq!(end["told"], told, "{end}");
    }
    assert_eq!(
        worker.seen().sessions,
        2,
        "one of each router, from first to last"
    );
    // What asks is a connection too.
    let began = Instant::now();
    while connections(&plain).await > 1 || files(&plain) > before + 8 {
        assert!(
            began.elapsed() < LIMIT,
            "{} files are open where {before} were",
            files(&plain)
        );
        tokio::time::sleep(Duration::from_millis(5)).await; // Between two looks.
    }
}
