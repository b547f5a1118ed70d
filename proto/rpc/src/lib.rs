//! The gRPC rendering of the contract: generated types, clients and servers; and, in `mutual`, how the two ends of the inner
//! service know each other.
//!
//! `inference::v1` is the public service, `worker::v1` the inner one between a router and a replica.
//! The only crate with generated code; wire types stop at the doors of the shells that import it.

pub mod mutual;

/// The file descriptor set of every service, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The public service.
pub mod inference {
    /// Version 1.
    #[allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all)] // Generated; the proto files carry the words.
    pub mod v1 {
        tonic::include_proto!("swallow.inference.v1");
    }
}

/// Between a router and a replica.
pub mod worker {
    /// Version 1.
    #[allow(missing_docs, clippy::all, clippy::pedantic, rustdoc::all)] // Generated; the proto files carry the words.
    pub mod v1 {
        tonic::include_proto!("swallow.worker.v1");
    }
}
