//! What is believed about the replicas of one model.
//!
//! A replica is known from discovery on, connected after its Welcome, ready when its files are here, and draining
//! once it said so. Its work is counted from this router's own requests and corrected by what the replica reports,
//! because other routers send to it too and prompts are computed in chunks that nobody announces.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    breaker::Breaker,
    choose::{Ask, Choice},
    prefix::PrefixIndex,
    work::{Delta, Ticket, Work},
};

/// A replica, named by the caller; unique over all fleets of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(pub u32);

/// What a replica said of itself when it was connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Tokens in one step.
    pub max_step_tokens: u32,
    /// Tokens in a block of its cache, at least 1.
    pub block_tokens: u32,
    /// Blocks of its cache.
    pub n_blocks: u32,
    /// Measured by it; 0 when not known.
    pub prefill_tokens_per_second: u32,
}

/// What a replica reports while it runs, for all routers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences in the running batch.
    pub running: u32,
    /// Sequences that wait for it.
    pub waiting: u32,
    /// Prompt tokens still to be computed.
    pub pending_prefill_tokens: u32,
}

/// How a request ended on a replica, as far as the replica's health goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It generated what it should: this many tokens.
    Well {
        /// Generated.
        tokens: u32,
    },
    /// The replica failed.
    Failed,
    /// It had no room after all, though it had invited the request.
    Busy,
    /// Cancelled, refused, too late: nothing is said about the replica.
    Neutral,
}

/// Where a replica is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Discovered => Connected
    Down,
    /// Connected => (Ready | Down): it may not be chosen before the router has its files.
    Connected,
    /// Ready => (Draining | Down)
    Ready,
    /// Draining => Down: streams may finish; nobody new is let in.
    Draining,
}

/// One replica.
#[derive(Debug)]
pub struct Replica {
    stage: Stage,
    boot: Vec<u8>,
    pub(crate) capacity: Capacity,
    credits: i64,
    pub(crate) breaker: Breaker,
    pub(crate) index: PrefixIndex,
    work: Work,
    /// Prompt tokens to add to what this router counted; negative for chunks that are computed already.
    prefill_correction: i64,
    /// Requests of other routers.
    foreign_requests: u64,
    /// It had no room: others are asked first until then.
    pub(crate) busy_until: Duration,
    /// How often in a row.
    pushes: u32,
}

impl Replica {
    fn new() -> Self {
        Self {
            stage: Stage::Down,
            boot: Vec::new(),
            capacity: Capacity::default(),
            credits: 0,
            breaker: Breaker::default(),
            index: PrefixIndex::new(1),
            work: Work::default(),
            prefill_correction: 0,
            foreign_requests: 0,
            busy_until: Duration::ZERO,
            pushes: 0,
        }
    }

    /// It had no room. That is no failure, but whoever asks again at once hears the same.
    fn pushed_back(&mut self, now: Duration) {
        let doublings = self.pushes.min(8);
        self.busy_until = now + BUSY_MIN.saturating_mul(1 << doublings).min(BUSY_MAX);
        self.pushes += 1;
    }

    /// It may be given requests, its breaker and credits aside.
    pub fn is_ready(&self) -> bool {
        self.stage == Stage::Ready
    }

    /// It takes no new request; what runs goes on.
    pub fn is_draining(&self) -> bool {
        self.stage == Stage::Draining
    }

    /// This router's requests there.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Requests that it would take now. Below 0: candidates of a placed request wait for so many more.
    pub fn credits(&self) -> i64 {
        self.credits
    }

    /// Keys believed to be in its cache.
    pub fn index_len(&self) -> usize {
        self.index.len()
    }

    /// Outstanding tokens, everybody's, where a request of another router counts as `expected` tokens.
    pub fn outstanding(&self, expected: u32) -> u64 {
        let own = self.work.waiting_prefill + self.work.running_prefill;
        let prefill = own.saturating_add_signed(self.prefill_correction);
        prefill + self.work.decode + self.foreign_requests * u64::from(expected)
    }
}

/// How long a replica without room is asked after all others: some steps at first, then the time in which requests end.
const BUSY_MIN: Duration = Duration::from_millis(50);
const BUSY_MAX: Duration = Duration::from_secs(1);
/// The first guess of how long an answer is.
const EXPECTED_TOKENS: f64 = 256.0;
/// How much one answer changes the guess.
const EXPECTED_GAIN: f64 = 1.0 / 32.0;

/// The replicas of one model.
#[derive(Debug)]
pub struct Fleet {
    replicas: BTreeMap<ReplicaId, Replica>,
    mean_output: f64,
}

impl Default for Fleet {
    fn default() -> Self {
        Self {
            replicas: BTreeMap::new(),
            mean_output: EXPECTED_TOKENS,
        }
    }
}

impl Fleet {
    /// Discovered; an unknown id only.
    pub fn add(&mut self, id: ReplicaId) {
        self.replicas.entry(id).or_insert_with(Replica::new);
    }

    /// Gone from discovery, and its session is over.
    pub fn remove(&mut self, id: ReplicaId) {
        self.replicas.remove(&id);
    }

    /// All, in the order of their ids.
    pub fn replicas(&self) -> impl ExactSizeIterator<Item = (ReplicaId, &Replica)> {
        self.replicas.iter().map(|(id, replica)| (*id, replica))
    }

    /// One of them.
    pub fn replica(&self, id: ReplicaId) -> Option<&Replica> {
        self.replicas.get(&id)
    }

    /// A session began. A new `boot` means that its cache is empty.
    pub fn connected(&mut self, id: ReplicaId, capacity: Capacity, boot: &[u8], credits: u32) {
        let Some(replica) = self.replicas.get_mut(&id) else {
            return;
        };
        if replica.boot != boot || replica.capacity.n_blocks != capacity.n_blocks {
            replica.index = PrefixIndex::new(capacity.n_blocks as usize);
        }
        replica.boot = boot.to_vec();
        replica.capacity = capacity;
        replica.credits = i64::from(credits);
        replica.stage = Stage::Connected;
        replica.prefill_correction = 0;
        replica.foreign_requests = 0;
    }

    /// Everything is here that a request for it needs.
    pub fn ready(&mut self, id: ReplicaId) {
        self.advance(id, Stage::Connected, Stage::Ready);
    }

    /// It may not be chosen after all, though its session goes on.
    pub fn set_aside(&mut self, id: ReplicaId) {
        self.advance(id, Stage::Ready, Stage::Connected);
    }

    /// It said that it takes no new request, or discovery dropped it.
    pub fn draining(&mut self, id: ReplicaId) {
        self.advance(id, Stage::Connected, Stage::Draining);
        self.advance(id, Stage::Ready, Stage::Draining);
    }

    fn advance(&mut self, id: ReplicaId, from: Stage, to: Stage) {
        if let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.stage == from) {
            replica.stage = to;
        }
    }

    /// Its session is over; the tickets of what ran there are settled by the caller.
    pub fn down(&mut self, id: ReplicaId) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.stage = Stage::Down;
            replica.credits = 0;
            replica.prefill_correction = 0;
            replica.foreign_requests = 0;
        }
    }

    /// It invites this many more.
    pub fn grant(&mut self, id: ReplicaId, credits: u32) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.credits += i64::from(credits);
        }
    }

    /// It reported.
    pub fn report(&mut self, id: ReplicaId, load: Load) {
        let Some(replica) = self.replicas.get_mut(&id) else {
            return;
        };
        let own = replica.work.waiting_prefill + replica.work.running_prefill;
        let difference = i64::from(load.pending_prefill_tokens) - i64::try_from(own).unwrap_or(i64::MAX);
        // What has not begun cannot have progressed: it may only be on its way, later than this report.
        let begun = i64::try_from(replica.work.running_prefill).unwrap_or(i64::MAX);
        replica.prefill_correction = difference.max(-begun);
        let there = u64::from(load.running) + u64::from(load.waiting);
        replica.foreign_requests = there.saturating_sub(replica.work.requests);
    }

    /// Blocks entered its cache; with `snapshot`, they are all there is.
    pub fn stored(&mut self, id: ReplicaId, snapshot: bool, keys: &[u64]) {
        match self.replicas.get_mut(&id) {
            Some(replica) if snapshot => replica.index.snapshot(keys),
            Some(replica) => replica.index.stored(keys),
            None => {}
        }
    }

    /// Blocks left its cache.
    pub fn evicted(&mut self, id: ReplicaId, keys: &[u64]) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.index.removed(keys);
        }
    }

    /// Changes were missed: what is believed of its cache may be wrong, so nothing is.
    pub fn forget_cache(&mut self, id: ReplicaId) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.index.clear();
        }
    }

    /// Block sizes in use, ascending, each once.
    pub fn block_sizes(&self) -> Vec<u32> {
        let mut sizes: Vec<u32> = self
            .replicas
            .values()
            .map(|replica| replica.capacity.block_tokens)
            .filter(|&size| size > 0)
            .collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// How many tokens an answer of at most `max_tokens` is expected to have.
    pub fn expected_output(&self, max_tokens: u32) -> u32 {
        max_tokens.min(self.mean_output.ceil() as u32)
    }

    /// Takes the credits of a choice and returns a ticket for each candidate. More candidates than credits leave a
    /// debt: the caller sends the others as credits come, and nobody is placed there before.
    ///
    /// # Panics
    /// If the choice is not of this fleet as it is.
    pub fn place(&mut self, choice: &Choice, ask: &Ask<'_>) -> Vec<Ticket> {
        let expected = self.expected_output(ask.max_tokens);
        let replica = self
            .replicas
            .get_mut(&choice.replica)
            .expect("the choice came from this fleet");
        assert!(replica.credits > 0, "a choice has a credit at least");
        replica.credits -= i64::from(ask.candidates);
        replica.index.predict(ask.keys_of(replica.capacity.block_tokens));
        let probe = replica.breaker.placed();
        let uncached = ask.prompt_tokens - choice.cached_tokens;
        // The first candidate computes the prompt, the others find all but the last block in the cache.
        let shared = uncached.min(replica.capacity.block_tokens);
        (0..ask.candidates)
            .map(|candidate| {
                let uncached = if candidate == 0 { uncached } else { shared };
                let (ticket, delta) = Ticket::new(
                    choice.replica,
                    probe && candidate == 0,
                    ask.prompt_tokens,
                    uncached,
                    expected,
                );
                replica.work.apply(delta);
                ticket
            })
            .collect()
    }

    /// Requests were never sent: their credits are whole again.
    pub fn unsent(&mut self, id: ReplicaId, requests: u32) {
        self.grant(id, requests);
    }

    /// Adds what was heard of tickets.
    pub fn settle(&mut self, id: ReplicaId, delta: Delta) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.work.apply(delta);
        }
    }

    /// The last word about a ticket.
    pub fn finish(&mut self, ticket: Ticket, ending: Ending, now: Duration, draw: u64) {
        let (id, probe) = (ticket.replica(), ticket.is_probe());
        let delta = ticket.finish();
        if let Ending::Well { tokens } = ending {
            self.mean_output += (f64::from(tokens) - self.mean_output) * EXPECTED_GAIN;
        }
        let Some(replica) = self.replicas.get_mut(&id) else {
            return;
        };
        replica.work.apply(delta);
        match ending {
            Ending::Well { .. } => {
                replica.pushes = 0;
                replica.breaker.succeeded();
            }
            Ending::Failed => replica.breaker.failed(now, draw),
            Ending::Busy | Ending::Neutral => {
                if probe {
                    replica.breaker.probe_left(now);
                }
                if ending == Ending::Busy {
                    replica.pushed_back(now);
                }
            }
        }
    }

    /// The replica failed as a whole: one failure, however many requests it had.
    pub fn failed(&mut self, id: ReplicaId, now: Duration, draw: u64) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.breaker.failed(now, draw);
        }
    }
}
