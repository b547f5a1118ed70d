//! Connections that flood: frames made by hand, because no client library would. The flooding connection ends or
//! stands still; everybody else is served.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{support::http, *};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
/// `:method: POST`, `:scheme: http`, `:path: /`, as HPACK's static table has them.
const HEAD: [u8; 3] = [0x83, 0x86, 0x84];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

async fn greeted(house: &House) -> TcpStream {
    let mut stream = TcpStream::connect(house.grpc).await.expect("it listens");
    stream.write_all(PREFACE).await.expect("read");
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.expect("read");
    stream
}

/// How a flood ended.
#[derive(Debug, PartialEq)]
enum Flooded {
    /// The connection is gone, after a GOAWAY with this code if there was time for it.
    Closed(Option<u32>),
    /// What is sent is not read any more.
    Stuck,
}

/// Sends `piece(i)` for i = 0, 1, ... until the router has enough of it.
async fn flood(
    house: &House,
    most_bytes: usize,
    reads: bool,
    mut piece: impl FnMut(u32) -> Vec<u8>,
) -> Flooded {
    let (mut reader, mut writer) = greeted(house).await.into_split();
    let mut sent = 0;
    let sending = async {
        for i in 0.. {
            let bytes = piece(i);
            match tokio::time::timeout(Duration::from_secs(1), writer.write_all(&bytes)).await {
                Ok(Ok(())) => sent += bytes.len(),
                Ok(Err(_)) => return Flooded::Closed(None),
                Err(_) => return Flooded::Stuck,
            }
            assert!(sent <= most_bytes, "{sent} bytes were taken");
        }
        unreachable!("it ends before numbers do")
    };
    let reading = async {
        if !reads {
            return std::future::pending().await;
        }
        let mut told = Vec::new();
        // However it ends.
        let _ = reader.read_to_end(&mut told).await;
        Flooded::Closed(goaway(&told))
    };
    tokio::select! {
        biased;
        ended = reading => ended,
        ended = sending => ended,
    }
}

/// The error code of the last GOAWAY in some frames.
fn goaway(mut frames: &[u8]) -> Option<u32> {
    let mut code = None;
    while let Some((head, rest)) = frames.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = rest.get(..length)?;
        if head[3] == GOAWAY {
            code = Some(u32::from_be_bytes(payload[4..8].try_into().expect("four bytes")));
        }
        frames = &rest[length..];
    }
    code
}

/// Somebody else, on a connection of their own, is served at once.
async fn others_are_served(house: &House) {
    let mut client = house.channel().await;
    let began = Instant::now();
    client.generate(asked("other", 3)).await.expect("served");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn continuation_frames_without_end() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |_| {}).await;
    let junk = [0x00; 8 << 10];
    let ended = flood(&house, 4 << 20, true, |i| match i {
        0 => frame(HEADERS, 0, 1, &HEAD),
        _ => frame(CONTINUATION, 0, 1, &junk),
    })
    .await;
    assert!(matches!(ended, Flooded::Closed(_)), "{ended:?}");
    others_are_served(&house).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_opened_and_reset() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |_| {}).await;
    let ended = flood(&house, 8 << 20, true, |i| {
        let pair = |stream| {
            let cancel = 8u32.to_be_bytes();
            [
                frame(HEADERS, END_HEADERS, stream, &HEAD),
                frame(RST_STREAM, 0, stream, &cancel),
            ]
            .concat()
        };
        (0..100).flat_map(|j| pair((i * 100 + j) * 2 + 1)).collect()
    })
    .await;
    const ENHANCE_YOUR_CALM: u32 = 11;
    assert!(
        matches!(ended, Flooded::Closed(None | Some(ENHANCE_YOUR_CALM))),
        "{ended:?}"
    );
    others_are_served(&house).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pings_and_settings_whose_answers_nobody_reads() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |limits| limits.keepalive = Duration::from_secs(1)).await;
    for kind in [PING, SETTINGS] {
        let payload: &[u8] = if kind == PING { &[7; 8] } else { &[] };
        let pings: Vec<u8> = std::iter::repeat_n(frame(kind, 0, 0, payload), 1000)
            .flatten()
            .collect();
        let before = resident_bytes();
        // Kernel buffers of both ends take some megabytes of frames, and of their answers.
        let ended = flood(&house, 256 << 20, false, |_| pings.clone()).await;
        println!("{kind}: {ended:?}");
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < 32 << 20, "{grown} bytes");
        others_are_served(&house).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_and_many_headers() {
    let worker = worker(|_| {});
    let house = house(&[&worker], |_| {}).await;
    let mut client = house.channel().await;
    let mut request = tonic::Request::new(asked("p", 3));
    request
        .metadata_mut()
        .insert("x-large", "y".repeat(20_000).parse().expect("ASCII"));
    client.generate(request).await.expect_err("refused");
    client
        .generate(asked("p", 3))
        .await
        .expect("a request of the usual size is served");
    for headers in [
        format!("x-large: {}\r\n", "y".repeat(40_000)),
        "x: y\r\n".repeat(200),
    ] {
        let response = http::receive(http::send(house.http, "GET", "/health", &headers, "").await).await;
        assert_eq!(response.status, 431, "{}", response.body);
    }
    others_are_served(&house).await;
}

/// Of this process.
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .expect("a number");
    pages * 4096
}
