//! Processes of a measurement: this program again in another role, and the router itself. What the operating system
//! says about them is the measurement; none outlives the one that started it.

use std::{
    error::Error,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};

/// Whatever goes wrong ends the benchmark with a message.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// CPU time that `/proc` counts in: USER_HZ, 100 on every platform that has it.
const TICKS_PER_SECOND: u64 = 100;
/// How long the router may take until its replica is there.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// CPU time that a process took so far, in user and in kernel mode.
pub fn cpu(pid: u32) -> Outcome<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may have spaces; the fields after it are numbers, utime and stime the 14th and 15th.
    let fields = stat
        .rsplit_once(')')
        .ok_or("/proc/PID/stat has a name in parentheses")?
        .1;
    let times: Vec<u64> = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    Ok(Duration::from_millis(
        times.iter().sum::<u64>() * 1000 / TICKS_PER_SECOND,
    ))
}

/// Bytes of memory that a process has in use.
pub fn resident_bytes(pid: u32) -> Outcome<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next())
        .ok_or("/proc/PID/status has VmRSS")?
        .parse()?;
    Ok(kib << 10)
}

/// This program in another role: told by a line of JSON, it says lines of JSON, and ends when its input does.
pub struct Peer {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts it.
    pub fn start(role: &impl Serialize) -> Outcome<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--peer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        // Its input stays open: the end of it tells the peer that nobody needs it any more.
        let input = child.stdin.as_mut().ok_or("its input is piped")?;
        writeln!(input, "{}", serde_json::to_string(role)?)?;
        let lines = BufReader::new(child.stdout.take().ok_or("its output is piped")?);
        Ok(Self { child, lines })
    }

    /// What it says next.
    pub fn says<T: DeserializeOwned>(&mut self) -> Outcome<T> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        if line.is_empty() {
            return Err("a process of the benchmark ended before it had answered".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// What a peer is to do.
pub fn told<T: DeserializeOwned>() -> Outcome<T> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Says a line, as a peer.
pub fn say(what: &impl Serialize) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(what)?)?;
    Ok(out.flush()?)
}

/// Waits, as a peer, for whoever started it to end.
pub fn until_alone() {
    let mut rest = Vec::new();
    // An error means the same as the end.
    let _ = std::io::stdin().read_to_end(&mut rest);
}

/// The real program, with one replica that it has found ready.
pub struct Router {
    child: Child,
    /// Where gRPC clients connect.
    pub grpc: SocketAddr,
    /// Where HTTP clients connect.
    pub http: SocketAddr,
}

impl Router {
    /// Starts it and waits for its replica.
    pub fn start(program: &Path, model: &str, worker: SocketAddr) -> Outcome<Self> {
        let mut child = Command::new(program)
            .args([
                "--grpc-listen=127.0.0.1:0",
                "--http-listen=127.0.0.1:0",
                "--log-format=json",
            ])
            .arg(format!("--replica={model}={worker}"))
            .env_remove("RUST_LOG")
            .stderr(Stdio::piped())
            .spawn()?;
        let mut log = BufReader::new(child.stderr.take().ok_or("its log is piped")?);
        let addresses = (listening(&mut log, "grpc"), listening(&mut log, "http"));
        // It writes on; nobody reads.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let (grpc, http) = match addresses {
            (Ok(grpc), Ok(http)) => (grpc, http),
            (Err(error), _) | (_, Err(error)) => {
                end(&mut child);
                return Err(error);
            }
        };
        let router = Self { child, grpc, http };
        router.wait(model)?;
        Ok(router)
    }

    fn wait(&self, model: &str) -> Outcome<()> {
        let (began, ready) = (Instant::now(), format!("\"{model}\":1"));
        while !get(self.http, "/readyz")?.contains(&ready) {
            if began.elapsed() > READY_LIMIT {
                return Err("the router did not find its replica".into());
            }
            std::thread::sleep(Duration::from_millis(20)); // Between two looks.
        }
        Ok(())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn end(child: &mut Child) {
    // Gone already is as good.
    let _ = child.kill();
    let _ = child.wait();
}

/// The address in the log's next line about a listening `protocol`.
fn listening(log: &mut impl BufRead, protocol: &str) -> Outcome<SocketAddr> {
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(&line?)?;
        if line["message"] == "listening" && line["protocol"] == protocol {
            return Ok(line["address"].as_str().ok_or("an address in the log")?.parse()?);
        }
    }
    Err("the router ended before it listened".into())
}

fn get(address: SocketAddr, path: &str) -> Outcome<String> {
    let mut stream = TcpStream::connect(address)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
