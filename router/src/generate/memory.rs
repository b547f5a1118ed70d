//! Memory for texts that wait to be tokenised, and for answers that are gathered to be told whole: bounded over all
//! requests, so that many large ones at once are refused, and the process is not killed for them.
//!
//! What waits for a replica is bounded by the queue, and what waits for a client by its buffer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::fault::{Fault, Invalid};
use crate::ask::{Refusal, Score};

/// Texts of all requests together.
const TEXTS_MAX: usize = 256 << 20;
/// One whole answer, over all its prompts and candidates, as it is written.
const ANSWER_MAX: usize = 512 << 20;
/// All of them together.
const ANSWERS_MAX: usize = 1 << 30;
/// When some of it will be free again: it is held for a moment only, but nobody knows which.
const SOON: Duration = Duration::from_secs(1);
/// A token of an answer as it is written, with its name, number and place; and each of its alternatives.
const TOKEN_BYTES: usize = 64;
const ALTERNATIVE_BYTES: usize = 96;

/// What is taken of it by all requests.
#[derive(Debug, Default)]
pub(super) struct Memory {
    texts: Arc<AtomicUsize>,
    answers: Arc<AtomicUsize>,
}

/// A part of it, until this is dropped.
#[derive(Debug)]
struct Part {
    of: Arc<AtomicUsize>,
    own: AtomicUsize,
}

impl Part {
    fn new(of: &Arc<AtomicUsize>) -> Self {
        Self {
            of: Arc::clone(of),
            own: AtomicUsize::new(0),
        }
    }

    /// Takes more, and says how much this one has and how much all have.
    fn take(&self, bytes: usize) -> (usize, usize) {
        let own = self.own.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (own, self.of.fetch_add(bytes, Ordering::Relaxed) + bytes)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.of.fetch_sub(*self.own.get_mut(), Ordering::Relaxed);
    }
}

/// A text that waits to be tokenised.
#[derive(Debug)]
pub(super) struct Text(#[expect(dead_code, reason = "held to be dropped")] Part);

/// An answer that is gathered.
#[derive(Debug)]
pub struct Gathered(Part);

impl Memory {
    /// Room for a text.
    pub(super) fn text(&self, bytes: usize) -> Result<Text, Fault> {
        let part = Part::new(&self.texts);
        let (_, all) = part.take(bytes);
        if all > TEXTS_MAX {
            return Err(full("memory for texts that wait to be tokenised"));
        }
        Ok(Text(part))
    }

    /// For an answer of which nothing came yet.
    pub(super) fn answer(&self) -> Gathered {
        Gathered(Part::new(&self.answers))
    }
}

impl Gathered {
    /// More of it came.
    pub(super) fn take(&self, bytes: usize) -> Result<(), Fault> {
        let (own, all) = self.0.take(bytes);
        if own > ANSWER_MAX {
            let why = format!(
                "the whole answer would have more than {} MiB; ask for fewer prompts, candidates or alternatives at once",
                ANSWER_MAX >> 20
            );
            return Err(Invalid::new("logprobs", why).into());
        }
        if all > ANSWERS_MAX {
            return Err(full("memory for whole answers"));
        }
        Ok(())
    }
}

fn full(what: &'static str) -> Fault {
    let retry_after = SOON;
    Refusal::QueueFull { what, retry_after }.into()
}

/// About what a token takes as it is written.
pub(super) fn written(score: Option<&Score>) -> usize {
    TOKEN_BYTES + score.map_or(0, |score| (1 + score.top.len()) * ALTERNATIVE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_all_requests_are_bounded_and_given_back() {
        let memory = Memory::default();
        let first = memory.text(TEXTS_MAX - 1).expect("there is room");
        let second = memory.text(1).expect("there is room");
        let refused = memory.text(1).expect_err("there is none");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert_eq!(refused.retry_after(), Some(SOON));
        drop(first);
        memory.text(TEXTS_MAX - 1).expect("what was refused took nothing");
        drop(second);
    }

    #[test]
    fn an_answer_has_its_bound_and_all_have_theirs() {
        let memory = Memory::default();
        let (one, other, third) = (memory.answer(), memory.answer(), memory.answer());
        one.take(ANSWER_MAX).expect("as much as it may");
        other.take(ANSWER_MAX).expect("as much as it may");
        assert_eq!(
            third.take(1).expect_err("no room").code(),
            tonic::Code::ResourceExhausted
        );
        drop(other);
        third.take(1).expect("room again");
        let error = one.take(1).expect_err("more than it may");
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
    }
}
