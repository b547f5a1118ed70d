//! What the sockets hand to the loop.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tonic::Status;

use super::{SessionId, Ticket};
use crate::{sampling::SamplingParams, serve::Outbox};

/// What the sockets ask of the loop.
#[derive(Debug)]
pub enum Command {
    /// A router said Hello.
    Open {
        /// Its session from now on.
        session: SessionId,
        /// For the log.
        router_id: String,
        /// Tell it what enters and leaves the prefix cache.
        kv_events: bool,
        /// Where frames for it go, Welcome first.
        outbox: Outbox,
    },
    /// Requests of one frame.
    Submit {
        /// Whose.
        session: SessionId,
        /// Parsed at the door.
        submissions: Vec<Submission>,
        /// When they were read: budgets and latencies count from here.
        arrived: Instant,
    },
    /// The router does not want these any more.
    Cancel {
        /// Whose.
        session: SessionId,
        /// Unknown ones have ended already.
        handles: Vec<u32>,
    },
    /// Clients have read: these may go on.
    Window {
        /// Whose.
        session: SessionId,
        /// Handles, and how many tokens each may have generated; unknown ones have ended already.
        openings: Vec<(u32, u32)>,
    },
    /// Is the loop alive?
    Ping {
        /// Who asks.
        session: SessionId,
        /// To be sent back.
        nonce: u64,
    },
    /// The router is gone, said goodbye, or broke the protocol.
    Close {
        /// Whose.
        session: SessionId,
        /// How its stream ends, if anybody reads it still.
        how: Result<(), Status>,
    },
    /// Take nothing new; end when all is done, or after this time.
    Drain {
        /// For running requests.
        timeout: Duration,
    },
}

/// A request that passed the door, or what was wrong with it.
#[derive(Debug)]
pub struct Submission {
    /// The router's name for it.
    pub handle: u32,
    /// Sound, or a sentence that says what to change.
    pub order: Result<(Ticket, Box<Order>), String>,
}

/// A sound request.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// At least one token, all known.
    pub prompt: Arc<[u32]>,
    /// Nothing is left to default.
    pub params: SamplingParams,
    /// 0 only where prompt log-probabilities are wanted.
    pub max_tokens: u32,
    /// No stop id ends it before.
    pub min_tokens: u32,
    /// The request's own and the model's.
    pub stop_ids: Arc<[u32]>,
    /// The model's own ends are among `stop_ids`.
    pub ends_at_eos: bool,
    /// Prompt log-probabilities are wanted.
    pub prompt_logprobs: bool,
    /// From this position on.
    pub prompt_logprobs_from: u32,
    /// Key of the empty prefix under the request's salt.
    pub root_key: u64,
    /// Time from its arrival.
    pub budget: Option<Duration>,
    /// Tokens that another replica generated; they are the prompt's last.
    pub resumed: u32,
    /// It generates no more than these, resumed ones included, before it hears of more; `u32::MAX`: without limit.
    pub window: u32,
}
