//! Bodies with limits: a request's that stops coming or is one too many, and a response's that counts as open until
//! its last byte is on its way.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use super::{BODY_BYTES_MAX, connection::InFlight};

/// Why a body is not read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stalled {
    /// Nothing more came, or too little.
    #[error("the request's body came too slowly; it was waited for for {} s, and longer where there was more of it", .0.as_secs())]
    Silent(Duration),
    /// Too many bodies at once.
    #[error("the bodies of the requests that are being read exceed {} MiB together; come again", BODY_BYTES_MAX >> 20)]
    Crowded,
}

impl Stalled {
    /// The one that is the reason of an error.
    pub(super) fn within(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(stalled) = error.downcast_ref::<Self>() {
                return Some(*stalled);
            }
            next = error.source();
        }
        None
    }
}

/// What a body has to bring for each second that it is waited for, beyond its patience: a byte now and then keeps no
/// request open.
const BYTES_PER_SECOND_MIN: u32 = 4096;

/// A request's body, held to its limits.
pub(super) struct Timed {
    inner: Incoming,
    patience: Duration,
    /// How long it was waited for, all in all.
    waited: Duration,
    /// Since when it is waited for, and when that is too long.
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
    /// Bytes of all bodies; these are of this one.
    all: Arc<AtomicUsize>,
    own: usize,
}

impl Timed {
    pub fn new(inner: Incoming, patience: Duration, all: Arc<AtomicUsize>) -> Self {
        Self {
            inner,
            patience,
            waited: Duration::ZERO,
            waiting: None,
            all,
            own: 0,
        }
    }

    fn took(&mut self, bytes: usize) -> Result<(), Stalled> {
        self.own += bytes;
        if self.all.fetch_add(bytes, Ordering::Relaxed) + bytes > BODY_BYTES_MAX {
            return Err(Stalled::Crowded);
        }
        Ok(())
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

impl Body for Timed {
    type Data = Bytes;
    type Error = AnyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, AnyError>>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some((since, _)) = this.waiting.take() {
                    this.waited += since.elapsed();
                }
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                Poll::Ready(Some(this.took(bytes).map(|()| frame).map_err(Into::into)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => {
                let earned = Duration::from_secs(this.own as u64) / BYTES_PER_SECOND_MIN;
                let left = (this.patience + earned).saturating_sub(this.waited);
                let begin = || {
                    let now = Instant::now();
                    (now, Box::pin(tokio::time::sleep_until(now + left)))
                };
                let (_, timer) = this.waiting.get_or_insert_with(begin);
                ready!(timer.as_mut().poll(cx));
                Poll::Ready(Some(Err(Stalled::Silent(this.patience).into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A response's body; its request is open until it is dropped.
pub(super) struct Counted<B> {
    pub inner: B,
    pub _in_flight: Option<InFlight>,
}

impl<B: Body<Data = Bytes> + Unpin> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
