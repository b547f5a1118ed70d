//! What was measured: a JSON object a line as soon as it is known, and all of it as a table at the end.

use std::fmt::Write as _;

use serde::Serialize;

/// One line of output. Times are medians; a fraction is the floor over the time.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "measured", rename_all = "snake_case")]
pub(super) enum Line {
    Startup {
        /// From the process's exec to its first token.
        seconds: f64,
        /// Of that, from the start of the group to the end of its warm-up step.
        group_seconds: f64,
        /// What earlier starts had left for it.
        kept: Kept,
    },
    Group {
        model: String,
        load_format: &'static str,
        tensor_parallel: usize,
        /// A GPU's name, or threads and their instruction set.
        machine: String,
        /// What copying, reading and a large matrix product reach here, measured just before; on processors beside each
        /// line instead.
        #[serde(skip_serializing_if = "Option::is_none")]
        copy_gb_per_s: Option<f64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        read_gb_per_s: Option<f64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        gemm_tflop_per_s: Option<f64>,
        load_seconds: f64,
        weights_bytes: u64,
        kv_bytes: u64,
        workspace_bytes: u64,
        kv_tokens: usize,
    },
    /// From submitting a prompt's ids to its first token's id on the host, alone.
    FirstToken {
        tokens: usize,
        ms: f64,
        rounds_ms: Vec<f64>,
        floor_ms: f64,
        fraction: f64,
        /// On a GPU whose copy or product falls short: as it would be on one whose doesn't.
        #[serde(skip_serializing_if = "Option::is_none")]
        scaled_ms: Option<f64>,
    },
    Decode {
        batch: usize,
        context: usize,
        output_tokens: usize,
        /// Between consecutive steps that gave every sequence a token, with all that the scheduler does.
        step_ms: f64,
        repetitions_ms: Vec<f64>,
        /// Steps that were measured.
        steps: usize,
        tokens_per_s: f64,
        /// Weights, keys and values that a step reads.
        bytes_per_step: u64,
        ceiling_gb_per_s: f64,
        floor_ms: f64,
        fraction: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        scaled_ms: Option<f64>,
    },
    /// Of a step under `--profile`: for tuning, not a figure of the whole.
    Operation {
        #[serde(flatten)]
        step: Mix,
        operation: String,
        calls: usize,
        /// Of all calls.
        ms: f64,
        share_of_step: f64,
        gb: f64,
        gflop: f64,
        /// The longer of what its bytes and its operations need, over its time.
        fraction: f64,
    },
}

/// What a start finds of earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kept {
    Nothing,
    /// Compiled, where the device has such.
    Kernels,
    /// Kernels, and the ways to multiply that are fastest.
    Choices,
}

/// What a profiled step is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Mix {
    /// Single rows, each after so many tokens.
    pub(super) batch: usize,
    pub(super) context: usize,
    /// Of a prompt in the same step.
    pub(super) prefill_tokens: usize,
}

/// Every line so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    lines: Vec<Line>,
    tuning: Option<String>,
}

/// A line as it is printed.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    line: &'a Line,
    /// Why this is no figure to publish.
    #[serde(skip_serializing_if = "Option::is_none")]
    tuning: Option<&'a str>,
}

impl Report {
    /// `tuning` says why none of the lines is a figure to publish, if so.
    pub(super) fn new(tuning: Option<String>) -> Self {
        Self {
            lines: Vec::new(),
            tuning,
        }
    }

    /// Prints a line and keeps it for the table.
    pub(super) fn add(&mut self, line: Line) {
        println!("{}", self.json(&line));
        self.lines.push(line);
    }

    fn json(&self, line: &Line) -> String {
        let printed = Printed {
            line,
            tuning: self.tuning.as_deref(),
        };
        serde_json::to_string(&printed).expect("a line has neither maps nor failing values")
    }

    /// Writes the table to stderr.
    pub(super) fn table(&self) {
        eprint!("{}", self.render());
    }

    fn render(&self) -> String {
        let mut text = String::new();
        if let Some(tuning) = &self.tuning {
            let _ = writeln!(text, "\n{tuning}");
        }
        for line in &self.lines {
            if let Line::Group {
                model,
                load_format,
                tensor_parallel,
                machine,
                copy_gb_per_s,
                read_gb_per_s,
                gemm_tflop_per_s,
                ..
            } = line
            {
                let _ = write!(
                    text,
                    "\n{model}, {load_format}, {tensor_parallel} ranks, {machine}"
                );
                if let (Some(copy), Some(read), Some(gemm)) = (copy_gb_per_s, read_gb_per_s, gemm_tflop_per_s)
                {
                    let _ = write!(
                        text,
                        "; copy {copy:.0} GB/s, read {read:.0} GB/s, product {gemm:.0} TFLOP/s"
                    );
                }
                text.push('\n');
            }
        }
        text.push_str(&self.operations());
        text.push_str(&self.cells());
        text
    }

    /// Of profiled steps, the longest first.
    fn operations(&self) -> String {
        let (mut text, mut last) = (String::new(), None);
        for line in &self.lines {
            let Line::Operation {
                step,
                operation,
                calls,
                ms,
                share_of_step,
                gb,
                gflop,
                fraction,
            } = line
            else {
                continue;
            };
            if last.replace(step) != Some(step) {
                let Mix {
                    batch,
                    context,
                    prefill_tokens,
                } = step;
                let _ = writeln!(
                    text,
                    "\n{batch} rows after {context}, a prompt of {prefill_tokens}\n{:<32} {:>6} {:>9} {:>6} {:>9} {:>10} {:>9}",
                    "", "calls", "ms", "share", "GB", "GFLOP", "fraction"
                );
            }
            let _ = writeln!(
                text,
                "{operation:<32} {calls:>6} {ms:>9.3} {share_of_step:>6.3} {gb:>9.3} {gflop:>10.1} {fraction:>9.2}"
            );
        }
        text
    }

    fn cells(&self) -> String {
        let mut text = String::new();
        let mut cells: Vec<Cell> = self.lines.iter().filter_map(Line::cell).collect();
        if self.tuning.is_some() {
            cells.iter_mut().for_each(|cell| cell.name += " (tuning)");
        }
        if cells.is_empty() {
            return text;
        }
        let _ = writeln!(
            text,
            "{:<24} {:>10} {:>10} {:>9} {:>10}  all",
            "", "median ms", "floor ms", "fraction", "scaled ms"
        );
        for cell in &cells {
            let some = |value: Option<f64>, digits: usize| match value {
                Some(value) => format!("{value:.digits$}"),
                None => "-".to_owned(),
            };
            let all: Vec<String> = cell.all.iter().map(|ms| format!("{ms:.2}")).collect();
            let _ = writeln!(
                text,
                "{:<24} {:>10.2} {:>10} {:>9} {:>10}  {}",
                cell.name,
                cell.ms,
                some(cell.floor, 2),
                some(cell.floor.map(|floor| floor / cell.ms), 2),
                some(cell.scaled, 2),
                all.join(" ")
            );
        }
        let names: Vec<&str> = cells.iter().map(|cell| cell.name.as_str()).collect();
        let values: Vec<String> = cells.iter().map(|cell| format!("{:.2}", cell.ms)).collect();
        let _ = writeln!(
            text,
            "\n| {} |\n|{}\n| {} |",
            names.join(" | "),
            "---|".repeat(names.len()),
            values.join(" | ")
        );
        text
    }
}

/// A line of the table.
struct Cell {
    name: String,
    ms: f64,
    floor: Option<f64>,
    scaled: Option<f64>,
    all: Vec<f64>,
}

impl Line {
    fn cell(&self) -> Option<Cell> {
        match self {
            Self::Group { .. } | Self::Operation { .. } => None,
            Self::Startup { seconds, kept, .. } => Some(Cell {
                name: match kept {
                    Kept::Nothing => "startup, cold",
                    Kept::Kernels => "startup",
                    Kept::Choices => "startup, again",
                }
                .to_owned(),
                ms: 1e3 * seconds,
                floor: None,
                scaled: None,
                all: Vec::new(),
            }),
            Self::FirstToken {
                tokens,
                ms,
                rounds_ms,
                floor_ms,
                scaled_ms,
                ..
            } => Some(Cell {
                name: format!("TTFT {tokens}"),
                ms: *ms,
                floor: Some(*floor_ms),
                scaled: *scaled_ms,
                all: rounds_ms.clone(),
            }),
            Self::Decode {
                batch,
                step_ms,
                repetitions_ms,
                floor_ms,
                scaled_ms,
                ..
            } => Some(Cell {
                name: format!("b{batch}"),
                ms: *step_ms,
                floor: Some(*floor_ms),
                scaled: *scaled_ms,
                all: repetitions_ms.clone(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_cell_and_a_row_of_all() {
        let report = Report {
            lines: vec![
                Line::Startup {
                    seconds: 2.5,
                    group_seconds: 2.0,
                    kept: Kept::Nothing,
                },
                Line::FirstToken {
                    tokens: 1024,
                    ms: 24.0,
                    rounds_ms: vec![23.0, 24.0, 25.0],
                    floor_ms: 18.0,
                    fraction: 0.75,
                    scaled_ms: Some(20.0),
                },
            ],
            tuning: None,
        };
        let table = report.render();
        for line in [
            "startup, cold               2500.00          -         -          -  ",
            "TTFT 1024                     24.00      18.00      0.75      20.00  23.00 24.00 25.00",
            "| startup, cold | TTFT 1024 |",
            "|---|---|",
            "| 2500.00 | 24.00 |",
        ] {
            assert!(
                table.lines().any(|have| have == line),
                "{line:?} is not in:\n{table}"
            );
        }
    }

    #[test]
    fn operations_stand_below_their_step() {
        let step = Mix {
            batch: 8,
            context: 1024,
            prefill_tokens: 0,
        };
        let of = |operation: &str, step| Line::Operation {
            step,
            operation: operation.into(),
            calls: 32,
            ms: 1.5,
            share_of_step: 0.25,
            gb: 4.0,
            gflop: 64.0,
            fraction: 0.9,
        };
        let alone = Mix { batch: 1, ..step };
        let report = Report {
            lines: vec![of("attention", step), of("sample", step), of("attention", alone)],
            tuning: None,
        };
        let table = report.render();
        let starts: Vec<&str> = table
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(
            starts,
            ["8", "calls", "attention", "sample", "1", "calls", "attention"],
            "{table}"
        );
        let json: serde_json::Value = serde_json::from_str(&report.json(&report.lines[0])).expect("JSON");
        assert_eq!(
            (&json["measured"], &json["batch"]),
            (&"operation".into(), &8.into())
        );
    }
}
