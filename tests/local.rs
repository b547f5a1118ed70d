//! The main job on one machine, as processes: it serves, it survives the loss of a group, it ends without leaving
//! anything behind, and a mistake is one clear line.

use std::{fs, net::TcpListener, process::Command};

use futures::StreamExt;
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use swallow_rpc::inference::v1::{
    ChatMessage, ChatRequest, GenerateRequest, GetModelRequest, Role, SamplingParams, StopCriteria,
    StreamGenerateRequest, chat_service_client::ChatServiceClient, generate_request::Prompt,
    generation_service_client::GenerationServiceClient, model_service_client::ModelServiceClient,
    stream_generate_response::Event,
};
use swallow_tests::{Local, MadeSecrets, ask_https, is_alive, model_yaml, program, root, wait_for};
use tonic::transport::Channel;

fn tiny(replicas: u32) -> String {
    model_yaml("tiny", &root().join("tests/fixtures/tiny"), 2, replicas)
}

async fn connect(address: &str) -> Channel {
    Channel::from_shared(format!("http://{address}"))
        .expect("an address")
        .connect()
        .await
        .expect("the router listens")
}

async fn ask(channel: &Channel, question: &str) -> Result<String, tonic::Status> {
    let request = ChatRequest {
        model: "tiny".into(),
        messages: vec![ChatMessage {
            role: Role::User.into(),
            content: question.into(),
            ..ChatMessage::default()
        }],
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut answer = ChatServiceClient::new(channel.clone())
        .chat(request)
        .await?
        .into_inner();
    Ok(answer
        .candidates
        .remove(0)
        .message
        .expect("an answer has a message")
        .content)
}

fn long_stream(max_output_tokens: u32) -> StreamGenerateRequest {
    let generate = GenerateRequest {
        model: "tiny".into(),
        prompt: Some(Prompt::Text("1 2 3".into())),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            ..Default::default()
        }),
        stop: Some(StopCriteria {
            max_output_tokens: Some(max_output_tokens),
            ignore_eos: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    StreamGenerateRequest {
        generate: Some(generate),
        stream: None,
    }
}

async fn ready_replicas(channel: &Channel) -> u32 {
    let request = GetModelRequest {
        name: "models/tiny".into(),
    };
    let answer = ModelServiceClient::new(channel.clone())
        .get_model(request)
        .await
        .expect("the model is served");
    answer
        .into_inner()
        .model
        .expect("an answer has a model")
        .ready_replicas
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_group_comes_back_while_the_other_serves() {
    let mut local = Local::start(&tiny(2), &[]);
    let (grpc, _) = local.ready();
    let channel = connect(&grpc).await;
    let before = ask(&channel, "35を漢字で書いてください。")
        .await
        .expect("both groups serve");
    assert_eq!(ready_replicas(&channel).await, 2);

    let workers: Vec<_> = local
        .processes()
        .into_iter()
        .filter(|(_, command)| command.contains("swallow-worker"))
        .collect();
    assert_eq!(workers.len(), 2, "{workers:?}");
    kill(workers[0].0, Signal::SIGKILL).expect("it lives");
    // A request that nobody answered yet moves to the other group, so none of these fails.
    for _ in 0..20 {
        assert_eq!(
            ask(&channel, "35を漢字で書いてください。")
                .await
                .expect("the other group serves"),
            before
        );
    }
    let start = std::time::Instant::now();
    while ready_replicas(&channel).await < 2 {
        assert!(
            start.elapsed() < swallow_tests::PATIENCE,
            "the killed group did not come back: {}",
            local.stderr()
        );
        tokio::time::sleep(std::time::Duration::from_millis(50)).await; // Between two looks at a condition.
    }
    let again: Vec<_> = local
        .processes()
        .into_iter()
        .filter(|(_, command)| command.contains("swallow-worker"))
        .collect();
    assert!(
        again.iter().any(|(pid, _)| *pid == workers[1].0),
        "the other group was left alone"
    );
    assert!(!again.iter().any(|(pid, _)| *pid == workers[0].0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_finishes_while_the_local_mode_drains() {
    let mut local = Local::start(&tiny(1), &[]);
    let (grpc, _) = local.ready();
    let processes = local.processes();
    assert_eq!(processes.len(), 2, "one router and one worker: {processes:?}");
    let mut client = GenerationServiceClient::new(connect(&grpc).await);
    let mut stream = client
        .stream_generate(long_stream(200))
        .await
        .expect("it starts")
        .into_inner();
    let mut events = Vec::new();
    while events.len() < 3 {
        events.push(stream.next().await.expect("more to come").expect("no error"));
    }
    local.signal(Signal::SIGTERM);
    while let Some(event) = stream.next().await {
        events.push(event.expect("a drain does not cut a stream"));
    }
    let Some(Event::Completed(completed)) = events.last().and_then(|last| last.event.clone()) else {
        panic!("the stream ended without Completed")
    };
    assert_eq!(completed.usage.expect("usage is always there").output_tokens, 200);
    assert!(local.wait().success(), "{}", local.stderr());
    assert!(
        processes.iter().all(|(pid, _)| !is_alive(*pid)),
        "a process was left behind"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_it_at_once_and_a_killed_operator_leaves_nothing() {
    for signals in [&[Signal::SIGINT, Signal::SIGINT][..], &[Signal::SIGKILL][..]] {
        let mut local = Local::start(&tiny(1), &[]);
        let (grpc, _) = local.ready();
        let processes = local.processes();
        let mut client = GenerationServiceClient::new(connect(&grpc).await);
        let mut stream = client
            .stream_generate(long_stream(8000))
            .await
            .expect("it starts")
            .into_inner();
        stream.next().await.expect("more to come").expect("no error");
        local.signal(signals[0]);
        if let Some(second) = signals.get(1) {
            local.line("draining");
            local.signal(*second);
        }
        assert!(!local.wait().success());
        wait_for("the end of all processes", || {
            processes.iter().all(|(pid, _)| !is_alive(*pid)).then_some(())
        });
    }
}

#[test]
fn a_mistake_is_one_clear_line() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("it is bound").port().to_string();
    let good = tiny(1);
    let cases: [(&str, String, &[&str], &[&str]); 6] = [
        (
            "a taken port",
            good.clone(),
            &["--http-port", &port],
            &["--http-port", &port],
        ),
        (
            "a missing folder",
            good.replace("fixtures/tiny", "fixtures/nowhere"),
            &[],
            &["fixtures/nowhere"],
        ),
        (
            "an unknown field",
            good.replace("replicas:", "replcas:"),
            &[],
            &["replcas", "replicas"],
        ),
        (
            "an impossible degree",
            good.replace("tensor: 2", "tensor: 3"),
            &[],
            &["parallelism.tensor", "3"],
        ),
        ("no YAML", "][".into(), &[], &["model.yaml"]),
        (
            "a claim",
            good.replace("type: HostPath", "type: PersistentVolumeClaim")
                .replace("hostPath:", "persistentVolumeClaim:")
                .replace(
                    &format!("path: {}", root().join("tests/fixtures/tiny").display()),
                    "claimName: models",
                ),
            &[],
            &["PersistentVolumeClaim"],
        ),
    ];
    for (what, yaml, more, words) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("model.yaml");
        std::fs::write(&file, yaml).expect("the folder is ours");
        let defaults: &[&str] = if more.is_empty() {
            &["--http-port", "0"]
        } else {
            &[]
        };
        let output = Command::new(program("swallow-operator"))
            .args(["local", "-f"])
            .arg(&file)
            .args(["--grpc-port", "0"])
            .args(defaults)
            .args(more)
            .output()
            .expect("the operator starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{what}: {stderr}");
        assert_eq!(stderr.trim().lines().count(), 1, "{what}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{what}: '{word}' is not in: {stderr}");
        }
    }
}

/// The sample of a secured model with the Secrets of `deploy/make-secrets`, as the sample itself says.
#[test]
fn a_secured_model_asks_for_a_key_over_tls() {
    let sample =
        fs::read_to_string(root().join("deploy/models/secured.yaml")).expect("it is in the repository");
    let fixture = root().join("tests/fixtures/tiny").display().to_string();
    let made = MadeSecrets::new("secured", &[]);
    let yaml = sample.replace("/srv/models/tiny", &fixture) + &made.yaml;
    let mut local = Local::start(&yaml, &[]);
    let (_, http) = local.ready();
    let url = format!("https://{http}/v1/completions");
    let body =
        json!({"model": "secured", "prompt": "1 2 3", "max_tokens": 4, "temperature": 0, "ignore_eos": true});
    let ask = |key| ask_https(&url, &made.authority, key, &body);
    let (status, answer) = ask(Some(&made.key)).expect("the certificate is for this address");
    assert_eq!(
        (status, &answer["usage"]["completion_tokens"]),
        (200, &json!(4)),
        "{answer}"
    );
    for key in [None, Some("another")] {
        let (status, answer) = ask(key).expect("it is refused in the protocol's own form");
        assert_eq!(status, 401, "{answer}");
    }
    let plain = ask_https(
        &url.replace("https:", "http:"),
        &made.authority,
        Some(&made.key),
        &body,
    );
    plain.expect_err("who speaks no TLS is not served");
    let workers: Vec<_> = local
        .processes()
        .into_iter()
        .filter(|(_, line)| line.contains("swallow-worker serve"))
        .collect();
    assert_eq!(workers.len(), 2, "{workers:?}");
    assert!(
        workers.iter().all(|(_, line)| line.contains("--tls-client-ca=")),
        "{workers:?}"
    );
    local.signal(Signal::SIGTERM);
    assert!(local.wait().success(), "{}", local.stderr());
}
