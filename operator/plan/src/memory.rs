//! The memory plan: what weights take, what is set aside, and how many tokens of context the rest holds.
//!
//! All numbers follow from the model's shape and the spec; nothing is measured. Bytes are of one rank unless the name
//! says otherwise, because each rank has a device's memory to itself.

use crate::{
    model::{Device, MemoryPlanStatus},
    topology::Shape,
};

/// Workspace of a rank on a GPU apart from its weights: activations, cuBLASLt, NCCL, CUDA's own. An allowance.
const GPU_OVERHEAD_BYTES: u64 = 2_469_606_195; // 2.3 GiB
/// Workspace of a group on CPU apart from its weights: activations of the largest step, tokenizer files, the process.
const CPU_OVERHEAD_BYTES: u64 = 512 << 20;
/// One part in so many of the weights is set aside beside them, for alignment and copies in flight.
const WEIGHTS_PER_OVERHEAD: u64 = 20;
/// Tokens in one block of the KV cache.
pub const BLOCK_TOKENS: u32 = 16;

/// How the memory of each rank is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Ranks of the group.
    pub tensor: u32,
    /// Bytes of one number, in weights and cache.
    pub number_bytes: u64,
    /// Parameters of the whole model.
    pub parameters: u64,
    /// One rank's weights, in bytes.
    pub weights_bytes: u64,
    /// Set aside in one rank, in bytes.
    pub overhead_bytes: u64,
    /// Keys and values in one rank, in bytes: whole blocks.
    pub kv_cache_bytes: u64,
    /// Keys and values of one token in one rank, in bytes.
    pub kv_bytes_per_token: u64,
    /// Tokens of context that one group holds.
    pub kv_tokens: u64,
    /// What one device may use, in bytes; `None` on CPU without a memory limit.
    pub budget_bytes: Option<u64>,
}

/// How the size of the KV cache is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSizing {
    /// Bytes of the whole group.
    Bytes(u64),
    /// What weights and overhead leave of this many bytes of each device.
    Rest,
}

/// What the plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The model's size.
    pub shape: Shape,
    /// Ranks of the group.
    pub tensor: u32,
    /// What computes.
    pub device: Device,
    /// Bytes of one number, in weights and cache.
    pub number_bytes: u64,
    /// How the KV cache is sized.
    pub kv: KvSizing,
    /// What one device (GPU) or the whole group (CPU) may use, in bytes.
    pub budget_bytes: Option<u64>,
}

/// Why the memory does not hold the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// Weights, workspace and cache together exceed the budget.
    #[error(
        "{needed} are needed {place} ({weights} weights, {overhead} workspace, {kv} KV cache), {budget} may be used{advice}"
    )]
    OverBudget {
        /// "in each GPU" or "in the pod".
        place: &'static str,
        /// The sum.
        needed: Size,
        /// Weights.
        weights: Size,
        /// Workspace.
        overhead: Size,
        /// Keys and values.
        kv: Size,
        /// What may be used.
        budget: Size,
        /// What to change.
        advice: String,
    },
    /// The cache holds no block.
    #[error("{given} of KV cache hold no block of {BLOCK_TOKENS} tokens, which takes {block}")]
    NoBlock {
        /// What is given, for one rank.
        given: Size,
        /// What a block takes, in one rank.
        block: Size,
    },
}

/// Bytes, shown in the largest binary unit that keeps three digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        let digits = if value < 9.995 {
            2
        } else {
            usize::from(value < 99.95)
        };
        write!(f, "{value:.digits$} {}", UNITS[unit])
    }
}

impl MemoryPlan {
    /// Divides the memory.
    ///
    /// # Errors
    /// The memory does not hold the model with at least one block of KV cache.
    pub fn new(demand: &Demand) -> Result<Self, Misfit> {
        let Demand {
            shape,
            tensor,
            device,
            number_bytes,
            kv,
            budget_bytes,
        } = *demand;
        let weights_bytes = number_bytes * shape.parameters_of_a_rank(tensor);
        let overhead_bytes = weights_bytes / WEIGHTS_PER_OVERHEAD
            + match device {
                Device::GPU => GPU_OVERHEAD_BYTES,
                Device::CPU => CPU_OVERHEAD_BYTES / u64::from(tensor),
            };
        let kv_bytes_per_token = number_bytes * shape.kv_numbers_of_a_rank(tensor);
        let block_bytes = kv_bytes_per_token * u64::from(BLOCK_TOKENS);
        let fixed = weights_bytes.saturating_add(overhead_bytes);
        let given = match (kv, budget_bytes) {
            (KvSizing::Bytes(bytes), _) => bytes / u64::from(tensor),
            (KvSizing::Rest, budget) => budget.unwrap_or_default().saturating_sub(fixed),
        };
        let plan = Self {
            tensor,
            number_bytes,
            parameters: shape.parameters(),
            weights_bytes,
            overhead_bytes,
            kv_cache_bytes: given / block_bytes * block_bytes,
            kv_bytes_per_token,
            kv_tokens: given / block_bytes * u64::from(BLOCK_TOKENS),
            budget_bytes,
        };
        plan.check(demand, given, block_bytes)?;
        Ok(plan)
    }

    /// Bytes of the whole group: what a pod on CPU needs.
    pub fn group_bytes(&self) -> u64 {
        u64::from(self.tensor) * (self.weights_bytes + self.overhead_bytes + self.kv_cache_bytes)
    }

    /// Bytes of keys and values of the whole group.
    pub fn group_kv_bytes(&self) -> u64 {
        u64::from(self.tensor) * self.kv_cache_bytes
    }

    /// The plan as status tells it.
    pub fn to_status(self) -> MemoryPlanStatus {
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        MemoryPlanStatus {
            weights_bytes: signed(self.weights_bytes),
            overhead_bytes: signed(self.overhead_bytes),
            kv_cache_bytes: signed(self.kv_cache_bytes),
            kv_bytes_per_token: signed(self.kv_bytes_per_token),
            planned_kv_tokens: signed(self.kv_tokens),
        }
    }

    fn check(&self, demand: &Demand, given: u64, block_bytes: u64) -> Result<(), Misfit> {
        let on_cpu = demand.device == Device::CPU;
        let ranks = if on_cpu { u64::from(self.tensor) } else { 1 };
        let needed =
            ranks * (self.weights_bytes + self.overhead_bytes + self.kv_cache_bytes.max(block_bytes));
        if let Some(budget) = demand.budget_bytes.filter(|budget| needed > *budget) {
            return Err(Misfit::OverBudget {
                place: if on_cpu { "in the pod" } else { "in each GPU" },
                needed: Size(needed),
                weights: Size(ranks * self.weights_bytes),
                overhead: Size(ranks * self.overhead_bytes),
                kv: Size(ranks * self.kv_cache_bytes.max(block_bytes)),
                budget: Size(budget),
                advice: if on_cpu { String::new() } else { advice(demand) },
            });
        }
        if given < block_bytes {
            return Err(Misfit::NoBlock {
                given: Size(given),
                block: Size(block_bytes),
            });
        }
        Ok(())
    }
}

/// The smallest degree of tensor parallelism that the devices have room for.
fn advice(demand: &Demand) -> String {
    let degrees = demand.shape.degrees();
    let fitting = degrees
        .into_iter()
        .filter(|tensor| *tensor > demand.tensor)
        .find(|tensor| {
            MemoryPlan::new(&Demand {
                tensor: *tensor,
                ..*demand
            })
            .is_ok()
        });
    match fitting {
        Some(tensor) => format!("; parallelism.tensor: {tensor} fits"),
        None => "; no larger parallelism.tensor fits either".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn on_gpu(shape: Shape, tensor: u32, device_mib: u64, percent: u64) -> Demand {
        Demand {
            shape,
            tensor,
            device: Device::GPU,
            number_bytes: 2,
            kv: KvSizing::Rest,
            budget_bytes: Some(device_mib * MIB / 100 * percent),
        }
    }

    #[test]
    fn weights_and_keys_are_those_of_the_published_models() {
        let small = MemoryPlan::new(&on_gpu(Shape::LLAMA_3_8B, 1, 81_559, 92)).expect("fits");
        assert_eq!(
            (small.parameters, small.weights_bytes),
            (8_030_261_248, 16_060_522_496)
        );
        assert_eq!(small.kv_bytes_per_token, 131_072);
        let large = Demand {
            budget_bytes: Some(u64::MAX / 2),
            ..on_gpu(Shape::LLAMA_3_70B, 1, 0, 92)
        };
        let large = MemoryPlan::new(&large).expect("fits");
        assert_eq!(
            (large.parameters, large.weights_bytes),
            (70_553_706_496, 141_107_412_992)
        );
        assert_eq!(large.kv_bytes_per_token, 327_680);
    }

    #[test]
    fn tokens_that_fit_on_common_cards() {
        // (shape, ranks, MiB of a card, thousands of tokens), computed by hand from 92 % of the card.
        let h200 = 143_771;
        let h100 = 81_559;
        for (shape, tensor, card, thousands) in [
            (Shape::LLAMA_3_70B, 4, h200, 1210),
            (Shape::LLAMA_3_70B, 2, h200, 379),
            (Shape::LLAMA_3_70B, 4, h100, 478),
        ] {
            let plan = MemoryPlan::new(&on_gpu(shape, tensor, card, 92)).expect("fits");
            let off = plan.kv_tokens.abs_diff(thousands * 1000);
            assert!(
                off * 100 <= plan.kv_tokens,
                "TP {tensor} on {card} MiB: {}",
                plan.kv_tokens
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_said_with_the_degree_that_does() {
        let error = MemoryPlan::new(&on_gpu(Shape::LLAMA_3_70B, 1, 81_559, 92)).expect_err("too large");
        assert_eq!(
            error.to_string(),
            "140 GiB are needed in each GPU (131 GiB weights, 8.87 GiB workspace, 5.00 MiB KV cache), 73.3 GiB may be \
             used; parallelism.tensor: 2 fits"
        );
        let error = MemoryPlan::new(&on_gpu(Shape::LLAMA_3_70B, 1, 1024, 92)).expect_err("too large");
        assert!(
            error
                .to_string()
                .ends_with("no larger parallelism.tensor fits either"),
            "{error}"
        );
    }

    #[test]
    fn on_cpu_the_group_shares_one_budget() {
        let demand = Demand {
            shape: Shape::LLAMA_3_8B,
            tensor: 2,
            device: Device::CPU,
            number_bytes: 4,
            kv: KvSizing::Bytes(4 << 30),
            budget_bytes: Some(64 << 30),
        };
        let plan = MemoryPlan::new(&demand).expect("fits");
        assert_eq!(plan.group_kv_bytes(), 4 << 30);
        assert_eq!(plan.kv_tokens, (4 << 30) / 262_144);
        let error = MemoryPlan::new(&Demand {
            budget_bytes: Some(16 << 30),
            ..demand
        })
        .expect_err("too large");
        assert!(
            error.to_string().starts_with("35.9 GiB are needed in the pod"),
            "{error}"
        );
        let error = MemoryPlan::new(&Demand {
            kv: KvSizing::Bytes(1 << 20),
            ..demand
        })
        .expect_err("no block");
        assert_eq!(
            error.to_string(),
            "512 KiB of KV cache hold no block of 16 tokens, which takes 2.00 MiB"
        );
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10_485_760, "10.0 MiB"),
            (107_374_182_400, "100 GiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }
}
