//! What a step computed, in the order that it was asked for.

use std::time::Duration;

use swallow_schedule::SeqId;

use crate::{
    device::{HeadOut, HeadUse, Landed, OpTime, StepMeta},
    sampling::TokenScore,
};

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Whose.
    pub seq: SeqId,
    /// Which.
    pub token: u32,
    /// If log-probabilities were asked for.
    pub score: Option<TokenScore>,
}

/// Scores of consecutive prompt tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptScores {
    /// Whose.
    pub seq: SeqId,
    /// Position of the first scored token; the token at position 0 has no score.
    pub first_position: u32,
    /// One a token.
    pub scores: Vec<TokenScore>,
}

/// What a step computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// One for each work that samples, in order of works.
    pub sampled: Vec<Sampled>,
    /// One for each work whose rows predict prompt tokens that are to be scored.
    pub prompt_scores: Vec<PromptScores>,
    /// It ran from a recording.
    pub replayed: bool,
    /// Time that ranks spent meeting each other; that of the rank that spent most.
    pub exchanged: Option<Duration>,
    /// Where the first rank's time went, of a group that was told to look.
    pub op_times: Vec<OpTime>,
}

impl StepResult {
    /// The ids alone, as the scheduler commits them.
    pub fn tokens(&self) -> Vec<u32> {
        self.sampled.iter().map(|s| s.token).collect()
    }
}

/// Puts the ranks' answers in the order of the step's asks.
pub(super) fn collect(meta: &StepMeta, mut landed: Vec<Landed>) -> StepResult {
    let op_times = landed
        .first_mut()
        .map(|first| std::mem::take(&mut first.op_times));
    let replayed = landed.iter().all(|landed| landed.replayed);
    let exchanged = landed.iter().filter_map(|landed| landed.exchanged).max();
    let mut outs: Vec<HeadOut> = landed.into_iter().flat_map(|landed| landed.outs).collect();
    outs.sort_unstable_by_key(|out| out.ask);
    assert!(
        outs.iter().map(|out| out.ask).eq(0..meta.asks.len()),
        "each ask is answered once"
    );
    let mut result = StepResult {
        replayed,
        exchanged,
        op_times: op_times.unwrap_or_default(),
        ..StepResult::default()
    };
    for (ask, out) in meta.asks.iter().zip(outs) {
        match (ask.what, out.score) {
            (HeadUse::Sample { .. }, score) => {
                result.sampled.push(Sampled {
                    seq: ask.seq,
                    token: out.token,
                    score,
                });
            }
            (HeadUse::Score, Some(score)) => match result.prompt_scores.last_mut() {
                Some(scores) if scores.seq == ask.seq => scores.scores.push(score),
                _ => result.prompt_scores.push(PromptScores {
                    seq: ask.seq,
                    first_position: ask.position + 1,
                    scores: vec![score],
                }),
            },
            (HeadUse::Score, None) => unreachable!("a score is what was asked for"),
        }
    }
    result
}
