//! What the operator tells: the status, where it differs from the last, and an event for each note.

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use swallow_plan::{
    Note, NoteKind, Timestamp,
    model::{SwallowModel, SwallowModelStatus},
};

use super::{
    apply::{MANAGER, said},
    cache::Key,
    observe::World,
};

/// The longest note that an event takes, in bytes.
const NOTE_MAX: usize = 1024;
/// The kind and version of what events are about.
const API_VERSION: &str = "serving.swallow.dev/v1alpha1";

/// Writes the status if it differs from the one that the model has. Says whether it did.
///
/// # Errors
/// The API server refused, or could not be asked.
pub async fn status(
    client: &Client,
    world: &World,
    model: &SwallowModel,
    status: &SwallowModelStatus,
) -> Result<bool, kube::Error> {
    if model.status.as_ref() == Some(status) {
        return Ok(false);
    }
    let key = Key::of(model);
    let api: Api<SwallowModel> = Api::namespaced(client.clone(), &key.namespace);
    let patch = json!({
        "apiVersion": API_VERSION,
        "kind": "SwallowModel",
        // Precondition: a new model of this name has another story.
        "metadata": { "name": key.name, "uid": model.metadata.uid },
        "status": status,
    });
    let params = PatchParams::apply(MANAGER).force();
    match api.patch_status(&key.name, &params, &Patch::Apply(&patch)).await {
        Ok(told) => {
            world.models.learn(told);
            Ok(true)
        }
        Err(kube::Error::Api(refused)) if [404, 409].contains(&refused.code) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes an event. One that is lost is no harm: the status says the same.
pub async fn event(client: &Client, model: &SwallowModel, note: &Note, now: Timestamp, instance: &str) {
    let key = Key::of(model);
    let event = Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", key.name)),
            namespace: Some(key.namespace.clone()),
            ..ObjectMeta::default()
        },
        action: Some("Reconcile".into()),
        event_time: Some(MicroTime(now)),
        note: Some(shortened(&note.message)),
        reason: Some(note.reason.clone()),
        regarding: Some(ObjectReference {
            api_version: Some(API_VERSION.into()),
            kind: Some("SwallowModel".into()),
            name: Some(key.name.clone()),
            namespace: Some(key.namespace.clone()),
            uid: model.uid(),
            resource_version: model.resource_version(),
            field_path: None,
        }),
        reporting_controller: Some("serving.swallow.dev/operator".into()),
        reporting_instance: Some(instance.chars().take(128).collect()),
        type_: Some(
            match note.kind {
                NoteKind::Normal => "Normal",
                NoteKind::Warning => "Warning",
            }
            .into(),
        ),
        ..Event::default()
    };
    let api: Api<Event> = Api::namespaced(client.clone(), &key.namespace);
    if let Err(error) = api.create(&PostParams::default(), &event).await {
        tracing::warn!(model = %key, error = said(&error), reason = note.reason, "an event was not taken");
    }
}

fn shortened(text: &str) -> String {
    if text.len() <= NOTE_MAX {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(NOTE_MAX - '…'.len_utf8());
    format!("{}…", &text[..end])
}
