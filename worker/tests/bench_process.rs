//! `bench` as it is called: one command, a JSON object for each cell, a table at the end.

use std::{path::PathBuf, process::Command};

use serde_json::Value;

fn bench(arguments: &[&str]) -> (bool, Vec<Value>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_swallow-worker"))
        .arg("bench")
        .args(arguments)
        .output()
        .expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let lines = text(output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .collect();
    (output.status.success(), lines, text(output.stderr))
}

fn tiny() -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny");
    format!("--model={}", folder.display())
}

/// The row of published figures, with less of everything.
const ROW: [&str; 6] = [
    "--cells=peer",
    "--prefill-tokens=48,96",
    "--batch=1,5",
    "--context=24",
    "--output-tokens=8",
    "--repetitions=2",
];

fn of<'a>(lines: &'a [Value], what: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["measured"] == what).collect()
}

#[test]
fn one_command_measures_a_row() {
    let tiny = tiny();
    let (ok, lines, table) = bench(&[&[tiny.as_str()][..], &ROW].concat());
    assert!(ok, "{table}");
    let started = of(&lines, "startup");
    assert_eq!(started.len(), 1, "no kernels to be compiled here");
    let (whole, group) = (&started[0]["seconds"], &started[0]["group_seconds"]);
    assert!(
        whole.as_f64() >= group.as_f64() && group.as_f64() > Some(0.0),
        "{started:?}"
    );
    let numbers = |line: &Value, name: &str| -> Vec<f64> {
        let list = line[name].as_array().expect("a list").iter();
        list.map(|n| n.as_f64().expect("a number")).collect()
    };
    let first = of(&lines, "first_token");
    assert_eq!(
        first.iter().map(|line| &line["tokens"]).collect::<Vec<_>>(),
        [48, 96]
    );
    for line in &first {
        assert_eq!(numbers(line, "rounds_ms").len(), 10);
    }
    let decode = of(&lines, "decode");
    assert_eq!(
        decode.iter().map(|line| &line["batch"]).collect::<Vec<_>>(),
        [1, 5]
    );
    for line in &decode {
        assert_eq!(numbers(line, "repetitions_ms").len(), 2);
        // The first token comes with a prompt's last chunk; all prompts fit one step, so every gap counts, twice.
        assert_eq!(line["steps"], 14, "{line}");
        assert_eq!(line["tuning"], Value::Null);
    }
    for line in first.iter().chain(&decode) {
        let ms = line.get("ms").or_else(|| line.get("step_ms")).expect("a time");
        let [ms, floor, fraction] =
            [ms, &line["floor_ms"], &line["fraction"]].map(|number| number.as_f64().expect("a number"));
        assert!(
            ms > 0.0 && floor > 0.0 && (fraction - floor / ms).abs() < 1e-9,
            "{line}"
        );
    }
    for row in [
        "startup ",
        "TTFT 48 ",
        "TTFT 96 ",
        "b1 ",
        "b5 ",
        "| startup | TTFT 48 | TTFT 96 | b1 | b5 |",
    ] {
        assert!(
            table.lines().any(|line| line.starts_with(row)),
            "{row:?} is not in:\n{table}"
        );
    }
}

#[test]
fn random_keys_and_values_are_called_a_tuning_aid() {
    let tiny = tiny();
    let more = ["--startup=none", "--prefill-tokens=none", "--random-kv"];
    let kept = ROW
        .into_iter()
        .filter(|flag| !flag.starts_with("--prefill-tokens"));
    let arguments: Vec<&str> = [tiny.as_str()].into_iter().chain(kept).chain(more).collect();
    let (ok, lines, table) = bench(&arguments);
    assert!(ok, "{table}");
    assert!(of(&lines, "startup").is_empty() && of(&lines, "first_token").is_empty());
    let decode = of(&lines, "decode");
    assert_eq!(decode.len(), 2);
    for line in decode {
        assert_eq!(line["steps"], 14, "{line}");
        assert!(line["tuning"].is_string(), "{line}");
    }
    assert!(table.contains("b5 (tuning)"), "{table}");
}

/// Half of a model that is divided in two, on its own: what it weighs, and what is said of every line.
#[test]
fn one_rank_of_a_group_runs_alone() {
    let tiny = tiny();
    let group = |more: &[&str]| {
        let arguments = [
            &[tiny.as_str()][..],
            &ROW,
            &["--tensor-parallel=2", "--startup=warm"],
            more,
        ]
        .concat();
        let (ok, lines, table) = bench(&arguments);
        assert!(ok, "{table}");
        (lines, table)
    };
    let (alone, table) = group(&["--rank-alone"]);
    assert_eq!(alone.len(), 6, "a start, the group, and four cells");
    for line in &alone {
        let tuning = line["tuning"].as_str().unwrap_or_default();
        assert!(
            tuning.contains("one rank of 2 alone") && tuning.contains("no figure"),
            "{line}"
        );
    }
    for row in [
        "a tuning aid, ",
        "startup (tuning) ",
        "TTFT 48 (tuning) ",
        "b5 (tuning) ",
    ] {
        assert!(
            table.lines().any(|line| line.starts_with(row)),
            "{row:?} is not in:\n{table}"
        );
    }
    let (both, _) = group(&[]);
    let number = |lines: &[Value], measured: &str, name: &str| {
        of(lines, measured)[0][name].as_f64().expect("a number")
    };
    for name in ["weights_bytes", "kv_bytes"] {
        let share = number(&alone, "group", name) / number(&both, "group", name);
        assert!((share - 0.5).abs() < 0.02, "{name}: {share} of both ranks'");
    }
    let share = number(&alone, "decode", "bytes_per_step") / number(&both, "decode", "bytes_per_step");
    assert!(
        (share - 0.5).abs() < 0.02,
        "a step reads {share} of what both ranks read"
    );
}

#[test]
fn a_mistake_is_one_clear_line() {
    let tiny = tiny();
    for (flag, words) in [
        ("--batch=0", "--batch=0: give whole numbers from 1 on"),
        ("--output-tokens=2", "--output-tokens must be at least 3"),
        ("--tensor-parallel=3", "tensor parallel"),
        ("--chain-kernels=on", "--chain-kernels needs --device=cuda"),
        ("--rank-alone", "--rank-alone is for one rank of several"),
    ] {
        let (ok, lines, error) = bench(&[&tiny, flag, "--startup=none"]);
        assert!(!ok && lines.is_empty(), "{flag}");
        assert_eq!(error.trim().lines().count(), 1, "{flag}: {error}");
        assert!(error.contains(words), "{flag}: {error}");
    }
}
