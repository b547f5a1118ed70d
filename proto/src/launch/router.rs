//! The router's arguments.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

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
        let (served_names, address) = names_and_place(text, expected)?;
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

/// The name that a worker's certificate carries, unless another one is given.
pub const WORKER_TLS_NAME: &str = "swallow-worker";

/// The name of the port of a Service that workers' sessions use, unless another one is given.
pub const GRPC_PORT_NAME: &str = "grpc";

/// A Kubernetes Service whose endpoints are the replicas of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoverTarget {
    /// Served names of the model, its own first; never empty.
    pub served_names: Vec<String>,
    /// Name of the Service, in the router's namespace.
    pub service: String,
    /// Name of the Service's port.
    pub port_name: String,
}

impl fmt::Display for DiscoverTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.served_names.join(","), self.service)?;
        if self.port_name != GRPC_PORT_NAME {
            write!(f, ":{}", self.port_name)?;
        }
        Ok(())
    }
}

impl FromStr for DiscoverTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected NAME[,ALIAS...]=SERVICE[:PORTNAME]";
        let (served_names, place) = names_and_place(text, expected)?;
        let (service, port_name) = place.split_once(':').unwrap_or((place, GRPC_PORT_NAME));
        if !is_label(service, 63) {
            return Err(format!("'{service}' cannot be the name of a Service; {expected}"));
        }
        if !is_label(port_name, 15) {
            return Err(format!("'{port_name}' cannot be the name of a port; {expected}"));
        }
        Ok(Self {
            served_names,
            service: service.to_owned(),
            port_name: port_name.to_owned(),
        })
    }
}

/// Splits `NAME[,ALIAS...]=PLACE`.
fn names_and_place<'a>(text: &'a str, expected: &str) -> Result<(Vec<String>, &'a str), String> {
    let (names, place) = text.split_once('=').ok_or(expected)?;
    let served_names: Vec<String> = names.split(',').map(str::to_owned).collect();
    if served_names.iter().any(String::is_empty) {
        return Err(format!("a served name is empty; {expected}"));
    }
    Ok((served_names, place))
}

/// Whether Kubernetes takes it as a DNS label of at most `most` characters.
fn is_label(text: &str, most: usize) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !text.is_empty()
        && text.len() <= most
        && text.chars().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn namespace(text: &str) -> Result<String, String> {
    if is_label(text, 63) {
        Ok(text.to_owned())
    } else {
        Err("a namespace is up to 63 lower-case letters, digits and dashes".into())
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
    /// Where /health, /readyz and /metrics are answered by threads that serve nothing else, however busy the router is, and
    /// without TLS
    #[arg(long, value_name = "ADDR")]
    pub probe_listen: Option<SocketAddr>,
    /// A replica: NAME[,ALIAS...]=HOST:PORT; repeat for each
    #[arg(long = "replica", value_name = "REPLICA")]
    pub replicas: Vec<ReplicaAddress>,
    /// A model whose replicas are the endpoints of a Kubernetes Service: NAME[,ALIAS...]=SERVICE[:PORTNAME]; the port's
    /// name is grpc unless given; repeat for each model
    #[arg(long = "discover", value_name = "TARGET")]
    pub discover: Vec<DiscoverTarget>,
    /// Namespace of the Services of --discover [default: the pod's own]
    #[arg(long, value_name = "NAMESPACE", value_parser = namespace)]
    pub namespace: Option<String>,
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
    /// A client that takes nothing for so long, while all that may wait for it does, is given up and told so; until then
    /// its request is parked and costs no step [default: 120]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub slow_client_seconds: Option<u32>,
    /// Tell clients what a model's tokenizer is made of, at /tokenizer_info: tokenizer_config.json and the chat template
    #[arg(long)]
    pub tokenizer_info: bool,
    /// At this age, a tenth more or less, a client is told to open a new connection, so that load spreads over routers
    /// that came later; 0 is never [default: 1800]
    #[arg(long, value_name = "SECONDS")]
    pub max_connection_seconds: Option<u32>,
    /// How long streams on a connection of that age may go on [default: 1800]
    #[arg(long, value_name = "SECONDS")]
    pub connection_grace_seconds: Option<u32>,
    /// How long new requests are still served after SIGTERM, while readiness is false already: the time that it takes
    /// load balancers and kube-proxy to send them elsewhere
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub shutdown_delay_seconds: u32,
    /// How long open streams may finish after SIGTERM and the shutdown delay
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout_seconds: u32,
    /// Certificate chain that clients of both ports are shown, in PEM, read again when it changes; without it, they speak
    /// no TLS
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Certificate authorities, in PEM, one of which must have issued a worker's certificate; without it, sessions speak no
    /// TLS
    #[arg(long, value_name = "FILE", requires_all = ["worker_cert", "worker_key"])]
    pub worker_ca: Option<PathBuf>,
    /// Certificate chain that workers are shown, in PEM, for the extended key usage clientAuth; all three files are read
    /// again when they change
    #[arg(long, value_name = "FILE", requires = "worker_ca")]
    pub worker_cert: Option<PathBuf>,
    /// Its private key, in PEM
    #[arg(long, value_name = "FILE", requires = "worker_ca")]
    pub worker_key: Option<PathBuf>,
    /// DNS name that a worker's certificate must carry, whatever the address: pods are addressed by IP [default:
    /// swallow-worker]
    #[arg(long, value_name = "NAME", requires = "worker_ca")]
    pub worker_tls_name: Option<String>,
    /// File of the API keys that are asked for, read again when it changes; without it, nobody is told apart
    #[arg(long, value_name = "FILE")]
    pub api_keys: Option<PathBuf>,
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
        argv.optional("probe-listen", self.probe_listen.as_ref());
        argv.each("replica", &self.replicas);
        argv.each("discover", &self.discover);
        argv.optional("namespace", self.namespace.as_ref());
        argv.flag("max-queued-requests", self.max_queued_requests);
        argv.flag("max-queued-tokens", self.max_queued_tokens);
        argv.flag("max-queued-bytes", self.max_queued_bytes);
        argv.flag("max-queue-seconds", self.max_queue_seconds);
        argv.flag("max-body-bytes", self.max_body_bytes);
        argv.optional("slow-client-seconds", self.slow_client_seconds);
        argv.switch("tokenizer-info", self.tokenizer_info);
        argv.optional("max-connection-seconds", self.max_connection_seconds);
        argv.optional("connection-grace-seconds", self.connection_grace_seconds);
        argv.flag("shutdown-delay-seconds", self.shutdown_delay_seconds);
        argv.flag("drain-timeout-seconds", self.drain_timeout_seconds);
        argv.optional("tls-cert", self.tls_cert.as_ref().map(|path| path.display()));
        argv.optional("tls-key", self.tls_key.as_ref().map(|path| path.display()));
        argv.optional("worker-ca", self.worker_ca.as_ref().map(|path| path.display()));
        argv.optional(
            "worker-cert",
            self.worker_cert.as_ref().map(|path| path.display()),
        );
        argv.optional("worker-key", self.worker_key.as_ref().map(|path| path.display()));
        argv.optional("worker-tls-name", self.worker_tls_name.as_ref());
        argv.optional("api-keys", self.api_keys.as_ref().map(|path| path.display()));
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
        let discover = ["a,b/c=llama-worker", "x=w-2:rpc"]
            .map(|text| text.parse().expect("well formed"))
            .to_vec();
        let full = RouterArgs {
            replicas,
            discover,
            namespace: Some("team-a".into()),
            probe_listen: Some(([0, 0, 0, 0], 8081).into()),
            slow_client_seconds: Some(30),
            max_connection_seconds: Some(0),
            tls_cert: Some("/etc/swallow/tls.crt".into()),
            tls_key: Some("/etc/swallow/tls.key".into()),
            worker_ca: Some("/etc/swallow/worker/ca.crt".into()),
            worker_cert: Some("/etc/swallow/worker/tls.crt".into()),
            worker_key: Some("/etc/swallow/worker/tls.key".into()),
            worker_tls_name: Some("worker.team.svc".into()),
            api_keys: Some("/etc/swallow/keys.json".into()),
            shutdown_delay_seconds: 5,
            max_queued_bytes: 1 << 40,
            tokenizer_info: true,
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

    #[test]
    fn a_target_names_its_service_and_maybe_a_port() {
        let target: DiscoverTarget = "a,b=llama-worker".parse().expect("well formed");
        assert_eq!(target.served_names, ["a", "b"]);
        assert_eq!((&*target.service, &*target.port_name), ("llama-worker", "grpc"));
        assert_eq!(target.to_string(), "a,b=llama-worker");
        let target: DiscoverTarget = "a=w:rpc".parse().expect("well formed");
        assert_eq!((&*target.service, &*target.port_name), ("w", "rpc"));
        assert_eq!(target.to_string(), "a=w:rpc");
    }

    #[test]
    fn a_malformed_target_is_refused_with_what_to_write() {
        for text in [
            "a",
            "a=",
            "=w",
            "a,=w",
            "a=W",
            "a=w:",
            "a=-w",
            "a=w.ns",
            "a=w:averyverylongname",
        ] {
            let error = text.parse::<DiscoverTarget>().expect_err(text);
            assert!(
                error.contains("NAME[,ALIAS...]=SERVICE[:PORTNAME]"),
                "{text}: {error}"
            );
        }
        let error = Cli::try_parse_from(["swallow-router", "--namespace=Team A"])
            .err()
            .expect("not a label");
        assert!(error.to_string().contains("--namespace"), "{error}");
    }
}
