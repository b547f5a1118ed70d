//! Scripted worlds and their traces, to be read like prose. Lines with `>` are the script, the others what happened.
//!
//! Sequences are letters; a's generated tokens are 100, 101, ..., b's are 200, 201, ... A line of a step reads: who, on
//! which slot, which rows (`~` before a row whose token the host has not seen), in which blocks, and which generated
//! token (`#`) comes out.

use std::collections::VecDeque;
use std::fmt::Write as _;

use swallow_schedule::{Ask, Input, Limits, Micros, Output, Scheduler, SeqId, Step, Work};

use crate::device::{ask, limits};

/// Runs the script in `golden` and compares everything.
fn check(golden: &str) {
    let golden: String = golden
        .trim()
        .lines()
        .map(|line| format!("{}\n", line.trim_start()))
        .collect();
    let mut world = World::default();
    for line in golden.lines() {
        if let Some(command) = line.strip_prefix("> ") {
            writeln!(world.trace, "> {command}").expect("strings take everything");
            world.obey(&command.split_whitespace().collect::<Vec<_>>());
        }
    }
    assert!(world.trace == golden, "the trace is now:\n{}", world.trace);
}

#[derive(Default)]
struct World {
    scheduler: Option<Scheduler>,
    in_flight: VecDeque<Step>,
    now: u64,
    trace: String,
}

impl World {
    fn obey(&mut self, command: &[&str]) {
        match command {
            ["limits", pairs @ ..] => self.scheduler = Some(Scheduler::new(read_limits(pairs))),
            ["add", name, prompt, pairs @ ..] => {
                let ask = read_ask(name, prompt, pairs);
                if let Err(refusal) = self.scheduler().add(ask) {
                    self.say(&format!("refused: {refusal}"));
                }
            }
            ["cancel", name] => self.scheduler().cancel(id_of(name)),
            ["now", time] => self.now = time.parse().expect("a time"),
            ["step"] => self.step(),
            ["commit"] => self.commit(),
            other => panic!("{other:?} is no command"),
        }
        for output in self.scheduler().take_outputs() {
            self.say(&show_output(&output));
        }
        self.scheduler().audit();
        if matches!(command, ["commit" | "step" | "cancel", ..]) {
            let load = self.scheduler().load();
            let free = load.blocks_total - load.blocks_held - load.blocks_cached;
            let (held, cached) = (load.blocks_held, load.blocks_cached);
            let (running, waiting) = (load.running, load.waiting);
            self.say(&format!(
                "= {running} running, {waiting} waiting; blocks {held} held, {cached} cached, {free} free"
            ));
        }
    }

    fn scheduler(&mut self) -> &mut Scheduler {
        self.scheduler.as_mut().expect("a script begins with its limits")
    }

    fn step(&mut self) {
        let now = Micros(self.now);
        match self.scheduler().step(now) {
            None => self.say("nothing to run"),
            Some(step) => {
                for work in &step.works {
                    self.say(&format!("{}: {}", step.id.0, show_work(work)));
                }
                self.in_flight.push_back(step);
            }
        }
    }

    fn commit(&mut self) {
        let step = self.in_flight.pop_front().expect("a step is in flight");
        let sampled: Vec<u32> = step
            .works
            .iter()
            .filter_map(|work| work.sample.map(|index| (work.seq.0 as u32 + 1) * 100 + index))
            .collect();
        self.scheduler().commit(step.id, &sampled);
    }

    fn say(&mut self, line: &str) {
        writeln!(self.trace, "{line}").expect("strings take everything");
    }
}

fn id_of(name: &str) -> SeqId {
    SeqId(u64::from(name.as_bytes()[0] - b'a'))
}

fn name_of(id: SeqId) -> char {
    char::from(b'a' + u8::try_from(id.0).expect("a letter"))
}

fn pairs<'a>(words: &'a [&'a str]) -> impl Iterator<Item = (&'a str, u32)> {
    words
        .chunks(2)
        .map(|pair| (pair[0], pair[1].parse().expect("a number")))
}

fn read_limits(words: &[&str]) -> Limits {
    let mut limits = limits();
    for (name, value) in pairs(words) {
        match name {
            "block" => limits.block_tokens = value,
            "pool" => limits.n_blocks = value,
            "running" => limits.max_running = value,
            "step" => limits.max_step_tokens = value,
            other => panic!("{other} is no limit"),
        }
    }
    limits
}

/// `1..6` are the ids 1 to 6; several ranges stand with commas between them.
fn read_ask(name: &str, prompt: &str, words: &[&str]) -> Ask {
    let ids: Vec<u32> = prompt
        .split(',')
        .flat_map(|range| {
            let (first, last) = range.split_once("..").expect("a range");
            first.parse().expect("an id")..=last.parse().expect("an id")
        })
        .collect();
    let mut ask = ask(id_of(name).0, &ids, 1);
    for (name, value) in pairs(words) {
        match name {
            "max" => ask.max_tokens = value,
            "stop" => ask.stop_ids = [value].into(),
            "deadline" => ask.deadline = Some(Micros(u64::from(value))),
            other => panic!("{other} is not asked for"),
        }
    }
    ask
}

fn show_work(work: &Work) -> String {
    let mut line = format!("{} on slot {}, ", name_of(work.seq), work.slot.0);
    match (&work.input, work.rows()) {
        (Input::LastSampled, _) => write!(line, "row ~{}", work.start),
        (_, 1) => write!(line, "row {}", work.start),
        (_, rows) => write!(line, "rows {}..{}", work.start, work.start + rows),
    }
    .expect("strings take everything");
    let blocks: Vec<String> = work.blocks.iter().map(|block| block.0.to_string()).collect();
    write!(line, ", blocks {}", blocks.join(" ")).expect("strings take everything");
    if let Some(index) = work.sample {
        write!(line, " -> #{index}").expect("strings take everything");
    }
    line
}

fn show_output(output: &Output) -> String {
    match *output {
        Output::Started { seq, cached_tokens } => {
            format!("{} started, {cached_tokens} tokens cached", name_of(seq))
        }
        Output::Token { seq, index, token } => format!("{} #{index} = {token}", name_of(seq)),
        Output::Finished { seq, why, n_tokens } => {
            format!("{} finished: {why:?}, {n_tokens} tokens", name_of(seq))
        }
    }
}

#[test]
fn prefill_runs_beside_decode() {
    check(
        "
        > limits block 4 pool 16 running 4 step 8
        > add a 1..5 max 4
        > step
          1: a on slot 0, rows 0..5, blocks 0 1 -> #0
          a started, 0 tokens cached
          = 1 running, 0 waiting; blocks 2 held, 0 cached, 14 free
        > commit
          a #0 = 100
          = 1 running, 0 waiting; blocks 2 held, 0 cached, 14 free
        > add b 10..24 max 2
        > add c 30..33 max 2
        > step
          2: a on slot 0, row 5, blocks 0 1 -> #1
          2: b on slot 1, rows 0..4, blocks 2
          2: c on slot 2, rows 0..3, blocks 3
          b started, 0 tokens cached
          c started, 0 tokens cached
          = 3 running, 0 waiting; blocks 4 held, 0 cached, 12 free
        > commit
          a #1 = 101
          = 3 running, 0 waiting; blocks 4 held, 0 cached, 12 free
        > step
          3: a on slot 0, row 6, blocks 0 1 -> #2
          3: c on slot 2, row 3, blocks 3 -> #0
          3: b on slot 1, rows 4..10, blocks 2 4 5
          = 3 running, 0 waiting; blocks 6 held, 0 cached, 10 free
        > commit
          a #2 = 102
          c #0 = 300
          = 3 running, 0 waiting; blocks 6 held, 0 cached, 10 free
        > step
          4: a on slot 0, row 7, blocks 0 1 -> #3
          4: c on slot 2, row 4, blocks 3 6 -> #1
          4: b on slot 1, rows 10..15, blocks 2 4 5 7 -> #0
          = 3 running, 0 waiting; blocks 8 held, 0 cached, 8 free
        > commit
          a #3 = 103
          a finished: Length, 4 tokens
          c #1 = 301
          c finished: Length, 2 tokens
          b #0 = 200
          = 1 running, 0 waiting; blocks 4 held, 3 cached, 9 free
        > step
          5: b on slot 1, row 15, blocks 2 4 5 7 -> #1
          = 1 running, 0 waiting; blocks 4 held, 3 cached, 9 free
        > commit
          b #1 = 201
          b finished: Length, 2 tokens
          = 0 running, 0 waiting; blocks 0 held, 7 cached, 9 free
        > step
          nothing to run
          = 0 running, 0 waiting; blocks 0 held, 7 cached, 9 free
        ",
    );
}

#[test]
fn a_cached_prefix_is_not_computed_again() {
    check(
        "
        > limits block 4 pool 16 running 4 step 32
        > add a 1..10 max 1
        > step
          1: a on slot 0, rows 0..10, blocks 0 1 2 -> #0
          a started, 0 tokens cached
          = 1 running, 0 waiting; blocks 3 held, 0 cached, 13 free
        > commit
          a #0 = 100
          a finished: Length, 1 tokens
          = 0 running, 0 waiting; blocks 0 held, 2 cached, 14 free
        > add b 1..10 max 2
        > add c 1..6,60..65 max 1
        > step
          2: b on slot 0, rows 8..10, blocks 0 1 2 -> #0
          2: c on slot 1, rows 4..12, blocks 0 3 4 -> #0
          b started, 8 tokens cached
          c started, 4 tokens cached
          = 2 running, 0 waiting; blocks 5 held, 0 cached, 11 free
        > commit
          b #0 = 200
          c #0 = 300
          c finished: Length, 1 tokens
          = 1 running, 0 waiting; blocks 3 held, 2 cached, 11 free
        > step
          3: b on slot 0, row 10, blocks 0 1 2 -> #1
          = 1 running, 0 waiting; blocks 3 held, 2 cached, 11 free
        > commit
          b #1 = 201
          b finished: Length, 2 tokens
          = 0 running, 0 waiting; blocks 0 held, 4 cached, 12 free
        ",
    );
}

#[test]
fn candidates_wait_for_the_prefix_that_one_of_them_computes() {
    check(
        "
        > limits block 4 pool 16 running 4 step 6
        > add a 1..10 max 1
        > add b 1..10 max 1
        > step
          1: a on slot 0, rows 0..6, blocks 0 1
          a started, 0 tokens cached
          = 2 running, 0 waiting; blocks 2 held, 0 cached, 14 free
        > commit
          = 2 running, 0 waiting; blocks 2 held, 0 cached, 14 free
        > step
          2: a on slot 0, rows 6..10, blocks 0 1 2 -> #0
          = 2 running, 0 waiting; blocks 3 held, 0 cached, 13 free
        > commit
          a #0 = 100
          a finished: Length, 1 tokens
          = 1 running, 0 waiting; blocks 1 held, 1 cached, 14 free
        > step
          3: b on slot 1, rows 8..10, blocks 0 1 2 -> #0
          b started, 8 tokens cached
          = 1 running, 0 waiting; blocks 3 held, 0 cached, 13 free
        > commit
          b #0 = 200
          b finished: Length, 1 tokens
          = 0 running, 0 waiting; blocks 0 held, 2 cached, 14 free
        > step
          nothing to run
          = 0 running, 0 waiting; blocks 0 held, 2 cached, 14 free
        ",
    );
}

#[test]
fn the_newest_gives_way_when_memory_runs_out() {
    check(
        "
        > limits block 2 pool 5 running 4 step 8
        > add a 1..3 max 6
        > add b 11..12 max 4
        > step
          1: a on slot 0, rows 0..3, blocks 0 1 -> #0
          1: b on slot 1, rows 0..2, blocks 2 -> #0
          a started, 0 tokens cached
          b started, 0 tokens cached
          = 2 running, 0 waiting; blocks 3 held, 0 cached, 2 free
        > commit
          a #0 = 100
          b #0 = 200
          = 2 running, 0 waiting; blocks 3 held, 0 cached, 2 free
        > step
          2: a on slot 0, row 3, blocks 0 1 -> #1
          2: b on slot 1, row 2, blocks 2 3 -> #1
          = 2 running, 0 waiting; blocks 4 held, 0 cached, 1 free
        > commit
          a #1 = 101
          b #1 = 201
          = 2 running, 0 waiting; blocks 4 held, 0 cached, 1 free
        > step
          3: a on slot 0, row 4, blocks 0 1 4 -> #2
          3: b on slot 1, row 3, blocks 2 3 -> #2
          = 2 running, 0 waiting; blocks 5 held, 0 cached, 0 free
        > commit
          a #2 = 102
          b #2 = 202
          = 2 running, 0 waiting; blocks 5 held, 0 cached, 0 free
        > step
          4: a on slot 0, row 5, blocks 0 1 4 -> #3
          = 1 running, 1 waiting; blocks 3 held, 2 cached, 0 free
        > commit
          a #3 = 103
          = 1 running, 1 waiting; blocks 3 held, 2 cached, 0 free
        > step
          5: a on slot 0, row 6, blocks 0 1 4 3 -> #4
          = 1 running, 1 waiting; blocks 4 held, 1 cached, 0 free
        > commit
          a #4 = 104
          = 1 running, 1 waiting; blocks 4 held, 1 cached, 0 free
        > step
          6: a on slot 0, row 7, blocks 0 1 4 3 -> #5
          = 1 running, 1 waiting; blocks 4 held, 1 cached, 0 free
        > commit
          a #5 = 105
          a finished: Length, 6 tokens
          = 0 running, 1 waiting; blocks 0 held, 5 cached, 0 free
        > step
          7: b on slot 0, rows 2..5, blocks 2 3 4 -> #3
          = 1 running, 0 waiting; blocks 3 held, 2 cached, 0 free
        > commit
          b #3 = 203
          b finished: Length, 4 tokens
          = 0 running, 0 waiting; blocks 0 held, 4 cached, 1 free
        ",
    );
}

#[test]
fn a_cancelled_sequence_leaves_when_its_step_is_committed() {
    check(
        "
        > limits block 4 pool 8 running 1 step 8
        > add a 1..6 max 9
        > add b 21..26 max 1
        > step
          1: a on slot 0, rows 0..6, blocks 0 1 -> #0
          a started, 0 tokens cached
          = 1 running, 1 waiting; blocks 2 held, 0 cached, 6 free
        > cancel a
          a finished: Cancelled, 0 tokens
          = 1 running, 1 waiting; blocks 2 held, 0 cached, 6 free
        > step
          nothing to run
          = 1 running, 1 waiting; blocks 2 held, 0 cached, 6 free
        > commit
          = 0 running, 1 waiting; blocks 0 held, 1 cached, 7 free
        > step
          2: b on slot 0, rows 0..6, blocks 1 2 -> #0
          b started, 0 tokens cached
          = 1 running, 0 waiting; blocks 2 held, 1 cached, 5 free
        > commit
          b #0 = 200
          b finished: Length, 1 tokens
          = 0 running, 0 waiting; blocks 0 held, 2 cached, 6 free
        > step
          nothing to run
          = 0 running, 0 waiting; blocks 0 held, 2 cached, 6 free
        ",
    );
}

#[test]
fn with_lag_the_device_feeds_itself_and_surplus_is_dropped() {
    check(
        "
        > limits block 4 pool 8 running 2 step 8
        > add a 1..3 max 3
        > add b 21..23 max 9 stop 201
        > step
          1: a on slot 0, rows 0..3, blocks 0 -> #0
          1: b on slot 1, rows 0..3, blocks 1 -> #0
          a started, 0 tokens cached
          b started, 0 tokens cached
          = 2 running, 0 waiting; blocks 2 held, 0 cached, 6 free
        > step
          2: a on slot 0, row ~3, blocks 0 -> #1
          2: b on slot 1, row ~3, blocks 1 -> #1
          = 2 running, 0 waiting; blocks 2 held, 0 cached, 6 free
        > step
          nothing to run
          = 2 running, 0 waiting; blocks 2 held, 0 cached, 6 free
        > commit
          a #0 = 100
          b #0 = 200
          = 2 running, 0 waiting; blocks 2 held, 0 cached, 6 free
        > step
          3: a on slot 0, row ~4, blocks 0 2 -> #2
          3: b on slot 1, row ~4, blocks 1 3 -> #2
          = 2 running, 0 waiting; blocks 4 held, 0 cached, 4 free
        > commit
          a #1 = 101
          b #1 = 201
          b finished: Stop, 2 tokens
          = 2 running, 0 waiting; blocks 4 held, 0 cached, 4 free
        > step
          nothing to run
          = 2 running, 0 waiting; blocks 4 held, 0 cached, 4 free
        > commit
          a #2 = 102
          a finished: Length, 3 tokens
          = 0 running, 0 waiting; blocks 0 held, 2 cached, 6 free
        > step
          nothing to run
          = 0 running, 0 waiting; blocks 0 held, 2 cached, 6 free
        ",
    );
}

#[test]
fn with_lag_a_victim_in_flight_is_held_back_first() {
    check(
        "
        > limits block 2 pool 6 running 4 step 8
        > add a 1..3 max 6
        > add b 11..12 max 6
        > step
          1: a on slot 0, rows 0..3, blocks 0 1 -> #0
          1: b on slot 1, rows 0..2, blocks 2 -> #0
          a started, 0 tokens cached
          b started, 0 tokens cached
          = 2 running, 0 waiting; blocks 3 held, 0 cached, 3 free
        > step
          2: a on slot 0, row ~3, blocks 0 1 -> #1
          2: b on slot 1, row ~2, blocks 2 3 -> #1
          = 2 running, 0 waiting; blocks 4 held, 0 cached, 2 free
        > commit
          a #0 = 100
          b #0 = 200
          = 2 running, 0 waiting; blocks 4 held, 0 cached, 2 free
        > step
          3: a on slot 0, row ~4, blocks 0 1 4 -> #2
          3: b on slot 1, row ~3, blocks 2 3 -> #2
          = 2 running, 0 waiting; blocks 5 held, 0 cached, 1 free
        > commit
          a #1 = 101
          b #1 = 201
          = 2 running, 0 waiting; blocks 5 held, 0 cached, 1 free
        > step
          4: a on slot 0, row ~5, blocks 0 1 4 -> #3
          4: b on slot 1, row ~4, blocks 2 3 5 -> #3
          = 2 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        > commit
          a #2 = 102
          b #2 = 202
          = 2 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        > step
          nothing to run
          = 2 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        > commit
          a #3 = 103
          b #3 = 203
          = 2 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        > step
          5: a on slot 0, row 6, blocks 0 1 4 5 -> #4
          = 1 running, 1 waiting; blocks 4 held, 2 cached, 0 free
        > commit
          a #4 = 104
          = 1 running, 1 waiting; blocks 4 held, 2 cached, 0 free
        ",
    );
}

#[test]
fn with_lag_memory_that_comes_back_is_waited_for() {
    check(
        "
        > limits block 2 pool 6 running 4 step 8
        > add c 31..31 max 9 stop 301
        > add b 11..12 max 4
        > add a 1..1 max 9
        > step
          1: c on slot 0, row 0, blocks 0 -> #0
          1: a on slot 2, row 0, blocks 1 -> #0
          1: b on slot 1, rows 0..2, blocks 2 -> #0
          c started, 0 tokens cached
          a started, 0 tokens cached
          b started, 0 tokens cached
          = 3 running, 0 waiting; blocks 3 held, 0 cached, 3 free
        > step
          2: c on slot 0, row ~1, blocks 0 -> #1
          2: b on slot 1, row ~2, blocks 2 3 -> #1
          2: a on slot 2, row ~1, blocks 1 -> #1
          = 3 running, 0 waiting; blocks 4 held, 0 cached, 2 free
        > commit
          c #0 = 300
          a #0 = 100
          b #0 = 200
          = 3 running, 0 waiting; blocks 4 held, 0 cached, 2 free
        > step
          3: c on slot 0, row ~2, blocks 0 4 -> #2
          3: b on slot 1, row ~3, blocks 2 3 -> #2
          3: a on slot 2, row ~2, blocks 1 5 -> #2
          = 3 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        > commit
          c #1 = 301
          c finished: Stop, 2 tokens
          b #1 = 201
          a #1 = 101
          = 3 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        > step
          4: a on slot 2, row ~3, blocks 1 5 -> #3
          = 3 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        > commit
          b #2 = 202
          a #2 = 102
          = 2 running, 0 waiting; blocks 4 held, 1 cached, 1 free
        > step
          5: b on slot 1, row 4, blocks 2 3 4 -> #3
          5: a on slot 2, row ~4, blocks 1 5 0 -> #4
          = 2 running, 0 waiting; blocks 6 held, 0 cached, 0 free
        ",
    );
}

#[test]
fn a_deadline_ends_who_waits_and_who_runs() {
    check(
        "
        > limits block 4 pool 8 running 1 step 8
        > add a 1..3 max 9 deadline 30
        > add b 21..23 max 9 deadline 20
        > step
          1: a on slot 0, rows 0..3, blocks 0 -> #0
          a started, 0 tokens cached
          = 1 running, 1 waiting; blocks 1 held, 0 cached, 7 free
        > commit
          a #0 = 100
          = 1 running, 1 waiting; blocks 1 held, 0 cached, 7 free
        > now 20
        > step
          2: a on slot 0, row 3, blocks 0 -> #1
          b finished: Deadline, 0 tokens
          = 1 running, 0 waiting; blocks 1 held, 0 cached, 7 free
        > now 30
        > step
          nothing to run
          a finished: Deadline, 1 tokens
          = 1 running, 0 waiting; blocks 1 held, 0 cached, 7 free
        > commit
          = 0 running, 0 waiting; blocks 0 held, 1 cached, 7 free
        ",
    );
}
