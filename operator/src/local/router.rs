//! The one router of this machine, as a process that is kept running.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::Value;
use swallow_proto::launch::RouterArgs;

use super::process::{Launch, Process, in_words, last_line};

/// What a process may take to end after its streams had their time.
const GRACE_MARGIN: Duration = Duration::from_secs(15);
/// The wait before the first restart; it doubles with each that follows soon.
const BACKOFF: Duration = Duration::from_millis(500);
/// The longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// So many questions without an answer, and it is not ready: one may be lost on a busy machine.
const MISSES_MAX: u32 = 3;
/// A router that ran this long has recovered.
const STEADY: Duration = Duration::from_secs(60);

/// The router.
#[derive(Debug)]
pub struct Router {
    program: PathBuf,
    args: RouterArgs,
    log: PathBuf,
    process: Option<Process>,
    started: Instant,
    failures: u32,
    /// When it is started again, if it ended.
    restart: Instant,
    /// It was told to stop, and has to be gone by then.
    leaving: Option<Instant>,
    /// How many replicas of each model it can reach; empty while it does not answer.
    ready: BTreeMap<String, u32>,
    answered: bool,
    /// Questions in a row that it did not answer.
    misses: u32,
    /// How it ended before it ever answered.
    stillborn: Option<String>,
}

impl Router {
    /// A router that is not started yet.
    pub fn new(program: PathBuf, args: RouterArgs, log: PathBuf) -> Self {
        let now = Instant::now();
        Self {
            program,
            args,
            log,
            process: None,
            started: now,
            failures: 0,
            restart: now,
            leaving: None,
            ready: BTreeMap::new(),
            answered: false,
            misses: 0,
            stillborn: None,
        }
    }

    /// Its arguments.
    pub fn args(&self) -> &RouterArgs {
        &self.args
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Whether it takes requests.
    pub fn is_ready(&self) -> bool {
        self.runs() && !self.ready.is_empty()
    }

    /// How many replicas of a model it can reach.
    pub fn reaches(&self, model: &str) -> u32 {
        self.ready.get(model).copied().unwrap_or_default()
    }

    /// How it ended before it ever answered: it will not do better the next time.
    pub fn stillborn(&self) -> Option<&str> {
        self.stillborn.as_deref()
    }

    /// Starts it, restarts it, or sees it go.
    pub fn advance(&mut self) {
        let now = Instant::now();
        if let Some(process) = &mut self.process {
            if self.leaving.is_some_and(|until| now >= until) {
                process.kill();
            }
            if let Some(status) = process.ended() {
                self.process = None;
                self.ready.clear();
                if self.leaving.is_none() {
                    self.ended(&in_words(status), now);
                }
            }
        }
        if self.process.is_none() && self.leaving.is_none() && self.stillborn.is_none() && now >= self.restart
        {
            self.start(now);
        }
    }

    /// When it is looked at next because of time alone.
    pub fn restarts_at(&self) -> Option<Instant> {
        (self.process.is_none() && self.leaving.is_none()).then_some(self.restart)
    }

    /// Takes its answer to `/readyz`.
    pub fn learn(&mut self, answer: Option<&Value>) {
        let Some(models) = answer.and_then(|answer| answer["ready_replicas"].as_object()) else {
            self.misses += 1;
            if self.misses >= MISSES_MAX {
                self.ready.clear();
            }
            return;
        };
        self.answered = true;
        self.misses = 0;
        self.ready.clear();
        for (model, count) in models {
            let count = count
                .as_u64()
                .and_then(|count| u32::try_from(count).ok())
                .unwrap_or_default();
            self.ready.insert(model.clone(), count);
        }
    }

    /// Lets open streams finish, then ends it.
    pub fn drain(&mut self) {
        if self.leaving.is_some() {
            return;
        }
        let patience = Duration::from_secs(self.args.drain_timeout_seconds.into()) + GRACE_MARGIN;
        self.leaving = Some(Instant::now() + patience);
        if let Some(process) = &mut self.process {
            process.terminate();
        }
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        self.leaving.get_or_insert_with(Instant::now);
        self.process = None;
    }

    fn start(&mut self, now: Instant) {
        let launch = Launch {
            program: &self.program,
            argv: self.args.argv(),
            log: &self.log,
            output: None,
            env: None,
        };
        self.started = now;
        match Process::start(&launch) {
            Ok(process) => self.process = Some(process),
            Err(error) => self.ended(&format!("did not start: {error}"), now),
        }
    }

    fn ended(&mut self, how: &str, now: Instant) {
        if !self.answered {
            let line = last_line(&self.log).map_or_else(String::new, |line| format!(": {line}"));
            self.stillborn = Some(format!("{} {how}{line}", self.program.display()));
            return;
        }
        if now.duration_since(self.started) >= STEADY {
            self.failures = 0;
        }
        let wait = BACKOFF
            .saturating_mul(1 << self.failures.min(16))
            .min(BACKOFF_MAX);
        self.failures += 1;
        self.restart = now + wait;
    }

    /// The file with what it said.
    pub fn log(&self) -> &std::path::Path {
        &self.log
    }

    /// Forgets what it said in an earlier life of this folder.
    pub fn clear_log(&self) {
        let _ = fs::remove_file(&self.log);
    }
}
