//! What dispatching tells, counted. Replicas leave with their series.

use std::time::{Duration, Instant};

use swallow_policy::{Depth, Load, Why};

use super::Metrics;
use crate::observe::{MoveCause, Observer, ReplicaState, WatchEnd};

impl Observer for Metrics {
    fn chose(&self, model: &str, _replica: &str, why: &Why, waited: Duration) {
        self.dispatch
            .choices
            .with_label_values(&[model, why.label()])
            .inc();
        self.dispatch
            .queue_wait
            .with_label_values(&[model])
            .observe(waited.as_secs_f64());
    }

    fn accepted(&self, model: &str, predicted_tokens: u32, cached_tokens: u32) {
        let (sign, off) = if predicted_tokens > cached_tokens {
            ("over", predicted_tokens - cached_tokens)
        } else {
            ("under", cached_tokens - predicted_tokens)
        };
        self.tokens
            .misprediction
            .with_label_values(&[model, sign])
            .inc_by(off.into());
        self.tokens
            .predicted
            .with_label_values(&[model])
            .inc_by(predicted_tokens.into());
    }

    fn queue(&self, depth: Depth) {
        self.dispatch.queue_requests.set(depth.requests.into());
        self.dispatch
            .queue_tokens
            .set(i64::try_from(depth.tokens).unwrap_or(i64::MAX));
        self.dispatch
            .queue_bytes
            .set(i64::try_from(depth.bytes).unwrap_or(i64::MAX));
    }

    fn moved(&self, model: &str, cause: MoveCause) {
        self.dispatch
            .moves
            .with_label_values(&[model, cause.label()])
            .inc();
    }

    fn replica(&self, model: &str, replica: &str, state: ReplicaState) {
        for other in ReplicaState::ALL {
            let labels = [model, replica, other.label()];
            if state == ReplicaState::Gone {
                // Absent is as good as removed.
                let _ = self.replicas.state.remove_label_values(&labels);
            } else if other != ReplicaState::Gone {
                self.replicas
                    .state
                    .with_label_values(&labels)
                    .set((other == state).into());
            }
        }
        if matches!(state, ReplicaState::Gone | ReplicaState::Down) {
            let _ = self.replicas.running.remove_label_values(&[model, replica]);
            let _ = self.replicas.waiting.remove_label_values(&[model, replica]);
        }
    }

    fn load(&self, model: &str, replica: &str, load: Load) {
        self.replicas
            .running
            .with_label_values(&[model, replica])
            .set(load.running.into());
        self.replicas
            .waiting
            .with_label_values(&[model, replica])
            .set(load.waiting.into());
    }

    fn submitted(&self, model: &str, _replica: &str, requests: usize) {
        self.replicas
            .submit_requests
            .with_label_values(&[model])
            .observe(requests as f64);
    }

    fn stepped(&self, model: &str, _replica: &str, tokens: usize) {
        self.replicas
            .step_tokens
            .with_label_values(&[model])
            .observe(tokens as f64);
    }

    fn cancelled(&self, model: &str, _replica: &str, confirmed_after: Duration) {
        self.replicas
            .cancel_seconds
            .with_label_values(&[model])
            .observe(confirmed_after.as_secs_f64());
    }

    fn slow_client(&self, model: &str) {
        self.dispatch.slow_clients.with_label_values(&[model]).inc();
    }

    fn endpoints(&self, model: &str, count: usize) {
        self.discovery
            .endpoints
            .with_label_values(&[model])
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    fn watch_ended(&self, model: &str, end: WatchEnd) {
        self.discovery
            .watch_ends
            .with_label_values(&[model, end.label()])
            .inc();
    }

    fn discovery_stale(&self, model: &str, since: Option<Instant>) {
        self.stale().insert(model.to_owned(), since);
    }

    fn cache_events_missed(&self, model: &str, _replica: &str) {
        self.replicas
            .cache_events_missed
            .with_label_values(&[model])
            .inc();
    }
}
