//! How groups come and go. One rule set serves the first start, scaling, rollouts, suspension and recovery.
//!
//! Invariants, held at every call and checked by a property test:
//! - groups that hold devices never exceed replicas + maxSurge because of an action here;
//! - groups that serve never fall below replicas - maxUnavailable because of an action here, and below replicas only
//!   when a surge is not possible;
//! - when the world is as wanted there is no action.
//!
//! Surge is preferred: an old group is drained when enough others serve. Only when there can be no surge, because
//! maxSurge is zero or the cluster has no room, is it drained to make room.

use std::collections::BTreeSet;

use crate::{
    Action, GroupRef, Images, Observed, Phase, SeenGroup, SeenRevision, Timestamp, Valid, Why, after,
    census::Census,
    launch::{self, GroupLaunch, GroupTemplate},
    model::GroupReason,
    objects,
    recovery::{Judgement, judge},
    sharing::Shared,
};

/// How long a group may wait for room before it counts as having none: schedulers and autoscalers take a moment.
const ROOM_PATIENCE_SECONDS: u32 = 15;

/// Records of past revisions that are kept.
const REVISIONS_KEPT: usize = 3;

/// What was decided so far.
#[derive(Debug, Default)]
pub(crate) struct Decided {
    pub actions: Vec<Action>,
    pub look_again: Option<Timestamp>,
    /// Groups of the wanted revision that stay down.
    pub quarantined: BTreeSet<String>,
    /// A group waits for room that a rollout may not make.
    pub no_room: bool,
    /// Why the router is not as this model asks.
    pub router_disagreement: Option<String>,
}

impl Decided {
    fn look_at(&mut self, time: Timestamp) {
        self.look_again = Some(self.look_again.map_or(time, |before| before.min(time)));
    }
}

/// The model is being deleted: its router goes first, so that streams end in good order, then its groups.
pub(crate) fn leave(seen: &Observed, decided: &mut Decided) {
    // A router that others share stays; they take this model out of it.
    let shared = !seen.peers.is_empty();
    if let Some(router) = seen.router.as_ref().filter(|_| !shared) {
        if !router.leaving {
            decided.actions.push(Action::RemoveRouter {
                why: Why::ModelDeleted,
            });
        }
        return;
    }
    for group in seen.groups.iter().filter(|group| !group.leaving) {
        decided.actions.push(stop(group, Why::ModelDeleted));
    }
}

/// The router and what surrounds the groups; both outlive suspension.
pub(crate) fn surroundings(valid: &Valid, seen: &Observed, shared: &Shared<'_>, decided: &mut Decided) {
    let why = |exists: bool| if exists { Why::Changed } else { Why::Absent };
    let mut rendered = objects::surroundings_value(valid);
    let fingerprint = launch::fingerprint(&rendered);
    if seen.surroundings.as_ref() != Some(&fingerprint) {
        let objects = rendered.as_array_mut().map(std::mem::take).unwrap_or_default();
        decided.actions.push(Action::ApplySurroundings {
            objects: objects
                .into_iter()
                .map(|object| objects::marked(object, &fingerprint))
                .collect(),
            fingerprint,
            why: why(seen.surroundings.is_some()),
        });
    }
    let fingerprint = shared.fingerprint();
    if seen
        .router
        .as_ref()
        .is_none_or(|seen| seen.fingerprint != fingerprint)
    {
        let why = why(seen.router.is_some());
        decided.actions.push(Action::ApplyRouter {
            router: Box::new(shared.launch(&seen.images)),
            objects: shared.objects(&seen.images),
            fingerprint,
            why,
        });
    }
}

/// Records of revisions that no group is of, beyond the newest few, which a user may go back to.
pub(crate) fn forget_revisions(valid: &Valid, seen: &Observed, decided: &mut Decided) {
    let used = |revision: &SeenRevision| {
        revision.revision == valid.revision
            || seen
                .groups
                .iter()
                .any(|group| group.revision == revision.revision)
    };
    let mut unused: Vec<&SeenRevision> = seen.revisions.iter().filter(|revision| !used(revision)).collect();
    unused.sort_by_key(|revision| std::cmp::Reverse(revision.number));
    for revision in unused.into_iter().skip(REVISIONS_KEPT) {
        decided.actions.push(Action::ForgetRevision {
            name: revision.name.clone(),
            uid: revision.uid.clone(),
            why: Why::Superseded,
        });
    }
}

/// The groups.
pub(crate) fn groups(
    valid: &Valid,
    census: &Census<'_>,
    images: &Images,
    now: Timestamp,
    decided: &mut Decided,
) {
    let template = launch::group_template(valid, images);
    let mut planner = Planner::new(valid, census, template, now, decided);
    planner.clear_away();
    planner.fail_the_stalled();
    planner.recover();
    planner.shrink();
    planner.drain_the_old();
    planner.grow();
}

struct Planner<'a> {
    valid: &'a Valid,
    census: &'a Census<'a>,
    template: GroupTemplate,
    now: Timestamp,
    decided: &'a mut Decided,
    /// Groups that hold devices, with those created by this plan.
    holding: usize,
    /// Places taken in the wanted revision: groups that run, wait for their restart or stay down.
    taken: usize,
    /// Failed groups that keep their place.
    waiting: Vec<&'a SeenGroup>,
    indexes: BTreeSet<u32>,
}

impl<'a> Planner<'a> {
    fn new(
        valid: &'a Valid,
        census: &'a Census<'a>,
        template: GroupTemplate,
        now: Timestamp,
        decided: &'a mut Decided,
    ) -> Self {
        let revision = &valid.revision;
        let same = |group: &&&SeenGroup| group.revision == *revision;
        let everywhere = census
            .current
            .iter()
            .chain(&census.leaving)
            .chain(&census.lost)
            .filter(same)
            .map(|group| group.index)
            .chain(census.failed.iter().map(|(group, _)| group.index));
        Self {
            valid,
            census,
            template,
            now,
            decided,
            holding: census.holding(),
            taken: census.current.len(),
            waiting: Vec::new(),
            indexes: everywhere.collect(),
        }
    }

    fn do_it(&mut self, action: Action) {
        self.decided.actions.push(action);
    }

    /// The most groups that may hold devices at once.
    fn bound(&self) -> usize {
        let surge = usize::try_from(self.valid.spec.rollout.max_surge).unwrap_or_default();
        // With nothing wanted there is nothing to surge for.
        if self.census.want == 0 {
            0
        } else {
            self.census.want + surge
        }
    }

    /// Groups that serve nobody and that nobody wants.
    fn clear_away(&mut self) {
        for group in &self.census.old_failed {
            self.do_it(delete(group, Why::Superseded));
        }
        for group in self.census.old.iter().filter(|group| group.is_starting()) {
            self.do_it(delete(group, self.unwanted(Why::Superseded)));
        }
        for group in self.census.lost.iter().filter(|group| !group.leaving) {
            self.do_it(delete(group, Why::NodeLost));
        }
    }

    /// A start without progress is a failure like any other. Waiting for the cluster is not a start.
    fn fail_the_stalled(&mut self) {
        let patience = self.valid.spec.rollout.startup_progress_timeout_seconds;
        for group in &self.census.current {
            let starts = match &group.phase {
                Phase::Pending { reason, .. } => *reason == GroupReason::Starting,
                // One that does not know yet how much there is has not begun: another one may be busy with the same
                // volume, for hours.
                Phase::Fetching(progress) => progress.bytes_total > 0,
                Phase::Loading(_) | Phase::Warming => true,
                Phase::Serving | Phase::Failed(_) => false,
            };
            let until = after(group.progress_at, patience);
            if starts && self.now >= until {
                let group = reference(group);
                let why = Why::Stalled(patience);
                self.do_it(Action::FailGroup {
                    group,
                    reason: GroupReason::StartupStalled,
                    why,
                });
            } else if starts {
                self.decided.look_at(until);
            }
        }
    }

    /// Failed groups are started again, wait, or stay down. Each keeps its place meanwhile.
    fn recover(&mut self) {
        let mut failed = self.census.failed.clone();
        failed.sort_by_key(|(group, _)| group.index);
        let recovery = &self.valid.spec.recovery;
        for (group, failure) in failed {
            self.taken += 1;
            if self.taken > self.census.want {
                self.waiting.push(group);
                continue;
            }
            let (crashes, why) = match judge(group, failure, recovery, self.valid.retry.as_deref(), self.now)
            {
                Judgement::Restart { crashes } => {
                    let failures = crashes.len();
                    let reason = failure.reason;
                    let allowed = recovery.max_restarts;
                    (
                        crashes,
                        Why::Restart {
                            replaces: group.name.clone(),
                            reason,
                            failures,
                            allowed,
                        },
                    )
                }
                Judgement::Retry => (
                    Vec::new(),
                    Why::Retry {
                        replaces: group.name.clone(),
                    },
                ),
                Judgement::Wait { until } => {
                    self.decided.look_at(until);
                    self.waiting.push(group);
                    continue;
                }
                Judgement::Quarantine => {
                    self.decided.quarantined.insert(group.name.clone());
                    self.waiting.push(group);
                    continue;
                }
            };
            if self.holding >= self.bound() {
                self.waiting.push(group);
                continue;
            }
            self.create(crashes, Some(group.name.clone()), why);
            self.do_it(delete(group, Why::Replaced));
        }
    }

    /// More places taken than wanted: those that serve nobody go first, then the idle, then the least busy.
    fn shrink(&mut self) {
        let mut surplus = self.taken.saturating_sub(self.census.want);
        let why = self.unwanted(Why::Excess {
            have: self.taken,
            want: self.census.want,
        });
        while surplus > 0
            && let Some(group) = self.waiting.pop()
        {
            self.decided.quarantined.remove(&group.name);
            self.do_it(delete(group, why.clone()));
            surplus -= 1;
        }
        let mut victims = self.census.current.clone();
        victims.sort_by_key(|group| {
            (
                group.serves(),
                nearness(group),
                group.requests,
                u32::MAX - group.index,
            )
        });
        for group in victims.into_iter().take(surplus) {
            self.do_it(stop(group, why.clone()));
        }
    }

    /// Old groups that serve are drained as far as the rest serves enough.
    fn drain_the_old(&mut self) {
        let want = self.census.want;
        let mut serving: Vec<&SeenGroup> = self
            .census
            .old
            .iter()
            .copied()
            .filter(|group| group.serves())
            .collect();
        serving.sort_by_key(|group| (group.requests, u32::MAX - group.index));
        let spare = self.census.serving().saturating_sub(want);
        let (drained, kept) = serving.split_at(spare.min(serving.len()));
        for group in drained {
            self.do_it(drain(group, self.unwanted(Why::SuccessorServes)));
        }
        if kept.is_empty() {
            return;
        }
        let unavailable = usize::try_from(self.valid.spec.rollout.max_unavailable).unwrap_or_default();
        let floor = want.saturating_sub(unavailable);
        let may_drain = (self.census.serving() - drained.len()).saturating_sub(floor);
        let room_for = self.short_of_room();
        let surges = self.valid.spec.rollout.max_surge > 0;
        let moves = self
            .census
            .current
            .iter()
            .any(|group| group.is_starting() && !group.is_unschedulable());
        self.decided.no_room = surges && !moves && room_for > 0 && may_drain == 0;
        for group in &kept[..may_drain.min(room_for).min(kept.len())] {
            self.do_it(drain(group, Why::MakesRoom));
        }
    }

    /// How many old groups have to go for the rollout to go on; zero while a surge may still succeed.
    fn short_of_room(&mut self) -> usize {
        if self.valid.spec.rollout.max_surge == 0 {
            return self.census.old.len();
        }
        let mut stuck: usize = 0;
        for group in &self.census.current {
            let Phase::Pending { since, .. } = &group.phase else {
                continue;
            };
            if !group.is_unschedulable() {
                continue;
            }
            let until = after(*since, ROOM_PATIENCE_SECONDS);
            if self.now >= until {
                stuck += 1;
            } else {
                self.decided.look_at(until);
            }
        }
        // Those that leave make room already.
        stuck.saturating_sub(self.census.leaving.len())
    }

    /// Missing groups are created, as far as the bound allows.
    fn grow(&mut self) {
        let want = self.census.want;
        let have = self.taken;
        let missing = want.saturating_sub(have);
        let updates = !self.census.old.is_empty();
        // A revision whose groups fail is not tried with more of them while others serve.
        let failing = if updates { self.waiting.len() } else { 0 };
        let room = self.bound().saturating_sub(self.holding + failing);
        for _ in 0..missing.min(room) {
            let why = if updates {
                Why::Update {
                    to: self.valid.revision.clone(),
                }
            } else {
                Why::Missing { have, want }
            };
            self.taken += 1;
            self.create(Vec::new(), None, why);
        }
    }

    /// Creates a group whose place is already counted as taken.
    fn create(&mut self, crashes: Vec<Timestamp>, replaces: Option<String>, why: Why) {
        let index = (0..)
            .find(|index| !self.indexes.contains(index))
            .expect("fewer groups than numbers");
        self.indexes.insert(index);
        self.holding += 1;
        let group = Box::new(GroupLaunch {
            name: format!("{}-{}-{index}", self.valid.name, self.valid.revision),
            index,
            revision: self.valid.revision.clone(),
            replaces,
            crashes,
            retry: self.valid.retry.clone(),
            template: self.template.clone(),
        });
        self.do_it(Action::CreateGroup { group, why });
    }

    /// A suspended model says so; otherwise the reason is as given.
    fn unwanted(&self, why: Why) -> Why {
        if self.valid.spec.suspend {
            Why::Suspended
        } else {
            why
        }
    }
}

fn reference(group: &SeenGroup) -> GroupRef {
    GroupRef {
        name: group.name.clone(),
        uid: group.uid.clone(),
    }
}

fn drain(group: &SeenGroup, why: Why) -> Action {
    Action::DrainGroup {
        group: reference(group),
        why,
    }
}

fn delete(group: &SeenGroup, why: Why) -> Action {
    Action::DeleteGroup {
        group: reference(group),
        why,
    }
}

/// Drains what serves, deletes what does not.
fn stop(group: &SeenGroup, why: Why) -> Action {
    if group.serves() {
        drain(group, why)
    } else {
        delete(group, why)
    }
}

/// How near a group is to serving.
fn nearness(group: &SeenGroup) -> u8 {
    match group.phase {
        Phase::Failed(_) => 0,
        Phase::Pending { .. } => 1,
        Phase::Fetching(_) => 2,
        Phase::Loading(_) => 3,
        Phase::Warming => 4,
        Phase::Serving => 5,
    }
}
