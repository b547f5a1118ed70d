//! Streams survive the loss of their worker: what a client reads is, token for token, what it would have read without
//! it. Real workers, killed with SIGKILL while they generate.

use std::collections::BTreeMap;

use futures::{StreamExt, future::join_all};
use nix::sys::signal::{Signal, kill};
use swallow_rpc::inference::v1::{
    GenerateRequest, Grammar, LogprobOptions, SamplingParams, StopCriteria, StreamGenerateRequest,
    StreamOptions, generate_request::Prompt, generation_service_client::GenerationServiceClient, grammar,
    stream_generate_response::Event,
};
use swallow_tests::{Local, model_yaml, root, wait_for};
use tokio::sync::watch;
use tonic::transport::Channel;

const TOKENS: u32 = 1500;
/// Of each stream, when its worker is killed: far from the end.
const BEFORE_THE_KILL: usize = 20;

/// What a stream brought, by candidate.
#[derive(Debug, Default, PartialEq)]
struct Said {
    ids: BTreeMap<u32, Vec<u32>>,
    text: BTreeMap<u32, String>,
    logprobs: BTreeMap<u32, Vec<(u32, Option<u32>)>>,
    finished: BTreeMap<u32, i32>,
    /// Prompt tokens and output tokens.
    usage: Option<(u32, u32)>,
}

fn request(prompt: &str, sampling: SamplingParams, candidates: u32, logprobs: bool) -> StreamGenerateRequest {
    let generate = GenerateRequest {
        model: "tiny".into(),
        prompt: Some(Prompt::Text(prompt.into())),
        sampling: Some(sampling),
        stop: Some(StopCriteria {
            max_output_tokens: Some(TOKENS),
            min_output_tokens: Some(TOKENS),
            ..Default::default()
        }),
        logprobs: logprobs.then(|| LogprobOptions {
            output: true,
            top_n: 2,
            ..Default::default()
        }),
        candidate_count: candidates,
        ..Default::default()
    };
    StreamGenerateRequest {
        generate: Some(generate),
        stream: Some(StreamOptions { token_ids: true }),
    }
}

/// Numbers alone, which no model says for so long of itself.
fn constrained(prompt: &str, sampling: SamplingParams) -> StreamGenerateRequest {
    let mut request = request(prompt, sampling, 2, true);
    let source = Some(grammar::Source::Regex("([1-9][0-9]{0,3}, )+".into()));
    if let Some(generate) = &mut request.generate {
        generate.grammar = Some(Grammar { source });
    }
    request
}

/// One of each kind of state that a continuation has to have.
fn requests() -> Vec<StreamGenerateRequest> {
    let greedy = SamplingParams {
        temperature: Some(0.0),
        ..Default::default()
    };
    let seeded = SamplingParams {
        temperature: Some(1.0),
        top_p: Some(0.95),
        seed: Some(7),
        ..Default::default()
    };
    let penalised = SamplingParams {
        repetition_penalty: Some(1.3),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(0.1),
        ..seeded.clone()
    };
    vec![
        request("1 2 3", greedy.clone(), 1, false),
        request("What is 12 plus 30?", greedy, 1, true),
        request("35を漢字で書いてください。", seeded.clone(), 3, false),
        request("月曜日の次の日は", seeded.clone(), 1, true),
        request("Count: one two", penalised.clone(), 1, false),
        request("三百", penalised, 2, true),
        constrained("5", seeded),
    ]
}

/// Reads a stream to its end, telling when a few tokens have come.
async fn read(channel: Channel, request: StreamGenerateRequest, begun: watch::Sender<usize>) -> Said {
    let mut stream = GenerationServiceClient::new(channel)
        .stream_generate(request)
        .await
        .expect("it starts")
        .into_inner();
    let (mut said, mut last, mut told) = (Said::default(), 0, false);
    while let Some(message) = stream.next().await {
        let message = message.expect("the stream goes on");
        assert_eq!(message.sequence, last + 1, "no gap");
        last = message.sequence;
        match message.event.expect("an event") {
            Event::Started(_) => assert_eq!(last, 1, "a client sees one start"),
            Event::Delta(delta) => {
                said.ids.entry(delta.index).or_default().extend(delta.token_ids);
                said.text.entry(delta.index).or_default().push_str(&delta.text);
                let scores = delta
                    .logprobs
                    .iter()
                    .map(|l| (l.token_id, l.logprob.map(f32::to_bits)));
                said.logprobs.entry(delta.index).or_default().extend(scores);
            }
            Event::CandidateFinished(finished) => {
                let reason = finished.finish.expect("an end has a reason").reason;
                assert!(said.finished.insert(finished.index, reason).is_none());
            }
            Event::Completed(completed) => {
                let usage = completed.usage.expect("usage is always there");
                said.usage = Some((usage.prompt_tokens, usage.output_tokens));
            }
        }
        if !told && said.ids.values().map(Vec::len).sum::<usize>() >= BEFORE_THE_KILL {
            told = true;
            begun.send_modify(|n| *n += 1);
        }
    }
    said
}

async fn read_all(address: &str, begun: &watch::Sender<usize>) -> Vec<Said> {
    let channel = Channel::from_shared(format!("http://{address}"))
        .expect("an address")
        .connect()
        .await
        .expect("the router listens");
    join_all(
        requests()
            .into_iter()
            .map(|request| read(channel.clone(), request, begun.clone())),
    )
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_a_killed_worker_go_on_bit_for_bit() {
    let mut local = Local::start(
        &model_yaml("tiny", &root().join("tests/fixtures/tiny"), 1, 2),
        &[],
    );
    let (grpc, http) = local.ready();
    let undisturbed = read_all(&grpc, &watch::Sender::new(0)).await;
    for said in &undisturbed {
        let lengths: Vec<usize> = said.ids.values().map(Vec::len).collect();
        assert!(
            lengths.iter().all(|&n| n == TOKENS as usize),
            "{lengths:?}, {:?}",
            said.finished
        );
    }

    let begun = watch::Sender::new(0);
    let mut watching = begun.subscribe();
    let n_streams = requests().len();
    let kill_one = async {
        watching.wait_for(|n| *n == n_streams).await.expect("all begin");
        let worker = local
            .processes()
            .into_iter()
            .find(|(_, command)| command.contains("swallow-worker"))
            .expect("a worker");
        kill(worker.0, Signal::SIGKILL).expect("it lives");
    };
    let (disturbed, ()) = tokio::join!(read_all(&grpc, &begun), kill_one);
    for (disturbed, undisturbed) in disturbed.iter().zip(&undisturbed) {
        assert_eq!(disturbed.ids, undisturbed.ids, "the same tokens");
        assert_eq!(disturbed, undisturbed, "and all that goes with them");
    }
    let moved = wait_for("the count of moved requests", || {
        let text = std::process::Command::new("curl")
            .args(["-sf", &format!("http://{http}/metrics")])
            .output()
            .expect("curl runs");
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        let line = text
            .lines()
            .find(|line| line.starts_with("swallow_router_moves_total") && line.contains("lost"))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    });
    assert!(moved >= 1.0, "some stream was on the killed worker: {moved}");
    local.signal(Signal::SIGTERM);
    assert!(local.wait().success(), "{}", local.stderr());
}
