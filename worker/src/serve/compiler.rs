//! Requests with a grammar on their way to the loop: compiling blocks, so they wait here and all others pass.
//!
//! A request that is cancelled while it waits still enters the loop and is cancelled there: each submission has one last
//! word, and the loop says it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, mpsc};

use crate::{
    engine::{Command, Order, SessionId, Submission, Ticket},
    grammar::{Constraint, Grammars, Source},
    metrics::EngineMetrics,
};

/// Grammars that are compiled at once, of all sessions.
const AT_ONCE: usize = 2;
/// The grammars' own bounds end a compilation long before, on any machine that is not drowned in work.
const WITHIN: Duration = Duration::from_secs(10);

/// Compiles for all sessions.
pub(super) struct Compiler {
    grammars: Arc<Grammars>,
    metrics: EngineMetrics,
    permits: Arc<Semaphore>,
}

impl Compiler {
    pub(super) fn new(grammars: Grammars, metrics: EngineMetrics) -> Self {
        Self {
            metrics,
            grammars: Arc::new(grammars),
            permits: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    async fn place(&self, source: Source, said: Vec<u32>) -> Result<Constraint, String> {
        let permit = Arc::clone(&self.permits)
            .acquire_owned()
            .await
            .expect("never closed");
        let (grammars, began) = (Arc::clone(&self.grammars), Instant::now());
        let job = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            grammars.constraint(&source, &said)
        });
        let outcome = tokio::time::timeout(WITHIN, job).await;
        self.metrics
            .grammar(matches!(outcome, Ok(Ok(Ok(_)))), began.elapsed());
        match outcome {
            Ok(Ok(Ok(constraint))) => Ok(constraint),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Err(_panicked)) => Err("the grammar can't be used: compiling it failed".to_owned()),
            Err(_late) => Err(format!(
                "the grammar can't be used: compiling it took more than {} s; send a simpler one",
                WITHIN.as_secs()
            )),
        }
    }
}

/// A session's requests that wait for their grammars: handle and whether it was cancelled.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiting(Arc<Mutex<HashMap<u32, bool>>>);

impl Waiting {
    fn handles(&self) -> MutexGuard<'_, HashMap<u32, bool>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that the loop knows; the others are cancelled when they get there.
    pub(super) fn cancel(&self, mut handles: Vec<u32>) -> Vec<u32> {
        let mut waiting = self.handles();
        handles.retain(|handle| match waiting.get_mut(handle) {
            Some(cancelled) => {
                *cancelled = true;
                false
            }
            None => true,
        });
        handles
    }
}

/// One of them.
pub(super) struct Entry {
    pub(super) session: SessionId,
    pub(super) handle: u32,
    pub(super) order: (Ticket, Box<Order>),
    pub(super) source: Source,
    pub(super) arrived: Instant,
}

impl Entry {
    /// It waits from now on.
    pub(super) fn enter(
        self,
        compiler: Arc<Compiler>,
        inbox: mpsc::Sender<Command>,
        waiting: Waiting,
    ) -> impl Future<Output = ()> {
        waiting.handles().insert(self.handle, false);
        async move {
            let Self {
                session,
                handle,
                order: (ticket, mut order),
                source,
                arrived,
            } = self;
            let said = order.prompt[order.prompt.len() - order.params.resumed as usize..].to_vec();
            let order = compiler.place(source, said).await.map(|constraint| {
                order.params.grammar = Some(constraint);
                (ticket, order)
            });
            let submissions = vec![Submission { handle, order }];
            // A loop that is gone has told every router.
            let _ = inbox
                .send(Command::Submit {
                    session,
                    submissions,
                    arrived,
                })
                .await;
            let cancelled = waiting.handles().remove(&handle);
            if cancelled == Some(true) {
                let handles = vec![handle];
                let _ = inbox.send(Command::Cancel { session, handles }).await;
            }
        }
    }
}
