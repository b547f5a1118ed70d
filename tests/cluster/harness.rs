//! The cluster under test, a namespace in it, and clients outside its pods.

mod audit;
mod clients;
mod cluster;
mod model;
mod space;

pub use audit::{Use, now, operator_uses};
pub use clients::{Door, NODE, Streams, Traffic};
pub use cluster::{Cluster, Form, OPERATOR, RELEASE, SYSTEM};
pub use model::{Model, fixture};
pub use space::{Space, condition, group_reasons};

use std::time::{Duration, Instant};

/// Waits until `look` gives a value; the value, or the panic with what it saw last.
///
/// # Panics
/// After `limit`.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(value) => return value,
            Err(seen) => assert!(
                start.elapsed() < limit,
                "{what}: not within {limit:?}; last seen: {seen}"
            ),
        }
        std::thread::sleep(Duration::from_millis(200)); // Between two looks at a condition.
    }
}
