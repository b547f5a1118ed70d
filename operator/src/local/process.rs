//! One child process: started so that it cannot outlive this one, stopped with or without mercy.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill, killpg},
    },
    unistd::{Pid, getpid, getppid},
};

/// The most bytes at the end of a log in which its last line is looked for.
const TAIL_MAX: u64 = 16 << 10;

/// A running child, or one that has ended and was not asked about yet.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

/// What to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program's file.
    pub program: &'a Path,
    /// Its arguments.
    pub argv: Vec<String>,
    /// Gets what it writes to standard error, after what is there already.
    pub log: &'a Path,
    /// Gets what it writes to standard output; `None`: the log does.
    pub output: Option<&'a Path>,
    /// A variable of its environment that is not as here.
    pub env: Option<(&'a str, &'a str)>,
}

impl Process {
    /// Starts a child in a process group of its own, so that Ctrl-C reaches this process alone.
    ///
    /// The kernel kills the child when the calling thread ends; call it from a thread that lives as long as the process.
    pub fn start(launch: &Launch<'_>) -> io::Result<Self> {
        let log = append(launch.log)?;
        let output = match launch.output {
            Some(path) => File::create(path)?,
            None => log.try_clone()?,
        };
        let parent = getpid();
        let mut command = Command::new(launch.program);
        command
            .args(&launch.argv)
            .envs(launch.env)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(log)
            .process_group(0);
        // SAFETY: between fork and exec the closure makes two system calls, prctl and getppid, which are
        // async-signal-safe, and allocates nothing: the error is a plain number.
        unsafe {
            command.pre_exec(move || {
                set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have ended before the line above took effect; nobody would end this child then.
                if getppid() == parent {
                    Ok(())
                } else {
                    Err(io::Error::from_raw_os_error(nix::libc::ESRCH))
                }
            });
        }
        Ok(Self {
            child: command.spawn()?,
        })
    }

    /// How it ended, once it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        // An error means that there is no such child any more, and how it ended cannot be learnt.
        self.child
            .try_wait()
            .unwrap_or_else(|_| Some(ExitStatus::from_raw(0)))
    }

    /// Asks it to finish what it does and end.
    pub fn terminate(&mut self) {
        if self.ended().is_none() {
            // It may end between the two calls; it is not reaped before the next `ended`, so the id is still its own.
            let _ = kill(self.pid(), Signal::SIGTERM);
        }
    }

    /// Ends it and everything it started, and waits for that.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("process ids fit into 31 bits"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How a process ended, in words.
pub fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(number)) => {
            let name =
                Signal::try_from(number).map_or_else(|_| number.to_string(), |signal| signal.to_string());
            format!("was ended by {name}")
        }
        (None, None) => "ended".into(),
    }
}

/// The program of that name in a folder.
pub fn find(folder: &Path, name: &str) -> Result<PathBuf, String> {
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(format!(
        "{} is missing: build it, or say with --bin-dir where it is",
        path.display()
    ))
}

/// The last line of a file that says anything.
pub fn last_line(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_MAX))).ok()?;
    let mut tail = Vec::new();
    file.take(TAIL_MAX).read_to_end(&mut tail).ok()?;
    let text = String::from_utf8_lossy(&tail);
    text.lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .map(str::to_owned)
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;

    fn shell(folder: &Path, script: &str) -> Process {
        let log = folder.join("log");
        let launch = Launch {
            program: Path::new("/bin/sh"),
            argv: vec!["-c".into(), script.into()],
            log: &log,
            output: None,
            env: None,
        };
        Process::start(&launch).expect("sh is there")
    }

    fn wait_for<T>(mut condition: impl FnMut() -> Option<T>) -> T {
        let start = std::time::Instant::now();
        loop {
            if let Some(value) = condition() {
                return value;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "waited in vain");
            std::thread::sleep(Duration::from_millis(5)); // Between two looks at a condition.
        }
    }

    fn is_alive(pid: &str) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            !stat
                .rsplit(')')
                .next()
                .unwrap_or_default()
                .trim_start()
                .starts_with(['Z', 'X'])
        })
    }

    #[test]
    fn an_end_is_seen_with_its_words() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut process = shell(folder.path(), "echo out; echo the reason >&2; exit 3");
        let status = wait_for(|| process.ended());
        assert_eq!(in_words(status), "ended with exit code 3");
        assert_eq!(
            last_line(&folder.path().join("log")).as_deref(),
            Some("the reason")
        );
        let mut process = shell(folder.path(), "kill -9 $$");
        assert_eq!(in_words(wait_for(|| process.ended())), "was ended by SIGKILL");
    }

    #[test]
    fn terminate_is_polite_and_kill_takes_descendants() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = folder.path().join("log");
        let mut process = shell(
            folder.path(),
            "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done",
        );
        wait_for(|| last_line(&log).filter(|line| line == "up"));
        process.terminate();
        assert_eq!(wait_for(|| process.ended()).code(), Some(0));
        assert_eq!(last_line(&log).as_deref(), Some("bye"));

        let mut process = shell(folder.path(), "trap '' TERM; sleep 1000 & echo $!; wait");
        let grandchild = wait_for(|| last_line(&log).filter(|line| line.parse::<u32>().is_ok()));
        assert!(is_alive(&grandchild));
        process.kill();
        wait_for(|| (!is_alive(&grandchild)).then_some(()));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = find(Path::new("/nowhere"), "swallow-worker").expect_err("not there");
        assert_eq!(
            error,
            "/nowhere/swallow-worker is missing: build it, or say with --bin-dir where it is"
        );
    }
}
