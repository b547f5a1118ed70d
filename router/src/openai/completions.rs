//! /v1/completions: one prompt or many, as texts or token ids.
//!
//! Each prompt is a request of its own below; here they are one, with choices numbered prompt by prompt.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde::Serialize;
use serde_json::Value;
use tonic::Code;

use super::{
    Api, Asked,
    error::Problem,
    fields::{Fields, ids},
    known::Page,
    logprobs::{Entries, Naming, RankedToken, TextLogprobs, prompt_logprobs},
    params::Common,
    render::{DONE, Head, StopReason, UsageAsked, UsageBody, ended, event, ids as spoken_ids, one_event},
    waiting,
};
use crate::{
    ask::Score,
    generate::{Answer, Fault, Input, Invalid, Piece, Prepared, Reply, Request, Unasked, Usage},
    metrics::Call,
    models::ModelText,
    text::{StopSet, Transcript, Wording},
};

/// What OpenAI's interface gives where no length is asked for.
const DEFAULT_TOKENS: u32 = 16;
/// Choices of one request: prompts times n.
const MAX_CHOICES: usize = 4096;
/// Prompts of one request that are waiting or running at once.
const AT_ONCE: usize = 256;

/// What a response is made of, beside the answers.
struct Shape {
    head: Head,
    n: u32,
    echo: bool,
    /// Alternatives of each token, where log-probabilities were asked for.
    top: Option<u32>,
    prompt_top: Option<u32>,
    ids_as_names: bool,
    token_ids: bool,
    usage: UsageAsked,
    skip_special: bool,
    /// Scores of the prompt come before its output.
    scored: bool,
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

#[derive(Clone, Default, Serialize)]
struct Choice {
    index: u32,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<Entries<RankedToken>>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

/// A prompt as an echo shows it; empty without one.
struct Shown {
    text: String,
    /// Of each token, in characters.
    offsets: Vec<u32>,
    /// Of all of it.
    chars: u32,
}

/// A prompt on its way.
struct One {
    index: u32,
    prepared: Prepared,
    /// The prompt's own text, if it was one.
    text: Option<String>,
}

/// Answers prompts. The call is taken where the response goes on after this returns.
pub(super) async fn completions(
    api: &Api,
    asked: Asked,
    call: &mut Option<Call>,
) -> Result<Response, Problem> {
    let mut fields = Fields::parse(Page::Completions, &asked.body)?;
    let Parsed {
        common,
        top,
        echo,
        prompts,
    } = Parsed::read(&mut fields)?;
    let ignored = asked.parsed(api, fields.finish()?);
    if prompts.len().saturating_mul(common.n as usize) > MAX_CHOICES {
        return Err(Invalid::new("prompt", format!("prompts times n must be at most {MAX_CHOICES}")).into());
    }
    // An echo with log-probabilities needs the prompt's; an echo of no output at all needs some work to do.
    let for_echo = if echo {
        top.or((common.stop.max_tokens == Some(0)).then_some(0))
    } else {
        None
    };
    let prompt_top = for_echo.max(common.prompt_logprobs);
    let mut ones = Vec::with_capacity(prompts.len());
    for (index, input) in (0..).zip(prompts) {
        let text = if let Input::Text { text, .. } = &input {
            Some(text.clone())
        } else {
            None
        };
        let request = Request {
            deadline: asked.deadline,
            ..common.request(input, top, prompt_top)
        };
        let prepared = api.door.prepare(request).await?;
        ones.push(One {
            index,
            prepared,
            text,
        });
    }
    let model = &ones
        .first()
        .expect("no list of prompts is empty")
        .prepared
        .entry
        .name;
    if let Some(call) = call {
        call.model(model);
    }
    let shape = Shape {
        head: Head::new("cmpl", &asked.id, model),
        n: common.n,
        echo,
        top,
        prompt_top: common.prompt_logprobs,
        ids_as_names: common.ids_as_names,
        token_ids: common.token_ids,
        usage: common.usage,
        skip_special: common.skip_special,
        scored: prompt_top.is_some(),
    };
    let response = if common.stream {
        let shape = Arc::new(shape);
        let mut pieces = Box::pin(pieces(api.clone(), Arc::clone(&shape), ones));
        let opening = async move {
            let first = pieces.next().await.transpose()?;
            Ok(stream::iter(first.map(Ok)).chain(pieces))
        };
        waiting::stream(api, opening, call, |pieces, call| events(shape, pieces, call)).await?
    } else {
        whole(api, &shape, ones).await?
    };
    Ok(ignored.named_in(response))
}

/// What a request says.
struct Parsed {
    common: Common,
    top: Option<u32>,
    echo: bool,
    prompts: Vec<Input>,
}

impl Parsed {
    fn read(fields: &mut Fields) -> Result<Self, Invalid> {
        let common = Common::read(fields, Unasked::Tokens(DEFAULT_TOKENS))?;
        let add_special = fields.bool("add_special_tokens")?.unwrap_or(true);
        best_of(fields, common.n)?;
        Ok(Self {
            common,
            top: fields.count("logprobs")?,
            echo: fields.bool("echo")?.unwrap_or(false),
            prompts: prompts(fields, add_special)?,
        })
    }
}

/// A text, texts, token ids, or lists of token ids.
fn prompts(fields: &mut Fields, add_special: bool) -> Result<Vec<Input>, Invalid> {
    let text = |text: &str| Input::Text {
        text: text.to_owned(),
        add_special,
    };
    if let Some(ids) = fields.prompt_ids().filter(|ids| !ids.is_empty()) {
        return Ok(vec![Input::Tokens(ids)]);
    }
    let prompts = match fields.take("prompt") {
        Some(Value::String(one)) => Some(vec![text(&one)]),
        Some(Value::Array(items)) => match items.first() {
            Some(Value::String(_)) => items.iter().map(|item| item.as_str().map(text)).collect(),
            Some(Value::Number(_)) => ids(&items).map(|ids| vec![Input::Tokens(ids)]),
            Some(Value::Array(_)) => items
                .iter()
                .map(|item| Some(Input::Tokens(ids(item.as_array()?)?)))
                .collect(),
            _ => None,
        },
        _ => None,
    };
    prompts.ok_or_else(|| {
        Invalid::new(
            "prompt",
            "must be a string, a list of strings, a list of token ids, or a list of such lists",
        )
    })
}

/// As many as are returned, or nothing, is what is done anyway.
fn best_of(fields: &mut Fields, n: u32) -> Result<(), Invalid> {
    match fields.count("best_of")? {
        Some(best_of) if best_of != n => {
            let why = "choosing among more answers than are returned is not supported; use n";
            Err(Invalid::unsupported("best_of", why))
        }
        _ => Ok(()),
    }
}

async fn whole(api: &Api, shape: &Shape, ones: Vec<One>) -> Result<Response, Problem> {
    let done = match <[One; 1]>::try_from(ones) {
        Ok([one]) => vec![answered(api, shape, one).await?],
        Err(ones) => all_answered(api, shape, ones).await?,
    };
    let (choices, usages): (Vec<_>, Vec<_>) = done.into_iter().unzip();
    let usage = Some(Some(UsageBody::new(usages)));
    Ok(Json(shape.completion(choices.into_iter().flatten().collect(), usage)).into_response())
}

/// The answers in order. One prompt that fails drops, and so cancels, all others at once.
async fn all_answered(api: &Api, shape: &Shape, ones: Vec<One>) -> Result<Vec<(Vec<Choice>, Usage)>, Fault> {
    let answers = stream::iter(ones)
        .map(|one| answered(api, shape, one))
        .buffer_unordered(AT_ONCE);
    let mut done: Vec<(Vec<Choice>, Usage)> = answers.try_collect().await?;
    done.sort_by_key(|(choices, _)| choices.first().map(|choice| choice.index));
    Ok(done)
}

async fn answered(api: &Api, shape: &Shape, one: One) -> Result<(Vec<Choice>, Usage), Fault> {
    let One {
        index,
        prepared,
        text,
    } = one;
    let (model, prompt) = (Arc::clone(&prepared.text), Arc::clone(prepared.prompt()));
    let (scores, answers, usage) = api.door.start(prepared).await?.collect().await?;
    let shown = shape.shown(&model, &prompt, text.as_deref());
    let choices = (index * shape.n..).zip(answers);
    let choices =
        choices.map(|(index, answer)| shape.choice(index, &model, &prompt, &shown, &scores, answer));
    Ok((choices.collect(), usage))
}

/// What one of the prompts has to say, and what it took by then.
struct Said {
    /// `None`: it is done.
    piece: Option<Piece>,
    usage: Usage,
}

/// What is needed of a running prompt to write its pieces.
struct Running {
    index: u32,
    shown: Shown,
    model: Arc<ModelText>,
    prompt: Arc<[u32]>,
}

type Told = (Arc<Running>, Said);

/// The pieces of all prompts, as they come; after a fault there is nothing more.
fn pieces(api: Api, shape: Arc<Shape>, ones: Vec<One>) -> impl Stream<Item = Result<Told, Fault>> + Send {
    stream::iter(ones)
        .map(move |one| {
            let (api, shape) = (api.clone(), Arc::clone(&shape));
            async move {
                let One {
                    index,
                    prepared,
                    text,
                } = one;
                let reply = api.door.start(prepared).await?;
                let (model, prompt) = (Arc::clone(&reply.text), Arc::clone(&reply.prompt));
                let running = Running {
                    index,
                    shown: shape.shown(&model, &prompt, text.as_deref()),
                    model,
                    prompt,
                };
                Ok::<_, Fault>((Arc::new(running), reply))
            }
        })
        .buffer_unordered(AT_ONCE)
        .flat_map_unordered(None, |started| match started {
            Ok((running, reply)) => told(running, reply).boxed(),
            Err(fault) => stream::iter([Err(fault)]).boxed(),
        })
}

fn told(running: Arc<Running>, mut reply: Reply) -> impl Stream<Item = Result<Told, Fault>> {
    async_stream::stream! {
        loop {
            let running = Arc::clone(&running);
            match reply.next().await {
                Ok(piece) => {
                    let done = piece.is_none();
                    yield Ok((running, Said { piece, usage: reply.usage() }));
                    if done {
                        break;
                    }
                }
                Err(fault) => {
                    yield Err(fault);
                    break;
                }
            }
        }
    }
}

fn events(
    shape: Arc<Shape>,
    pieces: impl Stream<Item = Result<Told, Fault>> + Send,
    mut call: Option<Call>,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let mut pieces = Box::pin(pieces);
        // Of each prompt.
        let mut usages = BTreeMap::new();
        let code = loop {
            match pieces.next().await {
                Some(Ok((running, Said { piece, usage }))) => {
                    usages.insert(running.index, usage);
                    let so_far = shape.usage.in_chunk(|| UsageBody::new(usages.values().copied()));
                    let mut out = Vec::new();
                    if let Some(piece) = piece {
                        shape.chunks(&mut out, &running, piece, so_far);
                    }
                    if !out.is_empty() {
                        yield Ok(Bytes::from(out));
                    }
                }
                None => {
                    if shape.usage.last {
                        let usage = UsageBody::new(usages.values().copied());
                        yield Ok(one_event(&shape.completion(Vec::new(), Some(Some(usage)))));
                    }
                    yield Ok(Bytes::from_static(DONE.as_bytes()));
                    break Code::Ok;
                }
                Some(Err(fault)) => {
                    // The other prompts' work is of no use to anybody now.
                    drop(pieces);
                    let code = fault.code();
                    yield Ok(one_event(&Problem::Fault(fault).body()));
                    break code;
                }
            }
        };
        if let Some(call) = &mut call {
            call.ended(code);
        }
    }
}

impl Shape {
    fn completion(&self, choices: Vec<Choice>, usage: Option<Option<UsageBody>>) -> Completion<'_> {
        let Head { id, created, model } = &self.head;
        Completion {
            id,
            object: "text_completion",
            created: *created,
            model,
            choices,
            usage,
        }
    }

    fn naming<'a>(&self, model: &'a ModelText) -> Naming<'a> {
        Naming {
            tokenizer: &model.tokenizer,
            by_id: self.ids_as_names,
        }
    }

    /// The prompt as an echo shows it; empty without one.
    fn shown(&self, model: &ModelText, prompt: &[u32], text: Option<&str>) -> Shown {
        if !self.echo {
            return Shown {
                text: String::new(),
                offsets: Vec::new(),
                chars: 0,
            };
        }
        let wording = Wording {
            skip_special: self.skip_special,
            shown: None,
            include_stop: false,
            min_tokens: 0,
            stops: StopSet::new(Vec::new()),
        };
        let mut transcript = Transcript::new(Arc::clone(&model.tokenizer), Arc::new(wording));
        let mut unused = String::new();
        let offsets = prompt
            .iter()
            .map(|&token| transcript.push(token, &mut unused).offset)
            .collect();
        let text = match text {
            Some(text) => text.to_owned(),
            None => String::from_utf8_lossy(&model.tokenizer.decode(prompt, self.skip_special)).into_owned(),
        };
        let chars = text.chars().count() as u32;
        Shown { text, offsets, chars }
    }

    fn choice(
        &self,
        index: u32,
        model: &ModelText,
        prompt: &[u32],
        shown: &Shown,
        scores: &[Score],
        answer: Answer,
    ) -> Choice {
        let naming = self.naming(model);
        let logprobs = self.top.map(|top| {
            let mut logprobs = TextLogprobs::default();
            if self.echo {
                logprobs.prompt(naming, prompt, &shown.offsets, scores, top);
            }
            logprobs.output(naming, &answer.tokens, shown.chars, top);
            logprobs
        });
        let (finish_reason, stop_reason) = ended(&answer.end);
        Choice {
            index,
            text: shown.text.clone() + &answer.text,
            logprobs,
            finish_reason: Some(finish_reason),
            stop_reason,
            prompt_logprobs: self.prompt_top.map(|top| prompt_logprobs(naming, scores, top)),
            prompt_token_ids: self.token_ids.then(|| prompt.to_vec()),
            token_ids: self.token_ids.then(|| spoken_ids(&answer.tokens)),
        }
    }

    /// The first chunk of each choice, where something of the prompt is asked for.
    fn opening(&self, running: &Running, scores: &[Score]) -> Option<Choice> {
        let (naming, shown) = (self.naming(&running.model), &running.shown);
        let logprobs = self.top.filter(|_| self.echo).map(|top| {
            let mut logprobs = TextLogprobs::default();
            logprobs.prompt(naming, &running.prompt, &shown.offsets, scores, top);
            logprobs
        });
        let asked = self.echo || self.token_ids || self.prompt_top.is_some();
        asked.then(|| Choice {
            text: shown.text.clone(),
            logprobs,
            prompt_logprobs: self.prompt_top.map(|top| prompt_logprobs(naming, scores, top)),
            prompt_token_ids: self.token_ids.then(|| running.prompt.to_vec()),
            ..Choice::default()
        })
    }

    fn chunks(&self, out: &mut Vec<u8>, running: &Running, piece: Piece, usage: Option<Option<UsageBody>>) {
        let naming = self.naming(&running.model);
        let mut one = |candidate: u32, choice: Choice| {
            let index = running.index * self.n + candidate;
            event(out, &self.completion(vec![Choice { index, ..choice }], usage));
        };
        let shown = &running.shown;
        match piece {
            // The prompt's scores are still to come.
            Piece::Started { .. } if self.scored => {}
            Piece::Started { .. } => {
                if let Some(opening) = self.opening(running, &[]) {
                    (0..self.n).for_each(|candidate| one(candidate, opening.clone()));
                }
            }
            Piece::PromptScores(scores) => {
                if let Some(opening) = self.opening(running, &scores) {
                    (0..self.n).for_each(|candidate| one(candidate, opening.clone()));
                }
            }
            Piece::Delta {
                candidate,
                text,
                tokens,
            } => {
                let logprobs = self.top.map(|top| {
                    let mut logprobs = TextLogprobs::default();
                    logprobs.output(naming, &tokens, shown.chars, top);
                    logprobs
                });
                if !text.is_empty() || logprobs.is_some() || self.token_ids {
                    let token_ids = self.token_ids.then(|| spoken_ids(&tokens));
                    let choice = Choice {
                        text,
                        logprobs,
                        token_ids,
                        ..Choice::default()
                    };
                    one(candidate, choice);
                }
            }
            Piece::Finished { candidate, end } => {
                let (finish_reason, stop_reason) = ended(&end);
                let finish_reason = Some(finish_reason);
                one(
                    candidate,
                    Choice {
                        finish_reason,
                        stop_reason,
                        ..Choice::default()
                    },
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::known::assert_reads;

    #[test]
    fn what_is_served_is_read() {
        let mut fields = Fields::parse(Page::Completions, br#"{"prompt": "p"}"#).expect("an object");
        Parsed::read(&mut fields).expect("sound");
        assert_reads(Page::Completions, &fields.asked_for);
    }
}
