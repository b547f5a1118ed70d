//! A tensor-parallel group: ranks as threads of this process, given the same steps in the same order.
//!
//! Each rank loads its own slices and keeps its own part of the keys and values. A step may be launched while the one
//! before it is computed: ids that the host has not seen come from the device. The group lives and dies as one: after
//! a panic, a stall, or ranks that disagree, it names rank and step and never runs again.

mod error;
mod loading;
mod planned;
mod rank;
mod result;
mod spec;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::Ordering,
        mpsc::{self, Receiver, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use error::{Cause, GroupError};
pub use loading::{LoadProgress, MemoryReport, RankMemory};
pub use planned::on_gpus as planned_on_gpus;
pub use result::{PromptScores, Sampled, StepResult};
pub use spec::{Fault, FaultKind, GroupSpec, Machine};
use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};

use crate::{
    device::{DeviceError, Landed, StepMeta, StepShape, cpu::Exchange, cuda::GroupId},
    model::{Shard, Weights},
    sampling::{Sampler, SamplingParams},
};
use loading::bytes_to_read;
use rank::{Answer, Done, Job, Member};
use result::collect;
use spec::check;

/// The number of the step in which ranks load and warm up.
const FIRST_STEP: u64 = 0;
/// Rows of the warm-up step.
const WARM_UP_ROWS: usize = 8;

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
