//! The two servers: gRPC for routers and health checks, HTTP for probes and people.

use std::{sync::Arc, time::Duration};

use swallow_rpc::worker::v1::worker_service_server::WorkerServiceServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    server::NamedService,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

use super::{ServeError, session::Sessions, tls::SessionTls};
use crate::{
    http,
    metrics::Metrics,
    state::{Phase, State},
};

/// Largest frame from a router: a hundred prompts of 128 Ki tokens at their usual 3 bytes a token, and some air.
const FRAME_MAX: usize = 64 << 20;
/// A connection that does not answer a PING for this long is gone.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Flow-control windows: a long prompt arrives without a pause for acknowledgements.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// As the health service names it; the empty name is the whole server.
const SERVICES: [&str; 2] = ["", <WorkerServiceServer<Sessions> as NamedService>::NAME];

pub(super) async fn serve_http(
    listener: TcpListener,
    state: Arc<State>,
    metrics: Arc<Metrics>,
    down: CancellationToken,
) -> Result<(), ServeError> {
    http::serve(listener, state, metrics, down)
        .await
        .map_err(|source| ServeError::System {
            what: "the HTTP server ended",
            source,
        })
}

pub(super) async fn serve_grpc(
    listener: TcpListener,
    tls: Option<SessionTls>,
    sessions: Sessions,
    state: Arc<State>,
    down: CancellationToken,
) -> Result<(), ServeError> {
    let reporter = HealthReporter::new();
    let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
    report(&reporter, ServingStatus::NotServing).await;
    let service = WorkerServiceServer::new(sessions).max_decoding_message_size(FRAME_MAX);
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .add_service(health)
        .add_service(service);
    let until = down.clone().cancelled_owned();
    let served = async {
        let Some(tls) = tls else {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            return server.serve_with_incoming_shutdown(incoming, until).await;
        };
        let following = tls.clone().follow();
        let serving = server.serve_with_incoming_shutdown(tls.incoming(listener), until);
        tokio::select! {
            served = serving => served,
            () = following => unreachable!("files are followed for ever"),
        }
    };
    let (served, ()) = tokio::join!(served, follow_phase(reporter, &state, &down));
    Ok(served?)
}

/// The health service says what readiness says. At the end its watchers are let go, or they would hold the server.
async fn follow_phase(mut reporter: HealthReporter, state: &State, down: &CancellationToken) {
    let mut phase = state.watch();
    loop {
        let serving = *phase.borrow_and_update() == Phase::Serving;
        report(
            &reporter,
            if serving {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            },
        )
        .await;
        tokio::select! {
            changed = phase.changed() => if changed.is_err() { return },
            () = down.cancelled() => break,
        }
    }
    report(&reporter, ServingStatus::NotServing).await;
    for service in SERVICES {
        reporter.clear_service_status(service).await;
    }
}

async fn report(reporter: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}
