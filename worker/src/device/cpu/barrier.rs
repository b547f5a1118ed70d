//! Where the threads of a group meet. Closing it releases everybody, for good.
//!
//! A rank that fails never arrives, so waiting must be able to end without it. Waiters spin first, because ranks of equal
//! work arrive within microseconds of each other, and sleep later, because a machine may have fewer cores than ranks.

use std::{
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Spins before a waiter sleeps: about as long as waking a sleeper takes.
const SPINS: usize = 2_000;
/// Sleepers look up this often even if nobody wakes them; a bound, not a schedule.
const LOOK_UP: Duration = Duration::from_millis(100);

/// The meeting was called off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// A reusable barrier for a fixed number of threads.
pub struct Barrier {
    n: usize,
    spins: usize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    closed: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Barrier {
    /// For `n` threads; `crowded` if there are fewer cores than threads, so that spinning only takes time from others.
    pub fn new(n: usize, crowded: bool) -> Self {
        Self {
            n,
            spins: if crowded { 1 } else { SPINS },
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// Returns when all have arrived. What they wrote before is then visible to all.
    ///
    /// # Errors
    /// If the barrier was closed before all had arrived.
    pub fn wait(&self) -> Result<(), Closed> {
        // Every arrival reads the generation before it counts itself; the last one advances it after all have.
        let generation = self.generation.load(Ordering::Acquire);
        if self.is_closed() {
            return Err(Closed);
        }
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.n {
            self.arrived.store(0, Ordering::Relaxed);
            let _guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.generation
                .store(generation.wrapping_add(1), Ordering::Release);
            self.wake.notify_all();
            return Ok(());
        }
        let passed = || self.generation.load(Ordering::Acquire) != generation;
        for _ in 0..self.spins {
            if passed() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        while !passed() && !self.is_closed() {
            guard = self
                .wake
                .wait_timeout(guard, LOOK_UP)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if passed() { Ok(()) } else { Err(Closed) }
    }

    /// Releases all who wait and all who will.
    pub fn close(&self) {
        let _guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Ordering::Release);
        self.wake.notify_all();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Sleeps until it is closed.
    pub fn wait_closed(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.is_closed() {
            guard = self
                .wake
                .wait_timeout(guard, LOOK_UP)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn nobody_passes_before_all_have_arrived() {
        for crowded in [true, false] {
            let (barrier, count) = (Barrier::new(4, crowded), AtomicU64::new(0));
            std::thread::scope(|s| {
                for _ in 0..4 {
                    s.spawn(|| {
                        for round in 1..=1000 {
                            count.fetch_add(1, Ordering::Relaxed);
                            barrier.wait().expect("open");
                            assert_eq!(count.load(Ordering::Relaxed), 4 * round);
                            barrier.wait().expect("open");
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn closing_releases_those_who_wait() {
        let barrier = Barrier::new(2, false);
        std::thread::scope(|s| {
            let waiter = s.spawn(|| barrier.wait());
            let watcher = s.spawn(|| barrier.wait_closed());
            barrier.close();
            assert_eq!(waiter.join().expect("no panic"), Err(Closed));
            watcher.join().expect("no panic");
        });
        assert_eq!(barrier.wait(), Err(Closed));
    }
}
