//! All reads: watches keep what exists, workers are asked for their state, and both become what the plan sees.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{ControllerRevision, Deployment},
        core::v1::{Container, Node, Pod, PodSpec, PodStatus, Service, ServiceAccount},
        events::v1::Event,
        policy::v1::PodDisruptionBudget,
        rbac::v1::RoleBinding,
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::DynamicObject,
    core::{PartialObjectMeta, PartialObjectMetaExt},
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use swallow_plan::{
    CreateRefused, Images, Observed, Peer, Phase, SeenGroup, SeenRevision, SeenRouter, Timestamp,
    launch::{WORKER_HTTP_PORT, router_name},
    model::{GroupReason, SwallowModel},
    objects::labels,
    validate,
};
use tokio::{sync::watch, task::JoinSet, time::interval};

use super::{
    cache::{Cache, Key},
    pods,
    queue::Queue,
    room,
};
use crate::{
    probe::{Probes, Whom},
    worker::Told,
};

/// How often workers that start are asked.
const ASK_STARTING: Duration = Duration::from_secs(1);
/// Ready workers are asked once in so many times: their load says which one is best stopped.
const ASK_READY_EACH: u64 = 5;
/// What is remembered of pods that are gone is forgotten once in so many times.
const FORGET_EACH: u64 = 60;

/// The cluster, as far as it matters here.
#[derive(Debug)]
pub struct World {
    /// SwallowModels.
    pub models: Cache<SwallowModel>,
    /// Worker pods, and those of routers.
    pub pods: Cache<Pod>,
    /// Routers.
    pub deployments: Cache<Deployment>,
    /// Revisions on record.
    pub revisions: Cache<ControllerRevision>,
    services: Cache<PartialObjectMeta<Service>>,
    accounts: Cache<PartialObjectMeta<ServiceAccount>>,
    budgets: Cache<PartialObjectMeta<PodDisruptionBudget>>,
    bindings: Cache<PartialObjectMeta<RoleBinding>>,
    /// What kubelets said of volumes that they cannot give to a pod. It is nowhere else.
    mount_failures: Cache<Event>,
    nodes: Cache<Node>,
    /// Pods of all namespaces, as far as they take room; empty where nodes are not read.
    placed: Cache<Pod>,
    images: Images,
    queue: Arc<Queue>,
    /// What workers told last, by the uid of their pods.
    told: Mutex<HashMap<String, Told>>,
    /// When a pod's phase or progress last moved, by its uid.
    moved: Mutex<HashMap<String, (Phase, Timestamp)>>,
    refused: Mutex<HashMap<Key, CreateRefused>>,
}

impl World {
    /// A world of which nothing is known yet.
    pub fn new(images: Images, queue: Arc<Queue>) -> Self {
        Self {
            models: Cache::default(),
            pods: Cache::default(),
            deployments: Cache::default(),
            revisions: Cache::default(),
            services: Cache::default(),
            accounts: Cache::default(),
            budgets: Cache::default(),
            bindings: Cache::default(),
            mount_failures: Cache::default(),
            nodes: Cache::default(),
            placed: Cache::default(),
            images,
            queue,
            told: Mutex::default(),
            moved: Mutex::default(),
            refused: Mutex::default(),
        }
    }

    /// Starts all watches of a namespace, or of all. Each receiver turns true when its first list is complete.
    pub fn watch(
        self: &Arc<Self>,
        client: &Client,
        namespace: Option<&str>,
        tasks: &mut JoinSet<()>,
    ) -> Vec<watch::Receiver<bool>> {
        let to = Target { client, namespace };
        let mut synced = Vec::new();
        let world = self.clone();
        let models = watcher(to.api(), watcher::Config::default());
        to.follow(
            self,
            |world| &world.models,
            models,
            tasks,
            &mut synced,
            move |model| world.model_changed(model),
        );
        let revisions = watcher(to.api(), managed());
        to.follow(
            self,
            |world| &world.revisions,
            revisions,
            tasks,
            &mut synced,
            |_| {},
        );
        to.follow_ours(self, |world| &world.pods, tasks, &mut synced);
        to.follow_ours(self, |world| &world.deployments, tasks, &mut synced);
        to.follow_ours(self, |world| &world.services, tasks, &mut synced);
        to.follow_ours(self, |world| &world.accounts, tasks, &mut synced);
        to.follow_ours(self, |world| &world.budgets, tasks, &mut synced);
        to.follow_ours(self, |world| &world.bindings, tasks, &mut synced);
        let failures = watcher::Config::default().fields("reason=FailedMount");
        let failures = watcher(to.api(), failures);
        let world = self.clone();
        to.follow(
            self,
            |world| &world.mount_failures,
            failures,
            tasks,
            &mut synced,
            move |event| world.mount_failed(event),
        );
        synced
    }

    /// Starts the watches of nodes and of the room that pods take on them. What changes there alone is no reason to
    /// look at a model: the scheduler says when it changes anything.
    pub fn watch_nodes(
        self: &Arc<Self>,
        client: &Client,
        tasks: &mut JoinSet<()>,
    ) -> Vec<watch::Receiver<bool>> {
        let to = Target {
            client,
            namespace: None,
        };
        let mut synced = Vec::new();
        let nodes = watcher(Api::all(client.clone()), watcher::Config::default());
        to.follow(self, |world| &world.nodes, nodes, tasks, &mut synced, |_| {});
        let placed = watcher(to.api(), watcher::Config::default()).modify(only_room);
        to.follow(self, |world| &world.placed, placed, tasks, &mut synced, |_| {});
        synced
    }

    fn toucher<K: Resource>(self: &Arc<Self>) -> impl Fn(&K) + Send + use<K> {
        let world = self.clone();
        move |object: &K| world.touched(object)
    }

    /// The models that an object of ours belongs to have changed.
    fn touched<K: Resource>(&self, object: &K) {
        let namespace = object.meta().namespace.clone().unwrap_or_default();
        let label = |name: &str| object.meta().labels.as_ref().and_then(|labels| labels.get(name));
        if let Some(model) = label(labels::MODEL) {
            self.queue.changed(Key::new(namespace, model));
        } else if let Some(router) = label(labels::ROUTER) {
            self.sharers_changed(&namespace, router);
        }
    }

    fn mount_failed(&self, event: &Event) {
        let pod = event.regarding.as_ref().and_then(|pod| {
            let (namespace, name) = (pod.namespace.clone()?, pod.name.clone()?);
            self.pods.get(&Key::new(namespace, name))
        });
        if let Some(pod) = pod {
            self.touched(&*pod);
        }
    }

    fn model_changed(&self, model: &SwallowModel) {
        let key = Key::of(model);
        let before = self
            .models
            .get(&key)
            .and_then(|before| before.spec.router.name.clone());
        // A router's own name is shared by nobody, unless somebody says so.
        for router in before.iter().chain(&model.spec.router.name) {
            self.sharers_changed(&key.namespace, router);
        }
        self.queue.changed(key);
    }

    fn sharers_changed(&self, namespace: &str, router: &str) {
        for model in self.models.within(namespace) {
            if router_name(&model.spec, &model.name_any()) == router {
                self.queue.changed(Key::of(&*model));
            }
        }
    }

    /// A model and what the plan has to know of the rest; `None` when it is gone.
    pub fn observe(&self, key: &Key, now: Timestamp) -> Option<(Arc<SwallowModel>, Observed)> {
        let Some(model) = self.models.get(key) else {
            self.refused_lock().remove(key);
            return None;
        };
        let router = router_name(&model.spec, &key.name);
        let observed = Observed {
            groups: self.groups(&model, key, now),
            router: self.router(&key.namespace, &router),
            peers: self.peers(&model, key, &router),
            revisions: self.seen_revisions(&model, key),
            create_refused: self.refused_lock().get(key).cloned(),
            surroundings: self.surroundings(&model, key),
            // Folders of nodes and volumes cannot be read from here.
            shape: None,
            images: self.images.clone(),
        };
        Some((model, observed))
    }

    /// Takes what the API server answered to an apply: what was just written is not written again because the watch is
    /// late.
    pub fn learn_applied(&self, object: DynamicObject) {
        let kind = object.types.as_ref().map(|types| types.kind.as_str());
        match kind {
            Some("Service") => self.services.learn(object.metadata.into_response_partial()),
            Some("ServiceAccount") => self.accounts.learn(object.metadata.into_response_partial()),
            Some("PodDisruptionBudget") => self.budgets.learn(object.metadata.into_response_partial()),
            Some("RoleBinding") => self.bindings.learn(object.metadata.into_response_partial()),
            Some("Deployment") => match object.try_parse() {
                Ok(deployment) => self.deployments.learn(deployment),
                Err(error) => tracing::warn!(%error, "the API server's answer to a Deployment is not one"),
            },
            kind => tracing::warn!(?kind, "an object was applied that no watch is about"),
        }
    }

    /// Keeps why a group could not be created, or that one could.
    pub fn set_refused(&self, key: &Key, refused: Option<CreateRefused>) {
        let mut all = self.refused_lock();
        match refused {
            Some(refused) => all.insert(key.clone(), refused),
            None => all.remove(key),
        };
    }

    fn groups(&self, model: &SwallowModel, key: &Key, now: Timestamp) -> Vec<SeenGroup> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let mut moved = self.moved_lock();
        self.pods
            .within(&key.namespace)
            .iter()
            .filter(|pod| is_worker(pod) && pod.labels().get(labels::MODEL) == Some(&key.name))
            .filter(|pod| owned_by(&***pod, model.metadata.uid.as_deref()))
            .filter_map(|pod| {
                let uid = pod.uid()?;
                let mut group = pods::group(pod, told.get(&uid))?;
                self.say_what_is_short(pod, &mut group);
                self.say_what_is_not_mounted(pod, &mut group);
                match moved.get(&uid) {
                    Some((phase, at)) if *phase == group.phase => {
                        group.progress_at = *at;
                    }
                    _ => {
                        group.progress_at = now;
                        moved.insert(uid, (group.phase.clone(), now));
                    }
                }
                Some(group)
            })
            .collect()
    }

    fn say_what_is_short(&self, pod: &Pod, group: &mut SeenGroup) {
        let unschedulable = group.is_unschedulable();
        if let Phase::Pending { message, .. } = &mut group.phase
            && unschedulable
            && let Some(line) = room::shortage(pod, &self.nodes.all(), &self.placed.all())
        {
            *message = format!("{line} (scheduler: {message})");
        }
    }

    /// A pod whose volumes cannot be mounted looks like one that starts; only the kubelet's events tell.
    fn say_what_is_not_mounted(&self, pod: &Pod, group: &mut SeenGroup) {
        let Phase::Pending { reason, message, .. } = &mut group.phase else {
            return;
        };
        if *reason != GroupReason::Starting {
            return;
        }
        if let Some(note) = self.not_mounted(pod) {
            (*reason, *message) = (GroupReason::Refused, note);
        }
    }

    /// What the kubelet said last of a pod that has no volumes yet.
    fn not_mounted(&self, pod: &Pod) -> Option<String> {
        if pods::has_its_volumes(pod) {
            return None;
        }
        let uid = pod.uid()?;
        let failures = self.mount_failures.within(&pod.namespace().unwrap_or_default());
        let last = failures
            .iter()
            .filter(|event| {
                let regarding = event.regarding.as_ref();
                regarding.and_then(|pod| pod.uid.as_ref()) == Some(&uid)
            })
            .max_by_key(|event| event.deprecated_last_timestamp.as_ref().map(|time| time.0));
        last.and_then(|event| event.note.clone())
    }

    fn peers(&self, model: &SwallowModel, key: &Key, router: &str) -> Vec<Peer> {
        self.models
            .within(&key.namespace)
            .iter()
            .filter(|peer| peer.name_any() != model.name_any())
            .filter(|peer| peer.metadata.deletion_timestamp.is_none())
            .filter(|peer| router_name(&peer.spec, &peer.name_any()) == router)
            .filter_map(|peer| {
                Some(Peer {
                    valid: validate(peer, None).ok()?,
                    created: peer.metadata.creation_timestamp.as_ref().map(|time| time.0),
                })
            })
            .collect()
    }

    fn router(&self, namespace: &str, name: &str) -> Option<SeenRouter> {
        let key = Key::new(namespace, name);
        let deployment = self.deployments.get(&key)?;
        let siblings = [
            self.services.get(&key).map(|object| applied(&*object)),
            self.accounts.get(&key).map(|object| applied(&*object)),
            self.bindings.get(&key).map(|object| applied(&*object)),
        ];
        let fingerprint = applied(&*deployment);
        let whole = siblings
            .iter()
            .all(|sibling| sibling.as_ref() == Some(&fingerprint));
        let status = deployment.status.as_ref();
        let ready = status
            .and_then(|status| status.ready_replicas)
            .unwrap_or_default();
        Some(SeenRouter {
            fingerprint: fingerprint.filter(|_| whole).unwrap_or_default(),
            ready: u32::try_from(ready).unwrap_or_default(),
            leaving: deployment.metadata.deletion_timestamp.is_some(),
            trouble: self.router_trouble(namespace, name),
        })
    }

    /// Why one of a router's pods takes no requests: a Secret that is not there, say, or one that it cannot use.
    fn router_trouble(&self, namespace: &str, name: &str) -> Option<String> {
        let pods = self.pods.within(namespace);
        let mut waiting: Vec<_> = pods
            .iter()
            .filter(|pod| {
                pod.labels()
                    .get(labels::ROUTER)
                    .is_some_and(|router| router == name)
            })
            .filter(|pod| pod.metadata.deletion_timestamp.is_none() && !pods::is_ready(pod))
            .collect();
        waiting.sort_by_key(|pod| pod.name_any());
        waiting
            .into_iter()
            .find_map(|pod| pods::trouble(pod).or_else(|| self.not_mounted(pod)))
    }

    fn surroundings(&self, model: &SwallowModel, key: &Key) -> Option<String> {
        let key = Key::new(&key.namespace, labels::worker_name(&key.name));
        let (service, account, budget) = (
            self.services.get(&key)?,
            self.accounts.get(&key)?,
            self.budgets.get(&key)?,
        );
        let uid = model.metadata.uid.as_deref();
        let ours = owned_by(&*service, uid) && owned_by(&*account, uid) && owned_by(&*budget, uid);
        let fingerprint = applied(&*service)?;
        let same = [applied(&*account), applied(&*budget)]
            .iter()
            .all(|other| other.as_ref() == Some(&fingerprint));
        (ours && same).then_some(fingerprint)
    }

    fn seen_revisions(&self, model: &SwallowModel, key: &Key) -> Vec<SeenRevision> {
        let label = |object: &ControllerRevision, name: &str| object.labels().get(name).cloned();
        self.revisions
            .within(&key.namespace)
            .iter()
            .filter(|revision| owned_by(&***revision, model.metadata.uid.as_deref()))
            .filter_map(|revision| {
                Some(SeenRevision {
                    name: revision.name_any(),
                    uid: revision.uid()?,
                    revision: label(revision, labels::REVISION)?,
                    number: revision.revision,
                    record: revision.data.clone()?.0,
                })
            })
            .collect()
    }

    /// Asks workers for their state, for ever.
    pub async fn ask_workers(self: Arc<Self>) {
        let mut probes = Probes::default();
        let mut keys: HashMap<String, Key> = HashMap::new();
        let mut ticks = interval(ASK_STARTING);
        let mut n_ticks: u64 = 0;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    n_ticks += 1;
                    self.ask(&mut probes, &mut keys, n_ticks.is_multiple_of(ASK_READY_EACH));
                    if n_ticks.is_multiple_of(FORGET_EACH) {
                        self.forget(&mut keys);
                    }
                }
                Some(answer) = probes.next() => {
                    if let Whom::Group(uid) = answer.whom
                        && let Some(state) = answer.body.filter(Value::is_object)
                    {
                        self.learn(&uid, Told::read(&state), keys.get(&uid));
                    }
                }
            }
        }
    }

    fn ask(&self, probes: &mut Probes, keys: &mut HashMap<String, Key>, ready_too: bool) {
        for pod in self.pods.all() {
            let ready_and_known = pods::is_ready(&pod) && self.told_memory(&pod);
            let works = pods::answers(&pod) && (ready_too || !ready_and_known);
            let wanted = is_worker(&pod) && (works || pods::fetches(&pod));
            let ip = pod.status.as_ref().and_then(|status| status.pod_ip.as_ref());
            let (true, Some(ip), Some(uid), Some(model)) =
                (wanted, ip, pod.uid(), pod.labels().get(labels::MODEL))
            else {
                continue;
            };
            let Ok(ip) = ip.parse::<IpAddr>() else { continue };
            keys.insert(uid.clone(), Key::new(pod.namespace().unwrap_or_default(), model));
            probes.ask(Whom::Group(uid), SocketAddr::new(ip, WORKER_HTTP_PORT), "/state");
        }
    }

    /// Whether a worker has told the memory that it measured when it was loaded.
    fn told_memory(&self, pod: &Pod) -> bool {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        pod.metadata
            .uid
            .as_ref()
            .and_then(|uid| told.get(uid))
            .is_some_and(|told| told.memory.is_some())
    }

    fn learn(&self, uid: &str, told: Told, key: Option<&Key>) {
        let mut all = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.insert(uid.to_owned(), told.clone());
        drop(all);
        if before.is_none_or(|before| (&before.phase, before.memory) != (&told.phase, told.memory))
            && let Some(key) = key
        {
            self.queue.changed(key.clone());
        }
    }

    fn forget(&self, keys: &mut HashMap<String, Key>) {
        let there: HashSet<String> = self.pods.all().iter().filter_map(|pod| pod.uid()).collect();
        keys.retain(|uid, _| there.contains(uid));
        self.told
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|uid, _| there.contains(uid));
        self.moved_lock().retain(|uid, _| there.contains(uid));
    }

    fn moved_lock(&self) -> MutexGuard<'_, HashMap<String, (Phase, Timestamp)>> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused_lock(&self) -> MutexGuard<'_, HashMap<Key, CreateRefused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Models by condition and its status, for metrics.
    pub fn models_by_condition(&self) -> BTreeMap<(String, String), i64> {
        let mut counts = BTreeMap::new();
        for model in self.models.all() {
            for condition in model.status.iter().flat_map(|status| &status.conditions) {
                *counts
                    .entry((condition.kind.clone(), format!("{:?}", condition.status)))
                    .or_default() += 1;
            }
        }
        counts
    }
}

/// What a watch is about.
struct Target<'a> {
    client: &'a Client,
    namespace: Option<&'a str>,
}

impl Target<'_> {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        match self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// Follows objects that are made for models: a change of one is a reason to look at its model.
    fn follow_ours<K>(
        &self,
        world: &Arc<World>,
        cache: impl Fn(&World) -> &Cache<K> + Send + 'static,
        tasks: &mut JoinSet<()>,
        synced: &mut Vec<watch::Receiver<bool>>,
    ) where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let stream = watcher(self.api::<K>(), managed());
        self.follow(world, cache, stream, tasks, synced, world.toucher());
    }

    fn follow<K>(
        &self,
        world: &Arc<World>,
        cache: impl Fn(&World) -> &Cache<K> + Send + 'static,
        stream: impl futures::Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send + 'static,
        tasks: &mut JoinSet<()>,
        synced: &mut Vec<watch::Receiver<bool>>,
        touched: impl Fn(&K) + Send + 'static,
    ) where
        K: Resource + Clone + Send + Sync + 'static,
    {
        let (tell, told) = watch::channel(false);
        synced.push(told);
        let namespace = self.namespace.map(str::to_owned);
        let world = world.clone();
        tasks.spawn(async move { cache(&world).follow(stream, namespace, tell, touched).await });
    }
}

fn managed() -> watcher::Config {
    watcher::Config::default().labels(labels::MANAGED)
}

fn is_worker(pod: &Pod) -> bool {
    pod.labels()
        .get(labels::ROLE)
        .is_some_and(|role| role == "worker")
}

/// Leaves of a pod what it takes of its node.
fn only_room(pod: &mut Pod) {
    let Some(spec) = pod.spec.take() else { return };
    let resources_of = |container: Container| Container {
        name: container.name,
        resources: container.resources,
        ..Container::default()
    };
    let init = spec.init_containers.unwrap_or_default();
    pod.spec = Some(PodSpec {
        node_name: spec.node_name,
        containers: spec.containers.into_iter().map(resources_of).collect(),
        init_containers: Some(init.into_iter().map(resources_of).collect()),
        ..PodSpec::default()
    });
    let phase = pod.status.take().and_then(|status| status.phase);
    pod.status = Some(PodStatus {
        phase,
        ..PodStatus::default()
    });
    pod.metadata.annotations = None;
}

/// Whether the object goes with the model of this uid.
pub fn owned_by(object: &impl Resource, uid: Option<&str>) -> bool {
    let owners = object.meta().owner_references.as_deref().unwrap_or_default();
    owners.iter().any(|owner| Some(owner.uid.as_str()) == uid)
}

fn applied(object: &impl Resource) -> Option<String> {
    object.meta().annotations.as_ref()?.get(labels::APPLIED).cloned()
}
