//! What the command line asks for, made sound: a flag that cannot be carried out ends the start with its name, its
//! value and what to write instead.
//!
//! Two steps, because some bounds need the model: `Config::new` looks at the flags alone, `Config::fit` at the
//! flags and the checkpoint's shape.

use std::{fmt::Display, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Parser, Subcommand};
use swallow_proto::launch::{
    DeviceKind, Dtype, FetchArgs, GenerationDefaults, Kernels, LoadFormat, LogFormat, PrefixCache, WorkerArgs,
};

use crate::{bench::BenchArgs, device::cuda::KernelsArgs, dummy::MakeArgs, serve::TlsFiles};

/// Most ranks of a group; no model here has more attention heads than that.
const TENSOR_PARALLEL_MAX: u32 = 64;
/// Most sequences in a step, and most that wait: each costs host memory whether used or not.
const SEQUENCES_MAX: u32 = 65_536;
/// Most rows of one step: activations are allocated for all of them.
const STEP_TOKENS_MAX: u32 = 1 << 20;
/// Largest block: a longer one shares no prefix worth sharing.
const BLOCK_TOKENS_MAX: u32 = 1024;
/// Most compute threads.
const THREADS_MAX: u32 = 4096;

/// One replica of a Swallow model: token ids in, token ids out.
#[derive(Debug, Parser)]
#[command(name = "swallow-worker", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Load a model and serve it to routers until SIGTERM
    Serve(Box<WorkerArgs>),
    /// Measure a model's speed here, beside what the memory allows
    Bench(BenchArgs),
    /// Download a model's files
    Fetch(FetchArgs),
    /// Compile the GPU kernels ahead, on any machine that has NVRTC
    Kernels(KernelsArgs),
    /// Write a checkpoint with random weights, to measure loading
    MakeCheckpoint(MakeArgs),
}

/// A flag that cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}={value}: {why}")]
pub struct ConfigError {
    /// The flag, without its dashes.
    pub flag: &'static str,
    /// What was given.
    pub value: String,
    /// What is wrong and what to change.
    pub why: String,
}

fn refuse<T>(flag: &'static str, value: impl Display, why: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError {
        flag,
        value: value.to_string(),
        why: why.into(),
    })
}

/// The flags of `serve`, sound as far as they can be without the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Folder of the model, or what stands for one.
    pub model: PathBuf,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// The first is the model's own name, the others are aliases.
    pub served_names: Vec<String>,
    /// This replica's name.
    pub replica_id: String,
    /// gRPC address.
    pub grpc_listen: SocketAddr,
    /// HTTP address.
    pub http_listen: SocketAddr,
    /// What the ranks compute on.
    pub device: DeviceKind,
    /// On GPUs: kernels that are for one architecture are left alone.
    pub portable_kernels: bool,
    /// On GPUs: the file that says how to multiply.
    pub product_choices: Option<PathBuf>,
    /// On GPUs: every kernel is waited for.
    pub debug_kernels: bool,
    /// Ranks of the group.
    pub tensor_parallel: u32,
    /// Compute threads of all ranks together, at least one a rank.
    pub threads: u32,
    /// `None`: as long as the model and its memory allow.
    pub max_model_len: Option<u32>,
    /// Sequences in one step.
    pub max_running: u32,
    /// Requests that wait for a slot.
    pub max_waiting: u32,
    /// Rows of one step.
    pub max_step_tokens: u32,
    /// Tokens in one block.
    pub block_tokens: u32,
    /// Bytes of keys and values of all ranks together.
    pub kv_bytes: u64,
    /// On GPUs, instead of `kv_bytes`: the share of each GPU's memory that may be used.
    pub device_memory_percent: Option<u32>,
    /// The longest step while a stream decodes.
    pub inter_token_latency_target: Option<Duration>,
    /// Keep finished prefixes.
    pub prefix_cache: bool,
    /// Fill absent sampling values from the model's generation_config.json.
    pub generation_defaults: bool,
    /// Text of the chat template, instead of the model's own.
    pub chat_template: Option<String>,
    /// Longest step.
    pub step_timeout: Duration,
    /// How long running requests may finish after SIGTERM.
    pub drain_timeout: Duration,
    /// Sessions speak TLS with these files.
    pub tls: Option<TlsFiles>,
    /// Where the reason of a failure goes.
    pub termination_log: Option<PathBuf>,
    /// Form of log lines.
    pub log_format: LogFormat,
}

impl Config {
    /// Checks the flags on a machine with `cores` cores.
    ///
    /// # Errors
    /// The first flag that cannot be carried out.
    pub fn new(args: WorkerArgs, cores: u32) -> Result<Self, ConfigError> {
        check_names(&args)?;
        check_addresses(&args)?;
        check_device(&args)?;
        check_bounds(&args)?;
        let threads = match args.threads {
            Some(threads) if threads < args.tensor_parallel => {
                let why = format!(
                    "fewer than --tensor-parallel={}; give every rank a thread",
                    args.tensor_parallel
                );
                return refuse("threads", threads, why);
            }
            Some(threads) => threads,
            None => cores.max(args.tensor_parallel),
        };
        Ok(Self {
            model: args.model,
            load_format: args.load_format,
            served_names: args.served_names,
            replica_id: args.replica_id,
            grpc_listen: args.grpc_listen,
            http_listen: args.http_listen,
            device: args.device,
            portable_kernels: args.kernels == Kernels::Portable,
            product_choices: args.product_choices,
            debug_kernels: args.debug_kernels,
            tensor_parallel: args.tensor_parallel,
            threads,
            max_model_len: args.max_model_len,
            max_running: args.max_running,
            max_waiting: args.max_waiting,
            max_step_tokens: args.max_step_tokens,
            block_tokens: args.block_tokens,
            kv_bytes: args.kv_bytes,
            device_memory_percent: args.device_memory_percent,
            inter_token_latency_target: match args.inter_token_latency_target_ms {
                0 => None,
                ms => Some(Duration::from_millis(ms.into())),
            },
            prefix_cache: args.prefix_cache == PrefixCache::On,
            generation_defaults: args.generation_defaults == GenerationDefaults::Auto,
            chat_template: args.chat_template,
            step_timeout: Duration::from_secs(args.step_timeout_seconds.into()),
            drain_timeout: Duration::from_secs(args.drain_timeout_seconds.into()),
            tls: tls(args.tls_cert, args.tls_key, args.tls_client_ca),
            termination_log: args.termination_log,
            log_format: args.log_format,
        })
    }

    /// How many blocks the memory holds and how long a sequence may be.
    ///
    /// # Errors
    /// `--kv-bytes` holds no block or more than can be numbered, or `--max-model-len` fits neither model nor memory.
    pub fn fit(&self, shape: &CacheShape) -> Result<Fit, ConfigError> {
        let block_bytes = shape.token_bytes(self.tensor_parallel) * u64::from(self.block_tokens);
        let n_blocks = self.kv_bytes / block_bytes;
        if n_blocks == 0 {
            let why = format!(
                "too small: one block of {} tokens needs {block_bytes} bytes",
                self.block_tokens
            );
            return refuse("kv-bytes", self.kv_bytes, why);
        }
        let Ok(n_blocks) = u32::try_from(n_blocks) else {
            let why = format!(
                "{n_blocks} blocks of {block_bytes} bytes; at most {} can be numbered",
                u32::MAX
            );
            return refuse("kv-bytes", self.kv_bytes, why);
        };
        let pool_tokens = u64::from(n_blocks) * u64::from(self.block_tokens);
        let max_model_len = self.model_len(shape, pool_tokens, block_bytes)?;
        Ok(Fit {
            block_bytes,
            n_blocks,
            max_model_len,
        })
    }

    fn model_len(&self, shape: &CacheShape, pool_tokens: u64, block_bytes: u64) -> Result<u32, ConfigError> {
        let Some(asked) = self.max_model_len else {
            let fitting = u32::try_from(pool_tokens).unwrap_or(u32::MAX);
            return Ok(shape.max_position_embeddings.min(fitting));
        };
        if asked > shape.max_position_embeddings {
            let why = format!(
                "the model's max_position_embeddings is {}; give at most that",
                shape.max_position_embeddings
            );
            return refuse("max-model-len", asked, why);
        }
        if u64::from(asked) > pool_tokens {
            let needed = u64::from(asked.div_ceil(self.block_tokens)) * block_bytes;
            let why = format!(
                "--kv-bytes={} holds {pool_tokens} tokens; raise --kv-bytes to {needed} or lower --max-model-len to \
                 {pool_tokens}",
                self.kv_bytes
            );
            return refuse("max-model-len", asked, why);
        }
        Ok(asked)
    }
}

/// What a block of the cache is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers.
    pub n_layers: u32,
    /// Heads of keys and values.
    pub n_kv_heads: u32,
    /// Numbers in a head.
    pub head_dim: u32,
    /// Bytes of one number: the CPU device keeps fp32, GPUs bf16.
    pub number_bytes: u32,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: u32,
}

impl CacheShape {
    /// Keys and values of one token on all ranks; a head is held by several ranks where there are more ranks than heads.
    fn token_bytes(&self, tensor_parallel: u32) -> u64 {
        let heads = u64::from(self.n_kv_heads.div_ceil(tensor_parallel).max(1)) * u64::from(tensor_parallel);
        2 * u64::from(self.n_layers) * heads * u64::from(self.head_dim) * u64::from(self.number_bytes)
    }
}

/// What memory and model allow together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// One block of all ranks.
    pub block_bytes: u64,
    /// Blocks in the pool.
    pub n_blocks: u32,
    /// Prompt and output of one sequence together.
    pub max_model_len: u32,
}

/// The command line has all three files or none.
fn tls(cert: Option<PathBuf>, key: Option<PathBuf>, client_ca: Option<PathBuf>) -> Option<TlsFiles> {
    Some(TlsFiles {
        cert: cert?,
        key: key?,
        client_ca: client_ca?,
    })
}

fn check_names(args: &WorkerArgs) -> Result<(), ConfigError> {
    for (i, name) in args.served_names.iter().enumerate() {
        if name.trim().is_empty() {
            return refuse("served-name", name, "empty; give the name clients ask for");
        }
        if args.served_names[..i].contains(name) {
            return refuse("served-name", name, "given twice; give each name once");
        }
    }
    if args.replica_id.trim().is_empty() {
        return refuse("replica-id", &args.replica_id, "empty; give this replica a name");
    }
    Ok(())
}

fn check_addresses(args: &WorkerArgs) -> Result<(), ConfigError> {
    if args.grpc_listen == args.http_listen && args.grpc_listen.port() != 0 {
        return refuse(
            "http-listen",
            args.http_listen,
            "the same as --grpc-listen; give each its own port",
        );
    }
    Ok(())
}

fn check_device(args: &WorkerArgs) -> Result<(), ConfigError> {
    match (args.device, args.dtype) {
        (DeviceKind::Cpu, Dtype::Bf16) => refuse(
            "dtype",
            "bf16",
            "the CPU device computes in fp32 alone; use --dtype=fp32 or --dtype=auto",
        ),
        (DeviceKind::Cuda, Dtype::Fp32) => refuse(
            "dtype",
            "fp32",
            "GPUs compute in bf16 alone; use --dtype=bf16 or --dtype=auto",
        ),
        (DeviceKind::Auto, Dtype::Bf16 | Dtype::Fp32) => refuse(
            "device",
            "auto",
            "a number format asks for a device: give --device=cpu or --device=cuda, or --dtype=auto",
        ),
        (DeviceKind::Cpu, _) if args.debug_kernels => refuse(
            "debug-kernels",
            true,
            "GPU kernels; the CPU device has none: leave it out",
        ),
        (DeviceKind::Cpu, _) if args.kernels == Kernels::Portable => refuse(
            "kernels",
            "portable",
            "GPU kernels; the CPU device has none: leave it out",
        ),
        _ => {
            check_choices(args)?;
            check_memory(args)
        }
    }
}

fn check_choices(args: &WorkerArgs) -> Result<(), ConfigError> {
    match &args.product_choices {
        Some(file) if args.device == DeviceKind::Cpu => refuse(
            "product-choices",
            file.display(),
            "what GPUs choose between; the CPU device multiplies in one way: leave it out",
        ),
        _ => Ok(()),
    }
}

fn check_memory(args: &WorkerArgs) -> Result<(), ConfigError> {
    let Some(percent) = args.device_memory_percent else {
        return Ok(());
    };
    if args.device == DeviceKind::Cpu {
        let why = "a share of a GPU's memory; with --device=cpu give --kv-bytes";
        return refuse("device-memory-percent", percent, why);
    }
    if !(1..=100).contains(&percent) {
        return refuse("device-memory-percent", percent, "must be from 1 to 100");
    }
    Ok(())
}

fn check_bounds(args: &WorkerArgs) -> Result<(), ConfigError> {
    let at_least_1 = [
        ("tensor-parallel", args.tensor_parallel, TENSOR_PARALLEL_MAX),
        ("threads", args.threads.unwrap_or(1), THREADS_MAX),
        ("max-model-len", args.max_model_len.unwrap_or(1), u32::MAX),
        ("max-running", args.max_running, SEQUENCES_MAX),
        ("max-waiting", args.max_waiting, SEQUENCES_MAX),
        ("max-step-tokens", args.max_step_tokens, STEP_TOKENS_MAX),
        ("block-tokens", args.block_tokens, BLOCK_TOKENS_MAX),
        ("step-timeout-seconds", args.step_timeout_seconds, u32::MAX),
    ];
    for (flag, value, most) in at_least_1 {
        if value == 0 {
            return refuse(flag, value, "must be at least 1");
        }
        if value > most {
            return refuse(flag, value, format!("must be at most {most}"));
        }
    }
    if args.max_running > args.max_step_tokens {
        let why = format!(
            "every running sequence needs a token in the step; give at most --max-step-tokens={}",
            args.max_step_tokens
        );
        return refuse("max-running", args.max_running, why);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(extra: &[&str]) -> WorkerArgs {
        let fixed = [
            "swallow-worker",
            "serve",
            "--model=/m",
            "--served-name=a",
            "--replica-id=r",
        ];
        match Cli::parse_from(fixed.iter().chain(extra)).command {
            Command::Serve(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    fn refusal(extra: &[&str]) -> String {
        Config::new(args(extra), 8)
            .expect_err("must be refused")
            .to_string()
    }

    const SHAPE: CacheShape = CacheShape {
        n_layers: 6,
        n_kv_heads: 4,
        head_dim: 32,
        number_bytes: 4,
        max_position_embeddings: 8192,
    };

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_refusal_names_the_flag_and_what_to_change() {
        let cases = [
            (
                &["--device=cuda", "--dtype=fp32"][..],
                "--dtype=fp32: GPUs compute in bf16 alone; use --dtype=bf16 or --dtype=auto",
            ),
            (
                &["--device-memory-percent=90"],
                "--device-memory-percent=90: a share of a GPU's memory; with --device=cpu give --kv-bytes",
            ),
            (
                &["--device=auto", "--device-memory-percent=0"],
                "--device-memory-percent=0: must be from 1 to 100",
            ),
            (
                &["--dtype=bf16"],
                "--dtype=bf16: the CPU device computes in fp32 alone; use --dtype=fp32 or --dtype=auto",
            ),
            (
                &["--product-choices=/c.txt"],
                "--product-choices=/c.txt: what GPUs choose between; the CPU device multiplies in one way: leave it out",
            ),
            (&["--max-running=0"], "--max-running=0: must be at least 1"),
            (&["--threads=0"], "--threads=0: must be at least 1"),
            (
                &["--tensor-parallel=65"],
                "--tensor-parallel=65: must be at most 64",
            ),
            (
                &["--threads=1", "--tensor-parallel=2"],
                "--threads=1: fewer than --tensor-parallel=2; give every rank a thread",
            ),
            (
                &["--max-running=64", "--max-step-tokens=32"],
                "--max-running=64: every running sequence needs a token in the step; give at most --max-step-tokens=32",
            ),
            (
                &["--served-name=a"],
                "--served-name=a: given twice; give each name once",
            ),
            (
                &["--http-listen=127.0.0.1:50061"],
                "--http-listen=127.0.0.1:50061: the same as --grpc-listen; give each its own port",
            ),
        ];
        for (extra, expected) in cases {
            assert_eq!(refusal(extra), expected);
        }
    }

    #[test]
    fn threads_default_to_the_cores_and_never_below_the_ranks() {
        assert_eq!(Config::new(args(&[]), 8).map(|config| config.threads), Ok(8));
        assert_eq!(
            Config::new(args(&["--tensor-parallel=4"]), 2).map(|config| config.threads),
            Ok(4)
        );
    }

    #[test]
    fn blocks_follow_from_memory_and_heads() {
        let config = |extra: &[&str]| Config::new(args(extra), 8).expect("sound flags");
        // 2 x 6 layers x 4 heads x 32 numbers x 4 bytes x 16 tokens.
        let fit = config(&["--kv-bytes=983040"]).fit(&SHAPE);
        assert_eq!(
            fit,
            Ok(Fit {
                block_bytes: 98_304,
                n_blocks: 10,
                max_model_len: 160
            })
        );
        // 8 ranks hold 4 heads twice.
        let fit = config(&["--kv-bytes=1966080", "--tensor-parallel=8"]).fit(&SHAPE);
        assert_eq!(
            fit,
            Ok(Fit {
                block_bytes: 196_608,
                n_blocks: 10,
                max_model_len: 160
            })
        );
        let fit = config(&["--kv-bytes=1000000000"]).fit(&SHAPE).expect("fits");
        assert_eq!(fit.max_model_len, 8192);
    }

    #[test]
    fn what_memory_or_model_cannot_hold_is_refused_with_the_numbers() {
        let refusal = |extra: &[&str]| {
            Config::new(args(extra), 8)
                .expect("sound flags")
                .fit(&SHAPE)
                .expect_err("must be refused")
                .to_string()
        };
        assert_eq!(
            refusal(&["--kv-bytes=1000"]),
            "--kv-bytes=1000: too small: one block of 16 tokens needs 98304 bytes"
        );
        assert_eq!(
            refusal(&["--kv-bytes=983040", "--max-model-len=161"]),
            "--max-model-len=161: --kv-bytes=983040 holds 160 tokens; raise --kv-bytes to 1081344 or lower \
             --max-model-len to 160"
        );
        assert_eq!(
            refusal(&["--max-model-len=8193"]),
            "--max-model-len=8193: the model's max_position_embeddings is 8192; give at most that"
        );
    }
}
