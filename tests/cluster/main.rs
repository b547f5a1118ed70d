//! What the house promises on a real Kubernetes: two nodes, the released images, the chart, real kubectl and helm.
//!
//! One cluster serves the whole run. Scenarios run one after the other, each in a namespace of its own, because two
//! cores leave no room for more; each waits for conditions. `--list` names them, words select by name. `--keep` leaves the
//! cluster up, `--reuse` takes one that is up. `--bench` measures the operator with 500 models instead.

mod bench;
mod harness;
mod scenarios;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use harness::{Cluster, Form, Space};
use scenarios::SCENARIOS;

/// What a scenario starts from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Two nodes with the images.
    Cluster,
    /// The operator too, as the chart installs it.
    Operator,
}

/// A promise and how it is tried.
struct Scenario {
    name: &'static str,
    needs: Needs,
    run: fn(&Space<'_>),
}

fn main() -> ExitCode {
    let (flags, words): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|word| word.starts_with("--"));
    let has = |flag: &str| flags.iter().any(|given| given == flag);
    let chosen: Vec<&Scenario> = SCENARIOS
        .iter()
        .filter(|scenario| words.is_empty() || words.iter().any(|word| scenario.name.contains(word.as_str())))
        .collect();
    if has("--list") {
        for scenario in chosen {
            println!("{}", scenario.name);
        }
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    let form = if has("--bench") {
        Form::Control
    } else if has("--reuse") {
        Form::Reused
    } else {
        Form::Whole
    };
    let cluster = match Cluster::start(form, has("--keep")) {
        Ok(cluster) => cluster,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if has("--bench") {
        bench::run(&cluster);
        return ExitCode::SUCCESS;
    }
    let mut table = line(
        start,
        "nothing -> two nodes with DNS, metrics-server and the images",
        true,
    );
    let (mut failed, mut installed) = (0, false);
    for scenario in chosen {
        println!("\n== {}", scenario.name);
        if scenario.needs == Needs::Operator && !installed {
            let start = Instant::now();
            installed = true;
            let outcome = cluster.install_operator();
            table += &line(start, "helm installs the operator", outcome.is_ok());
            if let Err(error) = outcome {
                println!("{error}\nartefacts: {}", cluster.artefacts("install").display());
                failed += 1;
                break; // Nothing that is left can pass.
            }
        }
        let start = Instant::now();
        let space = Space::new(&cluster, scenario.name);
        let passed = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&space))).is_ok();
        let row = line(start, scenario.name, passed);
        print!("{row}");
        table += &row;
        for fact in space.facts() {
            table += &format!("           {fact}\n");
        }
        if !passed {
            failed += 1;
            println!("artefacts: {}", cluster.artefacts(scenario.name).display());
        }
        space.remove();
    }
    println!("\n{table}");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        println!("{failed} scenarios failed");
        ExitCode::FAILURE
    }
}

fn line(start: Instant, what: &str, passed: bool) -> String {
    let verdict = if passed { "" } else { "  FAILED" };
    format!("{:8.1} s  {what}{verdict}\n", start.elapsed().as_secs_f64())
}
