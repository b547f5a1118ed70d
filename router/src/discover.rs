//! Which replicas there are. One interface: a stream of whole sets, so that a set that was missed does no harm.
//!
//! Discovery says where a replica should be and what it should serve; whether it is there, and serves that, only its
//! own session says.

mod cluster;
mod slices;

use futures::{Stream, StreamExt, stream};
use swallow_proto::launch::ReplicaAddress;

pub use cluster::{Cluster, ClusterError, in_cluster};

/// A replica that should be there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    /// What logs and metrics call it: a pod's name, or an address.
    pub id: String,
    /// Tells it from an earlier one of the same name: a pod's uid. Empty where a name is enough.
    pub incarnation: String,
    /// Served names of its model, the model's own first; never empty.
    pub served_names: Vec<String>,
    /// HOST:PORT.
    pub address: String,
}

/// A source of replica sets.
pub trait Discover: Send + 'static {
    /// Each item is the whole set, from the first one known on. The stream's end means that the last set stays.
    fn changes(self) -> impl Stream<Item = Vec<Replica>> + Send + 'static;

    /// Served names of models that are served here even while they have no replica, each model's own name first.
    fn models(&self) -> Vec<Vec<String>> {
        Vec::new()
    }
}

/// A set that never changes.
#[derive(Clone, Debug)]
pub struct Fixed(pub Vec<Replica>);

impl Fixed {
    /// The replicas of a command line; each is named by its address.
    ///
    /// # Errors
    /// An address that is given twice.
    pub fn from_addresses(addresses: &[ReplicaAddress]) -> Result<Self, TwiceGiven> {
        let mut replicas: Vec<Replica> = Vec::with_capacity(addresses.len());
        for ReplicaAddress {
            served_names,
            address,
        } in addresses
        {
            if replicas.iter().any(|replica| replica.address == *address) {
                return Err(TwiceGiven {
                    address: address.clone(),
                });
            }
            let (id, served_names) = (address.clone(), served_names.clone());
            replicas.push(Replica {
                id,
                incarnation: String::new(),
                served_names,
                address: address.clone(),
            });
        }
        Ok(Self(replicas))
    }
}

/// Two replicas at one address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "--replica: the address {address} is given twice; give each replica once, with all names of its model"
)]
pub struct TwiceGiven {
    address: String,
}

impl Discover for Fixed {
    fn changes(self) -> impl Stream<Item = Vec<Replica>> + Send + 'static {
        stream::iter([self.0])
    }
}

/// Sets that somebody else sends.
impl Discover for tokio::sync::watch::Receiver<Vec<Replica>> {
    fn changes(self) -> impl Stream<Item = Vec<Replica>> + Send + 'static {
        tokio_stream::wrappers::WatchStream::new(self).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_given_twice_is_refused() {
        let parse = |text: &str| text.parse::<ReplicaAddress>().expect("well formed");
        let replicas = Fixed::from_addresses(&[parse("a,b=h:1"), parse("c=h:2")])
            .expect("two places")
            .0;
        assert_eq!(replicas[0].served_names, ["a", "b"]);
        let error = Fixed::from_addresses(&[parse("a=h:1"), parse("b=h:1")]).expect_err("one place");
        assert!(error.to_string().contains("h:1"), "{error}");
    }
}
