//! Both fronts over real sockets, before an engine that says what the test wants.

mod grpc;
mod openai;
mod panics;
#[path = "../support/mod.rs"]
mod support;
