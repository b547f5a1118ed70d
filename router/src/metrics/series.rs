//! The series, in groups of what feeds them.

use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, exponential_buckets,
};

use super::Stage;

/// Makes series and registers each.
pub(super) struct Maker(pub Registry);

impl Maker {
    fn keep<C: prometheus::core::Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let made = made.expect("names and labels are constants that Prometheus takes");
        self.0
            .register(Box::new(made.clone()))
            .expect("each name is used once");
        made
    }

    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.keep(IntCounterVec::new(opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.keep(IntGauge::with_opts(opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.keep(IntGaugeVec::new(opts(name, help), labels))
    }

    /// Buckets double from `first`.
    fn histogram(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        (first, count): (f64, usize),
    ) -> HistogramVec {
        let buckets = exponential_buckets(first, 2.0, count).expect("a positive start and count");
        let opts = HistogramOpts {
            common_opts: opts(name, help),
            buckets,
        };
        self.keep(HistogramVec::new(opts, labels))
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("swallow_router_{name}"), help)
}

const MODEL: &[&str] = &["model"];
const METHOD: &[&str] = &["method"];
const REPLICA: &[&str] = &["model", "replica"];

/// What clients ask and how it ends.
pub(super) struct Calls {
    pub total: IntCounterVec,
    pub seconds: HistogramVec,
    pub ignored_fields: IntCounterVec,
    pub open: IntGaugeVec,
    pub connections: IntGaugeVec,
    pub panics: IntCounterVec,
    pub overhead: [Histogram; Stage::ALL.len()],
    pub log_lines_dropped: IntCounter,
}

impl Calls {
    pub fn new(make: &Maker) -> Self {
        let help = "The router's own work on one request, by stage.";
        let overhead = make.histogram("overhead_seconds", help, &["stage"], (8e-6, 18));
        Self {
            total: make.counter(
                "requests_total",
                "Requests that ended, by canonical status code.",
                &["model", "method", "code"],
            ),
            seconds: make.histogram(
                "request_seconds",
                "From a request's arrival to its end.",
                &["model", "method"],
                (0.004, 18),
            ),
            ignored_fields: make.counter(
                "ignored_fields_total",
                "Request fields that nobody knows and that had no effect.",
                METHOD,
            ),
            open: make.gauges("open_streams", "Requests that are being answered.", METHOD),
            connections: make.gauges("connections", "Open client connections.", &["protocol"]),
            panics: make.counter(
                "request_panics_total",
                "Requests that ended because the router itself failed on them.",
                &["protocol"],
            ),
            log_lines_dropped: make
                .counter(
                    "log_lines_dropped_total",
                    "Log lines that whoever reads them did not take in time.",
                    &[],
                )
                .with_label_values::<&str>(&[]),
            overhead: Stage::ALL.map(|stage| overhead.with_label_values(&[stage.label()])),
        }
    }
}

/// Tokens in and out.
pub(super) struct Tokens {
    pub prompt: IntCounterVec,
    pub cached: IntCounterVec,
    pub predicted: IntCounterVec,
    pub misprediction: IntCounterVec,
    pub output: IntCounterVec,
    pub first: HistogramVec,
    pub between: HistogramVec,
}

impl Tokens {
    pub fn new(make: &Maker) -> Self {
        Self {
            prompt: make.counter(
                "prompt_tokens_total",
                "Prompt tokens of requests that started.",
                MODEL,
            ),
            cached: make.counter(
                "cached_tokens_total",
                "Prompt tokens found in a replica's cache.",
                MODEL,
            ),
            predicted: make.counter(
                "predicted_cached_tokens_total",
                "Prompt tokens that the router believed to be in the chosen replica's cache.",
                MODEL,
            ),
            misprediction: make.counter(
                "cache_misprediction_tokens_total",
                "Prompt tokens of which the router believed wrongly that they were in the replica's cache (over), or that \
                 they were not (under), by what the replica said when it began.",
                &["model", "direction"],
            ),
            output: make.counter("output_tokens_total", "Tokens generated for clients.", MODEL),
            first: make.histogram(
                "time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                MODEL,
                (0.002, 17),
            ),
            between: make.histogram(
                "inter_token_seconds",
                "Between two tokens of a candidate; tokens that came together share the time.",
                MODEL,
                (0.0005, 16),
            ),
        }
    }
}

/// What each owner of API keys asks; nothing where nobody is told apart.
pub(super) struct Tenants {
    pub requests: IntCounterVec,
    pub prompt: IntCounterVec,
    pub output: IntCounterVec,
}

impl Tenants {
    pub fn new(make: &Maker) -> Self {
        const TENANT: &[&str] = &["tenant"];
        Self {
            requests: make.counter(
                "tenant_requests_total",
                "Requests that ended, by whose API key they came with and by canonical status code.",
                &["tenant", "code"],
            ),
            prompt: make.counter(
                "tenant_prompt_tokens_total",
                "Prompt tokens of requests that started, by tenant.",
                TENANT,
            ),
            output: make.counter(
                "tenant_output_tokens_total",
                "Tokens generated for clients, by tenant.",
                TENANT,
            ),
        }
    }
}

/// Waiting, and what is chosen.
pub(super) struct Dispatch {
    pub queue_wait: HistogramVec,
    pub queue_requests: IntGauge,
    pub queue_tokens: IntGauge,
    pub queue_bytes: IntGauge,
    pub choices: IntCounterVec,
    pub moves: IntCounterVec,
    pub slow_clients: IntCounterVec,
}

impl Dispatch {
    pub fn new(make: &Maker) -> Self {
        Self {
            queue_wait: make.histogram(
                "queue_wait_seconds",
                "From a request's arrival in the queue to the choice of a replica.",
                MODEL,
                (0.000_1, 20),
            ),
            queue_requests: make.gauge("queue_requests", "Requests that wait for a replica."),
            queue_tokens: make.gauge("queue_tokens", "Prompt tokens that wait for a replica."),
            queue_bytes: make.gauge("queue_bytes", "Bytes of waiting requests."),
            choices: make.counter(
                "choices_total",
                "Choices of a replica, by reason.",
                &["model", "why"],
            ),
            moves: make.counter(
                "moves_total",
                "Requests that lost their replica and went back to the queue, to start over or to go on, by cause.",
                &["model", "cause"],
            ),
            slow_clients: make.counter(
                "slow_clients_total",
                "Requests ended because the client did not read.",
                MODEL,
            ),
        }
    }
}

/// The replicas as they are seen from here.
pub(super) struct Replicas {
    pub state: IntGaugeVec,
    pub running: IntGaugeVec,
    pub waiting: IntGaugeVec,
    pub submit_requests: HistogramVec,
    pub step_tokens: HistogramVec,
    pub cancel_seconds: HistogramVec,
    pub cache_events_missed: IntCounterVec,
}

impl Replicas {
    pub fn new(make: &Maker) -> Self {
        Self {
            state: make.gauges(
                "replica_state",
                "1 for the state that a replica is in.",
                &["model", "replica", "state"],
            ),
            running: make.gauges(
                "replica_running",
                "Sequences in a replica's running batch.",
                REPLICA,
            ),
            waiting: make.gauges("replica_waiting", "Sequences that wait on a replica.", REPLICA),
            submit_requests: make.histogram(
                "submit_requests",
                "Requests in one submit frame.",
                MODEL,
                (1.0, 10),
            ),
            step_tokens: make.histogram("step_tokens", "Tokens in one step's frame.", MODEL, (1.0, 12)),
            cancel_seconds: make.histogram(
                "cancel_confirmed_seconds",
                "From a cancel to the replica's confirmation.",
                MODEL,
                (0.000_5, 14),
            ),
            cache_events_missed: make.counter(
                "cache_events_missed_total",
                "Times that a replica's cache became unknown until its next session.",
                MODEL,
            ),
        }
    }
}

/// What discovery hears.
pub(super) struct Discovery {
    pub endpoints: IntGaugeVec,
    pub watch_ends: IntCounterVec,
    pub stale: GaugeVec,
}

impl Discovery {
    pub fn new(make: &Maker) -> Self {
        Self {
            endpoints: make.gauges(
                "discovered_endpoints",
                "Replicas of a model that discovery found.",
                MODEL,
            ),
            watch_ends: make.counter(
                "discovery_watch_ends_total",
                "Watches on a model's endpoints that ended and were begun again, by how they ended.",
                &["model", "end"],
            ),
            stale: make.keep(GaugeVec::new(
                opts(
                    "discovery_stale_seconds",
                    "Since when nothing was heard of a model's endpoints; 0 while they are watched.",
                ),
                MODEL,
            )),
        }
    }
}
