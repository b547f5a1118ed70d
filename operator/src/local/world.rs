//! The machine as the plan sees it, and what the plan's actions mean on it.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::Value;
use swallow_plan::{
    Action, GroupRef, Images, Observed, SeenRouter, Timestamp,
    launch::GroupLaunch,
    model::{GroupState, SwallowModel, SwallowModelStatus},
};
use swallow_proto::launch::{LogFormat, ReplicaAddress, RouterArgs};

use super::{
    group::{Group, Place, Places},
    prepare::{Logs, Prepared, PreparedModel},
    router::Router,
    secrets::Mounted,
};
use crate::{
    file::{Errors, model_name},
    probe::{Answer, Probes, Whom},
};

/// Models with their groups, and the router before them.
#[derive(Debug)]
pub struct World {
    models: Vec<Served>,
    router: Router,
    places: Places,
    logs: Logs,
    n_started: u64,
    was_ready: bool,
    /// Where the router is asked.
    probes: SocketAddr,
    /// Their files go with this.
    _secrets: Mounted,
    /// Ports that are held until the router is started.
    router_ports: Vec<super::ports::Held>,
}

#[derive(Debug)]
struct Served {
    prepared: PreparedModel,
    groups: Vec<Group>,
    /// Of the router and of what surrounds groups, as last applied: applied means known here.
    router: Option<String>,
    surroundings: Option<String>,
    /// This model needs the router no more.
    done_with_router: bool,
}

impl World {
    /// A machine on which nothing runs yet.
    pub fn new(prepared: Prepared) -> Self {
        let Prepared {
            models,
            router,
            grpc,
            http,
            probes,
            worker_program,
            router_program,
            cache_dir,
            secrets,
            logs,
            ..
        } = prepared;
        let args = RouterArgs {
            grpc_listen: grpc.address(),
            http_listen: http.address(),
            probe_listen: Some(probes.address()),
            replicas: models.iter().flat_map(addresses).collect(),
            // Nothing here has to hear first that the router goes.
            shutdown_delay_seconds: 0,
            log_format: LogFormat::Text,
            ..router.args
        };
        let router = Router::new(router_program, args, logs.path().join("router.log"));
        router.clear_log();
        let places = Places {
            worker: worker_program,
            cache: cache_dir,
            logs: logs.path().to_owned(),
        };
        let models = models
            .into_iter()
            .map(|prepared| Served {
                prepared,
                groups: Vec::new(),
                router: None,
                surroundings: None,
                done_with_router: false,
            })
            .collect();
        Self {
            models,
            router,
            places,
            logs,
            n_started: 0,
            was_ready: false,
            probes: probes.address(),
            router_ports: vec![grpc, http, probes],
            _secrets: secrets,
        }
    }

    /// How many models there are.
    pub fn n_models(&self) -> usize {
        self.models.len()
    }

    /// A model, with its status.
    pub fn model(&self, i: usize) -> &SwallowModel {
        &self.models[i].prepared.model
    }

    /// Keeps a model's status.
    pub fn set_status(&mut self, i: usize, status: SwallowModelStatus) {
        self.models[i].prepared.model.status = Some(status);
    }

    /// Looks at every process.
    pub fn advance(&mut self, now: Timestamp) {
        for served in &mut self.models {
            served
                .groups
                .retain_mut(|group| !group.advance(&self.places, now));
        }
        // The router starts when every model has said what it wants of it.
        if self.models.iter().all(|served| served.router.is_some()) {
            self.router_ports.iter_mut().for_each(super::ports::Held::release);
            self.router.advance();
        }
    }

    /// What the plan sees of a model.
    pub fn observe(&self, i: usize) -> Observed {
        let served = &self.models[i];
        let gone = served.done_with_router && !self.router.runs();
        let router = served
            .router
            .as_ref()
            .filter(|_| !gone)
            .map(|fingerprint| SeenRouter {
                fingerprint: fingerprint.clone(),
                ready: u32::from(self.router.is_ready()),
                leaving: served.done_with_router,
                // Why a process does not start is told at once, and ends all.
                trouble: None,
            });
        Observed {
            groups: served.groups.iter().map(Group::seen).collect(),
            router,
            surroundings: served.surroundings.clone(),
            shape: served.prepared.shape,
            images: Images::default(),
            // The router before all models was agreed on before the start, and nothing is kept for later.
            ..Observed::default()
        }
    }

    /// Carries out one action of a model's plan.
    pub fn carry_out(&mut self, i: usize, action: Action, now: Timestamp) {
        match action {
            // Accounts, services and budgets have no counterpart here.
            Action::ApplySurroundings { fingerprint, .. } => self.models[i].surroundings = Some(fingerprint),
            // What all models want of the router was agreed on before the start.
            Action::ApplyRouter { fingerprint, .. } => self.models[i].router = Some(fingerprint),
            Action::RemoveRouter { .. } => {
                self.models[i].done_with_router = true;
                if self.models.iter().all(|served| served.done_with_router) {
                    self.router.drain();
                }
            }
            Action::CreateGroup { group, .. } => self.create(i, *group, now),
            Action::DrainGroup { group, .. } => self.with(i, &group, Group::drain),
            Action::FailGroup { group, reason, why } => {
                self.with(i, &group, |group| group.fail_with(reason, why.to_string(), now));
            }
            Action::DeleteGroup { group, .. } => self.with(i, &group, Group::delete),
            // There are no records.
            Action::ForgetRevision { .. } => {}
        }
    }

    fn create(&mut self, i: usize, launch: GroupLaunch, now: Timestamp) {
        self.n_started += 1;
        let served = &mut self.models[i];
        let taken_over = served
            .groups
            .iter()
            .find(|group| Some(&group.launch.name) == launch.replaces.as_ref());
        let slot = taken_over.map(|group| group.slot).or_else(|| {
            let used: BTreeSet<usize> = served.groups.iter().map(|group| group.slot).collect();
            (0..served.prepared.slots.len()).find(|slot| !used.contains(slot))
        });
        // Without a free slot the plan asks again when a group has gone.
        let Some(at) = slot else { return };
        let uid = self.n_started.to_string();
        let PreparedModel { slots, secrets, .. } = &mut served.prepared;
        let place = Place {
            at,
            slot: &mut slots[at],
            secrets,
        };
        let group = Group::start(launch, uid, place, &self.places, now);
        served.groups.push(group);
    }

    fn with(&mut self, i: usize, wanted: &GroupRef, act: impl FnOnce(&mut Group)) {
        let groups = &mut self.models[i].groups;
        if let Some(group) = groups.iter_mut().find(|group| group.uid == wanted.uid) {
            act(group);
        }
    }

    /// Asks every process that answers.
    pub fn ask(&self, probes: &mut Probes) {
        for served in &self.models {
            for group in served.groups.iter().filter(|group| group.answers()) {
                let address = served.prepared.slots[group.slot].http.address();
                probes.ask(Whom::Group(group.uid.clone()), address, "/state");
            }
        }
        if self.router.runs() {
            probes.ask(Whom::Router, self.probes, "/readyz");
        }
    }

    /// Takes an answer.
    pub fn learn(&mut self, answer: Answer, now: Timestamp) {
        match answer.whom {
            Whom::Router => self.router.learn(answer.body.as_ref()),
            Whom::Group(uid) => {
                let group = self
                    .models
                    .iter_mut()
                    .flat_map(|served| &mut served.groups)
                    .find(|group| group.uid == uid);
                if let (Some(group), Some(state)) =
                    (group, answer.body.as_ref().filter(|body| Value::is_object(body)))
                {
                    group.learn(state, now);
                }
            }
        }
    }

    /// How long until the next look, because of time alone.
    pub fn look(&self, starting: Duration, serving: Duration) -> Duration {
        let moving = !self.was_ready
            || self
                .models
                .iter()
                .any(|served| served.groups.iter().any(Group::is_moving));
        let usual = if moving { starting } else { serving };
        let restart = self
            .router
            .restarts_at()
            .map(|at| at.saturating_duration_since(Instant::now()));
        restart.map_or(usual, |wait| usual.min(wait.max(Duration::from_millis(1))))
    }

    /// Whether every model is served by all its groups, and the router reaches them.
    pub fn is_ready(&self) -> bool {
        self.router.is_ready()
            && self.models.iter().all(|served| {
                let own = served.prepared.served_names.first().map_or("", String::as_str);
                let want = served.prepared.slots.len();
                let serving = served.groups.iter().filter(|group| group.seen().serves()).count();
                serving >= want && self.router.reaches(own) as usize >= want
            })
    }

    /// From now on failures are the plan's to mend, not a reason to give up.
    pub fn reached_ready(&mut self) {
        self.was_ready = true;
    }

    /// What clients have to know.
    pub fn ready_line(&self) -> String {
        let names: Vec<&str> = self
            .models
            .iter()
            .filter_map(|served| served.prepared.served_names.first().map(String::as_str))
            .collect();
        let args = self.router.args();
        let scheme = if args.tls_cert.is_some() { "https" } else { "http" };
        format!(
            "ready grpc={} http={scheme}://{} models={}",
            args.grpc_listen,
            args.http_listen,
            names.join(",")
        )
    }

    /// Why it makes no sense to go on, if it makes none: before the first success, a group that refused to start or
    /// stays down, or a router that never came up.
    pub fn hopeless(&self) -> Errors {
        if self.was_ready {
            return Vec::new();
        }
        if let Some(how) = self.router.stillborn() {
            return vec![format!("{how} (log: {})", self.router.log().display())];
        }
        self.models
            .iter()
            .filter_map(|served| served.hopeless())
            .collect()
    }

    /// All models are to go.
    pub fn delete(&mut self, now: Time) {
        for served in &mut self.models {
            served.prepared.model.metadata.deletion_timestamp = Some(now.clone());
        }
    }

    /// Whether nothing runs any more.
    pub fn is_empty(&self) -> bool {
        !self.router.runs() && self.models.iter().all(|served| served.groups.is_empty())
    }

    /// Ends everything now.
    pub fn kill_all(&mut self) {
        self.router.kill();
        for served in &mut self.models {
            served.groups.iter_mut().for_each(Group::delete);
        }
    }

    /// The end, good or with these lines; logs of a bad one are kept.
    pub fn finish(&self, errors: Errors) -> Result<(), Errors> {
        if errors.is_empty() {
            self.logs.discard();
            return Ok(());
        }
        Err(errors)
    }
}

impl Served {
    /// A group that refused to start, or that the plan has given up.
    fn hopeless(&self) -> Option<String> {
        let status = self.prepared.model.status.as_ref()?;
        let given_up = |group: &Group| {
            let told = status.groups.iter().find(|told| told.name == group.launch.name)?;
            (told.state == GroupState::Quarantined).then_some(told.message.as_str())
        };
        let (group, why) = self.groups.iter().find_map(|group| {
            let why = group.refusal().or_else(|| given_up(group))?;
            Some((group, why))
        })?;
        Some(format!(
            "{}: {why} (log: {})",
            model_name(&self.prepared.model),
            group.log().display()
        ))
    }
}

/// Where the router finds the groups of a model, running or not.
fn addresses(model: &PreparedModel) -> Vec<ReplicaAddress> {
    let one = |address: String| ReplicaAddress {
        served_names: model.served_names.clone(),
        address,
    };
    model
        .slots
        .iter()
        .map(|slot| one(slot.grpc.address().to_string()))
        .collect()
}
