//! A request as the worker reads it.

use swallow_rpc::worker::v1 as rpc;

use crate::{
    ask::{Ask, Grammar, Sampling},
    dispatch::Part,
};

/// One candidate. The budget is filled in when the frame is made.
pub(super) fn request(ask: &Ask, handle: u32, attempt: u32, part: &Part) -> rpc::Request {
    let candidate = part.candidate;
    // The prompt is the same for all candidates: one of them scores it. If that is all there is to do, each does.
    // A client that has begun to read has the scores.
    let scores_prompt = part.fresh && (candidate == 0 || ask.max_tokens == 0);
    rpc::Request {
        handle,
        request_uuid: ask.uuid.as_bytes().to_vec(),
        attempt,
        candidate,
        prompt_ids: [&ask.prompt, part.said.as_slice()].concat(),
        sampling: Some(sampling(&ask.sampling)),
        max_tokens: ask.max_tokens,
        min_tokens: ask.min_tokens,
        stop_token_ids: ask.stop_token_ids.clone(),
        ignore_eos: ask.ignore_eos,
        logprobs: ask.logprobs,
        prompt_logprobs: ask.prompt_logprobs.filter(|_| scores_prompt),
        // 0 is all of them, as for a prompt of one token.
        prompt_logprobs_from: Some(ask.prompt_logprobs_from)
            .filter(|&from| scores_prompt && from > 1)
            .unwrap_or(0),
        budget: None,
        cache_salt: ask.cache_salt,
        resumed_tokens: u32::try_from(part.said.len()).expect("at most max_tokens"),
        window_tokens: part.window,
        grammar: ask.grammar.as_deref().map(grammar),
    }
}

fn grammar(grammar: &Grammar) -> rpc::Grammar {
    use rpc::grammar::Source;
    let source = match grammar.clone() {
        Grammar::JsonSchema(schema) => Source::JsonSchema(schema),
        Grammar::Regex(regex) => Source::Regex(regex),
        Grammar::Lark(lark) => Source::Lark(lark),
    };
    rpc::Grammar { source: Some(source) }
}

fn sampling(sampling: &Sampling) -> rpc::Sampling {
    rpc::Sampling {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
        logit_bias: sampling.logit_bias.iter().copied().collect(),
    }
}
