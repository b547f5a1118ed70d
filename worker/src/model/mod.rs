//! Forward passes, one per architecture, each written once over [`Device`](crate::device::Device).

mod llama;
mod rotary;
mod shard;
mod weights;

pub use llama::{Llama, LlamaSpec};
pub use rotary::inverse_frequencies;
pub use shard::{Cut, LayerSlices, Shard, Slice, Slices};
pub use weights::{Dummy, Weights};
