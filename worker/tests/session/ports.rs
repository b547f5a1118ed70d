//! Readiness, `/state`, `/metrics` and the health service, from loading to serving.

use std::sync::Arc;

use swallow_rpc::worker::v1::GetModelFileRequest;
use tokio::sync::Notify;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::harness::{EOS, Setup, Worker, hello, request};

#[tokio::test(flavor = "multi_thread")]
async fn readiness_means_loaded_and_nothing_less() {
    let gate = Arc::new(Notify::new());
    let worker = Worker::start(Setup {
        load_gate: Some(Arc::clone(&gate)),
        ..Setup::default()
    })
    .await;
    let mut health = worker.health().await;
    health.until(ServingStatus::NotServing).await;
    assert_eq!(worker.get("/healthz").await, (200, "ok\n".into()));
    assert_eq!(worker.get("/readyz").await, (503, "loading\n".into()));
    assert_eq!(worker.state().await["phase"], "loading");
    let status = worker.open(hello()).await.err().expect("refused");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("loading"), "{status}");
    let file = worker
        .client()
        .await
        .get_model_file(GetModelFileRequest { digest: "aa".into() })
        .await;
    assert_eq!(file.expect_err("refused").code(), Code::Unavailable);

    gate.notify_one();
    health.until(ServingStatus::Serving).await;
    assert_eq!(worker.get("/readyz").await, (200, "ready\n".into()));
    worker.router().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_while_loading_ends_the_process() {
    let gate = Arc::new(Notify::new());
    let worker = Worker::start(Setup {
        load_gate: Some(Arc::clone(&gate)),
        ..Setup::default()
    })
    .await;
    worker.health().await.until(ServingStatus::NotServing).await;
    worker.stop.drain.cancel();
    worker.ended().await.expect("nothing was lost");
    gate.notify_one();
}

#[tokio::test(flavor = "multi_thread")]
async fn state_and_metrics_tell_what_happened() {
    let worker = Worker::ready(Setup::default()).await;
    let mut router = worker.router().await;
    let prompt: Vec<u32> = (1..10).collect();
    router.submit(vec![request(1, &prompt, 5)]).await;
    router.finished(1).await;
    router
        .submit(vec![
            request(2, &prompt, 3),
            request(3, &[1, EOS], 9),
            request(4, &[], 9),
        ])
        .await;
    for handle in 2..=4 {
        router.finished(handle).await;
    }
    router.ping(1).await;

    let state = worker.state().await;
    assert_eq!(state["phase"], "serving");
    assert_eq!(
        (&state["model"], &state["replica_id"]),
        (&"echo".into(), &"replica-0".into())
    );
    assert_eq!(
        (&state["tensor_parallel"], &state["max_model_len"]),
        (&2.into(), &512.into())
    );
    assert_eq!(state["served_names"], serde_json::json!(["echo", "alias"]));
    assert_eq!(
        (&state["load"]["running"], &state["load"]["kv_blocks_total"]),
        (&0.into(), &256.into())
    );
    assert_eq!(
        state["memory"]["measured"],
        serde_json::json!({ "weights_bytes": 1, "kv_bytes": 2, "workspace_bytes": 3 })
    );
    assert_eq!(state["failure"], serde_json::Value::Null);
    assert!(state["progress"]["bytes_total"].is_u64());

    let (status, text) = worker.get("/metrics").await;
    assert_eq!(status, 200);
    let value = |series: &str| -> f64 {
        let labels = r#"engine="0","#;
        let found = text
            .lines()
            .find(|line| line.replace(labels, "").starts_with(series));
        let found = found.unwrap_or_else(|| panic!("{series} is missing in\n{text}"));
        found
            .rsplit(' ')
            .next()
            .and_then(|value| value.parse().ok())
            .expect("a number")
    };
    let model = r#"{model_name="echo"}"#;
    for (series, expected) in [
        ("vllm:num_requests_running", 0.0),
        ("vllm:num_requests_waiting", 0.0),
        ("vllm:prompt_tokens_total", 20.0),
        ("vllm:prompt_tokens_cached_total", 8.0),
        ("vllm:generation_tokens_total", 10.0),
        ("vllm:prefix_cache_hits_total", 8.0),
        ("vllm:time_to_first_token_seconds_count", 3.0),
        ("vllm:inter_token_latency_seconds_count", 7.0),
        ("vllm:time_per_output_token_seconds_count", 7.0),
        ("vllm:e2e_request_latency_seconds_count", 3.0),
        ("vllm:request_queue_time_seconds_count", 3.0),
        ("vllm:request_prompt_tokens_sum", 20.0),
        ("vllm:request_generation_tokens_sum", 10.0),
        ("swallow_worker_ready", 1.0),
        ("swallow_worker_requests_rejected_total", 1.0),
    ] {
        assert_eq!(value(&format!("{series}{model}")), expected, "{series}");
    }
    assert_eq!(
        value(r#"vllm:request_success_total{finished_reason="length""#),
        2.0
    );
    assert_eq!(value(r#"vllm:request_success_total{finished_reason="stop""#), 1.0);
    assert!(value(&format!("vllm:iteration_tokens_total_count{model}")) > 0.0);
    for kind in ["decode", "prefill"] {
        assert!(value(&format!("swallow_worker_step_seconds_count{{kind=\"{kind}\"")) > 0.0);
    }
    assert!(value(r#"swallow_worker_steps_total{launch="single""#) > 0.0);
    assert_eq!(value(r#"swallow_worker_steps_total{launch="recorded""#), 0.0);
    assert!(value(r#"vllm:cache_config_info{block_size="4""#) == 1.0);
    assert!(text.contains("process_resident_memory_bytes"));
}
