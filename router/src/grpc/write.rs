//! From pieces to wire messages.

use std::time::Duration;

use swallow_rpc::inference::v1::{
    self as wire, StreamGenerateResponse, finish::Matched, stream_chat_response,
    stream_generate_response as stream, token_logprob::Alternative,
};

use crate::{
    ask::Score,
    calls::{self, Calls, Heard},
    generate::{Answer, End, Piece, Reply, Spoken, Usage},
    text::Tokenizer,
};

pub(super) fn logprob(tokenizer: &Tokenizer, score: &Score) -> wire::TokenLogprob {
    let alternative = |&(token_id, logprob): &(u32, f32)| Alternative {
        token_id,
        bytes: tokenizer.token_bytes(token_id).to_vec(),
        logprob,
    };
    wire::TokenLogprob {
        token_id: score.token,
        bytes: tokenizer.token_bytes(score.token).to_vec(),
        logprob: Some(score.logprob),
        rank: score.rank,
        top: score.top.iter().map(alternative).collect(),
    }
}

/// One for each prompt token; nothing predicts the first.
pub(super) fn prompt_logprobs(
    tokenizer: &Tokenizer,
    prompt: &[u32],
    scores: &[Score],
) -> Vec<wire::TokenLogprob> {
    let first = prompt.first().map(|&token_id| wire::TokenLogprob {
        token_id,
        bytes: tokenizer.token_bytes(token_id).to_vec(),
        ..wire::TokenLogprob::default()
    });
    first
        .into_iter()
        .chain(scores.iter().map(|score| logprob(tokenizer, score)))
        .collect()
}

fn logprobs(tokenizer: &Tokenizer, tokens: &[Spoken]) -> Vec<wire::TokenLogprob> {
    tokens
        .iter()
        .filter_map(|spoken| spoken.score.as_ref())
        .map(|score| logprob(tokenizer, score))
        .collect()
}

fn ids(tokens: &[Spoken]) -> Vec<u32> {
    tokens.iter().map(|spoken| spoken.token).collect()
}

pub(super) fn finish(end: End) -> wire::Finish {
    use wire::FinishReason as Reason;
    let (reason, matched) = match end {
        End::Eos(id) => (Reason::Eos, Some(Matched::TokenId(id))),
        End::StopToken(id) => (Reason::StopToken, Some(Matched::TokenId(id))),
        End::StopString(text) => (Reason::StopString, Some(Matched::StopString(text))),
        End::Length => (Reason::Length, None),
    };
    wire::Finish {
        reason: reason.into(),
        matched,
    }
}

fn duration(duration: Duration) -> prost_types::Duration {
    // Too long for the wire is longer than any process lives.
    prost_types::Duration::try_from(duration).unwrap_or_default()
}

pub(super) fn usage(usage: Usage) -> wire::Usage {
    wire::Usage {
        prompt_tokens: usage.prompt_tokens,
        cached_prompt_tokens: usage.cached_tokens,
        output_tokens: usage.output_tokens,
        queue_time: Some(duration(usage.queue_time)),
        time_to_first_token: usage.time_to_first_token.map(duration),
    }
}

pub(super) fn candidate(
    tokenizer: &Tokenizer,
    index: u32,
    answer: Answer,
) -> wire::generate_response::Candidate {
    wire::generate_response::Candidate {
        index,
        text: answer.text,
        token_ids: ids(&answer.tokens),
        logprobs: logprobs(tokenizer, &answer.tokens),
        finish: Some(finish(answer.end)),
    }
}

/// A candidate of a conversation, with its calls where there may be any.
pub(super) fn chat_candidate(
    candidate: wire::generate_response::Candidate,
    calls: Option<Calls>,
) -> wire::chat_response::Candidate {
    let (content, found) = match calls {
        Some(calls) => calls.split(&candidate.text),
        None => (candidate.text, Vec::new()),
    };
    let finish = candidate.finish.map(|finish| after_calls(finish, found.len()));
    let call = |call: calls::Call| wire::ToolCall {
        id: call.id,
        name: call.name,
        arguments: call.arguments,
    };
    let message = wire::ChatMessage {
        role: wire::Role::Assistant.into(),
        content,
        tool_calls: found.into_iter().map(call).collect(),
        tool_call_id: String::new(),
    };
    wire::chat_response::Candidate {
        index: candidate.index,
        message: Some(message),
        token_ids: candidate.token_ids,
        logprobs: candidate.logprobs,
        finish,
    }
}

/// Where an answer ends by itself and has calls, it ended for them.
fn after_calls(finish: wire::Finish, n_calls: usize) -> wire::Finish {
    let reason = match finish.reason() {
        wire::FinishReason::Length => wire::FinishReason::Length,
        _ if n_calls > 0 => wire::FinishReason::ToolCalls,
        reason => reason,
    };
    wire::Finish {
        reason: reason.into(),
        ..finish
    }
}

/// One stream's messages: numbered, and the prompt's scores inside of `Started`.
pub(super) struct Writer {
    pub request_id: String,
    /// Token ids beside the text.
    pub token_ids: bool,
    /// `Started` waits for the prompt's scores.
    pub scored: bool,
    pub started: Option<stream::Started>,
    pub sequence: u64,
}

impl Writer {
    pub(super) fn piece(&mut self, reply: &Reply, piece: Piece) -> Option<StreamGenerateResponse> {
        let tokenizer = &reply.text.tokenizer;
        let event = match piece {
            Piece::Started { cached_tokens } => {
                let started = stream::Started {
                    request_id: self.request_id.clone(),
                    model: reply.entry.name.clone(),
                    prompt_tokens: reply.usage().prompt_tokens,
                    cached_prompt_tokens: cached_tokens,
                    prompt_logprobs: Vec::new(),
                };
                if self.scored {
                    self.started = Some(started);
                    return None;
                }
                stream::Event::Started(started)
            }
            Piece::PromptScores(scores) => {
                let started = self.started.take()?;
                let prompt_logprobs = prompt_logprobs(tokenizer, &reply.prompt, &scores);
                stream::Event::Started(stream::Started {
                    prompt_logprobs,
                    ..started
                })
            }
            Piece::Delta {
                candidate,
                text,
                tokens,
            } => {
                let delta = stream::Delta {
                    index: candidate,
                    text,
                    token_ids: if self.token_ids { ids(&tokens) } else { Vec::new() },
                    logprobs: logprobs(tokenizer, &tokens),
                };
                if delta.text.is_empty() && delta.token_ids.is_empty() && delta.logprobs.is_empty() {
                    return None;
                }
                stream::Event::Delta(delta)
            }
            Piece::Finished { candidate, end } => {
                stream::Event::CandidateFinished(stream::CandidateFinished {
                    index: candidate,
                    finish: Some(finish(end)),
                })
            }
        };
        Some(self.numbered(event))
    }

    pub(super) fn completed(&mut self, reply: &Reply) -> StreamGenerateResponse {
        self.numbered(stream::Event::Completed(stream::Completed {
            usage: Some(usage(reply.usage())),
        }))
    }

    fn numbered(&mut self, event: stream::Event) -> StreamGenerateResponse {
        self.sequence += 1;
        StreamGenerateResponse {
            sequence: self.sequence,
            event: Some(event),
        }
    }
}

impl Writer {
    /// The messages of a piece of a conversation whose answers may have calls; `calls` has a reader for each candidate.
    pub(super) fn with_calls(
        &mut self,
        reply: &Reply,
        calls: &mut [Calls],
        piece: Piece,
    ) -> Vec<wire::StreamChatResponse> {
        match piece {
            Piece::Delta {
                candidate,
                text,
                tokens,
            } => {
                let calls = &mut calls[candidate as usize];
                let (n_calls, heard) = (calls.n_calls(), calls.push(&text));
                let mut heard = heard.into_iter().peekable();
                let text = match heard.next_if(|heard| matches!(heard, Heard::Text(_))) {
                    Some(Heard::Text(text)) => text,
                    _ => String::new(),
                };
                // Of tokens whose text is withheld, or part of a call, there are ids and scores all the same.
                let first = self.piece(
                    reply,
                    Piece::Delta {
                        candidate,
                        text,
                        tokens,
                    },
                );
                let mut messages: Vec<_> = first.into_iter().map(chat_message).collect();
                messages.extend(self.heard(candidate, n_calls, heard));
                messages
            }
            Piece::Finished { candidate, end } => {
                let calls = &mut calls[candidate as usize];
                let (n_calls, heard) = (calls.n_calls(), calls.finish());
                let mut messages = self.heard(candidate, n_calls, heard.into_iter());
                let finished = stream::CandidateFinished {
                    index: candidate,
                    finish: Some(after_calls(finish(end), calls.n_calls())),
                };
                messages.push(self.chat(stream_chat_response::Event::CandidateFinished(finished)));
                messages
            }
            other => self.piece(reply, other).into_iter().map(chat_message).collect(),
        }
    }

    /// What was heard of a candidate, which had `n_calls` calls before.
    fn heard(
        &mut self,
        index: u32,
        mut n_calls: usize,
        heard: impl Iterator<Item = Heard>,
    ) -> Vec<wire::StreamChatResponse> {
        use stream_chat_response::{Event, ToolCallDelta};
        let event = |heard| {
            let mut delta = match heard {
                Heard::Text(text) => {
                    return Event::Delta(stream::Delta {
                        index,
                        text,
                        ..stream::Delta::default()
                    });
                }
                Heard::Call(name) => {
                    n_calls += 1;
                    ToolCallDelta {
                        id: calls::new_id(),
                        name,
                        ..ToolCallDelta::default()
                    }
                }
                Heard::Arguments(arguments) => ToolCallDelta {
                    arguments,
                    ..ToolCallDelta::default()
                },
            };
            delta.index = index;
            // Their number is bounded by the answer's tokens.
            delta.call = n_calls.saturating_sub(1) as u32;
            Event::ToolCallDelta(delta)
        };
        let events: Vec<Event> = heard.map(event).collect();
        events.into_iter().map(|event| self.chat(event)).collect()
    }

    fn chat(&mut self, event: stream_chat_response::Event) -> wire::StreamChatResponse {
        self.sequence += 1;
        wire::StreamChatResponse {
            sequence: self.sequence,
            event: Some(event),
        }
    }
}

/// The same message on a conversation's stream.
pub(super) fn chat_message(message: StreamGenerateResponse) -> wire::StreamChatResponse {
    use stream_chat_response::Event;
    let event = message.event.map(|event| match event {
        stream::Event::Started(started) => Event::Started(started),
        stream::Event::Delta(delta) => Event::Delta(delta),
        stream::Event::CandidateFinished(finished) => Event::CandidateFinished(finished),
        stream::Event::Completed(completed) => Event::Completed(completed),
    });
    wire::StreamChatResponse {
        sequence: message.sequence,
        event,
    }
}
