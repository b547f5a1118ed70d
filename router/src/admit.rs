//! The door to the replicas: a request is placed at once, waits in the queue, or is refused with the time to come
//! back.
//!
//! Whoever waits for a model waits in line: nobody is placed past the front. Moved requests come back at the front.

use std::{sync::Arc, time::Duration};

use swallow_policy::{Blocked, Full, Keys, ModelId, Waiting};
use swallow_proto::prefix;
use tokio::time::Instant;
use tracing::debug;

use crate::{
    ask::{Ask, Refusal},
    dispatch::{Buffers, Core, Flight, Shared},
};

/// What is advised while a model has no replica: nothing says when one will come.
const NO_REPLICA_RETRY: Duration = Duration::from_secs(5);
/// A waiting request beside its prompt: structures, options, the client's own end.
const REQUEST_BYTES: u64 = 1024;

impl Shared {
    /// Lets a request in: it is on a replica or in the queue.
    pub fn admit(&self, ask: Ask) -> Result<Arc<Flight>, Refusal> {
        let entry = self
            .directory
            .find(&ask.model)
            .ok_or_else(|| Refusal::UnknownModel(ask.model.clone()))?;
        if ask.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Refusal::Deadline);
        }
        let keys = keys(&ask, &entry.block_sizes);
        let now = self.now();
        let mut core = self.lock();
        if core.stopping {
            return Err(Refusal::ShuttingDown);
        }
        core.retries.earn();
        let flight = Flight::new(
            core.new_request(),
            entry.id,
            ask,
            keys,
            Buffers {
                tokens: self.config.max_buffered_tokens,
                bytes: self.config.max_buffered_bytes,
            },
        );
        // Nobody is ahead: the bounds are for those who wait.
        if core.queue.front(entry.id).is_none() && self.try_place(&mut core, &flight, now)? {
            return Ok(flight);
        }
        let waiting = self.waiting(&core, &flight, now);
        let full = |Full { what, retry_after }| Refusal::QueueFull { what, retry_after };
        let pushed_out = core.queue.push(waiting, now).map_err(full)?;
        flight.queued();
        core.waiting.insert(flight.id, Arc::clone(&flight));
        let retry_after = core.queue.retry_after(now);
        for out in pushed_out {
            let flight = core.waiting.remove(&out.id).expect("who is queued is known");
            flight.refuse(Refusal::QueueFull {
                what: "others have a claim to",
                retry_after,
            });
        }
        self.observer.queue(core.queue.depth());
        drop(core);
        self.wake_clock();
        Ok(flight)
    }

    /// Places whoever is at the front, for as long as that works.
    pub fn pump(&self, core: &mut Core, model: ModelId) {
        let now = self.now();
        while let Some(front) = core.queue.front(model) {
            let flight = core
                .waiting
                .get(&front.id)
                .expect("who is queued is known")
                .clone();
            match self.try_place(core, &flight, now) {
                Ok(false) => break,
                Ok(true) => {
                    core.queue.pop(model, now);
                }
                Err(refusal) => {
                    core.queue.remove(flight.id, now);
                    flight.refuse(refusal);
                }
            }
            core.waiting.remove(&flight.id);
            self.observer.queue(core.queue.depth());
        }
    }

    /// True: placed, or nothing of it is wanted any more. False: it has to wait.
    fn try_place(&self, core: &mut Core, flight: &Arc<Flight>, now: Duration) -> Result<bool, Refusal> {
        let parts = flight.parts();
        if parts.is_empty() {
            return Ok(true);
        }
        match core.place(flight, &parts, now, rand::random()) {
            Ok((choice, link)) => {
                let waited = flight.since.elapsed();
                self.observer
                    .chose(&link.model_name, &link.replica_name, &choice.why, waited);
                debug!(
                    request = %flight.ask.uuid,
                    model = &*link.model_name,
                    replica = &*link.replica_name,
                    why = %choice.why,
                    waited_ms = waited.as_millis(),
                    resumed_tokens = parts.iter().map(|part| part.said.len()).sum::<usize>(),
                    "placed"
                );
                Ok(true)
            }
            Err(Blocked::AllExcluded) => Err(Refusal::QueueFull {
                what: "the replicas' own",
                retry_after: core.queue.retry_after(now),
            }),
            Err(Blocked::Resting { until }) => {
                if let Some(until) = until {
                    core.note_resting(until, flight.model);
                    self.wake_clock();
                }
                Ok(false)
            }
            Err(Blocked::NoReplica | Blocked::NoCredits) => Ok(false),
        }
    }

    /// A request that lost its place comes back at the front.
    pub fn wait_again(&self, core: &mut Core, flight: &Arc<Flight>) {
        let now = self.now();
        let waiting = self.waiting(core, flight, now);
        core.wait(flight, waiting, now);
        self.observer.queue(core.queue.depth());
        self.wake_clock();
    }

    /// A request leaves the queue because its client did.
    pub fn leave_queue(&self, flight: &Arc<Flight>) {
        let mut core = self.lock();
        core.queue.remove(flight.id, self.now());
        core.waiting.remove(&flight.id);
        self.observer.queue(core.queue.depth());
        // It may have been the front, and too wide for the room there is.
        self.pump(&mut core, flight.model);
    }

    /// What the clock does.
    pub fn tick(&self) {
        let now = self.now();
        let mut core = self.lock();
        for waiting in core.queue.expire(now) {
            let flight = core.waiting.remove(&waiting.id).expect("who is queued is known");
            self.end_of_wait(&core, &flight, waiting, now);
            self.pump(&mut core, waiting.model);
        }
        while let Some(model) = core.take_rested(now) {
            self.pump(&mut core, model);
        }
        self.observer.queue(core.queue.depth());
    }

    fn end_of_wait(&self, core: &Core, flight: &Flight, waiting: Waiting, now: Duration) {
        let waited = now.saturating_sub(waiting.since);
        let model = core.model(flight.model);
        if flight
            .ask
            .deadline
            .is_some_and(|deadline| self.at(deadline) <= now)
        {
            flight.expire();
        } else if model.fleet.replicas().any(|(_, replica)| replica.is_ready()) {
            flight.refuse(Refusal::QueueTimeout {
                waited,
                retry_after: core.queue.retry_after(now),
            });
        } else {
            flight.refuse(Refusal::NoReplica {
                model: model.name.to_string(),
                retry_after: NO_REPLICA_RETRY,
            });
        }
    }

    /// No new request from here on; only streams that had begun wait any longer, for a replica to go on with.
    pub fn stop_admitting(&self) {
        let mut core = self.lock();
        core.stopping = true;
        self.refuse_waiting(&mut core, |flight| !flight.is_accepted());
    }

    /// Streams that lose their replica from here on fail, and those that wait for one do.
    pub fn stop_moving(&self) {
        let mut core = self.lock();
        core.cut = true;
        self.refuse_waiting(&mut core, |_| true);
    }

    fn refuse_waiting(&self, core: &mut Core, whom: impl Fn(&Flight) -> bool) {
        let now = self.now();
        let (queue, waiting) = (&mut core.queue, &mut core.waiting);
        waiting.retain(|id, flight| {
            let refused = whom(flight);
            if refused {
                queue.remove(*id, now);
                flight.refuse(Refusal::ShuttingDown);
            }
            !refused
        });
        self.observer.queue(core.queue.depth());
    }

    fn waiting(&self, core: &Core, flight: &Flight, now: Duration) -> Waiting {
        let ask = &flight.ask;
        let expected = core.model(flight.model).fleet.expected_output(ask.max_tokens);
        let longest = ask.max_queue_wait.map_or(self.config.max_queue_wait, |own| {
            own.min(self.config.max_queue_wait)
        });
        let deadline = ask.deadline.map(|deadline| self.at(deadline));
        let options = (ask.sampling.logit_bias.len() + ask.stop_token_ids.len()) * 8;
        let keys: usize = flight.keys.iter().map(|keys| keys.keys.len() * 8).sum();
        Waiting {
            id: flight.id,
            model: flight.model,
            tenant: ask.share.tenant,
            weight: ask.share.weight,
            priority: ask.share.priority,
            tokens: ask.prompt.len() as u64,
            work: ask.prompt.len() as u64 + u64::from(expected) * u64::from(ask.candidates),
            bytes: (size_of_val(&*ask.prompt) + options + keys) as u64 + ask.text_bytes + REQUEST_BYTES,
            since: now,
            until: deadline
                .into_iter()
                .chain([now.saturating_add(longest)])
                .min()
                .expect("not empty"),
        }
    }
}

/// The block keys, for each block size in use, of what a cache may stand for: not of tokens that have to be computed
/// for a score.
fn keys(ask: &Ask, block_sizes: &[u32]) -> Vec<Keys> {
    let cacheable = match ask.prompt_logprobs {
        // The token before the first that is scored predicts it.
        Some(_) => &ask.prompt[..ask.prompt_logprobs_from.saturating_sub(1) as usize],
        None => &ask.prompt[..],
    };
    let keys = |&block_tokens: &u32| Keys {
        block_tokens,
        keys: prefix::keys(ask.cache_salt, block_tokens as usize, cacheable),
    };
    block_sizes.iter().map(keys).collect()
}
