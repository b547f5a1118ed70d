//! What a plan asks for. Actions are data, each with its reason; who carries them out decides nothing.

use std::fmt;

use serde_json::Value;

use crate::{
    launch::{GroupLaunch, RouterLaunch},
    model::GroupReason,
};

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Bring accounts, services and disruption budget to what `objects::surroundings` renders.
    ApplySurroundings {
        /// The objects in their order, with the fingerprint in `labels::APPLIED`.
        objects: Vec<Value>,
        /// Shown as `Observed::surroundings` afterwards.
        fingerprint: String,
        /// Why now.
        why: Why,
    },
    /// Bring the router to this form.
    ApplyRouter {
        /// The form.
        router: Box<RouterLaunch>,
        /// The objects in their order, owned by all models that share it, with the fingerprint in `labels::APPLIED`.
        objects: Vec<Value>,
        /// Shown as `SeenRouter::fingerprint` afterwards.
        fingerprint: String,
        /// Why now.
        why: Why,
    },
    /// Stop the router after its open streams, as far as this model needs it.
    RemoveRouter {
        /// Why now.
        why: Why,
    },
    /// Start a group. It must fail if the name is taken.
    CreateGroup {
        /// The group.
        group: Box<GroupLaunch>,
        /// Why now.
        why: Why,
    },
    /// Tell a group to finish its streams, take nothing new and end.
    DrainGroup {
        /// The group.
        group: GroupRef,
        /// Why now.
        why: Why,
    },
    /// End the processes of a group that stands still and keep its record: it is then seen as failed.
    FailGroup {
        /// The group.
        group: GroupRef,
        /// What it failed of.
        reason: GroupReason,
        /// Why now.
        why: Why,
    },
    /// Remove a group that serves nobody, at once.
    DeleteGroup {
        /// The group.
        group: GroupRef,
        /// Why now.
        why: Why,
    },
    /// Remove the record of a revision that no group is of.
    ForgetRevision {
        /// The name of the record.
        name: String,
        /// Precondition of its removal.
        uid: String,
        /// Why now.
        why: Why,
    },
}

/// One group and no other that may get its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupRef {
    /// Its name.
    pub name: String,
    /// Precondition of anything done to it.
    pub uid: String,
}

/// Why an action is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// It does not exist.
    Absent,
    /// It differs from the spec.
    Changed,
    /// Fewer groups exist than are wanted.
    Missing {
        /// Groups there are.
        have: usize,
        /// Groups there should be.
        want: usize,
    },
    /// Groups of an older revision are being replaced.
    Update {
        /// The new revision.
        to: String,
    },
    /// A group failed and its wait is over.
    Restart {
        /// The failed group.
        replaces: String,
        /// What it failed of.
        reason: GroupReason,
        /// How often that happened in the window.
        failures: usize,
        /// How many restarts are allowed.
        allowed: u32,
    },
    /// The quarantine was lifted by the retry annotation.
    Retry {
        /// The failed group.
        replaces: String,
    },
    /// Another group has taken its place.
    Replaced,
    /// More groups exist than are wanted.
    Excess {
        /// Groups there are.
        have: usize,
        /// Groups there should be.
        want: usize,
    },
    /// The model is suspended.
    Suspended,
    /// Its revision is no longer wanted and it serves nobody.
    Superseded,
    /// Enough groups serve without it: its successor is there.
    SuccessorServes,
    /// Its successor needs its room.
    MakesRoom,
    /// It made no progress for so many seconds.
    Stalled(u32),
    /// Its node does not answer.
    NodeLost,
    /// The model is being deleted.
    ModelDeleted,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Absent => f.write_str("it does not exist"),
            Why::Changed => f.write_str("it differs from the spec"),
            Why::Missing { have, want } => write!(f, "{have} of {} present", groups(*want)),
            Why::Update { to } => write!(f, "update to {to}"),
            Why::Restart {
                replaces,
                reason,
                failures,
                allowed,
            } => {
                write!(
                    f,
                    "replaces {replaces} ({reason:?}), restart {failures} of {allowed}"
                )
            }
            Why::Retry { replaces } => write!(f, "replaces {replaces}, retry was asked for"),
            Why::Replaced => f.write_str("another group has taken its place"),
            Why::Excess { have, want } => write!(f, "{}, {want} wanted", groups(*have)),
            Why::Suspended => f.write_str("the model is suspended"),
            Why::Superseded => f.write_str("its revision is superseded and it serves nobody"),
            Why::SuccessorServes => f.write_str("enough groups serve without it"),
            Why::MakesRoom => f.write_str("its successor needs its room"),
            Why::Stalled(seconds) => write!(f, "no progress for {seconds} s"),
            Why::NodeLost => f.write_str("its node does not answer"),
            Why::ModelDeleted => f.write_str("the model is deleted"),
        }
    }
}

/// A number of groups, in words.
pub(crate) fn groups(n: usize) -> String {
    counted(n as u64, "group")
}

/// A number of things, in words; `noun` is one of them, and takes an s. No verb follows, so that none has to agree.
pub fn counted(n: u64, noun: &str) -> String {
    if n == 1 {
        format!("1 {noun}")
    } else {
        format!("{n} {noun}s")
    }
}

impl Action {
    /// The reason.
    pub fn why(&self) -> &Why {
        match self {
            Action::ApplySurroundings { why, .. }
            | Action::ApplyRouter { why, .. }
            | Action::RemoveRouter { why }
            | Action::CreateGroup { why, .. }
            | Action::DrainGroup { why, .. }
            | Action::FailGroup { why, .. }
            | Action::DeleteGroup { why, .. }
            | Action::ForgetRevision { why, .. } => why,
        }
    }

    /// The action in one CamelCase word, for events and metrics.
    pub fn verb(&self) -> &'static str {
        match self {
            Action::ApplySurroundings { .. } => "ApplySurroundings",
            Action::ApplyRouter { .. } => "ApplyRouter",
            Action::RemoveRouter { .. } => "RemoveRouter",
            Action::CreateGroup { .. } => "CreateGroup",
            Action::DrainGroup { .. } => "DrainGroup",
            Action::FailGroup { .. } => "FailGroup",
            Action::DeleteGroup { .. } => "DeleteGroup",
            Action::ForgetRevision { .. } => "ForgetRevision",
        }
    }

    /// The group that it is about, if it is about one.
    pub fn group(&self) -> Option<&str> {
        match self {
            Action::CreateGroup { group, .. } => Some(&group.name),
            Action::DrainGroup { group, .. }
            | Action::FailGroup { group, .. }
            | Action::DeleteGroup { group, .. } => Some(&group.name),
            _ => None,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.verb())?;
        if let Some(group) = self.group() {
            write!(f, " {group}")?;
        }
        write!(f, ": {}", self.why())
    }
}
