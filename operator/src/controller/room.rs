//! What is short on which node, for a pod that the scheduler cannot place: the best node is the one that lacks least.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{
    api::core::v1::{Container, Node, Pod},
    apimachinery::pkg::api::resource::Quantity as KubeQuantity,
};
use kube::ResourceExt;
use swallow_plan::{memory::Size, model::Quantity};

/// Amounts by resource, in thousandths.
type Amounts = BTreeMap<String, u64>;

/// One line about the best node; `None` when every node that may take the pod has room, or none may.
pub fn shortage(pod: &Pod, nodes: &[Arc<Node>], placed: &[Arc<Pod>]) -> Option<String> {
    let needs = requests(pod);
    let best = nodes
        .iter()
        .filter(|node| admits(node, pod))
        .map(|node| Lack::of(&needs, node, placed))
        .min_by(|a, b| {
            a.resources
                .cmp(&b.resources)
                .then(a.share.total_cmp(&b.share))
                .then_with(|| a.node.cmp(&b.node))
        })?;
    best.line
}

struct Lack {
    node: String,
    /// How many resources are short.
    resources: usize,
    /// The part of the need that is short, for the resource that is shortest.
    share: f64,
    line: Option<String>,
}

impl Lack {
    fn of(needs: &Amounts, node: &Node, placed: &[Arc<Pod>]) -> Self {
        let name = node.name_any();
        let there: Vec<(&Arc<Pod>, Amounts)> = placed
            .iter()
            .filter(|pod| runs_on(pod, &name))
            .map(|pod| (pod, requests(pod)))
            .collect();
        let allocatable = node
            .status
            .as_ref()
            .and_then(|status| status.allocatable.as_ref());
        let mut lack = Self {
            node: name,
            resources: 0,
            share: 0.0,
            line: None,
        };
        for (resource, need) in needs {
            let total = allocatable
                .and_then(|all| all.get(resource))
                .map_or(0, thousandths);
            let held = |amounts: &Amounts| amounts.get(resource).copied().unwrap_or_default();
            let used: u64 = there.iter().map(|(_, amounts)| held(amounts)).sum();
            let free = total.saturating_sub(used);
            let short = need.saturating_sub(free);
            if short == 0 {
                continue;
            }
            lack.resources += 1;
            let share = short as f64 / *need as f64;
            if share <= lack.share {
                continue;
            }
            lack.share = share;
            let amount = |thousandths| in_words(resource, thousandths);
            let holder = there
                .iter()
                .max_by_key(|(_, amounts)| held(amounts))
                .filter(|(_, amounts)| held(amounts) > 0)
                .map_or_else(String::new, |(pod, amounts)| {
                    let namespace = pod.namespace().unwrap_or_default();
                    format!("; {namespace}/{} holds {}", pod.name_any(), amount(held(amounts)))
                });
            lack.line = Some(format!(
                "{resource} is short by {} on {}, the best node: {} asked for, {} of {} free{holder}",
                amount(short),
                lack.node,
                amount(*need),
                amount(free),
                amount(total),
            ));
        }
        lack
    }
}

/// Whether the node may take the pod, were there room.
fn admits(node: &Node, pod: &Pod) -> bool {
    let cordoned = node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true);
    let wanted = pod.spec.as_ref().and_then(|spec| spec.node_selector.as_ref());
    let selected = wanted
        .into_iter()
        .flatten()
        .all(|(name, value)| node.labels().get(name) == Some(value));
    !cordoned && selected
}

fn runs_on(pod: &Pod, node: &str) -> bool {
    let here = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node);
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    here && !matches!(phase, Some("Succeeded" | "Failed"))
}

/// What the pod asks for: its containers together, or its largest init container.
fn requests(pod: &Pod) -> Amounts {
    let Some(spec) = &pod.spec else {
        return Amounts::new();
    };
    let mut sum = Amounts::new();
    for container in &spec.containers {
        for (name, amount) in of_container(container) {
            let all = sum.entry(name).or_default();
            *all = all.saturating_add(amount);
        }
    }
    for container in spec.init_containers.iter().flatten() {
        for (name, amount) in of_container(container) {
            let most = sum.entry(name).or_default();
            *most = amount.max(*most);
        }
    }
    sum
}

fn of_container(container: &Container) -> Amounts {
    let requests = container
        .resources
        .as_ref()
        .and_then(|resources| resources.requests.as_ref());
    requests
        .into_iter()
        .flatten()
        .map(|(name, amount)| (name.clone(), thousandths(amount)))
        .collect()
}

/// What cannot be read is told by the API server, which refused it.
fn thousandths(amount: &KubeQuantity) -> u64 {
    Quantity::from(amount.0.as_str())
        .thousandths()
        .unwrap_or_default()
}

fn in_words(resource: &str, thousandths: u64) -> String {
    if resource.contains("memory") || resource.contains("storage") {
        return Size(thousandths / 1000).to_string();
    }
    if thousandths.is_multiple_of(1000) {
        (thousandths / 1000).to_string()
    } else {
        format!("{thousandths}m")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, node: Option<&str>, gpus: u32) -> Arc<Pod> {
        let pod = json!({
            "metadata": { "name": name, "namespace": "n" },
            "spec": { "nodeName": node, "containers": [{ "name": "c",
                "resources": { "requests": { "nvidia.com/gpu": gpus.to_string() } } }] },
        });
        Arc::new(serde_json::from_value(pod).expect("it is a pod"))
    }

    fn node(name: &str, gpus: u32) -> Arc<Node> {
        let node = json!({ "metadata": { "name": name },
            "status": { "allocatable": { "nvidia.com/gpu": gpus.to_string() } } });
        Arc::new(serde_json::from_value(node).expect("it is a node"))
    }

    #[test]
    fn the_best_node_what_it_lacks_and_who_holds_it() {
        let placed = [pod("big", Some("b"), 3), pod("small", Some("b"), 1)];
        let line = shortage(&pod("new", None, 2), &[node("a", 0), node("b", 5)], &placed);
        assert_eq!(
            line.as_deref(),
            Some("nvidia.com/gpu is short by 1 on b, the best node: 2 asked for, 1 of 5 free; n/big holds 3")
        );
        assert_eq!(shortage(&pod("new", None, 1), &[node("b", 5)], &placed), None);
        assert_eq!(shortage(&pod("new", None, 1), &[], &placed), None);
    }
}
