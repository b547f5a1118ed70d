//! Secrets as files. What a kubelet mounts into a pod is written here into a folder that is this user's alone; it goes
//! when this process ends, unless it is killed.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use swallow_plan::{
    Valid,
    launch::{ModelSource, RouterLaunch},
};
use tempfile::TempDir;

use crate::file::{Errors, Place, Secrets};

/// The folder of files, a folder for each Secret below it.
#[derive(Debug)]
pub struct Mounted {
    /// Absent where nobody names a Secret.
    folder: Option<TempDir>,
}

/// What a group reads of Secrets.
#[derive(Clone, Debug, Default)]
pub struct GroupSecrets {
    /// The folder of its certificate, its key and the authorities of routers.
    pub tls: Option<PathBuf>,
    /// The file of the access token for its model's files.
    pub token: Option<PathBuf>,
}

/// A Secret that a field of a model names, and what has to be in it.
struct Need {
    field: &'static str,
    place: Place,
    entries: Vec<String>,
}

const CERTIFICATE: [&str; 2] = ["tls.crt", "tls.key"];
const BOTH_WAYS: [&str; 3] = ["tls.crt", "tls.key", "ca.crt"];

impl Mounted {
    /// Writes the Secrets that these models name. `has_token`: tokens come from elsewhere.
    ///
    /// # Errors
    /// A line for each that is not in the file, or lacks an entry.
    pub fn new(valids: &[&Valid], secrets: &Secrets, has_token: bool) -> Result<Self, Errors> {
        let mut errors = Vec::new();
        let mut named = Vec::new();
        for valid in valids {
            for need in needs(valid, has_token) {
                match missing(&need, secrets) {
                    Some(line) => errors.push(format!("{}: {}: {line}", valid.name, need.field)),
                    None => named.push(need.place),
                }
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let mut mounted = Self { folder: None };
        if named.is_empty() {
            return Ok(mounted);
        }
        let failed = |error: io::Error| {
            vec![format!(
                "{}: Secrets cannot be written there: {error}; choose another folder with TMPDIR",
                env::temp_dir().display()
            )]
        };
        let mut builder = tempfile::Builder::new();
        builder
            .prefix("swallow-secrets-")
            .permissions(fs::Permissions::from_mode(0o700));
        let folder = builder.tempdir().map_err(failed)?;
        named.sort();
        named.dedup();
        for place in &named {
            write(&path(folder.path(), place), secrets, place).map_err(failed)?;
        }
        mounted.folder = Some(folder);
        Ok(mounted)
    }

    /// Puts the files of a model's Secrets in the place of those in a pod.
    pub fn of_router(&self, valid: &Valid, router: &mut RouterLaunch) {
        let file = |secret: &Option<String>, entry: &str| {
            let name = secret.as_ref()?;
            Some(self.folder(valid, name).join(entry))
        };
        let args = &mut router.args;
        let keys = router.api_keys.as_ref();
        args.api_keys = keys.map(|keys| self.folder(valid, &keys.name).join(&keys.key));
        args.tls_cert = file(&router.tls_secret, "tls.crt");
        args.tls_key = file(&router.tls_secret, "tls.key");
        args.worker_ca = file(&router.worker_tls_secret, "ca.crt");
        args.worker_cert = file(&router.worker_tls_secret, "tls.crt");
        args.worker_key = file(&router.worker_tls_secret, "tls.key");
    }

    /// What the groups of a model read; `token_file` goes before a Secret.
    pub fn of_groups(&self, valid: &Valid, token_file: Option<&Path>) -> GroupSecrets {
        let mutual = valid.spec.router.mutual_tls.as_ref();
        let token = match &valid.source {
            ModelSource::Fetch { token, .. } => token.as_ref(),
            _ => None,
        };
        GroupSecrets {
            tls: mutual.map(|tls| self.folder(valid, &tls.worker_secret_name)),
            token: token.map(|token| match token_file {
                Some(file) => file.to_owned(),
                None => self.folder(valid, &token.name).join(&token.key),
            }),
        }
    }

    fn folder(&self, valid: &Valid, secret: &str) -> PathBuf {
        let folder = self
            .folder
            .as_ref()
            .expect("it is made where a model names a Secret");
        path(folder.path(), &(valid.namespace.clone(), secret.to_owned()))
    }
}

/// The Secrets that a model names.
fn needs(valid: &Valid, has_token: bool) -> Vec<Need> {
    let router = &valid.spec.router;
    let need = |field, name: &str, entries: &[&str]| Need {
        field,
        place: (valid.namespace.clone(), name.to_owned()),
        entries: entries.iter().map(|&entry| entry.to_owned()).collect(),
    };
    let mut needs = Vec::new();
    if let Some(keys) = &router.api_keys_secret_ref {
        needs.push(need("spec.router.apiKeysSecretRef", &keys.name, &[&keys.key]));
    }
    if let Some(name) = &router.tls_secret_name {
        needs.push(need("spec.router.tlsSecretName", name, &CERTIFICATE));
    }
    if let Some(tls) = &router.mutual_tls {
        let (worker, router) = (&tls.worker_secret_name, &tls.router_secret_name);
        needs.push(need("spec.router.mutualTls.workerSecretName", worker, &BOTH_WAYS));
        needs.push(need("spec.router.mutualTls.routerSecretName", router, &BOTH_WAYS));
    }
    if let ModelSource::Fetch {
        token: Some(token), ..
    } = &valid.source
        && !has_token
    {
        let field = "spec.model.source.huggingFace.tokenSecretRef";
        needs.push(need(field, &token.name, &[&token.key]));
    }
    needs
}

/// What is not there of what is needed.
fn missing(need: &Need, secrets: &Secrets) -> Option<String> {
    let (namespace, name) = &need.place;
    let Some(entries) = secrets.get(&need.place) else {
        let or = if need.field.ends_with("tokenSecretRef") {
            ", or give --token-file"
        } else {
            ""
        };
        return Some(format!(
            "there is no Secret {name} of namespace {namespace} in the file: add it as a document of its own{or}"
        ));
    };
    let lacks: Vec<&str> = need
        .entries
        .iter()
        .map(String::as_str)
        .filter(|entry| entries.get(entry).is_none())
        .collect();
    if lacks.is_empty() {
        return None;
    }
    let has: Vec<&str> = entries.iter().map(|(entry, _)| entry).collect();
    let has = if has.is_empty() {
        "nothing".to_owned()
    } else {
        has.join(", ")
    };
    Some(format!("Secret {name} has no {}; it has {has}", lacks.join(", ")))
}

fn path(folder: &Path, (namespace, name): &Place) -> PathBuf {
    folder.join(namespace).join(name)
}

/// Writes the entries of a Secret as files that are this user's alone.
fn write(folder: &Path, secrets: &Secrets, place: &Place) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let entries = secrets.get(place).into_iter().flat_map(|entries| entries.iter());
    for (entry, bytes) in entries {
        let mut file = fs::OpenOptions::new();
        file.write(true).create_new(true).mode(0o600);
        file.open(folder.join(entry))?.write_all(bytes)?;
    }
    Ok(())
}
