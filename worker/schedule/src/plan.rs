//! One step: decode rows first, then whoever may come in, then prefill chunks, under one token budget.
//!
//! Memory. Admission sets aside the blocks of all known tokens, so prefill never lacks any; only decode grows. When it
//! cannot, the newest sequence is preempted: its blocks go, its tokens stay and are fed again. The oldest is never the
//! victim of another, so whatever the pressure, somebody finishes.
//!
//! Prefill. Half of what decode leaves belongs to the oldest prefill, the rest goes to the shortest first: a long
//! prompt holds nobody up and is never held up itself. A sequence whose next block another one is computing right now
//! waits for that commit and takes the block from the cache.

use std::collections::BTreeSet;

use crate::cost::StepCost;
use crate::scheduler::{FLIGHTS_MAX, Flight, Flown, Scheduler, n_u32};
use crate::sequence::{Index, Sequence, State};
use crate::types::{Finish, Input, Micros, Output, Step, StepId, Work};

/// A step under construction.
struct Draft {
    id: StepId,
    /// Rows still to be given out.
    left: usize,
    works: Vec<Work>,
    flown: Vec<Flown>,
    /// To be preempted as soon as its step in flight is committed, so it gets no new one.
    barred: Option<Index>,
}

impl Scheduler {
    /// Plans the next step; `None` if nothing can run now: it is idle, two steps are in flight, or everything waits
    /// for a commit.
    ///
    /// A step may be planned before the previous one is committed. `now` ends sequences whose deadline has passed.
    pub fn step(&mut self, now: Micros) -> Option<Step> {
        self.expire(now);
        let step = if self.flights.len() < FLIGHTS_MAX {
            self.draft()
        } else {
            None
        };
        self.blocks.assert_counts();
        step
    }

    fn draft(&mut self) -> Option<Step> {
        let mut draft = Draft {
            id: StepId(self.next_step),
            left: self.limits.max_step_tokens as usize,
            works: Vec::with_capacity(self.running.len()),
            flown: Vec::with_capacity(self.running.len()),
            barred: None,
        };
        self.plan_decode(&mut draft);
        if draft.left > 0 {
            self.admit();
        }
        self.plan_prefill(&mut draft);
        if draft.works.is_empty() {
            let stuck = self.flights.is_empty() && !(self.running.is_empty() && self.waiting.is_empty());
            assert!(!stuck, "somebody can always run when nothing is in flight");
            return None;
        }
        self.next_step += 1;
        self.flights.push_back(Flight {
            id: draft.id,
            works: draft.flown,
        });
        Some(Step {
            id: draft.id,
            works: draft.works,
        })
    }

    fn expire(&mut self, now: Micros) {
        while let Some(&(deadline, at)) = self.deadlines.first()
            && deadline <= now
        {
            self.end(at, Finish::Deadline);
        }
    }

    /// One row for everybody who needs only one, oldest first.
    fn plan_decode(&mut self, draft: &mut Draft) {
        let mut order: Vec<Index> = self
            .running
            .values()
            .copied()
            .filter(|&at| self.seq(at).n_ready() == 1)
            .collect();
        if order.len() > draft.left {
            // Not enough rows for all: they take turns.
            order.sort_by_key(|&at| self.seq(at).last_turn);
        }
        for at in order {
            if draft.left == 0 {
                break;
            }
            let preempted = self.seq(at).state == State::Waiting;
            if !preempted && draft.barred != Some(at) && self.secure_row(at, draft) {
                self.plan_rows(at, 1, false, draft);
            }
        }
    }

    /// Whether there is a block for the next row, after preempting others for it if need be.
    fn secure_row(&mut self, at: Index, draft: &mut Draft) -> bool {
        let seq = self.seq(at);
        if seq.planned < seq.table.len() * self.block_tokens() || seq.promised > 0 {
            return true;
        }
        while self.blocks.n_available() == 0 {
            if self.n_lingering > 0 {
                return false; // The next commit brings memory back.
            }
            let (_, &victim) = self.running.last_key_value().expect("whoever asks is running");
            if self.seq(victim).flights > 0 {
                draft.barred = Some(victim);
                return false;
            }
            self.preempt(victim);
            if victim == at {
                return false;
            }
        }
        true
    }

    /// Running => Waiting: memory is needed by somebody older.
    fn preempt(&mut self, at: Index) {
        let seq = self.sequences[at.0].as_mut().expect("a victim is running");
        let State::Running(slot) = seq.state else {
            unreachable!("a victim is running")
        };
        seq.let_go(&mut self.blocks);
        seq.state = State::Waiting;
        self.running.remove(&seq.arrival);
        self.waiting.insert(seq.arrival, at);
        self.slots.push(slot);
        self.preemptions += 1;
    }

    /// Waiting => Running, first come first served, while slots and blocks last. One block is left for each running
    /// sequence that may still grow, so that who comes in is not thrown out again at once.
    fn admit(&mut self) {
        let (key_of, block_tokens) = (self.limits.key_of, self.block_tokens());
        let n_final_blocks = |seq: &Sequence| Sequence::n_final_rows(&seq.ask).div_ceil(block_tokens);
        let grows = |seq: &Sequence| n_final_blocks(seq) > seq.table.len() + seq.promised as usize;
        let mut n_growing = self.running.values().filter(|&&at| grows(self.seq(at))).count();
        while let Some((&arrival, &at)) = self.waiting.first_key_value() {
            let n_available = self.blocks.n_available() as usize;
            if self.slots.is_empty() || n_available <= n_growing {
                return;
            }
            let seq = self.sequences[at.0]
                .as_mut()
                .expect("waiting sequences are there");
            let found = if self.limits.prefix_cache {
                seq.find_more(&self.blocks, key_of, block_tokens)
            } else {
                Vec::new()
            };
            let n_revived = found.iter().filter(|(id, _)| self.blocks.is_cached(*id)).count();
            let n_known_blocks = seq.tokens.len().div_ceil(block_tokens);
            let n_new = n_known_blocks - found.len();
            n_growing += usize::from(n_final_blocks(seq) > n_known_blocks);
            if n_available < n_revived + n_new + n_growing {
                return;
            }
            seq.adopt(&found, &mut self.blocks, block_tokens);
            seq.promised = n_u32(n_new);
            self.blocks.promise(seq.promised);
            seq.state = State::Running(self.slots.pop().expect("a slot is free"));
            self.waiting.remove(&arrival);
            self.running.insert(arrival, at);
        }
    }

    fn plan_prefill(&mut self, draft: &mut Draft) {
        if draft.left == 0 {
            return;
        }
        let mut ready: Vec<Index> = self
            .running
            .values()
            .copied()
            .filter(|&at| {
                let seq = self.seq(at);
                // One row is a decode row, planned above or short of memory, unless its block was set aside just now.
                let open = seq.n_ready() > 1 || (seq.n_ready() == 1 && seq.promised > 0);
                open && draft.barred != Some(at)
            })
            .collect();
        if self.limits.prefix_cache {
            for &at in &ready {
                self.extend(at);
            }
        }
        // The oldest, then the shortest first, the older of equals.
        if let Some((_, shorter)) = ready.split_first_mut() {
            shorter.sort_by_key(|&at| self.seq(at).n_ready());
        }
        if self.limits.prefix_cache {
            ready = self.without_twins(ready);
        }
        let wanted: Vec<usize> = ready.iter().map(|&at| self.seq(at).n_chunk_max()).collect();
        let rows = share(&wanted, self.paced(draft, &ready, &wanted));
        for (at, rows) in ready.into_iter().zip(rows) {
            if rows > 0 {
                self.plan_rows(at, rows, self.limits.prefix_cache, draft);
            }
        }
    }

    /// Rows of prefill that may join the step: all that are left, or, where a stream decodes in it and a pace is set, as
    /// many as keep the pace.
    fn paced(&self, draft: &Draft, ready: &[Index], wanted: &[usize]) -> usize {
        let decodes = |work: &Work| work.sample.is_some_and(|index| index > 0);
        let Some(pace) = self.pace.as_ref().filter(|_| draft.works.iter().any(decodes)) else {
            return draft.left;
        };
        let mut cost = StepCost::default();
        for work in &draft.works {
            cost.add(u64::from(work.start), u64::from(work.rows()));
        }
        let most = draft.left.min(wanted.iter().sum());
        pace.rows(cost, most, |mut cost, rows| {
            for (&at, rows) in ready.iter().zip(share(wanted, rows)) {
                cost.add(self.seq(at).planned as u64, rows as u64);
            }
            cost
        })
    }

    /// Takes blocks that became findable since this sequence came in.
    fn extend(&mut self, at: Index) {
        let (key_of, block_tokens) = (self.limits.key_of, self.block_tokens());
        let seq = self.sequences[at.0]
            .as_mut()
            .expect("running sequences are there");
        if !seq.is_on_border(block_tokens) {
            return;
        }
        let found = seq.find_more(&self.blocks, key_of, block_tokens);
        let n_found = n_u32(found.len());
        seq.promised -= n_found;
        self.blocks.unpromise(n_found);
        seq.adopt(&found, &mut self.blocks, block_tokens);
    }

    /// Leaves out whoever would open a block that is in flight already, or that somebody before it in line is about to
    /// compute. The first in line only ever waits for a commit, so this ends.
    fn without_twins(&mut self, ready: Vec<Index>) -> Vec<Index> {
        let (key_of, block_tokens) = (self.limits.key_of, self.block_tokens());
        let mut fronts = BTreeSet::new();
        let mut alone = Vec::with_capacity(ready.len());
        for at in ready {
            let seq = self.seq_mut(at);
            let opens = seq.planned.is_multiple_of(block_tokens);
            if let Some(key) = seq.front_key(key_of, block_tokens) {
                let is_new = fronts.insert(key);
                if opens && (!is_new || self.claims.contains_key(&key)) {
                    continue;
                }
            }
            alone.push(at);
        }
        alone
    }

    /// Puts a sequence's next rows into the step.
    fn plan_rows(&mut self, at: Index, rows: usize, claim: bool, draft: &mut Draft) {
        let (key_of, block_tokens) = (self.limits.key_of, self.block_tokens());
        let seq = self.sequences[at.0]
            .as_mut()
            .expect("running sequences are there");
        let State::Running(slot) = seq.state else {
            unreachable!("only running sequences are planned")
        };
        let (start, end) = (seq.planned, seq.planned + rows);
        while seq.table.len() * block_tokens < end {
            if seq.promised > 0 {
                seq.promised -= 1;
                self.blocks.unpromise(1);
            }
            seq.table.push(self.blocks.take());
        }
        if claim {
            for block in start / block_tokens..end / block_tokens {
                *self
                    .claims
                    .entry(seq.key(block, key_of, block_tokens))
                    .or_default() += 1;
            }
        }
        let sample = end == seq.tokens.len() + seq.unseen && seq.ask.max_tokens > 0;
        draft.works.push(Work {
            seq: seq.ask.id,
            slot,
            start: n_u32(start),
            input: if start == seq.tokens.len() {
                Input::LastSampled
            } else {
                Input::Tokens(seq.tokens[start..end].to_vec())
            },
            blocks: seq.table.clone(),
            sample: sample.then(|| n_u32(seq.n_generated() + seq.unseen)),
            prompt_logprobs: seq.wants_prompt_logprobs(start),
        });
        draft.flown.push(Flown {
            at,
            start,
            end,
            sample,
            claimed: claim,
        });
        draft.left -= rows;
        seq.planned = end;
        seq.unseen += usize::from(sample);
        seq.flights += 1;
        seq.last_turn = self.next_turn;
        self.next_turn += 1;
        if !seq.started {
            // Before the first row, everything is from the cache.
            seq.started = true;
            let (id, n_cached) = (seq.ask.id, start);
            if self.limits.prefix_cache && !seq.ask.prompt_logprobs {
                self.prefix_query_tokens += seq.n_prompt() as u64;
                self.prefix_hit_tokens += n_cached as u64;
            }
            self.outputs.push(Output::Started {
                seq: id,
                cached_tokens: n_u32(n_cached),
            });
        }
    }
}

/// Rows for each prefill, the oldest first and then by length: half of `left` is the oldest one's, the rest goes down
/// the line, and nothing stays unused while somebody wants it.
fn share(wanted: &[usize], left: usize) -> Vec<usize> {
    let Some((&oldest, others)) = wanted.split_first() else {
        return Vec::new();
    };
    let n_others: usize = others.iter().sum();
    let is_shortest = others.first().is_none_or(|&next| oldest <= next);
    let first = match is_shortest {
        true => oldest.min(left),
        false => oldest.min(left.div_ceil(2).max(left.saturating_sub(n_others))),
    };
    let mut rest = left - first;
    let mut rows = vec![first];
    rows.extend(others.iter().map(|&wanted| {
        let given = wanted.min(rest);
        rest -= given;
        given
    }));
    rows
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn prefill_rows_are_shared_by_age_and_length() {
        assert_eq!(share(&[], 8), [0; 0]);
        assert_eq!(share(&[100], 8), [8], "alone, it has everything");
        assert_eq!(share(&[3, 2], 8), [3, 2], "enough for all");
        assert_eq!(
            share(&[100, 2, 3], 8),
            [4, 2, 2],
            "half for the oldest, then the shortest"
        );
        assert_eq!(
            share(&[100, 2], 8),
            [6, 2],
            "what the short ones leave is the oldest one's"
        );
        assert_eq!(share(&[5, 5, 5], 8), [5, 3, 0], "equals go in order of age");
        assert_eq!(share(&[100, 1], 1), [1, 0], "the oldest always moves");
    }
}
