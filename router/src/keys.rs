//! API keys: who asks, what share of the replicas is theirs, and how much they may ask at once.
//!
//! The file has digests of keys, never keys. It is read again when it changes; one that cannot be read, or makes no
//! sense, changes nothing. Without a file nobody is told apart and any key will do, or none.

use std::{
    collections::HashMap,
    convert::Infallible,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Json,
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use swallow_policy::{Priority, TenantId};
use tonic::Status;
use tower::{Service, service_fn};
use tracing::{error, info};

use crate::http::{Front, Protocol};

/// Between two looks at the file. A mounted Secret takes a minute to arrive anyway.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// More keys than any file of a Secret, which has a megabyte, can hold.
const KEYS_MAX: usize = 10_000;
/// Pages that are read without a key.
const OPEN_PATHS: [&str; 3] = ["/health", "/readyz", "/metrics"];
/// The same over gRPC.
const OPEN_SERVICES: [&str; 2] = ["/grpc.health.v1.Health/", "/grpc.reflection."];

/// Whose request it is, and what that means in the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose.
    pub tenant: TenantId,
    /// What the file of keys calls them; `None` where nobody is told apart.
    pub name: Option<Arc<str>>,
    /// Against other tenants.
    pub weight: u32,
    /// Before whom.
    pub priority: Priority,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            tenant: TenantId::default(),
            name: None,
            weight: 1,
            priority: Priority::default(),
        }
    }
}

tokio::task_local! {
    static SHARE: Share;
}

/// The share of the request that the present task serves.
pub(crate) fn share() -> Share {
    SHARE.try_with(Share::clone).unwrap_or_default()
}

/// A file of keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It is not there, or not ours to read.
    #[error("--api-keys: cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what is expected.
    #[error(
        "--api-keys: {path}: {why}; expected {{\"keys\": [{{\"sha256\": DIGEST, \"tenant\": NAME, \"weight\": 1..1000, \
         \"priority\": \"low\" | \"normal\" | \"high\", \"max_open_requests\": N}}]}}, the last three optional"
    )]
    Parse {
        /// Which.
        path: PathBuf,
        /// What.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    keys: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    sha256: String,
    tenant: String,
    weight: Option<u32>,
    priority: Option<Rank>,
    max_open_requests: Option<u32>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Rank {
    Low,
    Normal,
    High,
}

/// A key's owner.
#[derive(Clone, Debug)]
struct Owner {
    name: Arc<str>,
    share: Share,
    max_open: Option<u32>,
    /// Of the key; it stays when the file changes.
    open: Arc<AtomicU32>,
}

type Owners = HashMap<[u8; 32], Owner>;

/// The keys of a file. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ApiKeys(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    owners: RwLock<Arc<Owners>>,
}

impl ApiKeys {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn load(path: &Path) -> Result<Self, KeysError> {
        let owners = parse(path, &read(path)?, &Owners::new())?;
        info!(path = %path.display(), keys = owners.len(), "API keys are asked for");
        Ok(Self(Arc::new(Inner {
            path: path.to_owned(),
            owners: RwLock::new(Arc::new(owners)),
        })))
    }

    /// Follows the file, for ever.
    pub async fn follow(self) {
        // What was loaded at the start is not known here: the first look loads it once more, which changes nothing.
        let mut seen = Vec::new();
        loop {
            self.look(&mut seen);
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Reads the file, and takes it over if it is not what was `seen` and makes sense.
    pub fn look(&self, seen: &mut Vec<u8>) {
        let path = &self.0.path;
        let loaded = read(path).and_then(|text| {
            if text == *seen {
                return Ok(None);
            }
            // A file that makes no sense is told of once.
            seen.clone_from(&text);
            parse(path, &text, &self.owners()).map(Some)
        });
        match loaded {
            Ok(None) => {}
            Ok(Some(owners)) => {
                info!(path = %path.display(), keys = owners.len(), "API keys were read");
                let mut place = self.0.owners.write().unwrap_or_else(PoisonError::into_inner);
                *place = Arc::new(owners);
            }
            Err(error) => error!(%error, "the API keys stay as they were"),
        }
    }

    fn owners(&self) -> Arc<Owners> {
        Arc::clone(&self.0.owners.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn owner(&self, headers: &HeaderMap) -> Option<Owner> {
        let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, key) = value.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        // Looked up by its digest: how long that takes tells nothing of other keys.
        let digest: [u8; 32] = Sha256::digest(key.trim()).into();
        self.owners().get(&digest).cloned()
    }

    /// `front`, for those who have a key.
    pub fn guard(&self, front: Front, protocol: Protocol) -> Front {
        let keys = self.clone();
        Front::new(service_fn(move |request| {
            let (keys, front) = (keys.clone(), front.clone());
            async move { keys.answer(request, front, protocol).await }
        }))
    }

    async fn answer(
        &self,
        request: Request,
        mut front: Front,
        protocol: Protocol,
    ) -> Result<Response, Infallible> {
        let path = request.uri().path();
        let is_open = match protocol {
            Protocol::Http => OPEN_PATHS.contains(&path),
            Protocol::Grpc => OPEN_SERVICES.iter().any(|service| path.starts_with(service)),
        };
        if is_open {
            return front.call(request).await;
        }
        let Some(owner) = self.owner(request.headers()) else {
            return Ok(Denied::NoKey.answer(protocol));
        };
        let Some(place) = Place::take(&owner) else {
            let most = owner.max_open.unwrap_or_default();
            return Ok(Denied::TooMany { most }.answer(protocol));
        };
        tracing::debug!(tenant = &*owner.name, path, "authenticated");
        let response = SHARE.scope(owner.share, front.call(request)).await?;
        // Its place is taken until the last byte of the answer.
        Ok(response.map(|inner| Body::new(Held { inner, _place: place })))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, KeysError> {
    std::fs::read(path).map_err(|source| KeysError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Owners of a file's keys; those that were there `before` keep their tenant's number and what they have open.
fn parse(path: &Path, text: &[u8], before: &Owners) -> Result<Owners, KeysError> {
    let wrong = |why: String| KeysError::Parse {
        path: path.to_owned(),
        why,
    };
    let file: File = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
    if file.keys.len() > KEYS_MAX {
        return Err(wrong(format!(
            "{} keys are more than {KEYS_MAX}",
            file.keys.len()
        )));
    }
    // 0 is nobody's.
    let mut tenants: HashMap<Arc<str>, TenantId> = before
        .values()
        .map(|owner| (Arc::clone(&owner.name), owner.share.tenant))
        .collect();
    let mut last = tenants.values().map(|tenant| tenant.0).max().unwrap_or(0);
    let mut owners = Owners::new();
    for (i, entry) in file.keys.into_iter().enumerate() {
        let digest = digest(&entry.sha256)
            .ok_or_else(|| wrong(format!("keys[{i}].sha256 is not 64 hexadecimal digits")))?;
        let weight = entry.weight.unwrap_or(1);
        if !(1..=1000).contains(&weight) {
            return Err(wrong(format!("keys[{i}].weight is {weight}, not 1 to 1000")));
        }
        if entry.tenant.is_empty() {
            return Err(wrong(format!("keys[{i}].tenant is empty")));
        }
        let name: Arc<str> = entry.tenant.into();
        let tenant = *tenants.entry(Arc::clone(&name)).or_insert_with(|| {
            last += 1;
            TenantId(last)
        });
        let priority = match entry.priority.unwrap_or(Rank::Normal) {
            Rank::Low => Priority::Low,
            Rank::Normal => Priority::Normal,
            Rank::High => Priority::High,
        };
        let owner = Owner {
            share: Share {
                tenant,
                name: Some(Arc::clone(&name)),
                weight,
                priority,
            },
            name,
            max_open: entry.max_open_requests,
            open: before
                .get(&digest)
                .map_or_else(Arc::default, |owner| Arc::clone(&owner.open)),
        };
        if owners.insert(digest, owner).is_some() {
            return Err(wrong(format!("keys[{i}].sha256 is there twice")));
        }
    }
    Ok(owners)
}

fn digest(text: &str) -> Option<[u8; 32]> {
    let mut digest = [0; 32];
    // A sign is a digit to `from_str_radix`.
    if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (i, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(digest)
}

/// Why a request is not let in.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Denied {
    #[error("no API key that is known here; send one as 'Authorization: Bearer KEY'")]
    NoKey,
    #[error("this API key has {most} open requests already, as many as it may; wait for one of them to end")]
    TooMany { most: u32 },
}

impl Denied {
    fn answer(self, protocol: Protocol) -> Response {
        let text = self.to_string();
        if protocol == Protocol::Grpc {
            return match self {
                Self::NoKey => Status::unauthenticated(text).into_http(),
                Self::TooMany { .. } => Status::resource_exhausted(text).into_http(),
            };
        }
        let (status, kind, code) = match self {
            Self::NoKey => (
                StatusCode::UNAUTHORIZED,
                "invalid_request_error",
                "invalid_api_key",
            ),
            Self::TooMany { .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "too_many_open_requests",
            ),
        };
        let body = json!({"error": {"message": text, "type": kind, "param": null, "code": code}});
        let mut response = (status, Json(body)).into_response();
        let (name, value) = match self {
            Self::NoKey => (header::WWW_AUTHENTICATE, "Bearer"),
            Self::TooMany { .. } => (header::RETRY_AFTER, "1"),
        };
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
        response
    }
}

/// One of a key's open requests.
struct Place(Arc<AtomicU32>);

impl Place {
    fn take(owner: &Owner) -> Option<Self> {
        let place = Self(Arc::clone(&owner.open));
        let open = place.0.fetch_add(1, Ordering::AcqRel);
        // Dropped, it is given back.
        owner.max_open.is_none_or(|most| open < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Held {
    inner: Body,
    _place: Place,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(digit: char, rest: &str) -> String {
        let digest = String::from(digit).repeat(64);
        format!(r#"{{"sha256": "{digest}"{rest}}}"#)
    }

    fn parsed(entries: &[String], before: &Owners) -> Result<Owners, String> {
        let text = format!(r#"{{"keys": [{}]}}"#, entries.join(","));
        parse(Path::new("keys.json"), text.as_bytes(), before).map_err(|error| error.to_string())
    }

    #[test]
    fn tenants_keep_their_numbers_and_what_they_have_open() {
        let first = [
            entry('a', r#", "tenant": "one""#),
            entry(
                'b',
                r#", "tenant": "two", "weight": 5, "priority": "high", "max_open_requests": 1"#,
            ),
            entry('c', r#", "tenant": "one", "priority": "low""#),
        ];
        let owners = parsed(&first, &Owners::new()).expect("sound");
        let of = |owners: &Owners, byte: u8| owners[&[byte; 32]].clone();
        let (a, b, c) = (of(&owners, 0xaa), of(&owners, 0xbb), of(&owners, 0xcc));
        assert_eq!(a.share.tenant, c.share.tenant);
        assert_ne!(a.share.tenant, b.share.tenant);
        assert_eq!((b.share.weight, b.share.priority), (5, Priority::High));
        let _held = Place::take(&b).expect("the first");
        assert!(Place::take(&b).is_none());
        let second = [
            entry('d', r#", "tenant": "three""#),
            entry('b', r#", "tenant": "two", "max_open_requests": 2"#),
        ];
        let owners = parsed(&second, &owners).expect("sound");
        let (again, new) = (of(&owners, 0xbb), of(&owners, 0xdd));
        assert_eq!(again.share.tenant, b.share.tenant);
        assert!(![a.share.tenant, b.share.tenant, TenantId(0)].contains(&new.share.tenant));
        let _second = Place::take(&again).expect("two are allowed now");
        assert!(Place::take(&again).is_none());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (entries, what) in [
            (vec![r#"{"sha256": "ab", "tenant": "t"}"#.to_owned()], "64"),
            (
                vec![format!(r#"{{"sha256": "{}", "tenant": "t"}}"#, "+f".repeat(32))],
                "64",
            ),
            (vec![entry('a', r#", "tenant": """#)], "keys[0].tenant"),
            (
                vec![entry('a', r#", "tenant": "t", "weight": 0"#)],
                "keys[0].weight",
            ),
            (
                vec![entry('a', r#", "tenant": "t", "key": "secret""#)],
                "unknown field",
            ),
            (
                vec![entry('a', r#", "tenant": "t""#), entry('a', r#", "tenant": "u""#)],
                "twice",
            ),
        ] {
            let error = parsed(&entries, &Owners::new()).expect_err(what);
            assert!(error.contains(what) && error.contains("--api-keys"), "{error}");
        }
    }
}
