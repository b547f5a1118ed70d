//! The HTTP port: probes, metrics and `/state`, up from the first moment and read by operators and people.
//!
//! It answers while the engine computes, loads or hangs: nothing here waits for the engine.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::State as Shared,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
    serve::ListenerExt,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    state::{Phase, State},
};

#[derive(Clone)]
struct Rooms {
    state: Arc<State>,
    metrics: Arc<Metrics>,
}

/// Serves until `stop`.
///
/// # Errors
/// The listener broke.
pub async fn serve(
    listener: TcpListener,
    state: Arc<State>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let app = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .route(
            "/state",
            get(async |Shared(rooms): Shared<Rooms>| Json(rooms.state.view())),
        )
        .with_state(Rooms { state, metrics });
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY was not set");
        }
    });
    axum::serve(listener, app)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn readyz(Shared(rooms): Shared<Rooms>) -> Response {
    match rooms.state.phase() {
        Phase::Serving => (StatusCode::OK, "ready\n".to_owned()).into_response(),
        phase => {
            let why = match rooms.state.view().failure {
                Some(failure) => format!("failed: {failure}\n"),
                None => format!("{phase:?}\n").to_lowercase(),
            };
            (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
        }
    }
}

async fn metrics_text(Shared(rooms): Shared<Rooms>) -> Response {
    match rooms.metrics.render(&rooms.state) {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}
