//! The threads of one rank: the rank's own thread and its helpers, which share out one operation at a time.
//!
//! A decode step is hundreds of operations of some ten microseconds each, so helpers spin between them and sleep only
//! when nothing comes; a general thread pool's sleeping and waking costs as much as the work. Pieces of an operation are
//! claimed one by one: a helper that was descheduled holds up nobody but the piece it is in.
//!
//! What a piece computes never depends on how work was cut, so the number of threads changes no bit of a result.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Pieces for each thread: more than one, so that slow threads get fewer.
const PIECES: usize = 8;
/// Spins of an idle helper before it sleeps, some 50 microseconds: longer than the gaps within a step.
const SPINS: usize = 2_000;

/// A rank's threads. Belongs to the rank's thread, which is one of them.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// An operation is under way; also keeps the team on its thread.
    busy: Cell<bool>,
}

/// What an operation is made of: called with the index of each piece.
type Operation = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Operation number in the upper half, unclaimed pieces in the lower. A claim takes one piece and compares both, so
    /// that a thread with an old number in hand cannot take a piece of the next operation.
    ticket: AtomicU64,
    /// Written by the owner while there are no pieces; read by those who hold a piece, which keeps it alive.
    operation: UnsafeCell<Option<Operation>>,
    /// Finished pieces of this operation.
    done: AtomicUsize,
    /// The first panic of this operation.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    spins: usize,
    stop: AtomicBool,
    n_asleep: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `operation` is the one field that is not safe by itself: see its comment and `claim`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Team {
    /// `threads` in all, this one included; `name` begins the helpers' names. `crowded` if there are fewer cores than
    /// threads, so that spinning only takes time from others.
    pub fn new(name: &str, threads: usize, crowded: bool) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            operation: UnsafeCell::new(None),
            done: AtomicUsize::new(0),
            panic: Mutex::new(None),
            spins: if crowded { 1 } else { SPINS },
            stop: AtomicBool::new(false),
            n_asleep: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut helpers = Vec::new();
        for i in 1..threads {
            let shared = shared.clone();
            match std::thread::Builder::new()
                .name(format!("{name}.{i}"))
                .spawn(move || shared.help())
            {
                Ok(helper) => helpers.push(helper),
                // The team is slower, not wrong.
                Err(error) => tracing::warn!(%error, thread = i, "a rank could not start a helper thread"),
            }
        }
        Self {
            shared,
            helpers,
            busy: Cell::new(false),
        }
    }

    /// Threads there are.
    pub fn threads(&self) -> usize {
        1 + self.helpers.len()
    }

    /// Calls `f` for ranges that cover `0..n`, at least `grain` long if possible; on this thread alone if the work is
    /// not worth sharing. Returns when all is done; a panic in a piece continues here.
    pub fn each(&self, n: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
        let pieces = (n / grain.max(1)).min(self.threads() * PIECES);
        if self.helpers.is_empty() || pieces <= 1 {
            if n > 0 {
                f(0..n);
            }
            return;
        }
        self.run(pieces, &|i| f(n * i / pieces..n * (i + 1) / pieces));
    }

    /// What `f` makes of each item, in order, each item a piece of its own.
    pub fn map<T: Sync, R: Send>(&self, items: &[T], f: impl Fn(&T) -> R + Sync) -> Vec<R> {
        if self.helpers.is_empty() || items.len() <= 1 {
            return items.iter().map(f).collect();
        }
        let made: Vec<Mutex<Option<R>>> = items.iter().map(|_| Mutex::new(None)).collect();
        self.run(items.len(), &|i| {
            let result = f(&items[i]);
            *made[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        });
        let result = |cell: Mutex<Option<R>>| cell.into_inner().unwrap_or_else(PoisonError::into_inner);
        made.into_iter()
            .map(|cell| result(cell).expect("every piece is done"))
            .collect()
    }

    fn run(&self, pieces: usize, f: &(dyn Fn(usize) + Sync)) {
        assert!(!self.busy.replace(true), "an operation cannot start another");
        let shared = &*self.shared;
        // SAFETY: the pointer outlives the borrow only in name: this function returns after every claimed piece is
        // done, and nobody uses it without a piece. No piece is out now, so nobody reads the cell.
        unsafe {
            *shared.operation.get() = Some(std::mem::transmute::<&(dyn Fn(usize) + Sync), Operation>(f))
        };
        shared.done.store(0, Ordering::Relaxed);
        let number = (shared.ticket.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Sequentially consistent, as is a sleeper's look at it: one of the two sees the other.
        shared
            .ticket
            .store(number << 32 | pieces as u64, Ordering::SeqCst);
        if shared.n_asleep.load(Ordering::SeqCst) > 0 {
            let _guard = shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        while let Some(piece) = shared.claim() {
            shared.work(piece);
        }
        let mut spins = 0;
        while shared.done.load(Ordering::Acquire) < pieces {
            spins += 1;
            if spins > shared.spins {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        self.busy.set(false);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for helper in self.helpers.drain(..) {
            let _ = helper.join(); // panics were caught
        }
    }
}

impl Shared {
    /// Takes a piece of the operation under way, if one is left.
    fn claim(&self) -> Option<usize> {
        let take = |ticket: u64| (ticket as u32 > 0).then(|| ticket - 1);
        let ticket = self
            .ticket
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .ok()?;
        Some(ticket as u32 as usize - 1)
    }

    fn work(&self, piece: usize) {
        // SAFETY: the piece was claimed and is not done, so its operation is not over: the cell holds that operation
        // and nobody writes it, and the closure is alive.
        let operation = unsafe { (*self.operation.get()).map(|f| &*f) };
        if let Some(operation) = operation
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| operation(piece)))
        {
            self.panic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(panic);
        }
        self.done.fetch_add(1, Ordering::Release);
    }

    fn help(&self) {
        let mut spins = 0;
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(piece) = self.claim() {
                self.work(piece);
                spins = 0;
            } else if spins < self.spins {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.doze();
                spins = 0;
            }
        }
    }

    /// Sleeps until there are pieces, or the team ends.
    fn doze(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.n_asleep.fetch_add(1, Ordering::SeqCst);
        while self.ticket.load(Ordering::SeqCst) as u32 == 0 && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.n_asleep.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        for (threads, crowded) in [(1, false), (2, false), (3, true), (8, true)] {
            let team = Team::new("test", threads, crowded);
            for n in [0, 1, 2, 7, 100, 1000] {
                for grain in [1, 3, 50] {
                    let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                    team.each(n, grain, |range| {
                        for i in range {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(
                        counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                        "{threads} {n} {grain}"
                    );
                }
            }
            let items: Vec<usize> = (0..100).collect();
            assert_eq!(
                team.map(&items, |i| i * i),
                items.iter().map(|i| i * i).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn helpers_wake_after_they_slept() {
        let team = Team::new("test", 4, false);
        for _ in 0..3 {
            while team.shared.n_asleep.load(Ordering::SeqCst) < 3 {
                std::thread::yield_now();
            }
            let seen = Mutex::new(std::collections::HashSet::new());
            let barrier = std::sync::Barrier::new(4);
            team.map(&[(); 4], |()| {
                barrier.wait(); // only passed if four threads take a piece each
                seen.lock().expect("no panic").insert(std::thread::current().id());
            });
            assert_eq!(seen.into_inner().expect("no panic").len(), 4);
        }
    }

    #[test]
    fn a_panic_in_a_piece_continues_on_the_owner() {
        let team = Team::new("test", 3, true);
        for _ in 0..10 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.each(100, 1, |range| assert!(!range.contains(&57), "piece 57"));
            }));
            assert!(result.is_err());
        }
        assert_eq!(team.map(&[1, 2, 3], |i| i + 1), [2, 3, 4]);
    }
}
