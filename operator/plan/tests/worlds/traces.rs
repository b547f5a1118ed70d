//! Scripted worlds and what the plan does in them, as text that reads like prose.
//!
//! A script is the lines that begin with `>`; the lines between them are what happened. `UPDATE_TRACES=1 cargo test
//! --release -p swallow-plan --test worlds` writes them anew, for the diff to be read.

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::Path};

use crate::world::{World, seconds};
use serde_json::{Value, json};
use swallow_plan::{
    Timestamp,
    model::{ConditionStatus, GroupReason},
};

/// A world that does not come to rest in this time never will.
const SETTLE_SECONDS: i64 = 10_000;

struct Trace {
    world: World,
    start: Timestamp,
    text: String,
    told: BTreeMap<String, (ConditionStatus, String)>,
    /// Revisions by the letter that stands for them.
    revisions: Vec<String>,
}

impl Trace {
    fn new() -> Self {
        let world = World::new();
        let start = world.now;
        Self {
            world,
            start,
            text: String::new(),
            told: BTreeMap::new(),
            revisions: Vec::new(),
        }
    }

    /// Plans until nothing more follows at this moment, and writes down what happened.
    fn plan(&mut self) {
        for _ in 0..8 {
            let plan = self.world.step();
            if let Some(revision) = &plan.status.update_revision
                && !self.revisions.contains(revision)
            {
                self.revisions.push(revision.clone());
            }
            for action in &plan.actions {
                self.write(&action.to_string());
            }
            for condition in &plan.status.conditions {
                let now = (condition.status, condition.reason.clone());
                if self.told.insert(condition.kind.clone(), now.clone()) != Some(now) {
                    let colon = if condition.message.is_empty() { "" } else { ": " };
                    let Condition {
                        kind,
                        reason,
                        message,
                        ..
                    } = condition.into();
                    self.write(&format!(
                        "  {kind} {:?}, {reason}{colon}{message}",
                        condition.status
                    ));
                }
            }
            if plan.actions.is_empty() {
                return;
            }
        }
        panic!("the plan acts without end:\n{}", self.text);
    }

    fn write(&mut self, line: &str) {
        let passed = seconds(self.start, self.world.now);
        let mut line = format!("{:02}:{:02} {line}", passed / 60, passed % 60);
        for (i, revision) in self.revisions.iter().enumerate() {
            let letter = char::from(b'A' + u8::try_from(i).expect("few revisions"));
            line = line.replace(revision.as_str(), &letter.to_string());
        }
        writeln!(self.text, "{line}").expect("writing to memory does not fail");
    }

    fn run(&mut self, seconds: i64) {
        self.plan();
        for _ in 0..seconds {
            self.world.pass();
            self.plan();
        }
    }

    /// Lets time pass until the plan calls the world settled.
    fn settle(&mut self) {
        self.plan();
        for _ in 0..SETTLE_SECONDS {
            let settled = self
                .told
                .get("Settled")
                .is_some_and(|(status, _)| *status == ConditionStatus::True);
            let gone = self.world.model.metadata.deletion_timestamp.is_some() && self.world.groups.is_empty();
            if settled || gone {
                return;
            }
            self.world.pass();
            self.plan();
        }
        panic!("the world does not come to rest:\n{}", self.text);
    }

    fn real_name(&self, name: &str) -> String {
        self.revisions
            .iter()
            .enumerate()
            .fold(name.to_owned(), |name, (i, revision)| {
                let letter = char::from(b'A' + u8::try_from(i).expect("few revisions"));
                name.replace(&format!("m-{letter}-"), &format!("m-{revision}-"))
            })
    }

    fn command(&mut self, command: &str) {
        let words: Vec<&str> = command.split_whitespace().collect();
        let now = self.world.now;
        match words[..] {
            ["set", ref fields @ ..] => {
                let fields: Vec<(&str, Value)> = fields
                    .iter()
                    .map(|field| field.split_once('=').expect("set takes PATH=VALUE"))
                    .map(|(path, value)| (path, serde_json::from_str(value).unwrap_or_else(|_| json!(value))))
                    .collect();
                self.world.change(&fields);
            }
            ["run", seconds] => self.run(seconds.parse().expect("run takes seconds")),
            ["settle"] => self.settle(),
            ["crash", name, ref message @ ..] => {
                let name = self.real_name(name);
                let group = self.world.group(&name).expect("crash names a group");
                group.fail(GroupReason::Crashed, &message.join(" "), now);
            }
            ["busy", name, requests] => {
                let name = self.real_name(name);
                let group = self.world.group(&name).expect("busy names a group");
                group.seen.requests = requests.parse().expect("busy takes a number");
            }
            ["lose-node-of", name] => {
                let name = self.real_name(name);
                self.world
                    .group(&name)
                    .expect("lose-node-of names a group")
                    .seen
                    .node_lost = true;
            }
            ["room-for", groups] => self.world.capacity = groups.parse().expect("room-for takes a number"),
            ["files-are", "broken"] => self.world.broken = Some(GroupReason::BadCheckpoint),
            ["start", "crashes"] => self.world.broken = Some(GroupReason::Crashed),
            ["start", "stalls"] => self.world.stalled = true,
            ["start", "works"] | ["files-are", "good"] => {
                self.world.broken = None;
                self.world.stalled = false;
            }
            ["retry", value] => self.world.retry(value),
            ["delete"] => self.world.delete(),
            _ => panic!("unknown command: {command}"),
        }
    }
}

/// The parts of a condition that a trace shows.
struct Condition<'a> {
    kind: &'a str,
    reason: &'a str,
    message: &'a str,
}

impl<'a> From<&'a swallow_plan::model::Condition> for Condition<'a> {
    fn from(condition: &'a swallow_plan::model::Condition) -> Self {
        Self {
            kind: &condition.kind,
            reason: &condition.reason,
            message: &condition.message,
        }
    }
}

fn check(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/traces")
        .join(format!("{name}.txt"));
    let expected = fs::read_to_string(&path).expect("the trace is there");
    let mut trace = Trace::new();
    for line in expected.lines().filter(|line| line.starts_with(['>', '#'])) {
        writeln!(trace.text, "{line}").expect("writing to memory does not fail");
        if let Some(command) = line.strip_prefix('>') {
            trace.command(command.trim());
        }
    }
    if env::var_os("UPDATE_TRACES").is_some() {
        fs::write(&path, &trace.text).expect("the trace can be written");
        return;
    }
    let differs = expected
        .lines()
        .zip(trace.text.lines())
        .position(|(expected, found)| expected != found);
    let at = differs.unwrap_or(expected.lines().count().min(trace.text.lines().count())) + 1;
    assert!(
        expected == trace.text,
        "{name}.txt differs from line {at} on; what happened:\n{}",
        trace.text
    );
}

macro_rules! traces {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { check(stringify!($name)); })*
        const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

traces!(
    create,
    scale,
    change,
    change_without_surge,
    change_without_room,
    change_to_broken_files,
    suspend,
    delete,
    crash,
    crash_loop,
    stall,
    lost_node,
    invalid,
);

#[test]
fn every_trace_is_checked() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces");
    for entry in fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("it can be read").path();
        let name = path
            .file_stem()
            .and_then(|name| name.to_str())
            .expect("names are UTF-8")
            .to_owned();
        assert!(NAMES.contains(&name.as_str()), "{name}.txt is checked by no test");
    }
}
