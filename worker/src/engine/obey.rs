//! What each command does: sessions open and close, requests enter or are refused, a drain begins.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prost_types::Duration as WireDuration;
use swallow_rpc::worker::v1::{Capacity, Finished, GoAway, Pong, Welcome, finished, session_response::Frame};
use swallow_schedule::{Ask, Micros, Refusal};
use tonic::Status;
use tracing::{info, warn};

use super::{
    Command, Engine, Order, Runner, SESSIONS_MAX, SessionId, Submission, Ticket, credits, live::Live,
    sessions::Session,
};
use crate::serve::{Outbox, PROTOCOL};

impl<R: Runner> Engine<R> {
    pub(super) fn obey(&mut self, command: Command) {
        match command {
            Command::Open {
                session,
                router_id,
                kv_events,
                outbox,
            } => {
                self.open(session, router_id, kv_events, outbox);
            }
            Command::Submit {
                session,
                submissions,
                arrived,
            } => self.submit(session, submissions, arrived),
            Command::Cancel { session, handles } => {
                let Some(session) = self.sessions.get_mut(session) else {
                    return;
                };
                for seq in handles.iter().filter_map(|handle| session.handles.get(handle)) {
                    self.scheduler.cancel(*seq);
                }
            }
            Command::Window { session, openings } => {
                let Some(session) = self.sessions.get_mut(session) else {
                    return;
                };
                for (handle, tokens) in openings {
                    if let Some(&seq) = session.handles.get(&handle)
                        && let Some(live) = self.lives.get_mut(seq)
                    {
                        self.scheduler.set_window(seq, live.window(tokens));
                    }
                }
            }
            Command::Ping { session, nonce } => {
                if let Some(session) = self.sessions.get_mut(session) {
                    session.send(Frame::Pong(Pong { nonce }));
                }
            }
            Command::Close { session, how } => self.close(session, how),
            Command::Drain { timeout } => self.drain(timeout),
        }
    }

    fn open(&mut self, id: SessionId, router_id: String, kv_events: bool, outbox: Outbox) {
        if self.sessions.len() >= SESSIONS_MAX {
            warn!(
                router = router_id,
                "refused: {SESSIONS_MAX} routers are connected already"
            );
            let why =
                format!("{SESSIONS_MAX} routers are connected already; use fewer routers or more replicas");
            outbox.end(Err(Status::resource_exhausted(why)));
            return;
        }
        // What the others have to hear of comes before the snapshot that the new one gets.
        let delta = self.scheduler.take_kv_delta();
        self.sessions.send_kv_delta(&delta);
        let load = self.scheduler.load();
        let room = credits::room(self.scheduler.limits(), self.standing, &load);
        let credits = if self.drain_until.is_some() || credits::is_crowded(self.scheduler.limits(), &load) {
            0
        } else {
            self.sessions.first_grant(room)
        };
        info!(router = router_id, kv_events, credits, "session opened");
        let mut session = Session::new(router_id, outbox, kv_events);
        session.credit.unspent = credits;
        session.send(Frame::Welcome(Welcome {
            protocol: PROTOCOL,
            replica_id: self.state.identity().replica_id.clone(),
            boot_id: self.facts.boot_id.to_vec(),
            model: Some(self.facts.model_spec(&self.state.identity().served_names)),
            capacity: Some(self.capacity()),
            submit_credits: credits,
            windows: true,
        }));
        if kv_events {
            session.send_snapshot(&self.scheduler.cached_keys());
        }
        session.send(Frame::Load(self.reports.now(&load, &self.rates, self.health())));
        if let Some(until) = self.drain_until {
            session.send(Frame::GoAway(go_away(
                until.saturating_duration_since(Instant::now()),
            )));
        }
        self.sessions.insert(id, session);
    }

    fn capacity(&self) -> Capacity {
        let limits = self.scheduler.limits();
        Capacity {
            tensor_parallel: self.state.identity().tensor_parallel,
            max_running: limits.max_running,
            max_step_tokens: limits.max_step_tokens,
            block_tokens: limits.block_tokens,
            n_blocks: limits.n_blocks,
            prefill_tokens_per_second: self.rates.prefill_per_second(),
        }
    }

    fn submit(&mut self, id: SessionId, submissions: Vec<Submission>, arrived: Instant) {
        for Submission { handle, order } in submissions {
            let Some(session) = self.sessions.get_mut(id) else {
                return;
            };
            if session.handles.contains_key(&handle) {
                // Its Finished could not be told from the other's.
                let why = format!("handle {handle} is in use; give each live request its own");
                return self.close(id, Err(Status::invalid_argument(why)));
            }
            let admitted = if session.credit.unspent == 0 {
                Err(Refused::busy("no credit; send a request only against a credit"))
            } else {
                session.credit.unspent -= 1;
                order
                    .map_err(Refused::rejected)
                    .and_then(|(ticket, order)| self.admit(id, handle, ticket, *order, arrived))
            };
            if let Err(Refused { reason, message }) = admitted {
                self.metrics.rejected();
                let Some(session) = self.sessions.get_mut(id) else {
                    return;
                };
                session.finished(Finished {
                    handle,
                    reason: reason.into(),
                    message,
                    ..Finished::default()
                });
            }
        }
    }

    /// Hands a sound request to scheduler and device.
    fn admit(
        &mut self,
        id: SessionId,
        handle: u32,
        ticket: Ticket,
        order: Order,
        arrived: Instant,
    ) -> Result<(), Refused> {
        if self.drain_until.is_some() {
            return Err(Refused::busy(
                "the replica is draining; send the request to another one",
            ));
        }
        if self.tickets.contains(&ticket, arrived) {
            return Err(Refused::rejected(
                "this request, candidate and attempt came before; raise attempt to run it again",
            ));
        }
        let seq = self.lives.next_id();
        let live = Live::new(id, handle, &order, arrived);
        let deadline = order
            .budget
            .map(|budget| Micros(self.at(arrived).0 + micros(budget)));
        let ask = Ask {
            id: seq,
            prompt: Arc::clone(&order.prompt),
            max_tokens: order.max_tokens,
            min_tokens: order.min_tokens,
            stop_ids: order.stop_ids,
            root_key: order.root_key,
            prompt_logprobs: order.prompt_logprobs,
            prompt_logprobs_from: order.prompt_logprobs_from,
            deadline,
        };
        self.scheduler.add(ask)?;
        if order.window < u32::MAX {
            self.scheduler.set_window(seq, live.window(order.window));
        }
        if order.params.grammar.is_some() {
            // What may come next depends on what came.
            self.scheduler.keep_in_step(seq);
        }
        self.tickets.take(ticket, arrived);
        self.runner.admit(seq, order.params, order.prompt);
        self.lives.insert(seq, live);
        if let Some(session) = self.sessions.get_mut(id) {
            session.handles.insert(handle, seq);
            session.credit.waiting += 1;
        }
        Ok(())
    }

    fn close(&mut self, id: SessionId, how: Result<(), Status>) {
        let Some(session) = self.sessions.remove(id) else {
            return;
        };
        let requests = session.handles.len();
        match &how {
            Ok(()) => info!(router = session.router_id, requests, "session closed"),
            Err(why) => warn!(
                router = session.router_id,
                requests,
                why = why.message(),
                "session ended"
            ),
        }
        session.outbox.end(how);
        self.abandon(&session);
    }

    /// Cancels what a session that is gone had asked for.
    pub(super) fn abandon(&mut self, session: &Session) {
        for seq in session.handles.values() {
            self.scheduler.cancel(*seq);
        }
    }

    fn drain(&mut self, timeout: Duration) {
        if self.drain_until.is_some() {
            return;
        }
        self.drain_until = Some(Instant::now() + timeout);
        let load = self.scheduler.load();
        info!(
            running = load.running,
            waiting = load.waiting,
            timeout_s = timeout.as_secs(),
            "draining"
        );
        self.sessions.broadcast(&Frame::GoAway(go_away(timeout)));
    }
}

/// Why a request did not enter, and whether another replica might take it.
struct Refused {
    reason: finished::Reason,
    message: String,
}

impl Refused {
    /// There is nothing wrong with the request.
    fn busy(message: impl Into<String>) -> Refused {
        Refused {
            reason: finished::Reason::Busy,
            message: message.into(),
        }
    }

    /// No replica would take it.
    fn rejected(message: impl Into<String>) -> Refused {
        Refused {
            reason: finished::Reason::Rejected,
            message: message.into(),
        }
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Refused {
        match refusal {
            Refusal::QueueFull { .. } => Refused::busy(refusal.to_string()),
            Refusal::EmptyPrompt
            | Refusal::NothingAsked
            | Refusal::TooLong { .. }
            | Refusal::NeverFits { .. }
            | Refusal::DuplicateId(_) => Refused::rejected(refusal.to_string()),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn go_away(drain: Duration) -> GoAway {
    // A drain is given in whole seconds of 32 bits.
    let drain = WireDuration::try_from(drain).ok();
    GoAway {
        reason: "the replica is shutting down".into(),
        drain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_line_says_nothing_against_the_request() {
        let full = Refused::from(Refusal::QueueFull { limit: 4 });
        assert_eq!(full.reason, finished::Reason::Busy);
        let never = Refused::from(Refusal::NeverFits { needed: 9, pool: 8 });
        assert_eq!(never.reason, finished::Reason::Rejected);
    }
}
