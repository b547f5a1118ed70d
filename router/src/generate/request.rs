//! A request as a front has parsed it, before it meets the model; and the bounds that need no model.
//!
//! Fields carry their OpenAI names in errors.

use std::{sync::Arc, time::Duration};

use serde_json::{Map, Value};
use tokio::time::Instant;

use super::fault::Invalid;
use crate::{
    ask::{Grammar, Sampling},
    text::StopSet,
};

/// Most candidates of one prompt.
pub const MAX_CANDIDATES: u32 = 128;
/// Most alternatives at one position.
pub const MAX_TOP: u32 = 20;
const MAX_LOGIT_BIAS: usize = 1024;
const MAX_STOP_STRINGS: usize = 256;
const MAX_STOP_BYTES: usize = 16 << 10;
const MAX_STOP_IDS: usize = 1024;
const MAX_SALT_BYTES: usize = 1024;
/// Workers read no more.
const MAX_GRAMMAR_BYTES: usize = 64 << 10;

/// What the model is to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A text.
    Text {
        /// The text.
        text: String,
        /// Put what the model expects around a text, as a beginning-of-sequence token.
        add_special: bool,
    },
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// A conversation for the model's chat template.
    Chat(Chat),
}

/// A conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// Objects with `role` and `content`, both strings.
    pub messages: Vec<Value>,
    /// Further variables of the template.
    pub args: Map<String, Value>,
    /// End with the header of the model's turn.
    pub add_generation_prompt: bool,
    /// End inside of the last message, which the model goes on with.
    pub continue_final: bool,
    /// As for a text; templates usually write what is needed themselves.
    pub add_special: bool,
}

/// The length of an output for which none is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unasked {
    /// All that the context holds.
    ContextEnd,
    /// So many tokens.
    Tokens(u32),
}

/// When a candidate ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Stop {
    /// Most tokens.
    pub max_tokens: Option<u32>,
    /// If `max_tokens` is absent.
    pub unasked: Unasked,
    /// No stop before this many tokens.
    pub min_tokens: u32,
    /// Texts. All prompts of a request share them.
    pub strings: Arc<StopSet>,
    /// Tokens.
    pub token_ids: Vec<u32>,
    /// Run past the model's own end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Leave what matched in the text.
    pub include: bool,
}

impl Stop {
    /// Texts made ready to be looked for, unless they exceed their bounds.
    pub fn compile(given: Vec<String>) -> Result<Arc<StopSet>, Invalid> {
        bounded("stop", given.len() as u64, 0, MAX_STOP_STRINGS as u64)?;
        let bytes: usize = given.iter().map(String::len).sum();
        if bytes > MAX_STOP_BYTES {
            let why = format!("has {bytes} bytes of strings; at most {MAX_STOP_BYTES}");
            return Err(Invalid::new("stop", why));
        }
        if given.iter().any(String::is_empty) {
            let why = "has an empty string, which would end every output at once";
            return Err(Invalid::new("stop", why));
        }
        Ok(Arc::new(StopSet::new(given)))
    }

    /// Nothing asked for.
    pub fn unasked(unasked: Unasked) -> Self {
        Self {
            max_tokens: None,
            unasked,
            min_tokens: 0,
            strings: Arc::new(StopSet::new(Vec::new())),
            token_ids: Vec::new(),
            ignore_eos: false,
            include: false,
        }
    }
}

/// A request for one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Any served name.
    pub model: String,
    /// The prompt.
    pub input: Input,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// When it ends.
    pub stop: Stop,
    /// What each candidate must follow. All prompts of a request share it.
    pub grammar: Option<Arc<Grammar>>,
    /// Scores of output tokens with so many alternatives.
    pub logprobs: Option<u32>,
    /// Scores of prompt tokens.
    pub prompt_logprobs: Option<u32>,
    /// Of those from this position on; 1 is all, since nothing predicts the first. Within the prompt.
    pub prompt_logprobs_from: u32,
    /// Independent continuations.
    pub candidates: u32,
    /// Leave control tokens out of the text.
    pub skip_special: bool,
    /// But for the one of this text.
    pub shown: Option<&'static str>,
    /// Cached prefixes are shared only under equal salts.
    pub cache_salt: String,
    /// Longest wait for a replica.
    pub max_queue_wait: Option<Duration>,
    /// The client gives up then.
    pub deadline: Option<Instant>,
}

impl Request {
    /// Everything that can be judged without the model.
    pub fn check(&mut self) -> Result<(), Invalid> {
        self.check_sampling()?;
        self.check_stop()?;
        for (field, asked) in [
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ] {
            bounded(field, u64::from(asked.unwrap_or(0)), 0, u64::from(MAX_TOP))?;
        }
        bounded("n", self.candidates.into(), 1, MAX_CANDIDATES.into())?;
        bounded(
            "cache_salt",
            self.cache_salt.len() as u64,
            0,
            MAX_SALT_BYTES as u64,
        )?;
        if let Some(grammar) = &self.grammar {
            let bytes = grammar.text().len() as u64;
            bounded("response_format", bytes, 1, MAX_GRAMMAR_BYTES as u64)?;
            if self.stop.ignore_eos {
                let why = "an output that must follow a grammar ends with the model's end of sequence";
                return Err(Invalid::new("ignore_eos", why));
            }
        }
        let only_scores = self.stop.max_tokens == Some(0);
        if only_scores && self.prompt_logprobs.is_none() {
            return Err(Invalid::new(
                "max_tokens",
                "must be at least 1; 0 is for prompt log-probabilities alone",
            ));
        }
        if only_scores && self.candidates > 1 {
            return Err(Invalid::new(
                "n",
                "must be 1 where max_tokens is 0: nothing is generated",
            ));
        }
        Ok(())
    }

    fn check_sampling(&mut self) -> Result<(), Invalid> {
        let s = &mut self.sampling;
        within("temperature", s.temperature, 0.0..=2.0)?;
        within("min_p", s.min_p, 0.0..=1.0)?;
        within("presence_penalty", s.presence_penalty, -2.0..=2.0)?;
        within("frequency_penalty", s.frequency_penalty, -2.0..=2.0)?;
        for (field, value, most) in [
            ("top_p", s.top_p, 1.0),
            ("repetition_penalty", s.repetition_penalty, 10.0),
        ] {
            if value.is_some_and(|value| !(value > 0.0 && value <= most)) {
                return Err(Invalid::new(
                    field,
                    format!("must be greater than 0 and at most {most}"),
                ));
            }
        }
        bounded("logit_bias", s.logit_bias.len() as u64, 0, MAX_LOGIT_BIAS as u64)?;
        s.logit_bias.sort_by_key(|&(id, _)| id);
        if let Some(pair) = s.logit_bias.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Invalid::new(
                "logit_bias",
                format!("names token {} twice", pair[0].0),
            ));
        }
        s.logit_bias
            .iter()
            .try_for_each(|&(_, bias)| within("logit_bias", Some(bias), -100.0..=100.0))
    }

    fn check_stop(&self) -> Result<(), Invalid> {
        let stop = &self.stop;
        bounded(
            "stop_token_ids",
            stop.token_ids.len() as u64,
            0,
            MAX_STOP_IDS as u64,
        )?;
        if stop.max_tokens.is_some_and(|most| stop.min_tokens > most) {
            return Err(Invalid::new("min_tokens", "must not exceed max_tokens"));
        }
        Ok(())
    }
}

fn within(
    field: &'static str,
    value: Option<f32>,
    range: std::ops::RangeInclusive<f32>,
) -> Result<(), Invalid> {
    match value {
        // NaN is in no range.
        Some(value) if !range.contains(&value) => Err(Invalid::new(
            field,
            format!(
                "must be from {} to {}, and is {value}",
                range.start(),
                range.end()
            ),
        )),
        _ => Ok(()),
    }
}

fn bounded(field: &'static str, value: u64, least: u64, most: u64) -> Result<(), Invalid> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let what = match field {
        "logit_bias" | "stop" | "stop_token_ids" => " entries",
        "cache_salt" | "response_format" => " bytes",
        _ => "",
    };
    Err(Invalid::new(
        field,
        format!("must be from {least} to {most}{what}, and is {value}"),
    ))
}
