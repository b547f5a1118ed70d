//! A runner without a model: every sequence says its own prompt again and again, so that each token of each stream can
//! be checked. It can be held, slowed and broken, and it checks what it is asked to run. Launched steps wait until they
//! are finished, and what a slot last sampled is kept as a device keeps it, so a step may run ahead of the host.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use swallow_schedule::{Input, SeqId, Slot, Step, Work};
use swallow_worker::{
    engine::Runner,
    group::{PromptScores, Sampled, StepResult},
    sampling::{SamplingParams, TokenScore},
};

/// What a rank's end looks like from outside.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank 1 panicked in step {step}: injected")]
pub struct Broken {
    step: u64,
}

#[derive(Debug, Default)]
struct Inner {
    held: bool,
    /// A step waits for `release`.
    waits: bool,
    break_next: bool,
    panic_next: bool,
    pace: Duration,
    steps: u64,
    sequences: usize,
    most_launched: usize,
    ahead: Ahead,
}

/// Rows of steps that were launched while another step was under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ahead {
    /// Of sequences that anything may follow.
    pub free: u32,
    /// Of sequences that are held to a grammar.
    pub constrained: u32,
}

/// The test's hand on the runner.
#[derive(Clone, Debug, Default)]
pub struct Controls(Arc<(Mutex<Inner>, Condvar)>);

impl Controls {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.0.lock().expect("no holder panics")
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner());
        self.0.1.notify_all();
    }

    /// The next step does not begin until `release`.
    pub fn hold(&self) {
        self.change(|inner| inner.held = true);
    }

    pub fn release(&self) {
        self.change(|inner| inner.held = false);
    }

    /// The next step fails.
    pub fn break_next(&self) {
        self.change(|inner| inner.break_next = true);
    }

    /// The next step panics on the engine's thread.
    pub fn panic_next(&self) {
        self.change(|inner| inner.panic_next = true);
    }

    /// Every step takes at least this long.
    pub fn pace(&self, pace: Duration) {
        self.change(|inner| inner.pace = pace);
    }

    /// Blocks until `until` holds.
    fn wait(&self, until: impl Fn(&Inner) -> bool) {
        let patience = Duration::from_secs(20);
        let (lock, changed) = &*self.0;
        let guard = lock.lock().expect("no holder panics");
        let (guard, late) = changed
            .wait_timeout_while(guard, patience, |inner| !until(inner))
            .expect("no holder panics");
        assert!(!late.timed_out(), "{:?}", *guard);
    }

    /// Steps that were launched and not finished at the same time, at most.
    pub fn most_launched(&self) -> usize {
        self.inner().most_launched
    }

    /// What was launched ahead so far.
    pub fn ahead(&self) -> Ahead {
        self.inner().ahead
    }

    /// Returns once the runner keeps state for no sequence.
    pub async fn empty(&self) {
        let controls = self.clone();
        tokio::task::spawn_blocking(move || controls.wait(|inner| inner.sequences == 0))
            .await
            .expect("in time");
    }

    /// Returns once a step is held.
    pub async fn held(&self) {
        let controls = self.clone();
        tokio::task::spawn_blocking(move || controls.wait(|inner| inner.waits))
            .await
            .expect("in time");
    }

    /// Returns once so many steps have begun.
    pub async fn begun(&self, steps: u64) {
        let controls = self.clone();
        tokio::task::spawn_blocking(move || controls.wait(|inner| inner.steps >= steps))
            .await
            .expect("in time");
    }
}

/// The token that a prompt is continued with at `index`.
pub fn echo(prompt: &[u32], index: usize) -> u32 {
    prompt[index % prompt.len()]
}

struct Sequence {
    params: SamplingParams,
    prompt: Arc<[u32]>,
}

impl Sequence {
    fn token_at(&self, position: usize) -> u32 {
        self.prompt
            .get(position)
            .copied()
            .unwrap_or_else(|| echo(&self.prompt, position - self.prompt.len()))
    }
}

/// See the module's text.
pub struct Fake {
    controls: Controls,
    steps_ahead: usize,
    sequences: HashMap<SeqId, Arc<Sequence>>,
    /// Launched steps, and the sequences of their works, which may be retired before the step is finished.
    flights: VecDeque<(Step, Vec<Arc<Sequence>>)>,
    last_sampled: HashMap<Slot, u32>,
}

impl Fake {
    pub fn new(controls: Controls, steps_ahead: usize) -> Self {
        Self {
            controls,
            steps_ahead,
            sequences: HashMap::new(),
            flights: VecDeque::new(),
            last_sampled: HashMap::new(),
        }
    }

    /// Counts the rows of a step that follows one whose tokens nobody has seen. A token that a grammar has to allow is
    /// never chosen before the last one was seen.
    fn see_ahead(&self, step: &Step, sequences: &[Arc<Sequence>]) {
        let Some((under_way, _)) = self.flights.back() else {
            return;
        };
        let unseen = |seq| {
            let works = &under_way.works;
            works.iter().any(|work| work.seq == seq && work.sample.is_some())
        };
        let mut rows = Ahead::default();
        for (work, sequence) in step.works.iter().zip(sequences) {
            match sequence.params.grammar {
                None => rows.free += 1,
                Some(_) => {
                    assert!(!unseen(work.seq), "{work:?}");
                    rows.constrained += 1;
                }
            }
        }
        self.controls.change(|inner| {
            inner.ahead.free += rows.free;
            inner.ahead.constrained += rows.constrained;
        });
    }

    fn check(&self, work: &Work, sequence: &Sequence) {
        let ids = match &work.input {
            Input::Tokens(ids) => ids.clone(),
            Input::LastSampled => vec![self.last_sampled[&work.slot]],
        };
        for (position, id) in (work.start as usize..).zip(ids) {
            assert_eq!(id, sequence.token_at(position), "{:?} at {position}", work.seq);
        }
    }
}

fn score(token: u32, position: u32, n_top: u32) -> TokenScore {
    let top = (0..n_top).map(|i| (token + i, -(i as f32))).collect();
    TokenScore {
        token,
        logprob: -(position as f32),
        rank: 1,
        top,
    }
}

impl Runner for Fake {
    type Error = Broken;

    fn admit(&mut self, seq: SeqId, params: SamplingParams, prompt: Arc<[u32]>) {
        let old = self.sequences.insert(seq, Arc::new(Sequence { params, prompt }));
        assert!(old.is_none(), "{seq:?} was admitted twice");
        let now = self.sequences.len();
        self.controls.change(|inner| inner.sequences = now);
    }

    fn retire(&mut self, seq: SeqId) {
        self.sequences.remove(&seq).expect("only the living are retired");
        let now = self.sequences.len();
        self.controls.change(|inner| inner.sequences = now);
    }

    fn steps_ahead(&self) -> usize {
        self.steps_ahead
    }

    fn launch(&mut self, step: &Step) -> Result<(), Broken> {
        assert!(self.flights.len() < self.steps_ahead);
        let sequence = |work: &Work| {
            let sequence = self.sequences.get(&work.seq);
            Arc::clone(sequence.expect("admitted, and not retired yet"))
        };
        let sequences: Vec<_> = step.works.iter().map(sequence).collect();
        self.see_ahead(step, &sequences);
        self.flights.push_back((step.clone(), sequences));
        let launched = self.flights.len();
        self.controls
            .change(|inner| inner.most_launched = inner.most_launched.max(launched));
        Ok(())
    }

    fn finish(&mut self) -> Result<StepResult, Broken> {
        let (step, sequences) = self.flights.pop_front().expect("a step is launched");
        self.controls.change(|inner| inner.steps += 1);
        let (lock, changed) = &*self.controls.0;
        let mut guard = lock.lock().expect("no holder panics");
        guard.waits = guard.held;
        changed.notify_all();
        let mut guard = changed
            .wait_while(guard, |inner| inner.held)
            .expect("no holder panics");
        guard.waits = false;
        if std::mem::take(&mut guard.break_next) {
            return Err(Broken { step: step.id.0 });
        }
        let panics = std::mem::take(&mut guard.panic_next);
        let pace = guard.pace;
        drop(guard);
        assert!(!panics, "injected");
        std::thread::sleep(pace); // The model's own time; nothing waits for it to pass.
        let mut result = StepResult {
            sampled: Vec::new(),
            prompt_scores: Vec::new(),
            replayed: false,
            exchanged: None,
            op_times: Vec::new(),
        };
        for (work, sequence) in step.works.iter().zip(&sequences) {
            self.check(work, sequence);
            let prompt = &sequence.prompt;
            let n_prompt = u32::try_from(prompt.len()).expect("short");
            if let (true, Some(n_top)) = (work.prompt_logprobs, sequence.params.prompt_logprobs) {
                let predicted = work.start + 1..(work.start + work.rows() + 1).min(n_prompt);
                let scores = predicted
                    .clone()
                    .map(|at| score(prompt[at as usize], at, n_top))
                    .collect::<Vec<_>>();
                result.prompt_scores.push(PromptScores {
                    seq: work.seq,
                    first_position: predicted.start,
                    scores,
                });
            }
            if let Some(index) = work.sample {
                let token = echo(prompt, index as usize);
                self.last_sampled.insert(work.slot, token);
                let score = sequence
                    .params
                    .logprobs
                    .map(|n_top| score(token, n_prompt + index, n_top));
                result.sampled.push(Sampled {
                    seq: work.seq,
                    token,
                    score,
                });
            }
        }
        Ok(result)
    }
}
