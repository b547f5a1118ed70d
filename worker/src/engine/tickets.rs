//! Which generations were already taken, so that one submitted again after an ambiguous break never runs twice.
//!
//! Bounded in time and in memory: whichever ends first, the oldest is forgotten.

use std::{
    collections::{HashSet, VecDeque},
    time::{Duration, Instant},
};

/// A router that retries does so within seconds.
const REMEMBERED: Duration = Duration::from_secs(600);
/// About 10 MB; more than 200 requests a second for the whole time.
const TICKETS_MAX: usize = 131_072;

/// Names one generation across sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// The request.
    pub uuid: [u8; 16],
    /// Which of its continuations.
    pub candidate: u32,
    /// Which try.
    pub attempt: u32,
}

/// The generations taken lately.
#[derive(Debug, Default)]
pub(super) struct Tickets {
    known: HashSet<Ticket>,
    oldest_first: VecDeque<(Instant, Ticket)>,
}

impl Tickets {
    pub(super) fn contains(&mut self, ticket: &Ticket, now: Instant) -> bool {
        self.forget(now);
        self.known.contains(ticket)
    }

    pub(super) fn take(&mut self, ticket: Ticket, now: Instant) {
        if self.known.insert(ticket) {
            self.oldest_first.push_back((now, ticket));
        }
        self.forget(now);
    }

    fn forget(&mut self, now: Instant) {
        while let Some((taken, ticket)) = self.oldest_first.front() {
            if self.oldest_first.len() <= TICKETS_MAX && now.duration_since(*taken) < REMEMBERED {
                break;
            }
            self.known.remove(ticket);
            self.oldest_first.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(n: u32) -> Ticket {
        Ticket {
            uuid: [7; 16],
            candidate: 0,
            attempt: n,
        }
    }

    #[test]
    fn a_ticket_is_known_for_ten_minutes() {
        let (mut tickets, start) = (Tickets::default(), Instant::now());
        tickets.take(ticket(1), start);
        assert!(tickets.contains(&ticket(1), start + REMEMBERED - Duration::from_millis(1)));
        assert!(!tickets.contains(&ticket(2), start));
        assert!(!tickets.contains(&ticket(1), start + REMEMBERED));
        assert!(tickets.known.is_empty() && tickets.oldest_first.is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let (mut tickets, now) = (Tickets::default(), Instant::now());
        for n in 0..u32::try_from(TICKETS_MAX).expect("small") + 5 {
            tickets.take(ticket(n), now);
        }
        assert_eq!(tickets.known.len(), TICKETS_MAX);
        assert!(!tickets.contains(&ticket(4), now));
        assert!(tickets.contains(&ticket(5), now));
    }
}
