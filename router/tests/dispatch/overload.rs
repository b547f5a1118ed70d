//! Three times what a worker can serve, from two tenants, on a real queue before a real session; and what is left of it
//! when it is over. The worker makes up for steps that a busy machine had it begin late, and what it serves is counted in
//! its steps and tokens, so the bounds are those of simulated time (`policy/tests/overload.rs`).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use swallow_policy::{Depth, Limits, TenantId};

use super::*;

/// Tokens that the worker generates in a step, one for each request.
const RUNNING: u32 = 8;
const STEP: Duration = Duration::from_millis(15);
const OVERLOAD: Duration = Duration::from_secs(13);
/// The queue is full by then, and knows how fast it drains.
const WARM_UP: Duration = Duration::from_secs(4);
/// Two tenants, both of which ask for more than a half of what there is: tokens as a multiple of what the worker serves.
const GREEDY: Tenant = Tenant {
    id: 1,
    prompt: 48,
    output: 40,
    load: 2.25,
};
const MODEST: Tenant = Tenant {
    id: 2,
    prompt: 24,
    output: 20,
    load: 0.75,
};
/// The queue holds three seconds' work, about as much in each measure.
const LIMITS: Limits = Limits {
    requests: 80,
    tokens: 1_900,
    bytes: 72 << 10,
};

#[derive(Clone, Copy)]
struct Tenant {
    id: u32,
    prompt: u32,
    output: u32,
    load: f64,
}

impl Tenant {
    fn ask(self, i: u64) -> Ask {
        let share = Share {
            tenant: TenantId(self.id),
            ..Share::default()
        };
        let start = [i as u32, self.id];
        Ask {
            share,
            ..ask(start.into_iter().chain(2..self.prompt), self.output)
        }
    }

    /// Requests due after so long.
    fn due(self, after: Duration) -> u64 {
        let tokens_per_second = f64::from(RUNNING) / STEP.as_secs_f64();
        (after.as_secs_f64() * self.load * tokens_per_second / f64::from(self.output)) as u64
    }
}

/// What came of all requests of a tenant.
#[derive(Default)]
struct Tally {
    refused: AtomicU64,
    /// Tokens while it is counted.
    tokens: AtomicU64,
    /// The last Retry-After, in microseconds.
    told: AtomicU64,
}

async fn one(dispatcher: Dispatcher, asked: Ask, tally: Arc<Tally>, counts: Arc<AtomicBool>) {
    match dispatcher.generate(asked).await {
        Ok(mut generation) => {
            while let Some(event) = generation.next().await {
                if let Event::Tokens { tokens, .. } = event.expect("what was let in is served")
                    && counts.load(Ordering::Relaxed)
                {
                    tally.tokens.fetch_add(tokens.len() as u64, Ordering::Relaxed);
                }
            }
        }
        Err(Refusal::QueueFull { retry_after, .. }) => {
            tally.refused.fetch_add(1, Ordering::Relaxed);
            let micros = u64::try_from(retry_after.as_micros()).expect("short");
            tally.told.store(micros, Ordering::Relaxed);
        }
        Err(other) => panic!("{other}"),
    }
}

/// The median time of a request when there are as many clients as the worker has places.
async fn undisturbed(house: &House) -> Duration {
    let clients = (0..RUNNING).map(|client| async move {
        let mut took = Vec::new();
        for i in 0..2 {
            let began = Instant::now();
            let tenant = Tenant {
                id: 100 + client,
                ..MODEST
            };
            house.run(tenant.ask(i)).await.expect("served");
            took.push(began.elapsed());
        }
        took
    });
    let mut took: Vec<Duration> = futures::future::join_all(clients).await.concat();
    took.sort_unstable();
    took[took.len() / 2]
}

/// The worst that was seen of the queue.
fn most(a: Depth, b: Depth) -> Depth {
    Depth {
        requests: a.requests.max(b.requests),
        tokens: a.tokens.max(b.tokens),
        bytes: a.bytes.max(b.bytes),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_times_the_load_of_two_tenants_is_shared_bounded_and_forgotten() {
    let worker = worker_with(|config| {
        (config.credits, config.max_running) = (RUNNING, RUNNING);
        (config.step, config.punctual) = (STEP, true);
    });
    let house = house(&[&worker], |config| config.queue = LIMITS).await;
    let alone = undisturbed(&house).await;

    // An open loop: whoever is refused does not come again, and nobody waits for anybody.
    let tallies = [(); 2].map(|()| Arc::new(Tally::default()));
    let counts = Arc::new(AtomicBool::new(false));
    let (mut runs, mut sent, mut queued) = (Vec::new(), [0; 2], Depth::default());
    let (began, mut warm) = (Instant::now(), worker.seen());
    while began.elapsed() < OVERLOAD {
        if began.elapsed() > WARM_UP && !counts.swap(true, Ordering::Relaxed) {
            warm = worker.seen();
        }
        for (n, tenant) in [GREEDY, MODEST].into_iter().enumerate() {
            while sent[n] < tenant.due(began.elapsed()) {
                sent[n] += 1;
                let (dispatcher, tally) = (house.dispatcher.clone(), Arc::clone(&tallies[n]));
                let run = one(dispatcher, tenant.ask(sent[n]), tally, Arc::clone(&counts));
                runs.push(tokio::spawn(run));
            }
        }
        queued = most(queued, house.dispatcher.counts().queued);
        tokio::time::sleep(Duration::from_millis(2)).await; // The loop's grain.
    }
    counts.store(false, Ordering::Relaxed);
    let end = worker.seen();
    let draining = Instant::now();
    until("the queue is empty", || {
        house.dispatcher.counts().queued.requests == 0
    })
    .await;
    let drained = draining.elapsed();
    for run in runs {
        run.await.expect("no panic");
    }
    let of = |count: fn(&Tally) -> &AtomicU64| {
        tallies
            .each_ref()
            .map(|tally| count(tally).load(Ordering::Relaxed))
    };
    let (served, refused) = (of(|tally| &tally.tokens), of(|tally| &tally.refused));
    let told = Duration::from_micros(of(|tally| &tally.told)[0]);
    let steps = end.steps - warm.steps;
    let goodput = (end.tokens - warm.tokens) as f64 / (steps * u64::from(RUNNING)) as f64;
    println!(
        "of {sent:?} requests {refused:?} refused; {served:?} tokens in {steps} steps, {goodput:.3} of the capacity; \
         {queued:?} at most; told {told:?}, drained in {drained:?}"
    );
    // As many steps as the time has, or the load was not what it says.
    let time = (OVERLOAD - WARM_UP).as_secs_f64() / STEP.as_secs_f64();
    assert!(
        (steps as f64 / time - 1.0).abs() < 0.05,
        "{steps} steps where there is time for {time:.0}"
    );
    // Bounded in each measure, and in use.
    assert!(queued.requests <= LIMITS.requests, "{queued:?}");
    assert!(
        (LIMITS.tokens * 3 / 4..=LIMITS.tokens).contains(&queued.tokens),
        "{queued:?}"
    );
    assert!(
        (LIMITS.bytes * 3 / 4..=LIMITS.bytes).contains(&queued.bytes),
        "{queued:?}"
    );
    for tokens in served {
        let share = tokens as f64 / served.iter().sum::<u64>() as f64;
        assert!((share / 0.5 - 1.0).abs() <= 0.1, "{share:.3} of the tokens");
    }
    assert!(
        refused.iter().all(|&refused| refused > 0),
        "{refused:?}: both ask for more than their share"
    );
    // Nothing of the capacity is lost to the crowd.
    assert!(goodput >= 0.95, "{goodput:.3} of the capacity");
    let off = told.as_secs_f64() / drained.as_secs_f64();
    assert!((0.7..1.3).contains(&off), "told {told:?}, drained in {drained:?}");
    // And then all is as before.
    let after = undisturbed(&house).await;
    assert!(after < alone * 2, "{after:?} where it was {alone:?}");
    house.settles(i64::from(RUNNING)).await;
}
