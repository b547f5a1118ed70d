//! The caller's loop for tests with a story: a scheduler, a device, and what came out by sequence.

use std::collections::{BTreeMap, VecDeque};

use swallow_schedule::{Ask, Finish, Limits, Output, Refusal, Scheduler, SeqId, Step};

use crate::device::{Device, NOW, undisturbed, with_surplus};

const VOCAB: u32 = 50_000;
/// A story that takes longer is a livelock.
const STEPS_MAX: usize = 100_000;

pub struct Engine {
    pub scheduler: Scheduler,
    device: Device,
    asks: BTreeMap<SeqId, (Ask, Vec<u32>)>,
    in_flight: VecDeque<Step>,
    tokens: BTreeMap<SeqId, Vec<u32>>,
    pub cached_tokens: BTreeMap<SeqId, u32>,
    pub finished: BTreeMap<SeqId, Finish>,
}

impl Engine {
    pub fn new(limits: Limits) -> Self {
        Self {
            device: Device::new(&limits, VOCAB),
            scheduler: Scheduler::new(limits),
            asks: BTreeMap::new(),
            in_flight: VecDeque::new(),
            tokens: BTreeMap::new(),
            cached_tokens: BTreeMap::new(),
            finished: BTreeMap::new(),
        }
    }

    pub fn add(&mut self, ask: Ask) {
        self.try_add(ask).expect("the story's asks are sound");
    }

    pub fn try_add(&mut self, ask: Ask) -> Result<(), Refusal> {
        self.scheduler.add(ask.clone())?;
        let truth = with_surplus(&ask, VOCAB);
        self.asks.insert(ask.id, (ask, truth));
        Ok(())
    }

    pub fn cancel(&mut self, id: u64) {
        self.scheduler.cancel(SeqId(id));
        self.scheduler.audit();
        self.read();
    }

    /// Plans a step and leaves it in flight.
    pub fn plan(&mut self) -> Option<Step> {
        let step = self.scheduler.step(NOW);
        self.scheduler.audit();
        self.read();
        self.in_flight.extend(step.clone());
        step
    }

    /// Runs and commits the oldest step in flight.
    pub fn commit(&mut self) {
        let step = self.in_flight.pop_front().expect("a step is in flight");
        let asks = &self.asks;
        let sampled = self.device.run(&step, |id| (asks[&id].0.root_key, &asks[&id].1));
        self.scheduler.commit(step.id, &sampled);
        self.scheduler.audit();
        self.read();
    }

    /// Plans a step and commits the oldest one as soon as more than `lag` are in flight, or nothing can be planned.
    pub fn turn(&mut self, lag: usize) -> Option<Step> {
        let step = self.plan();
        if self.in_flight.len() > lag || (step.is_none() && !self.in_flight.is_empty()) {
            self.commit();
        }
        step
    }

    /// Runs until nothing is left, and returns the steps.
    pub fn drain(&mut self, lag: usize) -> Vec<Step> {
        let mut steps = Vec::new();
        for _ in 0..STEPS_MAX {
            if self.scheduler.is_idle() {
                assert_eq!(
                    self.scheduler.load().blocks_held,
                    0,
                    "nothing is held after a drain"
                );
                return steps;
            }
            steps.extend(self.turn(lag));
        }
        panic!("no end after {STEPS_MAX} turns");
    }

    pub fn tokens(&self, id: u64) -> &[u32] {
        self.tokens.get(&SeqId(id)).map_or(&[], Vec::as_slice)
    }

    /// Every sequence that ended by itself gave exactly the tokens of an undisturbed run.
    pub fn assert_undisturbed(&self) {
        for (id, (ask, _)) in &self.asks {
            if matches!(self.finished.get(id), Some(Finish::Stop | Finish::Length)) {
                assert_eq!(
                    self.tokens(id.0),
                    &undisturbed(ask, VOCAB)[ask.prompt.len()..],
                    "{id:?}"
                );
            }
        }
    }

    fn read(&mut self) {
        for output in self.scheduler.take_outputs() {
            match output {
                Output::Started { seq, cached_tokens } => {
                    self.cached_tokens.insert(seq, cached_tokens);
                }
                Output::Token { seq, index, token } => {
                    let tokens = self.tokens.entry(seq).or_default();
                    assert_eq!(index as usize, tokens.len());
                    tokens.push(token);
                }
                Output::Finished { seq, why, .. } => {
                    self.finished.insert(seq, why);
                }
            }
        }
    }
}

/// `n` token ids that share nothing with another `salt`'s.
pub fn text(salt: u32, n: u32) -> Vec<u32> {
    (0..n).map(|at| (salt * 10_007 + at * 31) % VOCAB).collect()
}

/// Rows of a sequence in a step.
pub fn rows_of(step: &Step, id: u64) -> u32 {
    step.works
        .iter()
        .filter(|work| work.seq == SeqId(id))
        .map(swallow_schedule::Work::rows)
        .sum()
}
