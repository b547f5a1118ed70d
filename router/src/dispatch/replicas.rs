//! What discovery and the sessions tell, and what follows from it: who is ready, who is lost, who moves.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, atomic::Ordering},
};

use swallow_policy::{Capacity, Fleet, Load, ModelId, ReplicaId, Ticket};
use swallow_rpc::worker::v1::{KvEvents, LoadReport, Welcome, cancel};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{
    Core, Eviction, Flight, Place, SETTLE_LIMIT, Shared, Withdrawn,
    core::{Known, Model, Offer, Spec, take_back},
};
use crate::{
    ask::Refusal,
    discover::Replica,
    fleet::ModelFiles,
    observe::{MoveCause, ReplicaState},
    session::{Heard, Link, Lost, Target},
};

impl Shared {
    /// Takes a whole set in. Returns the replicas that need a session; those that are gone are told to leave.
    pub fn discovered(&self, set: Vec<Replica>, cut: &CancellationToken) -> Vec<Target> {
        let mut core = self.lock();
        let core = &mut *core;
        core.discovered.get_or_insert(self.now());
        let staying: HashSet<&Replica> = set.iter().collect();
        // Ascending: a new model is published before those that were found after it.
        let mut touched: BTreeSet<ModelId> = BTreeSet::new();
        for (id, known) in &core.replicas {
            if !staying.contains(&known.replica) && !known.leave.is_cancelled() {
                known.leave.cancel();
                core.models[known.model.0 as usize].fleet.draining(*id);
                touched.insert(known.model);
            }
        }
        let mut targets = Vec::new();
        for replica in set {
            let here = |known: &Known| known.replica == replica && !known.leave.is_cancelled();
            if replica.served_names.is_empty() || core.replicas.values().any(here) {
                continue;
            }
            let model = core.model_named(&replica.served_names);
            touched.insert(model);
            targets.push(core.add_replica(replica, model, cut));
        }
        touched.into_iter().for_each(|model| self.publish(core, model));
        targets
    }

    /// Models that are there even without replicas.
    pub fn declared(&self, models: Vec<Vec<String>>) {
        let mut core = self.lock();
        for names in models.iter().filter(|names| !names.is_empty()) {
            let model = core.model_named(names);
            self.publish(&mut core, model);
        }
    }

    /// An attempt to use a replica is over.
    pub fn tried(&self, target: &Target) {
        if let Some(known) = self.lock().replicas.get_mut(&target.replica) {
            known.tried = true;
        }
    }

    /// See `Dispatcher::is_settled`.
    pub fn is_settled(&self) -> bool {
        if self.settled.load(Ordering::Acquire) {
            return true;
        }
        let now = self.now();
        let settled = self.lock().settle(now, SETTLE_LIMIT);
        self.settled.store(settled, Ordering::Release);
        settled
    }

    /// A session's task is over for good.
    pub fn gone(&self, target: &Target) {
        let mut core = self.lock();
        core.replicas.remove(&target.replica);
        core.model_mut(target.model).fleet.remove(target.replica);
        // A pod that took over the name has the series now.
        let same = |known: &Known| known.model == target.model && known.name == target.replica_name;
        if !core.replicas.values().any(same) {
            self.observer
                .replica(&target.model_name, &target.replica_name, ReplicaState::Gone);
        }
        info!(
            model = &*target.model_name,
            replica = &*target.replica_name,
            "replica left"
        );
        self.publish(&mut core, target.model);
    }

    /// A worker answered; it may not be chosen yet.
    pub fn welcomed(&self, link: &Arc<Link>, welcome: &Welcome) {
        let capacity = welcome.capacity.unwrap_or_default();
        let capacity = Capacity {
            max_step_tokens: capacity.max_step_tokens,
            block_tokens: capacity.block_tokens,
            n_blocks: capacity.n_blocks,
            prefill_tokens_per_second: capacity.prefill_tokens_per_second,
        };
        link.grant(welcome.submit_credits);
        let mut core = self.lock();
        let Some(known) = core.replicas.get_mut(&link.replica) else {
            return;
        };
        known.link = Some(Arc::clone(link));
        known.offer = None;
        core.fleet_of(link)
            .connected(link.replica, capacity, &welcome.boot_id, welcome.submit_credits);
        self.publish(&mut core, link.model);
    }

    /// Its files are here: it may be chosen, if it serves what the others do.
    pub fn files_here(&self, link: &Link, welcome: &Welcome, files: ModelFiles) {
        let model = welcome.model.clone().unwrap_or_default();
        let (vocab_size, eos_token_ids) = (model.vocab_size, model.eos_token_ids);
        let mut core = self.lock();
        // Equal files are one value, so that whoever keeps something made from them can tell by the pointer.
        let same = core
            .model(link.model)
            .spec
            .as_ref()
            .filter(|spec| *spec.files == files);
        let files = same.map_or_else(|| Arc::new(files), |spec| Arc::clone(&spec.files));
        if let Some(known) = core.replicas.get_mut(&link.replica) {
            known.tried = true;
            let spec = Spec {
                vocab_size,
                eos_token_ids,
                files,
            };
            known.offer = Some(Offer {
                spec,
                max_model_len: model.max_model_len,
            });
        }
        self.publish(&mut core, link.model);
        let used: Vec<Arc<ModelFiles>> = core.files_in_use();
        self.files.keep_only(used.iter().map(|files| &**files));
        self.pump(&mut core, link.model);
    }

    /// It takes no new request.
    pub fn draining(&self, link: &Link) {
        link.drain();
        let mut core = self.lock();
        core.fleet_of(link).draining(link.replica);
        self.publish(&mut core, link.model);
    }

    /// It invites this many more.
    pub fn credit(&self, link: &Link, credits: u32) {
        link.grant(credits);
        let mut core = self.lock();
        core.fleet_of(link).grant(link.replica, credits);
        self.pump(&mut core, link.model);
    }

    /// It reported.
    pub fn load(&self, link: &Link, report: &LoadReport) {
        let load = Load {
            running: report.running,
            waiting: report.waiting,
            pending_prefill_tokens: report.pending_prefill_tokens,
        };
        self.lock().fleet_of(link).report(link.replica, load);
        self.observer.load(&link.model_name, &link.replica_name, load);
    }

    /// Its cache changed. With `missed`, changes before these did not come.
    pub fn cache(&self, link: &Link, events: &KvEvents, missed: bool) {
        let mut core = self.lock();
        let fleet = core.fleet_of(link);
        if missed {
            fleet.forget_cache(link.replica);
            self.observer
                .cache_events_missed(&link.model_name, &link.replica_name);
        }
        fleet.evicted(link.replica, &events.removed);
        fleet.stored(link.replica, events.snapshot, &events.stored);
    }

    /// A step's frame was heard.
    pub fn heard(&self, link: &Arc<Link>, heard: Heard) {
        let (model, replica) = (&*link.model_name, &*link.replica_name);
        heard
            .begun
            .iter()
            .for_each(|(predicted, actual)| self.observer.accepted(model, *predicted, *actual));
        heard
            .cancels
            .iter()
            .for_each(|after| self.observer.cancelled(model, replica, *after));
        (0..heard.slow).for_each(|_| self.observer.slow_client(model));
        self.observer.stepped(model, replica, heard.tokens);

        let now = self.now();
        let mut core = self.lock();
        let fleet = core.fleet_of(link);
        fleet.settle(link.replica, heard.delta);
        for (ticket, ending) in heard.endings {
            fleet.finish(ticket, ending, now, rand::random());
        }
        take_back(fleet, heard.unsent, now);
        for (flight, attempt, cause, text) in heard.evicted {
            let boot = link.boot.get().filter(|_| cause != MoveCause::Draining).cloned();
            self.evict(&mut core, &flight, attempt, &eviction(link, cause, text, boot));
        }
        self.pump(&mut core, link.model);
    }

    /// Requests were cancelled before they were sent.
    pub fn take_back(&self, link: &Link, unsent: Vec<Ticket>) {
        if unsent.is_empty() {
            return;
        }
        let mut core = self.lock();
        let now = self.now();
        take_back(core.fleet_of(link), unsent, now);
        self.pump(&mut core, link.model);
    }

    /// A session is over. What ran there moves or fails.
    pub fn lost(&self, link: &Arc<Link>, lost: &Lost) {
        let entries = link.close();
        let now = self.now();
        let mut core = self.lock();
        let fleet = core.fleet_of(link);
        fleet.down(link.replica);
        if lost.is_failure() && !entries.is_empty() {
            fleet.failed(link.replica, now, rand::random());
        }
        let mut on_board: Vec<(Arc<Flight>, u32)> = Vec::new();
        for entry in entries {
            let neutral = swallow_policy::Ending::Neutral;
            core.fleet_of(link).finish(entry.ticket, neutral, now, 0);
            if entry.cancelled.is_none() {
                on_board.push((entry.flight, entry.attempt));
            }
        }
        if let Some(known) = core.replicas.get_mut(&link.replica) {
            known.link = None;
            known.offer = None;
            known.aside = false;
        }
        // Those that were placed first come out in front: each goes to the front of the line.
        on_board.sort_by_key(|(flight, _)| std::cmp::Reverse(flight.id));
        let boot = link.boot.get().filter(|_| lost.excludes()).cloned();
        let eviction = eviction(link, MoveCause::Lost, lost.to_string(), boot);
        let count = on_board.len();
        for (flight, attempt) in on_board {
            self.evict(&mut core, &flight, attempt, &eviction);
        }
        if count > 0 {
            warn!(model = &*link.model_name, replica = &*link.replica_name, requests = count, cause = %lost, "replica lost");
        }
        self.publish(&mut core, link.model);
        self.pump(&mut core, link.model);
    }

    /// A request loses its place: it goes back into the queue, or is over.
    fn evict(&self, core: &mut Core, flight: &Arc<Flight>, attempt: u32, eviction: &Eviction) {
        let (what, place) = flight.withdraw(attempt, eviction);
        if let Place::Placed(link, handles) = place {
            let unsent = link.cancel(flight, &handles, cancel::Reason::ClientGone);
            let now = self.now();
            take_back(core.fleet_of(&link), unsent, now);
        }
        if what == Withdrawn::Over {
            return;
        }
        if core.cut || core.stopping && !flight.is_accepted() {
            flight.refuse(Refusal::ShuttingDown);
        } else if eviction.cause == MoveCause::Busy && !core.retries.spend() {
            let retry_after = core.queue.retry_after(self.now());
            flight.refuse(Refusal::QueueFull {
                what: "the replicas' own",
                retry_after,
            });
        } else {
            debug!(request = %flight.ask.uuid, from = &*eviction.replica_name, cause = eviction.cause.label(), "moved");
            self.observer
                .moved(&core.model(flight.model).name, eviction.cause);
            self.wait_again(core, flight);
        }
    }

    /// Tells everybody who asks about a model, after something changed.
    fn publish(&self, core: &mut Core, model: ModelId) {
        for other in core.settle_spec(model) {
            error!(
                model = &*core.model(model).name,
                replica = &*other,
                "not used: its tokenizer or configuration is not that of the model's ready replicas; \
                 it is used once they are gone"
            );
        }
        let ids: Vec<ReplicaId> = core
            .replicas
            .iter()
            .filter(|(_, known)| known.model == model)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let state = core.state_of(id);
            let known = core.replicas.get_mut(&id).expect("listed above");
            if std::mem::replace(&mut known.state, state) != state {
                let name = Arc::clone(&known.name);
                let model = &core.model(model).name;
                self.observer.replica(model, &name, state);
                info!(
                    model = &**model,
                    replica = &*name,
                    state = state.label(),
                    "replica"
                );
            }
        }
        self.directory.put(core.entry(model));
    }
}

impl Core {
    /// The model with this first name; new, or with these names from now on.
    fn model_named(&mut self, served_names: &[String]) -> ModelId {
        let (name, aliases) = served_names.split_first().expect("checked to be not empty");
        let known = self.models.iter().position(|model| *model.name == **name);
        let index = known.unwrap_or_else(|| {
            self.models.push(Model {
                name: name.as_str().into(),
                aliases: Vec::new(),
                fleet: Fleet::default(),
                spec: None,
                max_model_len: 0,
            });
            self.models.len() - 1
        });
        let model = &mut self.models[index];
        for alias in aliases {
            if !model.aliases.contains(alias) {
                model.aliases.push(alias.clone());
            }
        }
        ModelId(u32::try_from(index).expect("models are few"))
    }

    fn add_replica(&mut self, replica: Replica, model: ModelId, cut: &CancellationToken) -> Target {
        let id = self.new_replica();
        self.model_mut(model).fleet.add(id);
        let name: Arc<str> = replica.id.as_str().into();
        let leave = CancellationToken::new();
        let target = Target {
            replica: id,
            replica_name: Arc::clone(&name),
            model,
            model_name: Arc::clone(&self.model(model).name),
            served_names: replica.served_names.clone(),
            address: replica.address.clone(),
            leave: leave.clone(),
            cut: cut.clone(),
        };
        // `Gone` is what was told before: nothing.
        let state = ReplicaState::Gone;
        self.replicas.insert(
            id,
            Known {
                replica,
                name,
                model,
                link: None,
                offer: None,
                aside: false,
                tried: false,
                state,
                leave,
            },
        );
        target
    }

    fn files_in_use(&self) -> Vec<Arc<ModelFiles>> {
        let of_models = self.models.iter().filter_map(|model| model.spec.as_ref());
        let of_replicas = self
            .replicas
            .values()
            .filter_map(|known| known.offer.as_ref().map(|offer| &offer.spec));
        of_models
            .chain(of_replicas)
            .map(|spec| Arc::clone(&spec.files))
            .collect()
    }
}

fn eviction(link: &Link, cause: MoveCause, text: String, exclude_boot: Option<Vec<u8>>) -> Eviction {
    Eviction {
        cause,
        replica: link.replica,
        replica_name: Arc::clone(&link.replica_name),
        text,
        exclude_boot,
    }
}
