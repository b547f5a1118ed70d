//! What a session still has to send: a queue bounded in bytes, filled by the engine, emptied by the connection.
//!
//! The engine never waits for a connection. A router always reads, so a full outbox is a broken router: the engine
//! cuts it, what it held is gone at once, and its stream ends with the reason.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use futures::{Stream, task::AtomicWaker};
use prost::Message;
use swallow_rpc::worker::v1::{SessionResponse, session_response::Frame};
use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};
use tonic::Status;

/// The engine's end.
#[derive(Debug)]
pub struct Outbox {
    shared: Arc<Shared>,
    max_bytes: usize,
}

/// The connection's end.
#[derive(Debug)]
pub struct OutboxStream {
    shared: Arc<Shared>,
    _tracked: TaskTrackerToken,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    reader: AtomicWaker,
    gone: CancellationToken,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<(usize, SessionResponse)>,
    bytes: usize,
    /// What comes after the last frame; `Ok` is a clean end.
    end: Option<Result<(), Status>>,
}

/// The outbox holds all it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    /// Bytes of frames that wait.
    pub bytes: usize,
}

/// An empty outbox of at most `max_bytes` encoded bytes.
pub fn outbox(max_bytes: usize, tracked: TaskTrackerToken) -> (Outbox, OutboxStream) {
    let shared = Arc::new(Shared {
        queue: Mutex::default(),
        reader: AtomicWaker::new(),
        gone: CancellationToken::new(),
    });
    (
        Outbox {
            shared: Arc::clone(&shared),
            max_bytes,
        },
        OutboxStream {
            shared,
            _tracked: tracked,
        },
    )
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing between lock and unlock can panic half way.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outbox {
    /// Queues a frame behind the others. After the end, and once the connection is gone, frames go nowhere.
    ///
    /// # Errors
    /// The bound is reached. One frame alone always fits.
    pub fn push(&self, frame: Frame) -> Result<(), Full> {
        let frame = SessionResponse { frame: Some(frame) };
        let size = frame.encoded_len();
        {
            let mut queue = self.shared.queue();
            if queue.end.is_some() {
                return Ok(());
            }
            if queue.bytes > 0 && queue.bytes + size > self.max_bytes {
                return Err(Full { bytes: queue.bytes });
            }
            queue.bytes += size;
            queue.frames.push_back((size, frame));
        }
        self.shared.reader.wake();
        Ok(())
    }

    /// Ends the stream after what is queued.
    pub fn end(&self, how: Result<(), Status>) {
        self.shared.queue().end.get_or_insert(how);
        self.shared.reader.wake();
    }

    /// Throws away what is queued and ends the stream.
    pub fn cut(&self, why: Status) {
        {
            let mut queue = self.shared.queue();
            queue.frames = VecDeque::new();
            queue.bytes = 0;
            queue.end = Some(Err(why));
        }
        self.shared.reader.wake();
        // A connection that is stuck may never ask again; the session's task watches this.
        self.shared.gone.cancel();
    }

    /// Cancelled once nobody reads any more.
    pub fn gone(&self) -> CancellationToken {
        self.shared.gone.clone()
    }
}

/// An engine that dies without a word still ends its sessions.
impl Drop for Outbox {
    fn drop(&mut self) {
        self.end(Err(Status::unavailable("the replica ended")));
    }
}

impl Stream for OutboxStream {
    type Item = Result<SessionResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.shared.reader.register(context.waker());
        let mut queue = self.shared.queue();
        if let Some((size, frame)) = queue.frames.pop_front() {
            queue.bytes -= size;
            return Poll::Ready(Some(Ok(frame)));
        }
        match &mut queue.end {
            None => Poll::Pending,
            Some(end) => Poll::Ready(std::mem::replace(end, Ok(())).err().map(Err)),
        }
    }
}

impl Drop for OutboxStream {
    fn drop(&mut self) {
        self.shared.gone.cancel();
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use swallow_rpc::worker::v1::Pong;
    use tokio_util::task::TaskTracker;

    use super::*;

    fn pong(nonce: u64) -> Frame {
        Frame::Pong(Pong { nonce })
    }

    #[tokio::test]
    async fn frames_come_in_order_and_then_the_end() {
        let (outbox, stream) = outbox(1024, TaskTracker::new().token());
        outbox.push(pong(1)).expect("room");
        outbox.push(pong(2)).expect("room");
        outbox.end(Err(Status::unavailable("draining")));
        outbox.push(pong(3)).expect("after the end it goes nowhere");
        let all: Vec<_> = stream.collect().await;
        assert_eq!(all.len(), 3);
        assert_eq!(all[1].as_ref().expect("frame").frame, Some(pong(2)));
        assert_eq!(all[2].as_ref().expect_err("end").code(), tonic::Code::Unavailable);
    }

    #[tokio::test]
    async fn a_full_outbox_is_cut_and_its_memory_is_free() {
        let (outbox, mut stream) = outbox(20, TaskTracker::new().token());
        let full = (0..100)
            .find_map(|n| outbox.push(pong(n)).err())
            .expect("bounded");
        assert!(full.bytes <= 20);
        outbox.cut(Status::resource_exhausted("slow"));
        assert!(outbox.gone().is_cancelled());
        assert_eq!(outbox.shared.queue().frames.capacity(), 0);
        assert_eq!(
            stream.next().await.expect("end").expect_err("end").code(),
            tonic::Code::ResourceExhausted
        );
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn each_end_notices_the_other_s() {
        let (first, stream) = outbox(20, TaskTracker::new().token());
        drop(stream);
        first.gone().cancelled().await;
        let (second, mut stream) = outbox(20, TaskTracker::new().token());
        drop(second);
        assert_eq!(
            stream.next().await.expect("end").expect_err("end").code(),
            tonic::Code::Unavailable
        );
    }
}
