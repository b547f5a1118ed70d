//! Prometheus metrics, in vLLM's names where vLLM has one, so that autoscalers, dashboards and gateways made for it
//! work unchanged; our own begin with `swallow_worker_`.
//!
//! A metric exists once something feeds it: those of the engine appear when the engine starts.

mod engine;
mod maker;
mod requests;

use std::{collections::HashMap, sync::OnceLock};

use prometheus::{Encoder, Gauge, IntGauge, Registry, TextEncoder, process_collector::ProcessCollector};

use self::maker::Maker;
use crate::state::{Phase, State};

pub(crate) use engine::StepDone;
pub use engine::{EngineMetrics, Outcome};
pub use requests::Timeline;

/// The process's metrics.
pub struct Metrics {
    registry: Registry,
    labels: HashMap<String, String>,
    ready: IntGauge,
    load_done: IntGauge,
    load_size: IntGauge,
    load_seconds: Gauge,
    engine: OnceLock<EngineMetrics>,
}

impl Metrics {
    /// Those that exist before the model is loaded: readiness, load progress, and the process's own.
    ///
    /// # Errors
    /// Never for names that are constants; the registry's type says it could.
    pub fn new(model_name: &str) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let labels: HashMap<_, _> = [("model_name", model_name), ("engine", "0")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let make = Maker {
            registry: &registry,
            labels: &labels,
        };
        let ready = make.gauge("swallow_worker_ready", "1 while requests are taken")?;
        let load_done = make.gauge(
            "swallow_worker_load_done_bytes",
            "Bytes of weights already in memory",
        )?;
        let load_size = make.gauge("swallow_worker_load_size_bytes", "Bytes of weights in all")?;
        let load_seconds = make.ratio(
            "swallow_worker_load_seconds",
            "How long it took to bring the weights into memory; 0 until they are there",
        )?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Self {
            registry,
            labels,
            ready,
            load_done,
            load_size,
            load_seconds,
            engine: OnceLock::new(),
        })
    }

    /// Adds the engine's, once the pool's size and the context's length are known.
    ///
    /// # Errors
    /// They exist already.
    pub fn start_engine(&self, sizes: Sizes) -> Result<&EngineMetrics, prometheus::Error> {
        let made = EngineMetrics::register(
            &Maker {
                registry: &self.registry,
                labels: &self.labels,
            },
            sizes,
        )?;
        Ok(self.engine.get_or_init(|| made))
    }

    /// The text that Prometheus scrapes.
    ///
    /// # Errors
    /// A collector gave what the format cannot express.
    pub fn render(&self, state: &State) -> Result<String, prometheus::Error> {
        let progress = state.progress();
        let bytes = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.ready.set(i64::from(state.phase() == Phase::Serving));
        self.load_done.set(bytes(progress.bytes_done));
        self.load_size.set(bytes(progress.bytes_total));
        self.load_seconds.set(progress.seconds.unwrap_or(0.0));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

/// What the engine's metrics are sized by.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Tokens in one block.
    pub block_tokens: u32,
    /// Blocks in the pool.
    pub n_blocks: u32,
    /// Prompt and output of one sequence together.
    pub max_model_len: u32,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use swallow_schedule::{Finish, Load};

    use super::*;
    use crate::state::Identity;

    #[test]
    fn engine_metrics_appear_with_the_engine_and_carry_vllm_names() {
        let metrics = Metrics::new("m").expect("constant names");
        let state = State::new(Identity {
            replica_id: "r".into(),
            served_names: vec!["m".into()],
            tensor_parallel: 1,
        });
        let before = metrics.render(&state).expect("renders");
        assert!(
            before.contains(r#"swallow_worker_ready{engine="0",model_name="m"} 0"#),
            "{before}"
        );
        assert!(!before.contains("vllm:"), "nothing feeds these yet: {before}");
        let sizes = Sizes {
            block_tokens: 16,
            n_blocks: 10,
            max_model_len: 160,
        };
        let engine = metrics.start_engine(sizes).expect("once").clone();
        engine.load(&Load {
            blocks_held: 5,
            blocks_total: 10,
            preemptions: 3,
            ..Load::default()
        });
        engine.load(&Load {
            blocks_held: 5,
            blocks_total: 10,
            preemptions: 4,
            ..Load::default()
        });
        let life = Timeline {
            finished: Duration::from_secs(1),
            output_tokens: 2,
            ..Timeline::default()
        };
        engine.finished(Outcome::Finished(Finish::Cancelled), &life);
        let text = metrics.render(&state).expect("renders");
        for line in [
            r#"vllm:cache_config_info{block_size="16",engine="0",model_name="m",num_gpu_blocks="10"} 1"#,
            r#"vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5"#,
            r#"vllm:num_preemptions_total{engine="0",model_name="m"} 4"#,
            r#"vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 1"#,
            r#"vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 0"#,
            r#"vllm:request_prompt_tokens_bucket{engine="0",model_name="m",le="100"} 1"#,
        ] {
            assert!(
                text.lines().any(|have| have == line),
                "{line} is missing in\n{text}"
            );
        }
        assert!(
            !text.contains(r#"le="200""#),
            "no request is longer than the context"
        );
    }
}
