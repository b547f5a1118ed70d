//! What the operator does with the rights that it has, from the API server's own record.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::Value;

use crate::harness::{Model, RELEASE, SYSTEM, Space, Use, now, operator_uses, until};

/// How long nothing may be written.
const REST: Duration = Duration::from_secs(120);

pub fn nothing_is_written_at_rest(space: &Space<'_>) {
    space.apply(&Model::tiny("tiny", 2));
    space.until_settled("tiny");
    // Models of earlier scenarios that go with their namespaces are no rest.
    until("no namespace is going", Duration::from_secs(120), || {
        let all = space.cluster.json(&["get", "namespaces"])?;
        let going = all["items"].as_array().into_iter().flatten();
        let going: Vec<&Value> = going
            .filter(|space| space["status"]["phase"] == "Terminating")
            .map(|space| &space["metadata"]["name"])
            .collect();
        going.is_empty().then_some(()).ok_or_else(|| format!("{going:?}"))
    });
    let start = now();
    std::thread::sleep(REST); // The measurement itself.
    let (used, refused) = operator_uses(space.cluster, &start);
    let writes: Vec<&Use> = used.iter().filter(|one| one.is_write()).collect();
    let (leases, others): (Vec<_>, Vec<_>) = writes
        .into_iter()
        .partition(|one| one.resource == "coordination.k8s.io/leases");
    space.tell(format!(
        "{} writes in {} s, beside {} renewals of the lease",
        others.len(),
        REST.as_secs(),
        leases.len()
    ));
    assert!(others.is_empty(), "{others:?}");
    assert!(refused.is_empty(), "{refused:?}");
}

/// `RESOURCE verb`, as granted by the roles of the release. Rights to give rights never show in the log.
fn granted(space: &Space<'_>) -> BTreeSet<Use> {
    let chart = space
        .cluster
        .helm(&["get", "manifest", RELEASE, "-n", SYSTEM])
        .expect("it is installed");
    let mut granted = BTreeSet::new();
    let list = space
        .cluster
        .kubectl_with(&["create", "--dry-run=client", "-f", "-", "-o", "json"], &chart)
        .expect("the manifest is sound");
    for object in serde_json::Deserializer::from_str(&list)
        .into_iter::<Value>()
        .flatten()
    {
        let items = object["items"]
            .as_array()
            .cloned()
            .unwrap_or_else(|| vec![object.clone()]);
        for role in items
            .iter()
            .filter(|item| item["kind"].as_str().is_some_and(|kind| kind.ends_with("Role")))
        {
            // What routers get is theirs.
            if role["metadata"]["name"]
                .as_str()
                .is_some_and(|name| name.ends_with("-router"))
            {
                continue;
            }
            granted.extend(role["rules"].as_array().into_iter().flatten().flat_map(uses));
        }
    }
    granted
}

fn uses(rule: &Value) -> Vec<Use> {
    let words = |name: &str| -> Vec<String> {
        let list = rule[name].as_array().into_iter().flatten();
        list.filter_map(|word| word.as_str().map(str::to_owned)).collect()
    };
    let mut uses = Vec::new();
    for group in words("apiGroups") {
        for resource in words("resources") {
            for verb in words("verbs") {
                uses.push(Use {
                    resource: format!("{group}/{resource}"),
                    verb,
                });
            }
        }
    }
    uses
}

/// By now everything that the operator can do was done; an uninstall, which takes rights from a running operator, was not.
pub fn every_right_is_used(space: &Space<'_>) {
    let (used, refused) = operator_uses(space.cluster, "");
    let mut counts: BTreeMap<Use, usize> = BTreeMap::new();
    for one in used {
        *counts.entry(one).or_default() += 1;
    }
    for (one, n) in &counts {
        space.tell(format!("{n:6} {} {}", one.verb, one.resource));
    }
    assert!(refused.is_empty(), "it asked for what it may not: {refused:#?}");
    let unused: Vec<Use> = granted(space)
        .into_iter()
        .filter(|one| one.verb != "bind" && !counts.contains_key(one))
        .collect();
    space.tell("bind on the routers' role never shows in the log");
    assert!(unused.is_empty(), "granted and never used: {unused:#?}");
}
