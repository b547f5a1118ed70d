//! The one thread that loads the model and then runs the loop on it, so that a runner never changes threads.

use std::sync::Arc;

use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use super::{Loaded, ServeError, compiler::Compiler, session::Open};
use crate::{
    engine::{Engine, INBOX_MAX, Parts, Runner},
    metrics::{Metrics, Sizes},
    state::State,
};

/// What the engine's thread takes along.
pub(super) struct EngineThread {
    pub(super) state: Arc<State>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) max_waiting: u32,
}

impl EngineThread {
    pub(super) fn run<R, L>(
        self,
        load: L,
        runtime: Handle,
        loaded_tx: oneshot::Sender<Open>,
        ended_tx: oneshot::Sender<Result<(), ServeError>>,
    ) where
        R: Runner,
        L: FnOnce(&State) -> Result<Loaded<R>, ServeError>,
    {
        let mut engine = match self.start(load, runtime) {
            Ok((engine, open)) => {
                // Nobody waits any more where a signal came during the load.
                if loaded_tx.send(open).is_err() {
                    return;
                }
                engine
            }
            Err(error) => {
                // The receiver may have gone for the same reason.
                let _ = ended_tx.send(Err(error));
                return;
            }
        };
        // The word goes out before the engine is dropped: a stalled rank would hold up its end.
        let _ = ended_tx.send(engine.run().map_err(ServeError::from));
    }

    fn start<R, L>(self, load: L, runtime: Handle) -> Result<(Engine<R>, Open), ServeError>
    where
        R: Runner,
        L: FnOnce(&State) -> Result<Loaded<R>, ServeError>,
    {
        let loaded = load(&self.state)?;
        let sizes = Sizes {
            block_tokens: loaded.limits.block_tokens,
            n_blocks: loaded.limits.n_blocks,
            max_model_len: loaded.limits.max_model_len,
        };
        let engine_metrics = self.metrics.start_engine(sizes)?.clone();
        self.state.loaded(loaded.measured, loaded.limits.max_model_len);
        engine_metrics.memory(&loaded.runner.memory());
        let facts = Arc::new(loaded.facts);
        let (inbox_tx, inbox) = mpsc::channel(INBOX_MAX);
        let open = Open {
            inbox: inbox_tx,
            door: Arc::new(loaded.door),
            compiler: Arc::new(Compiler::new(facts.grammars(), engine_metrics.clone())),
            facts: Arc::clone(&facts),
        };
        let engine = Engine::new(Parts {
            runner: loaded.runner,
            limits: loaded.limits,
            pace: loaded.pace,
            standing: self.max_waiting,
            facts,
            state: self.state,
            metrics: engine_metrics,
            inbox,
            runtime,
        });
        Ok((engine, open))
    }
}
