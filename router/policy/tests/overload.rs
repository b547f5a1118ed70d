//! Overload in simulated time: who is served, who is turned away and with what advice, and how soon all is well again.

use std::{collections::BTreeMap, time::Duration};

use swallow_policy::{Limits, ModelId, Priority, Queue, RequestId, TenantId, Waiting};

const MODEL: ModelId = ModelId(0);
/// Tokens that the replicas take in a second.
const CAPACITY: u64 = 100_000;
const TICK: Duration = Duration::from_millis(10);

/// A tenant that sends at random, so many tokens a second on average.
#[derive(Clone, Copy)]
struct Sender {
    tenant: u32,
    weight: u32,
    priority: Priority,
    tokens_per_second: u64,
    /// Of one request.
    largest: u64,
}

struct World {
    queue: Queue,
    rng: fastrand::Rng,
    now: Duration,
    /// Tokens that replicas could take by now.
    room: u64,
    next: u64,
    /// Tokens that each tenant has still to send; below 0, it sent early.
    owed: BTreeMap<u32, i64>,
    /// Tokens served, by tenant.
    served: BTreeMap<u32, u64>,
    /// Waits of the served, by tenant.
    waits: BTreeMap<u32, Vec<Duration>>,
    turned_away: BTreeMap<u32, u64>,
    /// Tokens that left for a replica, ever.
    left: u64,
    /// What was advised: when, how long, and how much had left when all that waited then had left.
    advice: Vec<(Duration, Duration, u64)>,
    /// When so much had left.
    history: Vec<(u64, Duration)>,
}

impl World {
    fn new(seed: u64) -> Self {
        println!("seed {seed}");
        let limits = Limits {
            requests: 2_000,
            tokens: 1_000_000,
            bytes: 50 << 20,
        };
        Self {
            queue: Queue::new(limits),
            rng: fastrand::Rng::with_seed(seed),
            now: Duration::ZERO,
            room: 0,
            next: 0,
            owed: BTreeMap::new(),
            served: BTreeMap::new(),
            waits: BTreeMap::new(),
            turned_away: BTreeMap::new(),
            left: 0,
            advice: Vec::new(),
            history: Vec::new(),
        }
    }

    fn run(&mut self, seconds: u64, senders: &[Sender]) {
        let end = self.now + Duration::from_secs(seconds);
        while self.now < end {
            self.now += TICK;
            for sender in senders {
                self.send(sender);
            }
            self.serve();
            let depth = self.queue.depth();
            assert!(depth.requests <= 2_000 && depth.tokens <= 1_000_000 && depth.bytes <= 50 << 20);
        }
    }

    fn send(&mut self, sender: &Sender) {
        *self.owed.entry(sender.tenant).or_default() += sender.tokens_per_second as i64 / 100;
        while self.owed[&sender.tenant] > 0 {
            let work = self.rng.u64(1..=sender.largest);
            *self.owed.get_mut(&sender.tenant).expect("entered above") -= work as i64;
            self.next += 1;
            let waiting = Waiting {
                id: RequestId(self.next),
                model: MODEL,
                tenant: TenantId(sender.tenant),
                weight: sender.weight,
                priority: sender.priority,
                tokens: work,
                work,
                bytes: work * 4 + 1024,
                since: self.now,
                until: self.now + Duration::from_secs(60),
            };
            match self.queue.push(waiting, self.now) {
                Ok(pushed_out) => {
                    for out in pushed_out {
                        *self.turned_away.entry(out.tenant.0).or_default() += 1;
                    }
                }
                Err(full) => {
                    *self.turned_away.entry(sender.tenant).or_default() += 1;
                    let all = self.left + self.queue.depth().tokens;
                    self.advice.push((self.now, full.retry_after, all));
                }
            }
        }
    }

    fn serve(&mut self) {
        self.room += CAPACITY / 100;
        while let Some(front) = self.queue.front(MODEL).copied() {
            if front.work > self.room {
                return;
            }
            let popped = self.queue.pop(MODEL, self.now).expect("it is the front");
            assert_eq!(popped, front);
            self.room -= front.work;
            self.left += front.work;
            self.history.push((self.left, self.now));
            *self.served.entry(front.tenant.0).or_default() += front.work;
            let waited = self.now - front.since;
            self.waits.entry(front.tenant.0).or_default().push(waited);
        }
        // Nobody waits: room is not saved up.
        self.room = 0;
    }

    fn median_wait(&self, tenant: u32) -> Duration {
        let mut waits = self.waits[&tenant].clone();
        waits.sort_unstable();
        waits[waits.len() / 2]
    }
}

fn sender(tenant: u32, tokens_per_second: u64, largest: u64) -> Sender {
    Sender {
        tenant,
        weight: 1,
        priority: Priority::Normal,
        tokens_per_second,
        largest,
    }
}

fn assert_share(world: &World, tenant: u32, expected: f64) {
    let all: u64 = world.served.values().sum();
    let share = world.served[&tenant] as f64 / all as f64;
    assert!(
        (share / expected - 1.0).abs() < 0.1,
        "tenant {tenant} got {share:.3} of the tokens, not {expected:.3}"
    );
}

#[test]
fn a_greedy_tenant_gets_its_share_and_no_more() {
    for seed in 0..5 {
        let mut world = World::new(seed);
        // Three times what there is, most of it from one, in large requests.
        let senders = [sender(1, 240_000, 8_000), sender(2, 60_000, 500)];
        world.run(60, &senders);
        assert_share(&world, 1, 0.5);
        assert_share(&world, 2, 0.5);
        let all: u64 = world.served.values().sum();
        assert!(all as f64 >= 0.95 * (60 * CAPACITY) as f64, "goodput: {all}");
    }
}

#[test]
fn shares_follow_weights_and_what_nobody_wants_goes_to_the_others() {
    let mut world = World::new(1);
    let heavy = Sender {
        weight: 3,
        ..sender(1, 150_000, 2_000)
    };
    world.run(60, &[heavy, sender(2, 150_000, 2_000)]);
    assert_share(&world, 1, 0.75);
    assert_share(&world, 2, 0.25);
    // A tenant that wants less than its share gets all of it, at once.
    let mut world = World::new(2);
    world.run(60, &[sender(1, 300_000, 4_000), sender(2, 10_000, 500)]);
    assert_share(&world, 2, 0.1);
    assert_eq!(
        world.turned_away.get(&2),
        None,
        "whoever has less than its share is not turned away"
    );
    assert!(
        world.median_wait(2) < Duration::from_secs(1),
        "{:?}",
        world.median_wait(2)
    );
    assert!(
        world.median_wait(1) > Duration::from_secs(5),
        "{:?}",
        world.median_wait(1)
    );
}

#[test]
fn a_higher_priority_goes_first_and_takes_the_places_of_a_lower_one() {
    let mut world = World::new(3);
    let low = Sender {
        priority: Priority::Low,
        ..sender(1, 200_000, 2_000)
    };
    let high = Sender {
        priority: Priority::High,
        ..sender(2, 60_000, 2_000)
    };
    world.run(20, &[low]);
    world.run(60, &[low, high]);
    assert_eq!(world.turned_away.get(&2), None);
    assert!(
        world.median_wait(2) < Duration::from_millis(100),
        "{:?}",
        world.median_wait(2)
    );
    // What is left is for the others.
    let after: f64 = world.served[&1] as f64 / (20.0 + 60.0 * 0.4) / CAPACITY as f64;
    assert!((after - 1.0).abs() < 0.1, "{after}");
}

#[test]
fn whoever_is_turned_away_is_told_when_the_queue_will_have_drained() {
    for seed in 0..5 {
        let mut world = World::new(seed);
        world.run(60, &[sender(1, 200_000, 4_000), sender(2, 100_000, 1_000)]);
        let (mut checked, mut off) = (0, 0);
        for (at, advised, all) in &world.advice {
            // The first ten seconds teach the rate.
            let drained = world.history.iter().find(|(left, _)| left >= all);
            let (Some((_, drained)), true) = (drained, *at > Duration::from_secs(10)) else {
                continue;
            };
            let real = (*drained - *at).as_secs_f64();
            checked += 1;
            off += usize::from((advised.as_secs_f64() / real - 1.0).abs() > 0.3);
        }
        assert!(checked > 1_000, "{checked}");
        assert_eq!(off, 0, "of {checked}, so many were off by more than 30 %");
    }
}

#[test]
fn after_an_overload_all_is_as_before_within_one_drain() {
    let mut world = World::new(4);
    let usual = [sender(1, 40_000, 2_000), sender(2, 30_000, 2_000)];
    world.run(30, &usual);
    let before = world.median_wait(1);
    world.run(60, &[sender(1, 200_000, 2_000), sender(2, 100_000, 2_000)]);
    // The queue holds ten seconds of work, and a third of the capacity is free to work it off.
    world.run(34, &usual);
    world.waits.clear();
    world.turned_away.clear();
    world.run(30, &usual);
    assert_eq!(world.turned_away.len(), 0);
    let after = world.median_wait(1);
    assert!(after <= before + 2 * TICK, "{before:?} before, {after:?} after");
}
