//! One rank: a thread that loads its part of the model and then runs every step it is given.
//!
//! Whatever goes wrong here closes the exchange, so that the other ranks do not wait, and is told to the group once.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
};

use super::{
    Cause, FIRST_STEP, Fault, FaultKind, GroupError, GroupSpec, LoadProgress, Machine, RankMemory, Thread,
};
use crate::{
    device::{
        Device, DeviceError, Landed, StepMeta,
        cpu::{CpuDevice, CpuSpec, Exchange},
        cuda::{CudaDevice, GroupId},
    },
    model::{Llama, LlamaSpec, Weights},
};

/// A step to run.
pub(super) struct Job(pub(super) Arc<StepMeta>);

/// What a rank tells the group, about loading first and then about each step.
pub(super) struct Answer {
    pub(super) rank: usize,
    /// The step that landed, or that failed.
    pub(super) step: u64,
    pub(super) result: Result<Done, Cause>,
}

pub(super) enum Done {
    Loaded(RankMemory),
    Step(Landed),
}

/// A rank before its thread has started.
pub(super) struct Member {
    pub(super) rank: usize,
    pub(super) threads: usize,
    pub(super) spec: GroupSpec,
    pub(super) weights: Weights,
    /// Where GPUs of several ranks meet.
    pub(super) id: Option<GroupId>,
    pub(super) exchange: Arc<Exchange>,
    pub(super) progress: Arc<LoadProgress>,
    pub(super) answers: Sender<Answer>,
}

impl Member {
    /// Starts the rank's thread, which loads at once.
    pub(super) fn start(self) -> Result<Thread, GroupError> {
        let rank = self.rank;
        let (jobs, inbox) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("rank-{rank}"))
            .spawn(move || self.live(&inbox));
        let thread = thread.map_err(|error| GroupError::Load {
            rank,
            cause: Cause::NoThread(error.to_string()),
        })?;
        Ok(Thread {
            jobs,
            thread: Some(thread),
        })
    }

    fn live(self, inbox: &Receiver<Job>) {
        match self.spec.machine {
            Machine::Cpu => self.live_on(inbox, Self::cpu),
            Machine::Cuda => self.live_on(inbox, Self::cuda),
        }
    }

    fn live_on<D: Device>(self, inbox: &Receiver<Job>, make: fn(&Self) -> Result<D, DeviceError>) {
        let loaded = guard(|| self.load(make(&self)?));
        let (mut device, mut llama) = match loaded {
            Ok((device, llama, memory)) => {
                self.answer(FIRST_STEP, Ok(Done::Loaded(memory)));
                (device, llama)
            }
            Err(cause) => return self.answer(FIRST_STEP, Err(cause)),
        };
        if let Err((step, cause)) = self.run(inbox, &mut device, &mut llama) {
            self.answer(step, Err(cause));
        }
    }

    /// Gives the device every step as soon as it comes, and answers each as soon as it has landed, until the group is
    /// dropped or something fails.
    fn run<D: Device>(
        &self,
        inbox: &Receiver<Job>,
        device: &mut D,
        llama: &mut Llama<D>,
    ) -> Result<(), (u64, Cause)> {
        let mut flights = VecDeque::new();
        loop {
            let job = match flights.is_empty() {
                true => inbox.recv().map_err(|_| TryRecvError::Disconnected),
                false => inbox.try_recv(),
            };
            match job {
                Ok(Job(meta)) => {
                    let step = meta.id.0;
                    flights.push_back(step);
                    let launched = guard(|| {
                        self.misbehave(step, device)?;
                        llama
                            .forward(device, Arc::clone(&meta))
                            .map_err(|error| device.explain(error, Some(&meta)))
                    });
                    launched.map_err(|cause| (step, cause))?;
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
            let Some(&oldest) = flights.front() else { continue };
            let landed = guard(|| device.land().map_err(|error| device.explain(error, None)));
            match landed.map_err(|cause| (oldest, cause))? {
                Some(landed) => {
                    flights.pop_front();
                    self.answer(oldest, Ok(Done::Step(landed)));
                }
                None => std::hint::spin_loop(), // It takes milliseconds, and every microsecond counts.
            }
        }
    }

    fn cpu(&self) -> Result<CpuDevice, DeviceError> {
        let config = self.weights.config();
        let spec = CpuSpec {
            rank: self.rank,
            threads: self.threads,
            max_running: self.spec.max_running,
            max_rows: self.spec.max_step_tokens,
            hidden: config.hidden_size,
            split: self.spec.vocabulary(config),
        };
        CpuDevice::new(&spec, self.exchange.clone())
    }

    fn cuda(&self) -> Result<CudaDevice, DeviceError> {
        let spec = self.spec.cuda(self.weights.config(), self.rank);
        CudaDevice::new(spec, self.id, self.exchange.clone())
    }

    fn load<D: Device>(&self, mut device: D) -> Result<(D, Llama<D>, RankMemory), DeviceError> {
        let spec = LlamaSpec {
            shard: self.spec.shard(self.rank),
            split: self.spec.vocabulary(self.weights.config()),
            n_blocks: self.spec.n_blocks,
            block_tokens: self.spec.block_tokens,
            random_kv: self.spec.random_kv,
        };
        self.progress.begin();
        let llama = Llama::load(&mut device, &self.weights, spec, &self.progress.bytes_done)?;
        let (bytes, gpu) = (device.allocated(), device.memory()?);
        let memory = RankMemory {
            weights_bytes: bytes.weights,
            kv_bytes: bytes.kv,
            workspace_bytes: bytes.workspace,
            gpu_bytes: gpu.total,
            gpu_free_bytes: gpu.free,
        };
        Ok((device, llama, memory))
    }

    fn answer(&self, step: u64, result: Result<Done, Cause>) {
        if result.is_err() {
            self.exchange.close();
        }
        // Nobody listens any more only when the group is gone.
        let _ = self.answers.send(Answer {
            rank: self.rank,
            step,
            result,
        });
    }

    fn misbehave(&self, step: u64, device: &mut impl Device) -> Result<(), DeviceError> {
        match self.spec.fault {
            Some(Fault { rank, step: at, kind }) if rank == self.rank && step == at => match kind {
                FaultKind::Panic => panic!("asked to by a test"),
                FaultKind::Stall => {
                    self.exchange.wait_closed();
                    Err(DeviceError::Interrupted)
                }
                FaultKind::Diverge => {
                    device.disturb();
                    Ok(())
                }
            },
            _ => Ok(()),
        }
    }
}

/// Turns a panic into a cause.
fn guard<T>(f: impl FnOnce() -> Result<T, DeviceError>) -> Result<T, Cause> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(Cause::from),
        Err(panic) => Err(Cause::Panicked(message(&*panic))),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a message".to_owned())
}
