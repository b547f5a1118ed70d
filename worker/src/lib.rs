//! One replica: a tensor-parallel group that loads a Llama checkpoint and turns token ids into token ids.
//!
//! The shell around the scheduler: sockets, threads and tensors are here, decisions are not. Text never passes
//! through; the tokenizer's files do, unread, on their way to routers.

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod device;
pub mod dummy;
pub mod engine;
pub mod fetch;
pub mod grammar;
pub mod group;
pub mod http;
pub mod metrics;
pub mod model;
pub mod sampling;
pub mod serve;
pub mod state;
