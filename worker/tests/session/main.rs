//! The session protocol, spoken by a real gRPC client to a real server whose runner is replaced by one that can be
//! held, slowed and broken.

mod ahead;
mod ends;
mod fake;
mod grammars;
mod harness;
mod nonsense;
mod ports;
mod ranks;
mod requests;
mod routers;
