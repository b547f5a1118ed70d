//! grpc.health.v1: each service, and each model as `models/NAME`.
//!
//! A service is serving from when the router has looked for replicas until it is told to end. A model is serving while a replica of it is ready and its files give
//! text; looking at that also reads the files before the first request needs them.

use std::{collections::HashMap, time::Duration};

use swallow_rpc::inference::v1::{
    chat_service_server::ChatServiceServer, generation_service_server::GenerationServiceServer,
    model_service_server::ModelServiceServer, tokenization_service_server::TokenizationServiceServer,
};
use tonic::server::NamedService;
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health as HealthService, HealthServer},
    server::HealthReporter,
};

use super::Services;
use crate::generate::Door;

/// How often models are looked at.
const LOOK: Duration = Duration::from_millis(250);

const SERVICES: [&str; 5] = [
    "",
    GenerationServiceServer::<Services>::NAME,
    ChatServiceServer::<Services>::NAME,
    TokenizationServiceServer::<Services>::NAME,
    ModelServiceServer::<Services>::NAME,
];

/// What health checks are answered from.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self {
            reporter: HealthReporter::new(),
        }
    }

    pub(super) fn service(&self) -> HealthServer<impl HealthService + use<>> {
        HealthServer::new(tonic_health::server::HealthService::from_health_reporter(
            self.reporter.clone(),
        ))
    }

    /// Keeps the answers true until the router is told to end, and says so then.
    pub async fn watch(self, door: Door) {
        let mut told: HashMap<String, bool> = HashMap::new();
        let mut ticks = tokio::time::interval(LOOK);
        loop {
            ticks.tick().await;
            let (leaving, ready) = (door.is_leaving(), door.is_ready());
            for service in SERVICES {
                self.tell(&mut told, service.to_owned(), ready).await;
            }
            for entry in door.models() {
                let serving = !leaving && entry.ready_replicas > 0 && door.text(&entry).await.is_ok();
                for name in std::iter::once(&entry.name).chain(&entry.aliases) {
                    self.tell(&mut told, format!("models/{name}"), serving).await;
                }
            }
            if leaving {
                return;
            }
        }
    }

    async fn tell(&self, told: &mut HashMap<String, bool>, service: String, serving: bool) {
        if told.get(&service) == Some(&serving) {
            return;
        }
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        self.reporter.set_service_status(&service, status).await;
        told.insert(service, serving);
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}
