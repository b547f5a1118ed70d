//! The binary as it is started in production: a real model on two ranks, and every way not to start.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::PathBuf,
    process::{Child, ChildStderr, Command, Output, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use swallow_rpc::worker::v1::{
    Hello, Request, Sampling, SessionRequest, Submit, finished, session_request, session_response::Frame,
    worker_service_client::WorkerServiceClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

fn serve(extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swallow-worker"));
    command.args([
        "serve",
        "--served-name=tiny",
        "--replica-id=r0",
        "--log-format=json",
    ]);
    command.args(["--grpc-listen=127.0.0.1:0", "--http-listen=127.0.0.1:0"]);
    command
        .args(extra)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn tiny() -> String {
    format!("--model={}", fixtures().join("tiny").display())
}

/// A running worker; killed if the test fails first.
struct Worker {
    child: Child,
    log: BufReader<ChildStderr>,
    grpc: String,
    http: String,
}

impl Worker {
    /// Starts one and reads its log until it is ready.
    fn ready(extra: &[&str]) -> Self {
        let mut child = serve(extra).spawn().expect("the binary starts");
        let log = BufReader::new(child.stderr.take().expect("piped"));
        let mut worker = Self {
            child,
            log,
            grpc: String::new(),
            http: String::new(),
        };
        loop {
            let line = worker.line().expect("it ended before it was ready");
            let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
            match text("message").as_str() {
                "listening" => (worker.grpc, worker.http) = (text("grpc"), text("http")),
                "ready" => return worker,
                _ => {}
            }
        }
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.log.read_line(&mut line).expect("readable");
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line}")))
    }

    fn get(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.http);
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let mut answer = ureq::Agent::new_with_config(config)
            .get(&url)
            .call()
            .expect("an answer");
        (
            answer.status().as_u16(),
            answer.body_mut().read_to_string().expect("text"),
        )
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        kill(pid, signal).expect("it lives");
    }

    fn exit_code(mut self) -> Option<i32> {
        while self.line().is_some() {}
        self.child.wait().expect("it ends").code()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Golden {
    name: String,
    prompt: Vec<u32>,
    output: Vec<u32>,
    logprobs: Vec<f64>,
}

/// Prompts whose greedy continuation is clear beyond any rounding.
fn goldens() -> Vec<Golden> {
    let text = std::fs::read_to_string(fixtures().join("goldens/tiny.json")).expect("committed");
    let all: Value = serde_json::from_str(&text).expect("JSON");
    let ids = |value: &Value| -> Vec<u32> {
        let numbers = value.as_array().expect("a list").iter();
        numbers
            .map(|id| u32::try_from(id.as_u64().expect("an id")).expect("an id"))
            .collect()
    };
    let clear = all["prompts"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|prompt| {
            prompt["min_gap"].as_f64().is_some_and(|gap| gap > 0.1) && prompt["finish"] == "stop"
        });
    clear
        .map(|prompt| Golden {
            name: prompt["name"].as_str().expect("a name").to_owned(),
            prompt: ids(&prompt["prompt_ids"]),
            output: ids(&prompt["output_ids"]),
            logprobs: prompt["output_logprobs"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|logprob| logprob.as_f64().expect("a number"))
                .collect(),
        })
        .take(24)
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_model_answers_over_the_wire_and_drains_on_sigterm() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let last_word = folder.path().join("termination-log");
    let (model, log) = (tiny(), format!("--termination-log={}", last_word.display()));
    let worker = Worker::ready(&[
        &model,
        &log,
        "--tensor-parallel=2",
        "--kv-bytes=67108864",
        "--max-running=8",
    ]);
    let (status, state) = worker.get("/state");
    assert_eq!(status, 200);
    let state: Value = serde_json::from_str(&state).expect("JSON");
    assert_eq!(state["phase"], "serving");
    let [done, total] =
        ["bytes_done", "bytes_total"].map(|field| state["progress"][field].as_u64().expect("bytes"));
    assert!(done == total && total > 1_000_000, "{state}");
    for part in ["weights_bytes", "kv_bytes", "workspace_bytes"] {
        let [planned, measured] =
            ["planned", "measured"].map(|kind| state["memory"][kind][part].as_f64().expect("bytes"));
        assert!(
            measured > 1e6 && (planned / measured - 1.0).abs() < 0.01,
            "{part}: {state}"
        );
    }
    assert_eq!(worker.get("/readyz"), (200, "ready\n".into()));

    let goldens = goldens();
    assert!(goldens.len() > 10, "only {} clear goldens", goldens.len());
    let answers = greedy(&worker.grpc, &goldens).await;
    for (golden, (ids, logprobs)) in goldens.iter().zip(&answers) {
        assert_eq!(*ids, golden.output, "{}", golden.name);
        for (got, expected) in logprobs.iter().zip(&golden.logprobs) {
            assert!(
                (f64::from(*got) - expected).abs() <= 1e-3,
                "{}: {got} is not {expected}",
                golden.name
            );
        }
    }
    let (_, metrics) = worker.get("/metrics");
    assert!(metrics.contains("vllm:request_success_total{"), "{metrics}");
    let count = |name: &str, kind: &str| -> f64 {
        let of = |line: &&str| line.starts_with(name) && line.contains(kind);
        let line = metrics
            .lines()
            .find(of)
            .unwrap_or_else(|| panic!("{name} {kind} in {metrics}"));
        let value = line.rsplit(' ').next().and_then(|value| value.parse().ok());
        value.expect("a number")
    };
    let predicted = count("swallow_worker_step_prediction_error_count{", "kind=\"decode\"");
    assert!(
        predicted > 0.0,
        "what steps cost was measured at the start, so every step is predicted"
    );
    assert_eq!(
        predicted,
        count("swallow_worker_step_seconds_count{", "kind=\"decode\"")
    );

    worker.signal(Signal::SIGTERM);
    assert_eq!(worker.exit_code(), Some(0));
    assert!(!last_word.exists(), "a drain leaves no last word");
}

/// Ids and log-probabilities of every prompt's greedy continuation, all asked for as fast as credits come.
async fn greedy(address: &str, goldens: &[Golden]) -> Vec<(Vec<u32>, Vec<f32>)> {
    let mut client = WorkerServiceClient::connect(format!("http://{address}"))
        .await
        .expect("listening");
    let (to, requests) = mpsc::channel(4);
    let send = async |frame| {
        to.send(SessionRequest { frame: Some(frame) })
            .await
            .expect("open")
    };
    send(session_request::Frame::Hello(Hello {
        protocol: 1,
        router_id: "test".into(),
        kv_events: false,
    }))
    .await;
    let mut from = client
        .session(ReceiverStream::new(requests))
        .await
        .expect("a session")
        .into_inner();
    let mut waiting = (0..).zip(goldens).map(|(handle, golden)| ask(handle, golden));
    let mut answers: BTreeMap<u32, (Vec<u32>, Vec<f32>)> = BTreeMap::new();
    let (mut credits, mut ended) = (0_usize, 0);
    while ended < goldens.len() {
        let frame = from
            .message()
            .await
            .expect("open")
            .and_then(|response| response.frame);
        match frame.expect("not the end") {
            Frame::Welcome(welcome) => credits += welcome.submit_credits as usize,
            Frame::Credit(credit) => credits += credit.add_submits as usize,
            Frame::Step(step) => {
                for (handle, token) in step.handle.iter().zip(&step.token_id) {
                    answers.entry(*handle).or_default().0.push(*token);
                }
                let columns = step.logprobs.unwrap_or_default();
                for (handle, logprob) in columns.handle.iter().zip(&columns.logprob) {
                    answers.entry(*handle).or_default().1.push(*logprob);
                }
                for end in step.finished {
                    assert_eq!(end.reason(), finished::Reason::Eos, "{end:?}");
                    ended += 1;
                }
            }
            _ => {}
        }
        let requests: Vec<Request> = waiting.by_ref().take(credits).collect();
        credits -= requests.len();
        if !requests.is_empty() {
            send(session_request::Frame::Submit(Submit { requests })).await;
        }
    }
    answers.into_values().collect()
}

fn ask(handle: u32, golden: &Golden) -> Request {
    Request {
        handle,
        request_uuid: u128::from(handle).to_be_bytes().to_vec(),
        prompt_ids: golden.prompt.clone(),
        sampling: Some(Sampling {
            temperature: Some(0.0),
            ..Sampling::default()
        }),
        max_tokens: 64,
        logprobs: Some(0),
        ..Request::default()
    }
}

/// Runs a start that must fail; gives its exit code and the last word, which is also the last line of the log.
fn failed_start(extra: &[&str]) -> (Option<i32>, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let last_word = folder.path().join("termination-log");
    let log = format!("--termination-log={}", last_word.display());
    let output: Output = serve(extra).arg(log).output().expect("the binary starts");
    let errors = String::from_utf8(output.stderr).expect("text");
    let line: Value = serde_json::from_str(errors.lines().last().expect("a line")).expect("JSON");
    assert_eq!(line["level"], "ERROR", "{errors}");
    let said = std::fs::read_to_string(last_word).expect("a last word");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(said.trim_end(), line["message"].as_str().expect("a message"));
    (output.status.code(), said.trim_end().to_owned())
}

#[test]
fn flags_that_cannot_be_carried_out_are_named() {
    let model = tiny();
    let cases: [(&[&str], &str); 5] = [
        (
            &["--kv-bytes=1000"],
            "--kv-bytes=1000: too small: one block of 16 tokens needs 65536 bytes",
        ),
        (
            &["--device=cuda", "--dtype=fp32"],
            "--dtype=fp32: GPUs compute in bf16 alone; use --dtype=bf16 or --dtype=auto",
        ),
        (&["--max-running=0"], "--max-running=0: must be at least 1"),
        (
            &["--max-model-len=8193"],
            "--max-model-len=8193: the model's max_position_embeddings is 8192; give at most that",
        ),
        (
            &["--kv-bytes=655360", "--max-model-len=161"],
            "--max-model-len=161: --kv-bytes=655360 holds 160 tokens; raise --kv-bytes to 720896 or lower \
             --max-model-len to 160",
        ),
    ];
    for (flags, expected) in cases {
        let (code, said) = failed_start(&[&[model.as_str()], flags].concat());
        assert_eq!((code, said.as_str()), (Some(2), expected));
    }
}

#[test]
fn what_is_not_there_is_named() {
    let (code, said) = failed_start(&["--model=/nowhere/model"]);
    assert_eq!(code, Some(3));
    assert!(said.contains("/nowhere/model/config.json"), "{said}");
    let (code, said) = failed_start(&[&tiny(), "--tensor-parallel=3"]);
    assert_eq!(code, Some(3));
    assert!(said.contains("degree 3"), "{said}");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let flag = format!("--grpc-listen={}", taken.local_addr().expect("bound"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_swallow-worker"));
    command.args(["serve", "--served-name=tiny", "--replica-id=r0", &tiny(), &flag]);
    let output = command.output().expect("the binary starts");
    let errors = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        errors.lines().last().is_some_and(|line| line.contains(&flag)),
        "{errors}"
    );
}

#[test]
fn the_command_line_explains_itself() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_swallow-worker"))
            .args(arguments)
            .output()
            .expect("the binary starts");
        (
            output.status.code(),
            String::from_utf8(output.stdout).expect("text"),
        )
    };
    let (code, text) = run(&["--version"]);
    assert_eq!(
        (code, text.trim_end()),
        (Some(0), concat!("swallow-worker ", env!("CARGO_PKG_VERSION")))
    );
    let (code, text) = run(&["serve", "--help"]);
    assert_eq!(code, Some(0));
    for flag in [
        "--model",
        "--kv-bytes",
        "--termination-log",
        "--drain-timeout-seconds",
    ] {
        assert!(text.contains(flag), "{flag} is missing in\n{text}");
    }
    assert_eq!(run(&["serve"]).0, Some(2), "what is required is missing");
    assert_eq!(run(&["serve", "--no-such-flag"]).0, Some(2));
}
