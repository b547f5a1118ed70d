//! A request as the worker reads it.

use swallow_rpc::worker::v1 as rpc;

use crate::ask::{Ask, Sampling};

/// One candidate. The budget is filled in when the frame is made.
pub(super) fn request(ask: &Ask, handle: u32, attempt: u32, candidate: u32) -> rpc::Request {
    // The prompt is the same for all candidates: one of them scores it. If that is all there is to do, each does.
    let scores_prompt = candidate == 0 || ask.max_tokens == 0;
    rpc::Request {
        handle,
        request_uuid: ask.uuid.as_bytes().to_vec(),
        attempt,
        candidate,
        prompt_ids: ask.prompt.to_vec(),
        sampling: Some(sampling(&ask.sampling)),
        max_tokens: ask.max_tokens,
        min_tokens: ask.min_tokens,
        stop_token_ids: ask.stop_token_ids.clone(),
        ignore_eos: ask.ignore_eos,
        logprobs: ask.logprobs,
        prompt_logprobs: ask.prompt_logprobs.filter(|_| scores_prompt),
        budget: None,
        cache_salt: ask.cache_salt,
    }
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
