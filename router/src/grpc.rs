//! The public gRPC service: wire messages become requests at this door, and pieces become wire messages.
//!
//! A client's `grpc-timeout` binds the whole call, streams too; errors carry google.rpc details and, where another
//! try may help, when to make it.

mod health;
mod models;
mod parse;
mod score;
mod serve;
mod status;
mod write;

use std::{sync::Arc, time::Duration};

use swallow_rpc::{
    DESCRIPTORS,
    inference::v1::{
        chat_service_server::ChatServiceServer, generation_service_server::GenerationServiceServer,
        model_service_server::ModelServiceServer, tokenization_service_server::TokenizationServiceServer,
    },
};
use tokio::time::Instant;
use tonic::{metadata::MetadataMap, service::Routes};

pub use health::Health;

use crate::{
    generate::{Door, Invalid},
    guard::guarded,
    http::{Front, Protocol},
    metrics::Call,
};

/// The four services, behind one door.
#[derive(Clone)]
struct Services {
    door: Door,
}

/// All services, and what tells a client about them.
pub fn front(door: &Door, health: &Health, max_message_bytes: usize) -> Front {
    let services = Arc::new(Services { door: door.clone() });
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let why = "the descriptors were compiled into this binary";
    let routes = Routes::new(
        GenerationServiceServer::from_arc(Arc::clone(&services)).max_decoding_message_size(max_message_bytes),
    )
    .add_service(
        ChatServiceServer::from_arc(Arc::clone(&services)).max_decoding_message_size(max_message_bytes),
    )
    .add_service(
        TokenizationServiceServer::from_arc(Arc::clone(&services))
            .max_decoding_message_size(max_message_bytes),
    )
    .add_service(ModelServiceServer::from_arc(services).max_decoding_message_size(max_message_bytes))
    .add_service(health.service())
    .add_service(reflection().build_v1().expect(why))
    .add_service(reflection().build_v1alpha().expect(why))
    .into_axum_router();
    guarded(
        routes,
        Protocol::Grpc,
        door.metrics().panics(Protocol::Grpc.label()),
    )
}

impl Services {
    fn call(&self, method: &'static str) -> Call {
        self.door.metrics().call(method)
    }
}

/// When the client gives up, by its `grpc-timeout` header.
fn deadline(metadata: &MetadataMap) -> Result<Option<Instant>, Invalid> {
    let Some(value) = metadata.get("grpc-timeout") else {
        return Ok(None);
    };
    let timeout = value.to_str().ok().and_then(timeout);
    let timeout = timeout.ok_or_else(|| Invalid::new("grpc-timeout", TIMEOUT_FORM))?;
    Ok(Instant::now().checked_add(timeout))
}

/// What a timeout looks like.
pub(crate) const TIMEOUT_FORM: &str = "must be 1 to 8 digits and a unit, one of H, M, S, m, u and n";

/// As the gRPC protocol writes it.
pub(crate) fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_the_protocol_writes_them() {
        assert_eq!(timeout("300m"), Some(Duration::from_millis(300)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(timeout("7n"), Some(Duration::from_nanos(7)));
        for bad in ["", "m", "5", "-1S", "123456789S", "1s", "1é", "+1S"] {
            assert_eq!(timeout(bad), None, "{bad}");
        }
    }
}
