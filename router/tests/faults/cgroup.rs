//! A cgroup with a fifth of a processor and little memory for a program, as a small container has: of either version of
//! the interface, where this machine has one that we may write.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

const ROOT: &str = "/sys/fs/cgroup";
const PERIOD_US: u32 = 100_000;
const QUOTA_US: u32 = 20_000;

/// Gone with its test, if nobody is in it any more.
pub struct Cgroup {
    /// One for all controllers, or one for each.
    folders: Vec<PathBuf>,
    /// Sets the processor time: a file, what limits it, and what does not.
    quota: (PathBuf, String, &'static str),
    /// How often it was held to it.
    throttled: PathBuf,
    /// How many of its processes the kernel has killed for memory.
    killed: PathBuf,
}

impl Cgroup {
    /// With so much memory, and swap none. `None`: there is no cgroup for us here.
    pub fn new(memory_bytes: usize) -> Option<Self> {
        let name = format!("swallow-starved-{}", std::process::id());
        let cgroup = if Path::new(ROOT).join("cgroup.controllers").exists() {
            Self::unified(&Path::new(ROOT).join(name))
        } else {
            Self::each(&name)
        };
        let (limits, memory) = cgroup;
        let made = limits.folders.iter().try_for_each(fs::create_dir);
        let limited = made
            .and_then(|()| {
                memory
                    .iter()
                    .try_for_each(|(file, optional)| write(file, memory_bytes, *optional))
            })
            .and_then(|()| limits.set(true));
        // What was made is removed again.
        limited.is_ok().then_some(limits)
    }

    /// Version 2. Where processes stand in the root, a controller cannot be handed down, and nothing comes of it.
    fn unified(folder: &Path) -> (Self, Vec<(PathBuf, bool)>) {
        let handed_down = Path::new(ROOT).join("cgroup.subtree_control");
        for controller in ["+cpu", "+memory"] {
            // It may be already; if it may not be, the files below are missing.
            let _ = fs::write(&handed_down, controller);
        }
        let limits = Self {
            folders: vec![folder.to_owned()],
            quota: (folder.join("cpu.max"), format!("{QUOTA_US} {PERIOD_US}"), "max"),
            throttled: folder.join("cpu.stat"),
            killed: folder.join("memory.events"),
        };
        (limits, vec![(folder.join("memory.max"), false)])
    }

    /// Version 1. The usual period is the one above.
    fn each(name: &str) -> (Self, Vec<(PathBuf, bool)>) {
        let [cpu, memory] = ["cpu", "memory"].map(|controller| Path::new(ROOT).join(controller).join(name));
        let limits = Self {
            quota: (cpu.join("cpu.cfs_quota_us"), QUOTA_US.to_string(), "-1"),
            throttled: cpu.join("cpu.stat"),
            killed: memory.join("memory.oom_control"),
            folders: vec![cpu, memory.clone()],
        };
        // The second counts swap too, where the kernel does.
        let memory = [
            ("memory.limit_in_bytes", false),
            ("memory.memsw.limit_in_bytes", true),
        ];
        let folder = limits.folders[1].clone();
        (
            limits,
            memory
                .map(|(file, optional)| (folder.join(file), optional))
                .to_vec(),
        )
    }

    /// Words of a shell that put it, and what it becomes, in here.
    pub fn enter(&self) -> String {
        let enter = |folder: &PathBuf| format!("echo $$ >{}/cgroup.procs &&", folder.display());
        self.folders.iter().map(enter).collect()
    }

    /// As much processor time as there is, from now on.
    pub fn lift(&self) {
        self.set(false).expect("it was set before");
    }

    fn set(&self, limited: bool) -> io::Result<()> {
        let (file, limit, none) = &self.quota;
        fs::write(file, if limited { limit } else { *none })
    }

    /// Periods in which it had to wait for the next one.
    pub fn throttled(&self) -> u64 {
        field(&self.throttled, "nr_throttled")
    }

    /// Processes that were killed for want of memory.
    pub fn killed(&self) -> u64 {
        field(&self.killed, "oom_kill")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in &self.folders {
            // Somebody may be in it if the test failed.
            let _ = fs::remove_dir(folder);
        }
    }
}

fn write(file: &Path, bytes: usize, optional: bool) -> io::Result<()> {
    if optional && !file.exists() {
        return Ok(());
    }
    fs::write(file, bytes.to_string())
}

/// A number in a file of `name number` lines.
fn field(file: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(file).expect("the kernel's");
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let value = lines.find(|(field, _)| *field == name);
    value
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or_else(|| panic!("{name} in {text}"))
}
