//! One group as a process: fetched for if need be, started, watched, stopped. The counterpart of a pod.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::{Duration, Instant},
};

use serde_json::Value;
use swallow_plan::{
    Failure, MeasuredMemory, Phase, Progress, SeenGroup, Timestamp,
    launch::{GroupLaunch, ModelSource},
    model::GroupReason,
};
use swallow_proto::launch::{LogFormat, WorkerArgs};

use super::{
    gpus,
    prepare::Slot,
    process::{Launch, Process, in_words, last_line},
    secrets::GroupSecrets,
};
use crate::worker::{Told, why_ended};

/// What a process may take to end after its streams had their time.
const GRACE_MARGIN: Duration = Duration::from_secs(15);

/// Where programs and files are.
#[derive(Debug)]
pub struct Places {
    /// The worker's program.
    pub worker: PathBuf,
    /// Where fetched models are kept.
    pub cache: PathBuf,
    /// Where logs go.
    pub logs: PathBuf,
}

/// Where a group is put.
#[derive(Debug)]
pub struct Place<'a> {
    /// Which of the model's slots.
    pub at: usize,
    /// That slot.
    pub slot: &'a mut Slot,
    /// What it reads of Secrets.
    pub secrets: &'a GroupSecrets,
}

/// A group of this machine.
#[derive(Debug)]
pub struct Group {
    /// What it was started from.
    pub launch: GroupLaunch,
    /// Tells it from others of its name.
    pub uid: String,
    /// Its place among the model's slots.
    pub slot: usize,
    args: WorkerArgs,
    /// The GPUs that its process sees; `None` on the CPU.
    gpus: Option<String>,
    /// The access token for its files.
    token: Option<PathBuf>,
    stage: Stage,
    phase: Phase,
    progress_at: Timestamp,
    requests: u32,
    memory: Option<MeasuredMemory>,
    /// Its process ended by itself, with an exit code, before it served.
    refused: bool,
    /// It was told to stop, and has to be gone by then.
    leaving: Option<Instant>,
    log: PathBuf,
    fetched: PathBuf,
    termination: PathBuf,
}

#[derive(Debug)]
enum Stage {
    // Fetching => (Serving | Ended)
    Fetching(Process),
    // Serving => Ended
    Serving(Process),
    Ended,
}

impl Group {
    /// Starts a group at a slot, whose ports it lets go of.
    pub fn start(
        launch: GroupLaunch,
        uid: String,
        place: Place<'_>,
        places: &Places,
        now: Timestamp,
    ) -> Self {
        let Place { at, slot, secrets } = place;
        let of_tls = |name: &str| secrets.tls.as_ref().map(|folder| folder.join(name));
        let file = |ending: &str| places.logs.join(format!("{}.{ending}", launch.name));
        let (log, termination, fetched) = (file("log"), file("termination"), file("fetch"));
        // A group of the same name may have been here before.
        let _ = fs::remove_file(&termination);
        let args = WorkerArgs {
            model: model_folder(&launch.template.source, places),
            grpc_listen: slot.grpc.address(),
            http_listen: slot.http.address(),
            tls_cert: of_tls("tls.crt"),
            tls_key: of_tls("tls.key"),
            tls_client_ca: of_tls("ca.crt"),
            termination_log: Some(termination.clone()),
            log_format: LogFormat::Text,
            ..launch.args()
        };
        let mut group = Self {
            launch,
            uid,
            slot: at,
            args,
            gpus: slot.gpus.clone(),
            token: secrets.token.clone(),
            stage: Stage::Ended,
            phase: Phase::Pending {
                reason: GroupReason::Starting,
                message: String::new(),
                since: now,
            },
            progress_at: now,
            requests: 0,
            memory: None,
            refused: false,
            leaving: None,
            log,
            fetched,
            termination,
        };
        slot.grpc.release();
        slot.http.release();
        let started = match &group.launch.template.source {
            ModelSource::Fetch { .. } => {
                group.phase = Phase::Fetching(Progress::default());
                group.fetch(places).map(Stage::Fetching)
            }
            ModelSource::Made { .. } | ModelSource::HostPath { .. } | ModelSource::Claim { .. } => {
                group.serve(places).map(Stage::Serving)
            }
        };
        group.enter(started, places, now);
        group
    }

    /// As the plan sees it.
    pub fn seen(&self) -> SeenGroup {
        SeenGroup {
            name: self.launch.name.clone(),
            uid: self.uid.clone(),
            revision: self.launch.revision.clone(),
            index: self.launch.index,
            phase: self.phase.clone(),
            leaving: self.leaving.is_some(),
            node_lost: false,
            progress_at: self.progress_at,
            crashes: self.launch.crashes.clone(),
            retry: self.launch.retry.clone(),
            requests: self.requests,
            memory: self.memory,
        }
    }

    /// Whether it has a process that answers questions.
    pub fn answers(&self) -> bool {
        matches!(self.stage, Stage::Serving(_))
    }

    /// Whether it is on its way to serving or away from it.
    pub fn is_moving(&self) -> bool {
        self.leaving.is_some() || self.seen().is_starting()
    }

    /// What it said when it ended by itself before it served: whoever starts it here now wants to read that, not wait.
    pub fn refusal(&self) -> Option<&str> {
        match &self.phase {
            Phase::Failed(failure) if self.refused => Some(&failure.message),
            _ => None,
        }
    }

    /// The file with what its process said.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Looks at its process. Says whether the group is gone.
    pub fn advance(&mut self, places: &Places, now: Timestamp) -> bool {
        if self.leaving.is_some_and(|until| Instant::now() >= until) {
            self.kill();
        }
        match &mut self.stage {
            Stage::Ended => {}
            Stage::Fetching(process) => match process.ended() {
                None => self.read_fetch_progress(now),
                Some(status) => self.fetch_ended(status, places, now),
            },
            Stage::Serving(process) => {
                if let Some(status) = process.ended() {
                    self.stage = Stage::Ended;
                    if self.leaving.is_none() {
                        self.refused = status.code().is_some() && self.phase != Phase::Serving;
                        self.fail(self.why(status), now);
                    }
                }
            }
        }
        self.leaving.is_some() && matches!(self.stage, Stage::Ended)
    }

    /// Takes what the worker says of itself.
    pub fn learn(&mut self, state: &Value, now: Timestamp) {
        if !self.answers() || matches!(self.phase, Phase::Failed(_)) {
            return;
        }
        let told = Told::read(state);
        self.requests = told.requests;
        self.memory = told.memory;
        // Without a phase it ends soon, and how is told by its end.
        let Some(phase) = told.phase else { return };
        self.go_to(phase, now);
    }

    /// Lets open streams finish, then ends it.
    pub fn drain(&mut self) {
        let patience = Duration::from_secs(self.args.drain_timeout_seconds.into()) + GRACE_MARGIN;
        self.leaving.get_or_insert_with(|| Instant::now() + patience);
        match &mut self.stage {
            Stage::Serving(process) => process.terminate(),
            Stage::Fetching(process) => process.kill(),
            Stage::Ended => {}
        }
    }

    /// Ends it now; it is gone.
    pub fn delete(&mut self) {
        self.leaving = Some(Instant::now());
        self.kill();
    }

    /// Ends its process and keeps its record.
    pub fn fail_with(&mut self, reason: GroupReason, message: String, now: Timestamp) {
        self.kill();
        self.stage = Stage::Ended;
        self.fail((reason, message), now);
    }

    fn kill(&mut self) {
        match &mut self.stage {
            Stage::Serving(process) | Stage::Fetching(process) => process.kill(),
            Stage::Ended => {}
        }
    }

    fn fetch(&self, places: &Places) -> io::Result<Process> {
        let ModelSource::Fetch { fetch, .. } = &self.launch.template.source else {
            return Err(io::Error::other("the source is no repository"));
        };
        let argv = fetch.args(&self.args.model, self.token.clone()).argv();
        let output = Some(self.fetched.as_path());
        Process::start(&Launch {
            program: &places.worker,
            argv,
            log: &self.log,
            output,
            env: None,
        })
    }

    fn serve(&self, places: &Places) -> io::Result<Process> {
        let argv = self.args.argv();
        Process::start(&Launch {
            program: &places.worker,
            argv,
            log: &self.log,
            output: None,
            env: self.gpus.as_deref().map(|gpus| (gpus::VARIABLE, gpus)),
        })
    }

    fn enter(&mut self, started: io::Result<Stage>, places: &Places, now: Timestamp) {
        match started {
            Ok(stage) => self.stage = stage,
            Err(error) => {
                self.stage = Stage::Ended;
                self.refused = true;
                let message = format!("{} did not start: {error}", places.worker.display());
                self.fail((GroupReason::Crashed, message), now);
            }
        }
    }

    fn fetch_ended(&mut self, status: ExitStatus, places: &Places, now: Timestamp) {
        if self.leaving.is_some() {
            self.stage = Stage::Ended;
        } else if status.success() {
            let phase = Phase::Pending {
                reason: GroupReason::Starting,
                message: String::new(),
                since: now,
            };
            self.go_to(phase, now);
            let started = self.serve(places).map(Stage::Serving);
            self.enter(started, places, now);
        } else {
            self.stage = Stage::Ended;
            self.refused = status.code().is_some();
            let message = last_line(&self.log).unwrap_or_else(|| in_words(status));
            self.fail((GroupReason::FetchFailed, message), now);
        }
    }

    fn read_fetch_progress(&mut self, now: Timestamp) {
        let line = last_line(&self.fetched).and_then(|line| serde_json::from_str::<Value>(&line).ok());
        let Some(event) = line else { return };
        let count = |name: &str| event[name].as_u64();
        if let (Some(bytes_done), Some(bytes_total)) = (count("bytes_done"), count("bytes_total")) {
            let eta_seconds = event["eta_seconds"].as_f64().map(|eta| eta.ceil() as u64);
            self.go_to(
                Phase::Fetching(Progress {
                    bytes_done,
                    bytes_total,
                    eta_seconds,
                }),
                now,
            );
        }
    }

    /// How it ended: in its own last words if it left any.
    fn why(&self, status: ExitStatus) -> (GroupReason, String) {
        let own = fs::read_to_string(&self.termination).unwrap_or_default();
        let message = match own.trim() {
            "" => in_words(status),
            words => words.to_owned(),
        };
        (why_ended(status.code()), message)
    }

    fn fail(&mut self, (reason, message): (GroupReason, String), now: Timestamp) {
        self.requests = 0;
        self.phase = Phase::Failed(Failure {
            at: now,
            reason,
            message,
        });
        self.progress_at = now;
    }

    fn go_to(&mut self, phase: Phase, now: Timestamp) {
        if self.phase != phase {
            self.phase = phase;
            self.progress_at = now;
        }
    }
}

fn model_folder(source: &ModelSource, places: &Places) -> PathBuf {
    match source {
        ModelSource::Made { config } => config.into(),
        ModelSource::HostPath { path } => path.into(),
        ModelSource::Claim { path, .. } => path.into(),
        ModelSource::Fetch { fetch, .. } => places.cache.join(fetch.folder()),
    }
}
