//! Which replica takes a request: the one that has most of its prompt in the cache, until that one is saturated; then
//! the one with the least work, where work is what is outstanding there and what this prompt would add.
//!
//! A prompt that was sent somewhere draws its like there at once, but counts as cached only when the replica has said
//! so: until then whoever follows may have to compute it once more.
//!
//! A replica that is not ready, draining, resting after failures, excluded by the request or out of credits is never
//! chosen.

use std::{fmt, time::Duration};

use crate::fleet::{Fleet, Replica, ReplicaId};

/// A request, as far as its placement goes.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// At least 1.
    pub prompt_tokens: u32,
    /// Most tokens of each candidate.
    pub max_tokens: u32,
    /// Continuations, at least 1; all go to one replica.
    pub candidates: u32,
    /// The prompt's block keys, for each block size in use; empty where the cache cannot help.
    pub keys: &'a [Keys],
    /// Replicas that had it before.
    pub excluded: &'a [ReplicaId],
}

/// Block keys of a prompt, for one block size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Whole blocks, in order.
    pub keys: Vec<u64>,
}

impl Ask<'_> {
    pub(crate) fn keys_of(&self, block_tokens: u32) -> &[u64] {
        let found = self.keys.iter().find(|keys| keys.block_tokens == block_tokens);
        found.map_or(&[], |keys| &keys.keys)
    }
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// There.
    pub replica: ReplicaId,
    /// Because.
    pub why: Why,
    /// Prompt tokens known to be in its cache, less than the prompt's.
    pub cached_tokens: u32,
}

/// The reason for a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No other could take it.
    OnlyReplica,
    /// It has this many blocks of the prompt in its cache, or is about to, more than any other or with less work than those.
    CachedBlocks(u32),
    /// It has the least to do.
    LeastWork,
    /// `from` has `blocks` of the prompt, but too much to do.
    Spill {
        /// Who has them.
        from: ReplicaId,
        /// How many.
        blocks: u32,
    },
    /// It had failed, rested, and is tried with this request.
    Probe,
}

impl Why {
    /// For a metric.
    pub fn label(&self) -> &'static str {
        match self {
            Self::OnlyReplica => "only_replica",
            Self::CachedBlocks(_) => "cached_blocks",
            Self::LeastWork => "least_work",
            Self::Spill { .. } => "spill",
            Self::Probe => "probe",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CachedBlocks(blocks) => write!(f, "cached_blocks({blocks})"),
            Self::Spill { from, blocks } => write!(f, "spill(from {}, {blocks} blocks)", from.0),
            other => f.write_str(other.label()),
        }
    }
}

/// Why nobody can take a request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// None is ready.
    NoReplica,
    /// All that are ready had it before.
    AllExcluded,
    /// All that are left rest after failures.
    Resting {
        /// The first may be tried then; `None`: one is being tried.
        until: Option<Duration>,
    },
    /// None has credits left.
    NoCredits,
}

/// A cached prefix counts as a reason by itself from this share of the prompt on: 1/4. Below, as for the few tokens
/// that every chat begins with, it only makes the work a little less.
const WORTH_SHARE: u64 = 4;
/// Work that a replica may have before its cached prefix is no reason any more, in seconds of its prefill rate: what
/// a client would wait for the first token.
const SATURATED_SECONDS: f64 = 0.5;
/// The same in steps, where the rate is not known.
const SATURATED_STEPS: u64 = 4;
/// Saturated is also relative, (5/4) of what the replica with the least work would have to do: under full load
/// everybody has more than half a second's, and the caches still matter.
const OVER_LEAST: (u128, u128) = (5, 4);

struct Candidate<'a> {
    id: ReplicaId,
    replica: &'a Replica,
    /// Of the prompt, in its cache or on their way there.
    blocks: u32,
    /// The same in tokens.
    expected_tokens: u32,
    /// Those that are there.
    cached_tokens: u32,
    /// Outstanding tokens there, with those of this prompt that are not there.
    cost: u64,
}

/// Picks a replica. `draw` decides between equals.
pub fn choose(fleet: &Fleet, ask: &Ask<'_>, now: Duration, draw: u64) -> Result<Choice, Blocked> {
    let healthy = healthy(fleet, ask, now)?;
    // All candidates at once if some replica invites as many; else, where one is invited the others follow.
    let wanted = i64::from(ask.candidates);
    let needed = if healthy.iter().any(|c| c.replica.credits() >= wanted) {
        wanted
    } else {
        1
    };
    let credits = |c: &&Candidate<'_>| c.replica.credits() >= needed;
    let first = usize::try_from(draw % healthy.len() as u64).expect("below a length");
    let (after, before) = (&healthy[first..], &healthy[..first]);
    let in_turn = || after.iter().chain(before).filter(credits);

    let least = in_turn().min_by_key(|c| c.cost).ok_or(Blocked::NoCredits)?;
    // The most cached; of those the least work. Replicas without credits count, to tell a spill from a cold start.
    let warmest = after
        .iter()
        .chain(before)
        .min_by_key(|c| (u32::MAX - c.expected_tokens, c.cost));
    let warmest = warmest.expect("not empty: there is a least");

    let saved = u64::from(warmest.expected_tokens.saturating_sub(least.expected_tokens));
    let worth = saved * WORTH_SHARE >= u64::from(ask.prompt_tokens);
    let sticks = worth && credits(&warmest) && !is_saturated(warmest, least);
    let chosen = if sticks { warmest } else { least };
    let why = if chosen.replica.breaker.is_resting() {
        Why::Probe
    } else if healthy.len() == 1 {
        Why::OnlyReplica
    } else if worth && !sticks {
        Why::Spill {
            from: warmest.id,
            blocks: warmest.blocks,
        }
    } else if chosen.blocks > 0 && chosen.expected_tokens >= warmest.expected_tokens {
        Why::CachedBlocks(chosen.blocks)
    } else {
        Why::LeastWork
    };
    Ok(Choice {
        replica: chosen.id,
        why,
        cached_tokens: chosen.cached_tokens,
    })
}

/// Those that may be chosen as soon as they have credits; never empty.
fn healthy<'a>(fleet: &'a Fleet, ask: &Ask<'_>, now: Duration) -> Result<Vec<Candidate<'a>>, Blocked> {
    let mut ready = fleet
        .replicas()
        .filter(|(_, replica)| replica.is_ready())
        .peekable();
    ready.peek().ok_or(Blocked::NoReplica)?;
    let mut untried = ready.filter(|(id, _)| !ask.excluded.contains(id)).peekable();
    untried.peek().ok_or(Blocked::AllExcluded)?;

    let mut until = None::<Duration>;
    let mut healthy = Vec::with_capacity(untried.size_hint().1.unwrap_or(0));
    for (id, replica) in untried {
        if replica.breaker.allows(now) {
            healthy.push(candidate(id, replica, fleet, ask));
        } else {
            until = until.into_iter().chain(replica.breaker.opens_at()).min();
        }
    }
    // Where somebody else may have room, those that just had none are left alone.
    if healthy
        .iter()
        .any(|candidate| candidate.replica.busy_until <= now)
    {
        healthy.retain(|candidate| candidate.replica.busy_until <= now);
    }
    if healthy.is_empty() {
        Err(Blocked::Resting { until })
    } else {
        Ok(healthy)
    }
}

fn candidate<'a>(id: ReplicaId, replica: &'a Replica, fleet: &Fleet, ask: &Ask<'_>) -> Candidate<'a> {
    let block_tokens = replica.capacity.block_tokens;
    let matched = replica.index.matched(ask.keys_of(block_tokens));
    let blocks = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    // The last token of a prompt is always computed: its logits are wanted.
    let tokens = |n: usize| blocks(n).saturating_mul(block_tokens).min(ask.prompt_tokens - 1);
    let cached_tokens = tokens(matched.known);
    let outstanding = replica.outstanding(fleet.expected_output(u32::MAX));
    Candidate {
        id,
        replica,
        blocks: blocks(matched.expected),
        expected_tokens: tokens(matched.expected),
        cached_tokens,
        cost: outstanding + u64::from(ask.prompt_tokens - cached_tokens),
    }
}

fn is_saturated(warmest: &Candidate<'_>, least: &Candidate<'_>) -> bool {
    let capacity = &warmest.replica.capacity;
    let enough = match capacity.prefill_tokens_per_second {
        0 => u64::from(capacity.max_step_tokens) * SATURATED_STEPS,
        rate => (f64::from(rate) * SATURATED_SECONDS) as u64,
    };
    let (over, of) = OVER_LEAST;
    warmest.cost > enough && u128::from(warmest.cost) * of > u128::from(least.cost) * over
}
