//! One replica's session, from its first connection to its goodbye.
//!
//! One task a replica: it connects, says Hello, checks that the worker serves what discovery said, fetches the model's
//! files while frames already flow, then hears until the session ends, and begins again after a pause. A worker that
//! is alive but whose engine is not is found by pings that the engine itself answers.

mod hear;
mod link;
mod outbox;
mod wire;

use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use swallow_policy::{ModelId, ReplicaId};
use swallow_rpc::worker::v1::{
    Goodbye, Hello, Ping, SessionResponse, Welcome, session_request, session_response::Frame,
    worker_service_client::WorkerServiceClient,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};
use tracing::{debug, info, warn};

pub(crate) use hear::Heard;
pub(crate) use link::Link;

use crate::{
    dispatch::Shared,
    pauses::Pauses,
    tls::workers::{Complaint, WorkerTls},
};

/// The version of the protocol that is spoken here.
const PROTOCOL: u32 = 1;
/// A connection, and then a Welcome, takes this long or is given up.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// HTTP/2 pings find a peer that is gone without a word: within ten seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A snapshot of a million cache keys has 8 MB, the scores of a long prompt more.
const FRAME_BYTES_MAX: usize = 64 << 20;
/// Receive windows: several steps of a full batch with scores, so that one slow wake-up stalls no worker.
const WINDOW_BYTES: u32 = 4 << 20;
/// How long the worker has to close its end after our Goodbye.
const GOODBYE_LIMIT: Duration = Duration::from_millis(500);
/// However short its steps: a scheduler that stood still for a moment is not a wedged device.
const SILENCE_MIN: Duration = Duration::from_secs(2);
/// An engine answers between two steps. A step may take longer than the measured rate says, as at the end of a long
/// context.
const SILENCE_STEPS: u32 = 8;
/// A worker that serves something else is asked again after this time: it may be replaced.
const UNUSABLE_PAUSE: Duration = Duration::from_secs(5);
/// A session that lived this long starts the pauses over.
const STABLE: Duration = Duration::from_secs(10);

/// What HTTP/2 says of a peer that answers in TLS.
const NOT_HTTP2: &str = "frame with invalid size";

/// A replica to have a session with.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub replica: ReplicaId,
    pub replica_name: Arc<str>,
    pub model: ModelId,
    pub model_name: Arc<str>,
    pub served_names: Vec<String>,
    pub address: String,
    /// Streams may finish, then the session ends for good.
    pub leave: CancellationToken,
    /// The session ends now.
    pub cut: CancellationToken,
}

/// Why a session is over.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// Nobody answers, or not yet.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// It answers, but cannot be used.
    #[error("not usable: {0}")]
    Unusable(String),
    /// The stream broke.
    #[error("the session broke: {0}")]
    Broke(String),
    /// The engine does not answer.
    #[error("its engine has not answered for {} ms", .0.as_millis())]
    Wedged(Duration),
    /// We ended it.
    #[error("{0}")]
    Left(&'static str),
}

impl Lost {
    /// It says something about the replica's health.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Broke(_) | Self::Wedged(_))
    }

    /// The same process must not get the same request again.
    pub fn excludes(&self) -> bool {
        matches!(self, Self::Wedged(_))
    }
}

/// A replica's task.
pub(crate) async fn run(shared: Arc<Shared>, target: Target) {
    let mut pauses = Pauses::new(shared.config.reconnect);
    let mut said_last = None;
    loop {
        let began = Instant::now();
        let lost = session(&shared, &target).await;
        shared.tried(&target);
        if target.leave.is_cancelled() || target.cut.is_cancelled() {
            break;
        }
        // A worker that loads its model is unreachable for minutes: once is enough to read.
        let kind = std::mem::discriminant(&lost);
        let (model, replica) = (&*target.model_name, &*target.replica_name);
        if matches!(lost, Lost::Left(_)) || said_last == Some(kind) {
            debug!(model, replica, cause = %lost, "no session");
        } else {
            warn!(model, replica, cause = %lost, "no session");
        }
        said_last = Some(kind);
        if began.elapsed() > STABLE {
            pauses.reset();
        }
        let pause = if matches!(lost, Lost::Unusable(_)) {
            UNUSABLE_PAUSE
        } else {
            pauses.next()
        };
        tokio::select! {
            () = target.leave.cancelled() => break,
            () = target.cut.cancelled() => break,
            () = tokio::time::sleep(pause) => {}
        }
    }
    shared.gone(&target);
}

/// One session, from the connection to the reason of its end.
async fn session(shared: &Arc<Shared>, target: &Target) -> Lost {
    let link = Link::new(
        (target.replica, Arc::clone(&target.replica_name)),
        (target.model, Arc::clone(&target.model_name)),
    );
    let complaint = Complaint::default();
    let tls = shared.config.worker_tls.as_ref();
    let connecting = async {
        let channel = connect(&target.address, tls, &complaint).await?;
        greet(shared, target, &link, channel).await
    };
    let connected = tokio::select! {
        () = target.leave.cancelled() => return Lost::Left("discovery dropped it"),
        () = target.cut.cancelled() => return Lost::Left("the router shut down"),
        connected = connecting => connected,
    };
    let (client, inbound, welcome) = match connected {
        Ok(connected) => connected,
        Err(lost) => return explained(lost, tls, &complaint),
    };
    shared.welcomed(&link, &welcome);
    let mut session = Session {
        shared,
        target,
        link: &link,
        engine: Pings::default(),
        max_step_tokens: welcome.capacity.map_or(0, |capacity| capacity.max_step_tokens),
        silence_max: shared.config.pong_limit,
        kv_seq: 0,
        going: false,
    };
    let lost = match session.hear(client, inbound, &welcome).await {
        Ok(reason) => Lost::Left(reason),
        Err(lost) => lost,
    };
    shared.lost(&link, &lost);
    lost
}

async fn connect(address: &str, tls: Option<&WorkerTls>, complaint: &Complaint) -> Result<Channel, Lost> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| Lost::Unreachable(format!("'{address}' is not an address: {error}")))?
        .connect_timeout(HANDSHAKE_LIMIT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES);
    let connected = match tls {
        None => endpoint.connect().await,
        Some(tls) => {
            endpoint
                .connect_with_connector(tls.connector(address, complaint.clone()))
                .await
        }
    };
    connected.map_err(|error| Lost::Unreachable(innermost(&error)))
}

/// Why there is no session, as it has to do with TLS: the layers above tell only that something is not HTTP/2.
fn explained(lost: Lost, tls: Option<&WorkerTls>, complaint: &Complaint) -> Lost {
    if let Some(words) = complaint.words() {
        return Lost::Unreachable(words.to_owned());
    }
    let words = lost.to_string();
    if tls.is_none() && words.contains(NOT_HTTP2) {
        return Lost::Unreachable(format!(
            "{words}: does the worker speak TLS? Then start this router with --worker-ca, --worker-cert and --worker-key"
        ));
    }
    lost
}

/// The cause that says something: the outer ones are "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .last()
        .unwrap_or(error)
        .to_string()
}

type Connected = (WorkerServiceClient<Channel>, Streaming<SessionResponse>, Welcome);

/// Hello and Welcome.
async fn greet(
    shared: &Shared,
    target: &Target,
    link: &Arc<Link>,
    channel: Channel,
) -> Result<Connected, Lost> {
    let mut client = WorkerServiceClient::new(channel).max_decoding_message_size(FRAME_BYTES_MAX);
    let router_id = shared.config.router_id.clone();
    link.control(session_request::Frame::Hello(Hello {
        protocol: PROTOCOL,
        router_id,
        kv_events: true,
    }));
    let broke = |status: tonic::Status| match status.code() {
        tonic::Code::Unavailable => Lost::Unreachable(said(&status)),
        tonic::Code::FailedPrecondition | tonic::Code::Unimplemented => Lost::Unusable(said(&status)),
        _ => Lost::Broke(said(&status)),
    };
    let greeting = async {
        let mut inbound = client
            .session(link::Frames(Arc::clone(link)))
            .await
            .map_err(broke)?
            .into_inner();
        let first = inbound.message().await.map_err(broke)?;
        match first.and_then(|response| response.frame) {
            Some(Frame::Welcome(welcome)) => Ok((inbound, welcome)),
            _ => Err(Lost::Unusable("its first frame is not a Welcome".into())),
        }
    };
    let (inbound, welcome) = tokio::time::timeout(HANDSHAKE_LIMIT, greeting)
        .await
        .map_err(|_| Lost::Unreachable(format!("no Welcome within {} s", HANDSHAKE_LIMIT.as_secs())))??;
    check(&welcome, &target.served_names).map_err(Lost::Unusable)?;
    link.boot.get_or_init(|| welcome.boot_id.clone());
    link.windows.store(welcome.windows, Ordering::Relaxed);
    Ok((client, inbound, welcome))
}

/// Whether a worker is what discovery said, and makes sense.
fn check(welcome: &Welcome, expected: &[String]) -> Result<(), String> {
    if welcome.protocol != PROTOCOL {
        return Err(format!(
            "it speaks protocol {}, this router {PROTOCOL}",
            welcome.protocol
        ));
    }
    let model = welcome.model.as_ref().ok_or("its Welcome names no model")?;
    // While a change of names rolls out, replicas of before and after serve the same model under different ones.
    if !model.served_names.iter().any(|name| expected.contains(name)) {
        let (serves, said) = (model.served_names.join(","), expected.join(","));
        return Err(format!(
            "it serves '{serves}' but discovery says '{said}'; start it with one of these names, or correct the \
             router's --replica or --discover"
        ));
    }
    let capacity = welcome.capacity.as_ref().ok_or("its Welcome names no capacity")?;
    let sizes = [
        capacity.block_tokens,
        capacity.n_blocks,
        capacity.max_running,
        model.vocab_size,
        model.max_model_len,
    ];
    if sizes.contains(&0) {
        return Err(format!(
            "its Welcome has a size of 0: {capacity:?}, vocab_size {}",
            model.vocab_size
        ));
    }
    Ok(())
}

fn said(status: &tonic::Status) -> String {
    let text = match status.message() {
        "" => "no message",
        text => text,
    };
    let said = format!("{:?}: {text}", status.code());
    // One that was made on this side, of what the connection came to.
    match std::error::Error::source(status) {
        Some(source) => format!("{said}: {}", innermost(source)),
        None => said,
    }
}

/// The ping on its way, and the next one's number.
#[derive(Default)]
struct Pings {
    sent: Option<(u64, Instant)>,
    nonce: u64,
}

struct Session<'a> {
    shared: &'a Arc<Shared>,
    target: &'a Target,
    link: &'a Arc<Link>,
    engine: Pings,
    max_step_tokens: u32,
    /// How long its engine may be silent, by how long its steps take.
    silence_max: Duration,
    kv_seq: u64,
    /// Nobody new; the session ends with its last stream.
    going: bool,
}

impl Session<'_> {
    /// Hears frames until the end. `Ok`: we said goodbye.
    async fn hear(
        &mut self,
        mut client: WorkerServiceClient<Channel>,
        mut inbound: Streaming<SessionResponse>,
        welcome: &Welcome,
    ) -> Result<&'static str, Lost> {
        if let Some(capacity) = &welcome.capacity {
            self.expect_steps(capacity.prefill_tokens_per_second);
        }
        let files = welcome.model.as_ref().map_or(&[][..], |model| &model.files);
        let mut fetch = pin!(self.shared.files.files(&mut client, files));
        let mut fetched = false;
        let mut ping = tokio::time::interval(self.shared.config.ping_every);
        ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (leave, cut) = (self.target.leave.clone(), self.target.cut.clone());
        let mut leaving = false;
        loop {
            tokio::select! {
                message = inbound.message() => match message {
                    Ok(Some(SessionResponse { frame: Some(frame) })) => self.frame(frame)?,
                    Ok(Some(SessionResponse { frame: None })) => debug!("a frame of a later version was skipped"),
                    Ok(None) => return Err(Lost::Broke("the worker ended the session".into())),
                    Err(status) => return Err(Lost::Broke(said(&status))),
                },
                files = &mut fetch, if !fetched => {
                    fetched = true;
                    let files = files.map_err(|error| Lost::Unusable(error.to_string()))?;
                    self.shared.files_here(self.link, welcome, files);
                }
                _ = ping.tick() => {
                    self.ping()?;
                    let heard = self.link.cut_slow(self.shared.config.slow_client_limit);
                    if heard.slow > 0 {
                        self.shared.heard(self.link, heard);
                    }
                }
                () = leave.cancelled(), if !leaving => {
                    (leaving, self.going) = (true, true);
                    self.shared.draining(self.link);
                }
                () = cut.cancelled() => return self.goodbye(&mut inbound, "the router shut down").await,
            }
            if self.going && self.link.live() == 0 {
                return self.goodbye(&mut inbound, "its last stream ended").await;
            }
        }
    }

    fn frame(&mut self, frame: Frame) -> Result<(), Lost> {
        match frame {
            Frame::Step(step) => {
                let heard = self
                    .link
                    .hear(step)
                    .map_err(|broken| Lost::Broke(broken.to_string()))?;
                self.shared.heard(self.link, heard);
            }
            Frame::Credit(credit) => self.shared.credit(self.link, credit.add_submits),
            Frame::Load(report) => {
                self.expect_steps(report.prefill_tokens_per_second);
                self.shared.load(self.link, &report);
            }
            Frame::Kv(events) => {
                let missed = events.seq != self.kv_seq + 1 && !events.snapshot;
                self.kv_seq = events.seq;
                self.shared.cache(self.link, &events, missed);
            }
            Frame::Pong(pong) => {
                self.engine.sent.take_if(|(nonce, _)| *nonce == pong.nonce);
            }
            Frame::GoAway(go) => {
                info!(
                    replica = &*self.target.replica_name,
                    reason = go.reason,
                    "replica goes away"
                );
                self.going = true;
                self.shared.draining(self.link);
            }
            Frame::Welcome(_) => return Err(Lost::Broke("the worker said Welcome twice".into())),
        }
        Ok(())
    }

    /// It computes so many prompt tokens a second; 0: it does not know yet.
    fn expect_steps(&mut self, prefill_tokens_per_second: u32) {
        if prefill_tokens_per_second > 0 {
            let step = f64::from(self.max_step_tokens) / f64::from(prefill_tokens_per_second);
            let steps = Duration::from_secs_f64(step) * SILENCE_STEPS;
            self.silence_max = steps.max(SILENCE_MIN).min(self.shared.config.pong_limit);
        }
    }

    /// Asks the engine for a sign of life; one question at a time, so that the answer's age is its silence.
    fn ping(&mut self) -> Result<(), Lost> {
        if let Some((_, since)) = self.engine.sent {
            let silent = since.elapsed();
            return if silent >= self.silence_max {
                Err(Lost::Wedged(silent))
            } else {
                Ok(())
            };
        }
        self.engine.nonce += 1;
        self.engine.sent = Some((self.engine.nonce, Instant::now()));
        self.link.control(session_request::Frame::Ping(Ping {
            nonce: self.engine.nonce,
        }));
        Ok(())
    }

    /// Says goodbye and waits for the worker to close its end, a moment.
    async fn goodbye(
        &self,
        inbound: &mut Streaming<SessionResponse>,
        reason: &'static str,
    ) -> Result<&'static str, Lost> {
        self.link.control(session_request::Frame::Goodbye(Goodbye {
            reason: reason.into(),
        }));
        // What still runs is told so before its worker is left alone.
        self.shared.lost(self.link, &Lost::Left(reason));
        let ended = async { while let Ok(Some(_)) = inbound.message().await {} };
        if tokio::time::timeout(GOODBYE_LIMIT, ended).await.is_err() {
            debug!(
                replica = &*self.target.replica_name,
                "the worker did not close its end"
            );
        }
        Ok(reason)
    }
}
