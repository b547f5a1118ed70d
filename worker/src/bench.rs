//! `swallow-worker bench`: how fast this machine runs a model, beside how fast it could.
//!
//! Prefill steps go straight to the group; decoding goes through the scheduler, without sockets. Before each
//! measurement the same number of threads measures the ceiling: multiplications from registers for prefill, reading a
//! buffer larger than the caches for decode; on a GPU both once. One JSON object a line, so that runs can be compared by
//! a program.

mod ceiling;
mod decode;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;
use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};

use crate::{
    checkpoint::{Checkpoint, CheckpointError, LlamaConfig},
    device::{AHEAD_MAX, DeviceError, cpu::Isa, cuda},
    dummy::shapes,
    group::{Group, GroupError, GroupSpec, LoadProgress, Machine},
    model::Weights,
    sampling::SamplingParams,
};
use decode::Batch;

/// Tokens in one block.
const BLOCK_TOKENS: usize = 16;
/// A step that takes longer is hopeless, not slow.
const STEP_TIMEOUT: Duration = Duration::from_secs(600);
/// Measured steps, whatever time they take.
const STEPS_AT_LEAST: usize = 3;

/// Where the ranks compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum BenchDevice {
    /// This machine's processors.
    Cpu,
    /// NVIDIA GPUs, one a rank.
    Cuda,
}

/// Where the weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadFormat {
    /// The safetensors files of the model's folder.
    Safetensors,
    /// A formula, for the shape alone.
    Dummy,
}

/// Measures prefill and decode speed beside the ceilings of memory and arithmetic.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Folder with config.json and safetensors files.
    #[arg(long, value_name = "DIR", required_unless_present = "shape")]
    pub model: Option<PathBuf>,
    /// Instead of a folder: llama-3-8b, llama-3.3-70b, or a config.json; needs --load-format=dummy.
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub shape: Option<String>,
    /// Where the weights come from.
    #[arg(long, value_enum, default_value = "safetensors")]
    pub load_format: LoadFormat,
    /// Where the ranks compute.
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: BenchDevice,
    /// Ranks of the group.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub tensor_parallel: usize,
    /// Threads of all ranks together. Default: one a core.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Prompt tokens of the prefill measurement, in one step; a list measures each.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [512])]
    pub prefill_tokens: Vec<usize>,
    /// Sequences that decode together; a list measures each.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 8, 32])]
    pub batch: Vec<usize>,
    /// Tokens of each prompt that is decoded after.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub context: usize,
    /// Tokens that each sequence generates.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub output_tokens: usize,
    /// Divides the logits of decoded rows; 0 takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Draws among the likeliest tokens whose probabilities reach this sum.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Draws among this many likeliest tokens; 0: all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: u32,
    /// Most prompt tokens that are computed in one step before decoding; more if a prefill is longer.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub max_step_tokens: usize,
    /// Seconds of each measurement of prefill; each decode batch is measured once.
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    pub seconds: f64,
    /// On a GPU: wait for every step's tokens before the next is launched.
    #[arg(long)]
    pub lockstep: bool,
    /// On a GPU: launch decode steps kernel by kernel.
    #[arg(long)]
    pub no_recordings: bool,
    /// On a GPU: leave kernels alone that are for one architecture.
    #[arg(long)]
    pub portable_kernels: bool,
}

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
}

/// One line of output.
#[derive(Serialize)]
#[serde(tag = "measured", rename_all = "snake_case")]
enum Line<'a> {
    Group {
        model: &'a str,
        load_format: &'a str,
        tensor_parallel: usize,
        /// A GPU's name, or threads and their instruction set.
        machine: &'a str,
        /// What a copy and a matrix product reach here, measured just before; on processors beside each line instead.
        #[serde(skip_serializing_if = "Option::is_none")]
        copy_gb_per_s: Option<f64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        gemm_tflop_per_s: Option<f64>,
        load_seconds: f64,
        weights_bytes: u64,
        workspace_bytes: u64,
    },
    Prefill {
        tokens: usize,
        step_ms: f64,
        tokens_per_s: f64,
        gflop_per_token: f64,
        /// Fused multiply-adds from registers, two operations each.
        ceiling_gflop_per_s: f64,
        ceiling_tokens_per_s: f64,
        fraction: f64,
    },
    Decode {
        batch: usize,
        context: usize,
        output_tokens: usize,
        tokens_per_s: f64,
        /// Median time between steps, with all that the scheduler does.
        step_ms: f64,
        /// Steps that were measured.
        steps: usize,
        /// Weights, keys and values that a step reads.
        bytes_per_step: u64,
        /// Reading a buffer larger than the caches. A model that fits the caches can be faster.
        ceiling_gb_per_s: f64,
        /// The slower of memory and arithmetic for the weights, and memory for keys and values.
        ceiling_tokens_per_s: f64,
        fraction: f64,
    },
}

/// Runs all measurements and prints a line for each.
///
/// # Errors
/// If the model cannot be read or the group cannot run it.
pub fn run(args: BenchArgs) -> Result<(), BenchError> {
    check(&args)?;
    let threads = args
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
        .max(args.tensor_parallel);
    let (name, weights) = weights(&args)?;
    let config = weights.config().clone();
    let ceilings = Ceilings::new(args.device, threads)?;
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let longest = args.prefill_tokens.iter().copied().max().unwrap_or(1);
    let batches: Vec<Batch> = args
        .batch
        .iter()
        .map(|&sequences| Batch {
            sequences,
            prompt: args.context,
            outputs: args.output_tokens,
            max_step_tokens: args.max_step_tokens.max(sequences),
            vocab: config.vocab_size,
        })
        .collect();
    let blocks = batches.iter().map(Batch::blocks).max().unwrap_or(1);
    let spec = GroupSpec {
        machine: match args.device {
            BenchDevice::Cpu => Machine::Cpu,
            BenchDevice::Cuda => Machine::Cuda,
        },
        tensor_parallel: args.tensor_parallel,
        threads,
        block_tokens: BLOCK_TOKENS,
        n_blocks: blocks.max(longest.div_ceil(BLOCK_TOKENS)),
        max_running: most,
        max_step_tokens: most.max(longest).max(args.max_step_tokens),
        max_model_len: (args.context + args.output_tokens).max(longest),
        step_timeout: STEP_TIMEOUT,
        steps_ahead: match args.device {
            BenchDevice::Cuda if !args.lockstep => AHEAD_MAX,
            BenchDevice::Cuda | BenchDevice::Cpu => 1,
        },
        record: !args.no_recordings,
        portable: args.portable_kernels,
        tuned: true,
        fault: None,
    };
    let started = Instant::now();
    let mut group = Group::start(weights, spec, Arc::new(LoadProgress::default()))?;
    let memory = group.memory().total;
    print(&Line::Group {
        model: &name,
        load_format: match args.load_format {
            LoadFormat::Safetensors => "safetensors",
            LoadFormat::Dummy => "dummy",
        },
        tensor_parallel: args.tensor_parallel,
        machine: &ceilings.machine(),
        copy_gb_per_s: ceilings.gpu().map(|peaks| peaks.bytes_per_s / 1e9),
        gemm_tflop_per_s: ceilings.gpu().map(|peaks| peaks.flops_per_s / 1e12),
        load_seconds: started.elapsed().as_secs_f64(),
        weights_bytes: memory.weights_bytes,
        workspace_bytes: memory.workspace_bytes,
    });
    let mut bench = Bench {
        group: &mut group,
        config,
        ranks: args.tensor_parallel as f64,
        ceilings,
        number_bytes: match args.device {
            BenchDevice::Cpu => 4.0,
            BenchDevice::Cuda => 2.0,
        },
        params: SamplingParams {
            temperature: args.temperature,
            top_p: args.top_p,
            top_k: args.top_k,
            ..SamplingParams::greedy()
        },
        seconds: Duration::from_secs_f64(args.seconds),
        step: 0,
    };
    for &tokens in &args.prefill_tokens {
        bench.prefill(tokens)?;
    }
    for batch in batches {
        bench.decode(batch)?;
    }
    Ok(())
}

fn check(args: &BenchArgs) -> Result<(), BenchError> {
    let flag = |text: &str| Err(BenchError::Flag(text.to_owned()));
    if args.load_format == LoadFormat::Safetensors && args.shape.is_some() {
        return flag("--shape names no files; give --load-format=dummy with it, or --model");
    }
    if args.max_step_tokens == 0 || args.prefill_tokens.is_empty() || args.prefill_tokens.contains(&0) {
        return flag("--prefill-tokens and --max-step-tokens must be at least 1");
    }
    if args.batch.is_empty() || args.batch.contains(&0) || args.context == 0 {
        return flag("--batch and --context must be at least 1");
    }
    if args.output_tokens < 3 {
        return flag("--output-tokens must be at least 3: a step is measured from the one before it");
    }
    if args.threads == Some(0) || args.tensor_parallel == 0 {
        return flag("--threads and --tensor-parallel must be at least 1");
    }
    if !(args.seconds > 0.0 && args.seconds <= 3600.0) {
        return flag("--seconds must be above 0 and at most 3600");
    }
    Ok(())
}

/// The model's name and where its numbers come from.
fn weights(args: &BenchArgs) -> Result<(String, Weights), BenchError> {
    if let Some(folder) = &args.model {
        let name = folder.display().to_string();
        return Ok(match args.load_format {
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

/// What limits a step here.
enum Ceilings {
    /// Measured before each line, because other programs use the same processors.
    Cpu { threads: usize },
    /// Measured once, before the group takes the GPU's memory.
    Gpu(cuda::Peaks),
}

impl Ceilings {
    fn new(device: BenchDevice, threads: usize) -> Result<Self, BenchError> {
        Ok(match device {
            BenchDevice::Cpu => Self::Cpu { threads },
            BenchDevice::Cuda => Self::Gpu(cuda::measure_peaks()?),
        })
    }

    fn machine(&self) -> String {
        match self {
            Self::Cpu { threads } => format!("{threads} threads, {}", Isa::detect().name()),
            Self::Gpu(peaks) => peaks.name.clone(),
        }
    }

    fn gpu(&self) -> Option<&cuda::Peaks> {
        match self {
            Self::Cpu { .. } => None,
            Self::Gpu(peaks) => Some(peaks),
        }
    }

    /// Floating-point operations a second of one rank's machine; all ranks share processors.
    fn flops(&self) -> f64 {
        match self {
            Self::Cpu { threads } => ceiling::flops(*threads),
            Self::Gpu(peaks) => peaks.flops_per_s,
        }
    }

    /// Bytes a second.
    fn bandwidth(&self) -> f64 {
        match self {
            Self::Cpu { threads } => ceiling::read_bandwidth(*threads),
            Self::Gpu(peaks) => peaks.bytes_per_s,
        }
    }

    /// Machines whose rates add up.
    fn machines(&self, ranks: f64) -> f64 {
        match self {
            Self::Cpu { .. } => 1.0,
            Self::Gpu(_) => ranks,
        }
    }
}

fn print(line: &Line<'_>) {
    println!(
        "{}",
        serde_json::to_string(line).expect("a line has neither maps nor failing values")
    );
}

struct Bench<'a> {
    group: &'a mut Group,
    config: LlamaConfig,
    ranks: f64,
    ceilings: Ceilings,
    /// Bytes of a weight, and of a number of keys and values.
    number_bytes: f64,
    /// Of decoded rows.
    params: SamplingParams,
    seconds: Duration,
    step: u64,
}

impl Bench<'_> {
    fn prefill(&mut self, tokens: usize) -> Result<(), BenchError> {
        let ceiling = self.ceilings.flops() * self.ceilings.machines(self.ranks);
        let vocab = self.config.vocab_size as u32;
        let works = vec![Work {
            seq: SeqId(0),
            slot: Slot(0),
            start: 0,
            input: Input::Tokens((0..tokens as u32).map(|i| i % vocab).collect()),
            blocks: blocks(0, tokens),
            sample: Some(0),
            prompt_logprobs: false,
        }];
        let seconds = self.measure(works)?;
        let flop = self.linear_flop() + self.attention_flop((tokens + 1) as f64 / 2.0);
        let flop = flop + self.head_flop() / tokens as f64; // the last row alone goes through the head
        let (speed, limit) = (tokens as f64 / seconds, ceiling / flop);
        print(&Line::Prefill {
            tokens,
            step_ms: seconds * 1e3,
            tokens_per_s: speed,
            gflop_per_token: flop / 1e9,
            ceiling_gflop_per_s: ceiling / 1e9,
            ceiling_tokens_per_s: limit,
            fraction: speed / limit,
        });
        Ok(())
    }

    fn decode(&mut self, batch: Batch) -> Result<(), BenchError> {
        let machines = self.ceilings.machines(self.ranks);
        let (bandwidth, flops) = (
            self.ceilings.bandwidth() * machines,
            self.ceilings.flops() * machines,
        );
        self.step += 1;
        let measured = decode::measure(self.group, batch, &self.params, self.step)?;
        let (n, seconds) = (batch.sequences as f64, measured.step.as_secs_f64());
        // The middle step's.
        let context = batch.prompt + batch.outputs / 2;
        let (weights, kv) = (self.weight_bytes(), n * self.kv_bytes(context));
        let flop = n * (self.linear_flop() + self.head_flop());
        // Products wait for weights or for arithmetic; attention waits for keys and values.
        let limit = n / ((weights / bandwidth).max(flop / flops) + kv / bandwidth);
        print(&Line::Decode {
            batch: batch.sequences,
            context: batch.prompt,
            output_tokens: batch.outputs,
            tokens_per_s: n / seconds,
            step_ms: seconds * 1e3,
            steps: measured.steps,
            bytes_per_step: (weights + kv) as u64,
            ceiling_gb_per_s: bandwidth / 1e9,
            ceiling_tokens_per_s: limit,
            fraction: n / seconds / limit,
        });
        Ok(())
    }

    /// Median seconds of a step.
    fn measure(&mut self, works: Vec<Work>) -> Result<f64, BenchError> {
        for work in &works {
            self.group
                .admit(work.seq, SamplingParams::greedy(), vec![0].into());
        }
        let mut step = Step { id: StepId(0), works };
        let mut times = Vec::new();
        let started = Instant::now();
        while times.len() < STEPS_AT_LEAST || started.elapsed() < self.seconds {
            self.step += 1;
            step.id = StepId(self.step);
            let began = Instant::now();
            self.group.run(&step)?;
            times.push(began.elapsed().as_secs_f64());
        }
        step.works.iter().for_each(|work| self.group.retire(work.seq));
        times.sort_unstable_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    /// Numbers in the matrices of all layers.
    fn linear_weights(&self) -> f64 {
        let c = &self.config;
        let attention = (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim * c.hidden_size;
        (c.n_layers * (attention + 3 * c.intermediate_size * c.hidden_size)) as f64
    }

    fn linear_flop(&self) -> f64 {
        2.0 * self.linear_weights()
    }

    fn head_flop(&self) -> f64 {
        2.0 * (self.config.vocab_size * self.config.hidden_size) as f64
    }

    fn attention_flop(&self, context: f64) -> f64 {
        4.0 * context * (self.config.n_layers * self.config.n_heads * self.config.head_dim) as f64
    }

    /// Read by every step: layers and head.
    fn weight_bytes(&self) -> f64 {
        self.number_bytes * (self.linear_weights() + self.head_flop() / 2.0)
    }

    fn kv_bytes(&self, context: usize) -> f64 {
        self.number_bytes
            * (2 * context * self.config.n_layers * self.config.n_kv_heads * self.config.head_dim) as f64
    }
}

fn blocks(first: usize, tokens: usize) -> Vec<BlockId> {
    (first..first + tokens.div_ceil(BLOCK_TOKENS))
        .map(|block| BlockId(block as u32))
        .collect()
}
