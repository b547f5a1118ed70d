//! The line before one model: by priority, and within a priority fair by tenant.
//!
//! Weighted deficit round robin over tokens: tenants take turns, each turn earns a tenant as many tokens as its weight
//! says, and a request leaves when its tenant has earned what it costs. Over time each tenant that waits gets its
//! weight's share of the tokens, however many or large its requests are. Who comes back goes ahead of everybody.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, VecDeque},
};

use crate::queue::{Priority, RequestId, TenantId, Waiting};

/// Tokens that one turn earns a tenant of weight 1: small against a usual request, so that no tenant sends a burst before
/// the next one's turn. Turns in which nobody could leave cost nothing.
const QUANTUM: u64 = 256;

/// Places of a line, in order; those who come back get negative ones.
pub(crate) type Place = i64;

/// Where in a line somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    /// Ahead of everybody.
    pub returned: bool,
    pub place: Place,
}

/// One model's line.
#[derive(Debug, Default)]
pub(crate) struct Line {
    returned: BTreeMap<Place, Waiting>,
    classes: BTreeMap<Reverse<Priority>, Class>,
    len: usize,
}

/// Those of one priority.
#[derive(Debug, Default)]
struct Class {
    flows: HashMap<TenantId, Flow>,
    /// The first has earned what its first request costs.
    turns: VecDeque<TenantId>,
}

/// Those of one tenant, in the order in which they came.
#[derive(Debug, Default)]
struct Flow {
    weight: u64,
    earned: u64,
    waits: BTreeMap<Place, Waiting>,
}

impl Flow {
    fn cost(&self) -> u64 {
        self.waits
            .first_key_value()
            .map_or(0, |(_, waiting)| waiting.work)
    }

    /// Turns until it has earned what its first request costs.
    fn turns_left(&self) -> u64 {
        self.cost()
            .saturating_sub(self.earned)
            .div_ceil(QUANTUM * self.weight)
    }
}

impl Line {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn front(&self) -> Option<&Waiting> {
        if let Some((_, waiting)) = self.returned.first_key_value() {
            return Some(waiting);
        }
        let (_, class) = self.classes.first_key_value()?;
        let flow = &class.flows[class.turns.front()?];
        flow.waits.first_key_value().map(|(_, waiting)| waiting)
    }

    pub fn insert(&mut self, spot: Spot, waiting: Waiting) {
        self.len += 1;
        if spot.returned {
            self.returned.insert(spot.place, waiting);
            return;
        }
        let class = self.classes.entry(Reverse(waiting.priority)).or_default();
        let flow = class.flows.entry(waiting.tenant).or_default();
        // The weight of the latest request counts: keys may have changed.
        flow.weight = u64::from(waiting.weight.max(1));
        if flow.waits.is_empty() {
            class.turns.push_back(waiting.tenant);
        }
        flow.waits.insert(spot.place, waiting);
        class.settle();
    }

    /// Takes somebody out; `served`: for a replica, so that the tenant pays.
    pub fn take(
        &mut self,
        spot: Spot,
        priority: Priority,
        tenant: TenantId,
        served: bool,
    ) -> Option<Waiting> {
        if spot.returned {
            let waiting = self.returned.remove(&spot.place)?;
            self.len -= 1;
            return Some(waiting);
        }
        let class = self.classes.get_mut(&Reverse(priority))?;
        let flow = class.flows.get_mut(&tenant)?;
        let waiting = flow.waits.remove(&spot.place)?;
        self.len -= 1;
        if served {
            flow.earned = flow.earned.saturating_sub(waiting.work);
        }
        if flow.waits.is_empty() {
            // What was earned is not saved up: nobody comes back with a burst.
            class.flows.remove(&tenant);
            class.turns.retain(|of| *of != tenant);
        }
        if class.turns.is_empty() {
            self.classes.remove(&Reverse(priority));
        } else {
            class.settle();
        }
        Some(waiting)
    }

    /// The one who came last among those of a tenant and a priority, but for those who came back.
    pub fn newest(&self, priority: Priority, tenant: TenantId) -> Option<(Place, RequestId)> {
        let flow = self.classes.get(&Reverse(priority))?.flows.get(&tenant)?;
        flow.waits
            .last_key_value()
            .map(|(place, waiting)| (*place, waiting.id))
    }

    /// Every priority with the tenants that wait in it, the lowest first.
    pub fn flows(&self) -> impl Iterator<Item = (Priority, TenantId)> {
        self.classes
            .iter()
            .rev()
            .flat_map(|(priority, class)| class.flows.keys().map(move |tenant| (priority.0, *tenant)))
    }
}

impl Class {
    /// Turns until the first one has earned what its first request costs.
    fn settle(&mut self) {
        let Some(first) = self.turns.front() else { return };
        if self.flows[first].turns_left() == 0 {
            return;
        }
        // Whole rounds in which nobody could leave, at once.
        let rounds = self.flows.values().map(Flow::turns_left).min().unwrap_or(0);
        if let Some(rounds) = rounds.checked_sub(1).filter(|rounds| *rounds > 0) {
            for flow in self.flows.values_mut() {
                flow.earned += rounds * QUANTUM * flow.weight;
            }
        }
        loop {
            self.turns.rotate_left(1);
            let first = self.turns.front().expect("it was not empty");
            let flow = self.flows.get_mut(first).expect("whoever has a turn waits");
            if flow.turns_left() > 0 {
                flow.earned += QUANTUM * flow.weight;
            }
            if flow.turns_left() == 0 {
                return;
            }
        }
    }
}
