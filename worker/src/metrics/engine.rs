//! What the loop counts: load, tokens, ends, steps.

use std::time::Duration;

use prometheus::{Gauge, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use swallow_schedule::{Finish, Load};

use super::{Sizes, Timeline, maker::Maker, requests::Requests};
use crate::group::MemoryReport;

const STEP_TOKEN_BUCKETS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
/// One that was compiled before is there in microseconds; the grammars' bounds end the longest.
const GRAMMAR_BUCKETS: &[f64] = &[
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// Small models step in tens of microseconds, a long prefill on a CPU in seconds.
const STEP_BUCKETS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0, 30.0, 60.0, 120.0, 300.0,
];

/// Shares of a step's time.
const ERROR_BUCKETS: &[f64] = &[0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0];

/// What the engine counts and measures. Cheap to clone: handles to the same values.
#[derive(Clone)]
pub struct EngineMetrics {
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    prompt_tokens: IntCounter,
    prompt_tokens_cached: IntCounter,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    rejected: IntCounter,
    grammar_seconds: HistogramVec,
    sessions: IntGauge,
    sessions_cut: IntCounter,
    preemptions: IntCounter,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    step_tokens: Histogram,
    step_seconds: HistogramVec,
    step_error: HistogramVec,
    collective_seconds: HistogramVec,
    steps: IntCounterVec,
    memory: IntGaugeVec,
    requests: Requests,
}

/// A step that is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepDone {
    /// Rows of prompts.
    pub(crate) prefill: u32,
    /// Rows that each give a token after the first.
    pub(crate) decode: u32,
    /// Its time.
    pub(crate) took: Duration,
    /// What was expected when it was launched.
    pub(crate) predicted: Option<Duration>,
    /// Time that its ranks spent meeting each other.
    pub(crate) exchanged: Option<Duration>,
    /// It ran from a recording.
    pub(crate) replayed: bool,
}

/// How a request ended, for the `finished_reason` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The scheduler's word.
    Finished(Finish),
    /// The group failed or the drain's time ran out.
    Error,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Finished(Finish::Stop) => "stop",
            Self::Finished(Finish::Length) => "length",
            Self::Finished(Finish::Cancelled | Finish::Deadline) => "abort",
            Self::Error => "error",
        }
    }

    const LABELS: [&str; 4] = ["stop", "length", "abort", "error"];
}

impl EngineMetrics {
    pub(super) fn register(make: &Maker<'_>, sizes: Sizes) -> Result<Self, prometheus::Error> {
        make.told(
            "vllm:cache_config_info",
            "Sizes of the cache of keys and values",
            &[
                ("block_size", sizes.block_tokens),
                ("num_gpu_blocks", sizes.n_blocks),
            ],
        )?;
        let success = make.counters(
            "vllm:request_success_total",
            "Requests that ended",
            "finished_reason",
        )?;
        for label in Outcome::LABELS {
            success.with_label_values(&[label]); // A rate needs the zero before the first event.
        }
        let steps = make.counters(
            "swallow_worker_steps_total",
            "Steps, by how their kernels were launched: from a recording or one by one",
            "launch",
        )?;
        for label in ["recorded", "single"] {
            steps.with_label_values(&[label]);
        }
        Ok(Self {
            running: make.gauge("vllm:num_requests_running", "Requests in the running batch")?,
            waiting: make.gauge(
                "vllm:num_requests_waiting",
                "Requests that wait for a place in it",
            )?,
            kv_usage: make.ratio(
                "vllm:kv_cache_usage_perc",
                "Share of blocks held by requests, 0 to 1",
            )?,
            prompt_tokens: make.counter("vllm:prompt_tokens_total", "Prompt tokens of prefilled requests")?,
            prompt_tokens_cached: make.counter(
                "vllm:prompt_tokens_cached_total",
                "Prompt tokens that came from the prefix cache",
            )?,
            generation_tokens: make.counter("vllm:generation_tokens_total", "Generated tokens")?,
            success,
            grammar_seconds: make.histograms(
                "swallow_worker_grammar_compile_seconds",
                "Compiling a request's grammar, by outcome: compiled, or refused; waiting for a place to do it is not counted",
                GRAMMAR_BUCKETS,
                "outcome",
            )?,
            rejected: make.counter(
                "swallow_worker_requests_rejected_total",
                "Requests refused before they ran",
            )?,
            sessions: make.gauge("swallow_worker_sessions", "Routers that are connected")?,
            sessions_cut: make.counter(
                "swallow_worker_sessions_cut_total",
                "Sessions ended because the router did not read",
            )?,
            preemptions: make.counter(
                "vllm:num_preemptions_total",
                "Requests sent back to wait because blocks ran out",
            )?,
            prefix_queries: make.counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache",
            )?,
            prefix_hits: make.counter("vllm:prefix_cache_hits_total", "Prompt tokens found there")?,
            step_tokens: make.histogram(
                "vllm:iteration_tokens_total",
                "Rows of a step",
                STEP_TOKEN_BUCKETS,
            )?,
            step_seconds: make.histograms(
                "swallow_worker_step_seconds",
                "Time of a step, by what its rows do",
                STEP_BUCKETS,
                "kind",
            )?,
            step_error: make.histograms(
                "swallow_worker_step_prediction_error",
                "How far a step's predicted time was from the measured one, as a share of that, by what its rows do",
                ERROR_BUCKETS,
                "kind",
            )?,
            collective_seconds: make.histograms(
                "swallow_worker_collective_seconds",
                "Time of a step that its ranks spent meeting each other, by what its rows do; where the device tells it",
                STEP_BUCKETS,
                "kind",
            )?,
            steps,
            memory: make.gauges(
                "swallow_worker_memory_bytes",
                "Memory of a rank: what it allocated, and its GPU's total and free memory after loading",
                &["rank", "kind"],
            )?,
            requests: Requests::register(make, sizes.max_model_len)?,
        })
    }

    pub(crate) fn step(&self, step: StepDone) {
        self.step_tokens.observe((step.prefill + step.decode).into());
        let kind = match (step.prefill, step.decode) {
            (0, _) => "decode",
            (_, 0) => "prefill",
            _ => "mixed",
        };
        self.step_seconds
            .with_label_values(&[kind])
            .observe(step.took.as_secs_f64());
        if let Some(predicted) = step.predicted {
            let took = step.took.as_secs_f64().max(1e-6);
            self.step_error
                .with_label_values(&[kind])
                .observe((predicted.as_secs_f64() / took - 1.0).abs());
        }
        if let Some(exchanged) = step.exchanged {
            self.collective_seconds
                .with_label_values(&[kind])
                .observe(exchanged.as_secs_f64());
        }
        let launch = if step.replayed { "recorded" } else { "single" };
        self.steps.with_label_values(&[launch]).inc();
    }

    pub(crate) fn memory(&self, report: &MemoryReport) {
        for (rank, memory) in report.ranks.iter().enumerate() {
            let rank = rank.to_string();
            for (kind, bytes) in [
                ("weights", memory.weights_bytes),
                ("kv_cache", memory.kv_bytes),
                ("workspace", memory.workspace_bytes),
                ("gpu_total", memory.gpu_bytes),
                ("gpu_free", memory.gpu_free_bytes),
            ] {
                let gauge = self.memory.with_label_values(&[rank.as_str(), kind]);
                gauge.set(i64::try_from(bytes).unwrap_or(i64::MAX));
            }
        }
    }

    pub(crate) fn load(&self, load: &Load) {
        self.running.set(load.running.into());
        self.waiting.set(load.waiting.into());
        self.kv_usage
            .set(f64::from(load.blocks_held) / f64::from(load.blocks_total.max(1)));
        catch_up(&self.preemptions, load.preemptions);
        catch_up(&self.prefix_queries, load.prefix_query_tokens);
        catch_up(&self.prefix_hits, load.prefix_hit_tokens);
    }

    pub(crate) fn started(&self, prompt_tokens: u32, cached_tokens: u32) {
        self.prompt_tokens.inc_by(prompt_tokens.into());
        self.prompt_tokens_cached.inc_by(cached_tokens.into());
    }

    pub(crate) fn first_token(&self, since_arrival: Duration) {
        self.generation_tokens.inc();
        self.requests.first_token(since_arrival);
    }

    pub(crate) fn next_token(&self, since_last: Duration) {
        self.generation_tokens.inc();
        self.requests.next_token(since_last);
    }

    pub(crate) fn sessions(&self, connected: usize) {
        self.sessions.set(i64::try_from(connected).unwrap_or(i64::MAX));
    }

    pub(crate) fn session_cut(&self) {
        self.sessions_cut.inc();
    }

    /// A grammar was compiled, or could not be.
    pub(crate) fn grammar(&self, compiled: bool, took: Duration) {
        let outcome = if compiled { "compiled" } else { "refused" };
        self.grammar_seconds
            .with_label_values(&[outcome])
            .observe(took.as_secs_f64());
    }

    pub(crate) fn rejected(&self) {
        self.rejected.inc();
    }

    pub(crate) fn finished(&self, outcome: Outcome, life: &Timeline) {
        self.success.with_label_values(&[outcome.label()]).inc();
        self.requests.finished(life);
    }
}

/// Brings a counter up to a total that somebody else counts.
fn catch_up(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}
