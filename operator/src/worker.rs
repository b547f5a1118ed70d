//! What a worker says of itself, on its HTTP port and by the way it ends: read the same from pods and processes.

use serde_json::Value;
use swallow_plan::{MeasuredMemory, Phase, Progress, model::GroupReason};

/// Exit codes of a worker that was refused by its flags or its model's files: starting it again changes nothing.
const HOPELESS: [i32; 2] = [2, 3];

/// What `/state` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// Fetching, loading, warming or serving; `None` when it is about to end, which its end tells better.
    pub phase: Option<Phase>,
    /// Requests that it computes or holds waiting.
    pub requests: u32,
    /// Memory as measured after the warm-up.
    pub memory: Option<MeasuredMemory>,
}

impl Told {
    /// Reads the answer of `/state`; what is missing in it counts as zero.
    pub fn read(state: &Value) -> Self {
        let count = |path: &str| state.pointer(path).and_then(Value::as_u64).unwrap_or_default();
        let progress = || Progress {
            bytes_done: count("/progress/bytes_done"),
            bytes_total: count("/progress/bytes_total"),
            eta_seconds: state
                .pointer("/progress/eta_seconds")
                .and_then(Value::as_f64)
                .map(|eta| eta.ceil() as u64),
        };
        let phase = match state["phase"].as_str() {
            Some("fetching") => Some(Phase::Fetching(progress())),
            Some("loading") => Some(Phase::Loading(progress())),
            Some("warming") => Some(Phase::Warming),
            Some("serving") => Some(Phase::Serving),
            _ => None,
        };
        let requests = count("/load/running").saturating_add(count("/load/waiting"));
        let memory = state
            .pointer("/memory/measured")
            .filter(|measured| measured.is_object())
            .map(|_| MeasuredMemory {
                weights_bytes: count("/memory/measured/weights_bytes"),
                kv_bytes: count("/memory/measured/kv_bytes"),
                workspace_bytes: count("/memory/measured/workspace_bytes"),
            });
        Self {
            phase,
            memory,
            requests: u32::try_from(requests).unwrap_or(u32::MAX),
        }
    }
}

/// Why a worker ended that left this exit code; `None` when a signal ended it.
pub fn why_ended(code: Option<i32>) -> GroupReason {
    if code.is_some_and(|code| HOPELESS.contains(&code)) {
        GroupReason::BadCheckpoint
    } else {
        GroupReason::Crashed
    }
}
