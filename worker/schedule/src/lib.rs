//! Which tokens run in the next step, and in which blocks their keys and values live.
//!
//! add - cancel - step(now) -> Step - commit(tokens) -> outputs. Synchronous; time is an argument; the device is
//! somebody else's. No token is lost, doubled or reordered, and every block is free, cached or held.
//!
//! - `scheduler`: the doors. A sequence comes, is refused, cancelled or late; what the caller can ask.
//! - `plan`: one step. Decode rows first, then admissions, then prefill chunks; preemption when memory runs out.
//! - `cost`: what steps cost, learnt from their times, so that prefill beside decoding keeps a target.
//! - `commit`: what a step's tokens change.
//! - `sequence`, `blocks`: the two kinds of state, and the rules that each keeps.
//!
//! With a lag of one, step N + 1 is planned while step N runs. The device runs steps in order, so N + 1 may read
//! what N writes; but nothing that N touches is given to anybody else before N is committed.

mod audit;
mod blocks;
mod commit;
mod cost;
mod plan;
mod scheduler;
mod sequence;
mod types;

pub use cost::{CostModel, Pace, StepCost};
pub use scheduler::Scheduler;
pub use types::{
    Ask, BlockId, Finish, Input, KeyOf, KvDelta, Limits, Load, Micros, Output, Refusal, SeqId, Slot, Step,
    StepId, Work,
};
