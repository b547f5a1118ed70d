//! The same plan carried out as processes on this machine: one process for each group, one router before all models,
//! everything bound to loopback.
//!
//! A loop sees, plans, acts and tells, woken by signals, ended processes, answered probes and time. It decides nothing
//! about groups: that is the plan's. It runs on the one thread that starts every process, because the kernel ends a
//! child with the thread that started it: no process outlives this one, however it ends.

mod gpus;
mod group;
mod ports;
mod prepare;
mod process;
mod router;
mod secrets;
mod tell;
mod world;

use std::{path::PathBuf, time::Duration};

use clap::Args;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use swallow_plan::Timestamp;
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep_until},
};

use crate::file::Errors;
use crate::probe::Probes;
use prepare::Prepared;
use tell::Teller;
use world::World;

/// How often groups on their way are looked at.
const LOOK_STARTING: Duration = Duration::from_millis(200);
/// How often groups that serve are looked at.
const LOOK_SERVING: Duration = Duration::from_secs(1);

/// What to serve and where.
#[derive(Args, Clone, Debug)]
pub struct LocalArgs {
    /// File with one or more SwallowModels in YAML, and the Secrets that they name; - reads standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Port of the router for gRPC clients; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 50051)]
    pub grpc_port: u16,
    /// Port of the router for OpenAI clients; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub http_port: u16,
    /// Folder of swallow-worker and swallow-router [default: where swallow-operator is]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Folder that keeps models fetched from a Hugging Face endpoint [default: ~/.cache/swallow/models]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// File with the access token for models whose source has a tokenSecretRef [default: the Secret, from --file]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Folder for logs; kept at the end [default: a temporary one, removed after a good end]
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
}

/// Serves until a signal.
///
/// # Errors
/// Lines that say why it did not start, or did not end well.
pub fn run(args: LocalArgs) -> Result<(), Errors> {
    let prepared = Prepared::new(args)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| vec![format!("the runtime did not start: {error}")])?;
    runtime.block_on(serve(prepared))
}

/// How far the end is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// Serving goes on.
    NotYet,
    /// Open streams finish; then it ends well, or with these lines.
    Draining(Errors),
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    child: Signal,
}

impl Signals {
    fn new() -> Result<Self, Errors> {
        let listen =
            |kind| signal(kind).map_err(|error| vec![format!("signals cannot be listened to: {error}")]);
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            child: listen(SignalKind::child())?,
        })
    }
}

async fn serve(prepared: Prepared) -> Result<(), Errors> {
    let mut signals = Signals::new()?;
    let mut probes = Probes::default();
    let mut teller = Teller::new();
    teller.line(&format!("logs in {}", prepared.logs.path().display()));
    for note in &prepared.notes {
        teller.line(note);
    }
    let mut world = World::new(prepared);
    let mut end = End::NotYet;
    let mut was_ready = false;
    loop {
        let look_again = turn(&mut world, &mut teller, end == End::NotYet);
        if let End::Draining(errors) = &end
            && world.is_empty()
        {
            teller.clear();
            if errors.is_empty() {
                teller.line("stopped");
            }
            return world.finish(errors.clone());
        }
        if end == End::NotYet {
            let errors = world.hopeless();
            if !errors.is_empty() {
                end = drain(&mut world, &mut teller, errors);
                continue;
            }
        }
        if !was_ready && end == End::NotYet && world.is_ready() {
            was_ready = true;
            world.reached_ready();
            teller.line(&world.ready_line());
        }
        world.ask(&mut probes);
        let wake = Instant::now()
            + look_again
                .unwrap_or(LOOK_SERVING)
                .min(world.look(LOOK_STARTING, LOOK_SERVING));
        tokio::select! {
            () = wish_to_end(&mut signals.interrupt, &mut signals.terminate) => match end {
                End::NotYet => end = drain(&mut world, &mut teller, Vec::new()),
                End::Draining(_) => {
                    teller.clear();
                    world.kill_all();
                    return world.finish(vec!["ended by a second signal: open streams were cut".into()]);
                }
            },
            _ = signals.child.recv() => {}
            Some(answer) = probes.next() => world.learn(answer, Timestamp::now()),
            () = sleep_until(wake) => {}
        }
    }
}

/// Waits for Ctrl-C or SIGTERM.
async fn wish_to_end(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Sees, plans, acts and tells, until nothing more follows at once. Gives the time until the plan wants to look again.
///
/// With `notes` false only how groups are is told: at the end nobody needs each step of it.
fn turn(world: &mut World, teller: &mut Teller, notes: bool) -> Option<Duration> {
    /// An action's effect may be seen at once and lead to the next; no chain is longer than this.
    const STEPS_MAX: usize = 8;
    let mut next = None;
    for _ in 0..STEPS_MAX {
        let now = Timestamp::now();
        world.advance(now);
        let mut acted = false;
        next = None;
        for i in 0..world.n_models() {
            let plan = swallow_plan::plan(world.model(i), &world.observe(i), now);
            if let Some(time) = plan.look_again {
                let wait = Duration::try_from(time.duration_since(now)).unwrap_or_default();
                next = Some(next.map_or(wait, |earlier: Duration| earlier.min(wait)));
            }
            for note in plan.notes.iter().filter(|_| notes) {
                teller.note(world.model(i), note);
            }
            teller.groups(&plan.status.groups);
            world.set_status(i, plan.status);
            for action in plan.actions {
                acted = true;
                world.carry_out(i, action, now);
            }
        }
        if !acted {
            break;
        }
    }
    next
}

/// Models go as if they were deleted: the plan lets streams finish, then stops the groups.
fn drain(world: &mut World, teller: &mut Teller, errors: Errors) -> End {
    if errors.is_empty() {
        teller.line("draining: open streams may finish; a second signal ends them");
    }
    world.delete(Time(Timestamp::now()));
    End::Draining(errors)
}
