//! `swallow-worker bench`: how fast this machine runs a model, beside how fast it could.
//!
//! Steps go straight to the group, without scheduler or sockets. Before each measurement the same number of threads
//! measures the ceiling: multiplications from registers for prefill, reading a buffer larger than the caches for
//! decode. One JSON object a line, so that runs can be compared by a program.

mod ceiling;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;
use swallow_schedule::{BlockId, Input, SeqId, Slot, Step, StepId, Work};

use crate::{
    checkpoint::{Checkpoint, CheckpointError, LlamaConfig},
    device::cpu::Isa,
    group::{Group, GroupError, GroupSpec, LoadProgress},
    sampling::SamplingParams,
};

const BLOCK_TOKENS: usize = 16;
/// A step that takes longer is hopeless, not slow.
const STEP_TIMEOUT: Duration = Duration::from_secs(600);
/// Measured steps, whatever time they take.
const STEPS_AT_LEAST: usize = 3;

/// Measures prefill and decode speed beside the ceilings of memory and arithmetic.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Folder with config.json and safetensors files.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Ranks of the group.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub tensor_parallel: usize,
    /// Threads of all ranks together. Default: one a core.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Prompt tokens of the prefill measurement, in one step.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub prefill_tokens: usize,
    /// Sequences that decode together; a list measures each.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 8, 32])]
    pub batch: Vec<usize>,
    /// Tokens before each decoded one.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub context: usize,
    /// Seconds of each measurement.
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    pub seconds: f64,
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
        tensor_parallel: usize,
        threads: usize,
        instruction_set: &'a str,
        load_seconds: f64,
        weights_bytes: u64,
        workspace_bytes: u64,
    },
    Prefill {
        tokens: usize,
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
        tokens_per_s: f64,
        step_ms: f64,
        /// Weights, keys and values that a step reads.
        bytes_per_step: u64,
        /// Reading a buffer larger than the caches. A model that fits the caches can be faster.
        ceiling_gb_per_s: f64,
        /// The slower of memory and arithmetic.
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
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let checkpoint = Arc::new(Checkpoint::open(&args.model, args.tensor_parallel)?);
    let config = checkpoint.config().clone();
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let blocks_a_sequence = (args.context + 1).div_ceil(BLOCK_TOKENS);
    let spec = GroupSpec {
        tensor_parallel: args.tensor_parallel,
        threads,
        block_tokens: BLOCK_TOKENS,
        n_blocks: (most * blocks_a_sequence).max(args.prefill_tokens.div_ceil(BLOCK_TOKENS)),
        max_running: most,
        max_step_tokens: most.max(args.prefill_tokens),
        max_model_len: (args.context + 1).max(args.prefill_tokens),
        step_timeout: STEP_TIMEOUT,
        fault: None,
    };
    let started = Instant::now();
    let mut group = Group::start(checkpoint, spec, Arc::new(LoadProgress::default()))?;
    let memory = group.memory().total;
    print(&Line::Group {
        model: &args.model.display().to_string(),
        tensor_parallel: args.tensor_parallel,
        threads: threads.max(args.tensor_parallel),
        instruction_set: Isa::detect().name(),
        load_seconds: started.elapsed().as_secs_f64(),
        weights_bytes: memory.weights_bytes,
        workspace_bytes: memory.workspace_bytes,
    });
    let mut bench = Bench {
        group: &mut group,
        config,
        threads,
        seconds: Duration::from_secs_f64(args.seconds),
        step: 0,
    };
    bench.prefill(args.prefill_tokens)?;
    for &batch in &args.batch {
        bench.decode(batch, args.context)?;
    }
    Ok(())
}

fn check(args: &BenchArgs) -> Result<(), BenchError> {
    let flag = |text: &str| Err(BenchError::Flag(text.to_owned()));
    if args.prefill_tokens == 0 || args.batch.is_empty() || args.batch.contains(&0) {
        return flag("--prefill-tokens and --batch must be at least 1");
    }
    if args.threads == Some(0) || args.tensor_parallel == 0 {
        return flag("--threads and --tensor-parallel must be at least 1");
    }
    if !(args.seconds > 0.0 && args.seconds <= 3600.0) {
        return flag("--seconds must be above 0 and at most 3600");
    }
    Ok(())
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
    threads: usize,
    seconds: Duration,
    step: u64,
}

impl Bench<'_> {
    fn prefill(&mut self, tokens: usize) -> Result<(), BenchError> {
        let ceiling = ceiling::flops(self.threads);
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
            tokens_per_s: speed,
            gflop_per_token: flop / 1e9,
            ceiling_gflop_per_s: ceiling / 1e9,
            ceiling_tokens_per_s: limit,
            fraction: speed / limit,
        });
        Ok(())
    }

    fn decode(&mut self, batch: usize, context: usize) -> Result<(), BenchError> {
        let (bandwidth, flops) = (
            ceiling::read_bandwidth(self.threads),
            ceiling::flops(self.threads),
        );
        let a_sequence = (context + 1).div_ceil(BLOCK_TOKENS);
        let work = |i: usize| Work {
            seq: SeqId(i as u64),
            slot: Slot(i as u32),
            start: context as u32,
            input: Input::Tokens(vec![(i % self.config.vocab_size) as u32]),
            blocks: blocks(i * a_sequence, context + 1),
            sample: Some(0),
            prompt_logprobs: false,
        };
        let seconds = self.measure((0..batch).map(work).collect())?;
        let bytes = self.weight_bytes() + batch as f64 * self.kv_bytes(context + 1);
        let flop = batch as f64
            * (self.linear_flop() + self.attention_flop((context + 1) as f64) + self.head_flop());
        let limit = batch as f64 / (bytes / bandwidth).max(flop / flops);
        print(&Line::Decode {
            batch,
            context,
            tokens_per_s: batch as f64 / seconds,
            step_ms: seconds * 1e3,
            bytes_per_step: bytes as u64,
            ceiling_gb_per_s: bandwidth / 1e9,
            ceiling_tokens_per_s: limit,
            fraction: batch as f64 / seconds / limit,
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

    /// Read by every step: layers and head, in fp32.
    fn weight_bytes(&self) -> f64 {
        4.0 * (self.linear_weights() + self.head_flop() / 2.0)
    }

    fn kv_bytes(&self, context: usize) -> f64 {
        (8 * context * self.config.n_layers * self.config.n_kv_heads * self.config.head_dim) as f64
    }
}

fn blocks(first: usize, tokens: usize) -> Vec<BlockId> {
    (first..first + tokens.div_ceil(BLOCK_TOKENS))
        .map(|block| BlockId(block as u32))
        .collect()
}
