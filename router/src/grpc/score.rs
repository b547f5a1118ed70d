//! GenerationService's Score: log-likelihoods of continuations of one context.
//!
//! The first continuation is scored alone. It leaves the context's blocks in its replica's cache, where the others find
//! them; then all of these run at once.

use futures::{StreamExt, TryStreamExt, stream};
use swallow_rpc::inference::v1::{
    self as wire,
    score_request::{Context, continuation::Content},
    score_response::Score,
};

use super::{Services, deadline, parse, write};
use crate::{
    ask::Sampling,
    generate::{Fault, Input, Invalid, Request, Stop, Unasked, Usage, in_time},
    metrics::Call,
};

const MAX_CONTINUATIONS: usize = 256;
/// Continuations of one request that are waiting or running at once.
const AT_ONCE: usize = 64;

/// Context and continuation, and how many tokens the context has.
struct Prompt {
    ids: Vec<u32>,
    context: usize,
}

impl Services {
    pub(super) async fn scored(
        &self,
        request: tonic::Request<wire::ScoreRequest>,
        call: &mut Call,
    ) -> Result<wire::ScoreResponse, Fault> {
        let deadline = deadline(request.metadata())?;
        let mut message = request.into_inner();
        let request_id = parse::request_id(std::mem::take(&mut message.request_id))?;
        let policy = message.policy.take().unwrap_or_default();
        let entry = self.door.model(&message.model)?;
        call.model(&entry.name);
        let template = Request {
            model: entry.name.clone(),
            input: Input::Tokens(Vec::new()),
            sampling: Sampling::default(),
            stop: Stop {
                max_tokens: Some(0),
                ..Stop::unasked(Unasked::ContextEnd)
            },
            grammar: None,
            logprobs: None,
            prompt_logprobs: Some(0),
            prompt_logprobs_from: 1,
            candidates: 1,
            skip_special: true,
            shown: None,
            cache_salt: policy.cache_salt,
            max_queue_wait: policy.max_queue_wait.map(parse::wait).transpose()?,
            deadline,
        };
        let prompts = in_time(deadline, self.prompts(message)).await?;
        let n = prompts.len();
        let mut requests = prompts.into_iter().map(|prompt| Request {
            input: Input::Tokens(prompt.ids),
            prompt_logprobs_from: prompt.context as u32,
            ..template.clone()
        });
        let mut all = Vec::with_capacity(n);
        if let Some(first) = requests.next() {
            all.push(self.score_one(first).await?);
        }
        let others = stream::iter(requests).map(|request| self.score_one(request));
        all.extend(others.buffered(AT_ONCE).try_collect::<Vec<_>>().await?);
        let (scores, usages): (Vec<Score>, Vec<Usage>) = all.into_iter().unzip();
        Ok(wire::ScoreResponse {
            request_id,
            model: entry.name.clone(),
            scores,
            usage: Some(write::usage(sum(&usages))),
        })
    }

    async fn prompts(&self, message: wire::ScoreRequest) -> Result<Vec<Prompt>, Fault> {
        let n = message.continuations.len();
        if n == 0 || n > MAX_CONTINUATIONS {
            let why = format!("must be 1 to {MAX_CONTINUATIONS}, and are {n}");
            return Err(Invalid::new("continuations", why).into());
        }
        let entry = self.door.known(&message.model).await?;
        let text = self.door.text(&entry).await?;
        let tokens = |input| self.door.tokens(&entry, &text, input);
        let special = message.add_special_tokens.unwrap_or(true);
        let (context, as_text) = match message.context {
            Some(Context::Text(text)) => {
                let input = Input::Text {
                    text: text.clone(),
                    add_special: special,
                };
                (tokens(input).await?, Some(text))
            }
            Some(Context::TokenIds(ids)) => (tokens(Input::Tokens(ids.ids)).await?, None),
            None => return Err(Invalid::new("context", "is missing; give text or token_ids").into()),
        };
        if context.is_empty() {
            let why = "has no token: nothing predicts the first one";
            return Err(Invalid::new("context", why).into());
        }
        let mut prompts = Vec::with_capacity(n);
        for (i, continuation) in message.continuations.into_iter().enumerate() {
            let field = format!("continuations[{i}]");
            let ids = match (continuation.content, &as_text) {
                (Some(Content::Text(more)), Some(before)) => {
                    let input = Input::Text {
                        text: before.clone() + &more,
                        add_special: special,
                    };
                    tokens(input).await?
                }
                (Some(Content::Text(text)), None) => {
                    let add_special = false;
                    [&context[..], &tokens(Input::Text { text, add_special }).await?].concat()
                }
                (Some(Content::TokenIds(ids)), _) => {
                    [&context[..], &tokens(Input::Tokens(ids.ids)).await?].concat()
                }
                (None, _) => return Err(Invalid::new(field, "is missing; give text or token_ids").into()),
            };
            if ids.len() <= context.len() {
                return Err(Invalid::new(field, "adds no token to the context").into());
            }
            prompts.push(Prompt {
                ids,
                context: context.len(),
            });
        }
        Ok(prompts)
    }

    async fn score_one(&self, request: Request) -> Result<(Score, Usage), Fault> {
        let prepared = self.door.prepare(request).await?;
        let (scores, _, usage) = self.door.start(prepared).await?.collect().await?;
        let score = Score {
            logprob: scores.iter().map(|score| f64::from(score.logprob)).sum(),
            is_greedy: scores.iter().all(|score| score.rank == 1),
            token_count: scores.len() as u32,
        };
        Ok((score, usage))
    }
}

fn sum(usages: &[Usage]) -> Usage {
    let mut sum = Usage::default();
    for usage in usages {
        sum.prompt_tokens = sum.prompt_tokens.saturating_add(usage.prompt_tokens);
        sum.cached_tokens = sum.cached_tokens.saturating_add(usage.cached_tokens);
        sum.queue_time = sum.queue_time.max(usage.queue_time);
    }
    sum
}
