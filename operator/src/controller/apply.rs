//! All writes but status, events and the lease. Each is sound on its own, and safe to be repeated.

use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, Deployment},
        core::v1::Pod,
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, runtime::RawExtension},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy},
    core::{ApiResource, GroupVersionKind},
};
use serde_json::{Value, json};
use swallow_plan::{
    Action, CreateRefused, GroupRef, Observed, Timestamp, Valid, Why,
    launch::GroupLaunch,
    model::GroupReason,
    objects::{self, labels},
};

use super::{
    cache::Key,
    observe::{World, owned_by},
    pods::Ended,
};

/// Who wrote a field, in the API server's books.
pub const MANAGER: &str = "swallow-operator";
/// What a group that serves nobody gets to end.
const NO_GRACE_SECONDS: u32 = 1;

/// A write that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The API server refused, or could not be asked.
    #[error("{what}: {}", said(.source))]
    Api {
        /// What was written.
        what: String,
        /// Its answer.
        source: kube::Error,
    },
    /// The record of a revision cannot be used.
    #[error(transparent)]
    Record(#[from] objects::Unusable),
    /// A rendered object has no kind.
    #[error("a rendered object is not one: {0}")]
    Form(String),
    /// A group is planned for a spec that is not valid.
    #[error("a group is planned for a spec that is not valid")]
    Invalid,
}

impl ApplyError {
    /// What the API server said if it will not have a group of this spec, whoever asks.
    fn refusal(&self) -> Option<String> {
        match self {
            ApplyError::Api {
                source: kube::Error::Api(status),
                ..
            } if [400, 403, 422].contains(&status.code) => Some(status.message.clone()),
            _ => None,
        }
    }
}

/// Writes what plans ask for.
#[derive(Clone)]
pub struct Writer {
    /// To the API server.
    pub client: Client,
}

impl Writer {
    /// Carries out one action of a model's plan.
    ///
    /// # Errors
    /// The write failed; the plan is to be made again.
    pub async fn carry_out(
        &self,
        world: &World,
        key: &Key,
        valid: Option<&Valid>,
        seen: &Observed,
        action: &Action,
    ) -> Result<(), ApplyError> {
        match action {
            Action::ApplySurroundings { objects, .. } | Action::ApplyRouter { objects, .. } => {
                for object in objects {
                    world.learn_applied(self.apply(object).await?);
                }
                Ok(())
            }
            Action::RemoveRouter { .. } => self.remove_router(world, key).await,
            Action::CreateGroup { group, .. } => {
                let valid = valid.ok_or(ApplyError::Invalid)?;
                let outcome = self.create(world, valid, seen, group).await;
                let refusal = outcome.as_ref().err().and_then(ApplyError::refusal);
                let revision = group.revision.clone();
                world.set_refused(key, refusal.map(|message| CreateRefused { revision, message }));
                outcome
            }
            // The signal tells the worker to finish its streams; its endpoint counts as terminating at once.
            Action::DrainGroup { group, .. } => self.delete_pod(key, group, None).await,
            Action::DeleteGroup { group, .. } => self.delete_pod(key, group, Some(NO_GRACE_SECONDS)).await,
            Action::FailGroup { group, reason, why } => self.fail(key, group, *reason, why).await,
            Action::ForgetRevision { name, uid, .. } => {
                let api: Api<ControllerRevision> = Api::namespaced(self.client.clone(), &key.namespace);
                let done = api.delete(name, &only(uid, None)).await.map(drop);
                unless_gone(done).map_err(|source| failed(format!("revision {name}"), source))
            }
        }
    }

    async fn apply(&self, object: &Value) -> Result<DynamicObject, ApplyError> {
        let object: DynamicObject =
            serde_json::from_value(object.clone()).map_err(|error| ApplyError::Form(error.to_string()))?;
        let types = object
            .types
            .clone()
            .ok_or_else(|| ApplyError::Form("no kind".into()))?;
        let kind = GroupVersionKind::try_from(&types).map_err(|error| ApplyError::Form(error.to_string()))?;
        let namespace = object.namespace().unwrap_or_default();
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &namespace, &ApiResource::from_gvk(&kind));
        let name = object.name_any();
        let params = PatchParams::apply(MANAGER).force();
        api.patch(&name, &params, &Patch::Apply(&object))
            .await
            .map_err(|source| failed(format!("{} {name}", types.kind), source))
    }

    async fn create(
        &self,
        world: &World,
        valid: &Valid,
        seen: &Observed,
        group: &GroupLaunch,
    ) -> Result<(), ApplyError> {
        // The first group of a plan makes the record of the others.
        let name = format!("{}-{}", valid.name, group.revision);
        let known = world
            .revisions
            .get(&Key::new(&valid.namespace, name))
            .filter(|known| owned_by(&**known, valid.uid.as_deref()))
            .and_then(|known| known.data.clone())
            .map(|data| data.0);
        let record = match known {
            Some(record) => record,
            None => self.keep_revision(world, valid, seen, group).await?,
        };
        let pod = objects::from_record(&record, group)?;
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &valid.namespace);
        match api
            .create(
                &PostParams {
                    field_manager: Some(MANAGER.into()),
                    ..PostParams::default()
                },
                &pod,
            )
            .await
        {
            Ok(pod) => {
                world.pods.learn(pod);
                Ok(())
            }
            Err(source) => Err(failed(format!("group {}", group.name), source)),
        }
    }

    /// Keeps how the groups of a new revision are rendered, before the first of them is made.
    async fn keep_revision(
        &self,
        world: &World,
        valid: &Valid,
        seen: &Observed,
        group: &GroupLaunch,
    ) -> Result<Value, ApplyError> {
        let record = objects::record(valid, group);
        let mut metadata: ObjectMeta = serde_json::from_value(record["metadata"].clone())
            .map_err(|error| ApplyError::Form(error.to_string()))?;
        let name = format!("{}-{}", valid.name, group.revision);
        metadata.name = Some(name.clone());
        metadata.annotations = None;
        if let Some(of_pods) = &mut metadata.labels {
            of_pods.remove(labels::INDEX);
        }
        let newest = seen.revisions.iter().map(|revision| revision.number).max();
        let revision = ControllerRevision {
            metadata,
            data: Some(RawExtension(record.clone())),
            revision: newest.unwrap_or_default() + 1,
        };
        let api: Api<ControllerRevision> = Api::namespaced(self.client.clone(), &valid.namespace);
        let params = PostParams {
            field_manager: Some(MANAGER.into()),
            ..PostParams::default()
        };
        let kept = api
            .create(&params, &revision)
            .await
            .map_err(|source| failed(format!("revision {name}"), source))?;
        let record = kept.data.clone().map_or(record, |data| data.0);
        world.revisions.learn(kept);
        Ok(record)
    }

    async fn delete_pod(&self, key: &Key, group: &GroupRef, grace: Option<u32>) -> Result<(), ApplyError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let done = api.delete(&group.name, &only(&group.uid, grace)).await.map(drop);
        unless_gone(done).map_err(|source| failed(format!("group {}", group.name), source))
    }

    /// The kubelet ends a pod whose deadline has passed and keeps it; the annotation says what it failed of.
    async fn fail(
        &self,
        key: &Key,
        group: &GroupRef,
        reason: GroupReason,
        why: &Why,
    ) -> Result<(), ApplyError> {
        let ended = Ended {
            at: Timestamp::now(),
            reason,
            message: why.to_string(),
        };
        let text = serde_json::to_string(&ended).map_err(|error| ApplyError::Form(error.to_string()))?;
        let patch = json!({
            // Precondition: another pod of this name stays as it is.
            "metadata": { "uid": group.uid, "annotations": { labels::FAILED: text } },
            "spec": { "activeDeadlineSeconds": 1 },
        });
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let params = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        let done = api
            .patch(&group.name, &params, &Patch::Merge(&patch))
            .await
            .map(drop);
        unless_gone(done).map_err(|source| failed(format!("group {}", group.name), source))
    }

    /// The Deployment goes after its pods, and these after their open streams; the rest goes with the model.
    async fn remove_router(&self, world: &World, key: &Key) -> Result<(), ApplyError> {
        let Some(model) = world.models.get(key) else {
            return Ok(());
        };
        let name = swallow_plan::launch::router_name(&model.spec, &key.name);
        let Some(deployment) = world.deployments.get(&Key::new(&key.namespace, &name)) else {
            return Ok(());
        };
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Foreground),
            ..only(&deployment.uid().unwrap_or_default(), None)
        };
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), &key.namespace);
        let done = api.delete(&name, &params).await.map(drop);
        unless_gone(done).map_err(|source| failed(format!("Deployment {name}"), source))
    }
}

/// What the API server said, or why it could not be asked.
pub fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => other.to_string(),
    }
}

fn failed(what: String, source: kube::Error) -> ApplyError {
    ApplyError::Api { what, source }
}

/// Deletes this very object and no other of its name.
fn only(uid: &str, grace: Option<u32>) -> DeleteParams {
    DeleteParams {
        grace_period_seconds: grace,
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        }),
        ..DeleteParams::default()
    }
}

/// What is gone, or has made way for another of its name, needs nothing done.
fn unless_gone(done: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match done {
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
        done => done,
    }
}
