//! What the fronts need of whatever generates: a trait, so that tests can put a scripted engine behind real sockets.

use std::sync::Arc;

use futures::{Stream, future::BoxFuture};
use tokio::sync::watch;

use crate::{
    ask::{Ask, Event, Failure, Refusal},
    dispatch::{Dispatcher, Generation},
    fleet::ModelEntry,
};

/// A request that runs. The stream ends after the last candidate's `Finished` or with one failure; dropping it cancels.
pub trait Run: Stream<Item = Result<Event, Failure>> + Send + Unpin {
    /// No more is wanted of this candidate, and nothing more comes of it.
    fn stop(&mut self, candidate: u32);
}

/// Models, and a way to have them generate.
pub trait Engine: Send + Sync + 'static {
    /// All models that were ever discovered.
    fn models(&self) -> Vec<Arc<ModelEntry>>;
    /// By any of its served names.
    fn model(&self, name: &str) -> Option<Arc<ModelEntry>>;
    /// Told after each change of what the two above answer.
    fn changes(&self) -> watch::Receiver<()>;
    /// Waits for a replica; resolves when one has accepted the request.
    fn generate(&self, ask: Ask) -> BoxFuture<'static, Result<Box<dyn Run>, Refusal>>;
    /// Whether what is there to be found has been.
    fn is_settled(&self) -> bool;
}

impl Run for Generation {
    fn stop(&mut self, candidate: u32) {
        Generation::stop(self, candidate);
    }
}

impl Engine for Dispatcher {
    fn models(&self) -> Vec<Arc<ModelEntry>> {
        Dispatcher::models(self)
    }

    fn model(&self, name: &str) -> Option<Arc<ModelEntry>> {
        Dispatcher::model(self, name)
    }

    fn changes(&self) -> watch::Receiver<()> {
        Dispatcher::changes(self)
    }

    fn generate(&self, ask: Ask) -> BoxFuture<'static, Result<Box<dyn Run>, Refusal>> {
        let dispatcher = self.clone();
        Box::pin(async move {
            let generation = dispatcher.generate(ask).await?;
            Ok(Box::new(generation) as Box<dyn Run>)
        })
    }

    fn is_settled(&self) -> bool {
        Dispatcher::is_settled(self)
    }
}
