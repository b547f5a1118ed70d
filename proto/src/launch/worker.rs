//! The worker's arguments.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};

use super::{Argv, LogFormat};

/// Where tensors live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// Host memory and host cores.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
    /// GPUs where they can be used, the CPU otherwise.
    Auto,
}

/// The number format of weights and activations in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// fp32 on CPU, bf16 on GPU.
    #[default]
    Auto,
    /// 32-bit IEEE floats.
    Fp32,
    /// bfloat16.
    Bf16,
}

/// Where a request's absent sampling values come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum GenerationDefaults {
    /// The model's generation_config.json.
    #[default]
    Auto,
    /// Neutral values: temperature 1, nothing filtered.
    Neutral,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The safetensors files of the model's folder.
    #[default]
    Safetensors,
    /// A formula: the shape of a model without its weights, to measure and to try out.
    Dummy,
}

/// Which GPU kernels may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Kernels {
    /// Those made for this architecture, where there are any.
    #[default]
    Auto,
    /// Those alone that every architecture runs.
    Portable,
}

/// Whether finished prefixes stay for later requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PrefixCache {
    /// Blocks stay until their memory is needed.
    #[default]
    On,
    /// Every prompt is computed whole.
    Off,
}

/// What one tensor-parallel group serves, and with which limits.
#[derive(Args, Clone, Debug, PartialEq)]
pub struct WorkerArgs {
    /// Folder of the model: config.json, tokenizer.json, *.safetensors; with --load-format=dummy a config.json is
    /// enough, and llama-3-8b, llama-3.3-70b or the text of a config.json may stand for a folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Where weights come from; dummy ones are random, and the model writes letters without sense
    #[arg(long, value_enum, default_value = "safetensors")]
    pub load_format: LoadFormat,
    /// Name clients ask for; repeat for aliases, the first is the model's own
    #[arg(long = "served-name", value_name = "NAME", required = true)]
    pub served_names: Vec<String>,
    /// Name of this replica in logs, metrics and the router's choices
    #[arg(long, value_name = "ID")]
    pub replica_id: String,
    /// Where routers connect (gRPC)
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50061")]
    pub grpc_listen: SocketAddr,
    /// Where /metrics, /healthz, /readyz and /state are served (HTTP)
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8061")]
    pub http_listen: SocketAddr,
    /// Device of all ranks
    #[arg(long, value_enum, default_value = "cpu")]
    pub device: DeviceKind,
    /// Number format of weights and activations
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: Dtype,
    /// Which GPU kernels may be used: portable leaves those alone that are for one architecture
    #[arg(long, value_enum, default_value = "auto")]
    pub kernels: Kernels,
    /// On GPUs, the ways to multiply from this file, which a start keeps below SWALLOW_CACHE, so that every start has the
    /// same bits [default: what an earlier start has kept, and what is measured]
    #[arg(long, value_name = "FILE")]
    pub product_choices: Option<PathBuf>,
    /// On GPUs, wait for every kernel, so that one that fails is named: slow, to look for a fault
    #[arg(long)]
    pub debug_kernels: bool,
    /// Ranks of the group; the model's heads must divide by it
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub tensor_parallel: u32,
    /// Compute threads of all ranks together on the CPU device [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Longest prompt and output together, in tokens [default: the model's max_position_embeddings]
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,
    /// Most sequences in one step
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_running: u32,
    /// Most requests that wait inside the worker
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_waiting: u32,
    /// Most tokens computed in one step, decode and prefill together
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub max_step_tokens: u32,
    /// While a stream decodes, prompts get as much of each step as keeps the time between tokens below this, 128 tokens at
    /// least; 0 sets no bound
    #[arg(long, value_name = "MS", default_value_t = 50)]
    pub inter_token_latency_target_ms: u32,
    /// Tokens in one block of keys and values
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub block_tokens: u32,
    /// Memory for keys and values of all ranks together, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 30)]
    pub kv_bytes: u64,
    /// On GPUs, instead of --kv-bytes: keys and values get what weights and workspace leave of this share of each GPU
    #[arg(long, value_name = "PERCENT")]
    pub device_memory_percent: Option<u32>,
    /// Keep finished prefixes for later requests
    #[arg(long, value_enum, default_value = "on")]
    pub prefix_cache: PrefixCache,
    /// Where absent sampling values come from
    #[arg(long, value_enum, default_value = "auto")]
    pub generation_defaults: GenerationDefaults,
    /// Text of the chat template, in Jinja, instead of the one in the model's folder
    #[arg(long, value_name = "TEMPLATE")]
    pub chat_template: Option<String>,
    /// A step that takes longer ends the process, naming rank and step
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub step_timeout_seconds: u32,
    /// How long running requests may finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout_seconds: u32,
    /// Certificate chain that routers are shown, in PEM, for the extended key usage serverAuth, read again when it changes;
    /// without it, sessions speak no TLS
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "tls_client_ca"])]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Certificate authorities, in PEM, one of which must have issued a router's certificate, for the extended key usage
    /// clientAuth
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// File that gets the reason of a failed start or a crash
    #[arg(long, value_name = "FILE")]
    pub termination_log: Option<PathBuf>,
    /// Form of log lines
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

impl WorkerArgs {
    /// The command line after the program's name; parsing it gives the same value back.
    pub fn argv(&self) -> Vec<String> {
        let mut argv = Argv(vec!["serve".into()]);
        argv.flag("model", self.model.display());
        argv.choice("load-format", self.load_format);
        argv.each("served-name", &self.served_names);
        argv.flag("replica-id", &self.replica_id);
        argv.flag("grpc-listen", self.grpc_listen);
        argv.flag("http-listen", self.http_listen);
        argv.choice("device", self.device);
        argv.choice("dtype", self.dtype);
        argv.choice("kernels", self.kernels);
        argv.optional(
            "product-choices",
            self.product_choices.as_ref().map(|path| path.display()),
        );
        argv.switch("debug-kernels", self.debug_kernels);
        argv.flag("tensor-parallel", self.tensor_parallel);
        argv.optional("threads", self.threads);
        argv.optional("max-model-len", self.max_model_len);
        argv.flag("max-running", self.max_running);
        argv.flag("max-waiting", self.max_waiting);
        argv.flag("max-step-tokens", self.max_step_tokens);
        argv.flag(
            "inter-token-latency-target-ms",
            self.inter_token_latency_target_ms,
        );
        argv.flag("block-tokens", self.block_tokens);
        argv.flag("kv-bytes", self.kv_bytes);
        argv.optional("device-memory-percent", self.device_memory_percent);
        argv.choice("prefix-cache", self.prefix_cache);
        argv.choice("generation-defaults", self.generation_defaults);
        argv.optional("chat-template", self.chat_template.as_ref());
        argv.flag("step-timeout-seconds", self.step_timeout_seconds);
        argv.flag("drain-timeout-seconds", self.drain_timeout_seconds);
        for (flag, path) in [
            ("tls-cert", &self.tls_cert),
            ("tls-key", &self.tls_key),
            ("tls-client-ca", &self.tls_client_ca),
        ] {
            argv.optional(flag, path.as_ref().map(|path| path.display()));
        }
        argv.optional(
            "termination-log",
            self.termination_log.as_ref().map(|path| path.display()),
        );
        argv.choice("log-format", self.log_format);
        argv.0
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    enum Cli {
        Serve(WorkerArgs),
    }

    fn parse(argv: Vec<String>) -> WorkerArgs {
        let Cli::Serve(args) = Cli::parse_from(std::iter::once("swallow-worker".to_string()).chain(argv));
        args
    }

    #[test]
    fn a_rendered_command_line_parses_back() {
        let minimal = parse(
            ["serve", "--model=/m", "--served-name=a", "--replica-id=r"]
                .map(String::from)
                .to_vec(),
        );
        assert_eq!(parse(minimal.argv()), minimal);
        let full = WorkerArgs {
            model: "/models/日本 語=x".into(),
            served_names: vec!["a".into(), "b/c".into()],
            device: DeviceKind::Cuda,
            dtype: Dtype::Bf16,
            load_format: LoadFormat::Dummy,
            kernels: Kernels::Portable,
            product_choices: Some("/choices/h200.txt".into()),
            debug_kernels: true,
            tensor_parallel: 4,
            threads: Some(3),
            max_model_len: Some(8192),
            inter_token_latency_target_ms: 0,
            kv_bytes: 1 << 40,
            device_memory_percent: Some(90),
            prefix_cache: PrefixCache::Off,
            generation_defaults: GenerationDefaults::Neutral,
            chat_template: Some("{{- '東京=$(x)' -}}\n{%- if tools %}".into()),
            tls_cert: Some("/tls/tls.crt".into()),
            tls_key: Some("/tls/tls.key".into()),
            tls_client_ca: Some("/tls/ca.crt".into()),
            termination_log: Some("/dev/termination-log".into()),
            log_format: LogFormat::Json,
            ..minimal
        };
        assert_eq!(parse(full.argv()), full);
    }
}
