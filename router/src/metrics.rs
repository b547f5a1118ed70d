//! What the router counts, in Prometheus' form. Labels are bounded: model names are those that are served (else
//! "other"), never what a client sent; tenants are those that the file of API keys names, and so many at most; replicas
//! leave with their series.
//!
//! Everything here is fed by something; names keep the prefix `swallow_router_`.

mod observer;
mod series;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus::{Encoder, Histogram, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder};
use tonic::Code;

use series::{Calls, Discovery, Dispatch, Maker, Replicas, Tenants, Tokens};

/// The label of a model that is not served here.
pub const OTHER_MODEL: &str = "other";
/// Tenants with series of their own; those that come later share one.
pub const TENANTS_MAX: usize = 1000;
/// The label of all others.
pub const OTHER_TENANT: &str = "other";

/// A part of the router's own work on a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From bytes to a request.
    Parse,
    /// The chat template.
    Template,
    /// Text to ids, waiting for a thread included.
    Tokenize,
    /// Ids to text, over the whole answer.
    Detokenize,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Parse, Self::Template, Self::Tokenize, Self::Detokenize];

    fn label(self) -> &'static str {
        match self {
            Self::Parse => "parse",
            Self::Template => "template",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
        }
    }
}

/// All series.
pub struct Metrics {
    registry: Registry,
    calls: Calls,
    tokens: Tokens,
    tenants: Tenants,
    /// Those with series of their own.
    known_tenants: Mutex<BTreeSet<Arc<str>>>,
    dispatch: Dispatch,
    replicas: Replicas,
    discovery: Discovery,
    /// Since when nothing was heard of a model's endpoints.
    stale: Mutex<BTreeMap<String, Option<Instant>>>,
}

impl Metrics {
    /// All series at zero, and the process's own where the platform has them.
    pub fn new() -> Self {
        let registry = Registry::new();
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(
                prometheus::process_collector::ProcessCollector::for_self(),
            ))
            .expect("the first of its names");
        let make = Maker(registry.clone());
        Self {
            calls: Calls::new(&make),
            tokens: Tokens::new(&make),
            tenants: Tenants::new(&make),
            known_tenants: Mutex::default(),
            dispatch: Dispatch::new(&make),
            replicas: Replicas::new(&make),
            discovery: Discovery::new(&make),
            stale: Mutex::default(),
            registry,
        }
    }

    /// The text that Prometheus scrapes, and its content type.
    pub fn text(&self) -> (String, &'static str) {
        for (model, since) in &*self.stale() {
            let seconds = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
            self.discovery.stale.with_label_values(&[model]).set(seconds);
        }
        let dropped = &self.calls.log_lines_dropped;
        dropped.inc_by(crate::log::dropped().saturating_sub(dropped.get()));
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("writing to memory");
        (
            String::from_utf8(text).expect("the text format is UTF-8"),
            prometheus::TEXT_FORMAT,
        )
    }

    /// A request begins.
    pub fn call(self: &Arc<Self>, method: &'static str) -> Call {
        self.calls.open.with_label_values(&[method]).inc();
        Call {
            metrics: Arc::clone(self),
            method,
            model: OTHER_MODEL.to_owned(),
            tenant: crate::keys::share().name,
            started: Instant::now(),
            code: None,
        }
    }

    /// The label of a tenant.
    fn tenant<'a>(&self, name: &'a Arc<str>) -> &'a str {
        let mut known = self.known_tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains(name) {
            return name;
        }
        if known.len() >= TENANTS_MAX {
            return OTHER_TENANT;
        }
        known.insert(Arc::clone(name));
        name
    }

    /// The series of one request's tokens: its model's, and its tenant's.
    pub fn tokens(&self, model: &str, tenant: Option<&Arc<str>>) -> TokenMeter {
        let tenant = tenant.map(|name| self.tenant(name));
        let of = |series: &IntCounterVec| tenant.map(|tenant| series.with_label_values(&[tenant]));
        TokenMeter {
            tenant_prompt: of(&self.tenants.prompt),
            tenant_output: of(&self.tenants.output),
            output: self.tokens.output.with_label_values(&[model]),
            first: self.tokens.first.with_label_values(&[model]),
            between: self.tokens.between.with_label_values(&[model]),
        }
    }

    /// A request of a model started.
    pub fn prompt(&self, model: &str, tokens: usize, cached: u32) {
        self.tokens
            .prompt
            .with_label_values(&[model])
            .inc_by(tokens as u64);
        self.tokens
            .cached
            .with_label_values(&[model])
            .inc_by(cached.into());
    }

    /// The router's own work.
    pub fn stage(&self, stage: Stage, took: Duration) {
        self.calls.overhead[stage as usize].observe(took.as_secs_f64());
    }

    /// Fields without effect.
    pub fn ignored_fields(&self, method: &'static str, count: usize) {
        self.calls
            .ignored_fields
            .with_label_values(&[method])
            .inc_by(count as u64);
    }

    /// The counter of requests that the router itself failed on.
    pub fn panics(&self, protocol: &'static str) -> IntCounter {
        self.calls.panics.with_label_values(&[protocol])
    }

    fn stale(&self) -> MutexGuard<'_, BTreeMap<String, Option<Instant>>> {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gauge of open connections.
    pub fn connections(&self, protocol: &'static str) -> IntGauge {
        self.calls.connections.with_label_values(&[protocol])
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// A request from its arrival to its end. Dropped without a code, its client has left.
pub struct Call {
    metrics: Arc<Metrics>,
    method: &'static str,
    model: String,
    tenant: Option<Arc<str>>,
    started: Instant,
    code: Option<Code>,
}

impl Call {
    /// The model is one that is served.
    pub fn model(&mut self, name: &str) {
        name.clone_into(&mut self.model);
    }

    /// How it ended.
    pub fn ended(&mut self, code: Code) {
        self.code = Some(code);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let (metrics, method) = (&self.metrics, self.method);
        let code = name(self.code.unwrap_or(Code::Cancelled));
        metrics.calls.open.with_label_values(&[method]).dec();
        if let Some(tenant) = &self.tenant {
            let labels = [metrics.tenant(tenant), code];
            metrics.tenants.requests.with_label_values(&labels).inc();
        }
        metrics
            .calls
            .total
            .with_label_values(&[&self.model, method, code])
            .inc();
        let took = self.started.elapsed().as_secs_f64();
        metrics
            .calls
            .seconds
            .with_label_values(&[&self.model, method])
            .observe(took);
    }
}

/// The series of one request's tokens.
#[derive(Clone, Debug)]
pub struct TokenMeter {
    tenant_prompt: Option<IntCounter>,
    tenant_output: Option<IntCounter>,
    output: IntCounter,
    first: Histogram,
    between: Histogram,
}

impl TokenMeter {
    /// The prompt, once.
    pub fn prompt(&self, count: usize) {
        if let Some(counter) = &self.tenant_prompt {
            counter.inc_by(count as u64);
        }
    }

    /// The first tokens of a request, so long after its arrival.
    pub fn first(&self, after: Duration) {
        self.first.observe(after.as_secs_f64());
    }

    /// Tokens of a candidate, so long after its last ones; `None` for its first.
    pub fn tokens(&self, count: usize, since_last: Option<Duration>) {
        self.output.inc_by(count as u64);
        if let Some(counter) = &self.tenant_output {
            counter.inc_by(count as u64);
        }
        if let (Some(since), true) = (since_last, count > 0) {
            self.between.observe(since.as_secs_f64() / count as f64);
        }
    }
}

/// A status code as gRPC's documents write it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        // No front ends a request with another one.
        _ => "UNKNOWN",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_have_so_many_series_and_no_more() {
        let metrics = Metrics::new();
        for n in 0..TENANTS_MAX + 50 {
            let tenant: Arc<str> = format!("team {n}").into();
            metrics.tokens("m", Some(&tenant)).tokens(2, None);
            metrics.tokens("m", Some(&tenant)).tokens(1, None);
        }
        let (text, _) = metrics.text();
        let series = |line: &&str| line.starts_with("swallow_router_tenant_output_tokens_total{");
        assert_eq!(text.lines().filter(series).count(), TENANTS_MAX + 1);
        for (tenant, tokens) in [("team 7", 3), (OTHER_TENANT, 150)] {
            let line = format!("swallow_router_tenant_output_tokens_total{{tenant=\"{tenant}\"}} {tokens}");
            assert!(text.contains(&line), "{line}");
        }
        metrics.tokens("m", None).tokens(1, None);
        let all = (TENANTS_MAX + 50) * 3 + 1;
        let (text, _) = metrics.text();
        let line = format!("swallow_router_output_tokens_total{{model=\"m\"}} {all}");
        assert!(text.contains(&line), "a model's tokens are those of all");
    }
}
