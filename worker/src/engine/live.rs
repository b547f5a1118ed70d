//! The requests that live here: whose they are, and when what happened to them.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use swallow_rpc::worker::v1::finished::Reason;
use swallow_schedule::{Finish, SeqId};

use super::{Order, SessionId};
use crate::{grammar::Constraint, metrics::Timeline, sampling::TokenScore};

/// One request.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) session: SessionId,
    pub(super) handle: u32,
    pub(super) prompt_tokens: u32,
    max_tokens: u32,
    ends_at_eos: bool,
    arrived: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<(Instant, u32)>,
    output_tokens: u32,
    /// Position of the first prompt token whose score was not sent.
    next_score: u32,
    /// Tokens that another replica generated.
    resumed: u32,
    grammar: Option<Constraint>,
}

impl Live {
    pub(super) fn new(session: SessionId, handle: u32, order: &Order, arrived: Instant) -> Self {
        Self {
            session,
            handle,
            prompt_tokens: u32::try_from(order.prompt.len()).expect("the door bounds a prompt's length"),
            max_tokens: order.max_tokens,
            ends_at_eos: order.ends_at_eos,
            arrived,
            started: None,
            first_token: None,
            last_token: None,
            output_tokens: 0,
            next_score: 1, // Nothing predicts the first token.
            resumed: order.resumed,
            grammar: order.params.grammar.clone(),
        }
    }

    /// Why its output can't go on, if its grammar leaves it no way.
    pub(super) fn failure(&self) -> Option<&str> {
        self.grammar.as_ref()?.failure()
    }

    /// Tokens that it may generate here, of so many in all.
    pub(super) fn window(&self, output_tokens: u32) -> u32 {
        output_tokens.saturating_sub(self.resumed)
    }

    pub(super) fn started(&mut self, now: Instant) {
        self.started = Some(now);
    }

    pub(super) fn has_started(&self) -> bool {
        self.started.is_some()
    }

    pub(super) fn since_arrival(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.arrived)
    }

    pub(super) fn output_tokens(&self) -> u32 {
        self.output_tokens
    }

    /// Counts a token; gives the time since the one before.
    pub(super) fn token(&mut self, token: u32, now: Instant) -> Option<Duration> {
        self.output_tokens += 1;
        self.first_token.get_or_insert(now);
        let (last, _) = self.last_token.replace((now, token))?;
        Some(now.saturating_duration_since(last))
    }

    /// The scores not sent yet, with their positions: a sequence that is computed again after a preemption may score
    /// the same rows twice.
    pub(super) fn unscored<'a>(
        &mut self,
        first_position: u32,
        scores: &'a [TokenScore],
    ) -> impl Iterator<Item = (u32, &'a TokenScore)> + use<'a> {
        let from = self.next_score;
        let past =
            first_position + u32::try_from(scores.len()).expect("a step is bounded by max_step_tokens");
        self.next_score = from.max(past);
        (first_position..)
            .zip(scores)
            .filter(move |(position, _)| *position >= from)
    }

    /// The wire's reason, and the token that stopped it.
    pub(super) fn reason(&self, why: Finish, eos_token_ids: &[u32]) -> (Reason, Option<u32>) {
        if self.failure().is_some() {
            return (Reason::Rejected, None);
        }
        match why {
            Finish::Stop => {
                let stop = self.last_token.map(|(_, token)| token);
                let eos = self.ends_at_eos && stop.is_some_and(|token| eos_token_ids.contains(&token));
                (if eos { Reason::Eos } else { Reason::StopToken }, stop)
            }
            Finish::Length => (Reason::Length, None),
            Finish::Cancelled => (Reason::Cancelled, None),
            Finish::Deadline => (Reason::Deadline, None),
        }
    }

    pub(super) fn timeline(&self, now: Instant, output_tokens: u32) -> Timeline {
        let since = |at: Instant| at.saturating_duration_since(self.arrived);
        Timeline {
            started: self.started.map(since),
            first_token: self.first_token.map(since),
            last_token: self.last_token.map(|(at, _)| since(at)),
            finished: since(now),
            prompt_tokens: self.prompt_tokens,
            output_tokens,
            max_tokens: self.max_tokens,
        }
    }
}

/// All of them; each gets a number that no other ever had.
#[derive(Debug, Default)]
pub(super) struct Lives {
    by_seq: HashMap<SeqId, Live>,
    last: u64,
}

impl Lives {
    pub(super) fn next_id(&mut self) -> SeqId {
        self.last += 1;
        SeqId(self.last)
    }

    pub(super) fn insert(&mut self, seq: SeqId, live: Live) {
        self.by_seq.insert(seq, live);
    }

    pub(super) fn get_mut(&mut self, seq: SeqId) -> Option<&mut Live> {
        self.by_seq.get_mut(&seq)
    }

    pub(super) fn remove(&mut self, seq: SeqId) -> Option<Live> {
        self.by_seq.remove(&seq)
    }

    pub(super) fn len(&self) -> usize {
        self.by_seq.len()
    }

    pub(super) fn take_all(&mut self) -> Vec<Live> {
        self.by_seq.drain().map(|(_, live)| live).collect()
    }
}
