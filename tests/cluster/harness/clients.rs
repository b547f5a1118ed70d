//! Clients outside the pods: gRPC as our protocol says, OpenAI HTTP through curl, streams that stay open, and steady traffic.

use std::{
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use serde_json::{Value, json};
use swallow_rpc::inference::v1::{
    ChatMessage, ChatRequest, GenerateRequest, Role, SamplingParams, StopCriteria, StreamGenerateRequest,
    chat_service_client::ChatServiceClient, generate_request::Prompt,
    generation_service_client::GenerationServiceClient, stream_generate_response::Event,
};
use tokio::{runtime::Handle, task::JoinHandle};
use tonic::transport::Channel;

use super::{Cluster, until};

/// The node that no scenario kills; every node forwards to every router.
pub const NODE: &str = "10.250.0.2";

/// A router as clients outside the cluster reach it.
#[derive(Clone)]
pub struct Door {
    runtime: Handle,
    grpc: String,
    http: String,
}

impl Door {
    pub(super) fn new(cluster: &Cluster, grpc: u64, http: u64) -> Self {
        let door = Self {
            runtime: cluster.runtime.handle().clone(),
            grpc: format!("http://{NODE}:{grpc}"),
            http: format!("http://{NODE}:{http}"),
        };
        // A ready pod is not yet an open port of the node: kube-proxy writes its rules a moment later.
        until("the router's port on the node", Duration::from_secs(15), || {
            door.runtime.block_on(door.channel()).map(drop)
        });
        door
    }

    async fn channel(&self) -> Result<Channel, String> {
        let endpoint = Channel::from_shared(self.grpc.clone()).map_err(|error| error.to_string())?;
        let endpoint = endpoint.connect_timeout(Duration::from_secs(5));
        endpoint
            .connect()
            .await
            .map_err(|error| format!("{}: {error}", self.grpc))
    }

    /// One chat answer by gRPC, greedy. `messages` are pairs of role and content, as in OpenAI's API.
    pub fn chat(&self, model: &str, messages: &[(String, String)]) -> Result<String, String> {
        self.runtime
            .block_on(chat(self.channel(), model.to_owned(), messages.to_vec()))
    }

    /// One chat answer by OpenAI HTTP, greedy.
    pub fn chat_http(&self, model: &str, messages: &[(String, String)]) -> Result<String, String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|(role, content)| json!({"role": role, "content": content}))
            .collect();
        let body = json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 200});
        let done = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--max-time",
                "20",
                "--json",
                &body.to_string(),
            ])
            .arg(format!("{}/v1/chat/completions", self.http))
            .output()
            .map_err(|error| format!("curl: {error}"))?;
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        let answer: Value = serde_json::from_str(&text)
            .map_err(|_| format!("{text} {}", String::from_utf8_lossy(&done.stderr)))?;
        answer["choices"][0]["message"]["content"]
            .as_str()
            .map(str::to_owned)
            .ok_or(text)
    }
}

async fn chat(
    channel: impl Future<Output = Result<Channel, String>>,
    model: String,
    messages: Vec<(String, String)>,
) -> Result<String, String> {
    let messages = messages
        .into_iter()
        .map(|(role, content)| {
            let role = match role.as_str() {
                "system" => Role::System,
                "assistant" => Role::Assistant,
                _ => Role::User,
            };
            ChatMessage {
                role: role.into(),
                content,
                ..ChatMessage::default()
            }
        })
        .collect();
    let mut request = tonic::Request::new(ChatRequest {
        model,
        messages,
        sampling: Some(greedy()),
        ..Default::default()
    });
    request.set_timeout(Duration::from_secs(30));
    let mut answer = ChatServiceClient::new(channel.await?)
        .chat(request)
        .await
        .map_err(|status| format!("{:?}: {}", status.code(), status.message()))?
        .into_inner();
    let message = answer.candidates.pop().and_then(|candidate| candidate.message);
    Ok(message.ok_or("an answer without a message")?.content)
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: Some(0.0),
        ..Default::default()
    }
}

/// Streams that are open at the same time.
pub struct Streams {
    runtime: Handle,
    tasks: Vec<JoinHandle<()>>,
    begun: Arc<AtomicUsize>,
    done: Arc<AtomicUsize>,
    broken: Arc<Mutex<Vec<String>>>,
}

impl Streams {
    /// Opens `n` streams of exactly `tokens` tokens, and waits until each has begun.
    pub fn open(door: &Door, model: &str, n: usize, tokens: u32) -> Self {
        let begun = Arc::new(AtomicUsize::new(0));
        let done = Arc::new(AtomicUsize::new(0));
        let broken = Arc::new(Mutex::new(Vec::new()));
        let tasks = (0..n)
            .map(|nth| {
                let (door, model) = (door.clone(), model.to_owned());
                let (begun, done, broken) = (begun.clone(), done.clone(), broken.clone());
                let handle = door.runtime.clone();
                handle.spawn(async move {
                    if let Err(error) = stream(&door, model, nth, tokens, &begun).await {
                        let mut broken = broken.lock().expect("nobody panics with it");
                        broken.push(format!("stream {nth}: {error}"));
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                })
            })
            .collect();
        let streams = Self {
            runtime: door.runtime.clone(),
            tasks,
            begun,
            done,
            broken,
        };
        until("the first token of each stream", Duration::from_secs(60), || {
            let broken = streams.broken.lock().expect("nobody panics with it");
            assert!(
                broken.is_empty(),
                "streams broken before all had begun: {broken:#?}"
            );
            let begun = streams.begun.load(Ordering::SeqCst);
            if begun == n {
                Ok(())
            } else {
                Err(format!("{begun} of {n}"))
            }
        });
        streams
    }

    /// How many are still open.
    pub fn open_now(&self) -> usize {
        self.tasks.len() - self.done.load(Ordering::SeqCst)
    }

    /// Waits for all of them.
    ///
    /// # Panics
    /// If one was broken or is not whole.
    pub fn finish(self) {
        self.runtime.block_on(futures::future::join_all(self.tasks));
        let broken = self.broken.lock().expect("nobody panics with it");
        assert!(broken.is_empty(), "{} streams broken: {broken:#?}", broken.len());
    }
}

async fn stream(
    door: &Door,
    model: String,
    nth: usize,
    tokens: u32,
    begun: &AtomicUsize,
) -> Result<(), String> {
    let generate = GenerateRequest {
        model,
        // Different beginnings, so that the streams spread over the groups.
        prompt: Some(Prompt::Text(format!("{nth} 2 3"))),
        sampling: Some(greedy()),
        stop: Some(StopCriteria {
            max_output_tokens: Some(tokens),
            ignore_eos: true,
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = StreamGenerateRequest {
        generate: Some(generate),
        stream: None,
    };
    let mut events = GenerationServiceClient::new(door.channel().await?)
        .stream_generate(request)
        .await
        .map_err(|status| format!("{:?}: {}", status.code(), status.message()))?
        .into_inner();
    let mut seen = 0;
    while let Some(event) = events.next().await {
        let event = event
            .map_err(|status| format!("after {seen} events {:?}: {}", status.code(), status.message()))?;
        if seen == 0 {
            begun.fetch_add(1, Ordering::SeqCst);
        }
        seen += 1;
        if let Some(Event::Completed(completed)) = event.event {
            let n = completed.usage.map(|usage| usage.output_tokens);
            return if n == Some(tokens) {
                Ok(())
            } else {
                Err(format!("{n:?} tokens of {tokens}"))
            };
        }
    }
    Err(format!("it ended after {seen} events without Completed"))
}

/// One short request after the other, until it is stopped.
pub struct Traffic {
    runtime: Handle,
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicUsize>,
    task: JoinHandle<Vec<String>>,
}

impl Traffic {
    /// Starts it; each request has to get `expected`.
    pub fn start(door: &Door, model: &str, messages: &[(String, String)], expected: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicUsize::new(0));
        let (door, model, messages) = (door.clone(), model.to_owned(), messages.to_vec());
        let (halt, count, expected) = (stop.clone(), answers.clone(), expected.to_owned());
        let runtime = door.runtime.clone();
        let task = runtime.spawn(async move {
            let mut wrong = Vec::new();
            while !halt.load(Ordering::SeqCst) {
                match chat(door.channel(), model.clone(), messages.clone()).await {
                    Ok(answer) if answer == expected => {
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                    Ok(answer) => wrong.push(format!("'{answer}' instead of '{expected}'")),
                    Err(error) => wrong.push(error),
                }
            }
            wrong
        });
        Self {
            runtime,
            stop,
            answers,
            task,
        }
    }

    /// Ends it: how many answers were right.
    ///
    /// # Panics
    /// If one was wrong or failed.
    pub fn stop(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        let wrong = self
            .runtime
            .block_on(self.task)
            .expect("the traffic does not panic");
        let n = self.answers.load(Ordering::SeqCst);
        assert!(
            wrong.is_empty(),
            "{} of {} requests failed: {wrong:#?}",
            wrong.len(),
            wrong.len() + n
        );
        n
    }
}
