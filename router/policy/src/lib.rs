//! Which replica takes a request and why, and which request may wait for one.
//!
//! Everything here is plain data and plain functions: time is a `Duration` since any fixed start, random numbers are
//! arguments, block keys are computed by the caller. The shell connects, counts and submits; it decides nothing.
//! A `Fleet` is what is believed about the replicas of one model, `choose` picks from it and gives the reason, a
//! `Queue` holds who waits, over all models.

mod breaker;
mod choose;
mod fleet;
mod lines;
mod prefix;
mod queue;
mod rate;
mod retry;
mod work;

pub use breaker::{Breaker, FAILURES_TO_OPEN, REST_MAX, REST_MIN};
pub use choose::{Ask, Blocked, Choice, Keys, Why, choose};
pub use fleet::{Capacity, Ending, Fleet, Load, Replica, ReplicaId};
pub use prefix::{KNOWN_MAX, Matched, PREDICTED_MAX, PrefixIndex};
pub use queue::{Depth, Full, Limits, ModelId, Priority, Queue, RequestId, TenantId, Waiting};
pub use rate::{DrainRate, RETRY_MAX, RETRY_MIN};
pub use retry::RetryBudget;
pub use work::{Delta, Ticket, Work};
