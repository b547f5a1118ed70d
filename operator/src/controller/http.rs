//! The operator's HTTP port: probes and metrics.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::{observe::World, queue::Queue};

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Looks at a model, by result.
    pub reconciles: IntCounterVec,
    /// How long each took.
    pub seconds: Histogram,
    /// Writes, by what they did.
    pub writes: IntCounterVec,
    /// Writes that failed, by what they should have done.
    pub write_errors: IntCounterVec,
    /// Whether this replica works.
    pub is_leader: IntGauge,
    queue: IntGauge,
    models: IntGaugeVec,
}

impl Metrics {
    /// All at zero.
    ///
    /// # Errors
    /// Two metrics have the same name.
    pub fn new() -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str, label| IntCounterVec::new(Opts::new(name, help), &[label]);
        let seconds = HistogramOpts::new(
            "swallow_operator_reconcile_seconds",
            "Duration of one look at a model",
        );
        let metrics = Self {
            registry: Registry::new(),
            reconciles: counter("swallow_operator_reconciles_total", "Looks at a model", "result")?,
            seconds: Histogram::with_opts(seconds)?,
            writes: counter(
                "swallow_operator_writes_total",
                "Writes to the API server",
                "verb",
            )?,
            write_errors: counter(
                "swallow_operator_write_errors_total",
                "Writes that the API server refused or did not get",
                "verb",
            )?,
            is_leader: IntGauge::new(
                "swallow_operator_is_leader",
                "1 in the replica that works, 0 in others",
            )?,
            queue: IntGauge::new(
                "swallow_operator_queue_length",
                "Models that are due to be looked at",
            )?,
            models: IntGaugeVec::new(
                Opts::new(
                    "swallow_operator_models",
                    "SwallowModels by condition and its status",
                ),
                &["condition", "status"],
            )?,
        };
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.reconciles.clone()))?;
        registry.register(Box::new(metrics.seconds.clone()))?;
        registry.register(Box::new(metrics.writes.clone()))?;
        registry.register(Box::new(metrics.write_errors.clone()))?;
        registry.register(Box::new(metrics.is_leader.clone()))?;
        registry.register(Box::new(metrics.queue.clone()))?;
        registry.register(Box::new(metrics.models.clone()))?;
        Ok(metrics)
    }

    fn render(&self, world: &World, queue: &Queue) -> Result<Vec<u8>, prometheus::Error> {
        self.queue.set(i64::try_from(queue.length()).unwrap_or(i64::MAX));
        self.models.reset();
        for ((condition, status), n) in world.models_by_condition() {
            self.models.with_label_values(&[&condition, &status]).set(n);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// What the port tells of.
#[derive(Clone, Debug)]
pub struct Rooms {
    /// The cluster as known.
    pub world: Arc<World>,
    /// What waits.
    pub queue: Arc<Queue>,
    /// What was counted.
    pub metrics: Arc<Metrics>,
    /// It works, or stands by to.
    pub ready: Arc<AtomicBool>,
}

/// The paths of the port.
pub fn router(rooms: Rooms) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(rooms)
}

async fn readyz(State(rooms): State<Rooms>) -> Response {
    if rooms.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ready\n").into_response()
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the API server has not answered yet\n",
        )
            .into_response()
    }
}

async fn metrics(State(rooms): State<Rooms>) -> Response {
    match rooms.metrics.render(&rooms.world, &rooms.queue) {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
