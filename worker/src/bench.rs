//! `swallow-worker bench`: how fast this machine runs a model, beside how fast it could.
//!
//! Prompts are token ids and go through the scheduler, without sockets; what counts is when ids leave it. The ceilings
//! are measured in the same process: on a GPU once, before the group takes its memory; on processors before each line,
//! because other programs use them too. One JSON object a line on stdout, so that runs can be compared by a program; a
//! table for people on stderr at the end.

mod args;
mod ceiling;
mod cells;
mod drive;
mod floor;
mod load;
mod pool;
mod profile;
mod report;
mod startup;

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use self::{
    args::Measure,
    cells::{Cells, Decode, FirstToken},
    floor::{Ceilings, Floor, Rates},
    report::{Line, Report},
};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, LlamaConfig},
    device::{AHEAD_MAX, DeviceError},
    dummy::shapes,
    group::{Group, GroupError, GroupSpec, LoadProgress, Machine},
    model::{Shard, Weights},
    sampling::SamplingParams,
};

pub use args::{BenchArgs, BenchDevice, Cold, LoadFormat, Preset};

/// Tokens in one block.
const BLOCK_TOKENS: usize = 16;
/// A step that takes longer is hopeless, not slow.
const STEP_TIMEOUT: Duration = Duration::from_secs(600);

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The model cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The group does not run.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The GPU cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A flag makes no sense.
    #[error("{0}")]
    Flag(String),
    /// The process that measures the start did not.
    #[error("the start could not be measured: {0}")]
    Startup(String),
    /// Requests to a server failed.
    #[error("{0}")]
    Load(String),
}

/// Runs what the arguments say and prints a line for each measurement.
///
/// # Errors
/// If the model cannot be read or the group cannot run it.
pub fn run(args: BenchArgs) -> Result<(), BenchError> {
    match args.other {
        None => measure(&args.measure),
        Some(args::Other::Serve(load)) => load::run(&load),
        Some(args::Other::Startup(measure)) => startup::run(&measure),
    }
}

/// A model, and the group that will run it.
struct Setup {
    name: String,
    weights: Weights,
    spec: GroupSpec,
    cells: Cells,
}

impl Setup {
    fn new(args: &Measure) -> Result<Self, BenchError> {
        args.check()?;
        let (name, weights) = weights(args)?;
        let config = weights.config();
        let cells = Cells::new(args, config);
        let mut spec = GroupSpec {
            machine: match args.device {
                BenchDevice::Cpu => Machine::Cpu,
                BenchDevice::Cuda => Machine::Cuda,
            },
            tensor_parallel: args.tensor_parallel,
            rank_alone: args.rank_alone,
            threads: threads(args),
            block_tokens: BLOCK_TOKENS,
            n_blocks: cells.blocks(),
            max_running: cells.sequences(),
            max_step_tokens: cells.rows(args.max_step_tokens),
            max_model_len: cells.longest(),
            step_timeout: STEP_TIMEOUT,
            steps_ahead: match args.device {
                BenchDevice::Cuda if !args.lockstep => AHEAD_MAX,
                BenchDevice::Cuda | BenchDevice::Cpu => 1,
            },
            gpu: args.options(),
            random_kv: args.random_kv,
            fault: None,
        };
        spec.n_blocks = pool::blocks(config, &spec, args.device_memory_percent)?;
        Ok(Self {
            name,
            weights,
            spec,
            cells,
        })
    }
}

/// Threads of all ranks.
fn threads(args: &Measure) -> usize {
    args.threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
        .max(args.tensor_parallel)
}

fn measure(args: &Measure) -> Result<(), BenchError> {
    args.check()?;
    let mut report = Report::new(args.tuning());
    // Before this process has anything of the GPU.
    startup::measure(args, &mut report)?;
    let ceilings = Ceilings::new(args.device, threads(args))?;
    let Setup {
        name,
        weights,
        spec,
        cells,
    } = Setup::new(args)?;
    let config = weights.config().clone();
    let started = Instant::now();
    let mut group = Group::start(weights, spec.clone(), Arc::new(LoadProgress::default()))?;
    let memory = group.memory().total;
    report.add(Line::Group {
        model: name,
        load_format: args.load_format().name(),
        tensor_parallel: args.tensor_parallel,
        machine: ceilings.machine(),
        copy_gb_per_s: ceilings.gpu().map(|peaks| peaks.bytes_per_s / 1e9),
        read_gb_per_s: ceilings.gpu().map(|peaks| peaks.read_bytes_per_s / 1e9),
        gemm_tflop_per_s: ceilings.gpu().map(|peaks| peaks.flops_per_s / 1e12),
        load_seconds: started.elapsed().as_secs_f64(),
        weights_bytes: memory.weights_bytes,
        kv_bytes: memory.kv_bytes,
        workspace_bytes: memory.workspace_bytes,
        kv_tokens: spec.n_blocks * BLOCK_TOKENS,
    });
    let mut bench = Bench {
        group: &mut group,
        // Of the model; of one rank's part, if that runs alone.
        floor: Floor::new(
            &config,
            args.device,
            Shard {
                rank: 0,
                of: args.tensor_parallel / spec.n_members(),
            },
        ),
        vocab: spec.vocabulary(&config).n_vocab(),
        ranks: spec.n_members(),
        ceilings,
        spec,
        params: args.params(),
        random_kv: args.random_kv,
        report: &mut report,
        runs: 0,
    };
    if args.profile {
        bench.profile(&cells)?;
        report.table();
        return Ok(());
    }
    for &cell in &cells.first_token {
        bench.first_token(cell)?;
    }
    for &cell in &cells.decode {
        bench.decode(cell)?;
    }
    report.table();
    Ok(())
}

/// The model's name and where its numbers come from.
fn weights(args: &Measure) -> Result<(String, Weights), BenchError> {
    if let Some(folder) = &args.model {
        let name = folder.display().to_string();
        return Ok(match args.load_format() {
            LoadFormat::Safetensors => {
                let checkpoint = Checkpoint::open(folder, args.tensor_parallel)?;
                (name, Weights::Checkpoint(Arc::new(checkpoint)))
            }
            LoadFormat::Dummy => (name, LlamaConfig::read(folder)?.into()),
        });
    }
    let name = args.shape.clone().unwrap_or_default();
    let config = match shapes::config(&name) {
        Some(text) => LlamaConfig::parse(Path::new("config.json"), text.as_bytes())?,
        None => {
            let path = Path::new(&name);
            let text = std::fs::read(path).map_err(|error| {
                BenchError::Flag(format!(
                    "--shape={name}: neither {} nor a file that can be read: {error}",
                    shapes::NAMES.join(" nor ")
                ))
            })?;
            LlamaConfig::parse(path, &text)?
        }
    };
    Ok((name, config.into()))
}

struct Bench<'a> {
    group: &'a mut Group,
    floor: Floor,
    vocab: usize,
    ranks: usize,
    ceilings: Ceilings,
    spec: GroupSpec,
    /// Of generated tokens.
    params: SamplingParams,
    random_kv: bool,
    report: &'a mut Report,
    /// Batches so far; makes every prompt a new one.
    runs: u64,
}

impl Bench<'_> {
    fn batch(&mut self, sequences: usize, prompt: usize, outputs: usize) -> drive::Batch {
        self.runs += 1;
        drive::Batch {
            sequences,
            prompt,
            outputs,
            vocab: self.vocab,
            salt: self.runs,
        }
    }

    fn first_token(&mut self, cell: FirstToken) -> Result<(), BenchError> {
        let rates = self.ceilings.rates(self.ranks);
        let mut times = Vec::new();
        for round in 0..cell.warm_ups + cell.rounds {
            let batch = self.batch(1, cell.prompt, 1);
            let took = drive::first_token(self.group, &self.spec, batch, &self.params)?;
            if round >= cell.warm_ups {
                times.push(took.as_secs_f64() * 1e3);
            }
        }
        let ms = median(&times);
        let floor = |rates: Rates| 1e3 * self.floor.prefill_seconds(cell.prompt, rates);
        self.report.add(Line::FirstToken {
            tokens: cell.prompt,
            ms,
            rounds_ms: times,
            floor_ms: floor(rates),
            fraction: floor(rates) / ms,
            scaled_ms: rates.scaled().map(|scaled| ms * floor(scaled) / floor(rates)),
        });
        Ok(())
    }

    fn decode(&mut self, cell: Decode) -> Result<(), BenchError> {
        let rates = self.ceilings.rates(self.ranks);
        let (mut times, mut steps) = (Vec::new(), 0);
        for _ in 0..cell.repetitions {
            let batch = self.batch(cell.sequences, cell.prompt, cell.outputs);
            let measured = if self.random_kv {
                drive::decode_on_noise(self.group, batch, &self.params)?
            } else {
                drive::decode(self.group, &self.spec, batch, &self.params)?
            };
            times.push(measured.step.as_secs_f64() * 1e3);
            steps += measured.steps;
        }
        let ms = median(&times);
        // The middle step's.
        let context = cell.prompt + cell.outputs / 2;
        let floor = |rates: Rates| 1e3 * self.floor.decode_seconds(cell.sequences, context, rates);
        self.report.add(Line::Decode {
            batch: cell.sequences,
            context: cell.prompt,
            output_tokens: cell.outputs,
            step_ms: ms,
            repetitions_ms: times,
            steps,
            tokens_per_s: cell.sequences as f64 / ms * 1e3,
            bytes_per_step: self.floor.step_bytes(cell.sequences, context) as u64,
            ceiling_gb_per_s: rates.bytes_per_s / 1e9,
            floor_ms: floor(rates),
            fraction: floor(rates) / ms,
            scaled_ms: rates.scaled().map(|scaled| ms * floor(scaled) / floor(rates)),
        });
        Ok(())
    }
}

/// Of at least one number.
fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
