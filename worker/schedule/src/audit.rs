//! The books, recounted from nothing: for tests and for whoever suspects a leak.

use crate::scheduler::{Scheduler, n_u32};
use crate::sequence::State;

impl Scheduler {
    /// Recounts blocks, references, promises, slots, flights and queues from the sequences. Visits everything.
    ///
    /// # Panics
    /// With what does not add up.
    pub fn audit(&self) {
        let block_tokens = self.block_tokens();
        let mut refs = vec![0_u32; self.limits.n_blocks as usize];
        let mut slot_taken = vec![false; self.limits.max_running as usize];
        let (mut n_promised, mut n_lingering, mut n_live, mut n_parked) = (0, 0, 0, 0);
        for (at, seq) in self.sequences.iter().enumerate() {
            let Some(seq) = seq else { continue };
            for id in &seq.table {
                refs[id.0 as usize] += 1;
            }
            n_promised += seq.promised;
            let flown = self
                .flights
                .iter()
                .flat_map(|flight| &flight.works)
                .filter(|flown| flown.at.0 == at);
            assert_eq!(seq.flights as usize, flown.count(), "flights of {:?}", seq.ask.id);
            assert_eq!(
                seq.table.len(),
                seq.planned.div_ceil(block_tokens),
                "table of {:?}",
                seq.ask.id
            );
            let queued = match seq.state {
                State::Waiting => &self.waiting,
                State::Running(_) => &self.running,
                State::Parked => {
                    assert!(seq.is_full(), "{:?} is parked for nothing", seq.ask.id);
                    n_parked += 1;
                    continue;
                }
                State::Lingering(_) => {
                    n_lingering += 1;
                    continue;
                }
            };
            n_live += 1;
            assert_eq!(
                queued.get(&seq.arrival).map(|at| at.0),
                Some(at),
                "place of {:?}",
                seq.ask.id
            );
            assert_eq!(
                self.ids.get(&seq.ask.id).map(|at| at.0),
                Some(at),
                "name of {:?}",
                seq.ask.id
            );
        }
        for seq in self.sequences.iter().flatten() {
            if let State::Running(slot) | State::Lingering(slot) = seq.state {
                assert!(
                    !std::mem::replace(&mut slot_taken[slot.0 as usize], true),
                    "{slot:?} is held twice"
                );
            } else {
                assert!(
                    seq.table.is_empty() && seq.promised == 0,
                    "waiting sequences hold nothing"
                );
            }
        }
        self.blocks.audit(&refs);
        assert_eq!(self.blocks.n_promised(), n_promised, "promised blocks");
        assert_eq!(self.n_lingering, n_lingering, "lingering sequences");
        assert_eq!(self.n_parked, n_parked, "parked sequences");
        assert_eq!(
            self.ids.len(),
            n_live + n_parked,
            "every name has a living sequence"
        );
        assert_eq!(
            n_live,
            self.waiting.len() + self.running.len(),
            "live sequences wait, run or are parked"
        );
        let n_taken = slot_taken.iter().filter(|&&taken| taken).count();
        assert_eq!(
            n_u32(n_taken + self.slots.len()),
            self.limits.max_running,
            "slots are free or held"
        );
        if self.flights.is_empty() {
            assert!(
                self.claims.is_empty() && n_lingering == 0,
                "nothing outlives the steps in flight"
            );
        }
    }
}
