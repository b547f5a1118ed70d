//! Tasks that the process cannot live without: a panic in one of them ends it.
//!
//! A router whose dispatcher, discovery or listener is gone would look alive and answer nobody. Requests are another
//! matter: a panic while one is served ends that request alone.

use std::{any::Any, future::Future, panic::AssertUnwindSafe, sync::Arc};

use futures::FutureExt;
use tokio::sync::watch;

/// The first such panic.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the task '{task}' panicked: {message}")]
pub struct Panicked {
    /// Whose.
    pub task: String,
    /// What it said.
    pub message: String,
}

/// Watches over tasks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Vitals(Arc<watch::Sender<Option<Panicked>>>);

impl Vitals {
    /// All is well.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Runs a task, watched over; `None` if it panicked.
    pub async fn guard<F: Future>(self, task: String, future: F) -> Option<F::Output> {
        // What a panic leaves half-done is not used again: the process ends.
        match AssertUnwindSafe(future).catch_unwind().await {
            Ok(output) => Some(output),
            Err(panic) => {
                self.report(task, message(&*panic));
                None
            }
        }
    }

    /// Something is broken that nothing here works without. The first report counts.
    pub fn report(&self, task: impl Into<String>, message: impl Into<String>) {
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert_with(|| Panicked {
                task: task.into(),
                message: message.into(),
            });
            is_first
        });
    }

    /// Resolves with the first panic, if there ever is one.
    pub async fn panicked(&self) -> Panicked {
        let mut reports = self.0.subscribe();
        let first = reports.wait_for(Option::is_some).await;
        first
            .expect("the sender is in our hands")
            .clone()
            .expect("waited for")
    }
}

impl Default for Vitals {
    fn default() -> Self {
        Self::new()
    }
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".to_owned())
}
