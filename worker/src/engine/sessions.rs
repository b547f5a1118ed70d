//! The routers that are connected, and what the running iteration has to tell each of them.
//!
//! One `StepOutput` frame for each step and session: outputs gather here and leave together in `flush`. A session
//! whose outbox is full is cut; its requests are the engine's to cancel.

use std::collections::{BTreeMap, HashMap};

use swallow_rpc::worker::v1::{
    Accepted, Credit, Finished, KvEvents, LogprobColumns, StepOutput, session_response::Frame,
};
use swallow_schedule::{KvDelta, SeqId, StepId};
use tonic::Status;

use super::credits::{self, Holder};
use crate::{
    sampling::TokenScore,
    serve::{Full, Outbox},
};

/// Most routers at a time. Each holds at least one credit.
pub const SESSIONS_MAX: usize = 64;
/// Keys in one frame of a snapshot: 512 KiB, far below every limit on messages.
const SNAPSHOT_KEYS: usize = 65_536;

/// Names a session within this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

pub(super) struct Session {
    pub(super) router_id: String,
    pub(super) outbox: Outbox,
    /// Requests that live, by the router's handle.
    pub(super) handles: HashMap<u32, SeqId>,
    pub(super) credit: Holder,
    /// Number of the last KvEvents frame, where they were asked for.
    kv_seq: Option<u64>,
    step: StepOutput,
    full: Option<Full>,
}

impl Session {
    pub(super) fn new(router_id: String, outbox: Outbox, kv_events: bool) -> Self {
        Self {
            router_id,
            outbox,
            handles: HashMap::new(),
            credit: Holder::default(),
            kv_seq: kv_events.then_some(0),
            step: StepOutput::default(),
            full: None,
        }
    }

    pub(super) fn send(&mut self, frame: Frame) {
        if self.full.is_none() {
            self.full = self.outbox.push(frame).err();
        }
    }

    pub(super) fn accepted(&mut self, handle: u32, cached_tokens: u32) {
        self.step.accepted.push(Accepted {
            handle,
            cached_tokens,
        });
    }

    pub(super) fn token(&mut self, handle: u32, token: u32) {
        self.step.handle.push(handle);
        self.step.token_id.push(token);
    }

    pub(super) fn score(&mut self, handle: u32, position: u32, score: &TokenScore) {
        let columns = self.step.logprobs.get_or_insert_with(LogprobColumns::default);
        columns.handle.push(handle);
        columns.position.push(position);
        columns.token_id.push(score.token);
        columns.logprob.push(score.logprob);
        columns.rank.push(score.rank);
        columns
            .top_n
            .push(u32::try_from(score.top.len()).expect("the door bounds how many are asked for"));
        for &(id, logprob) in &score.top {
            columns.top_ids.push(id);
            columns.top_logprobs.push(logprob);
        }
    }

    pub(super) fn finished(&mut self, finished: Finished) {
        self.handles.remove(&finished.handle);
        self.step.finished.push(finished);
    }

    /// Sends what the step said about this session's requests, if anything.
    fn send_step(&mut self, step: StepId) {
        let said = !self.step.handle.is_empty()
            || !self.step.accepted.is_empty()
            || !self.step.finished.is_empty()
            || self.step.logprobs.is_some();
        if said {
            let output = StepOutput {
                step: step.0,
                ..std::mem::take(&mut self.step)
            };
            self.send(Frame::Step(output));
        }
    }

    /// Everything that is findable now, replacing what the router knew.
    pub(super) fn send_snapshot(&mut self, keys: &[u64]) {
        let (first, rest) = keys.split_at(keys.len().min(SNAPSHOT_KEYS));
        self.send_kv(true, first, &[]);
        for more in rest.chunks(SNAPSHOT_KEYS) {
            self.send_kv(false, more, &[]);
        }
    }

    fn send_kv(&mut self, snapshot: bool, stored: &[u64], removed: &[u64]) {
        let Some(seq) = &mut self.kv_seq else { return };
        *seq += 1;
        let frame = KvEvents {
            seq: *seq,
            snapshot,
            stored: stored.to_vec(),
            removed: removed.to_vec(),
        };
        self.send(Frame::Kv(frame));
    }
}

/// All sessions, in the order they came.
#[derive(Default)]
pub(super) struct Sessions(BTreeMap<SessionId, Session>);

impl Sessions {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.0.get_mut(&id)
    }

    pub(super) fn insert(&mut self, id: SessionId, session: Session) -> &mut Session {
        self.0.entry(id).insert_entry(session).into_mut()
    }

    pub(super) fn remove(&mut self, id: SessionId) -> Option<Session> {
        self.0.remove(&id)
    }

    pub(super) fn broadcast(&mut self, frame: &Frame) {
        for session in self.0.values_mut() {
            session.send(frame.clone());
        }
    }

    /// Tells the subscribers what entered and left the prefix cache.
    pub(super) fn send_kv_delta(&mut self, delta: &KvDelta) {
        if delta.stored.is_empty() && delta.removed.is_empty() {
            return;
        }
        for session in self.0.values_mut() {
            session.send_kv(false, &delta.stored, &delta.removed);
        }
    }

    /// Hands out the credits that `room` allows.
    pub(super) fn grant(&mut self, room: u32) {
        let holders: Vec<Holder> = self.0.values().map(|session| session.credit).collect();
        for (session, more) in self.0.values_mut().zip(credits::grants(room, &holders)) {
            if more > 0 {
                session.credit.unspent += more;
                session.send(Frame::Credit(Credit { add_submits: more }));
            }
        }
    }

    /// The credits a new session may begin with.
    pub(super) fn first_grant(&self, room: u32) -> u32 {
        let mut holders: Vec<Holder> = self.0.values().map(|session| session.credit).collect();
        holders.push(Holder::default());
        credits::grants(room, &holders).pop().unwrap_or_default()
    }

    /// Sends every session its part of the step.
    pub(super) fn send_step(&mut self, step: StepId) {
        for session in self.0.values_mut() {
            session.send_step(step);
        }
    }

    /// Takes out the sessions that do not read; their outboxes are empty afterwards.
    pub(super) fn cut_full(&mut self) -> Vec<Session> {
        let full: Vec<SessionId> = self
            .0
            .iter()
            .filter(|(_, session)| session.full.is_some())
            .map(|(id, _)| *id)
            .collect();
        let mut cut = Vec::new();
        for id in full {
            let Some(session) = self.0.remove(&id) else {
                continue;
            };
            let bytes = session.full.map_or(0, |full| full.bytes);
            tracing::warn!(
                router = session.router_id,
                bytes,
                "the router does not read; its session is cut"
            );
            session.outbox.cut(Status::resource_exhausted(format!(
                "{bytes} bytes were waiting to be read; read the session all the time"
            )));
            cut.push(session);
        }
        cut
    }

    /// Ends every session after what is queued.
    pub(super) fn end(&mut self, how: &Result<(), Status>) {
        for session in self.0.values() {
            session.outbox.end(how.clone());
        }
        self.0.clear();
    }
}
