//! One request on its way: where it is, and what came of it that its client has not read yet.
//!
//! Sessions push, the client's stream pulls; nobody waits for the other. A request that loses its replica goes to
//! another one. If the client has read nothing, that one starts over; if it has, that one continues after the tokens
//! that had come, each candidate for itself, and the client's stream goes on where it was. Each placement has its own
//! attempt number, and what an earlier attempt still says is not heard.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use swallow_policy::{Keys, ModelId, ReplicaId, RequestId};
use tokio::time::Instant;

use super::output::Output;
use crate::{
    ask::{Ask, Event, Failure, Finish, Refusal, Score},
    observe::MoveCause,
    session::Link,
};

/// Replicas that may be lost under a request: a request that kills replicas must not reach them all.
const LOSSES_MAX: u32 = 2;
/// Placements of one request, whatever sends it back.
const ATTEMPTS_MAX: u32 = 8;

/// A window is no larger: a worker that runs ahead of its client by so much gains nothing.
const WINDOW_TOKENS_MAX: usize = 256;
/// Nor smaller, or its client would wait for the way to the worker and back.
const WINDOW_TOKENS_MIN: usize = 16;

/// What may wait for one client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers {
    /// Tokens, where the worker keeps no windows.
    pub tokens: usize,
    /// Bytes.
    pub bytes: usize,
}

impl Buffers {
    /// Tokens of one candidate that may wait for its client.
    fn window(&self, ask: &Ask) -> u32 {
        let score = |top: u32| size_of::<Score>() + top as usize * size_of::<(u32, f32)>();
        let token_bytes = size_of::<u32>() + ask.logprobs.map_or(0, score);
        let tokens = self.bytes / (token_bytes * ask.candidates as usize);
        u32::try_from(tokens.clamp(WINDOW_TOKENS_MIN, WINDOW_TOKENS_MAX)).expect("small")
    }
}

/// A candidate whose client has read, and how many tokens it may have generated.
pub(crate) type Opening = (Arc<Link>, u32, u32);

/// A request in the router.
#[derive(Debug)]
pub(crate) struct Flight {
    pub id: RequestId,
    pub model: ModelId,
    pub ask: Ask,
    pub keys: Vec<Keys>,
    pub since: Instant,
    max_buffered: usize,
    window: u32,
    state: Mutex<State>,
}

/// Where it is.
#[derive(Debug)]
pub(crate) enum Place {
    /// Not yet queued, or over.
    Nowhere,
    /// In the queue.
    Queued,
    /// On a replica, under one handle a candidate; 0, which names nobody, where a candidate was over before.
    Placed(Arc<Link>, Vec<u32>),
}

/// A candidate that is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub candidate: u32,
    /// What it said already, on other replicas.
    pub said: Vec<u32>,
    /// Its client wants the prompt's scores, if it asked for them at all.
    pub fresh: bool,
    /// Tokens that it may have generated before its client has read more.
    pub window: u32,
}

/// How it ended, otherwise than well.
#[derive(Clone, Debug)]
enum End {
    Refused(Refusal),
    Failed(Failure),
    /// The client left.
    Gone,
}

#[derive(Debug)]
struct State {
    place: Place,
    attempt: u32,
    losses: u32,
    /// The last of them, and what was seen.
    lost_on: Option<(Arc<str>, String)>,
    /// Replicas not to try again, as long as they are the same process.
    excluded: Vec<(ReplicaId, Vec<u8>)>,
    /// Some replica accepted it; this stays true when it moves.
    accepted: bool,
    /// The client has read something: what comes from now on continues it.
    bound: bool,
    output: Output,
    /// Every token of each candidate, read or not.
    said: Vec<Vec<u32>>,
    /// Tokens that the client has read, over all candidates and of each.
    read_tokens: u32,
    read: Vec<u32>,
    /// Tokens that each candidate may have generated.
    granted: Vec<u32>,
    /// Since when a candidate has all that it may have, and its client has read nothing.
    full_since: Option<Instant>,
    end: Option<End>,
    waker: Option<Waker>,
}

/// What a request does that lost its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Withdrawn {
    /// It may be queued again.
    Movable,
    /// It is over, or was already.
    Over,
}

/// Why a request cannot stay where it is.
#[derive(Clone, Debug)]
pub(crate) struct Eviction {
    pub cause: MoveCause,
    pub replica: ReplicaId,
    pub replica_name: Arc<str>,
    /// For the client, if it has to end.
    pub text: String,
    /// Not to be tried again while it is this process.
    pub exclude_boot: Option<Vec<u8>>,
}

impl Flight {
    pub fn new(id: RequestId, model: ModelId, ask: Ask, keys: Vec<Keys>, buffers: Buffers) -> Arc<Self> {
        let window = buffers.window(&ask);
        let state = State {
            place: Place::Nowhere,
            attempt: 0,
            losses: 0,
            lost_on: None,
            excluded: Vec::new(),
            accepted: false,
            bound: false,
            output: Output::new(&ask),
            said: vec![Vec::new(); ask.candidates as usize],
            read_tokens: 0,
            read: vec![0; ask.candidates as usize],
            granted: vec![window; ask.candidates as usize],
            full_since: None,
            end: None,
            waker: None,
        };
        let (since, state) = (Instant::now(), Mutex::new(state));
        Arc::new(Self {
            id,
            model,
            ask,
            keys,
            since,
            max_buffered: buffers.tokens,
            window,
            state,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // What the dispatcher does.

    /// It waits in the queue. False: it is over.
    pub fn queued(&self) -> bool {
        let mut state = self.state();
        if state.end.is_none() {
            state.place = Place::Queued;
        }
        state.end.is_none()
    }

    /// The number of its next placement, or of the present one.
    pub fn attempt(&self) -> u32 {
        self.state().attempt
    }

    /// Replicas that it must not go to, where `boot` gives the process that a replica is now.
    pub fn excluded<'a>(&self, boot: impl Fn(ReplicaId) -> Option<&'a [u8]>) -> Vec<ReplicaId> {
        let state = self.state();
        let same = |(id, was): &&(ReplicaId, Vec<u8>)| boot(*id) == Some(was.as_slice());
        state.excluded.iter().filter(same).map(|(id, _)| *id).collect()
    }

    /// Its client has a stream.
    pub fn is_accepted(&self) -> bool {
        self.state().accepted
    }

    /// What is to run: nothing, if its client has stopped every candidate in the meantime.
    pub fn parts(&self) -> Vec<Part> {
        let state = self.state();
        let open = (0..)
            .zip(&state.said)
            .filter(|(candidate, _)| state.output.is_open(*candidate));
        open.map(|(candidate, said)| Part {
            candidate,
            said: said.clone(),
            fresh: !state.bound,
            // One that waits for its client comes one token further elsewhere, and waits there.
            window: state.granted[candidate as usize].max(said.len() as u32 + 1),
        })
        .collect()
    }

    /// It was submitted. The handles come back if it is over already: somebody has to cancel them.
    pub fn placed(&self, link: Arc<Link>, handles: Vec<u32>) -> Result<(), Vec<u32>> {
        let mut state = self.state();
        if state.end.is_some() {
            return Err(handles);
        }
        state.place = Place::Placed(link, handles);
        Ok(())
    }

    /// It lost the place of attempt `attempt`: it is ready for another one, or over.
    pub fn withdraw(&self, attempt: u32, eviction: &Eviction) -> (Withdrawn, Place) {
        let mut state = self.state();
        if state.end.is_some() || state.attempt != attempt {
            return (Withdrawn::Over, Place::Nowhere);
        }
        let place = std::mem::replace(&mut state.place, Place::Nowhere);
        let failed = |cause: String| {
            End::Failed(Failure::ReplicaLost {
                replica: eviction.replica_name.to_string(),
                cause,
            })
        };
        if eviction.cause == MoveCause::Lost {
            state.losses += 1;
            state.lost_on = Some((Arc::clone(&eviction.replica_name), eviction.text.clone()));
        }
        let end = if state.losses >= LOSSES_MAX {
            let text = &eviction.text;
            failed(format!(
                "{text}; it is the second one lost under this request, which is not tried on a third"
            ))
        } else if state.attempt + 1 >= ATTEMPTS_MAX {
            failed(format!(
                "{}; the request was placed {ATTEMPTS_MAX} times in vain",
                eviction.text
            ))
        } else {
            state.attempt += 1;
            if state.bound {
                state.close_full(self.ask.max_tokens);
            } else {
                state.output = Output::new(&self.ask);
                state.said.iter_mut().for_each(Vec::clear);
                state.full_since = None;
            }
            if let Some(boot) = &eviction.exclude_boot {
                state.excluded.push((eviction.replica, boot.clone()));
            }
            let what = if state.output.is_running() {
                Withdrawn::Movable
            } else {
                Withdrawn::Over
            };
            state.wake();
            return (what, place);
        };
        state.finish(end);
        (Withdrawn::Over, place)
    }

    /// It will not run. If a replica was lost under it, that is what its client has to know; and if one accepted it,
    /// its client has a stream already, which then fails.
    pub fn refuse(&self, refusal: Refusal) -> Place {
        let mut state = self.state();
        let tokens = state.read_tokens;
        let end = match (refusal, &state.lost_on) {
            (Refusal::Deadline, _) if state.accepted => End::Failed(Failure::Deadline { tokens }),
            (refusal, Some((replica, text))) if refusal != Refusal::Deadline => {
                End::Failed(Failure::ReplicaLost {
                    replica: replica.to_string(),
                    cause: format!("{text}; no other could go on with it: {refusal}"),
                })
            }
            (refusal, _) if state.accepted => End::Failed(Failure::Worker(refusal.to_string())),
            (refusal, _) => End::Refused(refusal),
        };
        state.finish(end)
    }

    /// It cannot go on.
    pub fn fail(&self, failure: Failure) -> Place {
        self.state().finish(End::Failed(failure))
    }

    /// The deadline passed, wherever it is.
    pub fn expire(&self) -> Place {
        self.refuse(Refusal::Deadline)
    }

    // What sessions push.

    /// The replica runs a candidate.
    pub fn push_accepted(&self, attempt: u32, candidate: u32, cached_tokens: u32) {
        let mut state = self.state();
        if state.hears(attempt) {
            state.accepted = true;
            state.output.push_begun(candidate, cached_tokens);
            state.wake();
        }
    }

    /// The score of a prompt position, 1 or more.
    pub fn push_prompt_score(&self, attempt: u32, position: u32, score: Score) {
        let mut state = self.state();
        if state.hears(attempt) {
            state.output.push_prompt_score(position, score);
            state.wake();
        }
    }

    /// Next tokens of a candidate. False: the client has read nothing for too long, and the request is over.
    pub fn push_tokens(&self, attempt: u32, candidate: u32, tokens: &[u32], scores: Vec<Score>) -> bool {
        let mut state = self.state();
        if !state.hears(attempt) || !state.output.is_open(candidate) {
            return true;
        }
        let buffered = state.output.buffered_tokens();
        if buffered > 0 && buffered + tokens.len() > self.max_buffered {
            state.output.clear();
            state.finish(End::Failed(Failure::SlowClient { buffered }));
            return false;
        }
        state.output.push_tokens(candidate, tokens, scores);
        state.said[candidate as usize].extend_from_slice(tokens);
        if state.said[candidate as usize].len() >= state.granted[candidate as usize] as usize {
            state.full_since.get_or_insert_with(Instant::now);
        }
        state.wake();
        true
    }

    /// Its client has read nothing for so long, though its buffer is full.
    pub fn is_stuck(&self, limit: Duration) -> bool {
        let state = self.state();
        state.end.is_none() && state.full_since.is_some_and(|since| since.elapsed() >= limit)
    }

    /// Its client counts as gone. False: it is over.
    pub fn give_up_reader(&self) -> bool {
        let mut state = self.state();
        let goes_on = state.end.is_none() && state.output.is_running();
        if goes_on {
            let buffered = state.output.buffered_tokens();
            state.output.clear();
            state.finish(End::Failed(Failure::SlowClient { buffered }));
        }
        goes_on
    }

    /// The last word about a candidate.
    pub fn push_finished(&self, attempt: u32, candidate: u32, why: Finish) {
        let mut state = self.state();
        if state.hears(attempt) && state.output.is_open(candidate) {
            state.output.push_finished(candidate, why);
            state.wake();
        }
    }

    // What the client's stream pulls.

    /// Resolves when a replica has accepted it, or when it ended.
    pub fn poll_accepted(&self, cx: &mut Context<'_>) -> Poll<Result<(), Refusal>> {
        let mut state = self.state();
        match &state.end {
            Some(End::Refused(refusal)) => Poll::Ready(Err(refusal.clone())),
            // The stream's first item says how.
            Some(End::Failed(_) | End::Gone) => Poll::Ready(Ok(())),
            None if state.accepted => Poll::Ready(Ok(())),
            None => state.sleep(cx),
        }
    }

    /// The next event, and whose window opens by its being read. After a failure, and after the last candidate's end,
    /// there is none.
    pub fn poll_event(
        &self,
        cx: &mut Context<'_>,
    ) -> (Poll<Option<Result<Event, Failure>>>, Option<Opening>) {
        let mut opening = None;
        let polled = self.poll_next(cx, &mut opening);
        (polled, opening)
    }

    fn poll_next(
        &self,
        cx: &mut Context<'_>,
        opening: &mut Option<Opening>,
    ) -> Poll<Option<Result<Event, Failure>>> {
        let mut state = self.state();
        if matches!(state.end, Some(End::Gone | End::Refused(_))) {
            return Poll::Ready(None);
        }
        // What had come before a failure is read before it, if the client had begun to read.
        let event = if state.bound {
            state.output.pop()
        } else if state.end.is_none() {
            state.output.start()
        } else {
            None
        };
        if let Some(event) = event {
            state.bound = true;
            if let Event::Tokens {
                candidate, tokens, ..
            } = &event
            {
                *opening = state.read(*candidate, tokens.len(), self.window);
            }
            return Poll::Ready(Some(Ok(event)));
        }
        let failure = match &state.end {
            Some(End::Failed(failure)) => failure.clone(),
            _ if state.output.is_running() => return state.sleep(cx),
            _ => return Poll::Ready(None),
        };
        state.end = Some(End::Gone);
        Poll::Ready(Some(Err(failure)))
    }

    /// The client wants no more of a candidate: what waits of it is dropped. Returns its link and handle, if it still
    /// runs.
    pub fn stop(&self, candidate: u32) -> Option<(Arc<Link>, u32)> {
        let mut state = self.state();
        match (state.output.stop(candidate), &state.place) {
            (true, Place::Placed(link, handles)) => Some((Arc::clone(link), handles[candidate as usize])),
            _ => None,
        }
    }

    /// The client left: nothing is pushed any more.
    pub fn leave(&self) -> Place {
        let mut state = self.state();
        let place = state.finish(End::Gone);
        state.output.clear();
        place
    }
}

impl State {
    /// The client has read tokens of a candidate; when half of its window is free again, it opens.
    fn read(&mut self, candidate: u32, tokens: usize, window: u32) -> Option<Opening> {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        self.read_tokens = self.read_tokens.saturating_add(tokens);
        self.full_since = None;
        let index = candidate as usize;
        self.read[index] = self.read[index].saturating_add(tokens);
        let opens = self.granted[index].saturating_sub(self.read[index]) <= window / 2;
        if !opens || !self.output.is_open(candidate) {
            return None;
        }
        self.granted[index] = self.read[index].saturating_add(window);
        match &self.place {
            Place::Placed(link, handles) => Some((Arc::clone(link), handles[index], self.granted[index])),
            Place::Nowhere | Place::Queued => None,
        }
    }

    /// Candidates whose last word was lost with the replica, though nothing is missing but that.
    fn close_full(&mut self, max_tokens: u32) {
        for candidate in 0..self.said.len() {
            let full = self.said[candidate].len() >= max_tokens as usize;
            let candidate = u32::try_from(candidate).expect("candidates are counted in 32 bits");
            if full && self.output.is_open(candidate) {
                self.output.push_finished(candidate, Finish::Length);
            }
        }
    }

    /// It goes on, and on this attempt.
    fn hears(&self, attempt: u32) -> bool {
        self.end.is_none() && self.attempt == attempt
    }

    /// Ends it, unless it ended before, well or not. The place is where somebody has to clean up.
    fn finish(&mut self, end: End) -> Place {
        let running = self.end.is_none() && self.output.is_running();
        if running || matches!(end, End::Gone) {
            if matches!(end, End::Failed(Failure::Deadline { .. })) {
                // Whatever waits is too late.
                self.output.clear();
            }
            self.end = Some(end);
        }
        self.wake();
        std::mem::replace(&mut self.place, Place::Nowhere)
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn sleep<T>(&mut self, cx: &mut Context<'_>) -> Poll<T> {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}
