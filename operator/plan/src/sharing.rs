//! One router before several models: those of a namespace that name the same router share it.
//!
//! Each of them comes to the same result from what it sees of the others, so it does not matter whose plan is carried
//! out first. Where their settings disagree, the oldest model's hold, and the others say so in their status.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::{Value, json};
use swallow_proto::launch::DiscoverTarget;

use crate::{
    Images, Timestamp, Valid,
    launch::{self, RouterLaunch},
    objects,
};

/// Another model of the namespace that wants the same router.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Its checked spec.
    pub valid: Valid,
    /// When it was made.
    pub created: Option<Timestamp>,
}

/// The router with all that share it, oldest first.
#[derive(Debug)]
pub(crate) struct Shared<'a> {
    models: Vec<&'a Valid>,
    own: &'a Valid,
}

impl<'a> Shared<'a> {
    /// The router of `own`, which was made at `created`, and of its peers.
    pub fn new(own: &'a Valid, created: Option<Timestamp>, peers: &'a [Peer]) -> Self {
        let name = launch::router_name(&own.spec, &own.name);
        let mut aged = vec![(created, own)];
        aged.extend(
            peers
                .iter()
                .filter(|peer| launch::router_name(&peer.valid.spec, &peer.valid.name) == name)
                .map(|peer| (peer.created, &peer.valid)),
        );
        aged.sort_by(|(a, one), (b, other)| (a, &one.name).cmp(&(b, &other.name)));
        Self {
            models: aged.into_iter().map(|(_, valid)| valid).collect(),
            own,
        }
    }

    fn oldest(&self) -> &'a Valid {
        self.models[0]
    }

    /// How it is started: as the oldest model says.
    pub fn launch(&self, images: &Images) -> RouterLaunch {
        launch::router(self.oldest(), images)
    }

    /// Where the models' groups are, sorted. A name belongs to the oldest model that has it: a router serves each once.
    pub fn targets(&self) -> Vec<DiscoverTarget> {
        let mut taken = BTreeSet::new();
        let mut targets = Vec::new();
        for valid in &self.models {
            if valid.served_names.iter().any(|name| taken.contains(name)) {
                continue;
            }
            taken.extend(&valid.served_names);
            targets.push(objects::discover_target(valid));
        }
        targets.sort_by(|a, b| a.service.cmp(&b.service));
        targets
    }

    /// A short name for what users asked of this router. Neither images nor forms that an operator chooses by itself
    /// are in it, so that a newer operator restarts no router.
    pub fn fingerprint(&self) -> String {
        let oldest = self.oldest();
        let targets: Vec<String> = self.targets().iter().map(ToString::to_string).collect();
        let owners: Vec<_> = self.models.iter().map(|valid| &valid.uid).collect();
        launch::fingerprint(&json!({ "settings": settings(oldest), "targets": targets, "owners": owners }))
    }

    /// The objects to apply, owned by all models, with their fingerprint.
    pub fn objects(&self, images: &Images) -> Vec<Value> {
        let owners: Vec<OwnerReference> = self.models.iter().filter_map(|valid| shares(valid)).collect();
        let fingerprint = self.fingerprint();
        let mut rendered = objects::router_objects(self.oldest(), &self.launch(images), &self.targets());
        for object in &mut rendered {
            if !owners.is_empty() {
                object["metadata"]["ownerReferences"] = json!(owners);
            }
        }
        rendered
            .into_iter()
            .map(|object| objects::marked(object, &fingerprint))
            .collect()
    }

    /// What the status of the model should say about the others, if it gets not what it asks for.
    pub fn disagreement(&self) -> Option<String> {
        let name = launch::router_name(&self.own.spec, &self.own.name);
        let oldest = self.oldest();
        let service = objects::discover_target(self.own).service;
        if !self.targets().iter().any(|target| target.service == service) {
            return Some(format!(
                "an older model behind router {name} has one of the names {}: change model.servedNames",
                self.own.served_names.join(", ")
            ));
        }
        (settings(oldest) != settings(self.own)).then(|| {
            format!(
                "router {name} is shared with {}, which is older and asks for other settings: its settings hold",
                oldest.name
            )
        })
    }
}

/// What a model asks of its router.
fn settings(valid: &Valid) -> Value {
    let spec = &valid.spec;
    json!([spec.router, spec.drain, spec.image_pull_secrets])
}

/// One of several owners; an object goes with its last.
fn shares(valid: &Valid) -> Option<OwnerReference> {
    let uid = valid.uid.clone()?;
    Some(OwnerReference {
        api_version: "serving.swallow.dev/v1alpha1".into(),
        kind: "SwallowModel".into(),
        name: valid.name.clone(),
        uid,
        controller: None,
        block_owner_deletion: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{SwallowModel, read},
        validate,
    };

    fn valid(name: &str, router: Value) -> Valid {
        let mut model: SwallowModel = read(&json!({
            "apiVersion": "serving.swallow.dev/v1alpha1", "kind": "SwallowModel", "metadata": { "name": name },
            "spec": {
                "model": { "source": { "type": "HostPath", "hostPath": { "path": "/m" } } },
                "accelerator": { "device": "CPU" }, "router": router,
                "engine": { "kvCache": { "bytes": "1Gi" } },
            },
        }))
        .expect("it can be read");
        model.metadata.uid = Some(format!("uid-{name}"));
        validate(&model, None).expect("it is valid")
    }

    fn peer(valid: Valid, second: i64) -> Peer {
        let created = Timestamp::from_second(second).ok();
        Peer { valid, created }
    }

    #[test]
    fn all_models_come_to_the_same_router_and_the_oldest_ones_settings_hold() {
        let same = || json!({ "name": "front", "replicas": 2 });
        let (young, old) = (
            valid("a", json!({ "name": "front", "replicas": 1 })),
            valid("b", same()),
        );
        let time = |second| Timestamp::from_second(second).ok();
        let (of_old, of_young) = ([peer(young.clone(), 2)], [peer(old.clone(), 1)]);
        let one = Shared::new(&old, time(1), &of_old);
        let other = Shared::new(&young, time(2), &of_young);
        let images = Images::default();
        assert_eq!(one.objects(&images), other.objects(&images));
        assert_eq!(one.launch(&images).replicas, 2);
        let services: Vec<_> = one.targets().into_iter().map(|target| target.service).collect();
        assert_eq!(services, ["a-worker", "b-worker"]);
        assert_eq!(one.disagreement(), None);
        assert!(
            other
                .disagreement()
                .expect("it differs")
                .contains("shared with b")
        );
        for object in one.objects(&images) {
            let owners = object["metadata"]["ownerReferences"].as_array().map(Vec::len);
            assert_eq!(owners, Some(2), "{object}");
        }
        let alone = Shared::new(&old, time(1), &[]);
        assert_ne!(alone.fingerprint(), one.fingerprint());
        let other_images = Images {
            router: "newer".into(),
            ..Images::default()
        };
        assert_eq!(
            one.objects(&images)[0]["metadata"]["annotations"],
            one.objects(&other_images)[0]["metadata"]["annotations"],
            "a newer operator restarts no router"
        );
    }
}
