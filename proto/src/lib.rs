//! What crosses a process boundary, and nothing else: how a worker or router is started, and how a block of
//! tokens is named. Both ends are ours; no async, no I/O.

pub mod launch;
pub mod prefix;
