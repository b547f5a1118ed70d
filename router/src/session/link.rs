//! The router's end of one session: which request each handle is, and what is to be sent.
//!
//! Shared by the dispatcher, which submits and cancels, and the session's task, which hears. A handle is free again
//! only after its last word was heard, or if it was never sent. Lock order: the dispatcher's core, then a link, then
//! a flight; nobody takes them the other way round.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures::Stream;
use swallow_policy::{ModelId, ReplicaId, Ticket};
use swallow_rpc::worker::v1::{SessionRequest, cancel, session_request::Frame};
use tokio::time::Instant;

use super::{
    outbox::{Outbox, Pending},
    wire,
};
use crate::dispatch::{Flight, Part};

/// One session.
#[derive(Debug)]
pub(crate) struct Link {
    pub replica: ReplicaId,
    pub model: ModelId,
    pub model_name: Arc<str>,
    pub replica_name: Arc<str>,
    /// Which process of the worker it is; known from its Welcome on.
    pub boot: OnceLock<Vec<u8>>,
    /// The worker keeps windows; known from its Welcome on.
    pub windows: AtomicBool,
    state: Mutex<LinkState>,
}

#[derive(Debug, Default)]
pub(crate) struct LinkState {
    /// Handle `h` is at `h - 1`: 0 is what an absent field reads as, so it names nobody.
    pub(super) entries: Vec<Option<Entry>>,
    /// Longest free first, so that a handle rests before it is used again.
    free: VecDeque<u32>,
    live: usize,
    pub(super) draining: bool,
    closed: bool,
    outbox: Outbox,
}

/// One candidate of a request on this replica.
#[derive(Debug)]
pub(crate) struct Entry {
    pub flight: Arc<Flight>,
    pub attempt: u32,
    pub candidate: u32,
    pub ticket: Ticket,
    /// Tokens heard.
    pub heard: u32,
    /// Its client wants no more; the confirmation is on its way.
    pub cancelled: Option<Instant>,
}

/// The session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

impl Link {
    pub fn new(
        (replica, replica_name): (ReplicaId, Arc<str>),
        (model, model_name): (ModelId, Arc<str>),
    ) -> Arc<Self> {
        let (boot, windows, state) = Default::default();
        Arc::new(Self {
            replica,
            model,
            model_name,
            replica_name,
            boot,
            windows,
            state,
        })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the candidates of a request that are to run, one ticket each. Gives the handle of each candidate, 0 for
    /// those that are over. The tickets come back if the session is over.
    pub fn submit(
        &self,
        flight: &Arc<Flight>,
        attempt: u32,
        parts: &[Part],
        tickets: Vec<Ticket>,
    ) -> Result<Vec<u32>, (Closed, Vec<Ticket>)> {
        let mut state = self.state();
        if state.closed {
            return Err((Closed, tickets));
        }
        let mut handles = vec![0; flight.ask.candidates as usize];
        let windows = self.windows.load(Ordering::Relaxed);
        for (part, ticket) in parts.iter().zip(tickets) {
            handles[part.candidate as usize] =
                state.submit(Arc::clone(flight), attempt, part, windows, ticket);
        }
        Ok(handles)
    }

    /// The client wants no more of these candidates. Those that were never sent are over at once: their tickets come
    /// back.
    pub fn cancel(&self, flight: &Arc<Flight>, handles: &[u32], reason: cancel::Reason) -> Vec<Ticket> {
        let mut state = self.state();
        let of_flight = |state: &LinkState, handle| {
            state
                .entry(handle)
                .is_some_and(|e| Arc::ptr_eq(&e.flight, flight))
        };
        handles
            .iter()
            .filter_map(|&h| of_flight(&state, h).then(|| state.cancel(h, reason)).flatten())
            .collect()
    }

    /// The client has read: this candidate may have generated so many tokens.
    pub fn open(&self, flight: &Arc<Flight>, handle: u32, output_tokens: u32) {
        if !self.windows.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state();
        let goes_on = |entry: &Entry| Arc::ptr_eq(&entry.flight, flight) && entry.cancelled.is_none();
        if state.entry(handle).is_some_and(goes_on) {
            state.outbox.open(handle, output_tokens);
        }
    }

    /// The worker invites this many more.
    pub fn grant(&self, credits: u32) {
        self.state().outbox.grant(credits);
    }

    /// A frame of the session itself.
    pub fn control(&self, frame: Frame) {
        self.state().outbox.control(frame);
    }

    /// The worker takes no new request.
    pub fn drain(&self) {
        self.state().draining = true;
    }

    /// Handles in use.
    pub fn live(&self) -> usize {
        self.state().live
    }

    /// Nothing is sent after what is queued; nothing can be submitted. Returns what was on the way.
    pub fn close(&self) -> Vec<Entry> {
        let mut state = self.state();
        state.closed = true;
        state.outbox.close();
        state.live = 0;
        state.free.clear();
        std::mem::take(&mut state.entries).into_iter().flatten().collect()
    }
}

impl LinkState {
    pub(super) fn entry(&self, handle: u32) -> Option<&Entry> {
        self.entries.get((handle as usize).checked_sub(1)?)?.as_ref()
    }

    pub(super) fn entry_mut(&mut self, handle: u32) -> Option<&mut Entry> {
        self.entries.get_mut((handle as usize).checked_sub(1)?)?.as_mut()
    }

    /// The last word was heard.
    pub(super) fn take(&mut self, handle: u32) -> Option<Entry> {
        let entry = self.entries.get_mut((handle as usize).checked_sub(1)?)?.take()?;
        self.live -= 1;
        self.outbox.forget(handle);
        self.free.push_back(handle);
        Some(entry)
    }

    /// Handles of a request that is over: a scan, for what seldom happens.
    pub(super) fn handles_of(&self, flight: &Arc<Flight>) -> Vec<u32> {
        let of = |entry: &&Option<Entry>| {
            entry
                .as_ref()
                .is_some_and(|entry| Arc::ptr_eq(&entry.flight, flight))
        };
        (1..)
            .zip(&self.entries)
            .filter(|(_, entry)| of(entry))
            .map(|(handle, _)| handle)
            .collect()
    }

    fn submit(
        &mut self,
        flight: Arc<Flight>,
        attempt: u32,
        part: &Part,
        windows: bool,
        ticket: Ticket,
    ) -> u32 {
        let handle = self.free.pop_front().unwrap_or_else(|| {
            self.entries.push(None);
            u32::try_from(self.entries.len()).expect("credits bound the handles far below 2^32")
        });
        let mut request = wire::request(&flight.ask, handle, attempt, part);
        if !windows {
            request.window_tokens = 0;
        }
        self.outbox.submit(Pending {
            request,
            deadline: flight.ask.deadline,
        });
        let place = &mut self.entries[handle as usize - 1];
        assert!(place.is_none(), "handle {handle} is free");
        *place = Some(Entry {
            flight,
            attempt,
            candidate: part.candidate,
            ticket,
            heard: 0,
            cancelled: None,
        });
        self.live += 1;
        handle
    }

    /// The ticket comes back if the request was never sent.
    pub(super) fn cancel(&mut self, handle: u32, reason: cancel::Reason) -> Option<Ticket> {
        let entry = self.entry_mut(handle)?;
        if entry.cancelled.is_some() {
            return None;
        }
        entry.cancelled = Some(Instant::now());
        if self.outbox.take_back(handle) {
            return self.take(handle).map(|entry| entry.ticket);
        }
        self.outbox.cancel(handle, reason);
        None
    }
}

/// The frames of a link, as the connection takes them.
pub(super) struct Frames(pub Arc<Link>);

impl Stream for Frames {
    type Item = SessionRequest;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<SessionRequest>> {
        self.0.state().outbox.poll_frame(cx)
    }
}
