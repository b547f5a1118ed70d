//! The least time that a step can take: what its weights, keys and values weigh, and what its products cost, at the rates
//! that this machine reached in this process.

use super::{BenchDevice, BenchError, ceiling};
use crate::{
    checkpoint::LlamaConfig,
    device::{Heads, cpu::Isa, cuda},
    model::Shard,
};

/// What all machines of a group reach together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    pub(super) bytes_per_s: f64,
    pub(super) flops_per_s: f64,
    /// Of a GPU's copy and large product, those that fall short of what GPUs of this generation reach, as a factor above 1.
    short: (f64, f64),
}

/// An H200's copy and its product of 8192 x 8192 x 8192, where the published figures were taken. GPUs below the first
/// number of a pair are slower ones of their kind, and are told beside the second.
const COPY: (f64, f64) = (4150e9, 4269e9);
const PRODUCT: (f64, f64) = (750e12, 771e12);

impl Rates {
    fn of_gpus(peaks: &cuda::Peaks, ranks: usize) -> Self {
        let short = |rate: f64, (least, usual): (f64, f64)| if rate < least { usual / rate } else { 1.0 };
        Self {
            bytes_per_s: ranks as f64 * peaks.bytes_per_s.max(peaks.read_bytes_per_s),
            flops_per_s: ranks as f64 * peaks.flops_per_s,
            short: (short(peaks.bytes_per_s, COPY), short(peaks.flops_per_s, PRODUCT)),
        }
    }

    /// As they would be on a GPU that falls short of nothing; `None` if this one does not.
    pub(super) fn scaled(self) -> Option<Self> {
        let (bytes, flops) = self.short;
        (self.short != (1.0, 1.0)).then_some(Self {
            bytes_per_s: self.bytes_per_s * bytes,
            flops_per_s: self.flops_per_s * flops,
            short: (1.0, 1.0),
        })
    }
}

/// What limits a step here.
pub(super) enum Ceilings {
    /// Measured before each line, because other programs use the same processors.
    Cpu { threads: usize },
    /// Measured once, before the group takes the GPU's memory.
    Gpu(cuda::Peaks),
}

impl Ceilings {
    pub(super) fn new(device: BenchDevice, threads: usize) -> Result<Self, BenchError> {
        Ok(match device {
            BenchDevice::Cpu => Self::Cpu { threads },
            BenchDevice::Cuda => Self::Gpu(cuda::measure_peaks()?),
        })
    }

    pub(super) fn machine(&self) -> String {
        match self {
            Self::Cpu { threads } => format!("{threads} threads, {}", Isa::detect().name()),
            Self::Gpu(peaks) => peaks.name.clone(),
        }
    }

    pub(super) fn gpu(&self) -> Option<&cuda::Peaks> {
        match self {
            Self::Cpu { .. } => None,
            Self::Gpu(peaks) => Some(peaks),
        }
    }

    /// Of a group; all ranks share processors, and each has its own GPU.
    pub(super) fn rates(&self, ranks: usize) -> Rates {
        match self {
            Self::Cpu { threads } => Rates {
                bytes_per_s: ceiling::read_bandwidth(*threads),
                flops_per_s: ceiling::flops(*threads),
                short: (1.0, 1.0),
            },
            Self::Gpu(peaks) => Rates::of_gpus(peaks, ranks),
        }
    }
}

/// The numbers of a model, or of one rank's part of it.
pub(super) struct Floor {
    /// In the matrices of all layers.
    layers: f64,
    /// In the head.
    head: f64,
    /// Query heads of all layers, times their size.
    query: f64,
    /// Keys and values of one token.
    kv: f64,
    /// Bytes of a weight, and of a number of keys and values.
    number_bytes: f64,
}

impl Floor {
    pub(super) fn new(config: &LlamaConfig, device: BenchDevice, part: Shard) -> Self {
        let (layers, hidden) = (config.n_layers, config.hidden_size);
        let Heads { n_q, n_kv, dim } = part.heads(config);
        let attention = 2 * (n_q + n_kv) * dim * hidden;
        let inner = part.part(config.intermediate_size).len();
        Self {
            layers: (layers * (attention + 3 * inner * hidden)) as f64,
            head: (part.part(config.vocab_size).len() * hidden) as f64,
            query: (layers * n_q * dim) as f64,
            kv: (2 * layers * n_kv * dim) as f64,
            number_bytes: match device {
                BenchDevice::Cpu => 4.0,
                BenchDevice::Cuda => 2.0,
            },
        }
    }

    fn weight_bytes(&self) -> f64 {
        self.number_bytes * (self.layers + self.head)
    }

    fn kv_bytes(&self, tokens: f64) -> f64 {
        self.number_bytes * self.kv * tokens
    }

    /// Weights, keys and values that a step of so many sequences reads.
    pub(super) fn step_bytes(&self, sequences: usize, context: usize) -> f64 {
        self.weight_bytes() + self.kv_bytes((sequences * context) as f64)
    }

    /// Products wait for weights or for arithmetic; attention waits for keys and values.
    fn seconds(&self, flop: f64, kv_tokens: f64, rates: Rates) -> f64 {
        (self.weight_bytes() / rates.bytes_per_s).max(flop / rates.flops_per_s)
            + self.kv_bytes(kv_tokens) / rates.bytes_per_s
    }

    /// A step that gives each of so many sequences a token.
    pub(super) fn decode_seconds(&self, sequences: usize, context: usize, rates: Rates) -> f64 {
        let flop = 2.0 * (self.layers + self.head) * sequences as f64;
        self.seconds(flop, (sequences * context) as f64, rates)
    }

    /// A prompt alone: every pair of its tokens once in attention, the last row alone through the head.
    pub(super) fn prefill_seconds(&self, tokens: usize, rates: Rates) -> f64 {
        let n = tokens as f64;
        let pairs = n * (n + 1.0) / 2.0;
        let flop = 2.0 * (self.layers * n + self.head) + 4.0 * self.query * pairs;
        self.seconds(flop, n, rates)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn peaks(copy: f64, read: f64, flops: f64) -> cuda::Peaks {
        cuda::Peaks {
            name: "a GPU".into(),
            bytes_per_s: copy,
            read_bytes_per_s: read,
            flops_per_s: flops,
        }
    }

    #[test]
    fn floors_are_those_of_the_published_table() {
        let text = super::super::shapes::config("llama-3-8b").expect("known");
        let config = LlamaConfig::parse(Path::new("config.json"), text.as_bytes()).expect("accepted");
        let floor = Floor::new(&config, BenchDevice::Cuda, Shard { rank: 0, of: 1 });
        let rates = Rates::of_gpus(&peaks(4269e9, 4100e9, 771e12), 1);
        assert_eq!(rates.scaled(), None);
        let ms = |batch| 1e3 * floor.decode_seconds(batch, 1088, rates);
        for (batch, least) in [(1, 3.55), (8, 3.8), (32, 4.5), (64, 5.6), (128, 7.8)] {
            assert!((ms(batch) / least - 1.0).abs() < 0.03, "{batch}: {}", ms(batch));
        }
        let prefill = |tokens| 1e3 * floor.prefill_seconds(tokens, rates);
        assert!((prefill(1024) - 19.0).abs() < 0.5, "{}", prefill(1024));
        assert!((prefill(8192) - 171.0).abs() < 2.0, "{}", prefill(8192));
    }

    #[test]
    fn slow_gpus_are_told_beside_usual_ones() {
        let slow = Rates::of_gpus(&peaks(4000e9, 4400e9, 800e12), 2);
        assert_eq!(slow.bytes_per_s, 8800e9, "reading is faster here, on two GPUs");
        let scaled = slow.scaled().expect("its copy is slow");
        assert_eq!(scaled.flops_per_s, slow.flops_per_s);
        assert!((scaled.bytes_per_s / slow.bytes_per_s - 4269.0 / 4000.0).abs() < 1e-9);
        assert_eq!(scaled.scaled(), None);
    }
}
