//! Faults in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` under the status that fits.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    ask::Refusal,
    generate::{BAD_VALUE, Fault, Invalid, PROMPT_TOO_LONG, UNSUPPORTED},
    http::{BodyError, Stalled},
};

/// Why a request gets no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error("{0}")]
    NoRoute(String),
    #[error("{0}")]
    NoMethod(String),
    #[error("{0}")]
    Internal(&'static str),
}

impl From<Invalid> for Problem {
    fn from(invalid: Invalid) -> Self {
        Self::Fault(invalid.into())
    }
}

impl Problem {
    pub(super) fn code(&self) -> Code {
        match self {
            Self::Fault(fault) => fault.code(),
            Self::Body(_) | Self::NoMethod(_) => Code::InvalidArgument,
            Self::NoRoute(_) => Code::NotFound,
            Self::Internal(_) => Code::Internal,
        }
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Fault(fault) => status(fault.code()),
            Self::Body(BodyError::TooLarge(_)) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Body(BodyError::Stalled(Stalled::Silent(_))) => StatusCode::REQUEST_TIMEOUT,
            Self::Body(BodyError::Stalled(Stalled::Crowded)) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Body(BodyError::Broken(_)) => StatusCode::BAD_REQUEST,
            Self::NoRoute(_) => StatusCode::NOT_FOUND,
            Self::NoMethod(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The error's object, as a body or as the last event of a stream.
    pub(crate) fn body(&self) -> Value {
        let status = self.status();
        let (reason, param) = match self {
            Self::Fault(fault) => (code_of(fault.reason()), param(fault)),
            Self::Body(BodyError::TooLarge(_)) => ("body_too_large".to_owned(), None),
            Self::Body(_) => ("body_incomplete".to_owned(), None),
            Self::NoRoute(_) => ("no_such_path".to_owned(), None),
            Self::NoMethod(_) => ("method_not_allowed".to_owned(), None),
            Self::Internal(_) => ("internal".to_owned(), None),
        };
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.to_string(), "type": kind, "param": param, "code": reason}})
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        if let Self::Fault(fault) = &self
            && let Some(after) = fault.retry_after()
        {
            // Whole seconds, up: a client that comes too early is refused again.
            let seconds = after.as_millis().div_ceil(1000) as u64;
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Where OpenAI's interface has a name for a reason, its clients know that one.
fn code_of(reason: &str) -> String {
    match reason {
        PROMPT_TOO_LONG => "context_length_exceeded".to_owned(),
        BAD_VALUE => "invalid_value".to_owned(),
        UNSUPPORTED => "unsupported_parameter".to_owned(),
        other => other.to_ascii_lowercase(),
    }
}

fn param(fault: &Fault) -> Option<String> {
    match fault {
        Fault::Invalid(invalid) => Some(invalid.field.to_string()),
        Fault::Refused(Refusal::UnknownModel(_)) => Some("model".to_owned()),
        _ => None,
    }
}

fn status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
