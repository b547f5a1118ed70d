//! What was measured, as JSON lines while it runs and as a table at its end.

use nix::sys::resource::{Resource, getrlimit};
use serde_json::json;

use super::load::Measured;

/// Beyond this times a bare relay's cost the router is too dear.
const RATIO_MAX: f64 = 1.4;
/// File descriptors that are not clients'.
const OTHER_FILES: usize = 500;

/// What is aimed at, at most.
#[derive(Clone, Copy)]
pub struct Target(pub f64);

/// The table in the making.
#[derive(Default)]
pub struct Report {
    rows: Vec<[String; 6]>,
}

impl Report {
    /// Whoever reads the figures has to know where they come from.
    pub fn machine(&mut self) {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let names = cpus.lines().filter_map(|line| line.strip_prefix("model name"));
        let cpu = names.map(|name| name.trim_start_matches([' ', '\t', ':'])).next();
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        println!(
            "{}",
            json!({"cpu": cpu, "cores": cores, "load": load_average(), "open_files_max": open_files()})
        );
    }

    /// As many as there may be files for in each process, and says so if that is fewer.
    pub fn within_files(&self, wanted: usize) -> usize {
        let room = open_files().saturating_sub(OTHER_FILES);
        if room < wanted {
            println!(
                "{}",
                json!({"note": "fewer streams than aimed at: `ulimit -n` is in the way", "streams": room, "aimed_at": wanted})
            );
        }
        wanted.min(room)
    }

    /// CPU time for each request or token, beside the relay's.
    pub fn cost(&mut self, case: &str, aim: f64, router: &Measured, relay: &Measured) {
        let each = |of: &Measured| of.cpu_seconds * 1e6 / of.units.max(1) as f64;
        let (own, bare) = (each(router), each(relay));
        let ratio = own / bare;
        println!(
            "{}",
            json!({"case": case, "router_us": own, "relay_us": bare, "ratio": ratio, "aim_us": aim,
                "router": router, "relay": relay, "load": load_average()})
        );
        self.rows.push([
            case.to_owned(),
            format!("{own:.1} us"),
            format!("{bare:.1} us"),
            format!("{ratio:.2}"),
            format!("{aim} us, {RATIO_MAX}"),
            verdict(own <= aim && ratio <= RATIO_MAX),
        ]);
    }

    /// A figure without a relay's beside it.
    pub fn plain(&mut self, case: &str, value: f64, unit: &str, Target(aim): Target) {
        println!(
            "{}",
            json!({"case": case, "value": value, "unit": unit, "aim": aim, "load": load_average()})
        );
        self.rows.push([
            case.to_owned(),
            format!("{value:.2} {unit}"),
            String::new(),
            String::new(),
            format!("{aim} {unit}"),
            verdict(value <= aim),
        ]);
    }

    /// All of it, in the order measured.
    pub fn table(&self) {
        println!("\n| case | router | bare relay | ratio | at most | met |\n|---|---|---|---|---|---|");
        for row in &self.rows {
            println!("| {} |", row.join(" | "));
        }
    }
}

fn verdict(met: bool) -> String {
    if met { "yes" } else { "no" }.to_owned()
}

/// Runnable processes of the last minute: others on the machine make latencies longer and batches larger.
fn load_average() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// How many files a process may open once it asks for as many as it may.
fn open_files() -> usize {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(_, hard)| usize::try_from(hard).unwrap_or(usize::MAX))
}
