//! From a row of logits to a token: what a sequence asked for, the draw, and the log-probabilities it wants to see.
//!
//! A token depends on the row's logits, the sequence's own history and (seed, candidate, position), and on nothing
//! else: not on the batch, the slot, the rank or the number of threads. The order of the steps is fixed: bias,
//! penalties, ban of early stops, temperature, top-k, top-p, min-p, draw. Scores are of the raw logits.

mod filter;
mod on_device;
mod params;
mod philox;
mod sampler;
mod score;

pub use on_device::{Choice, Draw};
pub use params::SamplingParams;
pub use philox::{philox4x32_10, uniform, uniform_bits};
pub use sampler::{BadLogits, Sampler};
pub use score::{LogSoftmax, TokenScore};
