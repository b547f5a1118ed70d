//! What a replica still has to do, in tokens, as far as this router sent it.
//!
//! A `Ticket` follows one request on one replica and turns what is heard of it into `Delta`s; a `Work` is their sum.
//! Whatever happens to a request, its deltas add up to nothing once it is finished.

use std::ops::AddAssign;

use crate::fleet::ReplicaId;

/// Tokens that this router's requests still cost a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Prompt tokens to compute, of requests that the replica has not begun.
    pub waiting_prefill: u64,
    /// Prompt tokens of requests that it has begun and that show no token yet.
    pub running_prefill: u64,
    /// Tokens that are expected to be generated.
    pub decode: u64,
    /// Requests, each candidate by itself.
    pub requests: u64,
}

/// A change of `Work`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "work that is not settled is believed for ever"]
pub struct Delta {
    waiting_prefill: i64,
    running_prefill: i64,
    decode: i64,
    requests: i64,
}

impl AddAssign for Delta {
    fn add_assign(&mut self, other: Self) {
        self.waiting_prefill += other.waiting_prefill;
        self.running_prefill += other.running_prefill;
        self.decode += other.decode;
        self.requests += other.requests;
    }
}

impl Work {
    /// Adds a change.
    ///
    /// # Panics
    /// If more is taken away than was there: a ticket was settled twice.
    pub fn apply(&mut self, delta: Delta) {
        let add = |part: &mut u64, change: i64| {
            *part = part
                .checked_add_signed(change)
                .expect("tickets take away only what they added");
        };
        add(&mut self.waiting_prefill, delta.waiting_prefill);
        add(&mut self.running_prefill, delta.running_prefill);
        add(&mut self.decode, delta.decode);
        add(&mut self.requests, delta.requests);
    }
}

/// One request on one replica, from its placement to its last word.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    replica: ReplicaId,
    probe: bool,
    prompt: u32,
    predicted_cached: u32,
    stage: Stage,
    remaining: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// Not begun by the replica.
    Waiting { uncached: u32 },
    /// Begun; no token seen.
    Running { uncached: u32 },
    /// Tokens are coming.
    Decoding,
}

impl Ticket {
    pub(crate) fn new(
        replica: ReplicaId,
        probe: bool,
        prompt: u32,
        uncached: u32,
        expected: u32,
    ) -> (Self, Delta) {
        let ticket = Self {
            replica,
            probe,
            prompt,
            predicted_cached: prompt - uncached,
            stage: Stage::Waiting { uncached },
            remaining: expected,
        };
        let delta = Delta {
            waiting_prefill: i64::from(uncached),
            running_prefill: 0,
            decode: i64::from(expected),
            requests: 1,
        };
        (ticket, delta)
    }

    /// Where.
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// It tries a replica that had failed.
    pub fn is_probe(&self) -> bool {
        self.probe
    }

    /// Prompt tokens that were believed to be in the replica's cache when it was placed.
    pub fn predicted_cached(&self) -> u32 {
        self.predicted_cached
    }

    /// The replica runs it, and found this many prompt tokens in its cache.
    pub fn accepted(&mut self, cached: u32) -> Delta {
        let mut delta = Delta::default();
        if let Stage::Waiting { uncached } = self.stage {
            let actual = self.prompt.saturating_sub(cached);
            delta.waiting_prefill = -i64::from(uncached);
            delta.running_prefill = i64::from(actual);
            self.stage = Stage::Running { uncached: actual };
        }
        delta
    }

    /// It generated this many tokens.
    pub fn tokens(&mut self, count: u32) -> Delta {
        let mut delta = self.prefilled();
        let done = count.min(self.remaining);
        self.remaining -= done;
        delta.decode -= i64::from(done);
        delta
    }

    /// It is gone from the replica, for whatever reason.
    pub fn finish(mut self) -> Delta {
        let mut delta = self.prefilled();
        delta.decode -= i64::from(self.remaining);
        delta.requests -= 1;
        delta
    }

    fn prefilled(&mut self) -> Delta {
        let mut delta = Delta::default();
        match std::mem::replace(&mut self.stage, Stage::Decoding) {
            Stage::Waiting { uncached } => delta.waiting_prefill = -i64::from(uncached),
            Stage::Running { uncached } => delta.running_prefill = -i64::from(uncached),
            Stage::Decoding => {}
        }
        delta
    }
}
