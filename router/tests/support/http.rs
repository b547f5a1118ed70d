//! A client of few lines: what goes over the wire is in plain sight.

use std::{collections::HashMap, net::SocketAddr};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A response, whole.
#[derive(Debug)]
pub struct Response {
    /// Its status.
    pub status: u16,
    /// By lower-case name.
    pub headers: HashMap<String, String>,
    /// With the chunks joined.
    pub body: String,
}

impl Response {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// Data of the server-sent events.
    pub fn events(&self) -> Vec<String> {
        assert_eq!(
            self.headers["content-type"], "text/event-stream; charset=utf-8",
            "{}",
            self.body
        );
        let events = self.body.split_terminator("\n\n");
        events
            .map(|event| {
                event
                    .strip_prefix("data: ")
                    .expect("an event with data")
                    .to_owned()
            })
            .collect()
    }

    /// The events as JSON, without the last one, which must be `[DONE]`.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events
            .iter()
            .map(|event| serde_json::from_str(event).expect("JSON"))
            .collect()
    }
}

/// An open connection with a request on it.
pub async fn send(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("the router listens");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: router\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    stream
        .write_all(request.as_bytes())
        .await
        .expect("the router reads");
    stream
}

/// The whole response.
pub async fn receive(mut stream: TcpStream) -> Response {
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).await.expect("the router answers");
    let head_end = raw.windows(4).position(|end| end == b"\r\n\r\n").expect("a head") + 4;
    let head = std::str::from_utf8(&raw[..head_end]).expect("ASCII");
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .expect("a status")
        .parse()
        .expect("a number");
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let chunked = headers
        .get("transfer-encoding")
        .is_some_and(|encoding| encoding == "chunked");
    let body = if chunked {
        joined(&raw[head_end..])
    } else {
        raw[head_end..].to_vec()
    };
    Response {
        status,
        headers,
        body: String::from_utf8(body).expect("UTF-8"),
    }
}

fn joined(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line_end) = raw.windows(2).position(|end| end == b"\r\n") {
        let size = std::str::from_utf8(&raw[..line_end]).expect("ASCII");
        let size = usize::from_str_radix(size, 16).expect("hexadecimal");
        body.extend_from_slice(&raw[line_end + 2..line_end + 2 + size]);
        raw = &raw[line_end + 2 + size + 2..];
    }
    body
}

/// A POST of JSON.
pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Response {
    receive(
        send(
            address,
            "POST",
            path,
            "content-type: application/json\r\n",
            &body.to_string(),
        )
        .await,
    )
    .await
}

/// A GET.
pub async fn get(address: SocketAddr, path: &str) -> Response {
    receive(send(address, "GET", path, "", "").await).await
}
