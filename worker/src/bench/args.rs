//! The command line of `bench`: by itself it measures a row of cells, and a subcommand measures something else.

use std::path::PathBuf;

use clap::ValueEnum;

use super::{BenchError, load::Load};
use crate::{
    device::cuda::{Chain, Options, Products},
    sampling::SamplingParams,
};

/// Arguments of `bench`.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub(super) other: Option<Other>,
    #[command(flatten)]
    pub(super) measure: Measure,
}

/// What else can be measured.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum Other {
    /// Put a load on an OpenAI server and measure when tokens come
    Serve(Load),
    /// Measure the start alone, from this process's exec to the first token
    Startup(Box<Measure>),
}

/// Where the ranks compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchDevice {
    /// This machine's processors.
    Cpu,
    /// NVIDIA GPUs, one a rank.
    Cuda,
}

/// Where the weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The safetensors files of the model's folder.
    Safetensors,
    /// A formula, for the shape alone.
    Dummy,
}

impl LoadFormat {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Dummy => "dummy",
        }
    }
}

/// A row of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// As published figures of GPU engines are taken: first tokens after 1,024 and 8,192; 1 to 256 sequences of 1,024 and
    /// 128 tokens, one alone of 128 and 256.
    Peer,
    /// What processors finish in minutes.
    Small,
}

/// Which starts are measured, each in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cold {
    /// None.
    None,
    /// With the kernels that this user's cache has.
    Warm,
    /// Without any compiled kernel, then again with those kernels, and on GPUs a third time with the ways to multiply that
    /// the first has kept.
    Cold,
}

/// What is measured, of which model, on what.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub(super) struct Measure {
    /// Folder with config.json and safetensors files.
    #[arg(long, value_name = "DIR", required_unless_present = "shape")]
    pub(super) model: Option<PathBuf>,
    /// Instead of a folder: llama-3-8b, llama-3.3-70b, or a config.json; its weights are dummies.
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub(super) shape: Option<String>,
    /// Where the weights come from [default: safetensors; dummy with --shape].
    #[arg(long, value_enum)]
    pub(super) load_format: Option<LoadFormat>,
    /// Where the ranks compute.
    #[arg(long, value_enum, default_value = "cpu")]
    pub(super) device: BenchDevice,
    /// Ranks of the group.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) tensor_parallel: usize,
    /// For tuning, not for publishing: of the group's ranks the first one runs alone, and nothing is summed over ranks.
    #[arg(long)]
    pub(super) rank_alone: bool,
    /// Threads of all ranks together [default: one a core].
    #[arg(long, value_name = "N")]
    pub(super) threads: Option<usize>,
    /// The row; each of the flags below changes a part of it [default: peer on GPUs, small on processors].
    #[arg(long, value_enum)]
    pub(super) cells: Option<Preset>,
    /// Prompts whose first token is timed, alone; `none` measures no such cell.
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub(super) prefill_tokens: Option<Vec<String>>,
    /// Sequences that decode together; a list measures each; `none` measures no such cell.
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pub(super) batch: Option<Vec<String>>,
    /// Tokens of each prompt that is decoded after.
    #[arg(long, value_name = "N")]
    pub(super) context: Option<usize>,
    /// Tokens that each sequence generates.
    #[arg(long, value_name = "N")]
    pub(super) output_tokens: Option<usize>,
    /// How often each decode cell is measured; the median counts.
    #[arg(long, value_name = "N")]
    pub(super) repetitions: Option<usize>,
    /// Which starts are measured [default: cold on GPUs, warm on processors].
    #[arg(long, value_enum)]
    pub(super) startup: Option<Cold>,
    /// Divides the logits of decoded rows; 0 takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(super) temperature: f32,
    /// Draws among the likeliest tokens whose probabilities reach this sum.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(super) top_p: f32,
    /// Draws among this many likeliest tokens; 0: all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) top_k: u32,
    /// Most tokens that are computed in one step; no latency bounds it further.
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    pub(super) max_step_tokens: usize,
    /// On GPUs: keys and values get what weights and workspace leave of this share of each GPU's memory.
    #[arg(long, value_name = "PERCENT", default_value_t = 90)]
    pub(super) device_memory_percent: u32,
    /// For tuning, not for publishing: decode over random keys and values instead of prefilled ones.
    #[arg(long)]
    pub(super) random_kv: bool,
    /// On a GPU: wait for every step's tokens before the next is launched.
    #[arg(long)]
    pub(super) lockstep: bool,
    /// On a GPU: launch decode steps kernel by kernel.
    #[arg(long)]
    pub(super) no_recordings: bool,
    /// On a GPU: leave kernels alone that are for one architecture.
    #[arg(long)]
    pub(super) portable_kernels: bool,
    /// On a GPU: the ways to multiply from this file, which a start has kept.
    #[arg(long, value_name = "FILE", conflicts_with = "measure_products")]
    pub(super) product_choices: Option<PathBuf>,
    /// On a GPU: measure the ways to multiply at this start, and leave alone what earlier ones have kept.
    #[arg(long)]
    pub(super) measure_products: bool,
    /// For tuning, not for publishing, on a GPU: whether kernels begin before the one in front of them is done. Auto is what
    /// is served: in a group of one alone.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) chain_kernels: Chain,
    /// On a GPU: wait for every kernel, so that one that fails is named. Nothing is recorded.
    #[arg(long)]
    pub(super) debug_kernels: bool,
    /// On a GPU: instead of measuring, tell where the time of a step goes, operation by operation. Keys and values are
    /// what the memory holds.
    #[arg(long)]
    pub(super) profile: bool,
}

impl Measure {
    pub(super) fn load_format(&self) -> LoadFormat {
        self.load_format.unwrap_or(match self.shape {
            Some(_) => LoadFormat::Dummy,
            None => LoadFormat::Safetensors,
        })
    }

    pub(super) fn preset(&self) -> Preset {
        self.cells.unwrap_or(match self.device {
            BenchDevice::Cuda => Preset::Peer,
            BenchDevice::Cpu => Preset::Small,
        })
    }

    pub(super) fn startup(&self) -> Cold {
        if self.profile {
            return Cold::None;
        }
        self.startup.unwrap_or(match self.device {
            BenchDevice::Cuda => Cold::Cold,
            BenchDevice::Cpu => Cold::Warm,
        })
    }

    pub(super) fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            ..SamplingParams::greedy()
        }
    }

    /// How GPUs compute.
    pub(super) fn options(&self) -> Options {
        Options {
            record: !self.no_recordings,
            portable: self.portable_kernels,
            products: match &self.product_choices {
                Some(file) => Products::Pinned(file.clone()),
                None if self.measure_products => Products::Measured,
                None => Products::Kept,
            },
            profile: self.profile,
            debug: self.debug_kernels,
            chain: self.chain_kernels,
        }
    }

    /// Why nothing of this run is a figure to publish, if so.
    pub(super) fn tuning(&self) -> Option<String> {
        let alone = || {
            format!(
                "one rank of {} alone, without sums over ranks",
                self.tensor_parallel
            )
        };
        let why = [
            self.rank_alone.then(alone),
            self.random_kv
                .then(|| "keys and values are random numbers".to_owned()),
            self.debug_kernels
                .then(|| "every kernel is waited for".to_owned()),
            match self.chain_kernels {
                Chain::Auto => None,
                Chain::On => Some("kernels are chained".to_owned()),
                Chain::Off => Some("kernels are not chained".to_owned()),
            },
        ];
        let why: Vec<String> = why.into_iter().flatten().collect();
        (!why.is_empty()).then(|| format!("a tuning aid, no figure to publish: {}", why.join("; ")))
    }

    pub(super) fn check(&self) -> Result<(), BenchError> {
        let flag = |text: &str| Err(BenchError::Flag(text.to_owned()));
        if self.load_format() == LoadFormat::Safetensors && self.shape.is_some() {
            return flag("--shape names no files; give --load-format=dummy with it, or --model");
        }
        list("prefill-tokens", &self.prefill_tokens)?;
        list("batch", &self.batch)?;
        if self.max_step_tokens == 0 || self.context == Some(0) || self.repetitions == Some(0) {
            return flag("--max-step-tokens, --context and --repetitions must be at least 1");
        }
        if self.output_tokens.is_some_and(|n| n < 3) {
            return flag("--output-tokens must be at least 3: a step is measured from the one before it");
        }
        let of_gpus = [
            ("profile", self.profile),
            ("product-choices", self.product_choices.is_some()),
            ("measure-products", self.measure_products),
            ("chain-kernels", self.chain_kernels != Chain::Auto),
            ("debug-kernels", self.debug_kernels),
        ];
        if let Some((name, _)) = of_gpus.into_iter().find(|(_, given)| *given)
            && self.device == BenchDevice::Cpu
        {
            return flag(&format!("--{name} needs --device=cuda"));
        }
        if self.threads == Some(0) || self.tensor_parallel == 0 {
            return flag("--threads and --tensor-parallel must be at least 1");
        }
        if self.rank_alone && self.tensor_parallel == 1 {
            return flag("--rank-alone is for one rank of several; give --tensor-parallel, or leave it out");
        }
        if !(1..=100).contains(&self.device_memory_percent) {
            return flag("--device-memory-percent must be from 1 to 100");
        }
        Ok(())
    }

    /// The command line of `bench startup` that starts the same group.
    pub(super) fn startup_argv(&self) -> Vec<String> {
        let mut argv = vec!["bench".to_owned(), "startup".to_owned()];
        let mut flag = |name: &str, value: Option<String>| {
            argv.extend(value.map(|value| format!("--{name}={value}")));
        };
        let choice = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map(|value| value.get_name().to_owned())
        };
        flag(
            "model",
            self.model.as_ref().map(|model| model.display().to_string()),
        );
        flag("shape", self.shape.clone());
        flag("load-format", choice(&|| self.load_format?.to_possible_value()));
        flag("device", choice(&|| self.device.to_possible_value()));
        flag("tensor-parallel", Some(self.tensor_parallel.to_string()));
        flag("threads", self.threads.map(|n| n.to_string()));
        flag("cells", choice(&|| self.preset().to_possible_value()));
        flag(
            "prefill-tokens",
            self.prefill_tokens.as_ref().map(|list| list.join(",")),
        );
        flag("batch", self.batch.as_ref().map(|list| list.join(",")));
        flag("context", self.context.map(|n| n.to_string()));
        flag("output-tokens", self.output_tokens.map(|n| n.to_string()));
        flag("max-step-tokens", Some(self.max_step_tokens.to_string()));
        flag(
            "device-memory-percent",
            Some(self.device_memory_percent.to_string()),
        );
        flag(
            "chain-kernels",
            choice(&|| self.chain_kernels.to_possible_value()),
        );
        flag(
            "product-choices",
            self.product_choices
                .as_ref()
                .map(|path| path.display().to_string()),
        );
        for (name, is_set) in [
            ("rank-alone", self.rank_alone),
            ("lockstep", self.lockstep),
            ("no-recordings", self.no_recordings),
            ("portable-kernels", self.portable_kernels),
            ("measure-products", self.measure_products),
            ("debug-kernels", self.debug_kernels),
        ] {
            argv.extend(is_set.then(|| format!("--{name}")));
        }
        argv
    }
}

/// The numbers of a list; `none` is an empty one.
pub(super) fn list(flag: &str, words: &Option<Vec<String>>) -> Result<Option<Vec<usize>>, BenchError> {
    let Some(words) = words else { return Ok(None) };
    if words.as_slice() == ["none"] {
        return Ok(Some(Vec::new()));
    }
    let number = |word: &String| word.parse().ok().filter(|&n: &usize| n > 0);
    let numbers: Option<Vec<usize>> = words.iter().map(number).collect();
    numbers.map(Some).ok_or_else(|| {
        BenchError::Flag(format!(
            "--{flag}={}: give whole numbers from 1 on with commas between them, or none",
            words.join(",")
        ))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        bench: Command,
    }

    #[derive(clap::Subcommand)]
    enum Command {
        Bench(BenchArgs),
    }

    fn parse(words: &[String]) -> BenchArgs {
        let Command::Bench(args) = Cli::parse_from([String::new()].iter().chain(words)).bench;
        args
    }

    #[test]
    fn a_start_is_measured_with_the_same_group() {
        let words = "bench --shape=llama-3-8b --device=cuda --tensor-parallel=2 --rank-alone --batch=1,8 --context=9 --lockstep \
                     --max-step-tokens=100 --prefill-tokens=none --device-memory-percent=50 --product-choices=c.txt \
                     --chain-kernels=on --debug-kernels";
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        let asked = parse(&words).measure;
        let Some(Other::Startup(child)) = parse(&asked.startup_argv()).other else {
            panic!("a subcommand")
        };
        let same = Measure {
            cells: Some(Preset::Peer),
            ..asked
        };
        assert_eq!(*child, same);
    }

    #[test]
    fn lists_are_numbers_or_none() {
        let words = |text: &str| Some(text.split(',').map(str::to_owned).collect());
        assert_eq!(list("batch", &None).expect("absent"), None);
        assert_eq!(list("batch", &words("none")).expect("empty"), Some(vec![]));
        assert_eq!(list("batch", &words("1,32")).expect("two"), Some(vec![1, 32]));
        for wrong in ["0", "1,", "x", "1,none"] {
            let error = list("batch", &words(wrong)).expect_err("refused").to_string();
            assert!(error.starts_with(&format!("--batch={wrong}: ")), "{error}");
        }
    }
}
