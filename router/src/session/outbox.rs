//! What a session still has to send. Frames are made when the connection can take them, so that everything queued by
//! then travels together: an admission burst is one Submit, the clients who left are one Cancel. No request leaves
//! without a credit.

use std::{
    collections::VecDeque,
    task::{Context, Poll, Waker},
};

use swallow_rpc::worker::v1::{
    Cancel, Request, SessionRequest, Submit, Window, cancel, session_request::Frame,
};
use tokio::time::Instant;

/// Prompt tokens in one Submit: about a megabyte, a quarter of what a gRPC server takes by default. One request alone
/// is sent whatever its size.
const SUBMIT_TOKENS_MAX: usize = 1 << 18;

/// A request that is not sent yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub request: Request,
    /// What its budget is counted to, at the time of sending.
    pub deadline: Option<Instant>,
}

/// Frames in the making.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    control: VecDeque<Frame>,
    cancels: Vec<(cancel::Reason, Vec<u32>)>,
    windows: Window,
    submits: VecDeque<Pending>,
    /// Requests that the worker still takes.
    credits: usize,
    waker: Option<Waker>,
    closed: bool,
}

impl Outbox {
    /// Hello, Ping, Goodbye: ahead of everything else.
    pub fn control(&mut self, frame: Frame) {
        self.control.push_back(frame);
        self.wake();
    }

    pub fn cancel(&mut self, handle: u32, reason: cancel::Reason) {
        match self.cancels.iter_mut().find(|(of, _)| *of == reason) {
            Some((_, handles)) => handles.push(handle),
            None => self.cancels.push((reason, vec![handle])),
        }
        self.wake();
    }

    /// A request may have generated so many tokens.
    pub fn open(&mut self, handle: u32, output_tokens: u32) {
        let Window {
            handle: handles,
            output_tokens: tokens,
        } = &mut self.windows;
        match handles.iter().position(|of| *of == handle) {
            Some(at) => tokens[at] = output_tokens,
            None => {
                handles.push(handle);
                tokens.push(output_tokens);
            }
        }
        self.wake();
    }

    /// Nothing more is said about a handle: the next request under it has a window of its own.
    pub fn forget(&mut self, handle: u32) {
        if let Some(at) = self.windows.handle.iter().position(|of| *of == handle) {
            self.windows.handle.swap_remove(at);
            self.windows.output_tokens.swap_remove(at);
        }
    }

    pub fn grant(&mut self, credits: u32) {
        self.credits = self.credits.saturating_add(credits as usize);
        self.wake();
    }

    pub fn submit(&mut self, pending: Pending) {
        self.submits.push_back(pending);
        self.wake();
    }

    /// True: it had not been sent, and will not be.
    pub fn take_back(&mut self, handle: u32) -> bool {
        let before = self.submits.len();
        self.submits.retain(|pending| pending.request.handle != handle);
        self.submits.len() < before
    }

    /// Requests are not sent any more, and no frame follows the others that are queued.
    pub fn close(&mut self) {
        self.closed = true;
        self.submits.clear();
        self.wake();
    }

    /// The next frame; the stream's end after `close`.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<SessionRequest>> {
        let frame = if let Some(frame) = self.control.pop_front() {
            frame
        } else if let Some((reason, handles)) = self.cancels.pop() {
            Frame::Cancel(Cancel {
                handles,
                reason: reason.into(),
            })
        } else if !self.windows.handle.is_empty() {
            Frame::Window(std::mem::take(&mut self.windows))
        } else if !self.submits.is_empty() && self.credits > 0 {
            Frame::Submit(self.take_submit())
        } else if self.closed {
            return Poll::Ready(None);
        } else {
            self.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        Poll::Ready(Some(SessionRequest { frame: Some(frame) }))
    }

    fn take_submit(&mut self) -> Submit {
        let now = Instant::now();
        let mut requests = Vec::new();
        let mut tokens = 0;
        while let Some(next) = self.submits.front().filter(|_| requests.len() < self.credits) {
            tokens += next.request.prompt_ids.len();
            if tokens > SUBMIT_TOKENS_MAX && !requests.is_empty() {
                break;
            }
            let Some(Pending {
                mut request,
                deadline,
            }) = self.submits.pop_front()
            else {
                break;
            };
            let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
            // The bound of a protobuf Duration is 10,000 years; a longer deadline is none.
            request.budget = left.and_then(|left| left.try_into().ok());
            requests.push(request);
        }
        self.credits -= requests.len();
        Submit { requests }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}
