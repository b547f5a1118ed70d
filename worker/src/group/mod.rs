//! A tensor-parallel group: ranks as threads of this process, given the same steps in the same order.
//!
//! Each rank loads its own slices and keeps its own part of the keys and values. A step may be launched while the one
//! before it is computed: ids that the host has not seen come from the device. The group lives and dies as one: after
//! a panic, a stall, or ranks that disagree, it names rank and step and never runs again.

mod error;
mod planned;
mod rank;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use error::{Cause, GroupError};
pub use planned::on_gpus as planned_on_gpus;
use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};

use crate::{
    checkpoint::LlamaConfig,
    device::{
        AHEAD_MAX, DeviceError, HeadOut, HeadUse, Landed, OpTime, StepMeta, StepShape, VocabSplit,
        cpu::Exchange,
        cuda::{CudaSpec, GroupId, Options},
    },
    model::{Shard, Slice, Weights},
    sampling::{Sampler, SamplingParams, TokenScore},
};
use rank::{Answer, Done, Job, Member};

/// The number of the step in which ranks load and warm up.
const FIRST_STEP: u64 = 0;
/// Rows of the warm-up step.
const WARM_UP_ROWS: usize = 8;

/// What ranks compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Machine {
    /// This machine's processors, in fp32.
    #[default]
    Cpu,
    /// One NVIDIA GPU a rank, in bf16.
    Cuda,
}

/// How a group is made.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    /// What the ranks compute on.
    pub machine: Machine,
    /// Ranks.
    pub tensor_parallel: usize,
    /// For benchmarks: of these ranks the first one runs alone, with its share of the vocabulary, and nothing is exchanged.
    /// What it computes means nothing; it takes the time that its part of the group's work takes.
    pub rank_alone: bool,
    /// Threads of all ranks together on processors; each rank has at least one.
    pub threads: usize,
    /// Tokens in one block.
    pub block_tokens: usize,
    /// Blocks in the pool; every rank holds its heads of each.
    pub n_blocks: usize,
    /// Slots.
    pub max_running: usize,
    /// Rows of the largest step.
    pub max_step_tokens: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// A step that takes longer has stalled.
    pub step_timeout: Duration,
    /// Steps that may be launched before the first of them is finished, 1 or 2. With 2 a device that runs by itself
    /// never waits for the host between steps, and what arrives in a step waits for one more.
    pub steps_ahead: usize,
    /// How GPUs compute; processors have no choice.
    pub gpu: Options,
    /// For benchmarks: keys and values are random numbers from the start, as if something had been computed.
    pub random_kv: bool,
    /// Test instrument, on no command line: a rank that misbehaves.
    pub fault: Option<Fault>,
}

impl GroupSpec {
    /// Ranks that run.
    pub fn n_members(&self) -> usize {
        if self.rank_alone { 1 } else { self.tensor_parallel }
    }

    /// A rank's part of the model.
    fn shard(&self, rank: usize) -> Shard {
        Shard {
            rank,
            of: self.tensor_parallel,
        }
    }

    /// The vocabulary over the ranks that run.
    pub fn vocabulary(&self, config: &LlamaConfig) -> VocabSplit {
        match self.rank_alone {
            true => VocabSplit::new(self.shard(0).part(config.vocab_size).len(), 1),
            false => VocabSplit::new(config.vocab_size, self.tensor_parallel),
        }
    }

    /// A rank's device where ranks are GPUs.
    fn cuda(&self, config: &LlamaConfig, rank: usize) -> CudaSpec {
        let shard = self.shard(rank);
        CudaSpec {
            shard: Shard {
                rank,
                of: self.n_members(),
            },
            divided: self.tensor_parallel,
            max_running: self.max_running,
            max_rows: self.max_step_tokens,
            max_model_len: self.max_model_len,
            block_tokens: self.block_tokens,
            hidden: config.hidden_size,
            heads: shard.heads(config),
            inner: shard.part(config.intermediate_size).len(),
            split: self.vocabulary(config),
            options: self.gpu.clone(),
        }
    }
}

/// Test instrument: what goes wrong, where, and in which step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Who.
    pub rank: usize,
    /// When.
    pub step: u64,
    /// What.
    pub kind: FaultKind,
}

/// Ways to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The rank's thread panics.
    Panic,
    /// The rank does nothing until the group is gone.
    Stall,
    /// The rank's residual stream is changed.
    Diverge,
}

/// How far loading is, for whoever watches from another thread.
#[derive(Debug, Default)]
pub struct LoadProgress {
    /// Bytes of the checkpoint's files that the ranks read in all; what several ranks read counts for each.
    pub bytes_total: AtomicU64,
    /// Bytes read so far.
    pub bytes_done: AtomicU64,
    /// When the first rank began to read.
    began: OnceLock<Instant>,
    /// How long it took until every rank had its weights.
    took: OnceLock<Duration>,
}

impl LoadProgress {
    /// A rank begins to read.
    fn begin(&self) {
        self.began.get_or_init(Instant::now);
    }

    /// Every rank has its weights.
    fn end(&self) {
        if let Some(began) = self.began.get() {
            self.took.get_or_init(|| began.elapsed());
        }
    }

    /// How long reading took, from the first rank's first byte to the last one's last; `None` until then.
    pub fn took(&self) -> Option<Duration> {
        self.took.get().copied()
    }
}

/// Bytes that were allocated, not planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankMemory {
    /// Weights, in the device's layout.
    pub weights_bytes: u64,
    /// Keys and values.
    pub kv_bytes: u64,
    /// Activations, scratch and exchange.
    pub workspace_bytes: u64,
    /// All memory of the rank's GPU; 0 on processors.
    pub gpu_bytes: u64,
    /// What of it nobody uses.
    pub gpu_free_bytes: u64,
}

/// Memory of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryReport {
    /// By rank.
    pub ranks: Vec<RankMemory>,
    /// All ranks together.
    pub total: RankMemory,
}

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Whose.
    pub seq: SeqId,
    /// Which.
    pub token: u32,
    /// If log-probabilities were asked for.
    pub score: Option<TokenScore>,
}

/// Scores of consecutive prompt tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptScores {
    /// Whose.
    pub seq: SeqId,
    /// Position of the first scored token; the token at position 0 has no score.
    pub first_position: u32,
    /// One a token.
    pub scores: Vec<TokenScore>,
}

/// What a step computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// One for each work that samples, in order of works.
    pub sampled: Vec<Sampled>,
    /// One for each work whose rows predict prompt tokens that are to be scored.
    pub prompt_scores: Vec<PromptScores>,
    /// It ran from a recording.
    pub replayed: bool,
    /// Time that ranks spent meeting each other; that of the rank that spent most.
    pub exchanged: Option<Duration>,
    /// Where the first rank's time went, of a group that was told to look.
    pub op_times: Vec<OpTime>,
}

impl StepResult {
    /// The ids alone, as the scheduler commits them.
    pub fn tokens(&self) -> Vec<u32> {
        self.sampled.iter().map(|s| s.token).collect()
    }
}

/// A running group. Dropping it ends the ranks' threads.
pub struct Group {
    shape: StepShape,
    timeout: Duration,
    exchange: Arc<Exchange>,
    members: Vec<Thread>,
    answers: Receiver<Answer>,
    memory: MemoryReport,
    samplers: HashMap<SeqId, Arc<Mutex<Sampler>>>,
    steps_ahead: usize,
    /// Launched and not finished, oldest first.
    flights: VecDeque<Flight>,
    broken: Option<GroupError>,
}

/// A step that the ranks have.
struct Flight {
    meta: Arc<StepMeta>,
    /// By rank.
    landed: Vec<Option<Landed>>,
}

struct Thread {
    jobs: Sender<Job>,
    thread: Option<JoinHandle<()>>,
}

impl Group {
    /// Starts the ranks, loads the weights, and runs a warm-up step; returns when every rank has finished it.
    ///
    /// A checkpoint must have been opened for this degree of tensor parallelism.
    ///
    /// # Errors
    /// If a rank cannot allocate its memory, panics, or does not finish the warm-up in time.
    pub fn start(
        weights: impl Into<Weights>,
        spec: GroupSpec,
        progress: Arc<LoadProgress>,
    ) -> Result<Group, GroupError> {
        let weights = weights.into();
        check(&spec, weights.config())?;
        let shape = StepShape {
            block_tokens: spec.block_tokens,
            n_blocks: spec.n_blocks,
            max_running: spec.max_running,
            max_rows: spec.max_step_tokens,
            max_model_len: spec.max_model_len,
            n_vocab: spec.vocabulary(weights.config()).n_vocab(),
        };
        let id = meeting_point(&spec)?;
        progress
            .bytes_total
            .store(bytes_to_read(&weights, &spec), Ordering::Relaxed);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = spec.threads.max(spec.n_members());
        let exchange = Arc::new(Exchange::new(
            spec.n_members(),
            spec.max_step_tokens,
            threads > cores,
        ));
        let (answer, answers) = mpsc::channel();
        let mut group = Group {
            shape,
            timeout: spec.step_timeout,
            exchange,
            members: Vec::new(),
            answers,
            memory: MemoryReport::default(),
            samplers: HashMap::new(),
            steps_ahead: spec.steps_ahead,
            flights: VecDeque::new(),
            broken: None,
        };
        for rank in 0..spec.n_members() {
            let of_threads = Shard {
                rank,
                of: spec.n_members(),
            };
            let member = Member {
                rank,
                threads: of_threads.part(threads).len(),
                spec: spec.clone(),
                weights: weights.clone(),
                id,
                exchange: group.exchange.clone(),
                progress: progress.clone(),
                answers: answer.clone(),
            };
            group.members.push(member.start()?);
        }
        group.await_loading()?;
        progress.end();
        group.warm_up()?;
        Ok(group)
    }

    /// Makes a sequence's sampler, before its first step.
    pub fn admit(&mut self, seq: SeqId, params: SamplingParams, prompt: Arc<[u32]>) {
        self.samplers
            .insert(seq, Arc::new(Mutex::new(Sampler::new(params, prompt))));
    }

    /// Forgets a sequence, when it has finished and no step that names it will be run any more.
    pub fn retire(&mut self, seq: SeqId) {
        self.samplers.remove(&seq);
    }

    /// Steps that may be launched before the first of them is finished.
    pub fn steps_ahead(&self) -> usize {
        self.steps_ahead
    }

    /// Gives a step to all ranks.
    ///
    /// # Errors
    /// [`GroupError::Step`] leaves the group as it was: nothing has run. After any other error it is unusable, and
    /// repeats that error.
    ///
    /// # Panics
    /// If [`Group::steps_ahead`] steps are launched and not finished.
    pub fn launch(&mut self, step: &Step) -> Result<(), GroupError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        assert!(
            self.flights.len() < self.steps_ahead,
            "a step is finished before so many more are launched"
        );
        let meta = StepMeta::build(step, &self.shape, |seq| self.samplers.get(&seq).cloned())
            .map_err(GroupError::Step)?;
        let meta = Arc::new(meta);
        for member in &self.members {
            // A rank whose thread is gone has said why; its answer is read when a step is finished.
            let _ = member.jobs.send(Job(Arc::clone(&meta)));
        }
        self.flights.push_back(Flight {
            meta,
            landed: vec![None; self.members.len()],
        });
        Ok(())
    }

    /// Waits for the oldest launched step.
    ///
    /// # Errors
    /// A rank failed or stalled, or ranks disagree; the group is unusable then, and repeats the error.
    ///
    /// # Panics
    /// If no step is launched.
    pub fn finish(&mut self) -> Result<StepResult, GroupError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let landed = self.land_oldest().inspect_err(|error| {
            self.exchange.close();
            self.broken = Some(error.clone());
        })?;
        let flight = self.flights.pop_front().expect("it has landed just now");
        Ok(collect(&flight.meta, landed))
    }

    /// Launches a step and waits for it; no other may be launched.
    ///
    /// # Errors
    /// As for [`Group::launch`] and [`Group::finish`].
    pub fn run(&mut self, step: &Step) -> Result<StepResult, GroupError> {
        self.launch(step)?;
        self.finish()
    }

    /// Bytes that the ranks have allocated.
    pub fn memory(&self) -> &MemoryReport {
        &self.memory
    }

    /// Reads the ranks' answers until the oldest step has landed on all of them.
    fn land_oldest(&mut self) -> Result<Vec<Landed>, GroupError> {
        let deadline = Instant::now() + self.timeout;
        let mut failed: Vec<Option<(u64, Cause)>> = vec![None; self.members.len()];
        let oldest = |flights: &VecDeque<Flight>| flights.front().expect("a step is launched").meta.id.0;
        loop {
            let landed = &self.flights.front().expect("a step is launched").landed;
            if landed
                .iter()
                .zip(&failed)
                .all(|(landed, failed)| landed.is_some() || failed.is_some())
            {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.answers.recv_timeout(left) {
                Ok(Answer { rank, step, result }) => match result {
                    Ok(Done::Step(landed)) => self.land(rank, landed),
                    Ok(Done::Loaded(_)) => unreachable!("loading was awaited before the first step"),
                    Err(cause) => failed[rank] = Some((step, cause)),
                },
                Err(_) if failed.iter().all(Option::is_none) => {
                    return Err(GroupError::Stalled {
                        rank: self.last(),
                        step: oldest(&self.flights),
                        seconds: self.timeout.as_secs_f64(),
                    });
                }
                Err(_) => break,
            }
        }
        // A rank's own failure counts; the others only saw the exchange close.
        let own = |(_, (_, cause)): &(usize, (u64, Cause))| *cause == Cause::Interrupted;
        let failed = failed.into_iter().enumerate();
        if let Some((rank, (step, cause))) = failed.filter_map(|(rank, f)| Some((rank, f?))).min_by_key(own) {
            return Err(GroupError::Failed { rank, step, cause });
        }
        self.agreed()
    }

    /// Puts a rank's answer to the oldest step that it has not answered.
    fn land(&mut self, rank: usize, landed: Landed) {
        let open = self
            .flights
            .iter_mut()
            .find(|flight| flight.landed[rank].is_none());
        open.expect("a rank answers what it was given").landed[rank] = Some(landed);
    }

    /// The rank that the others wait for: of those that have not answered, the one that came to the fewest meetings.
    fn last(&self) -> usize {
        let landed = &self.flights.front().expect("a step is launched").landed;
        let silent = (0..landed.len()).filter(|&rank| landed[rank].is_none());
        silent
            .min_by_key(|&rank| self.exchange.meetings(rank))
            .unwrap_or_default()
    }

    /// The answers of all ranks to the oldest step, which agree on the residual stream.
    fn agreed(&mut self) -> Result<Vec<Landed>, GroupError> {
        let flight = self.flights.front_mut().expect("a step is launched");
        let landed: Vec<Landed> = flight.landed.iter_mut().filter_map(Option::take).collect();
        let first = landed.first().map(|landed| landed.fingerprint);
        if let Some(rank) = landed.iter().position(|landed| Some(landed.fingerprint) != first) {
            return Err(GroupError::Failed {
                rank,
                step: flight.meta.id.0,
                cause: Cause::Device(DeviceError::Diverged(0)),
            });
        }
        Ok(landed)
    }

    /// Loading has no time limit: it depends on disks, and its progress is visible.
    fn await_loading(&mut self) -> Result<(), GroupError> {
        self.memory.ranks = vec![RankMemory::default(); self.members.len()];
        for _ in 0..self.members.len() {
            match self.answers.recv() {
                Ok(Answer {
                    rank,
                    result: Ok(Done::Loaded(memory)),
                    ..
                }) => {
                    self.memory.ranks[rank] = memory;
                    self.memory.total.weights_bytes += memory.weights_bytes;
                    self.memory.total.kv_bytes += memory.kv_bytes;
                    self.memory.total.workspace_bytes += memory.workspace_bytes;
                    self.memory.total.gpu_bytes += memory.gpu_bytes;
                    self.memory.total.gpu_free_bytes += memory.gpu_free_bytes;
                }
                Ok(Answer {
                    rank,
                    result: Err(cause),
                    ..
                }) => {
                    let error = GroupError::Load { rank, cause };
                    self.broken = Some(error.clone());
                    return Err(error);
                }
                Ok(Answer {
                    result: Ok(Done::Step(_)),
                    ..
                })
                | Err(_) => {}
            }
        }
        Ok(())
    }

    /// One small prefill, sampled: touches every weight on every rank. It leaves keys and values in block 0, which
    /// nobody reads before writing.
    fn warm_up(&mut self) -> Result<(), GroupError> {
        let shape = &self.shape;
        let n = WARM_UP_ROWS
            .min(shape.max_rows)
            .min(shape.max_model_len)
            .min(shape.block_tokens);
        let seq = SeqId(u64::MAX);
        self.admit(seq, SamplingParams::greedy(), vec![0; n].into());
        let work = Work {
            seq,
            slot: Slot(0),
            start: 0,
            input: Input::Tokens(vec![0; n]),
            blocks: vec![BlockId(0)],
            sample: Some(0),
            prompt_logprobs: false,
        };
        let result = self.run(&Step {
            id: StepId(FIRST_STEP),
            works: vec![work],
        });
        self.retire(seq);
        result.map(drop)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.exchange.close();
        for member in &mut self.members {
            let (gone, _) = mpsc::channel();
            member.jobs = gone; // the rank's loop ends when its sender is dropped
        }
        // A stalled thread cannot be joined, and one that still loads is not worth waiting for.
        if matches!(
            self.broken,
            Some(GroupError::Stalled { .. } | GroupError::Load { .. })
        ) {
            return;
        }
        for thread in self.members.iter_mut().filter_map(|member| member.thread.take()) {
            let _ = thread.join(); // panics were caught and told
        }
    }
}

/// What GPUs need to find each other.
fn meeting_point(spec: &GroupSpec) -> Result<Option<GroupId>, GroupError> {
    if spec.machine == Machine::Cpu || spec.n_members() == 1 {
        return Ok(None);
    }
    GroupId::new().map(Some).map_err(|error| GroupError::Load {
        rank: 0,
        cause: error.into(),
    })
}

fn check(spec: &GroupSpec, config: &LlamaConfig) -> Result<(), GroupError> {
    if let Some(obstacle) = config.tensor_parallel_obstacle(spec.tensor_parallel) {
        return Err(GroupError::Spec(obstacle));
    }
    let counts = [
        ("block_tokens", spec.block_tokens),
        ("n_blocks", spec.n_blocks),
        ("max_running", spec.max_running),
        ("max_step_tokens", spec.max_step_tokens),
        ("max_model_len", spec.max_model_len),
        ("steps_ahead", spec.steps_ahead),
    ];
    for (name, count) in counts {
        if count == 0 {
            return Err(GroupError::Spec(format!("{name} is 0; it must be at least 1")));
        }
    }
    if spec.steps_ahead > AHEAD_MAX {
        return Err(GroupError::Spec(format!(
            "steps_ahead is {}; it must be at most {AHEAD_MAX}",
            spec.steps_ahead
        )));
    }
    if spec.n_blocks.saturating_mul(spec.block_tokens) > u32::MAX as usize {
        return Err(GroupError::Spec(format!(
            "{} blocks of {} tokens are more than 2^32 tokens; lower the memory for keys and values",
            spec.n_blocks, spec.block_tokens
        )));
    }
    Ok(())
}

fn bytes_to_read(weights: &Weights, spec: &GroupSpec) -> u64 {
    let rank = |rank| {
        let slices = spec.shard(rank).slices(weights.config());
        let bytes = |s: &Slice| s.outs * s.ins * weights.number_bytes(s);
        slices.iter().map(bytes).sum::<usize>() as u64
    };
    (0..spec.n_members()).map(rank).sum()
}

/// Puts the ranks' answers in the order of the step's asks.
fn collect(meta: &StepMeta, mut landed: Vec<Landed>) -> StepResult {
    let op_times = landed
        .first_mut()
        .map(|first| std::mem::take(&mut first.op_times));
    let replayed = landed.iter().all(|landed| landed.replayed);
    let exchanged = landed.iter().filter_map(|landed| landed.exchanged).max();
    let mut outs: Vec<HeadOut> = landed.into_iter().flat_map(|landed| landed.outs).collect();
    outs.sort_unstable_by_key(|out| out.ask);
    assert!(
        outs.iter().map(|out| out.ask).eq(0..meta.asks.len()),
        "each ask is answered once"
    );
    let mut result = StepResult {
        replayed,
        exchanged,
        op_times: op_times.unwrap_or_default(),
        ..StepResult::default()
    };
    for (ask, out) in meta.asks.iter().zip(outs) {
        match (ask.what, out.score) {
            (HeadUse::Sample { .. }, score) => {
                result.sampled.push(Sampled {
                    seq: ask.seq,
                    token: out.token,
                    score,
                });
            }
            (HeadUse::Score, Some(score)) => match result.prompt_scores.last_mut() {
                Some(scores) if scores.seq == ask.seq => scores.scores.push(score),
                _ => result.prompt_scores.push(PromptScores {
                    seq: ask.seq,
                    first_position: ask.position + 1,
                    scores: vec![score],
                }),
            },
            (HeadUse::Score, None) => unreachable!("a score is what was asked for"),
        }
    }
    result
}
