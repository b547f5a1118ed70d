//! How long a process needs from its exec to its first token. Each start is a process of its own, begun by the one that
//! measures, and it knows from the kernel when it began.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::Instant,
};

use serde::Deserialize;

use super::{
    BenchError, Setup,
    args::{BenchDevice, Cold, Measure},
    drive,
    report::{Kept, Line, Report},
};
use crate::group::{Group, LoadProgress};

/// Tokens of the prompt.
const PROMPT: usize = 16;

/// What a start's process prints.
#[derive(Deserialize, serde::Serialize)]
struct Started {
    seconds: f64,
    group_seconds: f64,
    /// Why these are no figures to publish, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tuning: Option<String>,
}

/// Measures the starts that `args` asks for. The figure of a start with kernels is one that measures how to multiply:
/// what an earlier start has found out makes no part of it.
pub(super) fn measure(args: &Measure, report: &mut Report) -> Result<(), BenchError> {
    let measured = Measure {
        measure_products: args.device == BenchDevice::Cuda && args.product_choices.is_none(),
        ..args.clone()
    };
    let mut start = |args: &Measure, cache: Option<&Scratch>, kept| -> Result<(), BenchError> {
        let Started {
            seconds,
            group_seconds,
            ..
        } = spawn(args, cache)?;
        report.add(Line::Startup {
            seconds,
            group_seconds,
            kept,
        });
        Ok(())
    };
    match args.startup() {
        Cold::None => Ok(()),
        Cold::Warm => start(&measured, None, Kept::Kernels),
        Cold::Cold => {
            let cache = Scratch::new()?;
            start(args, Some(&cache), Kept::Nothing)?;
            start(&measured, Some(&cache), Kept::Kernels)?;
            match measured.measure_products && !args.measure_products {
                true => start(args, Some(&cache), Kept::Choices),
                false => Ok(()),
            }
        }
    }
}

/// A folder for compiled kernels, removed with what is in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, BenchError> {
        let folder = std::env::temp_dir().join(format!("swallow-bench-{}", std::process::id()));
        fs::create_dir(&folder)
            .map_err(|error| BenchError::Startup(format!("{}: {error}", folder.display())))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What can't be removed is the system's to clean.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn spawn(args: &Measure, cache: Option<&Scratch>) -> Result<Started, BenchError> {
    let failed = |what: String| BenchError::Startup(what);
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command.args(args.startup_argv()).stderr(Stdio::inherit());
    if let Some(Scratch(folder)) = cache {
        command.env("SWALLOW_CACHE", folder);
    }
    let output = command.output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(format!("its process ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}

/// Starts the group in this process, computes one token, and prints how long ago the process began.
pub(super) fn run(args: &Measure) -> Result<(), BenchError> {
    let Setup { weights, spec, .. } = Setup::new(args)?;
    let vocab = spec.vocabulary(weights.config()).n_vocab();
    let begun = Instant::now();
    let mut group = Group::start(weights, spec.clone(), Arc::new(LoadProgress::default()))?;
    let group_seconds = begun.elapsed().as_secs_f64();
    let batch = drive::Batch {
        sequences: 1,
        prompt: PROMPT.min(spec.max_model_len - 1),
        outputs: 1,
        vocab,
        salt: 0,
    };
    drive::first_token(&mut group, &spec, batch, &args.params())?;
    let started = Started {
        seconds: process_age()?,
        group_seconds,
        tuning: args.tuning(),
    };
    println!(
        "{}",
        serde_json::to_string(&started).expect("numbers and a text are JSON")
    );
    Ok(())
}

/// Seconds since this process's exec, to a hundredth: the kernel counts in ticks.
fn process_age() -> Result<f64, BenchError> {
    let failed = |what: &str| BenchError::Startup(what.to_owned());
    let stat = fs::read_to_string("/proc/self/stat").map_err(|error| failed(&error.to_string()))?;
    let ticks = start_ticks(&stat).ok_or_else(|| failed("/proc/self/stat has no start time"))?;
    // SAFETY: asks for a number.
    let ticks_per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the time to `now`.
    if unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) } != 0 || ticks_per_second <= 0 {
        return Err(failed("the system has no clock that counts from its boot"));
    }
    let since_boot = now.tv_sec as f64 + now.tv_nsec as f64 / 1e9;
    Ok((since_boot - ticks as f64 / ticks_per_second as f64).max(0.0))
}

/// The 22nd field; the second is the program's name in parentheses, which may hold anything.
fn start_ticks(stat: &str) -> Option<u64> {
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_as_old_as_the_kernel_says() {
        let stat = "7 (a ) 1 2) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        assert_eq!(start_ticks(stat), Some(4242));
        assert_eq!(start_ticks("7 (x"), None);
        let (age, begun) = (process_age().expect("Linux"), Instant::now());
        assert!(age < 3600.0, "{age}");
        while begun.elapsed().as_millis() < 20 {}
        assert!(process_age().expect("Linux") >= age + 0.015);
    }
}
