//! What the router costs beside a bare relay: CPU time a request and a token, time to the first token, memory a stream.
//!
//! `cargo bench -p swallow-router --bench front`. Clients, router, relay, workers and backends are processes of their
//! own, so that the operating system tells what the router alone takes. PERFORMANCE.md has the figures and says what
//! they mean. A missed target is printed, and no failure: machines differ. Only what cannot be measured fails.

#[path = "../../tests/support/mock_worker.rs"]
mod mock_worker;

mod load;
mod process;
mod relay;
mod report;
mod texts;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use load::{Front, Load, Measured, Work};
use mock_worker::{Config, MockWorker};
use process::{Outcome, Peer, Router, say, told, until_alone};
use report::{Report, Target};
use serde::{Deserialize, Serialize};
use texts::Model;

/// The model's name everywhere.
const MODEL: &str = "bench";
/// Tokens of a prompt in requests, and of one that opens a stream.
const PROMPT_TOKENS: u32 = 512;
const STREAM_PROMPT_TOKENS: u32 = 16;
/// 50 tokens a second.
const STEP: Duration = Duration::from_millis(20);
/// Streams that are held open get a token now and then.
const HELD_STEP: Duration = Duration::from_secs(2);

/// What the router costs beside a bare relay
#[derive(Parser)]
struct Cli {
    /// Fewer streams and shorter measurements: to see that it runs
    #[arg(long)]
    quick: bool,
    /// Only these cases: growth (of tokenising), request, token, first or held
    #[arg(long, value_name = "CASES")]
    only: Option<String>,
    /// Seconds of each measurement
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// A folder with tokenizer.json, tokenizer_config.json and a chat template
    #[arg(long, value_name = "FOLDER", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tiny"))]
    model: PathBuf,
    /// Measure this program, as an older build, instead of the one built here
    #[arg(long, value_name = "PROGRAM", default_value = env!("CARGO_BIN_EXE_swallow-router"))]
    router: PathBuf,
    /// This process is told by its input what to do
    #[arg(long, hide = true)]
    peer: bool,
    /// Cargo says this
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a process of the benchmark does.
#[derive(Serialize, Deserialize)]
enum Role {
    Worker(Worker),
    Backend { step: Duration },
    Relay { grpc: SocketAddr, http: SocketAddr },
    Load(Load),
}

/// A worker by its cost model: a step takes so long, whatever is in it, and is one frame.
#[derive(Serialize, Deserialize)]
struct Worker {
    step: Duration,
    /// Its model's text files.
    model: PathBuf,
    vocab_size: u32,
    says: u32,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = if cli.peer { peer() } else { measure(&cli) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("front: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A relay has as many threads as the router; whatever else the benchmark needs makes do with one.
fn peer() -> Outcome<()> {
    let role: Role = told()?;
    let mut runtime = match role {
        Role::Relay { .. } => tokio::runtime::Builder::new_multi_thread(),
        Role::Worker(_) | Role::Backend { .. } | Role::Load(_) => {
            tokio::runtime::Builder::new_current_thread()
        }
    };
    let runtime = runtime.enable_all().build()?;
    match role {
        Role::Worker(worker) => {
            let worker = MockWorker::start(worker.config()?);
            say(&worker.address)?;
            until_alone();
            Ok(())
        }
        Role::Backend { step } => runtime.block_on(relay::backend(step)),
        Role::Relay { grpc, http } => runtime.block_on(relay::relay(grpc, http)),
        Role::Load(load) => say(&runtime.block_on(load::load(load))?),
    }
}

impl Worker {
    fn config(&self) -> Outcome<Config> {
        const ROOM: u32 = 1 << 20; // More than any case asks for.
        let mut files = BTreeMap::new();
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            if let Ok(bytes) = std::fs::read(self.model.join(name)) {
                files.insert(name.to_owned(), bytes);
            }
        }
        Ok(Config {
            served_names: vec![MODEL.to_owned()],
            vocab_size: self.vocab_size,
            files,
            max_running: ROOM,
            n_blocks: ROOM,
            credits: ROOM,
            step_tokens: ROOM as usize,
            says: vec![self.says],
            step: self.step,
            ..Config::default()
        })
    }
}

/// Sizes of the cases.
struct Sizes {
    streams: usize,
    held_grpc: usize,
    held_http: usize,
    at_once: usize,
    per_second: u32,
    seconds: f64,
}

impl Sizes {
    fn of(cli: &Cli) -> Self {
        let full = Self {
            streams: 1000,
            held_grpc: 20_000,
            held_http: 9000,
            at_once: 64,
            per_second: 200,
            seconds: 10.0,
        };
        let mut sizes = match cli.quick {
            false => full,
            true => Self {
                streams: 200,
                held_grpc: 1000,
                held_http: 500,
                seconds: 1.0,
                ..full
            },
        };
        sizes.seconds = cli.seconds.unwrap_or(sizes.seconds);
        sizes
    }
}

fn measure(cli: &Cli) -> Outcome<()> {
    let sizes = Sizes::of(cli);
    let model = Model::load(&cli.model)?;
    let bench = Bench {
        router: cli.router.clone(),
        folder: cli.model.clone(),
        texts: model.conversations(PROMPT_TOKENS as usize),
        vocab_size: model.vocab_size(),
        says: model.word(load::WORD)?,
        seconds: sizes.seconds,
    };
    let wanted = |name: &str| cli.only.as_deref().is_none_or(|only| name.contains(only));
    let mut report = Report::default();
    report.machine();
    if wanted("growth") {
        model.growth(&mut report)?;
    }
    for front in [Front::Grpc, Front::Http] {
        if wanted("request") {
            bench.requests(front, &sizes, &mut report)?;
        }
        if wanted("token") {
            bench.tokens(front, &sizes, &mut report)?;
        }
        if wanted("first") {
            bench.first(front, &sizes, &mut report)?;
        }
        if wanted("held") {
            bench.held(front, &sizes, &mut report)?;
        }
    }
    report.table();
    Ok(())
}

/// What all cases share.
struct Bench {
    router: PathBuf,
    folder: PathBuf,
    texts: Vec<String>,
    vocab_size: u32,
    says: u32,
    seconds: f64,
}

fn name(front: Front) -> &'static str {
    match front {
        Front::Grpc => "gRPC",
        Front::Http => "HTTP",
    }
}

impl Bench {
    /// A load on the router before one worker.
    fn on_router(&self, step: Duration, front: Front, texts: &[String], work: Work) -> Outcome<Measured> {
        let worker = Worker {
            step,
            model: self.folder.clone(),
            vocab_size: self.vocab_size,
            says: self.says,
        };
        let mut worker = Peer::start(&Role::Worker(worker))?;
        let router = Router::start(&self.router, MODEL, worker.says()?)?;
        let address = match front {
            Front::Grpc => router.grpc,
            Front::Http => router.http,
        };
        self.load(router.pid(), address, front, texts, work)
    }

    /// The same on a bare relay, or on the backend itself.
    fn on_relay(
        &self,
        step: Duration,
        front: Front,
        texts: &[String],
        work: Work,
        direct: bool,
    ) -> Outcome<Measured> {
        let mut backend = Peer::start(&Role::Backend { step })?;
        let mut addresses: (SocketAddr, SocketAddr) = backend.says()?;
        let (grpc, http) = addresses;
        let mut relay = None;
        if !direct {
            let relay = relay.insert(Peer::start(&Role::Relay { grpc, http })?);
            addresses = relay.says()?;
        }
        let watched = relay.as_ref().unwrap_or(&backend).pid();
        let address = match front {
            Front::Grpc => addresses.0,
            Front::Http => addresses.1,
        };
        self.load(watched, address, front, texts, work)
    }

    fn load(
        &self,
        watched: u32,
        address: SocketAddr,
        front: Front,
        texts: &[String],
        work: Work,
    ) -> Outcome<Measured> {
        let load = Load {
            watched,
            address,
            front,
            model: MODEL.to_owned(),
            prompt_tokens: match work {
                Work::Streams { .. } => STREAM_PROMPT_TOKENS,
                Work::Requests { .. } | Work::First { .. } => PROMPT_TOKENS,
            },
            texts: texts.to_vec(),
            work,
            seconds: self.seconds,
        };
        Peer::start(&Role::Load(load))?.says()
    }

    fn requests(&self, front: Front, sizes: &Sizes, report: &mut Report) -> Outcome<()> {
        let work = Work::Requests {
            at_once: sizes.at_once,
        };
        let texts: &[(&str, &[String], f64)] = match front {
            Front::Grpc => &[("ids", &[], 25.0)],
            Front::Http => &[("ids", &[], 25.0), ("chat", &self.texts, 60.0)],
        };
        for &(what, texts, aim) in texts {
            let router = self.on_router(Duration::ZERO, front, texts, work)?;
            let relay = self.on_relay(Duration::ZERO, front, texts, work, false)?;
            let case = format!("request, {PROMPT_TOKENS} tokens as {what}, {}", name(front));
            report.cost(&case, aim, &router, &relay);
        }
        Ok(())
    }

    fn tokens(&self, front: Front, sizes: &Sizes, report: &mut Report) -> Outcome<()> {
        let work = Work::Streams {
            streams: sizes.streams,
        };
        let router = self.on_router(STEP, front, &[], work)?;
        let relay = self.on_relay(STEP, front, &[], work, false)?;
        let aim = match front {
            Front::Grpc => 5.5,
            Front::Http => 7.0,
        };
        let case = format!("token, {} streams, {}", sizes.streams, name(front));
        report.cost(&case, aim, &router, &relay);
        Ok(())
    }

    fn first(&self, front: Front, sizes: &Sizes, report: &mut Report) -> Outcome<()> {
        let work = Work::First {
            per_second: sizes.per_second,
        };
        let router = self.on_router(Duration::ZERO, front, &[], work)?;
        let direct = self.on_relay(Duration::ZERO, front, &[], work, true)?;
        let case = |quantile: &str| {
            let rate = sizes.per_second;
            format!("added time to first token, {quantile}, {rate}/s, {}", name(front))
        };
        let added = |router: f64, direct: f64| (router - direct) / 1000.0;
        report.plain(
            &case("p50"),
            added(router.p50_us, direct.p50_us),
            "ms",
            Target(0.2),
        );
        report.plain(
            &case("p99"),
            added(router.p99_us, direct.p99_us),
            "ms",
            Target(1.0),
        );
        Ok(())
    }

    fn held(&self, front: Front, sizes: &Sizes, report: &mut Report) -> Outcome<()> {
        let (streams, aim) = match front {
            Front::Grpc => (sizes.held_grpc, 20.0),
            Front::Http => (report.within_files(sizes.held_http), 32.0),
        };
        let measured = self.on_router(HELD_STEP, front, &[], Work::Streams { streams })?;
        let beyond = measured.bytes_per_stream - 4.0 * measured.tokens_per_stream;
        let case = format!("memory of a held stream, {streams} open, {}", name(front));
        report.plain(&case, beyond / 1000.0, "kB", Target(aim));
        Ok(())
    }
}

/// The file of that name, with a message that says which.
fn read(folder: &Path, name: &str) -> Outcome<Vec<u8>> {
    let path = folder.join(name);
    std::fs::read(&path).map_err(|error| format!("--model: {}: {error}", path.display()).into())
}
