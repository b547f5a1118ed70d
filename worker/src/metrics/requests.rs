//! How long requests take and how long they are.

use std::time::Duration;

use prometheus::Histogram;

use super::maker::Maker;

const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// A request's life, measured from its arrival at the worker's door.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timeline {
    /// Until the first step with it was planned.
    pub started: Option<Duration>,
    /// Until the first token.
    pub first_token: Option<Duration>,
    /// Until the last token.
    pub last_token: Option<Duration>,
    /// Until its end.
    pub finished: Duration,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Generated tokens.
    pub output_tokens: u32,
    /// Most tokens it could have generated.
    pub max_tokens: u32,
}

/// Histograms over requests and their tokens.
#[derive(Clone)]
pub(super) struct Requests {
    ttft: Histogram,
    inter_token: Histogram,
    inter_token_alias: Histogram,
    per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_tokens: Histogram,
}

impl Requests {
    pub(super) fn register(make: &Maker<'_>, max_model_len: u32) -> Result<Self, prometheus::Error> {
        let by_length = one_two_five(max_model_len);
        Ok(Self {
            ttft: make.histogram(
                "vllm:time_to_first_token_seconds",
                "Arrival to first token",
                TTFT_BUCKETS,
            )?,
            inter_token: make.histogram(
                "vllm:inter_token_latency_seconds",
                "Between two tokens",
                PER_TOKEN_BUCKETS,
            )?,
            inter_token_alias: make.histogram(
                "vllm:time_per_output_token_seconds",
                "The same as vllm:inter_token_latency_seconds, under its older name",
                PER_TOKEN_BUCKETS,
            )?,
            per_output_token: make.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time between a request's tokens",
                PER_TOKEN_BUCKETS,
            )?,
            e2e: make.histogram(
                "vllm:e2e_request_latency_seconds",
                "Arrival to end",
                REQUEST_BUCKETS,
            )?,
            queue: make.histogram(
                "vllm:request_queue_time_seconds",
                "Arrival to first step",
                REQUEST_BUCKETS,
            )?,
            prefill: make.histogram(
                "vllm:request_prefill_time_seconds",
                "First step to first token",
                REQUEST_BUCKETS,
            )?,
            decode: make.histogram(
                "vllm:request_decode_time_seconds",
                "First token to last token",
                REQUEST_BUCKETS,
            )?,
            inference: make.histogram(
                "vllm:request_inference_time_seconds",
                "First step to last token",
                REQUEST_BUCKETS,
            )?,
            request_prompt_tokens: make.histogram(
                "vllm:request_prompt_tokens",
                "Prompt's length",
                &by_length,
            )?,
            request_generation_tokens: make.histogram(
                "vllm:request_generation_tokens",
                "Tokens generated",
                &by_length,
            )?,
            request_max_tokens: make.histogram(
                "vllm:request_params_max_tokens",
                "Most tokens asked for",
                &by_length,
            )?,
        })
    }

    pub(super) fn first_token(&self, since_arrival: Duration) {
        self.ttft.observe(since_arrival.as_secs_f64());
    }

    pub(super) fn next_token(&self, since_last: Duration) {
        self.inter_token.observe(since_last.as_secs_f64());
        self.inter_token_alias.observe(since_last.as_secs_f64());
    }

    pub(super) fn finished(&self, life: &Timeline) {
        self.e2e.observe(life.finished.as_secs_f64());
        self.request_prompt_tokens.observe(life.prompt_tokens.into());
        self.request_generation_tokens.observe(life.output_tokens.into());
        self.request_max_tokens.observe(life.max_tokens.into());
        let Some(started) = life.started else { return };
        self.queue.observe(started.as_secs_f64());
        let (Some(first), Some(last)) = (life.first_token, life.last_token) else {
            return;
        };
        self.prefill.observe(first.saturating_sub(started).as_secs_f64());
        self.inference.observe(last.saturating_sub(started).as_secs_f64());
        let decode = last.saturating_sub(first);
        self.decode.observe(decode.as_secs_f64());
        if life.output_tokens > 1 {
            self.per_output_token
                .observe(decode.as_secs_f64() / f64::from(life.output_tokens - 1));
        }
    }
}

/// 1, 2, 5, 10, ... up to `most`.
fn one_two_five(most: u32) -> Vec<f64> {
    let mut buckets: Vec<f64> = Vec::new();
    let decades = std::iter::successors(Some(1_u64), |decade| Some(decade * 10));
    for value in decades
        .take(10)
        .flat_map(|decade| [decade, 2 * decade, 5 * decade])
    {
        if value > u64::from(most) {
            break;
        }
        buckets.push(value as f64);
    }
    buckets
}
