//! What planning costs, printed for whoever looks (`--nocapture`); a shared machine is no place for a limit in time.

use std::time::{Duration, Instant};

use swallow_schedule::{Limits, Scheduler};

use crate::device::{NOW, ask, limits};
use crate::engine::text;

#[test]
fn a_full_batch_is_planned_quickly() {
    let mut scheduler = Scheduler::new(Limits {
        block_tokens: 16,
        n_blocks: 40_000,
        max_running: 256,
        max_step_tokens: 2048,
        max_model_len: 8192,
        max_waiting: 1024,
        ..limits()
    });
    for id in 0..512 {
        // A system prompt that everybody shares, and a question.
        let mut prompt = text(1, 1024);
        prompt.extend(text(id + 2, 1024));
        scheduler.add(ask(u64::from(id), &prompt, 128)).expect("it fits");
    }
    let (mut planning, mut committing) = (Duration::ZERO, Duration::ZERO);
    let (mut n_steps, mut n_rows, mut n_works) = (0_u32, 0_u32, 0);
    let begin = Instant::now();
    while !scheduler.is_idle() {
        let before = Instant::now();
        let step = scheduler.step(NOW).expect("there is work until it is idle");
        planning += before.elapsed();
        n_steps += 1;
        n_works += step.works.len();
        n_rows += step.works.iter().map(swallow_schedule::Work::rows).sum::<u32>();
        let sampled: Vec<u32> = step.works.iter().filter_map(|work| work.sample).collect();
        let before = Instant::now();
        scheduler.commit(step.id, &sampled);
        committing += before.elapsed();
        scheduler.take_outputs();
    }
    let load = scheduler.load();
    println!(
        "{n_steps} steps, {n_works} works, {n_rows} rows in {:?}: plan {:?}, commit {:?} a step; {} of {} prefix tokens hit",
        begin.elapsed(),
        planning / n_steps,
        committing / n_steps,
        load.prefix_hit_tokens,
        load.prefix_query_tokens,
    );
    assert_eq!(load.blocks_held, 0);
    assert_eq!(load.preemptions, 0);
    assert!(
        load.prefix_hit_tokens >= 511 * 1024 / 2,
        "the system prompt is shared"
    );
}
