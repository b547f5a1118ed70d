//! Three times what a worker can serve, from two tenants, on a real queue before a real session; and what is left of it
//! when it is over. Exact figures are those of simulated time (`policy/tests/overload.rs`); what a clock and two busy
//! cores add to them is allowed for here.

use std::sync::atomic::{AtomicU64, Ordering};

use swallow_policy::{Limits, TenantId};

use super::*;

const RUNNING: u32 = 8;
const PROMPT: usize = 24;
const OUTPUT: u32 = 20;
const OVERLOAD: Duration = Duration::from_secs(5);
/// The queue is full by then.
const WARM_UP: Duration = Duration::from_secs(2);
const GREEDY: u32 = 1;
const MODEST: u32 = 2;
const LIMITS: Limits = Limits {
    requests: 200,
    tokens: 2_400,
    bytes: 1 << 20,
};

fn of(tenant: u32, i: u64) -> Ask {
    let share = Share {
        tenant: TenantId(tenant),
        ..Share::default()
    };
    let i = i as u32;
    Ask {
        share,
        ..ask([i, tenant].into_iter().chain(0..PROMPT as u32 - 2), OUTPUT)
    }
}

/// What came of all requests of a tenant.
#[derive(Default)]
struct Tally {
    served: AtomicU64,
    refused: AtomicU64,
    /// The last Retry-After, in microseconds.
    told: AtomicU64,
}

async fn one(dispatcher: Dispatcher, asked: Ask, tally: Arc<Tally>, counts: bool) {
    match dispatcher.generate(asked).await {
        Ok(generation) => {
            answer(generation).await.expect("what was let in is served");
            tally.served.fetch_add(u64::from(counts), Ordering::Relaxed);
        }
        Err(Refusal::QueueFull { retry_after, .. }) => {
            tally.refused.fetch_add(1, Ordering::Relaxed);
            let micros = u64::try_from(retry_after.as_micros()).expect("short");
            tally.told.store(micros, Ordering::Relaxed);
        }
        Err(other) => panic!("{other}"),
    }
}

/// Requests a second with as many clients as the worker has places, and the median time of one.
async fn capacity(house: &House, time: Duration) -> (f64, Duration) {
    let until = Instant::now() + time;
    let clients = (0..RUNNING).map(|client| async move {
        let mut took = Vec::new();
        while Instant::now() < until {
            let began = Instant::now();
            let asked = of(100 + client, took.len() as u64);
            house.run(asked).await.expect("served");
            took.push(began.elapsed());
        }
        took
    });
    let mut took: Vec<Duration> = futures::future::join_all(clients).await.concat();
    took.sort_unstable();
    (took.len() as f64 / time.as_secs_f64(), took[took.len() / 2])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_times_the_load_of_two_tenants_is_shared_bounded_and_forgotten() {
    let worker = worker_with(|config| {
        (config.credits, config.max_running) = (RUNNING, RUNNING);
        config.step = Duration::from_millis(6);
    });
    let house = house(&[&worker], |config| config.queue = LIMITS).await;
    let (capacity_before, alone) = capacity(&house, Duration::from_secs(2)).await;

    // An open loop: whoever is refused does not come again, and nobody waits for anybody. One asks for what is its fair
    // share, the other for five times as much.
    let tallies = [(); 2].map(|()| Arc::new(Tally::default()));
    let mut runs = Vec::new();
    let (began, mut sent, mut warm) = (Instant::now(), [0u64; 2], [0u64; 2]);
    let mut most_queued = swallow_policy::Limits {
        requests: 0,
        tokens: 0,
        bytes: 0,
    };
    let mut finished = None;
    while began.elapsed() < OVERLOAD {
        if began.elapsed() > WARM_UP && finished.is_none() {
            finished = Some((worker.seen().finished, Instant::now()));
        }
        for (n, (tenant, rate)) in [(GREEDY, 2.5), (MODEST, 0.5)].into_iter().enumerate() {
            let due = (began.elapsed().as_secs_f64() * rate * capacity_before) as u64;
            while sent[n] < due {
                sent[n] += 1;
                let counts = began.elapsed() > WARM_UP;
                warm[n] += u64::from(counts);
                let tally = Arc::clone(&tallies[n]);
                runs.push(tokio::spawn(one(
                    house.dispatcher.clone(),
                    of(tenant, sent[n]),
                    tally,
                    counts,
                )));
            }
        }
        let queued = house.dispatcher.counts().queued;
        most_queued.requests = most_queued.requests.max(queued.requests);
        most_queued.tokens = most_queued.tokens.max(queued.tokens);
        most_queued.bytes = most_queued.bytes.max(queued.bytes);
        tokio::time::sleep(Duration::from_millis(2)).await; // The loop's grain.
    }
    let (finished, since) = finished.expect("the overload outlasts the warm-up");
    let goodput = (worker.seen().finished - finished) as f64 / since.elapsed().as_secs_f64();
    let told = Duration::from_micros(tallies[0].told.load(Ordering::Relaxed));
    let draining = Instant::now();
    until("the queue is empty", || {
        house.dispatcher.counts().queued.requests == 0
    })
    .await;
    let drained = draining.elapsed();
    for run in runs {
        run.await.expect("no panic");
    }
    let served = tallies
        .each_ref()
        .map(|tally| tally.served.load(Ordering::Relaxed));
    let refused = tallies
        .each_ref()
        .map(|tally| tally.refused.load(Ordering::Relaxed));
    println!(
        "capacity {capacity_before:.0}/s; of {sent:?} {served:?} served in time, {refused:?} refused; {most_queued:?}; \
         told {told:?}, drained in {drained:?}"
    );
    // Bounded in each measure, and in use.
    assert!(
        most_queued.requests <= LIMITS.requests && most_queued.bytes <= LIMITS.bytes,
        "{most_queued:?}"
    );
    assert!(
        most_queued.tokens <= LIMITS.tokens && most_queued.tokens > LIMITS.tokens / 2,
        "{most_queued:?}"
    );
    // The modest one is served what it asks for, within a tenth and what had to wait at the end; all refusals are the
    // greedy one's, but for a few.
    assert!(
        served[1] as f64 >= 0.85 * warm[1] as f64,
        "{} of {}",
        served[1],
        warm[1]
    );
    assert!(refused[1] * 20 <= sent[1], "{} of {}", refused[1], sent[1]);
    // Nothing of the capacity is lost to the crowd.
    assert!(
        goodput > 0.8 * capacity_before,
        "{goodput:.0} of {capacity_before:.0} a second"
    );
    let off = told.as_secs_f64() / drained.as_secs_f64();
    assert!((0.5..2.0).contains(&off), "told {told:?}, drained in {drained:?}");
    // And then all is as before.
    let (_, after) = capacity(&house, Duration::from_secs(1)).await;
    assert!(after < alone * 2, "{after:?} where it was {alone:?}");
    house.settles(i64::from(RUNNING)).await;
}
