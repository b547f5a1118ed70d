//! Carries out plans for SwallowModels. What should happen is decided in `swallow_plan`; here it is read, shown or done.

mod controller;
mod file;
mod local;
mod probe;
mod render;
mod worker;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use swallow_plan::Images;

use controller::RunArgs;
use local::LocalArgs;

/// Serves Swallow models: turns SwallowModel files into tensor-parallel workers behind a router.
#[derive(Debug, Parser)]
#[command(name = "swallow-operator", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the CustomResourceDefinition of SwallowModel as YAML
    Crd,
    /// Print the Kubernetes objects that SwallowModels would become, with their memory plans; needs no cluster
    Plan(PlanArgs),
    /// Serve SwallowModels as processes on this machine, bound to loopback, until Ctrl-C or SIGTERM
    Local(LocalArgs),
    /// Carry out the plans of a cluster's SwallowModels, until SIGTERM
    Run(RunArgs),
}

#[derive(Debug, clap::Args)]
struct PlanArgs {
    /// File with one or more SwallowModels in YAML; - reads standard input. Secrets beside them are left out
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Image of workers whose SwallowModel names none
    #[arg(long, value_name = "IMAGE", default_value_t = Images::default().worker)]
    worker_image: String,
    /// Image of routers whose SwallowModel names none
    #[arg(long, value_name = "IMAGE", default_value_t = Images::default().router)]
    router_image: String,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Crd => render::print(&render::crd()),
        Command::Plan(args) => {
            let images = Images {
                worker: args.worker_image,
                router: args.router_image,
                ..Images::default()
            };
            file::read(&args.file)
                .and_then(|contents| render::plan(&contents.models, &images))
                .and_then(|text| render::print(&text))
        }
        Command::Local(args) => local::run(args),
        Command::Run(args) => controller::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(lines) => {
            for line in lines {
                eprintln!("swallow-operator: {line}");
            }
            ExitCode::FAILURE
        }
    }
}
