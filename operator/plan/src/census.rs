//! Every group counted once, by what can be done with it.

use crate::{Failure, Observed, Phase, SeenGroup, Valid, model::SwallowModel};

/// The groups of a model by their part in the plan. A group is in exactly one list.
#[derive(Debug, Default)]
pub(crate) struct Census<'a> {
    /// Of the wanted revision: starting or serving.
    pub current: Vec<&'a SeenGroup>,
    /// Of the wanted revision: failed.
    pub failed: Vec<(&'a SeenGroup, &'a Failure)>,
    /// Of another revision: starting or serving.
    pub old: Vec<&'a SeenGroup>,
    /// Of another revision: failed.
    pub old_failed: Vec<&'a SeenGroup>,
    /// Told to stop, not yet gone.
    pub leaving: Vec<&'a SeenGroup>,
    /// On a node that does not answer, or failed and being removed: they hold nothing and nobody waits for them.
    pub lost: Vec<&'a SeenGroup>,
    /// How many groups should serve.
    pub want: usize,
}

impl<'a> Census<'a> {
    /// Counts; without a valid spec there is no wanted revision, and every group is of another one.
    pub fn new(model: &SwallowModel, valid: Option<&Valid>, seen: &'a Observed) -> Self {
        let off = model.spec.suspend || model.metadata.deletion_timestamp.is_some();
        let want = if off {
            0
        } else {
            usize::try_from(model.spec.replicas).unwrap_or_default()
        };
        let mut census = Self {
            want,
            ..Self::default()
        };
        for group in &seen.groups {
            let wanted = valid.is_some_and(|valid| valid.revision == group.revision);
            match &group.phase {
                Phase::Failed(_) if group.leaving => census.lost.push(group),
                Phase::Failed(_) if !wanted => census.old_failed.push(group),
                Phase::Failed(failure) => census.failed.push((group, failure)),
                _ if group.node_lost => census.lost.push(group),
                _ if group.leaving => census.leaving.push(group),
                _ if wanted => census.current.push(group),
                _ => census.old.push(group),
            }
        }
        census
    }

    /// Groups that hold devices and memory.
    pub fn holding(&self) -> usize {
        self.current.len() + self.old.len() + self.leaving.len()
    }

    /// Groups of any revision that serve and go on serving.
    pub fn serving(&self) -> usize {
        self.current
            .iter()
            .chain(&self.old)
            .filter(|group| group.serves())
            .count()
    }

    /// Groups of the wanted revision that serve and go on serving.
    pub fn updated(&self) -> usize {
        self.current.iter().filter(|group| group.serves()).count()
    }
}
