//! Clients that leave, and routers that end.

use std::sync::atomic::Ordering;

use tokio::{io::AsyncWriteExt, net::TcpStream};

use super::*;

#[tokio::test]
async fn a_client_that_leaves_cancels_what_runs_for_it() {
    let router = start(|ask| then_hangs(vec![started(), tokens(ask, 0, &ids("a"))])).await;
    for (stream, runs) in [(true, 1), (false, 2)] {
        let body = json!({"model": "tiny", "prompt": "p", "stream": stream}).to_string();
        let mut connection = send(router.http, "POST", TEXT, "", &body).await;
        if stream {
            let mut head = [0; 12];
            connection
                .read_exact(&mut head)
                .await
                .expect("the beginning of the answer");
            assert_eq!(&head, b"HTTP/1.1 200");
        } else {
            let asked = async {
                while router.seen.asks().len() < 2 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(5), asked)
                .await
                .expect("the request arrives");
        }
        drop(connection);
        router.seen.all_dropped(runs).await;
    }
    // Three prompts in one request: all of them go.
    let body = json!({"model": "tiny", "prompt": ["a", "b", "c"], "stream": true}).to_string();
    let mut connection = send(router.http, "POST", TEXT, "", &body).await;
    let mut head = [0; 12];
    connection
        .read_exact(&mut head)
        .await
        .expect("the beginning of the answer");
    drop(connection);
    router.seen.all_dropped(5).await;
}

#[tokio::test]
async fn readiness_begins_with_discovery_and_ends_before_the_drain() {
    let router = start(|ask| says(ask, "ok")).await;
    let readyz = || get(router.http, "/readyz");
    router.seen.settled.store(false, Ordering::Release);
    let looking = readyz().await;
    assert_eq!((looking.status, &looking.json()["ready"]), (503, &json!(false)));
    assert_eq!(looking.json()["ready_replicas"]["tiny"], 1);
    router.seen.settled.store(true, Ordering::Release);
    assert_eq!(readyz().await.status, 200);
    // Told to end: no longer ready, but whoever still comes is served.
    router.door.leave();
    assert_eq!(readyz().await.status, 503);
    let served = post(router.http, TEXT, &json!({"model": "tiny", "prompt": "p"})).await;
    assert_eq!(served.status, 200, "{}", served.body);
}

#[tokio::test]
async fn draining_refuses_what_comes_and_finishes_what_runs() {
    let (more, wait) = tokio::sync::watch::channel(false);
    let router = start(move |ask| {
        let mut wait = wait.clone();
        let rest = stream::once(async move {
            wait.wait_for(|go| *go).await.expect("the test goes on");
            Ok(Event::Tokens {
                candidate: 0,
                tokens: vec![b'b'.into()],
                scores: Vec::new(),
            })
        });
        let end = stream::iter([finished(0, Finish::Length)]);
        Ok(stream::iter([started(), tokens(ask, 0, &ids("a"))])
            .chain(rest)
            .chain(end)
            .boxed())
    })
    .await;
    assert_eq!(
        get(router.http, "/readyz").await.json()["ready_replicas"]["tiny"],
        1
    );
    let body = json!({"model": "tiny", "prompt": "p", "stream": true}).to_string();
    let mut connection = send(router.http, "POST", TEXT, "", &body).await;
    connection.readable().await.expect("the answer begins");
    router.door.drain();
    let readyz = get(router.http, "/readyz").await;
    assert_eq!(
        (readyz.status, &readyz.json()["error"]["code"]),
        (503, &json!("draining"))
    );
    let refused = post(router.http, TEXT, &json!({"model": "tiny", "prompt": "p"})).await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (503, &json!("draining"))
    );
    router.shutdown.begin(Duration::from_secs(20));
    more.send(true).expect("the stream waits");
    let chunks = receive_rest(&mut connection).await;
    assert!(chunks.contains("\"b\"") && chunks.contains("[DONE]"), "{chunks}");
    for server in router.servers {
        assert!(server.await.expect("no panic"), "everything was finished in time");
    }
}

async fn receive_rest(connection: &mut TcpStream) -> String {
    let mut rest = String::new();
    connection.read_to_string(&mut rest).await.expect("UTF-8");
    rest
}

#[tokio::test]
async fn a_drain_that_takes_too_long_is_cut() {
    let router = start(|ask| then_hangs(vec![started(), tokens(ask, 0, &ids("a"))])).await;
    let body = json!({"model": "tiny", "prompt": "p", "stream": true}).to_string();
    let connection = send(router.http, "POST", TEXT, "", &body).await;
    connection.readable().await.expect("the answer begins");
    router.shutdown.begin(Duration::from_millis(50));
    let mut servers = router.servers.into_iter();
    assert!(
        !servers.next().expect("HTTP").await.expect("no panic"),
        "the stream could not finish"
    );
    router.seen.all_dropped(1).await;
}

#[tokio::test]
async fn what_is_no_request_ends_its_connection_and_nothing_else() {
    let router = start(|ask| says(ask, "ok")).await;
    let bomb = format!("x-bomb: {}\r\n", "b".repeat(32 << 10));
    let crowd: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    for headers in [&bomb, &crowd] {
        let response = receive(send(router.http, "GET", "/health", headers, "").await).await;
        assert_eq!(response.status, 431, "{}", response.body);
    }
    for (address, bytes) in [
        (router.http, &b"\x00\xFF\x00\xFF\r\n\r\n"[..]),
        (router.grpc, &b"GET / HTTP/1.1\r\n\r\n"[..]),
        (router.grpc, &[0xFF; 64]),
    ] {
        let mut connection = TcpStream::connect(address).await.expect("the router listens");
        connection.write_all(bytes).await.expect("the router reads");
        let mut rest = Vec::new();
        // However it ends, it ends.
        let end = tokio::time::timeout(Duration::from_secs(5), connection.read_to_end(&mut rest)).await;
        assert!(end.is_ok(), "{bytes:?}");
    }
    assert_eq!(get(router.http, "/health").await.status, 200);
}
