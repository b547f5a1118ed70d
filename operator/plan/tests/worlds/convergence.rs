//! Whatever happens to a model, the plan keeps its promises on the way and comes to rest at the end.
//!
//! Random users and random misfortune, from a printed seed. `SEED=n` repeats one run.

use std::env;

use crate::world::World;
use fastrand::Rng;
use serde_json::json;
use swallow_plan::{
    Action, Phase, Plan, SeenGroup,
    model::{ConditionStatus, GroupReason},
};

/// Runs of the test.
const SEEDS: u64 = 30;
/// Seconds with events.
const EVENTFUL_SECONDS: usize = 240;
/// Seconds within which a world without events comes to rest: drains and backoffs included.
const QUIET_SECONDS: usize = 600;
/// A plan and what follows at the same moment.
const STEPS_MAX: usize = 8;

#[test]
fn promises_hold_and_the_world_comes_to_rest() {
    let seeds: Vec<u64> = match env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    for seed in seeds {
        println!("seed {seed}");
        run(seed);
    }
}

fn run(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let mut world = World::new();
    for _ in 0..EVENTFUL_SECONDS {
        if rng.u8(..) < 40 {
            event(&mut world, &mut rng);
        }
        // A busy operator does not look every second.
        if rng.u8(..) < 200 {
            look(&mut world);
        }
        world.pass();
    }
    calm(&mut world, seed);
    for _ in 0..QUIET_SECONDS {
        look(&mut world);
        world.pass();
    }
    let plan = world.step();
    assert!(
        plan.actions.is_empty(),
        "at rest nothing is done: {:?}",
        plan.actions
    );
    for condition in ["Ready", "FullyAvailable", "Settled", "RecoveryHealthy"] {
        let found = plan
            .status
            .conditions
            .iter()
            .find(|found| found.kind == condition)
            .expect("it is always told");
        assert_eq!(
            found.status,
            ConditionStatus::True,
            "{found:?}\n{:#?}",
            plan.status.groups
        );
    }
    assert!(plan.notes.is_empty(), "at rest nothing is told: {:?}", plan.notes);
    assert_eq!(plan.look_again, None, "at rest time changes nothing");
}

/// Something that users, nodes or processes do.
fn event(world: &mut World, rng: &mut Rng) {
    let now = world.now;
    match rng.u8(..13) {
        0 | 1 => world.change(&[("replicas", json!(rng.i32(0..5)))]),
        2 | 3 => world.change(&[("engine.maxStepTokens", json!(rng.u32(1..4) * 512))]),
        4 => {
            let surge = rng.i32(0..3);
            let unavailable = if surge == 0 { rng.i32(1..3) } else { rng.i32(0..3) };
            world.change(&[
                ("rollout.maxSurge", json!(surge)),
                ("rollout.maxUnavailable", json!(unavailable)),
            ]);
        }
        5 => world.change(&[("suspend", json!(rng.bool()))]),
        6 => world.change(&[("drain.timeoutSeconds", json!(rng.u32(1..40)))]),
        7 => world.capacity = if rng.bool() { usize::MAX } else { rng.usize(0..6) },
        8 => {
            world.broken = rng
                .choice([
                    None,
                    None,
                    Some(GroupReason::Crashed),
                    Some(GroupReason::BadCheckpoint),
                ])
                .flatten()
        }
        9 => world.change(&[(
            "parallelism.tensor",
            json!(rng.choice([1, 2, 3]).expect("one of them")),
        )]),
        10 | 11 => {
            if let Some(group) = rng
                .choice(world.groups.iter_mut())
                .filter(|group| !group.seen.leaving)
            {
                group.fail(GroupReason::Crashed, "killed", now);
            }
        }
        _ => {
            if let Some(group) = rng.choice(world.groups.iter_mut()) {
                group.seen.requests = rng.u32(..3);
                group.seen.node_lost |= rng.u8(..) < 30;
            }
        }
    }
}

/// Nothing stands in the way any more.
fn calm(world: &mut World, seed: u64) {
    let replicas = world.model.spec.replicas.max(1);
    // Where an old group may go first, room for the wanted groups and no more is enough.
    let tight = seed.is_multiple_of(2) && world.model.spec.rollout.max_unavailable > 0;
    world.capacity = if tight {
        usize::try_from(replicas).expect("not negative")
    } else {
        usize::MAX
    };
    world.broken = None;
    world.retry(&seed.to_string());
    world.groups.retain(|group| !group.seen.node_lost);
    world.groups.iter_mut().for_each(|group| group.seen.requests = 0);
    world.change(&[
        ("replicas", json!(replicas)),
        ("suspend", json!(false)),
        ("parallelism.tensor", json!(2)),
    ]);
}

/// Plans until nothing more follows at this moment, and checks every plan.
fn look(world: &mut World) {
    for _ in 0..STEPS_MAX {
        let before: Vec<SeenGroup> = world.groups.iter().map(|group| group.seen.clone()).collect();
        let plan = world.step();
        check(world, &before, &plan);
        if plan.actions.is_empty() {
            return;
        }
    }
    panic!("the plan acts without end");
}

fn check(world: &World, before: &[SeenGroup], plan: &Plan) {
    let spec = &world.model.spec;
    let want = if spec.suspend {
        0
    } else {
        usize::try_from(spec.replicas).expect("not negative")
    };
    let surge = usize::try_from(spec.rollout.max_surge).expect("not negative");
    let unavailable = usize::try_from(spec.rollout.max_unavailable).expect("not negative");

    let holding = before
        .iter()
        .filter(|group| !group.node_lost && !matches!(group.phase, Phase::Failed(_)))
        .count();
    let created = plan
        .actions
        .iter()
        .filter(|action| matches!(action, Action::CreateGroup { .. }))
        .count();
    assert!(
        created == 0 || holding + created <= want + surge,
        "{holding} + {created} > {want} + {surge}"
    );

    let serving = before.iter().filter(|group| group.serves()).count();
    let drained = plan
        .actions
        .iter()
        .filter(|action| matches!(action, Action::DrainGroup { .. }))
        .count();
    let floor = want.saturating_sub(unavailable);
    assert!(
        drained == 0 || serving - drained >= floor,
        "{serving} - {drained} < {want} - {unavailable}"
    );
    let short_of_room = surge == 0 || before.iter().any(SeenGroup::is_unschedulable);
    assert!(
        drained == 0 || short_of_room || serving - drained >= want,
        "there was room for a surge"
    );
}
