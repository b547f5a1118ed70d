//! The router's arguments.

use std::{fmt, net::SocketAddr, str::FromStr};

use clap::Args;

use super::{Argv, LogFormat};

/// A replica known from the start: the model it serves and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaAddress {
    /// Served names of its model, the model's own first; never empty.
    pub served_names: Vec<String>,
    /// Host name or IP address with a port.
    pub address: String,
}

impl fmt::Display for ReplicaAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.served_names.join(","), self.address)
    }
}

impl FromStr for ReplicaAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected NAME[,ALIAS...]=HOST:PORT";
        let (names, address) = text.split_once('=').ok_or(expected)?;
        let served_names: Vec<String> = names.split(',').map(str::to_owned).collect();
        if served_names.iter().any(String::is_empty) {
            return Err(format!("a served name is empty; {expected}"));
        }
        let (host, port) = address.rsplit_once(':').ok_or(expected)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(format!("'{address}' is not HOST:PORT; {expected}"));
        }
        Ok(Self {
            served_names,
            address: address.to_owned(),
        })
    }
}

/// What a router listens to, whom it sends to, and how much it lets wait.
#[derive(Args, Clone, Debug, PartialEq)]
pub struct RouterArgs {
    /// Where gRPC clients connect
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:50051")]
    pub grpc_listen: SocketAddr,
    /// Where OpenAI clients connect; /metrics, /health and /readyz are here too
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000")]
    pub http_listen: SocketAddr,
    /// A replica: NAME[,ALIAS...]=HOST:PORT; repeat for each
    #[arg(long = "replica", value_name = "REPLICA")]
    pub replicas: Vec<ReplicaAddress>,
    /// Most requests that wait for a replica, over all models
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub max_queued_requests: u32,
    /// Most prompt tokens that wait for a replica, over all models
    #[arg(long, value_name = "TOKENS", default_value_t = 4_000_000)]
    pub max_queued_tokens: u64,
    /// Most bytes of waiting requests in memory
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    pub max_queued_bytes: u64,
    /// A request that no replica took in this time is refused
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub max_queue_seconds: u32,
    /// Largest request body or message
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    pub max_body_bytes: u32,
    /// How long open streams may finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout_seconds: u32,
    /// Form of log lines
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

impl RouterArgs {
    /// The command line after the program's name; parsing it gives the same value back.
    pub fn argv(&self) -> Vec<String> {
        let mut argv = Argv(Vec::new());
        argv.flag("grpc-listen", self.grpc_listen);
        argv.flag("http-listen", self.http_listen);
        argv.each("replica", &self.replicas);
        argv.flag("max-queued-requests", self.max_queued_requests);
        argv.flag("max-queued-tokens", self.max_queued_tokens);
        argv.flag("max-queued-bytes", self.max_queued_bytes);
        argv.flag("max-queue-seconds", self.max_queue_seconds);
        argv.flag("max-body-bytes", self.max_body_bytes);
        argv.flag("drain-timeout-seconds", self.drain_timeout_seconds);
        argv.choice("log-format", self.log_format);
        argv.0
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RouterArgs,
    }

    fn parse(argv: Vec<String>) -> RouterArgs {
        Cli::parse_from(std::iter::once("swallow-router".to_string()).chain(argv)).args
    }

    #[test]
    fn a_rendered_command_line_parses_back() {
        let minimal = parse(Vec::new());
        assert_eq!(parse(minimal.argv()), minimal);
        let replicas = ["a,b/c=127.0.0.1:5000", "x=worker-0.models:50061"]
            .map(|text| text.parse().expect("well formed"))
            .to_vec();
        let full = RouterArgs {
            replicas,
            max_queued_bytes: 1 << 40,
            log_format: LogFormat::Json,
            ..minimal
        };
        assert_eq!(parse(full.argv()), full);
    }

    #[test]
    fn a_malformed_replica_is_refused_with_what_to_write() {
        for text in ["a", "a=", "=h:1", "a,=h:1", "a=h", "a=h:99999", "a=:1"] {
            let error = text.parse::<ReplicaAddress>().expect_err(text);
            assert!(error.contains("NAME[,ALIAS...]=HOST:PORT"), "{text}: {error}");
        }
    }
}
