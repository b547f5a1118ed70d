//! The gRPC side of the session: reads a router's frames, checks them at the door, hands them to the loop.
//!
//! What the loop says comes back through the outbox, which is the response stream; nothing is answered here once the
//! session is open. The stream's order is the loop's order.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, stream};
use swallow_rpc::worker::v1::{
    GetModelFileRequest, GetModelFileResponse, Hello, SessionRequest, SessionResponse, Submit, cancel,
    session_request::Frame, worker_service_server::WorkerService,
};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Facts, PROTOCOL,
    compiler::{Compiler, Entry, Waiting},
    outbox::outbox,
};
use crate::{
    engine::{Command, Door, SessionId, Submission},
    state::{Phase, State},
};

/// A router that connects says Hello at once.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// A chunk of a model file.
const FILE_CHUNK: usize = 256 * 1024;

/// What exists once the model is loaded.
pub(super) struct Open {
    pub(super) inbox: mpsc::Sender<Command>,
    pub(super) door: Arc<Door>,
    pub(super) compiler: Arc<Compiler>,
    pub(super) facts: Arc<Facts>,
}

/// Serves `WorkerService`.
pub(super) struct Sessions {
    pub(super) state: Arc<State>,
    pub(super) open: Arc<OnceLock<Open>>,
    /// Bytes that one session may have unread.
    pub(super) outbox_bytes: usize,
    /// Every session's task and stream.
    pub(super) tasks: TaskTracker,
    pub(super) last_id: AtomicU64,
}

impl Sessions {
    /// The open door, while this replica lets anybody in.
    fn door(&self) -> Result<&Open, Status> {
        match (self.state.phase(), self.open.get()) {
            (Phase::Serving, Some(open)) => Ok(open),
            (Phase::Draining, _) => Err(Status::unavailable("the replica is draining; use another one")),
            (Phase::Failed, _) => Err(Status::unavailable("the replica failed; use another one")),
            (Phase::Loading | Phase::Warming | Phase::Serving, _) => {
                let progress = self.state.progress();
                let (done, total) = (progress.bytes_done, progress.bytes_total);
                Err(Status::unavailable(format!(
                    "the model is loading: {done} of {total} bytes; try again soon"
                )))
            }
        }
    }
}

type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for Sessions {
    type SessionStream = BoxStream<SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let open = self.door()?;
        let peer = request.remote_addr();
        let mut frames = request.into_inner();
        let hello = tokio::time::timeout(HELLO_WITHIN, hello(&mut frames))
            .await
            .map_err(|_| Status::deadline_exceeded("no Hello within 10 s; send it as the first frame"))??;
        tracing::debug!(router = hello.router_id, ?peer, "hello");
        let id = SessionId(self.last_id.fetch_add(1, Ordering::Relaxed));
        let (outbox, stream) = outbox(self.outbox_bytes, self.tasks.token());
        let reader = Reader {
            id,
            inbox: open.inbox.clone(),
            door: Arc::clone(&open.door),
            compiler: Arc::clone(&open.compiler),
            waiting: Waiting::default(),
            tasks: self.tasks.clone(),
            gone: outbox.gone(),
        };
        let first = Command::Open {
            session: id,
            router_id: hello.router_id,
            kv_events: hello.kv_events,
            outbox,
        };
        open.inbox
            .send(first)
            .await
            .map_err(|_| Status::unavailable("the replica ended"))?;
        self.tasks.spawn(reader.run(frames));
        Ok(Response::new(Box::pin(stream)))
    }

    type GetModelFileStream = BoxStream<GetModelFileResponse>;

    async fn get_model_file(
        &self,
        request: Request<GetModelFileRequest>,
    ) -> Result<Response<Self::GetModelFileStream>, Status> {
        let open = self.door()?;
        let digest = request.into_inner().digest;
        let Some(file) = open.facts.files.iter().find(|file| file.digest == digest) else {
            return Err(Status::not_found(format!(
                "no file has the digest '{digest}'; Welcome lists those there are"
            )));
        };
        let whole = file.bytes.clone(); // Shared, not copied.
        let chunks = (0..whole.len()).step_by(FILE_CHUNK).map(move |at| {
            let chunk = whole.slice(at..whole.len().min(at + FILE_CHUNK));
            Ok(GetModelFileResponse { chunk })
        });
        Ok(Response::new(stream::iter(chunks).boxed()))
    }
}

async fn hello(frames: &mut Streaming<SessionRequest>) -> Result<Hello, Status> {
    match frames.message().await?.and_then(|request| request.frame) {
        Some(Frame::Hello(hello)) if hello.protocol == PROTOCOL => Ok(hello),
        Some(Frame::Hello(hello)) => Err(Status::failed_precondition(format!(
            "the router speaks session protocol {}, this worker {PROTOCOL}; run the same release of both",
            hello.protocol
        ))),
        _ => Err(Status::invalid_argument("the first frame must be Hello")),
    }
}

/// Reads one session until either side ends it.
struct Reader {
    id: SessionId,
    inbox: mpsc::Sender<Command>,
    door: Arc<Door>,
    compiler: Arc<Compiler>,
    waiting: Waiting,
    tasks: TaskTracker,
    gone: CancellationToken,
}

impl Reader {
    async fn run(self, mut frames: Streaming<SessionRequest>) {
        let how = loop {
            let request = tokio::select! {
                () = self.gone.cancelled() => break Ok(()),
                request = frames.message() => request,
            };
            let command = match request {
                Ok(Some(request)) => match self.command(request) {
                    Ok(command) => command,
                    Err(how) => break how,
                },
                Ok(None) => break Ok(()),
                Err(status) => break Err(status),
            };
            // A full inbox holds this router back until the loop has caught up.
            if self.inbox.send(command).await.is_err() {
                return;
            }
        };
        // The loop may have ended before; then there is nothing left to close.
        let _ = self
            .inbox
            .send(Command::Close {
                session: self.id,
                how,
            })
            .await;
    }

    /// What a frame asks for; `Err` ends the session, `Err(Ok(()))` in peace.
    fn command(&self, request: SessionRequest) -> Result<Command, Result<(), Status>> {
        let session = self.id;
        match request.frame {
            Some(Frame::Submit(submit)) => Ok(self.submit(submit)),
            Some(Frame::Cancel(cancel)) => {
                let reason = cancel::Reason::try_from(cancel.reason).unwrap_or_default();
                tracing::debug!(handles = ?cancel.handles, reason = reason.as_str_name(), "cancel");
                Ok(Command::Cancel {
                    session,
                    handles: self.waiting.cancel(cancel.handles),
                })
            }
            Some(Frame::Window(window)) if window.handle.len() != window.output_tokens.len() => Err(Err(
                Status::invalid_argument("a Window has one number of output_tokens for each handle"),
            )),
            Some(Frame::Window(window)) => Ok(Command::Window {
                session,
                openings: window.handle.into_iter().zip(window.output_tokens).collect(),
            }),
            Some(Frame::Ping(ping)) => Ok(Command::Ping {
                session,
                nonce: ping.nonce,
            }),
            Some(Frame::Goodbye(goodbye)) => {
                tracing::debug!(reason = goodbye.reason, "goodbye");
                Err(Ok(()))
            }
            Some(Frame::Hello(_)) => Err(Err(Status::invalid_argument(
                "a second Hello; open a new session",
            ))),
            None => Err(Err(Status::invalid_argument(
                "a frame that this worker does not know; run the same release",
            ))),
        }
    }

    fn submit(&self, submit: Submit) -> Command {
        let arrived = Instant::now();
        let mut submissions: Vec<Submission> = Vec::with_capacity(submit.requests.len());
        for request in submit.requests {
            match self.door.enter(request, rand::random()) {
                (
                    Submission {
                        handle,
                        order: Ok(order),
                    },
                    Some(source),
                ) => {
                    let entry = Entry {
                        session: self.id,
                        handle,
                        order,
                        source,
                        arrived,
                    };
                    let enter = entry.enter(
                        Arc::clone(&self.compiler),
                        self.inbox.clone(),
                        self.waiting.clone(),
                    );
                    self.tasks.spawn(enter);
                }
                (submission, _) => submissions.push(submission),
            }
        }
        Command::Submit {
            session: self.id,
            submissions,
            arrived,
        }
    }
}
