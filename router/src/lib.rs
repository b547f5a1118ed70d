//! The front of the models: gRPC and OpenAI HTTP in, worker sessions out.
//!
//! Shells that own sockets and decide nothing; what is decided is in `swallow_policy` and, about text, in `text`.

mod admit;
pub mod ask;
mod calls;
pub mod config;
pub mod discover;
pub mod dispatch;
pub mod engine;
pub mod fleet;
pub mod generate;
pub mod grpc;
mod guard;
pub mod http;
pub mod keys;
pub mod log;
pub mod metrics;
pub mod models;
pub mod observe;
pub mod openai;
mod pauses;
pub mod probe;
mod session;
pub mod template;
pub mod text;
pub mod tls;
mod tools;
pub mod vital;
