//! GenerationService and ChatService.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use swallow_rpc::inference::v1::{
    self as wire, chat_service_server::ChatService, generation_service_server::GenerationService,
};
use tonic::{Code, Response, Status};

use super::{
    Services, deadline, parse,
    status::{code, field, status},
    write::{self, Writer},
};
use crate::{
    ask::Score,
    calls::Calls,
    generate::{Answer, Fault, Reply, Request, Usage},
    metrics::Call,
    models::ModelText,
};

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A whole answer.
struct Whole {
    reply: Opened,
    scores: Vec<Score>,
    answers: Vec<Answer>,
    usage: Usage,
}

/// What a reply leaves behind when it was read.
struct Opened {
    model: String,
    text: std::sync::Arc<ModelText>,
    prompt: std::sync::Arc<[u32]>,
}

impl Services {
    async fn open(&self, request: Request, call: &mut Call) -> Result<Reply, Fault> {
        let prepared = self.door.prepare(request).await?;
        call.model(&prepared.entry.name);
        self.door.start(prepared).await
    }

    async fn whole(&self, request: Request, call: &mut Call) -> Result<Whole, Fault> {
        let reply = self.open(request, call).await?;
        let opened = Opened {
            model: reply.entry.name.clone(),
            text: reply.text.clone(),
            prompt: reply.prompt.clone(),
        };
        let (scores, answers, usage) = reply.collect(&self.door.gather()).await?;
        Ok(Whole {
            reply: opened,
            scores,
            answers,
            usage,
        })
    }

    async fn generated(
        &self,
        request: tonic::Request<wire::GenerateRequest>,
        call: &mut Call,
    ) -> Result<wire::GenerateResponse, Fault> {
        let deadline = deadline(request.metadata())?;
        let mut message = request.into_inner();
        let request_id = parse::request_id(std::mem::take(&mut message.request_id))?;
        let request = parse::generate(message, deadline)?;
        let scored = request.prompt_logprobs.is_some();
        let Whole {
            reply,
            scores,
            answers,
            usage,
        } = self.whole(request, call).await?;
        let tokenizer = &reply.text.tokenizer;
        Ok(wire::GenerateResponse {
            request_id,
            model: reply.model,
            candidates: (0..)
                .zip(answers)
                .map(|(i, answer)| write::candidate(tokenizer, i, answer))
                .collect(),
            usage: Some(write::usage(usage)),
            prompt_logprobs: match scored {
                true => write::prompt_logprobs(tokenizer, &reply.prompt, &scores),
                false => Vec::new(),
            },
        })
    }

    async fn chatted(
        &self,
        request: tonic::Request<wire::ChatRequest>,
        call: &mut Call,
    ) -> Result<wire::ChatResponse, Fault> {
        let deadline = deadline(request.metadata())?;
        let mut message = request.into_inner();
        let request_id = parse::request_id(std::mem::take(&mut message.request_id))?;
        let parse::Conversation { request, callable } = parse::chat(message, deadline)?;
        let Whole {
            reply,
            answers,
            usage,
            ..
        } = self.whole(request, call).await?;
        let candidate = |(i, answer)| {
            let candidate = write::candidate(&reply.text.tokenizer, i, answer);
            write::chat_candidate(candidate, callable.calls())
        };
        Ok(wire::ChatResponse {
            request_id,
            model: reply.model.clone(),
            candidates: (0..).zip(answers).map(candidate).collect(),
            usage: Some(write::usage(usage)),
        })
    }

    async fn generating(
        &self,
        request: tonic::Request<wire::StreamGenerateRequest>,
        call: &mut Call,
    ) -> Result<(Writer, Reply), Fault> {
        let deadline = deadline(request.metadata())?;
        let wire::StreamGenerateRequest { generate, stream } = request.into_inner();
        let mut message = generate.ok_or_else(|| missing("generate"))?;
        let request_id = parse::request_id(std::mem::take(&mut message.request_id))?;
        let request = parse::generate(message, deadline)?;
        let writer = writer(request_id, stream, request.prompt_logprobs.is_some());
        Ok((writer, self.open(request, call).await?))
    }

    async fn chatting(
        &self,
        request: tonic::Request<wire::StreamChatRequest>,
        call: &mut Call,
    ) -> Result<(Writer, Vec<Calls>, Reply), Fault> {
        let deadline = deadline(request.metadata())?;
        let wire::StreamChatRequest { chat, stream } = request.into_inner();
        let mut message = chat.ok_or_else(|| missing("chat"))?;
        let request_id = parse::request_id(std::mem::take(&mut message.request_id))?;
        let writer = writer(request_id, stream, false);
        let parse::Conversation { request, callable } = parse::chat(message, deadline)?;
        let reply = self.open(request, call).await?;
        let calls = (0..reply.candidates()).filter_map(|_| callable.calls()).collect();
        Ok((writer, calls, reply))
    }
}

/// A field of the request inside of a stream's request.
fn within(outer: &str, name: &str) -> String {
    if name == outer || name == "grpc-timeout" {
        name.to_owned()
    } else {
        format!("{outer}.{}", field(name))
    }
}

fn missing(field: &'static str) -> Fault {
    crate::generate::Invalid::new(field, "is missing").into()
}

fn writer(request_id: String, options: Option<wire::StreamOptions>, scored: bool) -> Writer {
    let token_ids = options.unwrap_or_default().token_ids;
    Writer {
        request_id,
        token_ids,
        scored,
        started: None,
        sequence: 0,
    }
}

/// The messages of a reply, the last of which says that it is whole; or an error as the last.
fn messages(
    mut writer: Writer,
    mut reply: Reply,
    mut call: Call,
) -> impl Stream<Item = Result<wire::StreamGenerateResponse, Status>> + Send {
    async_stream::stream! {
        loop {
            match reply.next().await {
                Ok(Some(piece)) => {
                    if let Some(message) = writer.piece(&reply, piece) {
                        yield Ok(message);
                    }
                }
                Ok(None) => {
                    call.ended(Code::Ok);
                    yield Ok(writer.completed(&reply));
                    break;
                }
                Err(fault) => {
                    call.ended(fault.code());
                    yield Err(status(&fault, field));
                    break;
                }
            }
        }
    }
}

/// The messages of a conversation whose answers may have calls.
fn messages_with_calls(
    mut writer: Writer,
    mut calls: Vec<Calls>,
    mut reply: Reply,
    mut call: Call,
) -> impl Stream<Item = Result<wire::StreamChatResponse, Status>> + Send {
    async_stream::stream! {
        loop {
            match reply.next().await {
                Ok(Some(piece)) => {
                    for message in writer.with_calls(&reply, &mut calls, piece) {
                        yield Ok(message);
                    }
                }
                Ok(None) => {
                    call.ended(Code::Ok);
                    yield Ok(write::chat_message(writer.completed(&reply)));
                    break;
                }
                Err(fault) => {
                    call.ended(fault.code());
                    yield Err(status(&fault, field));
                    break;
                }
            }
        }
    }
}

#[tonic::async_trait]
impl GenerationService for Services {
    type StreamGenerateStream = Streamed<wire::StreamGenerateResponse>;

    async fn generate(
        &self,
        request: tonic::Request<wire::GenerateRequest>,
    ) -> Result<Response<wire::GenerateResponse>, Status> {
        let mut call = self.call("Generate");
        let outcome = self.generated(request, &mut call).await;
        call.ended(code(outcome.as_ref().map(|_| ())));
        outcome.map(Response::new).map_err(|fault| status(&fault, field))
    }

    async fn score(
        &self,
        request: tonic::Request<wire::ScoreRequest>,
    ) -> Result<Response<wire::ScoreResponse>, Status> {
        let mut call = self.call("Score");
        let outcome = self.scored(request, &mut call).await;
        call.ended(code(outcome.as_ref().map(|_| ())));
        outcome.map(Response::new).map_err(|fault| status(&fault, field))
    }

    async fn stream_generate(
        &self,
        request: tonic::Request<wire::StreamGenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let mut call = self.call("StreamGenerate");
        match self.generating(request, &mut call).await {
            Ok((writer, reply)) => Ok(Response::new(Box::pin(messages(writer, reply, call)))),
            Err(fault) => {
                call.ended(fault.code());
                Err(status(&fault, |name| within("generate", name)))
            }
        }
    }
}

#[tonic::async_trait]
impl ChatService for Services {
    type StreamChatStream = Streamed<wire::StreamChatResponse>;

    async fn chat(
        &self,
        request: tonic::Request<wire::ChatRequest>,
    ) -> Result<Response<wire::ChatResponse>, Status> {
        let mut call = self.call("Chat");
        let outcome = self.chatted(request, &mut call).await;
        call.ended(code(outcome.as_ref().map(|_| ())));
        outcome.map(Response::new).map_err(|fault| status(&fault, field))
    }

    async fn stream_chat(
        &self,
        request: tonic::Request<wire::StreamChatRequest>,
    ) -> Result<Response<Self::StreamChatStream>, Status> {
        let mut call = self.call("StreamChat");
        match self.chatting(request, &mut call).await {
            Ok((writer, calls, reply)) if calls.is_empty() => {
                let messages = messages(writer, reply, call).map(|message| message.map(write::chat_message));
                Ok(Response::new(Box::pin(messages)))
            }
            Ok((writer, calls, reply)) => Ok(Response::new(Box::pin(messages_with_calls(
                writer, calls, reply, call,
            )))),
            Err(fault) => {
                call.ended(fault.code());
                Err(status(&fault, |name| within("chat", name)))
            }
        }
    }
}
