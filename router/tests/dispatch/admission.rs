//! Who may wait, for how long, and what those are told who may not.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credits_are_kept_and_who_has_none_waits_in_the_router() {
    let worker = worker_with(|config| (config.credits, config.max_running) = (4, 4));
    let house = house(&[&worker], |_| {}).await;
    worker.set(|config| config.hold = true);
    let asks: Vec<Ask> = (0..20).map(|i| ask([1, i], 8)).collect();
    let runs = futures::future::join_all(asks.iter().map(|ask| house.run(ask.clone())));
    let look = async {
        worker.until("four came", |seen| seen.requests == 4).await;
        until("sixteen wait", || house.dispatcher.counts().queued.requests == 16).await;
        worker.set(|config| config.hold = false);
    };
    let (answers, ()) = tokio::join!(runs, look);
    for (ask, answer) in asks.iter().zip(answers) {
        assert_eq!(answer.expect("no fault").tokens[&0], expected(ask, 0));
    }
    let seen = worker.seen();
    assert!(
        !seen.overdrawn && seen.most_running <= 4 && seen.most_handles <= 4,
        "{seen:?}"
    );
    house.settles(4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_when_to_come_back() {
    let worker = worker_with(|config| {
        (config.credits, config.max_running, config.step) = (1, 1, Duration::from_millis(5));
    });
    let limits = Limits {
        requests: 3,
        tokens: 1_000,
        bytes: 1 << 20,
    };
    let house = house(&[&worker], |config| config.queue = limits).await;
    let long = || ask([1; 100], 10);
    let mut runs: Vec<_> = (0..4).map(|_| Box::pin(house.run(long()))).collect();
    for run in &mut runs {
        assert!(futures::poll!(run).is_pending());
    }
    let refusal = house.refused(long()).await;
    let Refusal::QueueFull {
        what: "requests",
        retry_after,
    } = refusal
    else {
        panic!("{refusal:?}")
    };
    assert!((1..=60).contains(&retry_after.as_secs()), "{retry_after:?}");
    for answer in futures::future::join_all(runs).await {
        answer.expect("those who were let in are served");
    }
    // Now one runs and the tokens of the waiting ones are too many.
    let mut runs: Vec<_> = [100, 600]
        .map(|n| Box::pin(house.run(ask(vec![1; n], 10))))
        .into();
    for run in &mut runs {
        assert!(futures::poll!(run).is_pending());
    }
    let refusal = house.refused(ask(vec![1; 600], 10)).await;
    let Refusal::QueueFull {
        what: "tokens",
        retry_after,
    } = refusal
    else {
        panic!("{refusal:?}")
    };
    assert!((1..=60).contains(&retry_after.as_secs()), "{retry_after:?}");
    futures::future::join_all(runs).await;
    house.settles(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_ends_after_the_shorter_of_both_limits() {
    let worker = worker_with(|config| config.credits = 0);
    let house = house(&[&worker], |config| {
        config.max_queue_wait = Duration::from_millis(300)
    })
    .await;
    for (own, expected) in [(Some(50), 50), (Some(5_000), 300), (None, 300)] {
        let ask = Ask {
            max_queue_wait: own.map(Duration::from_millis),
            ..ask([1], 5)
        };
        let refusal = house.refused(ask).await;
        let Refusal::QueueTimeout { waited, .. } = refusal else {
            panic!("{refusal:?}")
        };
        assert!(waited >= Duration::from_millis(expected), "{waited:?}");
        assert!(waited < Duration::from_millis(expected + 200), "{waited:?}");
    }
    house.settles(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_model_is_refused_and_a_known_one_waits_for_its_first_replica() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("bound");
    let house = house_of(vec![replica(&nobody.to_string(), &["m", "alias"])], |_| {});
    until("it is discovered", || house.dispatcher.model("alias").is_some()).await;
    let other = Ask {
        model: "other".into(),
        ..ask([1], 5)
    };
    assert_eq!(house.refused(other).await, Refusal::UnknownModel("other".into()));

    let short = Ask {
        max_queue_wait: Some(Duration::from_millis(50)),
        ..ask([1], 5)
    };
    let refusal = house.refused(short).await;
    assert!(
        matches!(&refusal, Refusal::NoReplica { model, .. } if model == "m"),
        "{refusal:?}"
    );

    let waits = Ask {
        model: "alias".into(),
        ..ask([1], 5)
    };
    let run = house.run(waits.clone());
    let come = async {
        until("it waits", || house.dispatcher.counts().queued.requests == 1).await;
        let served_names = vec!["m".to_owned(), "alias".to_owned()];
        MockWorker::start_at(
            nobody,
            Config {
                served_names,
                ..Config::default()
            },
        )
    };
    let (answer, _worker) = tokio::join!(run, come);
    assert_eq!(answer.expect("the replica came").tokens[&0], expected(&waits, 0));
    house.settles(64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_models_behind_one_router_do_not_mix() {
    let named = |name: &str| {
        let served_names = vec![name.to_owned(), format!("{name}-alias")];
        MockWorker::start(Config {
            served_names,
            credits: 2,
            ..Config::default()
        })
    };
    let (a, b) = (named("a"), named("b"));
    let set = [(&a, ["a", "a-alias"]), (&b, ["b", "b-alias"])];
    let set = set.map(|(worker, names)| replica(&worker.address.to_string(), &names));
    let house = house_of(set.into(), |_| {});
    house.ready("a", 1).await;
    house.ready("b-alias", 1).await;
    let names: Vec<String> = house
        .dispatcher
        .models()
        .iter()
        .map(|model| model.name.clone())
        .collect();
    assert_eq!(names, ["a", "b"]);
    // One model's line does not hold up the other's.
    a.set(|config| config.hold = true);
    let to = |model: &str, i: u32| Ask {
        model: model.into(),
        ..ask([9, i], 6)
    };
    let mut stuck: Vec<_> = (0..6).map(|i| Box::pin(house.run(to("a", i)))).collect();
    for run in &mut stuck {
        assert!(futures::poll!(run).is_pending());
    }
    for i in 0..6 {
        let answer = house.run(to("b-alias", i)).await.expect("no fault");
        assert_eq!(answer.tokens[&0], expected(&to("b", i), 0));
    }
    a.set(|config| config.hold = false);
    for answer in futures::future::join_all(stuck).await {
        answer.expect("no fault");
    }
    assert_eq!((a.seen().requests, b.seen().requests), (6, 6));
    house.settles(4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_candidates_than_credits_run_in_turns_and_hold_up_nobody_for_ever() {
    let worker = worker_with(|config| (config.credits, config.max_running) = (4, 4));
    let house = house(&[&worker], |_| {}).await;
    let wide = Ask {
        candidates: 4,
        ..ask([1], 5)
    };
    assert_eq!(house.run(wide).await.expect("no fault").tokens.len(), 4);
    assert_eq!(worker.seen().frames, [4], "all candidates come in one frame");
    let (wider, narrow) = (
        Ask {
            candidates: 11,
            ..ask([2], 5)
        },
        ask([3], 5),
    );
    let (many, one) = tokio::join!(house.run(wider.clone()), house.run(narrow.clone()));
    let many = many.expect("no fault");
    (0..11).for_each(|candidate| assert_eq!(many.tokens[&candidate], expected(&wider, candidate)));
    assert_eq!(one.expect("no fault").tokens[&0], expected(&narrow, 0));
    assert!(!worker.seen().overdrawn);
    // Those that were never sent are never heard of.
    worker.set(|config| config.hold = true);
    let before = worker.seen().requests;
    let mut waiting = Box::pin(house.dispatcher.generate(Ask {
        candidates: 7,
        ..ask([4], 5)
    }));
    assert!(futures::poll!(&mut waiting).is_pending());
    worker
        .until("four came", |seen| seen.requests == before + 4)
        .await;
    drop(waiting);
    house.settles(4).await;
    assert_eq!(worker.seen().requests, before + 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_refuses_who_waits_lets_streams_end_and_says_goodbye() {
    let worker = worker_with(|config| {
        (config.credits, config.max_running, config.step) = (1, 1, Duration::from_millis(2));
    });
    let house = house(&[&worker], |_| {}).await;
    let running = ask([1, 2], 100);
    let generation = house.start(running.clone()).await;
    let House {
        dispatcher,
        supervisor,
        ..
    } = house;
    let mut waiting = Box::pin(dispatcher.generate(ask([3], 5)));
    assert!(futures::poll!(&mut waiting).is_pending());
    let (answer, waited, ()) = tokio::join!(answer(generation), waiting, supervisor.shutdown(LIMIT));
    assert_eq!(answer.expect("it had time").tokens[&0], expected(&running, 0));
    assert!(matches!(waited, Err(Refusal::ShuttingDown)));
    assert!(matches!(
        dispatcher.generate(ask([4], 5)).await,
        Err(Refusal::ShuttingDown)
    ));
    worker
        .until("the worker heard goodbye", |seen| seen.goodbyes == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_cuts_what_takes_too_long() {
    let worker = worker();
    let house = house(&[&worker], |_| {}).await;
    let generation = house.start(ask([1, 2], 1_000_000)).await;
    let House { supervisor, .. } = house;
    let ((), answer) = tokio::join!(
        supervisor.shutdown(Duration::from_millis(100)),
        answer(generation)
    );
    assert!(
        matches!(answer, Err(Failure::ReplicaLost { .. })),
        "never a clean end: {answer:?}"
    );
    worker
        .until("the worker heard goodbye", |seen| seen.goodbyes == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_take_turns_and_a_full_queue_is_shared() {
    let worker = worker_with(|config| (config.credits, config.max_running) = (1, 1));
    let limits = Limits {
        requests: 30,
        tokens: 1_000_000,
        bytes: 100 << 20,
    };
    let house = house(&[&worker], |config| config.queue = limits).await;
    worker.set(|config| config.hold = true);
    let of = |tenant: u32, i: u32| {
        let share = Share {
            tenant: swallow_policy::TenantId(tenant),
            ..Share::default()
        };
        Ask {
            share,
            ..ask([tenant, i].into_iter().chain(0..300), 2)
        }
    };
    let order = Mutex::new(Vec::new());
    let run = |tenant: u32, i: u32| {
        let (house, order) = (&house, &order);
        async move {
            let ended = match house.dispatcher.generate(of(tenant, i)).await {
                Ok(generation) => answer(generation).await.map(|_| ()).map_err(|_| ()),
                Err(Refusal::QueueFull { .. }) => Err(()),
                Err(other) => panic!("{other}"),
            };
            order.lock().expect("no panic").push((tenant, ended.is_ok()));
        }
    };
    // One runs, thirty fill the queue.
    let mut greedy: Vec<_> = (0..31).map(|i| Box::pin(run(1, i))).collect();
    for run in &mut greedy {
        assert!(futures::poll!(run).is_pending());
    }
    let mut modest: Vec<_> = (0..5).map(|i| Box::pin(run(2, i))).collect();
    for run in &mut modest {
        assert!(futures::poll!(run).is_pending(), "others make room");
    }
    worker.set(|config| config.hold = false);
    tokio::join!(
        futures::future::join_all(greedy),
        futures::future::join_all(modest)
    );
    let order = order.into_inner().expect("no panic");
    let turned_away = order.iter().filter(|(_, served)| !served).count();
    assert_eq!(turned_away, 5);
    assert!(order.iter().all(|(tenant, served)| *served || *tenant == 1));
    let served: Vec<u32> = order
        .iter()
        .filter(|(_, served)| *served)
        .map(|(tenant, _)| *tenant)
        .collect();
    let last = served
        .iter()
        .rposition(|tenant| *tenant == 2)
        .expect("five were served");
    assert!(
        last < 16,
        "the modest one does not wait for the whole of the other's line: {served:?}"
    );
    house.settles(1).await;
}
