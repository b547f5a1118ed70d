//! Replicas from Kubernetes: one watch on the EndpointSlices of each Service, all of them one set.
//!
//! List, then watch from the list's version; a version that is too old (410 Gone) begins again with the list. While
//! the API server is away the last set stays, and so does a version from which a later watch may go on: replicas are
//! judged by their sessions, not by it. kube's own watcher is not used, because it does not tell that a quiet watch
//! was opened anew, and so not how old the picture is.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api, Client, Config, Error,
    api::{ListParams, WatchEvent, WatchParams},
};
use swallow_proto::launch::DiscoverTarget;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Discover, Fixed, Replica, slices::replicas};
use crate::{
    observe::{Observer, WatchEnd},
    pauses::Pauses,
};

/// The label of a slice that names its Service.
const SERVICE: &str = "kubernetes.io/service-name";
/// The API server ends a watch after this time, so that a connection that is gone without a word is found.
const WATCH_SECONDS: u32 = 60;
/// A list, or a watch's beginning, takes this long or is given up; so late may a watch's end be.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// Waits between attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A watch that ends earlier than this did not go well.
const SOON: Duration = Duration::from_secs(5);
/// An outage that lasts is told again after this time.
const REMIND: Duration = Duration::from_secs(60);

/// The API server cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// This is no pod, or one without a token.
    #[error(
        "--discover: this process has no access to a Kubernetes API server ({0}); run it in a pod whose service account \
         token is mounted, or name replicas with --replica"
    )]
    NotInCluster(String),
    /// The account's files cannot be used.
    #[error("--discover: the service account cannot be used: {0}")]
    Client(#[source] Box<Error>),
}

/// The API server that a pod is given, with the namespace to look in: `namespace`, or the pod's own.
///
/// # Errors
/// This is no pod.
pub fn in_cluster(namespace: Option<&str>) -> Result<(Client, String), ClusterError> {
    let mut config = Config::incluster().map_err(|error| ClusterError::NotInCluster(error.to_string()))?;
    config.connect_timeout = Some(ANSWER_LIMIT);
    let namespace = namespace.map_or_else(|| config.default_namespace.clone(), str::to_owned);
    let client = Client::try_from(config).map_err(|error| ClusterError::Client(Box::new(error)))?;
    Ok((client, namespace))
}

/// The models of some Services, and replicas that never change beside them.
pub struct Cluster {
    /// Speaks with the API server.
    pub client: Client,
    /// Where the Services are.
    pub namespace: String,
    /// A model each.
    pub targets: Vec<DiscoverTarget>,
    /// Replicas besides.
    pub fixed: Fixed,
    /// Is told how fresh the picture is.
    pub observer: Arc<dyn Observer>,
}

impl Discover for Cluster {
    /// The first set comes when every Service was listed: a part would look like a whole.
    fn changes(self) -> impl Stream<Item = Vec<Replica>> + Send + 'static {
        let mut known: Vec<Option<Vec<Replica>>> = vec![None; self.targets.len()];
        let api: Api<EndpointSlice> = Api::namespaced(self.client, &self.namespace);
        let mut watches = SelectAll::new();
        for (at, target) in self.targets.into_iter().enumerate() {
            let watch = Watch::new(api.clone(), target, Arc::clone(&self.observer));
            let sets = stream::unfold(
                watch,
                |mut watch| async move { Some((watch.change().await, watch)) },
            );
            watches.push(sets.map(move |set| (at, set)).boxed());
        }
        let fixed = self.fixed.0;
        if watches.is_empty() {
            return stream::iter([fixed]).boxed();
        }
        let whole = move |(at, set): (usize, Vec<Replica>)| {
            known[at] = Some(set);
            let whole = known.iter().cloned().collect::<Option<Vec<_>>>();
            let whole = whole.map(|sets| fixed.iter().cloned().chain(sets.into_iter().flatten()).collect());
            std::future::ready(whole)
        };
        watches.filter_map(whole).boxed()
    }

    fn models(&self) -> Vec<Vec<String>> {
        let served = |target: &DiscoverTarget| target.served_names.clone();
        self.targets.iter().map(served).collect()
    }
}

/// What the next step is.
enum Step {
    List,
    /// From the known version on.
    Open,
    Hear {
        events: BoxStream<'static, kube::Result<WatchEvent<EndpointSlice>>>,
        since: Instant,
    },
}

/// The API server does not answer.
struct Outage {
    since: Instant,
    told: Instant,
}

/// The watch of one Service.
struct Watch {
    api: Api<EndpointSlice>,
    target: DiscoverTarget,
    observer: Arc<dyn Observer>,
    step: Step,
    slices: BTreeMap<String, EndpointSlice>,
    version: String,
    /// Last told; `None` before the first list.
    set: Option<Vec<Replica>>,
    pauses: Pauses,
    outage: Option<Outage>,
}

impl Watch {
    fn new(api: Api<EndpointSlice>, target: DiscoverTarget, observer: Arc<dyn Observer>) -> Self {
        observer.discovery_stale(&target.served_names[0], Some(Instant::now().into_std()));
        Self {
            api,
            target,
            observer,
            step: Step::List,
            slices: BTreeMap::new(),
            version: String::new(),
            set: None,
            pauses: Pauses::new(PAUSES),
            outage: None,
        }
    }

    fn model(&self) -> &str {
        &self.target.served_names[0]
    }

    /// Waits until the set differs from the last one.
    async fn change(&mut self) -> Vec<Replica> {
        loop {
            if self.advance().await {
                let set = replicas(self.slices.values(), &self.target);
                if self.set.as_ref() != Some(&set) {
                    info!(
                        model = self.model(),
                        service = self.target.service,
                        endpoints = set.len(),
                        "discovered"
                    );
                    self.observer.endpoints(self.model(), set.len());
                    self.set = Some(set.clone());
                    return set;
                }
            }
        }
    }

    /// One step. True: the slices may have changed.
    async fn advance(&mut self) -> bool {
        match std::mem::replace(&mut self.step, Step::Open) {
            Step::List => self.list().await,
            Step::Open => {
                self.open().await;
                false
            }
            Step::Hear { mut events, since } => {
                let end = since + Duration::from_secs(WATCH_SECONDS.into()) + ANSWER_LIMIT;
                match tokio::time::timeout_at(end, events.next()).await {
                    Ok(Some(Ok(event))) => {
                        self.step = Step::Hear { events, since };
                        self.hear(event).await
                    }
                    Ok(Some(Err(error))) => {
                        self.failed(&error).await;
                        false
                    }
                    Ok(None) => {
                        self.closed(since).await;
                        false
                    }
                    Err(_) => {
                        self.lost("the watch did not end when it should".into()).await;
                        false
                    }
                }
            }
        }
    }

    async fn list(&mut self) -> bool {
        let params = ListParams::default().labels(&format!("{SERVICE}={}", self.target.service));
        let listed = tokio::time::timeout(ANSWER_LIMIT, self.api.list(&params)).await;
        match listed {
            Ok(Ok(list)) => {
                self.version = list.metadata.resource_version.unwrap_or_default();
                self.slices = list.items.into_iter().map(named).collect();
                self.fresh();
                true
            }
            Ok(Err(error)) => {
                self.failed(&error).await;
                self.step = Step::List;
                false
            }
            Err(_) => {
                self.lost("no answer to a list".into()).await;
                self.step = Step::List;
                false
            }
        }
    }

    async fn open(&mut self) {
        let params = WatchParams::default()
            .labels(&format!("{SERVICE}={}", self.target.service))
            .timeout(WATCH_SECONDS);
        let opened = tokio::time::timeout(ANSWER_LIMIT, self.api.watch(&params, &self.version)).await;
        match opened {
            Ok(Ok(events)) => {
                self.fresh();
                let (events, since) = (events.boxed(), Instant::now());
                self.step = Step::Hear { events, since };
            }
            Ok(Err(error)) => self.failed(&error).await,
            Err(_) => self.lost("no answer to a watch".into()).await,
        }
    }

    async fn hear(&mut self, event: WatchEvent<EndpointSlice>) -> bool {
        let version = |slice: &EndpointSlice| slice.metadata.resource_version.clone().unwrap_or_default();
        let changed = match event {
            WatchEvent::Added(slice) | WatchEvent::Modified(slice) => {
                self.version = version(&slice);
                let (name, slice) = named(slice);
                self.slices.insert(name, slice);
                true
            }
            WatchEvent::Deleted(slice) => {
                self.version = version(&slice);
                self.slices.remove(&named(slice).0);
                true
            }
            WatchEvent::Bookmark(bookmark) => {
                self.version = bookmark.metadata.resource_version;
                false
            }
            WatchEvent::Error(status) => {
                self.failed(&Error::Api(status)).await;
                return false;
            }
        };
        self.fresh();
        self.pauses.reset();
        changed
    }

    /// The API server was heard.
    fn fresh(&mut self) {
        if let Some(outage) = self.outage.take() {
            info!(
                model = self.model(),
                seconds = outage.since.elapsed().as_secs(),
                "the API server answers again"
            );
        }
        self.observer.discovery_stale(self.model(), None);
    }

    /// A watch came to its end.
    async fn closed(&mut self, since: Instant) {
        self.observer.watch_ended(self.model(), WatchEnd::Closed);
        self.step = Step::Open;
        if since.elapsed() >= SOON {
            self.pauses.reset();
        } else {
            tokio::time::sleep(self.pauses.next()).await;
        }
    }

    /// A call or a watch failed: goes on from the known version if there is one that still counts.
    async fn failed(&mut self, error: &Error) {
        match error {
            Error::Api(status) if status.code == 410 => {
                self.observer.watch_ended(self.model(), WatchEnd::Expired);
                self.step = Step::List;
                tokio::time::sleep(self.pauses.next()).await;
            }
            // An event that cannot be read would come again; kube takes some such lines for a status without a code.
            Error::SerdeError(_) => self.unreadable().await,
            Error::Api(status) if status.code == 0 => self.unreadable().await,
            Error::Api(status) => {
                let right = "; the router's account needs the verbs get, list and watch on endpointslices of \
                             discovery.k8s.io";
                let right = if status.code == 403 { right } else { "" };
                self.lost(format!("{}{right}", status.message)).await;
            }
            error => self.lost(innermost(error)).await,
        }
    }

    async fn unreadable(&mut self) {
        self.lost("it sent an event that cannot be read".into()).await;
        self.step = Step::List;
    }

    /// The API server is away, or of no use.
    async fn lost(&mut self, why: String) {
        self.observer.watch_ended(self.model(), WatchEnd::Failed);
        let now = Instant::now();
        let is_news = match &mut self.outage {
            None => {
                self.outage = Some(Outage {
                    since: now,
                    told: now,
                });
                self.observer.discovery_stale(self.model(), Some(now.into_std()));
                true
            }
            Some(outage) => {
                let is_news = now - outage.told >= REMIND;
                if is_news {
                    outage.told = now;
                }
                is_news
            }
        };
        if is_news {
            let seconds = self
                .outage
                .as_ref()
                .map_or(0, |outage| (now - outage.since).as_secs());
            warn!(
                model = self.model(),
                service = self.target.service,
                seconds,
                why,
                "the API server cannot be asked; the last known replicas stay"
            );
        }
        self.step = Step::Open;
        tokio::time::sleep(self.pauses.next()).await;
    }
}

fn named(slice: EndpointSlice) -> (String, EndpointSlice) {
    (slice.metadata.name.clone().unwrap_or_default(), slice)
}

/// The cause that says something: the outer ones are "service error".
fn innermost(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.last().unwrap_or(error).to_string()
}
