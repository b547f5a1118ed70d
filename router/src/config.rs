//! The command line, and what can be wrong with it. Nothing else configures a router, but for `RUST_LOG`.

use std::{collections::HashSet, net::SocketAddr};

use clap::Parser;
use swallow_proto::launch::RouterArgs;

use crate::discover::{Fixed, TwiceGiven};

/// Serves Swallow language models: gRPC and OpenAI-compatible HTTP in front, worker replicas behind
///
/// A router needs no model files: tokenizer and chat template come from the replicas. It serves any number of models;
/// a request's `model` picks among their replicas.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "swallow-router",
    version,
    after_help = "RUST_LOG sets what is logged, for example RUST_LOG=debug."
)]
pub struct Cli {
    /// Everything that configures a router.
    #[command(flatten)]
    pub args: RouterArgs,
}

/// A command line that can't be served. Every message names the flag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Two ports are the same.
    #[error("--{0} and --{1} are both {2}; give each a port of its own")]
    SamePort(&'static str, &'static str, SocketAddr),
    /// A bound that lets nothing through.
    #[error("--{flag} must be at least {least}, and is {given}")]
    TooSmall {
        /// Without its dashes.
        flag: &'static str,
        /// The least that makes sense.
        least: u64,
        /// What was given.
        given: u64,
    },
    /// A replica is given twice.
    #[error(transparent)]
    Replicas(#[from] TwiceGiven),
    /// Two Services for one model, or one for two.
    #[error("--discover: {0} is given twice; give each model once, with one Service and all of its names")]
    Discover(String),
    /// It would have no effect.
    #[error("--namespace is where the Services of --discover are, and there is no --discover")]
    NoDiscover,
}

/// A few prompts must fit.
const LEAST_BODY_BYTES: u64 = 1024;

/// The replicas of a sound command line that are known from the start.
pub fn check(args: &RouterArgs) -> Result<Fixed, ConfigError> {
    let ports = [
        ("http-listen", Some(args.http_listen)),
        ("grpc-listen", Some(args.grpc_listen)),
        ("probe-listen", args.probe_listen),
    ];
    let ports = ports.map(|(flag, address)| Some((flag, address.filter(|address| address.port() != 0)?)));
    for (i, a) in ports.iter().enumerate() {
        for b in &ports[i + 1..] {
            if let (Some((a, address)), Some((b, other))) = (a, b)
                && address == other
            {
                return Err(ConfigError::SamePort(a, b, *address));
            }
        }
    }
    for (flag, given, least) in [
        ("max-queued-requests", u64::from(args.max_queued_requests), 1),
        ("max-queued-tokens", args.max_queued_tokens, 1),
        ("max-queued-bytes", args.max_queued_bytes, LEAST_BODY_BYTES),
        ("max-body-bytes", args.max_body_bytes.into(), LEAST_BODY_BYTES),
    ] {
        if given < least {
            return Err(ConfigError::TooSmall { flag, least, given });
        }
    }
    let mut places = HashSet::new();
    let mut names = HashSet::new();
    for target in &args.discover {
        if !places.insert(&target.service) {
            return Err(ConfigError::Discover(format!("the Service {}", target.service)));
        }
        if let Some(name) = target.served_names.iter().find(|name| !names.insert(*name)) {
            return Err(ConfigError::Discover(format!("the name '{name}'")));
        }
    }
    if args.namespace.is_some() && args.discover.is_empty() {
        return Err(ConfigError::NoDiscover);
    }
    Ok(Fixed::from_addresses(&args.replicas)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(argv: &[&str]) -> RouterArgs {
        Cli::parse_from(std::iter::once(&"swallow-router").chain(argv)).args
    }

    #[test]
    fn an_error_names_the_flag() {
        for (argv, flag) in [
            (
                &["--http-listen=127.0.0.1:7000", "--grpc-listen=127.0.0.1:7000"][..],
                "--http-listen",
            ),
            (
                &["--http-listen=127.0.0.1:7000", "--probe-listen=127.0.0.1:7000"],
                "--probe-listen",
            ),
            (&["--max-queued-requests=0"], "--max-queued-requests"),
            (&["--max-body-bytes=10"], "--max-body-bytes"),
            (&["--replica=a=h:1", "--replica=b=h:1"], "--replica"),
            (&["--discover=a=w", "--discover=b=w"], "the Service w"),
            (
                &["--discover=a,b=w", "--discover=b=v"],
                "--discover: the name 'b'",
            ),
            (&["--namespace=n"], "--namespace"),
        ] {
            let error = check(&parse(argv)).expect_err(flag).to_string();
            assert!(error.contains(flag), "{error}");
        }
        let error = Cli::try_parse_from(["swallow-router", "--replica", "nonsense"]).expect_err("no address");
        assert!(error.to_string().contains("--replica"), "{error}");
        assert!(check(&parse(&[])).is_ok());
        assert!(check(&parse(&["--discover=a=w", "--replica=a=h:1", "--namespace=n"])).is_ok());
    }
}
