//! Random worlds: whatever the batching, sharing, preemption, cancelling and lag, every sequence's tokens are those of
//! an undisturbed run, every end is the right one, and nothing is left over.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use fastrand::Rng;
use swallow_schedule::{
    Ask, CostModel, Finish, Input, Limits, Micros, Output, Pace, Refusal, Scheduler, SeqId, Step, StepId,
    Work,
};

use crate::device::{Device, colliding_key_of, key_of, undisturbed, with_surplus};

/// To see one world again, put the seed that a failure printed here.
const ONLY_SEED: Option<u64> = None;
const N_WORLDS: u64 = 600;
const OPERATIONS: usize = 600;
/// Steps that a drain may take at most: enough for every token of every sequence, one at a time, several times over.
const DRAIN_STEPS: usize = 200_000;

#[test]
fn random_worlds_without_lag() {
    run_worlds(0);
}

#[test]
fn random_worlds_with_lag() {
    run_worlds(1);
}

fn run_worlds(lag: usize) {
    let mut preemptions = 0;
    let mut hits = 0;
    let seeds = ONLY_SEED.map_or(0..N_WORLDS, |seed| seed..seed + 1);
    for seed in seeds {
        let shown = Shown { seed, lag };
        let mut world = World::new(seed, lag);
        for _ in 0..OPERATIONS {
            world.operate();
        }
        world.drain();
        preemptions += world.scheduler.load().preemptions;
        hits += world.scheduler.load().prefix_hit_tokens;
        std::mem::forget(shown);
    }
    assert!(
        ONLY_SEED.is_some() || (preemptions > 1000 && hits > 10_000),
        "{preemptions} {hits}: too tame"
    );
}

/// Prints the seed of the world in which a test panics.
struct Shown {
    seed: u64,
    lag: usize,
}

impl Drop for Shown {
    fn drop(&mut self) {
        eprintln!("failed in the world of seed {} with lag {}", self.seed, self.lag);
    }
}

/// What the caller knows about a sequence.
struct Client {
    ask: Ask,
    /// Prompt and output of an undisturbed run.
    expected: Vec<u32>,
    /// The same without its end.
    truth: Arc<[u32]>,
    received: Vec<u32>,
    started: bool,
    cancelled: bool,
    finished: Option<Finish>,
    /// Prompt positions whose log-probabilities arrived.
    scored: BTreeSet<u32>,
    max_planned_sample: Option<u32>,
    /// Tokens that it may have.
    window: u32,
    /// Nothing may be planned on a token of it that is in flight.
    in_step: bool,
}

struct InFlight {
    step: Step,
    /// The client of each work; ids may be used again while a step is in flight.
    clients: Vec<usize>,
    /// Ids, if the device ran it already.
    sampled: Option<Vec<u32>>,
}

struct World {
    rng: Rng,
    lag: usize,
    vocab: u32,
    scheduler: Scheduler,
    device: Device,
    clients: Vec<Client>,
    live: BTreeMap<SeqId, usize>,
    in_flight: VecDeque<InFlight>,
    now: Micros,
    next_step: u64,
    prompts: Vec<Vec<u32>>,
    keys: BTreeSet<u64>,
}

impl World {
    fn new(seed: u64, lag: usize) -> Self {
        let mut rng = Rng::with_seed(seed);
        let limits = Limits {
            block_tokens: rng.u32(1..=6),
            n_blocks: rng.u32(4..=48),
            max_running: rng.u32(1..=8),
            max_step_tokens: rng.u32(1..=40),
            max_model_len: rng.u32(16..=96),
            max_waiting: rng.u32(1..=12),
            prefix_cache: rng.u32(0..4) > 0,
            key_of: if rng.u32(0..5) == 0 {
                colliding_key_of
            } else {
                key_of
            },
        };
        let vocab = rng.u32(3..=40);
        // A few texts of which most prompts are a beginning and a tail, so that prefixes meet.
        let texts = rng.usize(1..=3);
        let prompts = (0..texts)
            .map(|_| (0..96).map(|_| rng.u32(0..vocab)).collect())
            .collect();
        let device = Device::new(&limits, vocab);
        let mut scheduler = Scheduler::new(limits);
        if rng.bool() {
            scheduler.set_pace(Pace {
                target: Micros(rng.u64(1..100)),
                rows_min: rng.u32(1..=4),
                costs: CostModel::new(),
            });
        }
        Self {
            lag,
            vocab,
            device,
            scheduler,
            clients: Vec::new(),
            live: BTreeMap::new(),
            in_flight: VecDeque::new(),
            now: Micros(0),
            next_step: 1,
            prompts,
            keys: BTreeSet::new(),
            rng,
        }
    }

    fn operate(&mut self) {
        match self.rng.u32(0..100) {
            0..15 => self.add(),
            15..19 => self.add_candidates(),
            19..23 => self.cancel(),
            23..30 => self.now = Micros(self.now.0 + self.rng.u64(0..50)),
            30..35 => self.check_delta(),
            35..40 => self.open_window(),
            _ => self.turn(),
        }
        self.scheduler.audit();
        self.read_outputs();
    }

    fn add(&mut self) {
        let ask = self.draw_ask();
        self.submit(ask);
    }

    /// Several sequences with one prompt at once.
    fn add_candidates(&mut self) {
        let ask = self.draw_ask();
        for _ in 0..self.rng.u32(2..=5) {
            let id = self.draw_id();
            self.submit(Ask { id, ..ask.clone() });
        }
    }

    fn draw_id(&mut self) -> SeqId {
        SeqId(self.rng.u64(0..60))
    }

    fn draw_ask(&mut self) -> Ask {
        let id = self.draw_id();
        let rng = &mut self.rng;
        let text = &self.prompts[rng.usize(0..self.prompts.len())];
        let most = self.scheduler.limits().max_model_len as usize;
        let len = rng.usize(0..=most.min(text.len()));
        let mut prompt = text[..len].to_vec();
        for _ in 0..rng.usize(0..=2) {
            prompt.push(rng.u32(0..self.vocab));
        }
        let prompt_logprobs = rng.u32(0..5) == 0;
        let n_stops = rng.usize(0..=2);
        Ask {
            id,
            prompt: prompt.into(),
            max_tokens: rng.u32(0..=30),
            min_tokens: rng.u32(0..=6),
            stop_ids: (0..n_stops).map(|_| rng.u32(0..self.vocab)).collect(),
            root_key: rng.u64(0..2),
            prompt_logprobs,
            prompt_logprobs_from: 0,
            deadline: (rng.u32(0..6) == 0).then(|| Micros(self.now.0 + rng.u64(0..600))),
        }
    }

    fn submit(&mut self, ask: Ask) {
        let before = self.scheduler.load();
        match self.scheduler.add(ask.clone()) {
            Ok(()) => {
                let mut client = Client {
                    expected: undisturbed(&ask, self.vocab),
                    truth: with_surplus(&ask, self.vocab).into(),
                    received: Vec::new(),
                    started: false,
                    cancelled: false,
                    finished: None,
                    scored: BTreeSet::new(),
                    max_planned_sample: None,
                    window: u32::MAX,
                    in_step: false,
                    ask,
                };
                if self.rng.u32(0..3) == 0 {
                    let window = self.rng.u32(0..6);
                    self.scheduler.set_window(client.ask.id, window);
                    client.window = window.max(1);
                }
                if self.rng.u32(0..4) == 0 {
                    self.scheduler.keep_in_step(client.ask.id);
                    client.in_step = true;
                }
                assert_eq!(self.live.insert(client.ask.id, self.clients.len()), None);
                self.clients.push(client);
            }
            Err(refusal) => {
                assert_eq!(self.scheduler.load(), before, "a refusal changes nothing");
                self.check_refusal(&ask, &refusal);
            }
        }
    }

    fn check_refusal(&self, ask: &Ask, refusal: &Refusal) {
        let limits = self.scheduler.limits();
        let len = ask.prompt.len() as u32 + ask.max_tokens;
        let just = match refusal {
            Refusal::EmptyPrompt => ask.prompt.is_empty(),
            Refusal::NothingAsked => ask.max_tokens == 0 && !ask.prompt_logprobs,
            Refusal::TooLong { .. } => len > limits.max_model_len,
            Refusal::NeverFits { .. } => len.div_ceil(limits.block_tokens) > limits.n_blocks,
            Refusal::DuplicateId(id) => self.live.contains_key(id),
            Refusal::QueueFull { limit } => self.scheduler.load().waiting >= *limit,
        };
        assert!(just, "{refusal} {ask:?}");
    }

    fn cancel(&mut self) {
        let id = self.draw_id();
        self.scheduler.cancel(id);
        if let Some(&client) = self.live.get(&id) {
            self.clients[client].cancelled = true;
            self.read_outputs();
            assert_eq!(
                self.clients[client].finished,
                Some(Finish::Cancelled),
                "confirmed at once"
            );
        }
    }

    /// A reader catches up.
    fn open_window(&mut self) {
        let id = self.draw_id();
        let more = self.rng.u32(0..8);
        self.widen(id, more);
    }

    fn widen(&mut self, id: SeqId, more: u32) {
        let tokens = match self.live.get(&id) {
            Some(&client) => {
                let client = &mut self.clients[client];
                client.window = client.window.max(client.received.len() as u32 + more);
                client.window
            }
            None => more,
        };
        self.scheduler.set_window(id, tokens);
    }

    /// One turn of the caller's loop: plan, and commit what is due. With lag, sometimes only one of the two.
    fn turn(&mut self) {
        if self.in_flight.len() <= self.lag {
            self.plan();
        } else if self.lag > 0 && self.rng.bool() {
            assert_eq!(self.scheduler.step(self.now), None, "two steps are in flight");
        }
        let full = self.in_flight.len() > self.lag;
        if (full && self.rng.bool()) || self.rng.u32(0..8) == 0 {
            self.commit();
        }
    }

    fn plan(&mut self) {
        let step = self.scheduler.step(self.now);
        self.read_outputs();
        let deadlines = self
            .live
            .values()
            .filter_map(|&client| self.clients[client].ask.deadline);
        assert_eq!(self.scheduler.next_deadline(), deadlines.min());
        assert!(
            self.scheduler
                .next_deadline()
                .is_none_or(|deadline| deadline > self.now),
            "too late"
        );
        match step {
            Some(step) => self.launch(step),
            None if !self.in_flight.is_empty() => self.commit(),
            None => {
                let load = self.scheduler.load();
                assert_eq!(
                    (load.running, load.waiting, load.parked as usize),
                    (0, 0, self.live.len()),
                    "nothing runs, but somebody could"
                );
            }
        }
    }

    fn launch(&mut self, step: Step) {
        assert_eq!(step.id, StepId(self.next_step), "steps are numbered without gaps");
        self.next_step += 1;
        let limits = self.scheduler.limits();
        let rows: u32 = step.works.iter().map(Work::rows).sum();
        assert!(rows > 0 && rows <= limits.max_step_tokens, "{rows} rows");
        assert!(step.works.len() <= limits.max_running as usize);
        let slots: BTreeSet<_> = step.works.iter().map(|work| work.slot).collect();
        assert_eq!(slots.len(), step.works.len(), "a slot has one sequence");
        assert!(slots.iter().all(|slot| slot.0 < limits.max_running));
        // A sequence that ended in this very call is in no work, so all of them are alive.
        let clients: Vec<usize> = step.works.iter().map(|work| self.live[&work.seq]).collect();
        for (work, &client) in step.works.iter().zip(&clients) {
            let client = &mut self.clients[client];
            assert!(
                !client.in_step || work.input != Input::LastSampled,
                "{work:?} follows a token that nobody has seen"
            );
            if let Some(index) = work.sample {
                assert!(index < client.ask.max_tokens, "a token too many is planned");
                assert!(index < client.window, "a token past the window is planned");
                assert!(client.max_planned_sample.is_none_or(|max| index <= max + 1));
                client.max_planned_sample = Some(index);
            }
        }
        // A step that runs early runs after all that were planned before it.
        let early = self.rng.bool() && self.in_flight.iter().all(|flight| flight.sampled.is_some());
        let sampled = early.then(|| self.run(&step, &clients));
        self.in_flight.push_back(InFlight {
            step,
            clients,
            sampled,
        });
    }

    fn run(&mut self, step: &Step, clients: &[usize]) -> Vec<u32> {
        let by_id: BTreeMap<SeqId, usize> = step
            .works
            .iter()
            .map(|work| work.seq)
            .zip(clients.iter().copied())
            .collect();
        let clients = &self.clients;
        self.device.run(step, |id| {
            let client = &clients[by_id[&id]];
            (client.ask.root_key, &client.truth)
        })
    }

    fn commit(&mut self) {
        let Some(flight) = self.in_flight.pop_front() else {
            return;
        };
        let sampled = match flight.sampled {
            Some(sampled) => sampled,
            None => self.run(&flight.step, &flight.clients),
        };
        for (work, &client) in flight.step.works.iter().zip(&flight.clients) {
            let client = &mut self.clients[client];
            let n_prompt = client.ask.prompt.len() as u32;
            if work.prompt_logprobs {
                assert!(client.ask.prompt_logprobs && work.start + 1 < n_prompt);
                for position in work.start..(work.start + work.rows()).min(n_prompt - 1) {
                    assert!(
                        client.scored.insert(position),
                        "position {position} is scored twice"
                    );
                }
            }
        }
        // Whatever it took: what is planned then differs, what comes out does not.
        let rows: u64 = flight.step.works.iter().map(|work| u64::from(work.rows())).sum();
        self.scheduler
            .learn(&flight.step, Micros(rows * self.rng.u64(1..5)));
        self.scheduler.commit(flight.step.id, &sampled);
    }

    fn read_outputs(&mut self) {
        for output in self.scheduler.take_outputs() {
            match output {
                Output::Started { seq, cached_tokens } => {
                    let block_tokens = self.scheduler.limits().block_tokens;
                    let client = self.client(seq);
                    assert!(
                        !std::mem::replace(&mut client.started, true),
                        "{seq:?} started twice"
                    );
                    assert!(
                        cached_tokens < client.ask.prompt.len() as u32,
                        "the last token is computed"
                    );
                    assert!(cached_tokens == 0 || !client.ask.prompt_logprobs);
                    assert_eq!(cached_tokens % block_tokens, 0, "whole blocks");
                }
                Output::Token { seq, index, token } => {
                    let client = self.client(seq);
                    assert!(client.started && client.finished.is_none());
                    assert_eq!(
                        index as usize,
                        client.received.len(),
                        "{seq:?} lost or doubled a token"
                    );
                    client.received.push(token);
                }
                Output::Finished { seq, why, n_tokens } => {
                    let now = self.now;
                    let client = self.client(seq);
                    check_end(client, why, n_tokens, now);
                    self.live.remove(&seq);
                }
            }
        }
    }

    fn client(&mut self, seq: SeqId) -> &mut Client {
        let at = *self.live.get(&seq).expect("outputs are about live sequences");
        &mut self.clients[at]
    }

    /// The deltas, replayed, are the snapshot.
    fn check_delta(&mut self) {
        let delta = self.scheduler.take_kv_delta();
        for key in &delta.stored {
            assert!(self.keys.insert(*key), "{key} was stored twice");
        }
        for key in &delta.removed {
            assert!(self.keys.remove(key), "{key} was removed without being there");
        }
        assert_eq!(
            self.scheduler.cached_keys(),
            self.keys.iter().copied().collect::<Vec<_>>()
        );
    }

    fn drain(&mut self) {
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            self.turn();
            self.scheduler.audit();
            self.read_outputs();
            let live: Vec<SeqId> = self.live.keys().copied().collect();
            live.into_iter().for_each(|id| self.widen(id, 3));
            steps += 1;
            assert!(steps < DRAIN_STEPS, "no end in sight");
        }
        self.check_delta();
        let load = self.scheduler.load();
        assert_eq!(
            (
                load.running,
                load.waiting,
                load.blocks_held,
                load.pending_prefill_tokens
            ),
            (0, 0, 0, 0)
        );
        assert!(self.live.is_empty() && self.clients.iter().all(|client| client.finished.is_some()));
        assert_eq!(self.scheduler.next_deadline(), None);
        assert!(load.prefix_hit_tokens <= load.prefix_query_tokens);
    }
}

fn check_end(client: &mut Client, why: Finish, n_tokens: u32, now: Micros) {
    let expected = &client.expected[client.ask.prompt.len()..];
    assert_eq!(
        n_tokens as usize,
        client.received.len(),
        "n_tokens of {:?}",
        client.ask.id
    );
    assert!(
        expected.starts_with(&client.received),
        "{:?} {expected:?}",
        client.received
    );
    let stops = expected
        .last()
        .is_some_and(|last| client.ask.stop_ids.contains(last))
        && expected.len() as u32 >= client.ask.min_tokens;
    match why {
        Finish::Stop | Finish::Length => {
            assert_eq!(client.received, expected, "{why:?} before the end");
            assert_eq!(why, if stops { Finish::Stop } else { Finish::Length });
            let n_scored = if client.ask.prompt_logprobs {
                client.ask.prompt.len() - 1
            } else {
                0
            };
            assert_eq!(client.scored.len(), n_scored, "prompt positions scored");
        }
        Finish::Cancelled => assert!(client.cancelled),
        Finish::Deadline => assert!(client.ask.deadline.is_some_and(|deadline| deadline <= now)),
    }
    assert_eq!(client.finished.replace(why), None, "an end is final");
}
