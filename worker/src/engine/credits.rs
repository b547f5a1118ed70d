//! How many requests each router may still send: waiting belongs to the routers, where a request can be
//! reordered, moved or dropped for free; here waits only what keeps the batch full.
//!
//! Credits cannot be taken back, so one router never gets all of them: its share is what would be left for it if
//! one more router came. A router with nothing here holds at least one, or it could wait for ever behind idle ones.
//! So unspent credits and waiting requests together stay below free slots + `max_waiting` + one a router at the
//! time of each grant.

use swallow_schedule::{Limits, Load};

/// What a router holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holder {
    /// Credits it has not used.
    pub unspent: u32,
    /// Its requests that have not run yet.
    pub waiting: u32,
}

/// Requests whose clients do not read, for each slot: they cost memory alone, but not without end.
const PARKED_PER_SLOT: u32 = 4;

/// As many requests wait for their clients as may: nobody is invited.
pub(super) fn is_crowded(limits: &Limits, load: &Load) -> bool {
    load.parked >= parked_max(limits)
}

/// Most requests that wait for their clients, but for those that were invited before.
pub(super) fn parked_max(limits: &Limits) -> u32 {
    limits.max_running.saturating_mul(PARKED_PER_SLOT)
}

/// Requests that may wait here or be invited, all routers together: `standing` and as many as would find a slot and
/// blocks now. How many the free blocks hold is judged by what the running ones hold.
pub(super) fn room(limits: &Limits, standing: u32, load: &Load) -> u32 {
    let slots = limits.max_running.saturating_sub(load.running);
    let by_blocks = if load.running == 0 {
        slots
    } else {
        let free = u64::from(load.blocks_total.saturating_sub(load.blocks_held));
        let mean = u64::from(load.blocks_held).div_ceil(load.running.into()).max(1);
        u32::try_from(free / mean).unwrap_or(u32::MAX)
    };
    slots.min(by_blocks) + standing
}

/// Credits to add, one number a holder.
pub(super) fn grants(room: u32, holders: &[Holder]) -> Vec<u32> {
    let waiting: u32 = holders.iter().map(|holder| holder.waiting).sum();
    let unspent: u32 = holders.iter().map(|holder| holder.unspent).sum();
    let open = room.saturating_sub(waiting);
    let mut left = open.saturating_sub(unspent);
    let routers = u32::try_from(holders.len()).unwrap_or(u32::MAX);
    let share = open.div_ceil(routers.saturating_add(1));
    let mut grants = vec![0; holders.len()];
    let mut order: Vec<usize> = (0..holders.len()).collect();
    order.sort_by_key(|&i| holders[i].unspent);
    for i in order {
        let holder = holders[i];
        let more = share.saturating_sub(holder.unspent).min(left);
        left -= more;
        let stuck = holder.unspent + holder.waiting + more == 0;
        grants[i] = more + u32::from(stuck);
    }
    grants
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(max_running: u32) -> Limits {
        Limits {
            block_tokens: 16,
            n_blocks: 100,
            max_running,
            max_step_tokens: 512,
            max_model_len: 1024,
            max_waiting: 1024,
            prefix_cache: true,
            key_of: swallow_proto::prefix::next,
        }
    }

    fn holder(unspent: u32, waiting: u32) -> Holder {
        Holder { unspent, waiting }
    }

    #[test]
    fn room_follows_slots_and_blocks() {
        let load = |running, blocks_held| Load {
            running,
            blocks_held,
            blocks_total: 100,
            ..Load::default()
        };
        assert_eq!(room(&limits(8), 4, &load(0, 0)), 12, "idle: every slot");
        assert_eq!(
            room(&limits(8), 4, &load(6, 12)),
            6,
            "two slots are free, blocks are plenty"
        );
        assert_eq!(
            room(&limits(8), 4, &load(4, 80)),
            5,
            "20 blocks are free, one request holds 20"
        );
        assert_eq!(room(&limits(8), 4, &load(5, 100)), 4, "no block is free");
        assert_eq!(room(&limits(8), 4, &load(8, 20)), 4, "no slot is free");
    }

    #[test]
    fn a_lone_router_leaves_a_share_for_the_next() {
        assert_eq!(grants(12, &[holder(0, 0)]), [6]);
        assert_eq!(grants(12, &[holder(6, 0), holder(0, 0)]), [0, 4]);
        assert_eq!(grants(12, &[holder(6, 0), holder(4, 0)]), [0, 0]);
        assert_eq!(grants(12, &[holder(6, 0), holder(4, 0), holder(0, 0)]), [0, 0, 2]);
    }

    #[test]
    fn nobody_waits_for_ever_behind_idle_holders() {
        assert_eq!(grants(4, &[holder(4, 0), holder(0, 0)]), [0, 1]);
        assert_eq!(
            grants(4, &[holder(4, 0), holder(0, 1)]),
            [0, 0],
            "its own request comes first"
        );
        assert_eq!(grants(0, &[holder(0, 0)]), [1]);
    }

    #[test]
    fn unspent_and_waiting_stay_within_the_room() {
        // Routers that spend at once, whatever they get, against a worker that runs nothing.
        let mut holders = [Holder::default(); 3];
        for round in 0..200 {
            let more = grants(20, &holders);
            for (holder, more) in holders.iter_mut().zip(more) {
                holder.unspent += more;
            }
            let spender = &mut holders[round % 3];
            spender.waiting += spender.unspent;
            spender.unspent = 0;
            let held: u32 = holders.iter().map(|holder| holder.unspent + holder.waiting).sum();
            assert!(held <= 20 + 3, "{holders:?}");
        }
        assert!(
            holders.iter().map(|holder| holder.waiting).sum::<u32>() >= 18,
            "and the room is used: {holders:?}"
        );
    }
}
