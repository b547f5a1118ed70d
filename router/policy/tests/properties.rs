//! What must hold in any world: random ones, with their seeds printed.

use std::{collections::HashMap, time::Duration};

use swallow_policy::{
    Ask, Blocked, Capacity, Depth, Ending, Fleet, Keys, Limits, Load, ModelId, Priority, Queue, ReplicaId,
    RequestId, TenantId, Ticket, Waiting, Work, choose,
};

const BLOCK: u32 = 16;

fn capacity(n_blocks: u32) -> Capacity {
    Capacity {
        max_step_tokens: 512,
        block_tokens: BLOCK,
        n_blocks,
        prefill_tokens_per_second: 10_000,
    }
}

fn fleet(replicas: u32, credits: u32) -> Fleet {
    let mut fleet = Fleet::default();
    for id in (0..replicas).map(ReplicaId) {
        fleet.add(id);
        fleet.connected(id, capacity(50_000), b"boot", credits);
        fleet.ready(id);
    }
    fleet
}

/// Keys of a prompt whose first `shared` blocks are those of prefix `prefix`.
fn keys(prefix: u64, shared: u64, unique: u64, blocks: u64) -> [Keys; 1] {
    let mix =
        |a: u64, b: u64| (a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let key = |i| {
        if i < shared {
            mix(prefix, i)
        } else {
            mix(mix(prefix, shared) ^ unique, i)
        }
    };
    [Keys {
        block_tokens: BLOCK,
        keys: (0..blocks).map(key).collect(),
    }]
}

#[test]
fn a_hot_prefix_is_spread_within_one_and_a_half_of_the_mean() {
    for seed in 0..10 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let replicas = rng.u32(2..12);
        let mut fleet = fleet(replicas, 1_000_000);
        let mut done = vec![0u64; replicas as usize];
        let mut running: Vec<(Ticket, u32, [Keys; 1])> = Vec::new();
        let arrivals = 4_000;
        for i in 0..arrivals {
            // Nine of ten have one prefix of 8k tokens; the load is more than the fleet does at once.
            let hot = rng.u8(0..10) > 0;
            let keys = keys(u64::from(!hot) * (i + 1), 512, i, 520);
            let (max_tokens, excluded) = (rng.u32(50..300), []);
            let ask = Ask {
                prompt_tokens: 520 * BLOCK,
                max_tokens,
                candidates: 1,
                keys: &keys,
                excluded: &excluded,
            };
            let choice = choose(&fleet, &ask, Duration::ZERO, rng.u64(..)).expect("credits without end");
            done[choice.replica.0 as usize] +=
                u64::from(ask.prompt_tokens - choice.cached_tokens + max_tokens);
            running.extend(
                fleet
                    .place(&choice, &ask)
                    .into_iter()
                    .map(|ticket| (ticket, max_tokens, keys.clone())),
            );
            while running.len() > 40 * replicas as usize {
                let (mut ticket, tokens, keys) = running.swap_remove(rng.usize(0..running.len()));
                let (id, delta) = (ticket.replica(), ticket.tokens(tokens));
                fleet.settle(id, delta);
                fleet.stored(id, false, &keys[0].keys);
                fleet.finish(ticket, Ending::Well { tokens }, Duration::ZERO, 0);
            }
        }
        let (most, total) = (*done.iter().max().expect("some"), done.iter().sum::<u64>());
        let ratio = (most * u64::from(replicas)) as f64 / total as f64;
        println!("{replicas} replicas: max/mean {ratio:.2}");
        assert!(ratio <= 1.5, "seed {seed}: {done:?}");
    }
}

/// Five replicas to which everything happens, and what is true of them.
struct World {
    rng: fastrand::Rng,
    fleet: Fleet,
    draining: [bool; 5],
    down: [bool; 5],
    tickets: Vec<Ticket>,
    now: Duration,
}

impl World {
    fn step(&mut self, step: u64) {
        self.now += Duration::from_millis(self.rng.u64(0..50));
        let id = ReplicaId(self.rng.u32(0..5));
        let index = id.0 as usize;
        match self.rng.u8(0..20) {
            0..8 => self.ask(step),
            8..13 if !self.tickets.is_empty() => self.end(),
            13..16 if !self.tickets.is_empty() => self.progress(),
            16 => {
                let (running, waiting) = (self.rng.u32(0..40), self.rng.u32(0..9));
                let pending_prefill_tokens = self.rng.u32(0..5_000);
                self.fleet.report(
                    id,
                    Load {
                        running,
                        waiting,
                        pending_prefill_tokens,
                    },
                );
            }
            17 if step.is_multiple_of(7) => self.lose(id),
            18 if !self.down[index] && step.is_multiple_of(11) => {
                self.fleet.draining(id);
                self.draining[index] = true;
            }
            19 if self.down[index] => {
                self.fleet.connected(id, capacity(200), &step.to_le_bytes(), 20);
                self.fleet.ready(id);
                self.down[index] = false;
            }
            _ => {}
        }
    }

    fn ask(&mut self, step: u64) {
        let rng = &mut self.rng;
        let keys = keys(rng.u64(0..5), rng.u64(0..30), step, rng.u64(1..40));
        let excluded: Vec<_> = (0..rng.u32(0..3)).map(|_| ReplicaId(rng.u32(0..5))).collect();
        let ask = Ask {
            prompt_tokens: keys[0].keys.len() as u32 * BLOCK + rng.u32(0..BLOCK),
            max_tokens: 50,
            candidates: rng.u32(1..4),
            keys: &keys,
            excluded: &excluded,
        };
        match choose(&self.fleet, &ask, self.now, rng.u64(..)) {
            Ok(choice) => {
                let chosen = choice.replica.0 as usize;
                let replica = self.fleet.replica(choice.replica).expect("there");
                assert!(!excluded.contains(&choice.replica), "excluded");
                assert!(
                    !self.draining[chosen] && !self.down[chosen] && replica.is_ready(),
                    "unfit"
                );
                assert!(replica.credits() > 0, "no credits");
                assert!(choice.cached_tokens < ask.prompt_tokens, "nothing to compute");
                self.tickets.extend(self.fleet.place(&choice, &ask));
            }
            Err(Blocked::NoReplica) => {
                assert!(
                    (0..5).all(|i| self.draining[i] || self.down[i]),
                    "somebody is ready"
                );
            }
            Err(_) => {}
        }
    }

    fn end(&mut self) {
        let ticket = self.tickets.swap_remove(self.rng.usize(0..self.tickets.len()));
        let ending = match self.rng.u8(0..6) {
            0 => Ending::Failed,
            1 => Ending::Neutral,
            _ => Ending::Well {
                tokens: self.rng.u32(0..60),
            },
        };
        self.fleet.grant(ticket.replica(), 1);
        self.fleet.finish(ticket, ending, self.now, self.rng.u64(..));
    }

    fn progress(&mut self) {
        let i = self.rng.usize(0..self.tickets.len());
        let ticket = &mut self.tickets[i];
        let accepted = self.rng.bool();
        let delta = if accepted {
            ticket.accepted(self.rng.u32(0..700))
        } else {
            ticket.tokens(self.rng.u32(1..9))
        };
        self.fleet.settle(ticket.replica(), delta);
    }

    fn lose(&mut self, id: ReplicaId) {
        self.fleet.down(id);
        self.fleet.failed(id, self.now, self.rng.u64(..));
        (self.down[id.0 as usize], self.draining[id.0 as usize]) = (true, false);
        for ticket in self.tickets.extract_if(.., |ticket| ticket.replica() == id) {
            self.fleet.finish(ticket, Ending::Neutral, self.now, 0);
        }
        let work = self.fleet.replica(id).expect("there").work();
        assert_eq!(work, Work::default(), "a lost replica has no work of ours");
    }
}

#[test]
fn nobody_unfit_is_ever_chosen_and_work_adds_up() {
    for seed in 0..40 {
        println!("seed {seed}");
        let (rng, fleet) = (fastrand::Rng::with_seed(seed), fleet(5, 20));
        let (draining, down) = ([false; 5], [false; 5]);
        let mut world = World {
            rng,
            fleet,
            draining,
            down,
            tickets: Vec::new(),
            now: Duration::ZERO,
        };
        for step in 0..3_000 {
            world.step(step);
            let total: u64 = world
                .fleet
                .replicas()
                .map(|(_, replica)| replica.work().requests)
                .sum();
            assert_eq!(total, world.tickets.len() as u64);
        }
        for ticket in world.tickets {
            world.fleet.finish(ticket, Ending::Neutral, world.now, 0);
        }
        assert!(
            world
                .fleet
                .replicas()
                .all(|(_, replica)| replica.work() == Work::default())
        );
    }
}

#[test]
fn the_cache_index_never_exceeds_the_pool() {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut fleet = Fleet::default();
    let id = ReplicaId(0);
    fleet.add(id);
    fleet.connected(id, capacity(100), b"boot", u32::MAX);
    fleet.ready(id);
    for i in 0..5_000 {
        if rng.bool() {
            let stored: Vec<u64> = (0..rng.usize(0..50)).map(|_| rng.u64(..)).collect();
            fleet.stored(id, rng.u8(0..50) == 0, &stored);
        } else {
            let keys = keys(rng.u64(..), 10, i, rng.u64(1..300));
            let excluded = [];
            let ask = Ask {
                prompt_tokens: 4_800,
                max_tokens: 1,
                candidates: 1,
                keys: &keys,
                excluded: &excluded,
            };
            let choice = choose(&fleet, &ask, Duration::ZERO, 0).expect("credits without end");
            fleet.place(&choice, &ask);
        }
        assert!(fleet.replica(id).expect("there").index_len() <= 200);
    }
}

#[test]
fn the_queue_is_fair_bounded_and_adds_up() {
    for seed in 0..40 {
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let limits = Limits {
            requests: 50,
            tokens: 20_000,
            bytes: 100_000,
        };
        let mut queue = Queue::new(limits);
        // The plain truth: lines in order.
        let mut lines: HashMap<ModelId, Vec<Waiting>> = HashMap::new();
        let mut now = Duration::ZERO;
        for next in 0..4_000u64 {
            now += Duration::from_millis(rng.u64(0..20));
            let model = ModelId(rng.u32(0..3));
            let line = lines.entry(model).or_default();
            let waiting = Waiting {
                id: RequestId(next),
                model,
                tenant: TenantId(0),
                weight: 1,
                priority: Priority::Normal,
                tokens: rng.u64(1..2_000),
                work: rng.u64(1..2_000),
                bytes: rng.u64(1..8_000),
                since: now,
                until: now + Duration::from_millis(rng.u64(0..2_000)),
            };
            match rng.u8(0..10) {
                0..5 => match queue.push(waiting, now) {
                    Ok(out) => {
                        assert_eq!(out, [], "seed {seed}: one tenant makes room for nobody");
                        line.push(waiting);
                    }
                    Err(full) => {
                        let depth = queue.depth();
                        let over = match full.what {
                            "requests" => depth.requests >= limits.requests,
                            "tokens" => depth.tokens + waiting.tokens > limits.tokens,
                            _ => depth.bytes + waiting.bytes > limits.bytes,
                        };
                        assert!(over, "seed {seed}: turned away without a reason");
                        assert!(
                            (1..=60).contains(&full.retry_after.as_secs()),
                            "seed {seed}: {full:?}"
                        );
                    }
                },
                5 => {
                    queue.push_front(waiting, now);
                    line.insert(0, waiting);
                }
                6..8 => {
                    let expected = (!line.is_empty()).then(|| line.remove(0));
                    assert_eq!(
                        queue.pop(model, now),
                        expected,
                        "seed {seed}: first come, first served"
                    );
                }
                8 if !line.is_empty() => {
                    let gone = line.remove(rng.usize(0..line.len()));
                    assert_eq!(queue.remove(gone.id, now), Some(gone));
                    assert_eq!(queue.remove(gone.id, now), None);
                }
                _ => {
                    let mut expired = queue.expire(now);
                    expired.sort_by_key(|waiting| waiting.id);
                    let mut expected: Vec<Waiting> = Vec::new();
                    for line in lines.values_mut() {
                        expected.extend(line.extract_if(.., |waiting| waiting.until <= now));
                    }
                    expected.sort_by_key(|waiting| waiting.id);
                    assert_eq!(expired, expected, "seed {seed}");
                }
            }
            let all = || lines.values().flatten();
            let truth = Depth {
                requests: all().count() as u32,
                tokens: all().map(|waiting| waiting.tokens).sum(),
                bytes: all().map(|waiting| waiting.bytes).sum(),
            };
            assert_eq!(queue.depth(), truth, "seed {seed}");
            assert_eq!(
                queue.next_end(),
                all().map(|waiting| waiting.until).min(),
                "seed {seed}"
            );
            for (model, line) in &lines {
                assert_eq!(queue.front(*model), line.first(), "seed {seed}");
                assert_eq!(queue.waiting_for(*model), line.len(), "seed {seed}");
            }
        }
    }
}

#[test]
fn a_queue_that_drains_steadily_tells_the_truth_about_when() {
    // 100 requests of 1000 tokens a second leave; after half a minute whoever is turned away is told the real time.
    let mut queue = Queue::new(Limits {
        requests: 1_000,
        tokens: u64::MAX,
        bytes: u64::MAX,
    });
    let waiting = |id: u64, since: Duration| Waiting {
        id: RequestId(id),
        model: ModelId(0),
        tenant: TenantId(0),
        weight: 1,
        priority: Priority::Normal,
        tokens: 1_000,
        work: 1_000,
        bytes: 1,
        since,
        until: Duration::MAX,
    };
    let mut id = 0;
    let mut told = None;
    for tick in 1..=3_000u64 {
        let now = Duration::from_millis(tick * 10);
        // Three times as many come as leave.
        for _ in 0..3 {
            id += 1;
            if let Err(full) = queue.push(waiting(id, now), now) {
                told = Some(full);
            }
        }
        queue.pop(ModelId(0), now);
    }
    let told = told.expect("it was full").retry_after.as_secs_f64();
    // 1000 requests wait, 100 leave in a second.
    assert!((told - 10.0).abs() < 3.0, "within 30 % of the truth: {told}");
}

#[test]
fn a_choice_among_64_replicas_is_quick() {
    // 8k tokens of prompt, all of it in every cache: the longest match there is.
    let mut fleet = fleet(64, 1_000_000);
    let keys = keys(1, 512, 0, 512);
    (0..64).for_each(|id| fleet.stored(ReplicaId(id), false, &keys[0].keys));
    let excluded = [];
    let ask = Ask {
        prompt_tokens: 8_192,
        max_tokens: 100,
        candidates: 1,
        keys: &keys,
        excluded: &excluded,
    };
    let rounds = 200;
    let quickest = (0..10).map(|_| {
        let started = std::time::Instant::now();
        for draw in 0..rounds {
            std::hint::black_box(choose(&fleet, &ask, Duration::ZERO, draw)).expect("all are free");
        }
        started.elapsed() / rounds as u32
    });
    let quickest = quickest.min().expect("ten");
    println!("{quickest:?} for a choice");
    assert!(quickest < Duration::from_micros(300), "{quickest:?}");
}
