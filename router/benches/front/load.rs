//! The clients, in a process of their own: they ask, count what comes, and read from the operating system what the
//! process that they watch spent on it meanwhile.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::json;
use swallow_rpc::inference::v1::{
    GenerateRequest, StopCriteria, StreamGenerateRequest, StreamGenerateResponse, TokenIds,
    generate_request::Prompt, generation_service_client::GenerationServiceClient,
    stream_generate_response::Event,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};
use tonic::{Streaming, transport::Channel};

use super::process::{Outcome, cpu, resident_bytes};

/// What every token says: its bytes count the tokens, however they are put together.
pub const WORD: &str = " the";

/// Streams that share a connection at most: the router takes 1,024.
const STREAMS_PER_CONNECTION: usize = 1000;
/// Connections that requests are spread over at least.
const CONNECTIONS: usize = 8;
/// Streams that are being opened at once.
const OPENING: usize = 512;
/// How long all streams together may take to open.
const OPEN_LIMIT: Duration = Duration::from_secs(120);
/// Before a measurement of requests: caches fill, threads start.
const WARM_UP: Duration = Duration::from_millis(500);

/// How to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Front {
    /// GenerationService.
    Grpc,
    /// OpenAI's HTTP.
    Http,
}

/// What to measure.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Work {
    /// Whole answers of one token, so many asked for at once.
    Requests { at_once: usize },
    /// Open streams, a token each step.
    Streams { streams: usize },
    /// Streams of one token, begun at even times.
    First { per_second: u32 },
}

/// A load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Load {
    /// Whose CPU time and memory counts.
    pub watched: u32,
    /// Where to ask.
    pub address: SocketAddr,
    /// How.
    pub front: Front,
    /// The model's name.
    pub model: String,
    /// Token ids of a prompt, where there are no texts.
    pub prompt_tokens: u32,
    /// What users say, in turn; each is a conversation.
    pub texts: Vec<String>,
    /// What to do.
    pub work: Work,
    /// For how long.
    pub seconds: f64,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Requests, or tokens.
    pub units: u64,
    /// Pieces that tokens came in.
    pub messages: u64,
    /// CPU time of the watched process.
    pub cpu_seconds: f64,
    /// Time in which it happened.
    pub seconds: f64,
    /// Latencies in ascending order are at these quantiles.
    pub p50_us: f64,
    pub p99_us: f64,
    /// Memory of the watched process for each open stream, and the tokens that each had had by then, its prompt's too.
    pub bytes_per_stream: f64,
    pub tokens_per_stream: f64,
}

#[derive(Default)]
struct Counters {
    units: AtomicU64,
    messages: AtomicU64,
    opened: AtomicU64,
}

/// Does a load.
pub async fn load(load: Load) -> Outcome<Measured> {
    let clients = Clients::connect(&load).await?;
    // The first answers wait for the model's files.
    let patience = Instant::now();
    while let Err(error) = clients.asker(0).whole(0).await {
        if patience.elapsed() > OPEN_LIMIT {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_millis(100)).await; // Between two tries.
    }
    match load.work {
        Work::Requests { at_once } => requests(&clients, at_once).await,
        Work::Streams { streams } => open(&clients, streams).await,
        Work::First { per_second } => first(&clients, per_second).await,
    }
}

async fn requests(clients: &Arc<Clients>, at_once: usize) -> Outcome<Measured> {
    let load = &clients.load;
    let begin = Instant::now() + WARM_UP;
    let end = begin + Duration::from_secs_f64(load.seconds);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..at_once {
        let mut asker = clients.asker(number);
        tasks.spawn(async move {
            let mut took = Vec::new();
            let mut turn = number;
            loop {
                let asked = Instant::now();
                if asked >= end {
                    return Ok::<_, Box<dyn std::error::Error + Send + Sync>>(took);
                }
                asker.whole(turn).await?;
                turn += at_once;
                if asked >= begin {
                    took.push(asked.elapsed());
                }
            }
        });
    }
    tokio::time::sleep_until(begin.into()).await;
    let (before, began) = (cpu(load.watched)?, Instant::now());
    tokio::time::sleep_until(end.into()).await;
    let (after, seconds) = (cpu(load.watched)?, began.elapsed().as_secs_f64());
    let mut took = Vec::new();
    while let Some(done) = tasks.join_next().await {
        took.extend(done??);
    }
    let (p50_us, p99_us) = quantiles(&mut took);
    Ok(Measured {
        units: took.len() as u64,
        cpu_seconds: (after - before).as_secs_f64(),
        seconds,
        p50_us,
        p99_us,
        ..Measured::default()
    })
}

async fn open(clients: &Arc<Clients>, streams: usize) -> Outcome<Measured> {
    let load = &clients.load;
    let resident = resident_bytes(load.watched)?;
    let counters = Arc::new(Counters::default());
    let opening = Arc::new(tokio::sync::Semaphore::new(OPENING));
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..streams {
        let (asker, counters, opening) = (clients.asker(number), Arc::clone(&counters), Arc::clone(&opening));
        tasks.spawn(async move {
            let place = opening.acquire_owned().await?;
            let mut words = asker.stream(number, u32::MAX).await?;
            drop(place);
            let mut fresh = true;
            while let Some(words) = words.next().await? {
                counters.units.fetch_add(words, Ordering::Relaxed);
                counters.messages.fetch_add(1, Ordering::Relaxed);
                if std::mem::take(&mut fresh) {
                    counters.opened.fetch_add(1, Ordering::Relaxed);
                }
            }
            Err::<(), Box<dyn std::error::Error + Send + Sync>>("a stream ended early".into())
        });
    }
    let began = Instant::now();
    let all = async {
        while counters.opened.load(Ordering::Relaxed) < streams as u64 {
            if began.elapsed() > OPEN_LIMIT {
                let opened = counters.opened.load(Ordering::Relaxed);
                return Err(format!("{opened} of {streams} streams were open after {OPEN_LIMIT:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await; // Between two looks.
        }
        let (before, began) = (cpu(load.watched)?, Instant::now());
        let (units, messages) = (
            counters.units.load(Ordering::Relaxed),
            counters.messages.load(Ordering::Relaxed),
        );
        tokio::time::sleep(Duration::from_secs_f64(load.seconds)).await;
        let all = counters.units.load(Ordering::Relaxed);
        let grown = resident_bytes(load.watched)?.saturating_sub(resident);
        Ok(Measured {
            units: all - units,
            messages: counters.messages.load(Ordering::Relaxed) - messages,
            cpu_seconds: (cpu(load.watched)? - before).as_secs_f64(),
            seconds: began.elapsed().as_secs_f64(),
            bytes_per_stream: grown as f64 / streams as f64,
            tokens_per_stream: f64::from(load.prompt_tokens) + all as f64 / streams as f64,
            ..Measured::default()
        })
    };
    tokio::select! {
        measured = all => measured,
        Some(ended) = tasks.join_next() => Err(ended?.err().unwrap_or_else(|| "a stream ended".into())),
    }
}

async fn first(clients: &Arc<Clients>, per_second: u32) -> Outcome<Measured> {
    let load = &clients.load;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
    let total = (load.seconds * f64::from(per_second)) as usize;
    let mut tasks = tokio::task::JoinSet::new();
    let began = Instant::now();
    let before = cpu(load.watched)?;
    for number in 0..total {
        ticks.tick().await;
        let mut asker = clients.asker(number);
        tasks.spawn(async move {
            if let Asker::Http { connection, .. } = &mut asker {
                *connection = None;
            }
            let asked = Instant::now();
            let mut words = asker.stream(number, 1).await?;
            let some = words.next().await?;
            some.ok_or("a stream without a token")?;
            let took = asked.elapsed();
            while words.next().await?.is_some() {}
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(took)
        });
    }
    let mut took = Vec::new();
    while let Some(done) = tasks.join_next().await {
        took.push(done??);
    }
    let (p50_us, p99_us) = quantiles(&mut took);
    Ok(Measured {
        units: took.len() as u64,
        cpu_seconds: (cpu(load.watched)? - before).as_secs_f64(),
        seconds: began.elapsed().as_secs_f64(),
        p50_us,
        p99_us,
        ..Measured::default()
    })
}

fn quantiles(took: &mut [Duration]) -> (f64, f64) {
    took.sort_unstable();
    let at = |quantile: f64| {
        let index = ((took.len() as f64 * quantile) as usize).min(took.len().saturating_sub(1));
        took.get(index).map_or(0.0, |took| took.as_secs_f64() * 1e6)
    };
    (at(0.5), at(0.99))
}

/// Connections to where the load goes.
struct Clients {
    load: Load,
    channels: Vec<GenerationServiceClient<Channel>>,
}

impl Clients {
    async fn connect(load: &Load) -> Outcome<Arc<Self>> {
        let mut channels = Vec::new();
        let streams = match load.work {
            Work::Streams { streams } => streams,
            Work::Requests { .. } | Work::First { .. } => 0,
        };
        if load.front == Front::Grpc {
            for _ in 0..CONNECTIONS.max(streams.div_ceil(STREAMS_PER_CONNECTION)) {
                let channel = Channel::from_shared(format!("http://{}", load.address))?;
                let channel = channel.tcp_nodelay(true).connect().await?;
                channels.push(GenerationServiceClient::new(channel));
            }
        }
        Ok(Arc::new(Self {
            load: load.clone(),
            channels,
        }))
    }

    fn asker(self: &Arc<Self>, number: usize) -> Asker {
        let clients = Arc::clone(self);
        match self.load.front {
            Front::Grpc => Asker::Grpc {
                client: self.channels[number % self.channels.len()].clone(),
                clients,
            },
            Front::Http => Asker::Http {
                clients,
                connection: None,
            },
        }
    }

    /// Prompts differ, and come again after 64.
    fn ids(&self, turn: usize) -> Vec<u32> {
        let turn = turn as u32 % 64;
        (0..self.load.prompt_tokens)
            .map(|at| (at.wrapping_mul(31) ^ turn.wrapping_mul(7)) % 1000)
            .collect()
    }

    fn generate(&self, turn: usize, max_tokens: u32) -> GenerateRequest {
        GenerateRequest {
            model: self.load.model.clone(),
            prompt: Some(Prompt::TokenIds(TokenIds { ids: self.ids(turn) })),
            stop: Some(StopCriteria {
                max_output_tokens: Some(max_tokens.min(LONG)),
                ignore_eos: true,
                ..StopCriteria::default()
            }),
            ..GenerateRequest::default()
        }
    }

    fn http(&self, turn: usize, stream: bool, max_tokens: u32) -> String {
        let max_tokens = max_tokens.min(LONG);
        let (model, texts) = (&self.load.model, &self.load.texts);
        let (path, body) = if texts.is_empty() {
            let body =
                json!({"model": model, "prompt": self.ids(turn), "max_tokens": max_tokens, "stream": stream});
            ("/v1/completions", body)
        } else {
            let messages = [
                json!({"role": "system", "content": "You are a helpful assistant."}),
                json!({"role": "user", "content": texts[turn % texts.len()]}),
            ];
            let body =
                json!({"model": model, "messages": messages, "max_tokens": max_tokens, "stream": stream});
            ("/v1/chat/completions", body)
        };
        let body = body.to_string();
        format!(
            "POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    }
}

/// Longer than any measurement takes.
const LONG: u32 = 16_384;

/// One client.
enum Asker {
    Grpc {
        clients: Arc<Clients>,
        client: GenerationServiceClient<Channel>,
    },
    Http {
        clients: Arc<Clients>,
        connection: Option<BufReader<TcpStream>>,
    },
}

impl Asker {
    /// A whole answer of one token.
    async fn whole(&mut self, turn: usize) -> Outcome<()> {
        match self {
            Self::Grpc { clients, client } => {
                client.generate(clients.generate(turn, 1)).await?;
            }
            Self::Http { clients, connection } => {
                let mut open = match connection.take() {
                    Some(open) => open,
                    None => connect(clients.load.address).await?,
                };
                let length = ask(&mut open, &clients.http(turn, false, 1)).await?;
                let mut body = vec![0; length.ok_or("an answer of known length")?];
                open.read_exact(&mut body).await?;
                *connection = Some(open);
            }
        }
        Ok(())
    }

    async fn stream(self, turn: usize, max_tokens: u32) -> Outcome<Words> {
        Ok(match self {
            Self::Grpc { clients, mut client } => {
                let generate = Some(clients.generate(turn, max_tokens));
                let stream = None;
                let request = StreamGenerateRequest { generate, stream };
                Words::Grpc(client.stream_generate(request).await?.into_inner())
            }
            Self::Http { clients, .. } => {
                let mut open = connect(clients.load.address).await?;
                ask(&mut open, &clients.http(turn, true, max_tokens)).await?;
                Words::Http(open, Vec::new())
            }
        })
    }
}

async fn connect(address: SocketAddr) -> Outcome<BufReader<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(BufReader::with_capacity(2048, stream))
}

/// Sends a request and reads the answer's head; gives its body's length, if that says it.
async fn ask(open: &mut BufReader<TcpStream>, request: &str) -> Outcome<Option<usize>> {
    open.get_mut().write_all(request.as_bytes()).await?;
    let (mut line, mut length, mut status) = (String::new(), None, None);
    loop {
        line.clear();
        open.read_line(&mut line).await?;
        let text = line.trim_end().to_ascii_lowercase();
        if text.is_empty() {
            break;
        }
        if let Some(value) = text.strip_prefix("content-length:") {
            length = Some(value.trim().parse()?);
        }
        status.get_or_insert(text);
    }
    let status = status.ok_or("the connection was closed")?;
    if !status.contains(" 200") {
        let mut body = vec![0; length.unwrap_or(0)];
        open.read_exact(&mut body).await?;
        return Err(format!("{status}: {}", String::from_utf8_lossy(&body)).into());
    }
    Ok(length)
}

/// A stream's tokens.
enum Words {
    Grpc(Streaming<StreamGenerateResponse>),
    Http(BufReader<TcpStream>, Vec<u8>),
}

impl Words {
    /// How many came with the next piece of text; `None` at the end.
    async fn next(&mut self) -> Outcome<Option<u64>> {
        match self {
            Self::Grpc(stream) => {
                while let Some(message) = stream.message().await? {
                    if let Some(Event::Delta(delta)) = message.event {
                        return Ok(Some(n_words(delta.text.len())));
                    }
                }
                Ok(None)
            }
            Self::Http(stream, line) => loop {
                line.clear();
                if stream.read_until(b'\n', line).await? == 0 || line.starts_with(b"data: [DONE]") {
                    return Ok(None);
                }
                // Words have nothing in them that JSON escapes.
                let text = line.strip_prefix(b"data: ").and_then(|event| {
                    let key = b"\"text\":\"";
                    let start = event.windows(key.len()).position(|window| window == key)? + key.len();
                    event[start..].iter().position(|&byte| byte == b'"')
                });
                if let Some(bytes @ 1..) = text {
                    return Ok(Some(n_words(bytes)));
                }
            },
        }
    }
}

fn n_words(bytes: usize) -> u64 {
    (bytes / WORD.len()) as u64
}
