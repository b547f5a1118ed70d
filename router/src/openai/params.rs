//! The fields that conversations and plain completions share.

use std::sync::Arc;

use serde_json::Value;

use super::{fields::Fields, format, render::UsageAsked};
use crate::{
    ask::{Grammar, Sampling},
    calls,
    generate::{Input, Invalid, Request, Stop, Unasked},
};

/// Shared fields of a request.
#[derive(Clone, Debug)]
pub(super) struct Common {
    pub model: String,
    pub stream: bool,
    pub usage: UsageAsked,
    pub n: u32,
    pub sampling: Sampling,
    pub stop: Stop,
    pub skip_special: bool,
    pub cache_salt: String,
    pub prompt_logprobs: Option<u32>,
    pub grammar: Option<Arc<Grammar>>,
    /// The answer may have calls in it.
    pub marks_calls: bool,
    /// Name tokens by id in log-probabilities.
    pub ids_as_names: bool,
    /// Token ids beside the text, of the prompt too.
    pub token_ids: bool,
}

impl Common {
    pub(super) fn read(fields: &mut Fields, unasked: Unasked) -> Result<Self, Invalid> {
        let stream = fields.bool("stream")?.unwrap_or(false);
        Ok(Self {
            model: fields.string("model")?.unwrap_or_default(),
            stream,
            usage: usage(fields, stream)?,
            n: fields.count("n")?.unwrap_or(1),
            sampling: sampling(fields)?,
            stop: stop(fields, unasked)?,
            skip_special: fields.bool("skip_special_tokens")?.unwrap_or(true),
            cache_salt: fields.string("cache_salt")?.unwrap_or_default(),
            prompt_logprobs: fields.count("prompt_logprobs")?,
            grammar: format::grammar(fields)?.map(Arc::new),
            marks_calls: false,
            ids_as_names: fields.bool("return_tokens_as_token_ids")?.unwrap_or(false),
            token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
        })
    }

    /// A request for one prompt.
    pub(super) fn request(
        &self,
        input: Input,
        logprobs: Option<u32>,
        prompt_logprobs: Option<u32>,
    ) -> Request {
        Request {
            model: self.model.clone(),
            input,
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            grammar: self.grammar.clone(),
            logprobs,
            prompt_logprobs,
            prompt_logprobs_from: 1,
            candidates: self.n,
            skip_special: self.skip_special,
            // Where calls are looked for, the token that marks them is text.
            shown: self.marks_calls.then_some(calls::TAG),
            cache_salt: self.cache_salt.clone(),
            max_queue_wait: None,
            deadline: None,
        }
    }
}

fn usage(fields: &mut Fields, stream: bool) -> Result<UsageAsked, Invalid> {
    let Some(options) = fields.object("stream_options")? else {
        return Ok(UsageAsked::default());
    };
    if !stream {
        return Err(Invalid::new(
            "stream_options",
            "is only allowed where stream is true",
        ));
    }
    let mut options = fields.inner(options);
    let asked = UsageAsked {
        last: options.bool("include_usage")?.unwrap_or(false),
        each: options.bool("continuous_usage_stats")?.unwrap_or(false),
    };
    fields.left_over("stream_options", options, &["include_obfuscation"]);
    Ok(asked)
}

fn sampling(fields: &mut Fields) -> Result<Sampling, Invalid> {
    Ok(Sampling {
        temperature: fields.float("temperature")?,
        top_p: fields.float("top_p")?,
        top_k: match fields.int("top_k")? {
            None => None,
            // Both are in use for "all".
            Some(-1 | 0) => Some(0),
            Some(k) => Some(u32::try_from(k).map_err(|_| Invalid::new("top_k", "must be -1, or 0 or more"))?),
        },
        min_p: fields.float("min_p")?,
        presence_penalty: fields.float("presence_penalty")?,
        frequency_penalty: fields.float("frequency_penalty")?,
        repetition_penalty: fields.float("repetition_penalty")?,
        seed: seed(fields)?,
        logit_bias: logit_bias(fields)?,
    })
}

/// Any 64 bits, signed or not.
fn seed(fields: &mut Fields) -> Result<Option<u64>, Invalid> {
    match fields.take("seed") {
        None => Ok(None),
        Some(value) => match (value.as_u64(), value.as_i64()) {
            (Some(seed), _) => Ok(Some(seed)),
            (None, Some(seed)) => Ok(Some(seed.cast_unsigned())),
            (None, None) => Err(Invalid::new("seed", "must be an integer of at most 64 bits")),
        },
    }
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, Invalid> {
    let entry = |(id, bias): (String, Value)| Some((id.parse::<u32>().ok()?, bias.as_f64()? as f32));
    let entries = fields.object("logit_bias")?.unwrap_or_default();
    let read: Option<Vec<(u32, f32)>> = entries.into_iter().map(entry).collect();
    read.ok_or_else(|| Invalid::new("logit_bias", "must be an object from token ids to numbers"))
}

fn stop(fields: &mut Fields, unasked: Unasked) -> Result<Stop, Invalid> {
    let max_tokens = fields.count("max_tokens")?;
    Ok(Stop {
        // The newer name counts where both are given.
        max_tokens: fields.count("max_completion_tokens")?.or(max_tokens),
        unasked,
        min_tokens: fields.count("min_tokens")?.unwrap_or(0),
        strings: Stop::compile(fields.strings("stop")?.unwrap_or_default())?,
        token_ids: fields.ids("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
        include: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::openai::known::Page;

    #[test]
    fn prompts_of_a_request_share_what_may_be_large() {
        let body = br#"{"stop": ["a", "b"], "guided_regex": "x+"}"#;
        let mut fields = Fields::parse(Page::Completions, body).expect("an object");
        let common = Common::read(&mut fields, Unasked::ContextEnd).expect("sound");
        let [one, other] = [1, 2].map(|id| common.request(Input::Tokens(vec![id]), None, None));
        assert!(Arc::ptr_eq(&one.stop.strings, &other.stop.strings));
        let grammars = one.grammar.zip(other.grammar).expect("both have it");
        assert!(Arc::ptr_eq(&grammars.0, &grammars.1));
    }
}
