//! Who waits for a replica: first come, first served for each model, within bounds over all models.
//!
//! The bounds are requests, prompt tokens and bytes, whichever is reached first. Whoever is turned away is told when
//! the queue will have drained, from how fast it has drained so far. A request that was let in once and must go to
//! another replica comes back at the front, and no bound turns it away.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use crate::rate::DrainRate;

/// A model, named by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(pub u32);

/// A request, named by the caller; unique while it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// The bounds, over all models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests.
    pub requests: u32,
    /// Prompt tokens.
    pub tokens: u64,
    /// Bytes in memory.
    pub bytes: u64,
}

/// A request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub id: RequestId,
    /// For a replica of which model.
    pub model: ModelId,
    /// Prompt tokens.
    pub tokens: u64,
    /// Bytes in memory.
    pub bytes: u64,
    /// It came then.
    pub since: Duration,
    /// It waits no longer than this.
    pub until: Duration,
}

/// How much waits, over all models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Requests.
    pub requests: u32,
    /// Prompt tokens.
    pub tokens: u64,
    /// Bytes in memory.
    pub bytes: u64,
}

/// A bound is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue is full ({what})")]
pub struct Full {
    /// Which bound: "requests", "tokens" or "bytes".
    pub what: &'static str,
    /// What waits now will have left by then.
    pub retry_after: Duration,
}

/// Places of a line, in order; those who come back get negative ones.
type Place = i64;

/// All lines.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    lines: HashMap<ModelId, BTreeMap<Place, Waiting>>,
    places: HashMap<RequestId, (ModelId, Place)>,
    ends: BTreeSet<(Duration, RequestId)>,
    next_back: Place,
    next_front: Place,
    depth: Depth,
    rate: DrainRate,
}

impl Queue {
    /// Nobody waits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            lines: HashMap::new(),
            places: HashMap::new(),
            ends: BTreeSet::new(),
            next_back: 0,
            next_front: -1,
            depth: Depth::default(),
            rate: DrainRate::default(),
        }
    }

    /// A new request comes in at the back.
    pub fn push(&mut self, waiting: Waiting, now: Duration) -> Result<(), Full> {
        let what = if self.depth.requests >= self.limits.requests {
            "requests"
        } else if self.depth.tokens + waiting.tokens > self.limits.tokens {
            "tokens"
        } else if self.depth.bytes + waiting.bytes > self.limits.bytes {
            "bytes"
        } else {
            self.insert(self.next_back, waiting, now);
            self.next_back += 1;
            return Ok(());
        };
        Err(Full {
            what,
            retry_after: self.retry_after(now),
        })
    }

    /// A request comes back and is the next of its model.
    pub fn push_front(&mut self, waiting: Waiting, now: Duration) {
        self.insert(self.next_front, waiting, now);
        self.next_front -= 1;
    }

    /// The next of a model.
    pub fn front(&self, model: ModelId) -> Option<&Waiting> {
        self.lines
            .get(&model)?
            .first_key_value()
            .map(|(_, waiting)| waiting)
    }

    /// The next of a model leaves for a replica.
    pub fn pop(&mut self, model: ModelId, now: Duration) -> Option<Waiting> {
        let id = self.front(model)?.id;
        let waiting = self.take(id)?;
        self.rate.left(waiting.tokens, now);
        self.note_idle(now);
        Some(waiting)
    }

    /// A request leaves without a replica. `None`: it does not wait.
    pub fn remove(&mut self, id: RequestId, now: Duration) -> Option<Waiting> {
        let waiting = self.take(id)?;
        self.note_idle(now);
        Some(waiting)
    }

    /// Those that waited as long as they may leave, the most overdue first.
    pub fn expire(&mut self, now: Duration) -> Vec<Waiting> {
        let mut expired = Vec::new();
        while let Some(&(_, id)) = self.ends.first().filter(|(until, _)| *until <= now) {
            expired.extend(self.take(id));
        }
        self.note_idle(now);
        expired
    }

    /// When `expire` is worth a call.
    pub fn next_end(&self) -> Option<Duration> {
        self.ends.first().map(|(until, _)| *until)
    }

    /// How much waits.
    pub fn depth(&self) -> Depth {
        self.depth
    }

    /// How many wait for a model.
    pub fn waiting_for(&self, model: ModelId) -> usize {
        self.lines.get(&model).map_or(0, BTreeMap::len)
    }

    /// When what waits now will have left.
    pub fn retry_after(&self, now: Duration) -> Duration {
        self.rate.retry_after(self.depth.tokens, now)
    }

    fn insert(&mut self, place: Place, waiting: Waiting, now: Duration) {
        let id = waiting.id;
        assert!(
            self.places.insert(id, (waiting.model, place)).is_none(),
            "{id:?} waits already"
        );
        self.ends.insert((waiting.until, id));
        self.depth.requests += 1;
        self.depth.tokens += waiting.tokens;
        self.depth.bytes += waiting.bytes;
        self.lines
            .entry(waiting.model)
            .or_default()
            .insert(place, waiting);
        self.rate.busy(now);
    }

    fn take(&mut self, id: RequestId) -> Option<Waiting> {
        let (model, place) = self.places.remove(&id)?;
        let line = self.lines.get_mut(&model).expect("a place is in a line");
        let waiting = line.remove(&place).expect("a place is taken");
        if line.is_empty() {
            self.lines.remove(&model);
        }
        self.ends.remove(&(waiting.until, id));
        self.depth.requests -= 1;
        self.depth.tokens -= waiting.tokens;
        self.depth.bytes -= waiting.bytes;
        Some(waiting)
    }

    fn note_idle(&mut self, now: Duration) {
        if self.places.is_empty() {
            self.rate.idle(now);
            assert_eq!(self.depth, Depth::default(), "an empty queue holds nothing");
        }
    }
}
