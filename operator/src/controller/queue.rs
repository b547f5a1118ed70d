//! Which models are to be looked at, and when. A model is never looked at by two at once.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::cache::Key;

/// Changes come in bursts; this long is waited for the rest of one.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// The first wait after an error; it doubles with each.
const BACKOFF_FIRST: Duration = Duration::from_millis(500);
/// The longest wait after errors.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// Models by the time when they are due. Bounded by the number of models: each is in it at most once.
#[derive(Debug, Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    bell: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    order: BTreeSet<(Instant, Key)>,
    due: HashMap<Key, Instant>,
    running: HashSet<Key>,
    errors: HashMap<Key, u32>,
}

impl Queue {
    /// Something about the model changed.
    pub fn changed(&self, key: Key) {
        self.at(key, Instant::now() + DEBOUNCE);
    }

    /// The model is to be looked at then, if not before.
    pub fn at(&self, key: Key, time: Instant) {
        let mut inner = self.lock();
        match inner.due.get(&key).copied() {
            Some(before) if before <= time => return,
            Some(before) => {
                inner.order.remove(&(before, key.clone()));
            }
            None => {}
        }
        inner.due.insert(key.clone(), time);
        inner.order.insert((time, key));
        drop(inner);
        self.bell.notify_one();
    }

    /// The next model that is due; `done` must follow.
    pub async fn next(&self) -> Key {
        loop {
            let rung = self.bell.notified();
            let wait = {
                let mut inner = self.lock();
                let first = inner
                    .order
                    .iter()
                    .find(|(_, key)| !inner.running.contains(key))
                    .cloned();
                match first {
                    Some((time, key)) if time <= Instant::now() => {
                        inner.order.remove(&(time, key.clone()));
                        inner.due.remove(&key);
                        inner.running.insert(key.clone());
                        drop(inner);
                        // Another one may wait for what is behind this.
                        self.bell.notify_one();
                        return key;
                    }
                    Some((time, _)) => Some(time),
                    None => None,
                }
            };
            match wait {
                Some(time) => tokio::select! {
                    () = rung => {}
                    () = sleep_until(time) => {}
                },
                None => rung.await,
            }
        }
    }

    /// A look is over: well, or to be tried again after a wait.
    pub fn done(&self, key: &Key, well: bool) {
        let mut inner = self.lock();
        inner.running.remove(key);
        if well {
            inner.errors.remove(key);
            drop(inner);
            self.bell.notify_one();
            return;
        }
        let errors = inner.errors.entry(key.clone()).or_default();
        *errors = errors.saturating_add(1);
        let wait = BACKOFF_FIRST
            .saturating_mul(1 << (*errors - 1).min(16))
            .min(BACKOFF_MAX);
        drop(inner);
        self.at(key.clone(), Instant::now() + wait);
        self.bell.notify_one();
    }

    /// Models that are due now.
    pub fn length(&self) -> usize {
        let now = Instant::now();
        self.lock()
            .order
            .iter()
            .take_while(|(time, _)| *time <= now)
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new("ns", name)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_model_is_never_out_twice_and_a_change_meanwhile_is_not_lost() {
        let queue = Queue::default();
        queue.at(key("a"), Instant::now());
        assert_eq!(queue.next().await, key("a"));
        queue.at(key("a"), Instant::now());
        queue.at(key("b"), Instant::now());
        assert_eq!(queue.next().await, key("b"));
        queue.done(&key("a"), true);
        assert_eq!(queue.next().await, key("a"));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn errors_wait_longer_each_time_and_a_change_goes_first() {
        let queue = Queue::default();
        queue.at(key("a"), Instant::now());
        queue.next().await;
        queue.done(&key("a"), false);
        assert_eq!(queue.length(), 0, "it waits");
        queue.changed(key("a"));
        assert_eq!(queue.next().await, key("a"));
    }
}
