//! Who waits for a replica: by priority, fair by tenant, first come, first served for each of them, within bounds over
//! all models.
//!
//! The bounds are requests, prompt tokens and bytes, whichever is reached first. At a bound, whoever has more than
//! its share makes room: the newest of a lower priority, else the newest of the tenant that has most for its weight,
//! and if that is the one who comes, it is turned away. It is told when the queue will have drained, from how fast it has
//! drained so far. A request that was let in once and must go to another replica comes back at the front, and no bound
//! turns it away.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use crate::{
    lines::{Line, Place, Spot},
    rate::DrainRate,
};

/// A model, named by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelId(pub u32);

/// A request, named by the caller; unique while it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Who asks, named by the caller; 0 where nobody is told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(pub u32);

/// Whose requests go first. A lower one waits for as long as any of a higher one does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// What may wait, as evaluations.
    Low,
    /// The usual.
    #[default]
    Normal,
    /// What people wait for.
    High,
}

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
    /// Whose.
    pub tenant: TenantId,
    /// The tenant's share of the tokens, against that of others; at least 1.
    pub weight: u32,
    /// Before whom.
    pub priority: Priority,
    /// Prompt tokens.
    pub tokens: u64,
    /// What it costs a replica, in tokens: prompt and expected output.
    pub work: u64,
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

impl Depth {
    fn add(&mut self, waiting: &Waiting) {
        self.requests += 1;
        self.tokens += waiting.tokens;
        self.bytes += waiting.bytes;
    }

    fn take(&mut self, waiting: &Waiting) {
        self.requests -= 1;
        self.tokens -= waiting.tokens;
        self.bytes -= waiting.bytes;
    }
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

/// Where somebody waits.
#[derive(Clone, Copy, Debug)]
struct At {
    model: ModelId,
    priority: Priority,
    tenant: TenantId,
    spot: Spot,
}

/// What a tenant has in the queue.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    weight: u64,
    depth: Depth,
}

impl Held {
    /// Its share of a bound, in units that can be compared between tenants.
    fn share(&self, what: Bound, more: u64) -> u64 {
        const UNIT: u64 = 1 << 16; // Keeps the fractions that a weight makes.
        let held = match what {
            Bound::Requests => u64::from(self.depth.requests),
            Bound::Tokens => self.depth.tokens,
            Bound::Bytes => self.depth.bytes,
        };
        (held + more).saturating_mul(UNIT) / self.weight.max(1)
    }
}

/// Which bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bound {
    Requests,
    Tokens,
    Bytes,
}

impl Bound {
    fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
            Self::Bytes => "bytes",
        }
    }

    fn of(self, waiting: &Waiting) -> u64 {
        match self {
            Self::Requests => 1,
            Self::Tokens => waiting.tokens,
            Self::Bytes => waiting.bytes,
        }
    }
}

/// All lines.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    lines: HashMap<ModelId, Line>,
    places: HashMap<RequestId, At>,
    held: HashMap<TenantId, Held>,
    work: u64,
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
            held: HashMap::new(),
            work: 0,
            ends: BTreeSet::new(),
            next_back: 0,
            next_front: -1,
            depth: Depth::default(),
            rate: DrainRate::default(),
        }
    }

    /// A new request comes in at the back of its tenant's line. Returns those who have to leave for it: lower priorities,
    /// or whoever had more than its share.
    pub fn push(&mut self, waiting: Waiting, now: Duration) -> Result<Vec<Waiting>, Full> {
        let mut pushed_out = Vec::new();
        while let Some(what) = self.bound_reached(&waiting) {
            let Some(id) = self.makes_room(what, &waiting) else {
                return self.turned_away(what, pushed_out, now);
            };
            pushed_out.extend(self.take(id, false));
        }
        let spot = Spot {
            returned: false,
            place: self.next_back,
        };
        self.insert(spot, waiting, now);
        self.next_back += 1;
        Ok(pushed_out)
    }

    fn turned_away(&mut self, what: Bound, back: Vec<Waiting>, now: Duration) -> Result<Vec<Waiting>, Full> {
        // Nobody leaves for a request that is refused all the same. They were the newest of their lines.
        for waiting in back.into_iter().rev() {
            let spot = Spot {
                returned: false,
                place: self.next_back,
            };
            self.insert(spot, waiting, now);
            self.next_back += 1;
        }
        Err(Full {
            what: what.name(),
            retry_after: self.retry_after(now),
        })
    }

    fn bound_reached(&self, waiting: &Waiting) -> Option<Bound> {
        if self.depth.requests >= self.limits.requests {
            Some(Bound::Requests)
        } else if self.depth.tokens + waiting.tokens > self.limits.tokens {
            Some(Bound::Tokens)
        } else if self.depth.bytes + waiting.bytes > self.limits.bytes {
            Some(Bound::Bytes)
        } else {
            None
        }
    }

    /// Who leaves for a request; `None`: itself.
    fn makes_room(&self, what: Bound, waiting: &Waiting) -> Option<RequestId> {
        if what.of(waiting)
            > match what {
                Bound::Requests => u64::from(self.limits.requests),
                Bound::Tokens => self.limits.tokens,
                Bound::Bytes => self.limits.bytes,
            }
        {
            return None;
        }
        let own = Held {
            weight: u64::from(waiting.weight),
            ..self.held.get(&waiting.tenant).copied().unwrap_or_default()
        };
        let own_share = own.share(what, what.of(waiting));
        let flows = self.lines.values().flat_map(|line| {
            line.flows()
                .map(move |(priority, tenant)| (line, priority, tenant))
        });
        // Few flows wait, whatever the number of requests.
        let goes = flows
            .filter(|(_, priority, tenant)| {
                let more = || self.held[tenant].share(what, 0) > own_share;
                *priority < waiting.priority
                    || *priority == waiting.priority && *tenant != waiting.tenant && more()
            })
            .min_by_key(|(_, priority, tenant)| {
                (
                    *priority,
                    std::cmp::Reverse(self.held[tenant].share(what, 0)),
                    *tenant,
                )
            });
        let (_, priority, tenant) = goes?;
        let newest = |line: &Line| line.newest(priority, tenant);
        let newest = self.lines.values().filter_map(newest).max();
        newest.map(|(_, id)| id)
    }

    /// A request comes back and is the next of its model.
    pub fn push_front(&mut self, waiting: Waiting, now: Duration) {
        let spot = Spot {
            returned: true,
            place: self.next_front,
        };
        self.insert(spot, waiting, now);
        self.next_front -= 1;
    }

    /// The next of a model.
    pub fn front(&self, model: ModelId) -> Option<&Waiting> {
        self.lines.get(&model)?.front()
    }

    /// The next of a model leaves for a replica.
    pub fn pop(&mut self, model: ModelId, now: Duration) -> Option<Waiting> {
        let id = self.front(model)?.id;
        let waiting = self.take(id, true)?;
        self.rate.left(waiting.work, now);
        self.note_idle(now);
        Some(waiting)
    }

    /// A request leaves without a replica. `None`: it does not wait.
    pub fn remove(&mut self, id: RequestId, now: Duration) -> Option<Waiting> {
        let waiting = self.take(id, false)?;
        self.note_idle(now);
        Some(waiting)
    }

    /// Those that waited as long as they may leave, the most overdue first.
    pub fn expire(&mut self, now: Duration) -> Vec<Waiting> {
        let mut expired = Vec::new();
        while let Some(&(_, id)) = self.ends.first().filter(|(until, _)| *until <= now) {
            expired.extend(self.take(id, false));
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
        self.lines.get(&model).map_or(0, Line::len)
    }

    /// When what waits now will have left.
    pub fn retry_after(&self, now: Duration) -> Duration {
        self.rate.retry_after(self.work, now)
    }

    fn insert(&mut self, spot: Spot, waiting: Waiting, now: Duration) {
        let id = waiting.id;
        let at = At {
            model: waiting.model,
            priority: waiting.priority,
            tenant: waiting.tenant,
            spot,
        };
        assert!(self.places.insert(id, at).is_none(), "{id:?} waits already");
        self.ends.insert((waiting.until, id));
        self.depth.add(&waiting);
        let held = self.held.entry(waiting.tenant).or_default();
        held.weight = u64::from(waiting.weight.max(1));
        held.depth.add(&waiting);
        self.work += waiting.work;
        self.lines.entry(waiting.model).or_default().insert(spot, waiting);
        self.rate.busy(now);
    }

    fn take(&mut self, id: RequestId, served: bool) -> Option<Waiting> {
        let at = self.places.remove(&id)?;
        let line = self.lines.get_mut(&at.model).expect("a place is in a line");
        let taken = line.take(at.spot, at.priority, at.tenant, served);
        let waiting = taken.expect("a place is taken");
        if line.len() == 0 {
            self.lines.remove(&at.model);
        }
        self.ends.remove(&(waiting.until, id));
        self.depth.take(&waiting);
        let held = self.held.get_mut(&at.tenant).expect("whoever waits is counted");
        held.depth.take(&waiting);
        if held.depth.requests == 0 {
            self.held.remove(&at.tenant);
        }
        self.work -= waiting.work;
        Some(waiting)
    }

    fn note_idle(&mut self, now: Duration) {
        if self.places.is_empty() {
            self.rate.idle(now);
            assert_eq!(self.depth, Depth::default(), "an empty queue holds nothing");
        }
    }
}
