//! THE LOOP: drain the inbox, let the scheduler decide, launch, record what was launched before, tell.
//!
//! One thread owns scheduler, group and sessions, so nothing here is locked. It waits only when there is nothing to
//! compute. Whatever a router sends is bounded before it comes here, and no router can make the loop wait: frames go
//! to outboxes that are cut when full. A runner that computes by itself has the next step before the tokens of the last
//! one are seen here; a sequence that turns out to have ended is then computed once too often, and nobody hears of it.

mod command;
mod credits;
mod door;
mod live;
mod obey;
mod rates;
mod report;
mod runner;
mod sessions;
mod tickets;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use swallow_rpc::worker::v1::{Finished, finished, load_report::Health, session_response::Frame};
use swallow_schedule::{Input, Limits, Micros, Output, Pace, Scheduler, SeqId, Step, StepId};
use tokio::{runtime::Handle, sync::mpsc};
use tonic::Status;
use tracing::warn;

use self::{
    live::{Live, Lives},
    rates::Rates,
    report::Reports,
    sessions::Sessions,
    tickets::Tickets,
};
use crate::{
    group::StepResult,
    metrics::{EngineMetrics, Outcome, StepDone},
    sampling::TokenScore,
    serve::Facts,
    state::State,
};

pub use command::{Command, Order, Submission};
pub use door::{Defaults, Door};
pub use runner::Runner;
pub use sessions::{SESSIONS_MAX, SessionId};
pub use tickets::Ticket;

/// Commands that may wait for the loop; a full inbox holds the routers back through their connections.
pub const INBOX_MAX: usize = 1024;
/// Longest sleep when nothing is due, so that a lost wake-up could only cost this much.
const IDLE_MAX: Duration = Duration::from_secs(1);

/// The group failed: nothing can be computed any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(pub String);

/// What an engine is made of.
pub struct Parts<R> {
    /// Computes steps.
    pub runner: R,
    /// Of scheduler and device.
    pub limits: Limits,
    /// What bounds prefill beside decoding.
    pub pace: Option<Pace>,
    /// Requests that may wait here while no slot is free.
    pub standing: u32,
    /// What Welcome says.
    pub facts: Arc<Facts>,
    /// Where the replica stands.
    pub state: Arc<State>,
    /// What is counted.
    pub metrics: EngineMetrics,
    /// Commands.
    pub inbox: mpsc::Receiver<Command>,
    /// Its timers wake the loop.
    pub runtime: Handle,
}

/// The loop's state.
pub struct Engine<R> {
    runner: R,
    scheduler: Scheduler,
    standing: u32,
    facts: Arc<Facts>,
    state: Arc<State>,
    metrics: EngineMetrics,
    inbox: mpsc::Receiver<Command>,
    runtime: Handle,
    sessions: Sessions,
    lives: Lives,
    tickets: Tickets,
    rates: Rates,
    reports: Reports,
    /// Launched and not recorded, oldest first.
    flights: VecDeque<Flight>,
    /// Time zero of the scheduler.
    epoch: Instant,
    last_step: StepId,
    drain_until: Option<Instant>,
}

/// A step that the runner has.
struct Flight {
    step: Step,
    /// When nothing but this step was left to compute: when it was launched, or when the one before it was done.
    begun: Instant,
    /// How long it will take, as far as that is known.
    predicted: Option<Micros>,
}

impl<R: Runner> Engine<R> {
    /// Nothing runs yet.
    pub fn new(parts: Parts<R>) -> Self {
        // Credits bound what waits. The scheduler's own bound is above them and above what preemption and windows that
        // open may send back, so it never refuses a request that came with a credit.
        let most = u32::try_from(SESSIONS_MAX).expect("small")
            + 2 * parts.limits.max_running
            + parts.standing
            + 2 * credits::parked_max(&parts.limits);
        let limits = Limits {
            max_waiting: most,
            ..parts.limits
        };
        let mut scheduler = Scheduler::new(limits);
        if let Some(pace) = parts.pace {
            scheduler.set_pace(pace);
        }
        Self {
            runner: parts.runner,
            scheduler,
            standing: parts.standing,
            facts: parts.facts,
            state: parts.state,
            metrics: parts.metrics,
            inbox: parts.inbox,
            runtime: parts.runtime,
            sessions: Sessions::default(),
            lives: Lives::default(),
            tickets: Tickets::default(),
            rates: Rates::default(),
            reports: Reports::default(),
            flights: VecDeque::new(),
            epoch: Instant::now(),
            last_step: StepId(0),
            drain_until: None,
        }
    }

    /// Runs until drained, or until nobody can send a command any more.
    ///
    /// # Errors
    /// The group failed. Every request was told, readiness is off, and every session ends.
    pub fn run(&mut self) -> Result<(), EngineError> {
        loop {
            self.take_commands();
            if self.is_drained() {
                self.tell();
                self.sessions.end(&Ok(()));
                return Ok(());
            }
            let launched = self.launch()?;
            if self.flights.len() >= self.runner.steps_ahead() || (!launched && !self.flights.is_empty()) {
                self.finish()?;
                self.tell();
            } else if !launched {
                self.tell();
                if !self.wait() {
                    return Ok(());
                }
            }
        }
    }

    fn now(&self) -> Micros {
        self.at(Instant::now())
    }

    fn at(&self, instant: Instant) -> Micros {
        micros(instant.saturating_duration_since(self.epoch))
    }

    /// Gives the runner the next step, if there is one.
    fn launch(&mut self) -> Result<bool, EngineError> {
        let Some(step) = self.scheduler.step(self.now()) else {
            return Ok(false);
        };
        if let Err(error) = self.runner.launch(&step) {
            return Err(self.fail(&step, &error.to_string()));
        }
        let begun = Instant::now();
        let predicted = self.scheduler.predict(&step);
        self.flights.push_back(Flight {
            step,
            begun,
            predicted,
        });
        Ok(true)
    }

    /// Waits for the oldest launched step and records what came of it.
    fn finish(&mut self) -> Result<(), EngineError> {
        let Some(flight) = self.flights.pop_front() else {
            return Ok(());
        };
        let result = match self.runner.finish() {
            Ok(result) => result,
            Err(error) => return Err(self.fail(&flight.step, &error.to_string())),
        };
        let now = Instant::now();
        if let Some(next) = self.flights.front_mut() {
            next.begun = now;
        }
        let took = now.saturating_duration_since(flight.begun);
        self.scheduler.learn(&flight.step, micros(took));
        self.count(&flight, took, &result);
        self.last_step = flight.step.id;
        self.record(&flight.step, result);
        Ok(())
    }

    fn count(&mut self, flight: &Flight, took: Duration, result: &StepResult) {
        let works = &flight.step.works;
        let decode = works
            .iter()
            .filter(|work| is_decode(&work.input, work.sample))
            .count();
        let decode = u32::try_from(decode).expect("a step is bounded by max_step_tokens");
        let rows: u32 = works.iter().map(swallow_schedule::Work::rows).sum();
        let prefill = rows - decode;
        self.rates.step(prefill, decode, took);
        self.metrics.step(StepDone {
            prefill,
            decode,
            took,
            predicted: flight.predicted.map(|micros| Duration::from_micros(micros.0)),
            exchanged: result.exchanged,
            replayed: result.replayed,
        });
    }

    /// Gives the scheduler what was sampled. Outputs with tokens come from commits alone, and those of earlier ones are
    /// told, so the scores belong to the tokens that this commit brings out.
    fn record(&mut self, step: &Step, result: StepResult) {
        let sampled: Vec<u32> = result.sampled.iter().map(|sampled| sampled.token).collect();
        self.scheduler.commit(step.id, &sampled);
        for prompt in result.prompt_scores {
            let Some(live) = self.lives.get_mut(prompt.seq) else {
                continue;
            };
            let scored = live.unscored(prompt.first_position, &prompt.scores);
            let Some(session) = self.sessions.get_mut(live.session) else {
                continue;
            };
            for (position, score) in scored {
                session.score(live.handle, position, score);
            }
        }
        let scores: HashMap<SeqId, TokenScore> = result
            .sampled
            .into_iter()
            .filter_map(|sampled| Some((sampled.seq, sampled.score?)))
            .collect();
        self.route(scores);
    }

    /// Brings the scheduler's outputs to the sessions they belong to.
    fn route(&mut self, mut scores: HashMap<SeqId, TokenScore>) {
        let now = Instant::now();
        for output in self.scheduler.take_outputs() {
            match output {
                Output::Started { seq, cached_tokens } => self.on_started(seq, cached_tokens, now),
                Output::Token { seq, index, token } => {
                    self.on_token(seq, index, token, scores.remove(&seq), now)
                }
                Output::Finished { seq, why, n_tokens } => {
                    let Some(live) = self.remove(seq) else { continue };
                    let (reason, stop) = live.reason(why, &self.facts.eos_token_ids);
                    let failure = live.failure();
                    let outcome = failure.map_or(Outcome::Finished(why), |_| Outcome::Error);
                    self.metrics.finished(outcome, &live.timeline(now, n_tokens));
                    let Some(session) = self.sessions.get_mut(live.session) else {
                        continue;
                    };
                    session.finished(Finished {
                        handle: live.handle,
                        reason: reason.into(),
                        output_tokens: n_tokens,
                        message: failure.unwrap_or_default().to_owned(),
                        stop_token_id: stop,
                    });
                }
            }
        }
    }

    fn on_started(&mut self, seq: SeqId, cached_tokens: u32, now: Instant) {
        let Some(live) = self.lives.get_mut(seq) else {
            return;
        };
        live.started(now);
        self.metrics.started(live.prompt_tokens, cached_tokens);
        let Some(session) = self.sessions.get_mut(live.session) else {
            return;
        };
        session.credit.waiting -= 1;
        session.accepted(live.handle, cached_tokens);
    }

    fn on_token(&mut self, seq: SeqId, index: u32, token: u32, score: Option<TokenScore>, now: Instant) {
        let Some(live) = self.lives.get_mut(seq) else {
            return;
        };
        if live.failure().is_some() {
            // The token is nobody's; the sequence ends without it.
            self.scheduler.cancel(seq);
            return;
        }
        match live.token(token, now) {
            None => self.metrics.first_token(live.since_arrival(now)),
            Some(since_last) => self.metrics.next_token(since_last),
        }
        let Some(session) = self.sessions.get_mut(live.session) else {
            return;
        };
        session.token(live.handle, token);
        if let Some(score) = score {
            session.score(live.handle, live.prompt_tokens + index, &score);
        }
    }

    /// Forgets a sequence that no step names any more, but for those that the runner has.
    fn remove(&mut self, seq: SeqId) -> Option<Live> {
        let live = self.lives.remove(seq)?;
        self.runner.retire(seq);
        if !live.has_started()
            && let Some(session) = self.sessions.get_mut(live.session)
        {
            session.credit.waiting -= 1;
        }
        Some(live)
    }

    /// Sends every session what there is to say.
    fn tell(&mut self) {
        self.route(HashMap::new());
        self.sessions.send_step(self.last_step);
        let delta = self.scheduler.take_kv_delta();
        self.sessions.send_kv_delta(&delta);
        let load = self.scheduler.load();
        if self.drain_until.is_none() && !credits::is_crowded(self.scheduler.limits(), &load) {
            self.sessions
                .grant(credits::room(self.scheduler.limits(), self.standing, &load));
        }
        let now = Instant::now();
        if let Some(report) = self.reports.due(&load, &self.rates, self.health(), now) {
            self.sessions.broadcast(&Frame::Load(report));
        }
        self.state.set_load(load);
        self.metrics.load(&load);
        for session in self.sessions.cut_full() {
            self.metrics.session_cut();
            self.abandon(&session);
        }
        self.metrics.sessions(self.sessions.len());
    }

    fn health(&self) -> Health {
        if self.drain_until.is_some() {
            Health::Draining
        } else {
            Health::Serving
        }
    }

    /// Sleeps until a command comes or something is due; false when no command can come any more.
    fn wait(&mut self) -> bool {
        let now = Instant::now();
        let deadline = self.scheduler.next_deadline().map(|at| {
            self.epoch
                .checked_add(Duration::from_micros(at.0))
                .unwrap_or(now + IDLE_MAX)
        });
        let next = [deadline, self.reports.next(), self.drain_until]
            .into_iter()
            .flatten()
            .min();
        let pause = next.map_or(IDLE_MAX, |next| next.saturating_duration_since(now).min(IDLE_MAX));
        let inbox = &mut self.inbox;
        match self
            .runtime
            .block_on(async { tokio::time::timeout(pause, inbox.recv()).await })
        {
            Ok(Some(command)) => self.obey(command),
            Ok(None) => return false,
            Err(_due) => {}
        }
        true
    }

    /// Takes what is there, at most one inbox full, so that steps go on whatever routers send.
    fn take_commands(&mut self) {
        for _ in 0..INBOX_MAX {
            let Ok(command) = self.inbox.try_recv() else { break };
            self.obey(command);
        }
    }

    /// Whether a drain has nothing left to wait for; what outlives its time is ended here.
    fn is_drained(&mut self) -> bool {
        let Some(until) = self.drain_until else {
            return false;
        };
        if self.scheduler.is_idle() {
            return true;
        }
        if Instant::now() < until {
            return false;
        }
        warn!(
            requests = self.lives.len(),
            "the drain's time is over; requests are ended"
        );
        self.end_all("the replica was shut down before the request was done; send it again");
        true
    }

    /// Readiness goes first, then every request is told, then the process may end.
    fn fail(&mut self, step: &Step, error: &str) -> EngineError {
        self.state.failed(error);
        self.last_step = step.id;
        self.end_all(error);
        self.sessions.end(&Err(Status::unavailable(error.to_owned())));
        EngineError(error.to_owned())
    }

    fn end_all(&mut self, message: &str) {
        let now = Instant::now();
        for live in self.lives.take_all() {
            let output_tokens = live.output_tokens();
            self.metrics
                .finished(Outcome::Error, &live.timeline(now, output_tokens));
            let Some(session) = self.sessions.get_mut(live.session) else {
                continue;
            };
            session.finished(Finished {
                handle: live.handle,
                reason: finished::Reason::Error.into(),
                output_tokens,
                message: message.to_owned(),
                stop_token_id: None,
            });
        }
        self.sessions.send_step(self.last_step);
    }
}

fn micros(duration: Duration) -> Micros {
    Micros(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX))
}

/// A row that continues a sequence whose prompt is done: its token is not the first, and it comes alone.
fn is_decode(input: &Input, sample: Option<u32>) -> bool {
    let alone = match input {
        Input::LastSampled => true,
        Input::Tokens(ids) => ids.len() == 1,
    };
    alone && sample.is_some_and(|index| index > 0)
}
