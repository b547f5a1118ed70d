//! A stream's beginning. What comes first decides the status of the response: what fails before it is an error
//! response, not a broken stream. Where it lets itself be waited for, the response begins without it, and comments keep
//! proxies from taking the connection for dead; an error is then the last event.

use std::{convert::Infallible, time::Duration};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures::{Stream, StreamExt};

use super::{Api, error::Problem, render::one_event, sse};
use crate::{generate::Fault, metrics::Call};

/// So long nothing need be heard: half of what proxies usually wait.
pub(super) const QUIET: Duration = Duration::from_secs(15);
/// Clients of server-sent events skip it.
const COMMENT: &str = ": waiting\n\n";

/// The response to a request for a stream. `opening` gives what comes first, `rest` all events from there on. The call is
/// taken where the response goes on after this returns.
pub(super) async fn stream<T, S>(
    api: &Api,
    opening: impl Future<Output = Result<T, Fault>> + Send + 'static,
    call: &mut Option<Call>,
    rest: impl FnOnce(T, Option<Call>) -> S + Send + 'static,
) -> Result<Response, Problem>
where
    T: Send + 'static,
    S: Stream<Item = Result<Bytes, Infallible>> + Send + 'static,
{
    let quiet = api.settings.quiet;
    let mut opening = Box::pin(opening);
    if let Ok(opened) = tokio::time::timeout(quiet, &mut opening).await {
        return Ok(sse(Body::from_stream(rest(opened?, call.take()))));
    }
    let mut call = call.take();
    let events = async_stream::stream! {
        let opened = loop {
            yield Ok(Bytes::from_static(COMMENT.as_bytes()));
            if let Ok(opened) = tokio::time::timeout(quiet, &mut opening).await {
                break opened;
            }
        };
        match opened {
            Ok(opened) => {
                let mut rest = std::pin::pin!(rest(opened, call));
                while let Some(event) = rest.next().await {
                    yield event;
                }
            }
            Err(fault) => {
                if let Some(call) = &mut call {
                    call.ended(fault.code());
                }
                yield Ok::<Bytes, Infallible>(one_event(&Problem::Fault(fault).body()));
            }
        }
    };
    Ok(sse(Body::from_stream(events)))
}
