//! The client's end of a request: a stream of events, held to the deadline. Dropping it is the cancel.

use std::{
    future::Future as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::Stream;
use swallow_rpc::worker::v1::cancel;
use tokio::time::Sleep;

use super::{Flight, Shared};
use crate::ask::{Event, Failure, Refusal};

/// What becomes of an accepted request. The stream ends after the last candidate's `Finished`, or with one failure.
#[derive(Debug)]
pub struct Generation {
    flight: Arc<Flight>,
    shared: Arc<Shared>,
    deadline: Option<Pin<Box<Sleep>>>,
    over: bool,
}

impl Generation {
    pub(super) fn new(flight: Arc<Flight>, shared: Arc<Shared>) -> Self {
        shared.opened();
        let deadline = flight
            .ask
            .deadline
            .map(|at| Box::pin(tokio::time::sleep_until(at)));
        Self {
            flight,
            shared,
            deadline,
            over: false,
        }
    }

    /// The client wants no more of this candidate, as for a stop string: the worker stops it, and nothing more comes
    /// of it, not even its `Finished`. Of the others everything comes.
    pub fn stop(&mut self, candidate: u32) {
        if let Some((link, handle)) = self.flight.stop(candidate) {
            let unsent = link.cancel(&self.flight, &[handle], cancel::Reason::StopString);
            self.shared.take_back(&link, unsent);
        }
    }

    /// Resolves when a replica has accepted it.
    pub(super) async fn accepted(&mut self) -> Result<(), Refusal> {
        std::future::poll_fn(|cx| {
            if self.is_late(cx) {
                self.shared
                    .clean_up(&self.flight, self.flight.expire(), cancel::Reason::Deadline);
            }
            self.flight.poll_accepted(cx)
        })
        .await
    }

    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let late = self
            .deadline
            .as_mut()
            .is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready());
        if late {
            self.deadline = None;
        }
        late
    }
}

impl Stream for Generation {
    type Item = Result<Event, Failure>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        if self.is_late(cx) {
            self.shared
                .clean_up(&self.flight, self.flight.expire(), cancel::Reason::Deadline);
        }
        let (polled, opening) = self.flight.poll_event(cx);
        if let Some((link, handle, tokens)) = opening {
            link.open(&self.flight, handle, tokens);
        }
        let event = ready!(polled);
        self.over = !matches!(event, Some(Ok(_)));
        Poll::Ready(event)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.shared
            .clean_up(&self.flight, self.flight.leave(), cancel::Reason::ClientGone);
        self.shared.closed();
    }
}
