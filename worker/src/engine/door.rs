//! Where wire types stop: a request becomes a sound order, or a sentence that says what to change.
//!
//! Runs on the session's task, so that a long prompt costs the engine nothing. What depends on other requests
//! (credits, repeated tickets, free places) is the engine's to check.

use std::{sync::Arc, time::Duration};

use swallow_proto::prefix;
use swallow_rpc::worker::v1::{Grammar, Request, Sampling, grammar};

use super::{Order, Submission, Ticket};
use crate::{checkpoint::GenerationConfig, grammar::Source, sampling::SamplingParams};

/// Most entries of a distribution that a response carries.
const TOP_LOGPROBS_MAX: u32 = 20;
/// Most stop ids beside the model's own.
const STOP_IDS_MAX: usize = 1024;
/// Most entries of logit_bias.
const LOGIT_BIAS_MAX: usize = 4096;
/// A longer budget is as good as none, and would overflow the clock's arithmetic.
const BUDGET_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Values for what a request leaves out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// 0 is greedy.
    pub temperature: f32,
    /// (0, 1].
    pub top_p: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 0..=1.
    pub min_p: f32,
    /// (0, 10].
    pub repetition_penalty: f32,
}

impl Defaults {
    /// Temperature 1, nothing filtered, nothing penalised.
    pub const NEUTRAL: Self = Self {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
    };

    /// What the model's authors recommend, and neutral values where they say nothing.
    pub fn of_model(generation: &GenerationConfig) -> Self {
        let neutral = Self::NEUTRAL;
        Self {
            temperature: generation.temperature.unwrap_or(neutral.temperature),
            top_p: generation.top_p.unwrap_or(neutral.top_p),
            top_k: generation.top_k.unwrap_or(neutral.top_k),
            min_p: generation.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: generation
                .repetition_penalty
                .unwrap_or(neutral.repetition_penalty),
        }
    }
}

/// What a request is checked against.
#[derive(Clone, Debug)]
pub struct Door {
    /// Prompt and output together.
    pub max_model_len: u32,
    /// Token ids are below it.
    pub vocab_size: u32,
    /// The model's own ends, ascending.
    pub eos_token_ids: Arc<[u32]>,
    /// For what a request leaves out.
    pub defaults: Defaults,
}

impl Door {
    /// Parses one request; a bad one keeps its handle, so that its refusal can be told. `seed` serves a request
    /// that brings none.
    ///
    /// Where a grammar comes beside it, the order is to get its place in that before it goes to the loop.
    pub fn enter(&self, mut request: Request, seed: u64) -> (Submission, Option<Source>) {
        let handle = request.handle;
        let grammar = request.grammar.take();
        let entered = grammar
            .map(|grammar| source(grammar, request.ignore_eos))
            .transpose()
            .and_then(|source| Ok((self.order(request, seed)?, source)));
        match entered {
            Ok((order, source)) => (
                Submission {
                    handle,
                    order: Ok(order),
                },
                source,
            ),
            Err(message) => (
                Submission {
                    handle,
                    order: Err(message),
                },
                None,
            ),
        }
    }

    fn order(&self, request: Request, seed: u64) -> Result<(Ticket, Box<Order>), String> {
        let uuid = <[u8; 16]>::try_from(request.request_uuid.as_slice())
            .map_err(|_| format!("request_uuid has {} bytes; send 16", request.request_uuid.len()))?;
        let ticket = Ticket {
            uuid,
            candidate: request.candidate,
            attempt: request.attempt,
        };
        self.check_tokens(&request)?;
        check_logprobs(&request)?;
        let stop_ids = self.stop_ids(&request)?;
        let budget = request.budget.map(|budget| {
            // A negative budget is one that ran out on the way.
            Duration::try_from(budget).unwrap_or_default().min(BUDGET_MAX)
        });
        let params = self.params(&request, Arc::clone(&stop_ids), seed)?;
        let order = Order {
            prompt: request.prompt_ids.into(),
            params,
            max_tokens: request.max_tokens - request.resumed_tokens,
            min_tokens: request.min_tokens.saturating_sub(request.resumed_tokens),
            stop_ids,
            ends_at_eos: !request.ignore_eos,
            prompt_logprobs: request.prompt_logprobs.is_some(),
            prompt_logprobs_from: request.prompt_logprobs_from,
            root_key: prefix::root(request.cache_salt),
            budget,
            resumed: request.resumed_tokens,
            window: match request.window_tokens {
                0 => u32::MAX,
                tokens => tokens,
            },
        };
        Ok((ticket, Box::new(order)))
    }

    fn check_tokens(&self, request: &Request) -> Result<(), String> {
        if request.prompt_ids.is_empty() {
            return Err("prompt_ids is empty; send at least one token".into());
        }
        if let Some((i, id)) = self.unknown(&request.prompt_ids) {
            return Err(format!(
                "prompt_ids[{i}] is {id}; ids are below {}",
                self.vocab_size
            ));
        }
        if request.max_tokens == 0 && request.prompt_logprobs.is_none() {
            return Err("max_tokens is 0; send at least 1, or 0 with prompt_logprobs".into());
        }
        let from = request.prompt_logprobs_from;
        if from > 0 && from as usize >= request.prompt_ids.len() {
            return Err(format!(
                "prompt_logprobs_from is {from}; send less than prompt_ids has, {}",
                request.prompt_ids.len()
            ));
        }
        if request.min_tokens > request.max_tokens {
            return Err(format!(
                "min_tokens is {}; send at most max_tokens, {}",
                request.min_tokens, request.max_tokens
            ));
        }
        let resumed = request.resumed_tokens;
        if resumed > 0 && request.prompt_logprobs.is_some() {
            return Err("prompt_logprobs cannot be had of a resumed request; leave it out".into());
        }
        if resumed > 0 && (resumed >= request.max_tokens || resumed as usize >= request.prompt_ids.len()) {
            return Err(format!(
                "resumed_tokens is {resumed}; send less than max_tokens, {}, and less than prompt_ids has, {}",
                request.max_tokens,
                request.prompt_ids.len()
            ));
        }
        let (prompt, limit) = (request.prompt_ids.len() - resumed as usize, self.max_model_len);
        if prompt as u64 + u64::from(request.max_tokens) > u64::from(limit) {
            return Err(format!(
                "the prompt has {prompt} tokens and max_tokens is {}, together more than the model's {limit}; shorten \
                 one of them",
                request.max_tokens
            ));
        }
        Ok(())
    }

    fn unknown(&self, ids: &[u32]) -> Option<(usize, u32)> {
        ids.iter()
            .copied()
            .enumerate()
            .find(|(_, id)| *id >= self.vocab_size)
    }

    fn stop_ids(&self, request: &Request) -> Result<Arc<[u32]>, String> {
        let own = &request.stop_token_ids;
        if own.len() > STOP_IDS_MAX {
            return Err(format!(
                "stop_token_ids has {} entries; send at most {STOP_IDS_MAX}",
                own.len()
            ));
        }
        if let Some((i, id)) = self.unknown(own) {
            return Err(format!(
                "stop_token_ids[{i}] is {id}; ids are below {}",
                self.vocab_size
            ));
        }
        let eos: &[u32] = if request.ignore_eos {
            &[]
        } else {
            &self.eos_token_ids
        };
        if own.is_empty() && !request.ignore_eos {
            return Ok(Arc::clone(&self.eos_token_ids));
        }
        let mut all = [own, eos].concat();
        all.sort_unstable();
        all.dedup();
        Ok(all.into())
    }

    fn params(&self, request: &Request, stop_ids: Arc<[u32]>, seed: u64) -> Result<SamplingParams, String> {
        let absent = Sampling::default();
        let given = request.sampling.as_ref().unwrap_or(&absent);
        let default = &self.defaults;
        Ok(SamplingParams {
            temperature: within("temperature", given.temperature, default.temperature, 0.0, 2.0)?,
            top_p: positive("top_p", given.top_p, default.top_p, 1.0)?,
            top_k: given.top_k.unwrap_or(default.top_k),
            min_p: within("min_p", given.min_p, default.min_p, 0.0, 1.0)?,
            presence_penalty: within("presence_penalty", given.presence_penalty, 0.0, -2.0, 2.0)?,
            frequency_penalty: within("frequency_penalty", given.frequency_penalty, 0.0, -2.0, 2.0)?,
            repetition_penalty: positive(
                "repetition_penalty",
                given.repetition_penalty,
                default.repetition_penalty,
                10.0,
            )?,
            logit_bias: self.logit_bias(given)?,
            seed: given.seed.unwrap_or(seed),
            candidate: request.candidate,
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            min_tokens: request.min_tokens,
            stop_ids,
            resumed: request.resumed_tokens,
            grammar: None,
        })
    }

    fn logit_bias(&self, given: &Sampling) -> Result<Vec<(u32, f32)>, String> {
        if given.logit_bias.len() > LOGIT_BIAS_MAX {
            return Err(format!(
                "logit_bias has {} entries; send at most {LOGIT_BIAS_MAX}",
                given.logit_bias.len()
            ));
        }
        let mut bias: Vec<(u32, f32)> = given.logit_bias.iter().map(|(&id, &add)| (id, add)).collect();
        bias.sort_unstable_by_key(|(id, _)| *id);
        for &(id, add) in &bias {
            if id >= self.vocab_size {
                return Err(format!(
                    "logit_bias names token {id}; ids are below {}",
                    self.vocab_size
                ));
            }
            within("logit_bias", Some(add), 0.0, -100.0, 100.0)?;
        }
        Ok(bias)
    }
}

fn source(grammar: Grammar, ignore_eos: bool) -> Result<Source, String> {
    if ignore_eos {
        return Err(
            "a grammar ends with the model's end-of-text token, which ignore_eos runs past; send one of them"
                .into(),
        );
    }
    Ok(match grammar.source {
        Some(grammar::Source::JsonSchema(schema)) => Source::JsonSchema(schema),
        Some(grammar::Source::Regex(regex)) => Source::Regex(regex),
        Some(grammar::Source::Lark(lark)) => Source::Lark(lark),
        None => return Err("grammar has a kind that this worker does not know; run the same release".into()),
    })
}

fn check_logprobs(request: &Request) -> Result<(), String> {
    for (name, asked) in [
        ("logprobs", request.logprobs),
        ("prompt_logprobs", request.prompt_logprobs),
    ] {
        if let Some(n) = asked
            && n > TOP_LOGPROBS_MAX
        {
            return Err(format!("{name} is {n}; send at most {TOP_LOGPROBS_MAX}"));
        }
    }
    Ok(())
}

fn within(name: &str, given: Option<f32>, default: f32, least: f32, most: f32) -> Result<f32, String> {
    match given {
        None => Ok(default),
        Some(value) if (least..=most).contains(&value) => Ok(value),
        Some(value) => Err(format!("{name} is {value}; send {least} to {most}")),
    }
}

fn positive(name: &str, given: Option<f32>, default: f32, most: f32) -> Result<f32, String> {
    match given {
        Some(value) if value > 0.0 && value <= most => Ok(value),
        Some(value) => Err(format!("{name} is {value}; send more than 0 and at most {most}")),
        None => Ok(default),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door() -> Door {
        Door {
            max_model_len: 64,
            vocab_size: 100,
            eos_token_ids: [97, 98].into(),
            defaults: Defaults {
                temperature: 0.6,
                top_p: 0.9,
                ..Defaults::NEUTRAL
            },
        }
    }

    fn request() -> Request {
        Request {
            handle: 3,
            request_uuid: vec![1; 16],
            prompt_ids: vec![1, 2, 3],
            max_tokens: 8,
            ..Request::default()
        }
    }

    fn enter(request: Request) -> Result<Box<Order>, String> {
        door().enter(request, 42).0.order.map(|(_, order)| order)
    }

    fn sampling(change: impl FnOnce(&mut Sampling)) -> Request {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        Request {
            sampling: Some(sampling),
            ..request()
        }
    }

    #[test]
    fn absent_values_come_from_the_model_and_given_ones_win() {
        let params = enter(request()).expect("sound").params;
        assert_eq!(
            (params.temperature, params.top_p, params.top_k, params.seed),
            (0.6, 0.9, 0, 42)
        );
        let given = sampling(|sampling| {
            sampling.temperature = Some(0.0);
            sampling.seed = Some(7);
            sampling.logit_bias = [(9, 1.0), (4, -2.0)].into();
        });
        let params = enter(given).expect("sound").params;
        assert_eq!((params.temperature, params.seed), (0.0, 7));
        assert_eq!(params.logit_bias, [(4, -2.0), (9, 1.0)]);
    }

    #[test]
    fn stop_ids_are_the_request_s_and_the_model_s() {
        let stops = |ignore_eos, own: &[u32]| {
            let order = enter(Request {
                ignore_eos,
                stop_token_ids: own.to_vec(),
                ..request()
            })
            .expect("sound");
            order.stop_ids.to_vec()
        };
        assert_eq!(stops(false, &[]), [97, 98]);
        assert_eq!(stops(false, &[98, 5]), [5, 97, 98]);
        assert_eq!(stops(true, &[5, 5]), [5]);
        assert_eq!(stops(true, &[]), [0_u32; 0]);
    }

    #[test]
    fn a_silent_model_has_neutral_defaults() {
        let generation = GenerationConfig {
            top_k: Some(40),
            ..GenerationConfig::default()
        };
        assert_eq!(
            Defaults::of_model(&generation),
            Defaults {
                top_k: 40,
                ..Defaults::NEUTRAL
            }
        );
        assert_eq!(
            Defaults::of_model(&GenerationConfig::default()),
            Defaults::NEUTRAL
        );
    }

    #[test]
    fn a_spent_budget_is_no_error() {
        let order = |seconds| {
            let budget = Some(prost_types::Duration { seconds, nanos: 0 });
            enter(Request { budget, ..request() }).expect("sound").budget
        };
        assert_eq!(order(-5), Some(Duration::ZERO));
        assert_eq!(order(i64::MAX), Some(BUDGET_MAX));
    }

    #[test]
    fn a_grammar_is_taken_out_or_refused() {
        let grammar = |source| Some(Grammar { source });
        let regex = || grammar(Some(grammar::Source::Regex("a".into())));
        let entered = |grammar, ignore_eos| {
            let (submission, source) = door().enter(
                Request {
                    grammar,
                    ignore_eos,
                    ..request()
                },
                42,
            );
            (submission.order.err().unwrap_or_default(), source)
        };
        assert_eq!(
            entered(regex(), false),
            (String::new(), Some(Source::Regex("a".into())))
        );
        let (unknown, source) = entered(grammar(None), false);
        assert!(unknown.contains("does not know") && source.is_none(), "{unknown}");
        let (endless, source) = entered(regex(), true);
        assert!(endless.contains("ignore_eos") && source.is_none(), "{endless}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let cases = [
            (
                Request {
                    request_uuid: vec![1],
                    ..request()
                },
                "request_uuid has 1 bytes; send 16",
            ),
            (
                Request {
                    prompt_ids: vec![],
                    ..request()
                },
                "prompt_ids is empty; send at least one token",
            ),
            (
                Request {
                    prompt_ids: vec![1, 100],
                    ..request()
                },
                "prompt_ids[1] is 100; ids are below 100",
            ),
            (
                Request {
                    max_tokens: 0,
                    ..request()
                },
                "max_tokens is 0; send at least 1, or 0 with prompt_logprobs",
            ),
            (
                Request {
                    min_tokens: 9,
                    ..request()
                },
                "min_tokens is 9; send at most max_tokens, 8",
            ),
            (
                Request {
                    max_tokens: u32::MAX,
                    ..request()
                },
                "the prompt has 3 tokens and max_tokens is 4294967295, together more than the model's 64; shorten one \
                 of them",
            ),
            (
                Request {
                    logprobs: Some(21),
                    ..request()
                },
                "logprobs is 21; send at most 20",
            ),
            (
                Request {
                    stop_token_ids: vec![100],
                    ..request()
                },
                "stop_token_ids[0] is 100; ids are below 100",
            ),
            (
                sampling(|s| s.temperature = Some(f32::NAN)),
                "temperature is NaN; send 0 to 2",
            ),
            (
                sampling(|s| s.top_p = Some(0.0)),
                "top_p is 0; send more than 0 and at most 1",
            ),
            (
                sampling(|s| s.repetition_penalty = Some(-1.0)),
                "repetition_penalty is -1; send more than 0 and at most 10",
            ),
            (
                sampling(|s| s.logit_bias = [(100, 1.0)].into()),
                "logit_bias names token 100; ids are below 100",
            ),
            (
                sampling(|s| s.logit_bias = [(1, 101.0)].into()),
                "logit_bias is 101; send -100 to 100",
            ),
        ];
        for (request, expected) in cases {
            assert_eq!(enter(request).expect_err("must be refused"), expected);
        }
        let scored = Request {
            max_tokens: 0,
            prompt_logprobs: Some(0),
            ..request()
        };
        assert!(enter(scored).is_ok_and(|order| order.prompt_logprobs));
    }
}
