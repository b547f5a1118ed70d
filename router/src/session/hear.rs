//! What one step's frame means for the requests in it.
//!
//! Tokens go straight to their requests' buffers under the link's lock; what concerns placement and health is
//! collected as `Heard` and told to the dispatcher afterwards, once a frame.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use swallow_policy::{Delta, Ending, Ticket};
use swallow_rpc::worker::v1::{Accepted, Finished, LogprobColumns, StepOutput, cancel, finished::Reason};

use super::link::{Entry, Link, LinkState};
use crate::{
    ask::{Failure, Finish, Score},
    dispatch::Flight,
    observe::MoveCause,
};

/// What a frame tells the dispatcher.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Change of the replica's work.
    pub delta: Delta,
    /// Requests that are over there.
    pub endings: Vec<(Ticket, Ending)>,
    /// Requests that were cancelled before they were sent: as if they had never been placed.
    pub unsent: Vec<Ticket>,
    /// Requests that cannot stay: attempt, why, in the worker's words.
    pub evicted: Vec<(Arc<Flight>, u32, MoveCause, String)>,
    /// Predicted and actual cached tokens of prompts that were begun.
    pub begun: Vec<(u32, u32)>,
    /// How long cancels took.
    pub cancels: Vec<Duration>,
    /// Clients that were too slow.
    pub slow: usize,
    /// Tokens in the frame.
    pub tokens: usize,
}

/// A frame that makes no sense: nothing of this session can be believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the worker broke the protocol: {0}")]
pub(crate) struct Broken(String);

/// Scores of a frame's output tokens, for each handle in order of position.
type OutputScores = HashMap<u32, VecDeque<Score>>;

impl Link {
    /// Takes a frame in.
    pub fn hear(&self, frame: StepOutput) -> Result<Heard, Broken> {
        let mut state = self.state();
        let mut heard = Heard::default();
        if frame.handle.len() != frame.token_id.len() {
            let what = format!(
                "{} handles and {} tokens in a step",
                frame.handle.len(),
                frame.token_id.len()
            );
            return Err(Broken(what));
        }
        // Before anything is taken in: what a ticket has heard must reach the dispatcher, or its end does not add up.
        if let Some(columns) = &frame.logprobs {
            check(columns)?;
        }
        for accepted in &frame.accepted {
            state.accepted(accepted, &mut heard);
        }
        let mut scores = match &frame.logprobs {
            Some(columns) => state.scores(columns),
            None => OutputScores::new(),
        };
        for (&handle, &token) in frame.handle.iter().zip(&frame.token_id) {
            state.token(handle, token, &mut scores, &mut heard);
        }
        for finished in frame.finished {
            state.finished(finished, &mut heard);
        }
        heard.tokens = frame.handle.len();
        Ok(heard)
    }
}

impl Link {
    /// Ends requests whose clients have read nothing for so long, though all that they may have waits for them.
    pub fn cut_slow(&self, limit: Duration) -> Heard {
        let mut state = self.state();
        let mut heard = Heard::default();
        let is_slow = |entry: &&Entry| entry.cancelled.is_none() && entry.flight.is_stuck(limit);
        let entries = state.entries.iter().flatten().filter(is_slow);
        let slow: Vec<Arc<Flight>> = entries.map(|entry| Arc::clone(&entry.flight)).collect();
        for flight in slow {
            if flight.give_up_reader() {
                heard.slow += 1;
                state.cut(&flight, cancel::Reason::ClientGone, &mut heard);
            }
        }
        heard
    }
}

impl LinkState {
    fn accepted(&mut self, accepted: &Accepted, heard: &mut Heard) {
        // An unknown handle: a request that was cancelled before it was sent is not known to the worker, and all
        // others are known here until their last word. Nothing can be done for a handle that names nobody.
        let Some(entry) = self.entry_mut(accepted.handle) else {
            return;
        };
        heard.delta += entry.ticket.accepted(accepted.cached_tokens);
        entry
            .flight
            .push_accepted(entry.attempt, entry.candidate, accepted.cached_tokens);
        if entry.candidate == 0 {
            heard
                .begun
                .push((entry.ticket.predicted_cached(), accepted.cached_tokens));
        }
    }

    fn token(&mut self, handle: u32, token: u32, scores: &mut OutputScores, heard: &mut Heard) {
        let Some(entry) = self.entry_mut(handle) else {
            return;
        };
        entry.heard += 1;
        heard.delta += entry.ticket.tokens(1);
        if entry.cancelled.is_some() {
            return;
        }
        let score = scores.get_mut(&handle).and_then(VecDeque::pop_front);
        let flight = &entry.flight;
        if flight.ask.logprobs.is_some() && score.as_ref().is_none_or(|score| score.token != token) {
            let flight = Arc::clone(flight);
            let text = format!("token {} came without its log-probability", entry.heard);
            flight.fail(Failure::Worker(text));
            self.cut(&flight, cancel::Reason::ClientGone, heard);
            return;
        }
        let score = score.filter(|_| flight.ask.logprobs.is_some());
        let scores = score.into_iter().collect();
        if !flight.push_tokens(entry.attempt, entry.candidate, &[token], scores) {
            let flight = Arc::clone(flight);
            heard.slow += 1;
            self.cut(&flight, cancel::Reason::ClientGone, heard);
        }
    }

    /// The request is over for its client; the worker is told for each candidate.
    fn cut(&mut self, flight: &Arc<Flight>, reason: cancel::Reason, heard: &mut Heard) {
        for handle in self.handles_of(flight) {
            heard.unsent.extend(self.cancel(handle, reason));
        }
    }

    /// `columns` passed `check`.
    fn scores(&mut self, columns: &LogprobColumns) -> OutputScores {
        let mut outputs = OutputScores::new();
        let mut top = columns
            .top_ids
            .iter()
            .copied()
            .zip(columns.top_logprobs.iter().copied());
        for row in 0..columns.handle.len() {
            let score = Score {
                token: columns.token_id[row],
                logprob: columns.logprob[row],
                rank: columns.rank[row],
                top: top.by_ref().take(columns.top_n[row] as usize).collect(),
            };
            let (handle, position) = (columns.handle[row], columns.position[row]);
            let Some(entry) = self.entry_mut(handle) else {
                continue;
            };
            if position as usize >= entry.flight.ask.prompt.len() {
                outputs.entry(handle).or_default().push_back(score);
            } else if entry.candidate == 0 {
                entry.flight.push_prompt_score(entry.attempt, position, score);
            }
        }
        outputs
    }

    fn finished(&mut self, finished: Finished, heard: &mut Heard) {
        let Some(entry) = self.take(finished.handle) else {
            return;
        };
        if let Some(since) = entry.cancelled {
            heard.cancels.push(since.elapsed());
            heard.endings.push((entry.ticket, Ending::Neutral));
            return;
        }
        let draining = self.draining;
        let ending = match finished.reason() {
            Reason::Eos => self.ended(&entry, &finished, Finish::Eos, heard),
            Reason::StopToken => self.ended(&entry, &finished, Finish::StopToken, heard),
            Reason::Length => self.ended(&entry, &finished, |_| Finish::Length, heard),
            Reason::Deadline => {
                entry.flight.expire();
                self.cut(&entry.flight, cancel::Reason::Deadline, heard);
                Ending::Neutral
            }
            Reason::Rejected => {
                entry
                    .flight
                    .refuse(crate::ask::Refusal::Invalid(finished.message));
                self.cut(&entry.flight, cancel::Reason::ClientGone, heard);
                Ending::Neutral
            }
            // The worker ends by itself only what its shutdown leaves no time for, or what its engine fails at: another
            // one goes on with it.
            reason => {
                let failed = matches!(reason, Reason::Error | Reason::Unspecified);
                let cause = match (draining, failed) {
                    (true, _) => MoveCause::Draining,
                    (false, true) => MoveCause::Lost,
                    (false, false) => MoveCause::Busy,
                };
                let text = Some(finished.message).filter(|text| !text.is_empty());
                let text = text.unwrap_or_else(|| "the replica gave the request back".into());
                heard
                    .evicted
                    .push((Arc::clone(&entry.flight), entry.attempt, cause, text));
                match cause {
                    MoveCause::Lost => Ending::Failed,
                    MoveCause::Busy => Ending::Busy,
                    MoveCause::Draining => Ending::Neutral,
                }
            }
        };
        heard.endings.push((entry.ticket, ending));
    }

    fn ended(
        &mut self,
        entry: &Entry,
        finished: &Finished,
        why: impl FnOnce(u32) -> Finish,
        heard: &mut Heard,
    ) -> Ending {
        // A stream that lost a token must not look whole.
        if finished.output_tokens != entry.heard {
            let text = format!(
                "it counts {} tokens, {} came",
                finished.output_tokens, entry.heard
            );
            entry.flight.fail(Failure::Worker(text));
            self.cut(&entry.flight, cancel::Reason::ClientGone, heard);
            return Ending::Failed;
        }
        let why = why(finished.stop_token_id.unwrap_or_default());
        entry.flight.push_finished(entry.attempt, entry.candidate, why);
        Ending::Well { tokens: entry.heard }
    }
}

/// Whether the columns are rows.
fn check(columns: &LogprobColumns) -> Result<(), Broken> {
    let rows = columns.handle.len();
    let lengths = [
        columns.position.len(),
        columns.token_id.len(),
        columns.logprob.len(),
        columns.rank.len(),
        columns.top_n.len(),
    ];
    let tops: usize = columns.top_n.iter().map(|&n| n as usize).sum();
    if lengths.iter().any(|&n| n != rows)
        || columns.top_ids.len() != tops
        || columns.top_logprobs.len() != tops
    {
        return Err(Broken("columns of log-probabilities differ in length".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use swallow_policy::{Ask as Asked, Capacity, Fleet, ModelId, ReplicaId, RequestId, Work, choose};

    use super::*;
    use crate::{
        ask::{Ask, Sampling},
        dispatch::Buffers,
    };

    fn ask() -> Ask {
        Ask {
            model: "m".into(),
            uuid: uuid::Uuid::nil(),
            prompt: [1, 2, 3].into(),
            candidates: 1,
            sampling: Sampling::default(),
            max_tokens: 5,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            grammar: None,
            logprobs: Some(0),
            prompt_logprobs: None,
            prompt_logprobs_from: 1,
            text_bytes: 0,
            cache_salt: 0,
            share: Default::default(),
            deadline: None,
            max_queue_wait: None,
        }
    }

    #[test]
    fn a_frame_that_makes_no_sense_leaves_the_work_in_order() {
        let (replica, model) = (ReplicaId(1), ModelId(0));
        let mut fleet = Fleet::default();
        let capacity = Capacity {
            max_step_tokens: 512,
            block_tokens: 16,
            n_blocks: 64,
            prefill_tokens_per_second: 1000,
        };
        fleet.add(replica);
        fleet.connected(replica, capacity, b"boot", 4);
        fleet.ready(replica);
        let asked = Asked {
            prompt_tokens: 3,
            max_tokens: 5,
            candidates: 1,
            keys: &[],
            excluded: &[],
        };
        let choice = choose(&fleet, &asked, Duration::ZERO, 0).expect("it is ready");
        let tickets = fleet.place(&choice, &asked);
        let buffers = Buffers {
            tokens: 100,
            bytes: 1 << 20,
        };
        let link = Link::new((replica, "r".into()), (model, "m".into()));
        let flight = Flight::new(RequestId(1), model, ask(), Vec::new(), buffers);
        let handles = link
            .submit(&flight, 0, &flight.parts(), tickets)
            .expect("it is open");

        let frame = StepOutput {
            accepted: vec![Accepted {
                handle: handles[0],
                cached_tokens: 1,
            }],
            logprobs: Some(LogprobColumns {
                handle: vec![handles[0]],
                ..LogprobColumns::default()
            }),
            ..StepOutput::default()
        };
        assert!(link.hear(frame).is_err());
        for entry in link.close() {
            fleet.finish(entry.ticket, Ending::Neutral, Duration::ZERO, 0);
        }
        let left = fleet.replica(replica).expect("it is there").work();
        assert_eq!(left, Work::default());
    }
}
