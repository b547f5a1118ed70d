//! What changed since the last status, for events and logs: actions taken, groups that moved on, conditions that
//! turned. Nothing is said twice, because each follows from a difference.

use std::fmt;

use crate::{
    Action,
    model::{Condition, ConditionStatus, GroupState, GroupStatus, SwallowModelStatus},
};

/// Whether someone should look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoteKind {
    /// As expected.
    Normal,
    /// Not as wanted.
    Warning,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether someone should look.
    pub kind: NoteKind,
    /// In one CamelCase word.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

/// What to tell about the step from one status to the next.
pub(crate) fn between(
    before: Option<&SwallowModelStatus>,
    after: &SwallowModelStatus,
    actions: &[Action],
) -> Vec<Note> {
    let none = SwallowModelStatus::default();
    let before = before.unwrap_or(&none);
    let mut notes = Vec::new();
    for group in &after.groups {
        let state = before
            .groups
            .iter()
            .find(|earlier| earlier.name == group.name)
            .map(|earlier| earlier.state);
        if state != Some(group.state) {
            notes.extend(moved(group));
        }
    }
    for condition in &after.conditions {
        let earlier = before
            .conditions
            .iter()
            .find(|earlier| earlier.kind == condition.kind);
        let same = earlier.is_some_and(|earlier| {
            (earlier.status, &earlier.reason) == (condition.status, &condition.reason)
        });
        // That a model is sound when it is made, and not yet ready, nobody needs to be told.
        let born =
            earlier.is_none() && (condition.status == ConditionStatus::True) != (condition.kind == "Ready");
        if !same && !born {
            notes.extend(turned(condition));
        }
    }
    notes.extend(actions.iter().map(|action| Note {
        kind: NoteKind::Normal,
        reason: action.verb().to_owned(),
        message: match action.group() {
            Some(group) => format!("{group}: {}", action.why()),
            None => action.why().to_string(),
        },
    }));
    notes
}

fn moved(group: &GroupStatus) -> Option<Note> {
    let detail = match (&group.reason, group.message.is_empty()) {
        (Some(reason), true) => format!(" ({reason:?})"),
        (Some(reason), false) => format!(" ({reason:?}: {})", group.message),
        (None, _) => String::new(),
    };
    let (kind, reason, words) = match group.state {
        GroupState::Serving => (NoteKind::Normal, "GroupServing", "serves"),
        GroupState::Failed => (NoteKind::Warning, "GroupFailed", "failed"),
        GroupState::Quarantined => (NoteKind::Warning, "GroupQuarantined", "is quarantined"),
        // What makes a group drain is told as an action.
        GroupState::Draining
        | GroupState::Pending
        | GroupState::Fetching
        | GroupState::Loading
        | GroupState::Warming => return None,
    };
    Some(Note {
        kind,
        reason: reason.into(),
        message: format!("{} {words}{detail}", group.name),
    })
}

fn turned(condition: &Condition) -> Option<Note> {
    // The rest is told by groups and actions.
    if !["SpecValid", "MemoryPlanFits", "Ready"].contains(&condition.kind.as_str()) {
        return None;
    }
    let (kind, words) = match condition.status {
        ConditionStatus::True => (NoteKind::Normal, ""),
        ConditionStatus::False => (NoteKind::Warning, "Not"),
        ConditionStatus::Unknown => return None,
    };
    let reason = format!("{words}{}", condition.kind);
    Some(Note {
        kind,
        reason,
        message: format!("{}: {}", condition.reason, condition.message),
    })
}
