//! What a step's tokens change: sequences grow or end, computed blocks become findable, memory comes back.

use crate::scheduler::{Flown, Scheduler, n_u32};
use crate::sequence::{Index, State};
use crate::types::{Finish, Output, StepId};

impl Scheduler {
    /// The device has run a step: `sampled` has one id for each work with `sample`, in the order of works.
    ///
    /// Tokens of sequences that ended in the meantime are dropped.
    ///
    /// # Panics
    /// If it is not the oldest step in flight, or the number of ids is wrong: the caller's books are broken.
    pub fn commit(&mut self, step: StepId, sampled: &[u32]) {
        let flight = self
            .flights
            .pop_front()
            .expect("a step is committed only after it was planned");
        assert_eq!(
            flight.id, step,
            "steps commit in the order in which they were planned"
        );
        let n_expected = flight.works.iter().filter(|flown| flown.sample).count();
        assert_eq!(
            sampled.len(),
            n_expected,
            "a committed step has one id for each work that samples"
        );
        let mut sampled = sampled.iter().copied();
        for flown in &flight.works {
            let token = if flown.sample { sampled.next() } else { None };
            self.land(flown, token);
        }
        self.blocks.assert_counts();
    }

    fn land(&mut self, flown: &Flown, token: Option<u32>) {
        if flown.claimed {
            self.unclaim(flown);
        }
        let (key_of, block_tokens, prefix_cache) =
            (self.limits.key_of, self.block_tokens(), self.limits.prefix_cache);
        let seq = self.sequences[flown.at.0]
            .as_mut()
            .expect("a sequence stays while it is in flight");
        seq.flights -= 1;
        seq.unseen -= usize::from(flown.sample);
        // After a cancel the id that a row was fed may never be known; such a row's block is nothing to keep.
        seq.computed = flown.end.min(seq.tokens.len());
        seq.scored = seq.scored.max(seq.computed);
        if prefix_cache {
            seq.store_computed(&mut self.blocks, key_of, block_tokens);
        }
        match seq.state {
            State::Running(_) => self.grow(flown.at, token),
            State::Lingering(_) if seq.flights == 0 => self.bury(flown.at),
            State::Lingering(_) => {}
            State::Waiting | State::Parked => unreachable!("a sequence in flight is never sent back to wait"),
        }
    }

    /// Appends the token, if there is one, and ends the sequence when it is complete.
    fn grow(&mut self, at: Index, token: Option<u32>) {
        let seq = self.sequences[at.0]
            .as_mut()
            .expect("a running sequence is there");
        let Some(token) = token else {
            if seq.ask.max_tokens == 0 && seq.computed == seq.n_prompt() {
                self.end(at, Finish::Length);
            }
            return;
        };
        let index = n_u32(seq.n_generated());
        seq.tokens.push(token);
        self.outputs.push(Output::Token {
            seq: seq.ask.id,
            index,
            token,
        });
        let n_tokens = index + 1;
        if n_tokens >= seq.ask.min_tokens && seq.ask.stop_ids.contains(&token) {
            self.end(at, Finish::Stop);
        } else if n_tokens == seq.ask.max_tokens {
            self.end(at, Finish::Length);
        } else if seq.is_full() && seq.flights == 0 {
            // Nothing is planned past the window, so the last commit is the one that fills it.
            self.park(at);
        }
    }

    fn unclaim(&mut self, flown: &Flown) {
        let (key_of, block_tokens) = (self.limits.key_of, self.block_tokens());
        for block in flown.start / block_tokens..flown.end / block_tokens {
            let key = self.seq_mut(flown.at).key(block, key_of, block_tokens);
            let count = self
                .claims
                .get_mut(&key)
                .expect("what was claimed in flight stays claimed");
            *count -= 1;
            if *count == 0 {
                self.claims.remove(&key);
            }
        }
    }
}
