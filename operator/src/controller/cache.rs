//! Objects as the API server last told them, kept by watches.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Bound,
    sync::{Arc, PoisonError, RwLock},
};

use futures::{Stream, StreamExt};
use kube::{
    Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use tokio::sync::watch;

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Empty for what is in no namespace.
    pub namespace: String,
    /// Unique in the namespace.
    pub name: String,
}

impl Key {
    /// A key.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The key of an object.
    pub fn of(object: &impl Resource) -> Self {
        Self::new(
            object.meta().namespace.clone().unwrap_or_default(),
            object.meta().name.clone().unwrap_or_default(),
        )
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Objects of one kind.
#[derive(Debug)]
pub struct Cache<K>(RwLock<BTreeMap<Key, Arc<K>>>);

impl<K> Default for Cache<K> {
    fn default() -> Self {
        Self(RwLock::new(BTreeMap::new()))
    }
}

impl<K: Resource + Clone> Cache<K> {
    /// One object.
    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        self.read(|objects| objects.get(key).cloned())
    }

    /// All objects of a namespace.
    pub fn within(&self, namespace: &str) -> Vec<Arc<K>> {
        let first = Bound::Included(Key::new(namespace, ""));
        self.read(|objects| {
            objects
                .range((first, Bound::Unbounded))
                .take_while(|(key, _)| key.namespace == namespace)
                .map(|(_, object)| object.clone())
                .collect()
        })
    }

    /// All objects.
    pub fn all(&self) -> Vec<Arc<K>> {
        self.read(|objects| objects.values().cloned().collect())
    }

    /// Takes what the API server answered to a write, if the watch has not told something newer already.
    pub fn learn(&self, object: K) {
        self.put(object, |known, object| version(known) < version(object));
    }

    /// Follows a watch for ever. `touched` is told each object that came, changed or went; `synced` turns true when
    /// the first list is complete. `namespace` is what the watch is about, `None` for all.
    pub async fn follow(
        &self,
        stream: impl Stream<Item = Result<Event<K>, watcher::Error>> + Send,
        namespace: Option<String>,
        synced: watch::Sender<bool>,
        touched: impl Fn(&K) + Send,
    ) where
        K: Send + Sync + 'static,
    {
        let mut stream = std::pin::pin!(stream.default_backoff());
        let mut listed = BTreeSet::new();
        while let Some(event) = stream.next().await {
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(object)) => {
                    listed.insert(Key::of(&object));
                    touched(&object);
                    // A list is the truth, also when the API server was set back to an earlier state.
                    self.put(object, |_, _| true);
                }
                Ok(Event::InitDone) => {
                    let gone = |key: &Key| {
                        namespace
                            .as_ref()
                            .is_none_or(|namespace| key.namespace == *namespace)
                            && !listed.contains(key)
                    };
                    let keys: Vec<Key> =
                        self.read(|objects| objects.keys().filter(|key| gone(key)).cloned().collect());
                    for key in keys {
                        self.remove(&key, &touched);
                    }
                    listed.clear();
                    synced.send_replace(true);
                }
                Ok(Event::Apply(object)) => {
                    touched(&object);
                    // The answer to a write of ours may have been faster than the news of what was before it.
                    self.put(object, |known, object| {
                        known.uid() != object.uid() || version(known) <= version(object)
                    });
                }
                Ok(Event::Delete(object)) => self.remove(&Key::of(&object), &touched),
                Err(error) => {
                    tracing::warn!(%error, kind = std::any::type_name::<K>(), "a watch broke and is begun again")
                }
            }
        }
    }

    /// Keeps the object, unless one is known that it does not follow.
    fn put(&self, mut object: K, follows: impl FnOnce(&K, &K) -> bool) {
        // A large part of an object, and nobody here reads it.
        object.meta_mut().managed_fields = None;
        self.write(|objects| {
            let key = Key::of(&object);
            if objects.get(&key).is_none_or(|known| follows(known, &object)) {
                objects.insert(key, Arc::new(object));
            }
        });
    }

    fn remove(&self, key: &Key, touched: &impl Fn(&K)) {
        if let Some(object) = self.write(|objects| objects.remove(key)) {
            touched(&object);
        }
    }

    fn read<T>(&self, read: impl FnOnce(&BTreeMap<Key, Arc<K>>) -> T) -> T {
        // Nothing panics while it holds the lock.
        read(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<T>(&self, write: impl FnOnce(&mut BTreeMap<Key, Arc<K>>) -> T) -> T {
        write(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Counts up with every change of anything in the cluster.
fn version(object: &impl Resource) -> Option<u64> {
    let version = object.meta().resource_version.as_ref()?;
    version.parse().ok()
}
