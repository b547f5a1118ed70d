//! One replica works at a time: who holds the Lease.
//!
//! Clocks of other machines are not trusted: a holder counts as gone when its record has not changed for as long as the
//! lease lasts, by the clock of whoever looks.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use swallow_plan::Timestamp;
use tokio::time::{Instant, sleep};

use super::apply::MANAGER;

/// How long a holder that says nothing stays the holder.
const LASTS: Duration = Duration::from_secs(15);
/// A holder that could not renew for so long stops its work: less than `LASTS`, so that two never work at once.
const GIVE_UP: Duration = Duration::from_secs(10);
/// How often a holder renews, and others look.
const RENEW: Duration = Duration::from_secs(3);

/// The lease, seen by one that wants it.
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// The record as it was when it last changed, and when that was.
    watched: Option<(Option<String>, Instant)>,
}

impl Election {
    /// Takes part under a name of its own.
    pub fn new(api: Api<Lease>, name: String, identity: String) -> Self {
        Self {
            api,
            name,
            identity,
            watched: None,
        }
    }

    /// Waits until the lease is ours; `heard` is called after each answer of the API server.
    pub async fn win(&mut self, heard: impl Fn()) {
        loop {
            match self.attempt().await {
                Ok(true) => {
                    heard();
                    return;
                }
                Ok(false) => heard(),
                Err(error) => tracing::warn!(lease = self.name, %error, "the lease cannot be had now"),
            }
            sleep(RENEW).await;
        }
    }

    /// Keeps the lease, until it is lost.
    pub async fn keep(&mut self) {
        let mut renewed = Instant::now();
        loop {
            sleep(RENEW).await;
            let left = GIVE_UP.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.attempt()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(error)) => tracing::warn!(lease = self.name, %error, "the lease was not renewed"),
                Err(_) => return,
            }
            if renewed.elapsed() >= GIVE_UP {
                return;
            }
        }
    }

    /// Lets go of the lease, so that another one need not wait.
    pub async fn release(&self) {
        let released = async {
            let lease = self.api.get(&self.name).await?;
            if holder(&lease) == Some(self.identity.as_str()) {
                self.write(&lease, "", false).await?;
            }
            Ok::<(), kube::Error>(())
        };
        if let Err(error) = released.await {
            tracing::warn!(lease = self.name, %error, "the lease was not released and runs out by itself");
        }
    }

    /// Takes or renews the lease if it is free or ours. Says whether it is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            return won(self.create().await);
        };
        let version = lease.resource_version();
        if self.watched.as_ref().is_none_or(|(known, _)| *known != version) {
            self.watched = Some((version, Instant::now()));
        }
        let changed = self.watched.as_ref().map_or_else(Instant::now, |(_, at)| *at);
        let holder = holder(&lease).unwrap_or_default();
        let ours = holder == self.identity;
        if !ours && !holder.is_empty() && changed.elapsed() < LASTS {
            return Ok(false);
        }
        let identity = self.identity.clone();
        won(self.write(&lease, &identity, !ours).await)
    }

    async fn create(&self) -> Result<(), kube::Error> {
        let now = MicroTime(Timestamp::now());
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: Some(LASTS.as_secs() as i32),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_transitions: Some(0),
                ..LeaseSpec::default()
            }),
        };
        self.api.create(&PostParams::default(), &lease).await.map(drop)
    }

    /// Writes the holder, if nobody wrote meanwhile.
    async fn write(&self, lease: &Lease, identity: &str, acquired: bool) -> Result<(), kube::Error> {
        let now = MicroTime(Timestamp::now());
        let mut spec = json!({
            "holderIdentity": identity,
            "leaseDurationSeconds": LASTS.as_secs(),
            "renewTime": now,
        });
        if acquired {
            let before = lease.spec.as_ref().and_then(|spec| spec.lease_transitions);
            spec["acquireTime"] = json!(now);
            spec["leaseTransitions"] = json!(before.unwrap_or_default().saturating_add(1));
        }
        let patch = json!({ "metadata": { "resourceVersion": lease.resource_version() }, "spec": spec });
        let params = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        self.api
            .patch(&self.name, &params, &Patch::Merge(&patch))
            .await
            .map(drop)
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref()
}

/// Another one was quicker: it is not ours, and nothing is wrong.
fn won(outcome: Result<(), kube::Error>) -> Result<bool, kube::Error> {
    match outcome {
        Ok(()) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}
