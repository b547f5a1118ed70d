//! The fault matrix: every fault that the router is built to survive without a cluster, how it is made, when it passes,
//! and which tests show it. The tests are run here, and `tests/faults.md` is the table of what they said.
//!
//! It is stale, and this fails, when a test is missing, fails, or the table says something else. To write it anew:
//! `SWALLOW_WRITE=1 cargo test --release -p swallow-tests --test matrix`, after the other tests are built.

mod faults;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use faults::{FAULTS, Fault, TESTED_ELSEWHERE};
use swallow_tests::root;

/// All tests of the table, on two cores.
const TIME_MAX: Duration = Duration::from_secs(360);

/// What each test said: `binary` and name.
type Results = BTreeMap<(&'static str, &'static str), bool>;

#[test]
fn every_fault_is_survived_and_the_table_says_so() {
    let begun = Instant::now();
    let results = run_all();
    let took = begun.elapsed();
    assert!(took < TIME_MAX, "the faults take {} s", took.as_secs());
    let table = table(&results);
    let path = root().join("tests/faults.md");
    if std::env::var_os("SWALLOW_WRITE").is_some() {
        fs::write(&path, &table).expect("the tree can be written");
    }
    let failed: Vec<_> = results.iter().filter(|(_, passed)| !**passed).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == table,
        "tests/faults.md is stale: SWALLOW_WRITE=1 cargo test --release -p swallow-tests --test matrix"
    );
}

#[test]
fn every_fault_has_its_number_and_a_test() {
    let numbers: Vec<u32> = FAULTS.iter().map(|fault| fault.number).collect();
    let elsewhere = TESTED_ELSEWHERE.map(|(number, _)| number);
    let all: Vec<u32> = (1..=32).filter(|number| !elsewhere.contains(number)).collect();
    assert_eq!(numbers, all, "each once, in order");
    let untested: Vec<&str> = FAULTS
        .iter()
        .filter(|fault| fault.tests.is_empty())
        .map(|fault| fault.name)
        .collect();
    assert!(untested.is_empty(), "faults without a test: {untested:?}");
}

fn run_all() -> Results {
    let mut wanted: BTreeMap<&str, BTreeSet<&'static str>> = BTreeMap::new();
    for &(binary, test) in FAULTS.iter().flat_map(|fault| fault.tests) {
        wanted.entry(binary).or_default().insert(test);
    }
    let mut results = Results::new();
    for &(binary, test) in FAULTS.iter().flat_map(|fault| fault.tests) {
        results.insert((binary, test), false);
    }
    for (binary, tests) in wanted {
        let path = built(binary, &tests);
        let output = Command::new(&path)
            .args(["--exact", "--test-threads=2"])
            .args(&tests)
            .env("RUST_BACKTRACE", "0")
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let said = String::from_utf8_lossy(&output.stdout);
        let mut all_passed = true;
        for test in tests {
            let passed = said.contains(&format!("test {test} ... ok"));
            all_passed &= passed;
            results.insert((binary, test), passed);
        }
        if !all_passed {
            println!("{binary}:\n{said}");
        }
    }
    results
}

/// The newest test binary of that name that has these tests: packages may use the same names.
fn built(binary: &str, tests: &BTreeSet<&str>) -> PathBuf {
    let this = std::env::current_exe().expect("a running test has a path");
    let folder = this.parent().expect("tests run from target/PROFILE/deps");
    let is_named = |path: &PathBuf| {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        name.rsplit_once('-').is_some_and(|(name, hash)| {
            name == binary && !hash.is_empty() && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
    };
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .expect("the folder of this test")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(is_named)
        .collect();
    let age = |path: &PathBuf| fs::metadata(path).and_then(|data| data.modified()).ok();
    found.sort_by_key(|path| std::cmp::Reverse(age(path)));
    let has_them = |path: &PathBuf| {
        let list = listed(path);
        tests.iter().all(|test| list.contains(*test))
    };
    found.into_iter().find(has_them).unwrap_or_else(|| {
        panic!("no test program '{binary}' has {tests:?}; build all tests first: cargo test --release --workspace --no-run")
    })
}

fn listed(binary: &Path) -> BTreeSet<String> {
    let Ok(output) = Command::new(binary)
        .args(["--list", "--format", "terse"])
        .output()
    else {
        return BTreeSet::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
}

fn table(results: &Results) -> String {
    let mut text = String::from(
        "# The fault matrix\n\n\
         Written by `tests/matrix.rs`, which runs every test named here and fails when one of them does, or when this file is not\n\
         what they said. All of them together take at most six minutes on two cores.\n\n\
         | # | Fault | How it is made | It passes when | Shown by | Result |\n|---|---|---|---|---|---|\n",
    );
    for Fault {
        number,
        name,
        made,
        passes,
        tests,
    } in FAULTS
    {
        let names: Vec<String> = tests
            .iter()
            .map(|(binary, test)| format!("`{binary}` {}", test.replace("::", ": ").replace('_', " ")))
            .collect();
        let passed = tests.iter().all(|test| results[test]);
        let result = if passed { "passed" } else { "FAILED" };
        writeln!(
            text,
            "| {number} | {name} | {made} | {passes} | {} | {result} |",
            names.join("; ")
        )
        .expect("a string takes everything");
    }
    text.push_str("\nNot in this table:\n\n");
    for (number, why) in TESTED_ELSEWHERE {
        writeln!(text, "- {number}: {why}").expect("a string takes everything");
    }
    text
}
