//! Faults as gRPC statuses with google.rpc details.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{ask::Refusal, generate::Fault};

const DOMAIN: &str = "swallow";
/// Clients that implement gRPC's retries wait as long as this says.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The status of a fault, in a call whose fields have these names.
pub(super) fn status(fault: &Fault, name: impl Fn(&str) -> String) -> Status {
    let mut details = ErrorDetails::new();
    let message = match fault {
        Fault::Invalid(invalid) => {
            let field = name(&invalid.field);
            details.add_bad_request_violation(&field, &invalid.why);
            format!("{field}: {}", invalid.why)
        }
        Fault::Refused(Refusal::UnknownModel(_)) => {
            details.add_bad_request_violation("model", fault.to_string());
            fault.to_string()
        }
        fault => fault.to_string(),
    };
    with_details(
        fault.code(),
        fault.reason(),
        message,
        fault.retry_after(),
        details,
    )
}

/// A refusal that is no fault of a request's own.
pub(crate) fn told(code: Code, reason: &str, message: String, retry_after: Option<Duration>) -> Status {
    with_details(code, reason, message, retry_after, ErrorDetails::new())
}

fn with_details(
    code: Code,
    reason: &str,
    message: String,
    retry_after: Option<Duration>,
    mut details: ErrorDetails,
) -> Status {
    let mut metadata = MetadataMap::new();
    details.set_error_info(reason, DOMAIN, HashMap::new());
    if let Some(after) = retry_after {
        details.set_retry_info(Some(after));
        metadata.insert(PUSHBACK, (after.as_millis().max(1) as u64).into());
    }
    Status::with_error_details_and_metadata(code, message, details, metadata)
}

/// A fault in a field of the message itself.
pub(super) fn plain(fault: &Fault) -> Status {
    status(fault, str::to_owned)
}

/// The field of GenerateRequest and ChatRequest that has this OpenAI name.
pub(super) fn field(name: &str) -> String {
    let known = match name {
        "prompt" => "prompt",
        "n" => "candidate_count",
        "max_tokens" => "stop.max_output_tokens",
        "min_tokens" => "stop.min_output_tokens",
        "stop" => "stop.stop_strings",
        "stop_token_ids" => "stop.stop_token_ids",
        "logprobs" => "logprobs.top_n",
        "prompt_logprobs" => "logprobs.prompt_top_n",
        "cache_salt" => "policy.cache_salt",
        "response_format" => "grammar",
        "ignore_eos" => "stop.ignore_eos",
        "temperature" | "top_p" | "top_k" | "min_p" | "presence_penalty" | "frequency_penalty"
        | "repetition_penalty" | "seed" | "logit_bias" => return format!("sampling.{name}"),
        other => other,
    };
    known.to_owned()
}

/// The code that a call ended with.
pub(super) fn code(outcome: Result<(), &Fault>) -> Code {
    outcome.map_or_else(Fault::code, |()| Code::Ok)
}
