//! The house's rules that a machine can check: who may import whom, what a brain may not touch, how long a
//! function and a file may grow, and that generated files are fresh.
//!
//! A limit here is a ratchet: it moves down when the code does, and up only in a commit that says why.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use swallow_tests::{program, root};

/// Each package, its folder, and the packages of ours that it may import. Nobody imports a shell.
const ARROWS: [(&str, &str, &[&str]); 9] = [
    ("swallow-proto", "proto", &[]),
    ("swallow-rpc", "proto/rpc", &["swallow-proto"]),
    ("swallow-plan", "operator/plan", &["swallow-proto"]),
    ("swallow-operator", "operator", &["swallow-plan", "swallow-proto"]),
    ("swallow-policy", "router/policy", &[]),
    (
        "swallow-router",
        "router",
        &["swallow-policy", "swallow-proto", "swallow-rpc"],
    ),
    ("swallow-schedule", "worker/schedule", &[]),
    (
        "swallow-worker",
        "worker",
        &["swallow-proto", "swallow-rpc", "swallow-schedule"],
    ),
    (
        "swallow-tests",
        "tests",
        &["swallow-plan", "swallow-proto", "swallow-rpc"],
    ),
];

/// Synchronous crates that get time, randomness and configuration as arguments.
const BRAINS: [(&str, &str); 3] = [
    ("swallow-plan", "operator/plan"),
    ("swallow-policy", "router/policy"),
    ("swallow-schedule", "worker/schedule"),
];

/// No brain has these below it, however far.
const BRAINLESS: [&str; 12] = [
    "async-std",
    "axum",
    "candle-core",
    "cudarc",
    "getrandom",
    "hyper",
    "kube-client",
    "kube-runtime",
    "rand",
    "reqwest",
    "tokio",
    "tonic",
];

/// No brain's source says these.
const FORBIDDEN: [&str; 12] = [
    "Instant::now",
    "SystemTime",
    "Timestamp::now",
    "Zoned::now",
    "std::env",
    "std::fs",
    "std::net",
    "std::process",
    "std::thread",
    "env::var",
    "thread_rng",
    "async fn",
];

/// Lines of a function, from its `fn` to its brace.
const FUNCTION_MAX: usize = 100;
/// Lines of a file.
const FILE_MAX: usize = 700;

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Tracked and not yet tracked files that git does not ignore.
fn files(ending: &str) -> Vec<PathBuf> {
    let list = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root())
        .output()
        .expect("git is installed");
    assert!(
        list.status.success(),
        "git ls-files failed: {}",
        String::from_utf8_lossy(&list.stderr)
    );
    let names = String::from_utf8(list.stdout).expect("file names are UTF-8");
    let mut paths: Vec<PathBuf> = names
        .split('\0')
        .filter(|name| name.ends_with(ending))
        .map(|name| root().join(name))
        .collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    assert!(!paths.is_empty(), "no file ends with {ending}");
    paths
}

fn name(path: &Path) -> String {
    path.strip_prefix(root())
        .expect("below the root")
        .display()
        .to_string()
}

/// Source lines without comments, so that a rule may be explained where it holds.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .map(|(at, line)| (at + 1, line))
}

#[test]
fn nobody_imports_past_an_arrow() {
    let workspace: toml::Table = read(&root().join("Cargo.toml"))
        .parse()
        .expect("the workspace's Cargo.toml parses");
    let members: BTreeSet<String> = workspace["workspace"]["members"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|member| member.as_str().expect("a folder").to_owned())
        .collect();
    assert_eq!(
        members,
        ARROWS.iter().map(|(_, folder, _)| (*folder).to_owned()).collect(),
        "a member without arrows, or the reverse"
    );
    let mut wrong = Vec::new();
    for (package, folder, allowed) in ARROWS {
        let manifest: toml::Table = read(&root().join(folder).join("Cargo.toml"))
            .parse()
            .expect("Cargo.toml parses");
        for table in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(table) else {
                continue;
            };
            for dependency in dependencies.as_table().expect("a table").keys() {
                if dependency.starts_with("swallow-") && !allowed.contains(&dependency.as_str()) {
                    wrong.push(format!("{package} -> {dependency} ({table})"));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "arrows that ARCHITECTURE.md does not have: {wrong:#?}"
    );
}

#[test]
fn a_brain_builds_alone_and_has_no_shell_below_it() {
    for (package, _) in BRAINS {
        let cargo = |arguments: &[&str]| {
            let output = Command::new(env!("CARGO"))
                .args(arguments)
                .current_dir(root())
                .output()
                .expect("cargo runs");
            assert!(
                output.status.success(),
                "cargo {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).expect("cargo prints UTF-8")
        };
        cargo(&["build", "--release", "--quiet", "--locked", "-p", package]);
        let tree = cargo(&[
            "tree", "--locked", "-p", package, "-e", "normal", "--prefix", "none", "--format", "{p}",
        ]);
        let below: BTreeSet<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        let found: Vec<_> = BRAINLESS
            .iter()
            .filter(|banned| below.contains(**banned))
            .collect();
        assert!(found.is_empty(), "{package} has {found:?} below it");
    }
}

#[test]
fn a_brain_has_no_clock_no_environment_and_no_dice() {
    let mut wrong = Vec::new();
    for (_, folder) in BRAINS {
        let source = root().join(folder).join("src");
        for path in files(".rs").into_iter().filter(|path| path.starts_with(&source)) {
            for (at, line) in code_lines(&read(&path)) {
                wrong.extend(
                    FORBIDDEN
                        .iter()
                        .filter(|word| line.contains(**word))
                        .map(|word| format!("{}:{at}: {word}", name(&path))),
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Where a wall clock is read, and for what: text for people. Deadlines, rates and ages are monotonic, and what crosses a
/// wire is a duration, so that no clock that jumps or is wrong changes what happens.
const WALL_CLOCKS: [&str; 2] = [
    "router/src/generate.rs",      // The date that a chat template may print.
    "router/src/openai/render.rs", // `created` of a response.
];

#[test]
fn nothing_that_decides_reads_a_wall_clock() {
    let mut found = BTreeSet::new();
    for folder in ["router/src", "worker/src", "proto/src", "proto/rpc/src"] {
        let source = root().join(folder);
        for path in files(".rs").into_iter().filter(|path| path.starts_with(&source)) {
            let reads = |line: &str| {
                ["SystemTime::now", "Zoned::now", "Timestamp::now"]
                    .iter()
                    .any(|word| line.contains(word))
            };
            if code_lines(&read(&path)).any(|(_, line)| reads(line)) {
                found.insert(name(&path));
            }
        }
    }
    let expected: BTreeSet<String> = WALL_CLOCKS.map(str::to_owned).into();
    assert_eq!(found, expected);
}

/// Every function with its length; rustfmt puts the closing brace under the first letter.
fn functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let starts = |line: &str| {
        let words = line.trim_start();
        [
            "fn ",
            "pub fn ",
            "async fn ",
            "pub async fn ",
            "pub(crate) fn ",
            "pub(super) fn ",
            "const fn ",
            "unsafe fn ",
        ]
        .iter()
        .any(|start| words.starts_with(start))
    };
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| starts(line)) {
        let indent = &line[..line.len() - line.trim_start().len()];
        let close = format!("{indent}}}");
        if let Some(length) = lines[at..].iter().position(|line| **line == close) {
            found.push((at + 1, length + 1));
        }
    }
    found
}

#[test]
fn functions_and_files_stay_readable() {
    let mut long = BTreeMap::new();
    for path in files(".rs") {
        let text = read(&path);
        let n_lines = text.lines().count();
        if n_lines > FILE_MAX {
            long.insert(
                name(&path),
                format!("{n_lines} lines; {FILE_MAX} at most: is there a second idea in it?"),
            );
        }
        for (at, length) in functions(&text)
            .into_iter()
            .filter(|(_, length)| *length > FUNCTION_MAX)
        {
            long.insert(
                format!("{}:{at}", name(&path)),
                format!("a function of {length} lines; {FUNCTION_MAX} at most"),
            );
        }
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn a_file_opens_with_its_idea() {
    let silent: Vec<String> = files(".rs")
        .iter()
        .filter(|path| !read(path).starts_with("//!"))
        .map(|path| name(path))
        .collect();
    assert!(
        silent.is_empty(),
        "files that do not open with `//!`: {silent:#?}"
    );
}

#[test]
fn the_generated_resource_is_fresh() {
    let output = Command::new(program("swallow-operator"))
        .arg("crd")
        .output()
        .expect("the operator starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let written = read(&root().join("deploy/crd/swallowmodels.yaml"));
    assert!(
        output.stdout == written.as_bytes(),
        "deploy/crd/swallowmodels.yaml is stale: swallow-operator crd > deploy/crd/swallowmodels.yaml"
    );
    assert!(
        written.len() < 100_000,
        "the resource has {} bytes; kubectl apply needs it small",
        written.len()
    );
    // A chart can only render files of its own folder.
    assert!(
        read(&root().join("charts/swallow/files/swallowmodels.yaml")) == written,
        "the chart's copy is stale: cp deploy/crd/swallowmodels.yaml charts/swallow/files/"
    );
}
