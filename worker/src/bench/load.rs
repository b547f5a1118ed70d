//! `bench serve`: a load on any OpenAI server, as many requests at a time as asked for, and when their tokens came.
//!
//! Each place has a thread that sends its next request when the last one is done. Prompts are random token ids, answers
//! have a fixed length, and all is streamed: the time to the first token is from before a request is sent to the first
//! chunk with output, and the time between tokens is that between such chunks, as other tools measure it.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::json;
use ureq::{Agent, Body, http::Response};

use super::BenchError;

/// What of a server's answer to a refused request is told.
const ERROR_BYTES: u64 = 4096;

/// The load, and who gets it.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Load {
    /// Where the server is, without /v1
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Model that requests name
    #[arg(long, value_name = "NAME")]
    model: String,
    /// Sent as a bearer token
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Requests under way at a time
    #[arg(long, value_name = "N", default_value_t = 64)]
    concurrency: usize,
    /// Requests in all [default: five times --concurrency]
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Requests before those, one after the other, that do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_ups: usize,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 1024)]
    input_tokens: usize,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 128)]
    output_tokens: usize,
    /// Prompts have ids below this
    #[arg(long, value_name = "N", default_value_t = 128_000)]
    vocab: u32,
    /// Other prompts for every number
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Ask for the ids of tokens too (return_token_ids), so that one whose text is incomplete counts when it comes
    #[arg(long)]
    token_ids: bool,
    /// A request that takes longer has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout_seconds: u64,
}

impl Load {
    fn check(&self) -> Result<(), BenchError> {
        let counts = [
            ("concurrency", self.concurrency),
            ("requests", self.requests.unwrap_or(1)),
            ("input-tokens", self.input_tokens),
            ("output-tokens", self.output_tokens),
            ("vocab", self.vocab as usize),
            ("timeout-seconds", self.timeout_seconds as usize),
        ];
        for (flag, count) in counts {
            if count == 0 {
                return Err(BenchError::Flag(format!("--{flag}=0: must be at least 1")));
            }
        }
        if !(self.url.starts_with("http://") || self.url.starts_with("https://")) {
            let url = &self.url;
            return Err(BenchError::Flag(format!(
                "--url={url}: must begin with http:// or https://"
            )));
        }
        Ok(())
    }

    /// The request of this number.
    fn body(&self, number: usize) -> String {
        let id = |at: usize| {
            // Of splitmix64; every prompt has ids of its own.
            let mut z = (self.seed << 48 ^ (number * self.input_tokens + at) as u64)
                .wrapping_add(1)
                .wrapping_mul(0x9E37_79B9_7F4A_7C15);
            z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            (z ^ z >> 27) % u64::from(self.vocab)
        };
        let prompt: Vec<u64> = (0..self.input_tokens).map(id).collect();
        let mut body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if self.token_ids {
            body["return_token_ids"] = true.into();
        }
        body.to_string()
    }
}

/// What is read of a chunk.
#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
    #[serde(default)]
    token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    completion_tokens: usize,
}

/// When a request's output came.
#[derive(Debug, Default)]
struct Answer {
    first: Duration,
    gaps: Vec<Duration>,
    whole: Duration,
    tokens: usize,
}

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Spread {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(times: impl Iterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
        ms.sort_unstable_by(f64::total_cmp);
        let Some(&max) = ms.last() else {
            return Self::default();
        };
        // The least that so many are not above.
        let at = |share: f64| ms[((ms.len() as f64 * share).ceil() as usize).clamp(1, ms.len()) - 1];
        Self {
            mean: ms.iter().sum::<f64>() / ms.len() as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max,
        }
    }
}

/// The line of output.
#[derive(Debug, Serialize)]
struct Served<'a> {
    measured: &'static str,
    url: &'a str,
    model: &'a str,
    concurrency: usize,
    input_tokens: usize,
    /// Of each answer, as asked for.
    output_tokens: usize,
    completed: usize,
    failed: usize,
    seconds: f64,
    requests_per_s: f64,
    output_tokens_per_s: f64,
    ttft_ms: Spread,
    itl_ms: Spread,
    request_ms: Spread,
}

/// Sends the load and prints what came of it.
///
/// # Errors
/// A flag makes no sense, or a request failed.
pub(super) fn run(load: &Load) -> Result<(), BenchError> {
    load.check()?;
    let requests = load.requests.unwrap_or(5 * load.concurrency);
    let agent: Agent = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(load.timeout_seconds)))
        .max_idle_connections(load.concurrency)
        .max_idle_connections_per_host(load.concurrency)
        .build()
        .into();
    for number in 0..load.warm_ups {
        ask(&agent, load, load.body(requests + number)).map_err(BenchError::Load)?;
    }
    // Made ahead, so that making them takes nothing from the measurement.
    let bodies: Vec<String> = (0..requests).map(|number| load.body(number)).collect();
    let next = AtomicUsize::new(0);
    let place = || {
        let mut answers = Vec::new();
        while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
            answers.push(ask(&agent, load, body.clone()));
        }
        answers
    };
    let begun = Instant::now();
    let answers: Vec<Result<Answer, String>> = std::thread::scope(|scope| {
        let places: Vec<_> = (0..load.concurrency.min(requests))
            .map(|_| scope.spawn(place))
            .collect();
        let ends = places.into_iter().map(|place| place.join());
        ends.flat_map(|answers| answers.expect("a place does not panic"))
            .collect()
    });
    report(load, &answers, begun.elapsed())
}

/// Sends one request and reads its stream.
fn ask(agent: &Agent, load: &Load, body: String) -> Result<Answer, String> {
    let url = format!("{}/v1/completions", load.url.trim_end_matches('/'));
    let mut request = agent.post(url).header("content-type", "application/json");
    if let Some(key) = &load.api_key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let sent = Instant::now();
    let response = request.send(body).map_err(|error| error.to_string())?;
    let status = response.status();
    if !status.is_success() {
        return Err(format!("{status}: {}", told(response)));
    }
    read(BufReader::new(response.into_body().into_reader()), sent)
}

/// A server's own words, on one line.
fn told(response: Response<Body>) -> String {
    let body = response
        .into_body()
        .into_with_config()
        .limit(ERROR_BYTES)
        .read_to_string();
    body.unwrap_or_default()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// Reads a stream to its end.
fn read(stream: impl BufRead, sent: Instant) -> Result<Answer, String> {
    let (mut answer, mut last, mut is_done) = (Answer::default(), None, false);
    for line in stream.lines() {
        let line = line.map_err(|error| error.to_string())?;
        let now = Instant::now();
        let Some(data) = line.strip_prefix("data:").map(str::trim) else {
            continue; // An empty line, a comment, or another field.
        };
        if data == "[DONE]" {
            is_done = true;
            continue;
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(|error| format!("{error} in: {data}"))?;
        if let Some(error) = chunk.error {
            return Err(error.to_string());
        }
        if let Some(usage) = chunk.usage {
            answer.tokens = usage.completion_tokens;
        }
        let has_output = |choice: &Choice| {
            !choice.text.is_empty() || choice.token_ids.as_ref().is_some_and(|ids| !ids.is_empty())
        };
        if chunk.choices.iter().any(has_output) {
            match last.replace(now) {
                None => answer.first = now.saturating_duration_since(sent),
                Some(last) => answer.gaps.push(now.saturating_duration_since(last)),
            }
        }
    }
    if !is_done {
        return Err("the stream ended before [DONE]".into());
    }
    if last.is_none() || answer.tokens == 0 {
        return Err("the stream had no output, or no usage".into());
    }
    answer.whole = sent.elapsed();
    Ok(answer)
}

fn report(load: &Load, answers: &[Result<Answer, String>], took: Duration) -> Result<(), BenchError> {
    let good: Vec<&Answer> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    let seconds = took.as_secs_f64();
    let tokens: usize = good.iter().map(|answer| answer.tokens).sum();
    let served = Served {
        measured: "serving",
        url: &load.url,
        model: &load.model,
        concurrency: load.concurrency,
        input_tokens: load.input_tokens,
        output_tokens: load.output_tokens,
        completed: good.len(),
        failed: answers.len() - good.len(),
        seconds,
        requests_per_s: good.len() as f64 / seconds,
        output_tokens_per_s: tokens as f64 / seconds,
        ttft_ms: Spread::of(good.iter().map(|answer| answer.first)),
        itl_ms: Spread::of(good.iter().flat_map(|answer| answer.gaps.iter().copied())),
        request_ms: Spread::of(good.iter().map(|answer| answer.whole)),
    };
    println!(
        "{}",
        serde_json::to_string(&served).expect("numbers and texts are JSON")
    );
    eprint!("{}", table(&served));
    match answers.iter().find_map(|answer| answer.as_ref().err()) {
        None => Ok(()),
        Some(first) => Err(BenchError::Load(format!(
            "{} of {} requests failed; the first: {first}",
            served.failed,
            answers.len()
        ))),
    }
}

fn table(served: &Served<'_>) -> String {
    let mut text = format!(
        "{}: {} requests, {} at a time, {} in, {} out: {:.1} s, {:.1} output tokens/s\n{:<14}{:>10}{:>10}{:>10}{:>10}{:>10}\n",
        served.model,
        served.completed,
        served.concurrency,
        served.input_tokens,
        served.output_tokens,
        served.seconds,
        served.output_tokens_per_s,
        "ms",
        "mean",
        "p50",
        "p90",
        "p99",
        "max"
    );
    for (name, spread) in [
        ("first token", served.ttft_ms),
        ("between tokens", served.itl_ms),
        ("request", served.request_ms),
    ] {
        let Spread {
            mean,
            p50,
            p90,
            p99,
            max,
        } = spread;
        let _ = writeln!(
            text,
            "{name:<14}{mean:>10.1}{p50:>10.1}{p90:>10.1}{p99:>10.1}{max:>10.1}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_read_as_servers_send_them() {
        let stream = b": hello\n\ndata: {\"choices\":[{\"text\":\"\",\"prompt_token_ids\":[1]}]}\n\n\
            data: {\"choices\":[{\"text\":\"a\"}]}\n\nevent: x\ndata:{\"choices\":[{\"text\":\"\",\"token_ids\":[7]}]}\n\n\
            data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}],\"usage\":null}\n\n\
            data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
        let answer = read(&stream[..], Instant::now()).expect("a whole stream");
        assert_eq!(
            (answer.tokens, answer.gaps.len()),
            (2, 1),
            "two chunks have output"
        );
        let error = |text: &str| read(text.as_bytes(), Instant::now()).expect_err("refused");
        assert_eq!(
            error("data: {\"choices\":[{\"text\":\"a\"}]}\n"),
            "the stream ended before [DONE]"
        );
        assert!(error("data: {\"error\":{\"message\":\"busy\"}}\n").contains("busy"));
        assert_eq!(error("data: [DONE]\n"), "the stream had no output, or no usage");
        assert!(error("data: {\n").ends_with("in: {"));
    }

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let spread = Spread::of((1..=200).map(Duration::from_millis));
        let expected = Spread {
            mean: 100.5,
            p50: 100.0,
            p90: 180.0,
            p99: 198.0,
            max: 200.0,
        };
        assert_eq!(spread, expected);
        assert_eq!(Spread::of(std::iter::empty()), Spread::default());
    }
}
