//! Everything that is decided about, under one lock: who waits, the fleets, which session belongs to whom.
//!
//! Methods here change state and return what is left to do; they neither wait nor read a clock.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use swallow_policy::{
    Ask, Blocked, Choice, Ending, Fleet, ModelId, Queue, ReplicaId, RequestId, RetryBudget, Ticket, Waiting,
    choose,
};
use swallow_rpc::worker::v1::cancel;
use tokio_util::sync::CancellationToken;

use super::{Flight, Part};
use crate::{
    discover::Replica,
    fleet::{ModelEntry, ModelFiles},
    observe::ReplicaState,
    session::Link,
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Core {
    pub models: Vec<Model>,
    pub replicas: BTreeMap<ReplicaId, Known>,
    pub queue: Queue,
    pub waiting: HashMap<RequestId, Arc<Flight>>,
    pub retries: RetryBudget,
    pub stopping: bool,
    /// Nothing goes on elsewhere any more: sessions are being cut.
    pub cut: bool,
    /// When discovery gave its first set.
    pub discovered: Option<Duration>,
    /// When resting replicas may be tried that somebody waits for.
    rested: BTreeSet<(Duration, ModelId)>,
    next_request: u64,
    next_replica: u32,
}

/// A model and its replicas.
#[derive(Debug)]
pub(crate) struct Model {
    pub name: Arc<str>,
    pub aliases: Vec<String>,
    pub fleet: Fleet,
    /// What prompts are made for; every ready replica has it.
    pub spec: Option<Spec>,
    /// What every ready replica can do, or could when there was one.
    pub max_model_len: u32,
}

/// What replicas must share to serve one model: the same tokens mean the same text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spec {
    pub vocab_size: u32,
    pub eos_token_ids: Vec<u32>,
    pub files: Arc<ModelFiles>,
}

/// A discovered replica.
#[derive(Debug)]
pub(crate) struct Known {
    pub replica: Replica,
    pub name: Arc<str>,
    pub model: ModelId,
    pub link: Option<Arc<Link>>,
    /// What it offers, once its files are here.
    pub offer: Option<Offer>,
    /// It serves something else than the model's ready replicas.
    pub aside: bool,
    /// Its first attempt is over: its files came, or they did not.
    pub tried: bool,
    /// As last told to the observer.
    pub state: ReplicaState,
    /// Ends its session when its streams are done.
    pub leave: CancellationToken,
}

/// What one replica serves.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub spec: Spec,
    pub max_model_len: u32,
}

impl Core {
    pub fn new(queue: Queue) -> Self {
        Self {
            models: Vec::new(),
            replicas: BTreeMap::new(),
            queue,
            waiting: HashMap::new(),
            retries: RetryBudget::default(),
            stopping: false,
            cut: false,
            discovered: None,
            rested: BTreeSet::new(),
            next_request: 0,
            next_replica: 0,
        }
    }

    pub fn model(&self, id: ModelId) -> &Model {
        &self.models[id.0 as usize]
    }

    pub fn model_mut(&mut self, id: ModelId) -> &mut Model {
        &mut self.models[id.0 as usize]
    }

    /// The fleet of a replica.
    pub fn fleet_of(&mut self, link: &Link) -> &mut Fleet {
        &mut self.model_mut(link.model).fleet
    }

    pub fn links(&self) -> impl Iterator<Item = &Arc<Link>> {
        self.replicas.values().filter_map(|known| known.link.as_ref())
    }

    pub fn new_request(&mut self) -> RequestId {
        self.next_request += 1;
        RequestId(self.next_request)
    }

    pub fn new_replica(&mut self) -> ReplicaId {
        self.next_replica += 1;
        ReplicaId(self.next_replica)
    }

    /// Whether every replica of discovery's first set was tried, or had until `limit` after it.
    pub fn settle(&self, now: Duration, limit: Duration) -> bool {
        let Some(discovered) = self.discovered else {
            return false;
        };
        let is_through = |known: &Known| known.tried || known.leave.is_cancelled();
        now.saturating_sub(discovered) >= limit || self.replicas.values().all(is_through)
    }

    /// When the clock has something to do.
    pub fn next_due(&self) -> Option<Duration> {
        self.queue
            .next_end()
            .into_iter()
            .chain(self.rested.first().map(|(at, _)| *at))
            .min()
    }

    /// A model of which some replica has rested by now.
    pub fn take_rested(&mut self, now: Duration) -> Option<ModelId> {
        self.rested
            .first()
            .is_some_and(|(at, _)| *at <= now)
            .then(|| self.rested.pop_first())?
            .map(|(_, model)| model)
    }

    /// Somebody waits for a replica that rests until then.
    pub fn note_resting(&mut self, until: Duration, model: ModelId) {
        self.rested.insert((until, model));
    }

    /// Puts a flight into the queue, where it was first if it comes back.
    pub fn wait(&mut self, flight: &Arc<Flight>, waiting: Waiting, now: Duration) {
        if flight.queued() {
            self.queue.push_front(waiting, now);
            self.waiting.insert(flight.id, Arc::clone(flight));
        }
    }

    /// Chooses a replica for what a flight has to run and submits that. `Err`: nobody can take it now.
    pub fn place(
        &mut self,
        flight: &Arc<Flight>,
        parts: &[Part],
        now: Duration,
        draw: u64,
    ) -> Result<(Choice, Arc<Link>), Blocked> {
        let said = parts.iter().map(|part| part.said.len()).max().unwrap_or(0);
        let prompt_tokens = flight.ask.prompt.len() + said;
        let model = &mut self.models[flight.model.0 as usize];
        loop {
            let boot = |id| {
                self.replicas
                    .get(&id)?
                    .link
                    .as_ref()?
                    .boot
                    .get()
                    .map(Vec::as_slice)
            };
            let excluded = flight.excluded(boot);
            let ask = Ask {
                prompt_tokens: u32::try_from(prompt_tokens).expect("bounded by max_model_len"),
                max_tokens: flight
                    .ask
                    .max_tokens
                    .saturating_sub(u32::try_from(said).unwrap_or(u32::MAX)),
                candidates: u32::try_from(parts.len()).expect("candidates are counted in 32 bits"),
                keys: &flight.keys,
                excluded: &excluded,
            };
            let choice = choose(&model.fleet, &ask, now, draw)?;
            let tickets = model.fleet.place(&choice, &ask);
            let known = self
                .replicas
                .get(&choice.replica)
                .expect("a replica of a fleet is known");
            let link = Arc::clone(known.link.as_ref().expect("a ready replica has a session"));
            match link.submit(flight, flight.attempt(), parts, tickets) {
                Ok(handles) => {
                    if let Err(handles) = flight.placed(Arc::clone(&link), handles) {
                        let unsent = link.cancel(flight, &handles, cancel::Reason::ClientGone);
                        take_back(&mut model.fleet, unsent, now);
                    }
                    return Ok((choice, link));
                }
                Err((_closed, tickets)) => {
                    // Its task is about to say so.
                    model.fleet.down(choice.replica);
                    tickets
                        .into_iter()
                        .for_each(|ticket| model.fleet.finish(ticket, Ending::Neutral, now, draw));
                }
            }
        }
    }

    /// Makes those replicas ready that serve what prompts are made for. If nobody does any more, what the first
    /// connected one offers becomes that. Returns the names of replicas that are set aside by this.
    pub fn settle_spec(&mut self, id: ModelId) -> Vec<Arc<str>> {
        let model = &mut self.models[id.0 as usize];
        let offers = || {
            let of_model = self
                .replicas
                .iter()
                .filter(move |(_, known)| known.model == id && known.link.is_some());
            of_model.filter_map(|(id, known)| Some((*id, known, known.offer.as_ref()?)))
        };
        if !model.fleet.replicas().any(|(_, replica)| replica.is_ready()) {
            let takes = |id: &ReplicaId| {
                model
                    .fleet
                    .replica(*id)
                    .is_some_and(|replica| !replica.is_draining())
            };
            if let Some((_, _, offer)) = offers().find(|(id, ..)| takes(id)) {
                model.spec = Some(offer.spec.clone());
            }
        }
        let same: Vec<(ReplicaId, bool)> = offers()
            .map(|(id, _, offer)| (id, model.spec.as_ref() == Some(&offer.spec)))
            .collect();
        let mut set_aside = Vec::new();
        for (id, same) in same {
            let known = self.replicas.get_mut(&id).expect("listed above");
            if same {
                model.fleet.ready(id);
            } else {
                model.fleet.set_aside(id);
                if !known.aside {
                    set_aside.push(Arc::clone(&known.name));
                }
            }
            known.aside = !same;
        }
        set_aside
    }

    /// A model as its clients see it.
    pub fn entry(&mut self, id: ModelId) -> ModelEntry {
        let model = &mut self.models[id.0 as usize];
        let ready = |id: &ReplicaId| model.fleet.replica(*id).is_some_and(|replica| replica.is_ready());
        let offers: Vec<&Offer> = self
            .replicas
            .iter()
            .filter(|(id, _)| ready(id))
            .filter_map(|(_, known)| known.offer.as_ref())
            .collect();
        model.max_model_len = offers
            .iter()
            .map(|offer| offer.max_model_len)
            .min()
            .unwrap_or(model.max_model_len);
        ModelEntry {
            name: model.name.to_string(),
            aliases: model.aliases.clone(),
            files: model.spec.as_ref().map(|spec| Arc::clone(&spec.files)),
            max_model_len: model.max_model_len,
            vocab_size: model.spec.as_ref().map_or(0, |spec| spec.vocab_size),
            eos_token_ids: model
                .spec
                .as_ref()
                .map_or_else(Vec::new, |spec| spec.eos_token_ids.clone()),
            ready_replicas: offers.len(),
            id,
            block_sizes: model.fleet.block_sizes(),
        }
    }

    /// Where a replica is in its life.
    pub fn state_of(&self, id: ReplicaId) -> ReplicaState {
        let Some(known) = self.replicas.get(&id) else {
            return ReplicaState::Gone;
        };
        match self.model(known.model).fleet.replica(id) {
            Some(replica) if replica.is_ready() => ReplicaState::Ready,
            Some(replica) if replica.is_draining() => ReplicaState::Draining,
            _ if known.link.is_some() => ReplicaState::Connected,
            _ => ReplicaState::Down,
        }
    }
}

/// Requests that were never sent: as if they had not been placed.
pub(crate) fn take_back(fleet: &mut Fleet, unsent: Vec<Ticket>, now: Duration) {
    for ticket in unsent {
        fleet.unsent(ticket.replica(), 1);
        fleet.finish(ticket, Ending::Neutral, now, 0);
    }
}
