//! What should exist for a SwallowModel, decided from what was observed.
//!
//! `plan` is a pure, total function: the same model, observation and time give the same actions, an invalid spec is a
//! plan with a status and no actions, and nothing here does I/O, reads a clock or draws a random number. Who carries
//! the actions out, as pods or as local processes, is the shell's matter; `objects` renders them for Kubernetes.

mod action;
mod census;
pub mod launch;
pub mod memory;
pub mod model;
mod notes;
pub mod objects;
mod observed;
mod recovery;
mod rollout;
mod sharing;
mod status;
pub mod topology;
mod validate;

pub use action::{Action, GroupRef, Why, counted};
pub use k8s_openapi::jiff::Timestamp;
pub use notes::{Note, NoteKind};
pub use observed::{
    CreateRefused, Failure, Images, MeasuredMemory, Observed, Phase, Progress, SeenGroup, SeenRevision,
    SeenRouter,
};
pub use sharing::Peer;
pub use validate::{Refused, Valid, validate};

use kube::ResourceExt;
use model::{SwallowModel, SwallowModelStatus};

/// The annotation of a SwallowModel that lifts quarantines when its value changes.
pub const RETRY_ANNOTATION: &str = "serving.swallow.dev/retry";

/// What to do now, what to tell, and when to look again if nothing happens before.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// To be carried out in this order. Each is sound on its own: a crash between two of them loses nothing.
    pub actions: Vec<Action>,
    /// The whole status, to be written when it differs from the last.
    pub status: SwallowModelStatus,
    /// What changed since the last status, for events and logs.
    pub notes: Vec<Note>,
    /// When time alone can change the plan; `None` when only events can.
    pub look_again: Option<Timestamp>,
}

/// Decides what to do about `model`, given what was `seen`, at the time `now`.
pub fn plan(model: &SwallowModel, seen: &Observed, now: Timestamp) -> Plan {
    let verdict = validate(model, seen.shape.as_ref());
    let census = census::Census::new(model, verdict.as_ref().ok(), seen);
    let mut decided = rollout::Decided::default();
    if model.metadata.deletion_timestamp.is_some() {
        // Whoever deletes a model and keeps what it owns (`kubectl delete --cascade=orphan`) wants it served on.
        if !model.finalizers().iter().any(|finalizer| finalizer == "orphan") {
            rollout::leave(seen, &mut decided);
        }
    } else if let Ok(valid) = &verdict {
        let created = model.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let shared = sharing::Shared::new(valid, created, &seen.peers);
        decided.router_disagreement = shared.disagreement();
        rollout::surroundings(valid, seen, &shared, &mut decided);
        rollout::groups(valid, &census, &seen.images, now, &mut decided);
        rollout::forget_revisions(valid, seen, &mut decided);
    }
    let status = status::tell(model, &verdict, seen, &census, &decided, now);
    let notes = notes::between(model.status.as_ref(), &status, &decided.actions);
    Plan {
        actions: decided.actions,
        status,
        notes,
        look_again: decided.look_again,
    }
}

/// `seconds` after `time`; the end of time when there is no such moment.
pub(crate) fn after(time: Timestamp, seconds: u32) -> Timestamp {
    let nanoseconds = time.as_nanosecond() + i128::from(seconds) * 1_000_000_000;
    Timestamp::from_nanosecond(nanoseconds).unwrap_or(Timestamp::MAX)
}
