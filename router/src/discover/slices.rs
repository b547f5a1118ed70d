//! EndpointSlices as replicas: a plain function over the slices of one Service.
//!
//! What the conditions mean here:
//! - `ready` says nothing: workers' Services publish addresses that are not ready, so it is always true.
//! - `terminating`: the pod was told to end. It gets no new request, and its streams finish.
//! - `serving` follows the pod's readiness, seconds late. A pod that does not serve stays in the set, because its own
//!   session says at once, and more exactly, whether it takes requests.

use std::collections::{BTreeMap, btree_map::Entry};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use swallow_proto::launch::DiscoverTarget;
use tracing::warn;

use super::Replica;

/// The endpoints of one Service as replicas, sorted by name. Slices may overlap for a moment, and a Service of two
/// address families has each pod twice: a pod is one replica, and it leaves as soon as any slice says so.
pub(super) fn replicas<'a>(
    slices: impl IntoIterator<Item = &'a EndpointSlice>,
    target: &DiscoverTarget,
) -> Vec<Replica> {
    let mut found: BTreeMap<(String, String), Endpoints> = BTreeMap::new();
    for slice in slices {
        let Some(port) = port(slice, target) else {
            if !slice.endpoints.is_empty() {
                warn!(
                    service = target.service,
                    slice = slice.metadata.name,
                    port = target.port_name,
                    "an EndpointSlice has no port of that name; its endpoints are not used"
                );
            }
            continue;
        };
        for endpoint in &slice.endpoints {
            let Some(address) = endpoint.addresses.first() else {
                continue;
            };
            let address = if address.contains(':') {
                format!("[{address}]:{port}")
            } else {
                format!("{address}:{port}")
            };
            // Addresses of a Service's first family come first, whatever the slices' order.
            let address = (slice.address_type != "IPv4", address);
            let terminating = is_terminating(endpoint);
            match found.entry(identity(endpoint, &address.1)) {
                Entry::Vacant(vacant) => {
                    vacant.insert(Endpoints { address, terminating });
                }
                Entry::Occupied(mut occupied) => {
                    let known = occupied.get_mut();
                    known.terminating |= terminating;
                    if address < known.address {
                        known.address = address;
                    }
                }
            }
        }
    }
    found
        .into_iter()
        .filter(|(_, endpoints)| !endpoints.terminating)
        .map(|((id, incarnation), endpoints)| Replica {
            id,
            incarnation,
            served_names: target.served_names.clone(),
            address: endpoints.address.1,
        })
        .collect()
}

/// What all slices say about one pod.
struct Endpoints {
    address: (bool, String),
    terminating: bool,
}

/// A pod's name and uid: another pod at the same address, or of the same name, is another replica.
fn identity(endpoint: &Endpoint, address: &str) -> (String, String) {
    let pod = endpoint.target_ref.as_ref();
    let name = pod.and_then(|pod| pod.name.clone());
    let uid = pod.and_then(|pod| pod.uid.clone());
    (
        name.unwrap_or_else(|| address.to_owned()),
        uid.unwrap_or_default(),
    )
}

fn is_terminating(endpoint: &Endpoint) -> bool {
    endpoint
        .conditions
        .as_ref()
        .and_then(|conditions| conditions.terminating)
        .unwrap_or(false)
}

fn port(slice: &EndpointSlice, target: &DiscoverTarget) -> Option<u16> {
    let named = slice
        .ports
        .iter()
        .flatten()
        .find(|port| port.name.as_deref() == Some(target.port_name.as_str()))?;
    named.port.and_then(|port| u16::try_from(port).ok())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(family: &str, endpoints: Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "addressType": family,
            "metadata": {"name": "s"},
            "ports": [{"name": "http", "port": 8061}, {"name": "grpc", "port": 50061}],
            "endpoints": endpoints,
        }))
        .expect("a slice")
    }

    fn pod(name: &str, uid: &str, address: &str) -> Value {
        json!({"addresses": [address], "targetRef": {"kind": "Pod", "name": name, "uid": uid},
               "conditions": {"ready": true, "serving": true, "terminating": false}})
    }

    fn found(slices: &[EndpointSlice]) -> Vec<String> {
        let target = "m,alias=m-worker".parse().expect("well formed");
        replicas(slices, &target)
            .into_iter()
            .map(|replica| {
                assert_eq!(replica.served_names, ["m", "alias"]);
                format!("{}/{}@{}", replica.id, replica.incarnation, replica.address)
            })
            .collect()
    }

    #[test]
    fn slices_of_a_service_are_one_set() {
        let one = slice("IPv4", json!([pod("b", "2", "10.0.0.2")]));
        let two = slice(
            "IPv4",
            json!([pod("a", "1", "10.0.0.1"), pod("b", "2", "10.0.0.2")]),
        );
        let expected = ["a/1@10.0.0.1:50061", "b/2@10.0.0.2:50061"];
        assert_eq!(found(&[one.clone(), two.clone()]), expected);
        assert_eq!(found(&[two, one]), expected);
    }

    #[test]
    fn a_pod_of_two_families_is_one_replica() {
        let six = slice("IPv6", json!([pod("a", "1", "fd00::1")]));
        let four = slice("IPv4", json!([pod("a", "1", "10.0.0.1")]));
        assert_eq!(found(std::slice::from_ref(&six)), ["a/1@[fd00::1]:50061"]);
        assert_eq!(found(&[six.clone(), four.clone()]), ["a/1@10.0.0.1:50061"]);
        assert_eq!(found(&[four, six]), ["a/1@10.0.0.1:50061"]);
    }

    #[test]
    fn another_pod_at_an_address_is_another_replica() {
        let both = json!([pod("a", "1", "10.0.0.1"), pod("a", "2", "10.0.0.1")]);
        assert_eq!(
            found(&[slice("IPv4", both)]),
            ["a/1@10.0.0.1:50061", "a/2@10.0.0.1:50061"]
        );
    }

    #[test]
    fn who_terminates_leaves_and_who_does_not_serve_stays() {
        let mut ends = pod("a", "1", "10.0.0.1");
        ends["conditions"]["terminating"] = true.into();
        let mut loads = pod("b", "2", "10.0.0.2");
        loads["conditions"]["serving"] = false.into();
        let late = slice("IPv4", json!([pod("a", "1", "10.0.0.1")]));
        assert_eq!(
            found(&[slice("IPv4", json!([ends, loads])), late]),
            ["b/2@10.0.0.2:50061"],
            "one slice that says so is enough"
        );
    }

    #[test]
    fn what_cannot_be_reached_is_left_out() {
        let mut other_port = slice("IPv4", json!([pod("a", "1", "10.0.0.1")]));
        other_port.ports = None;
        let without_address = slice("IPv4", json!([{"addresses": []}]));
        let no_pod = slice("IPv4", json!([{"addresses": ["10.9.9.9"]}]));
        assert_eq!(
            found(&[other_port, without_address, no_pod]),
            ["10.9.9.9:50061/@10.9.9.9:50061"]
        );
    }
}
