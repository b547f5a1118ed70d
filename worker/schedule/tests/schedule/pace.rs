//! Time between tokens while prompts come in, in worlds whose steps cost what the scheduler has to find out.
//!
//! A world has a hidden cost: weights that are read whatever the rows, unless the rows' arithmetic takes longer; pairs of
//! attention; context of decode rows; noise, and a drift. The scheduler sees nothing of it but how long its steps took.

use std::collections::{BTreeMap, VecDeque};

use swallow_schedule::{CostModel, Limits, Micros, Output, Pace, Scheduler, SeqId, Step, StepCost};

use crate::device::{NOW, ask, limits};
use crate::engine::text;

const SEED: u64 = 7;
/// As a server has it.
const ROWS_MIN: u32 = 128;

/// Microseconds.
#[derive(Clone, Copy, Debug)]
struct World {
    weights: f64,
    row: f64,
    pair: f64,
    context: f64,
    /// Standard deviation, relative.
    noise: f64,
    /// How much slower everything is in the end, relative.
    drift: f64,
    target_ms: u64,
    lag: usize,
}

/// A GPU with an 8B model.
const GPU: World = World {
    weights: 4_000.0,
    row: 21.0,
    pair: 0.0008,
    context: 0.031,
    noise: 0.02,
    drift: 0.0,
    target_ms: 50,
    lag: 1,
};

impl World {
    fn micros(&self, step: &Step) -> f64 {
        let (mut rows, mut pairs, mut context) = (0.0, 0.0, 0.0);
        for work in &step.works {
            let (start, n) = (f64::from(work.start), f64::from(work.rows()));
            rows += n;
            if n > 1.0 {
                pairs += n * start + n * (n + 1.0) / 2.0;
            } else {
                context += start + 1.0;
            }
        }
        500.0 + self.weights.max(self.row * rows) + self.pair * pairs + self.context * context
    }

    fn limits() -> Limits {
        Limits {
            block_tokens: 16,
            n_blocks: 40_000,
            max_running: 64,
            max_step_tokens: 8192,
            max_model_len: 10_000,
            max_waiting: 4096,
            prefix_cache: false,
            ..limits()
        }
    }
}

/// What a world saw.
#[derive(Debug, Default)]
struct Seen {
    /// Milliseconds between a stream's tokens, in order of time.
    gaps: Vec<f64>,
    /// Milliseconds and prefill rows of steps with decoding that left prefill undone.
    bound: Vec<(f64, u32)>,
    /// Relative errors of predictions of steps with prefill.
    errors: Vec<f64>,
    /// Milliseconds in all.
    whole: f64,
}

fn percentile(of: &[f64], share: f64) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// Runs requests that come as fast as others leave; `known` steps are measured at the start.
fn run(world: World, pace: bool, known: &[(u64, u64)], random: &mut fastrand::Rng) -> Seen {
    const REQUESTS: u64 = 600;
    let mut scheduler = Scheduler::new(World::limits());
    if pace {
        let mut costs = CostModel::new();
        for &(start, rows) in known {
            let step = single(start, rows);
            costs.begin_with(&StepCost::of(&step), Micros(world.micros(&step) as u64));
        }
        scheduler.set_pace(Pace {
            target: Micros(world.target_ms * 1000),
            rows_min: ROWS_MIN,
            costs,
        });
    }
    let (mut next, mut seen, mut now) = (0, Seen::default(), 0.0);
    let mut flights: VecDeque<(Step, bool)> = VecDeque::new();
    let mut last: BTreeMap<SeqId, f64> = BTreeMap::new();
    loop {
        while next < REQUESTS && scheduler.load().running + scheduler.load().waiting < 48 {
            let prompt = text(next as u32, random.u32(16..4000));
            scheduler
                .add(ask(next, &prompt, random.u32(2..200)))
                .expect("it fits");
            next += 1;
        }
        let planned = scheduler.step(NOW);
        let none = planned.is_none();
        let more = scheduler.load().pending_prefill_tokens > 0;
        flights.extend(planned.map(|step| (step, more)));
        if flights.len() <= world.lag && !none {
            continue;
        }
        let Some((step, bound)) = flights.pop_front() else {
            break;
        };
        let progress = next as f64 / REQUESTS as f64;
        // The sum of twelve even draws is as good as normal.
        let normal: f64 = (0..12).map(|_| random.f64()).sum::<f64>() - 6.0;
        let factor = (1.0 + world.noise * normal) * (1.0 + world.drift * progress);
        let took = world.micros(&step) * factor.max(0.2);
        now += took / 1e3;
        let decodes = step
            .works
            .iter()
            .any(|work| work.sample.is_some_and(|index| index > 0));
        let prefill: u32 = step
            .works
            .iter()
            .map(swallow_schedule::Work::rows)
            .filter(|&rows| rows > 1)
            .sum();
        if decodes && prefill > 0 {
            if let Some(predicted) = scheduler.predict(&step) {
                seen.errors.push((predicted.0 as f64 / took - 1.0).abs());
            }
            if bound {
                seen.bound.push((took / 1e3, prefill));
            }
        }
        scheduler.learn(&step, Micros(took as u64));
        let sampled: Vec<u32> = step.works.iter().filter_map(|work| work.sample).collect();
        scheduler.commit(step.id, &sampled);
        for output in scheduler.take_outputs() {
            match output {
                Output::Token { seq, .. } => {
                    if let Some(before) = last.insert(seq, now) {
                        seen.gaps.push(now - before);
                    }
                }
                Output::Finished { seq, .. } => drop(last.remove(&seq)),
                Output::Started { .. } => {}
            }
        }
    }
    assert!(scheduler.is_idle());
    seen.whole = now;
    seen
}

/// A step of one sequence's rows alone.
fn single(start: u64, rows: u64) -> Step {
    let mut scheduler = Scheduler::new(World::limits());
    scheduler.add(ask(0, &text(0, rows as u32), 2)).expect("it fits");
    let mut step = scheduler.step(NOW).expect("it runs");
    step.works[0].start = start as u32;
    step
}

/// Starts and rows that a server measures before its first request.
const KNOWN: [(u64, u64); 8] = [
    (0, 16),
    (0, 128),
    (0, 512),
    (0, 2048),
    (4000, 128),
    (4000, 2048),
    (0, 1),
    (4000, 1),
];

fn check(world: World, known: &[(u64, u64)], random: &mut fastrand::Rng) {
    let seen = run(world, true, known, random);
    let target = world.target_ms as f64;
    // What came while nothing was known is no failure of the model.
    let gaps = &seen.gaps[seen.gaps.len() / 20..];
    let p99 = percentile(gaps, 0.99);
    assert!(
        p99 <= 1.1 * target,
        "p99 {p99:.1} ms, target {target} ms: {world:?}"
    );
    let settled = &seen.bound[seen.bound.len() / 4..];
    let used: Vec<f64> = settled
        .iter()
        .filter(|(_, prefill)| *prefill > 128)
        .map(|(ms, _)| ms / target)
        .collect();
    assert!(used.len() > 20, "{} steps were bound: {world:?}", used.len());
    let mean = used.iter().sum::<f64>() / used.len() as f64;
    assert!(mean >= 0.9, "bound steps use {mean:.2} of the target: {world:?}");
    let error = percentile(&seen.errors[seen.errors.len() / 4..], 0.5);
    assert!(
        error <= 0.02 + 1.2 * world.noise,
        "half of all errors are below {error:.3}: {world:?}"
    );
}

#[test]
fn a_gpu_keeps_its_target_and_uses_it() {
    println!("seed {SEED}");
    let mut random = fastrand::Rng::with_seed(SEED);
    check(GPU, &KNOWN, &mut random);
}

#[test]
fn without_a_pace_streams_stall() {
    let mut random = fastrand::Rng::with_seed(SEED);
    let seen = run(GPU, false, &[], &mut random);
    let worst = percentile(&seen.gaps, 0.999);
    assert!(worst > 150.0, "this world needs no bound: {worst:.1} ms");
    assert!(seen.errors.is_empty(), "nothing is predicted without a pace");
    let bound = run(GPU, true, &KNOWN, &mut fastrand::Rng::with_seed(SEED));
    // Shorter steps read the weights more often; that is all they may cost.
    assert!(
        bound.whole < 1.15 * seen.whole,
        "{} ms, {} without",
        bound.whole,
        seen.whole
    );
}

#[test]
fn every_world_keeps_its_target() {
    println!("seed {SEED}");
    for n in 0..40 {
        let mut random = fastrand::Rng::with_seed(SEED + n);
        let target_ms = random.u64(15..200);
        let share = |random: &mut fastrand::Rng, least: f64, most: f64| {
            target_ms as f64 * 1e3 * (least + (most - least) * random.f64())
        };
        let world = World {
            weights: share(&mut random, 0.02, 0.3),
            // Some thousand rows fill a step, or as few as four hundred.
            row: share(&mut random, 1.0 / 4000.0, 1.0 / 400.0),
            pair: share(&mut random, 0.0, 0.3) / 4e6,
            // All contexts together.
            context: share(&mut random, 0.0, 0.3) / (48.0 * 4000.0),
            noise: 0.05 * random.f64(),
            drift: 0.5 * random.f64() - 0.2,
            target_ms,
            lag: random.usize(0..2),
        };
        let known = if random.bool() { &KNOWN[..] } else { &[] };
        check(world, known, &mut random);
    }
}

#[test]
fn a_slow_device_has_128_rows_of_prefill_whatever_they_cost() {
    let world = World {
        weights: 40_000.0,
        row: 2_000.0,
        ..GPU
    };
    let seen = run(world, true, &KNOWN, &mut fastrand::Rng::with_seed(SEED));
    assert!(seen.bound.iter().all(|&(_, prefill)| prefill <= 128));
    let whole = seen.bound.iter().filter(|&&(_, prefill)| prefill == 128).count();
    assert!(whole > seen.bound.len() / 2, "{whole} of {}", seen.bound.len());
}

#[test]
fn nothing_is_bound_while_nothing_decodes() {
    let mut scheduler = Scheduler::new(World::limits());
    scheduler.set_pace(Pace {
        target: Micros(1),
        rows_min: ROWS_MIN,
        costs: CostModel::new(),
    });
    for id in 0..3 {
        scheduler
            .add(ask(id, &text(id as u32, 4000), 4))
            .expect("it fits");
    }
    let rows = |step: &Step| step.works.iter().map(swallow_schedule::Work::rows).sum::<u32>();
    let first = scheduler.step(NOW).expect("prefill");
    assert_eq!(rows(&first), 8192, "three prompts, and no stream");
    let second = scheduler.step(NOW).expect("a step ahead");
    let decoding = second.works.iter().filter(|work| work.rows() == 1).count() as u32;
    assert!(decoding > 0, "whoever is done with its prompt decodes");
    assert_eq!(rows(&second) - decoding, 128, "nothing is known of costs");
}

#[test]
fn a_pace_that_never_binds_changes_nothing() {
    let steps = |pace: Option<Pace>| {
        let mut scheduler = Scheduler::new(World::limits());
        pace.into_iter().for_each(|pace| scheduler.set_pace(pace));
        let mut random = fastrand::Rng::with_seed(SEED);
        for id in 0..40 {
            let prompt = text(id as u32, random.u32(1..3000));
            scheduler
                .add(ask(id, &prompt, random.u32(1..20)))
                .expect("it fits");
        }
        let mut steps = Vec::new();
        while let Some(step) = scheduler.step(NOW) {
            let sampled: Vec<u32> = step.works.iter().filter_map(|work| work.sample).collect();
            scheduler.commit(step.id, &sampled);
            steps.push(step);
        }
        steps
    };
    let mut costs = CostModel::new();
    costs.begin_with(&StepCost::of(&single(0, 8192)), Micros(1));
    let loose = Pace {
        target: Micros(u64::MAX),
        rows_min: ROWS_MIN,
        costs,
    };
    assert_eq!(steps(Some(loose)), steps(None));
}
