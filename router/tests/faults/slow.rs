//! Clients that send a byte now and then: headers, bodies, prefaces. None of them holds anything for long, and the
//! others do not notice.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    support::http,
    tls::{FIRST, Files},
    *,
};

/// Sockets of the attack; the router's ends of them are in this process too.
const SOCKETS: usize = 300;

fn short(limits: &mut Limits) {
    (limits.head, limits.body) = (Duration::from_millis(400), Duration::from_millis(400));
}

/// Sends `first`, then a byte every 50 ms, until it is cut; returns what it was told.
async fn crawl(address: SocketAddr, first: &[u8], then: u8) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.expect("the router listens");
    stream.write_all(first).await.expect("it is read");
    let (mut reader, mut writer) = stream.into_split();
    let crawling = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if writer.write_all(&[then]).await.is_err() {
                return;
            }
        }
    });
    let mut told = Vec::new();
    // A reset is an end like any other.
    let read = tokio::time::timeout(LIMIT, reader.read_to_end(&mut told)).await;
    crawling.abort();
    assert!(read.is_ok(), "it is cut");
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_bodies_and_prefaces_that_crawl_are_cut_and_the_others_are_served() {
    let worker = worker(|_| {});
    let house = house(&[&worker], short).await;
    let body = "POST /v1/completions HTTP/1.1\r\nhost: m\r\ncontent-length: 5000\r\n\r\n{";
    let attacks: [(SocketAddr, &[u8], u8); 5] = [
        (house.http, b"G", b'E'),
        (house.http, b"GET /health HTTP/1.1\r\nx: ", b'y'),
        (house.http, body.as_bytes(), b' '),
        (house.grpc, b"PRI * HTTP/2.0", b'\r'),
        (house.grpc, b"", b'P'),
    ];
    let crawling = (0..SOCKETS).map(|i| {
        let (address, first, then) = attacks[i % attacks.len()];
        crawl(address, first, then)
    });
    let served = async {
        let mut longest = Duration::ZERO;
        let mut client = house.channel().await;
        for i in 0..50 {
            let began = Instant::now();
            client.generate(asked(&format!("p{i}"), 3)).await.expect("served");
            longest = longest.max(began.elapsed());
        }
        longest
    };
    let (told, longest) = tokio::join!(futures::future::join_all(crawling), served);
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    // Bodies that crawl belong to a request, which has an answer.
    let answered = told
        .iter()
        .filter(|told| told.starts_with(b"HTTP/1.1 408"))
        .count();
    assert_eq!(answered, SOCKETS / attacks.len());
    until("only the one good connection is left", || {
        house.metric("swallow_router_connections{protocol=\"grpc\"}") <= 1.0
            && house.metric("swallow_router_connections{protocol=\"http\"}") == 0.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stops_is_answered_with_408() {
    let worker = worker(|_| {});
    let house = house(&[&worker], short).await;
    let mut stream = TcpStream::connect(house.http).await.expect("it listens");
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-length: 5000\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.expect("read");
    let response = tokio::time::timeout(LIMIT, http::receive(stream))
        .await
        .expect("in time");
    assert_eq!(response.status, 408, "{}", response.body);
}

/// A client that sends on while it is refused, and reads later: bytes that nobody reads any more must not reset the
/// connection under the answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_outlives_what_is_still_sent() {
    let worker = worker(|_| {});
    let house = house(&[&worker], short).await;
    let mut stream = TcpStream::connect(house.http).await.expect("it listens");
    let head = "POST /v1/completions HTTP/1.1\r\nhost: m\r\ncontent-length: 5000\r\n\r\n{";
    stream.write_all(head.as_bytes()).await.expect("read");
    // The body may take 400 ms; all of these come before the connection is closed.
    for _ in 0..80 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        stream.write_all(b" ").await.expect("read and thrown away");
    }
    let mut told = Vec::new();
    let read = tokio::time::timeout(LIMIT, stream.read_to_end(&mut told)).await;
    read.expect("closed in time").expect("not reset");
    assert!(
        told.starts_with(b"HTTP/1.1 408"),
        "{}",
        String::from_utf8_lossy(&told)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_connection_may_idle_and_is_closed_in_its_time() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |limits| {
        short(limits);
        limits.idle = Duration::from_millis(1200);
    })
    .await;
    let mut stream = TcpStream::connect(house.http).await.expect("it listens");
    let request = b"GET /health HTTP/1.1\r\nhost: m\r\n\r\n";
    let mut answer = [0; 1024];
    for _ in 0..2 {
        stream.write_all(request).await.expect("read");
        let read = stream.read(&mut answer).await.expect("answered");
        assert!(answer[..read].starts_with(b"HTTP/1.1 200"));
        // Longer than a head may take.
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    let read = tokio::time::timeout(LIMIT, stream.read(&mut answer)).await;
    assert_eq!(read.expect("in time").expect("closed"), 0);
}

/// The beginning of a TLS record that would be a ClientHello of 512 bytes.
pub const HELLO: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_crawl_are_cut_and_the_others_are_served() {
    let worker = worker(|_| {});
    let certificate = Files::new(FIRST).load();
    let house = house_of([worker.address].into_iter(), short, None, Some(&certificate)).await;
    let attacks: [(SocketAddr, &[u8]); 4] = [
        (house.http, b""),
        (house.http, HELLO),
        (house.grpc, b""),
        (house.grpc, HELLO),
    ];
    let began = Instant::now();
    let crawling = (0..400).map(|i| {
        let (address, first) = attacks[i % attacks.len()];
        crawl(address, first, 0x16)
    });
    let served = async {
        for _ in 0..20 {
            let mut stream = super::tls::connect(house.http, b"http/1.1").await;
            let request = b"GET /health HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n";
            stream.write_all(request).await.expect("read");
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.expect("answered");
            assert_eq!(&answer, b"HTTP/1.1 200");
        }
        began.elapsed()
    };
    let (_, served) = tokio::join!(futures::future::join_all(crawling), served);
    println!("20 handshakes between 400 that crawl took {served:?}");
    assert!(served < Duration::from_secs(10), "{served:?}");
    until("all are cut", || {
        ["grpc", "http"].iter().all(|protocol| {
            house.metric(&format!("swallow_router_connections{{protocol=\"{protocol}\"}}")) == 0.0
        })
    })
    .await;
}
