//! A fetch that stands still is a failure; one that waits for its turn at a shared volume is none.

use swallow_plan::{Action, Phase, Progress, Timestamp, plan};

use crate::world::World;

/// Whether the only group is ended that has fetched so much, and nothing more for so long.
fn is_failed(bytes_done: u64, bytes_total: u64, still_seconds: i64) -> bool {
    let mut world = World::new();
    world.step();
    world.groups[0].seen.phase = Phase::Fetching(Progress {
        bytes_done,
        bytes_total,
        eta_seconds: None,
    });
    world.groups[0].seen.progress_at = world.now;
    let later = Timestamp::from_second(world.now.as_second() + still_seconds).expect("in range");
    let plan = plan(&world.model, &world.observe(), later);
    plan.actions
        .iter()
        .any(|action| matches!(action, Action::FailGroup { .. }))
}

#[test]
fn only_a_fetch_that_has_begun_can_stand_still() {
    assert!(!is_failed(10, 100, 299), "its patience is 300 s");
    assert!(is_failed(10, 100, 300));
    assert!(
        !is_failed(0, 0, 100_000),
        "another one fetches into the same volume"
    );
}
