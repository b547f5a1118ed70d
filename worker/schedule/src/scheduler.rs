//! The doors: sequences come in, are refused, cancelled or too late, and leave; the caller reads what happened.
//!
//! A sequence waits, runs, and is gone; preemption sends it back to wait with its tokens. One whose reader is behind is
//! parked: it keeps its tokens and its place in line, and its blocks stay findable until somebody needs them. One that ends while a step
//! in flight still touches its blocks is reported at once and lingers, unseen, until that step is committed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::blocks::Blocks;
use crate::cost::{Pace, StepCost};
use crate::sequence::{Arrival, Index, Sequence, State};
use crate::types::{Ask, Finish, KvDelta, Limits, Load, Micros, Output, Refusal, SeqId, Slot, Step, StepId};

/// Steps planned and not committed: the one that runs and the one that follows it.
pub(crate) const FLIGHTS_MAX: usize = 2;

/// A step that the device has and the host has no tokens of.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) id: StepId,
    pub(crate) works: Vec<Flown>,
}

/// What commit needs to know about a work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flown {
    pub(crate) at: Index,
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) sample: bool,
    /// It announced the blocks that it completes, see `Scheduler::claims`.
    pub(crate) claimed: bool,
}

/// The scheduler of one replica.
///
/// Every call keeps the pool's books and checks them, also in release builds. The caller's loop, without lag:
///
/// ```
/// # use swallow_schedule::{Ask, Limits, Micros, Output, Scheduler, SeqId};
/// # let limits = Limits { block_tokens: 16, n_blocks: 64, max_running: 4, max_step_tokens: 32, max_model_len: 512,
/// #     max_waiting: 8, prefix_cache: true, key_of: |parent, block| block.len() as u64 ^ parent };
/// let mut scheduler = Scheduler::new(limits);
/// # let ask = Ask { id: SeqId(1), prompt: [5, 6, 7].into(), max_tokens: 2, min_tokens: 0, stop_ids: [].into(),
/// #     root_key: 0, prompt_logprobs: false, prompt_logprobs_from: 0, deadline: None };
/// scheduler.add(ask)?;
/// while let Some(step) = scheduler.step(Micros(0)) {
///     // Here a device computes every row and samples where a work says so.
///     let sampled: Vec<u32> = step.works.iter().filter_map(|work| work.sample).collect();
///     scheduler.commit(step.id, &sampled);
///     for output in scheduler.take_outputs() {
///         println!("{output:?}");
///     }
/// }
/// assert!(scheduler.is_idle());
/// # Ok::<(), swallow_schedule::Refusal>(())
/// ```
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) limits: Limits,
    /// Bounds prefill beside decoding.
    pub(crate) pace: Option<Pace>,
    pub(crate) blocks: Blocks,
    /// Slots that no sequence holds; the last is the next to be used.
    pub(crate) slots: Vec<Slot>,
    pub(crate) sequences: Vec<Option<Sequence>>,
    /// Holes in `sequences`.
    pub(crate) vacant: Vec<Index>,
    /// Waiting and running sequences by the caller's name.
    pub(crate) ids: BTreeMap<SeqId, Index>,
    /// First come, first served; a preempted sequence keeps its place.
    pub(crate) waiting: BTreeMap<Arrival, Index>,
    /// Oldest first.
    pub(crate) running: BTreeMap<Arrival, Index>,
    pub(crate) deadlines: BTreeSet<(Micros, Index)>,
    pub(crate) flights: VecDeque<Flight>,
    /// Sequences whose window is full.
    pub(crate) n_parked: usize,
    /// Sequences that ended with steps in flight.
    pub(crate) n_lingering: usize,
    /// Blocks that prefill in flight completes, by key, with how often: whoever needs the same waits for the commit
    /// instead of computing it again.
    pub(crate) claims: BTreeMap<u64, u32>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) next_arrival: u64,
    pub(crate) next_step: u64,
    /// Counts planned works.
    pub(crate) next_turn: u64,
    pub(crate) preemptions: u64,
    pub(crate) prefix_query_tokens: u64,
    pub(crate) prefix_hit_tokens: u64,
}

impl Scheduler {
    /// An empty scheduler.
    ///
    /// # Panics
    /// If a limit is zero; the caller has validated them.
    pub fn new(limits: Limits) -> Self {
        for (name, value) in [
            ("block_tokens", limits.block_tokens),
            ("n_blocks", limits.n_blocks),
            ("max_running", limits.max_running),
            ("max_step_tokens", limits.max_step_tokens),
            ("max_model_len", limits.max_model_len),
            ("max_waiting", limits.max_waiting),
        ] {
            assert!(value > 0, "the scheduler's limit {name} is 0");
        }
        Self {
            blocks: Blocks::new(limits.n_blocks, limits.block_tokens as usize, limits.prefix_cache),
            slots: (0..limits.max_running).rev().map(Slot).collect(),
            limits,
            pace: None,
            sequences: Vec::new(),
            vacant: Vec::new(),
            ids: BTreeMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            flights: VecDeque::with_capacity(FLIGHTS_MAX),
            n_parked: 0,
            n_lingering: 0,
            claims: BTreeMap::new(),
            outputs: Vec::new(),
            next_arrival: 0,
            next_step: 1,
            next_turn: 1,
            preemptions: 0,
            prefix_query_tokens: 0,
            prefix_hit_tokens: 0,
        }
    }

    /// What it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// From now on a step in which a stream decodes has no more prefill than lets it end within the pace's target, by
    /// what its costs say; 128 rows of it at least. Steps without decoding are as long as the limits allow.
    pub fn set_pace(&mut self, pace: Pace) {
        self.pace = Some(pace);
    }

    /// How long a step will take; `None` without a pace, or before its costs know such steps.
    pub fn predict(&self, step: &Step) -> Option<Micros> {
        self.pace.as_ref()?.costs.predict(&StepCost::of(step))
    }

    /// A step took so long; nothing is learnt without a pace.
    pub fn learn(&mut self, step: &Step, took: Micros) {
        if let Some(pace) = &mut self.pace {
            pace.costs.learn(&StepCost::of(step), took);
        }
    }

    /// Lets a sequence wait for its turn.
    ///
    /// # Errors
    /// If it could never run here, or not now; nothing has changed then.
    pub fn add(&mut self, ask: Ask) -> Result<(), Refusal> {
        self.refuse(&ask)?;
        let arrival = Arrival(self.next_arrival);
        self.next_arrival += 1;
        let at = self.vacant.pop().unwrap_or_else(|| {
            self.sequences.push(None);
            Index(self.sequences.len() - 1)
        });
        self.ids.insert(ask.id, at);
        self.waiting.insert(arrival, at);
        if let Some(deadline) = ask.deadline {
            self.deadlines.insert((deadline, at));
        }
        self.sequences[at.0] = Some(Sequence::new(ask, arrival));
        Ok(())
    }

    fn refuse(&self, ask: &Ask) -> Result<(), Refusal> {
        if ask.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt);
        }
        if ask.max_tokens == 0 && !ask.prompt_logprobs {
            return Err(Refusal::NothingAsked);
        }
        let prompt = u32::try_from(ask.prompt.len()).unwrap_or(u32::MAX);
        let limit = self.limits.max_model_len;
        if prompt.checked_add(ask.max_tokens).is_none_or(|len| len > limit) {
            return Err(Refusal::TooLong {
                prompt,
                max_tokens: ask.max_tokens,
                limit,
            });
        }
        let needed = n_u32(Sequence::n_final_rows(ask).div_ceil(self.block_tokens()));
        if needed > self.limits.n_blocks {
            return Err(Refusal::NeverFits {
                needed,
                pool: self.limits.n_blocks,
            });
        }
        if self.ids.contains_key(&ask.id) {
            return Err(Refusal::DuplicateId(ask.id));
        }
        if self.waiting.len() >= self.limits.max_waiting as usize {
            return Err(Refusal::QueueFull {
                limit: self.limits.max_waiting,
            });
        }
        Ok(())
    }

    /// Ends a sequence wherever it is: `Finished` with `Cancelled` is put out at once, and its slot and blocks come
    /// back when the last step in flight that touches them is committed. An unknown id changes nothing.
    pub fn cancel(&mut self, id: SeqId) {
        if let Some(&at) = self.ids.get(&id) {
            self.end(at, Finish::Cancelled);
            self.blocks.assert_counts();
        }
    }

    /// Lets a sequence generate `tokens` in all before it has to wait for the next call; at least 1. A window that
    /// a sequence had before it began to run may shrink; later it only grows. An unknown id changes nothing.
    pub fn set_window(&mut self, id: SeqId, tokens: u32) {
        let Some(&at) = self.ids.get(&id) else { return };
        let seq = self.seq_mut(at);
        let untouched = seq.planned == 0 && !seq.started;
        seq.window = if untouched {
            tokens.max(1)
        } else {
            seq.window.max(tokens)
        };
        if seq.state == State::Parked && !seq.is_full() {
            // Parked => Waiting
            seq.state = State::Waiting;
            let arrival = seq.arrival;
            self.n_parked -= 1;
            self.waiting.insert(arrival, at);
        }
    }

    /// Lets a sequence go in step with the host, as a grammar demands: from now on it gets no row while a token of it is
    /// in flight, so that each token is seen before the next one is chosen. All others are planned ahead as ever. An
    /// unknown id changes nothing.
    pub fn keep_in_step(&mut self, id: SeqId) {
        if let Some(&at) = self.ids.get(&id) {
            self.seq_mut(at).in_step = true;
        }
    }

    /// Running => Parked: slot and blocks are for others, until the window opens.
    pub(crate) fn park(&mut self, at: Index) {
        let seq = self.sequences[at.0]
            .as_mut()
            .expect("a running sequence is there");
        let State::Running(slot) = seq.state else {
            unreachable!("only a running sequence generates")
        };
        seq.let_go(&mut self.blocks);
        seq.state = State::Parked;
        self.running.remove(&seq.arrival);
        self.slots.push(slot);
        self.n_parked += 1;
    }

    /// Everything that happened since the last call, in order.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// Keys that entered and left the prefix cache since the last call, net, each list in ascending order.
    pub fn take_kv_delta(&mut self) -> KvDelta {
        self.blocks.take_delta()
    }

    /// Every key in the prefix cache, in ascending order: what a new subscriber starts from. Deltas taken from now on
    /// continue it only if the pending one is taken (or dropped) in the same breath.
    pub fn cached_keys(&self) -> Vec<u64> {
        self.blocks.keys()
    }

    /// How busy it is; visits every sequence.
    pub fn load(&self) -> Load {
        let live = self.waiting.values().chain(self.running.values());
        let pending: usize = live
            .map(|&at| match self.seq(at).n_ready() {
                1 => 0,
                rows => rows,
            })
            .sum();
        Load {
            running: self.limits.max_running - n_u32(self.slots.len()),
            waiting: n_u32(self.waiting.len()),
            parked: n_u32(self.n_parked),
            pending_prefill_tokens: u32::try_from(pending).unwrap_or(u32::MAX),
            blocks_held: self.blocks.n_held(),
            blocks_cached: self.blocks.n_cached(),
            blocks_total: self.blocks.n_total(),
            preemptions: self.preemptions,
            prefix_query_tokens: self.prefix_query_tokens,
            prefix_hit_tokens: self.prefix_hit_tokens,
        }
    }

    /// When `step` should be called even if nothing else happens.
    pub fn next_deadline(&self) -> Option<Micros> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Nothing waits, runs, is parked, or is in flight.
    pub fn is_idle(&self) -> bool {
        self.ids.is_empty() && self.flights.is_empty()
    }

    /// (Waiting | Running) => (Lingering | gone): the last word about a sequence.
    pub(crate) fn end(&mut self, at: Index, why: Finish) {
        let seq = self.sequences[at.0]
            .as_mut()
            .expect("a sequence that ends is alive");
        self.ids.remove(&seq.ask.id);
        if let Some(deadline) = seq.ask.deadline {
            self.deadlines.remove(&(deadline, at));
        }
        self.outputs.push(Output::Finished {
            seq: seq.ask.id,
            why,
            n_tokens: n_u32(seq.n_generated()),
        });
        match seq.state {
            State::Waiting => {
                self.waiting.remove(&seq.arrival);
                self.vacate(at);
            }
            State::Parked => {
                self.n_parked -= 1;
                self.vacate(at);
            }
            State::Running(slot) => {
                self.running.remove(&seq.arrival);
                seq.state = State::Lingering(slot);
                self.n_lingering += 1;
                if seq.flights == 0 {
                    self.bury(at);
                }
            }
            State::Lingering(_) => unreachable!("a lingering sequence has ended already"),
        }
    }

    /// Lingering => gone: slot and blocks come back.
    pub(crate) fn bury(&mut self, at: Index) {
        let seq = self.sequences[at.0]
            .as_mut()
            .expect("a lingering sequence is still there");
        let State::Lingering(slot) = seq.state else {
            unreachable!("only ended sequences are buried")
        };
        seq.let_go(&mut self.blocks);
        self.slots.push(slot);
        self.n_lingering -= 1;
        self.vacate(at);
    }

    fn vacate(&mut self, at: Index) {
        self.sequences[at.0] = None;
        self.vacant.push(at);
    }

    pub(crate) fn seq(&self, at: Index) -> &Sequence {
        self.sequences[at.0]
            .as_ref()
            .expect("indices in use name sequences")
    }

    pub(crate) fn seq_mut(&mut self, at: Index) -> &mut Sequence {
        self.sequences[at.0]
            .as_mut()
            .expect("indices in use name sequences")
    }

    pub(crate) fn block_tokens(&self) -> usize {
        self.limits.block_tokens as usize
    }
}

/// Counts here are bounded by limits that began as `u32`.
pub(crate) fn n_u32(n: usize) -> u32 {
    u32::try_from(n).expect("counts are bounded by limits that are u32")
}
