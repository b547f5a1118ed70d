//! A panic while one request is served ends that request, in its protocol's own form, and is counted: the others on
//! the same connection go on, and no stream that was broken off looks whole.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::FutureExt;
use http_body::{Body as HttpBody, Frame, SizeHint};
use prometheus::IntCounter;
use tonic::Status;
use tower::{Service, service_fn};

use crate::{
    http::{Front, Protocol},
    openai,
    vital::message,
};

const TEXT: &str = "the router failed on this request; this is a bug in it, and its log says more";

/// `router`, with every request of it guarded.
pub(crate) fn guarded(router: Router, protocol: Protocol, panics: IntCounter) -> Front {
    Front::new(service_fn(move |request| {
        let (mut router, panics) = (router.clone(), panics.clone());
        // Within the future: what panics before the first await is caught too.
        let answered = AssertUnwindSafe(async move { router.call(request).await });
        async move {
            Ok(match answered.catch_unwind().await {
                Ok(answered) => watched(answered?, protocol, panics),
                Err(panic) => {
                    note(&panics, protocol, &message(&*panic));
                    match protocol {
                        Protocol::Grpc => Status::internal(TEXT).into_http(),
                        Protocol::Http => openai::internal(TEXT).into_response(),
                    }
                }
            })
        }
    }))
}

fn note(panics: &IntCounter, protocol: Protocol, message: &str) {
    panics.inc();
    tracing::error!(protocol = protocol.label(), message, "a request panicked");
}

fn watched(response: Response, protocol: Protocol, panics: IntCounter) -> Response {
    let content_type = response.headers().get(header::CONTENT_TYPE);
    let form = match protocol {
        Protocol::Grpc => Form::Trailers,
        Protocol::Http
            if content_type.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) =>
        {
            Form::Event
        }
        Protocol::Http => Form::Abort,
    };
    response.map(|inner| {
        Body::new(Watched {
            inner,
            form,
            protocol,
            panics,
        })
    })
}

/// How a body says that it is broken.
#[derive(Clone, Copy)]
enum Form {
    Trailers,
    Event,
    /// The connection breaks: a body with a known length, or chunks without the last one.
    Abort,
}

struct Watched {
    inner: Body,
    form: Form,
    protocol: Protocol,
    panics: IntCounter,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut this.inner).poll_frame(cx)));
        polled.unwrap_or_else(|panic| {
            note(&this.panics, this.protocol, &message(&*panic));
            // Dropped now: its request is cancelled at the worker.
            this.inner = Body::empty();
            let last = match this.form {
                Form::Trailers => {
                    let mut trailers = HeaderMap::new();
                    // A code and a text of ASCII are headers.
                    let _ = Status::internal(TEXT).add_header(&mut trailers);
                    Ok(Frame::trailers(trailers))
                }
                Form::Event => {
                    let event = format!("data: {}\n\n", openai::internal(TEXT).body());
                    Ok(Frame::data(Bytes::from(event)))
                }
                Form::Abort => Err(axum::Error::new(Status::internal(TEXT))),
            };
            Poll::Ready(Some(last))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
