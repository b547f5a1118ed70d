//! A wall clock that a test sets, for programs that it starts: a library before the system's, and a file that says how far
//! it is off.

use std::{
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

/// A folder with the library and the file that sets the clock, that goes with its test.
pub struct Clock(PathBuf);

impl Clock {
    /// A clock that is right, so far.
    ///
    /// # Panics
    /// If there is no C compiler.
    pub fn right() -> Self {
        static CLOCKS: AtomicUsize = AtomicUsize::new(0);
        let n = CLOCKS.fetch_add(1, Ordering::Relaxed);
        let name = format!("swallow-clock-{}-{n}", std::process::id());
        let clock = Self(std::env::temp_dir().join(name));
        std::fs::create_dir(&clock.0).expect("the temporary folder can be written");
        clock.set(0);
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(clock.0.join("clock.so"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/support/clock.c"))
            .status()
            .expect("a C compiler, which building needs too");
        assert!(built.success());
        clock
    }

    /// Off by so many seconds from now on.
    pub fn set(&self, seconds: i64) {
        // Whoever reads it meanwhile has the old one or the new one.
        let (new, offset) = (self.0.join("new"), self.0.join("offset"));
        std::fs::write(&new, seconds.to_string()).expect("it can be written");
        std::fs::rename(new, offset).expect("it can be written");
    }

    /// The environment of a program that goes by it.
    pub fn env(&self) -> [(&'static str, String); 2] {
        let path = |name| self.0.join(name).display().to_string();
        [("LD_PRELOAD", path("clock.so")), ("CLOCK_OFFSET", path("offset"))]
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        // It may be gone.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
