//! `swallow-worker`: one replica of a model.

use std::process::ExitCode;

use clap::Parser;
use swallow_proto::launch::LogFormat;
use swallow_worker::{
    bench,
    config::{Cli, Command},
    device::cuda,
    dummy, fetch, serve,
};

fn main() -> ExitCode {
    // SAFETY: the process has one thread so far.
    unsafe { cuda::prepare_environment() };
    match Cli::parse().command {
        // Logged already, and left as the termination message.
        Command::Serve(args) => {
            serve::run(*args).map_or_else(|error| ExitCode::from(error.exit_code()), |()| ExitCode::SUCCESS)
        }
        Command::Bench(args) => {
            serve::init_log(LogFormat::Text, tracing::Level::WARN);
            report(bench::run(args))
        }
        Command::Fetch(args) => report(fetch::run(args)),
        Command::Kernels(args) => report(cuda::make_kernels(&args)),
        Command::MakeCheckpoint(args) => report(dummy::make_checkpoint(&args)),
    }
}

fn report(outcome: Result<(), impl std::error::Error>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("swallow-worker: {error}");
            ExitCode::FAILURE
        }
    }
}
