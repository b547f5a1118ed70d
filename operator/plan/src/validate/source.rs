//! Where the model's files come from: exactly one kind, with sound paths and a pinned revision.

use super::Problems;
use crate::{
    launch::{CacheVolume, FetchLaunch, ModelSource},
    model::{CacheType, EngineLoadFormat, HuggingFaceSource, Model, Source, SourceType, SwallowModelSpec},
    topology::Shape,
};

/// Ids that a made-up tokenizer needs: one a byte, a beginning and an end.
const DUMMY_VOCABULARY_MIN: u32 = 258;

/// Where the files of a model are; `shape` is its size, if known.
pub(super) fn source(
    spec: &SwallowModelSpec,
    shape: Option<&Shape>,
    problems: &mut Problems,
) -> Option<ModelSource> {
    let dummy = spec.engine.load_format == EngineLoadFormat::Dummy;
    match &spec.model.source {
        Some(source) => {
            problems.check(
                !dummy || source.kind != SourceType::HuggingFace,
                "spec.model.source.type",
                "is HuggingFace, whose weights a Dummy model would fetch and not read: write model.shape instead of \
                 source, or use a folder",
            );
            of_files(source, &spec.model, problems)
        }
        None if dummy => made(&spec.model, shape, problems),
        None => {
            let message = "is missing: say where the model's files are, or set engine.loadFormat: Dummy and model.shape";
            problems.add("spec.model.source", message);
            None
        }
    }
}

/// A model that needs no files at all.
fn made(model: &Model, shape: Option<&Shape>, problems: &mut Problems) -> Option<ModelSource> {
    problems.check(
        model.cache.is_none(),
        "spec.model.cache",
        "is only for a source of type HuggingFace: leave it out",
    );
    if model.shape.is_none() {
        let message = "is missing: a Dummy model without a source needs its size";
        problems.add("spec.model.shape", message);
    }
    let shape = shape?;
    let enough = shape.vocab_size >= DUMMY_VOCABULARY_MIN;
    problems.check(
        enough,
        "spec.model.shape.numbers.vocabularySize",
        "is too small for a tokenizer to be made: write at least 258",
    );
    enough.then(|| ModelSource::Made {
        config: shape.to_config_json(),
    })
}

fn of_files(source: &Source, model: &Model, problems: &mut Problems) -> Option<ModelSource> {
    let Source {
        kind,
        host_path,
        persistent_volume_claim,
        hugging_face,
    } = source;
    let before = problems.0.len();
    for (there, belongs, field, type_name) in [
        (
            host_path.is_some(),
            *kind == SourceType::HostPath,
            "hostPath",
            "HostPath",
        ),
        (
            persistent_volume_claim.is_some(),
            *kind == SourceType::PersistentVolumeClaim,
            "persistentVolumeClaim",
            "PersistentVolumeClaim",
        ),
        (
            hugging_face.is_some(),
            *kind == SourceType::HuggingFace,
            "huggingFace",
            "HuggingFace",
        ),
    ] {
        let field = format!("spec.model.source.{field}");
        if belongs && !there {
            problems.add(
                field,
                format!("is missing: it is needed when type is {type_name}"),
            );
        } else if there && !belongs {
            problems.add(field, format!("is only for type {type_name}: leave it out"));
        }
    }
    if model.cache.is_some() && *kind != SourceType::HuggingFace {
        problems.add(
            "spec.model.cache",
            "is only for a source of type HuggingFace: leave it out",
        );
    }
    let dotted = |path: &str| path.split('/').any(|part| part == "..");
    if let Some(host) = host_path {
        let good = host.path.starts_with('/') && !dotted(&host.path);
        problems.check(
            good,
            "spec.model.source.hostPath.path",
            "write an absolute path without ..",
        );
    }
    if let Some(claim) = persistent_volume_claim {
        let good = !claim.path.starts_with('/') && !dotted(&claim.path);
        let field = "spec.model.source.persistentVolumeClaim.path";
        problems.check(
            good,
            field,
            "write a path relative to the volume's root, without ..",
        );
    }
    let fetched = hugging_face.as_ref().map(|source| {
        check_hugging_face(source, problems);
        let cache = cache(model, problems);
        let fetch = FetchLaunch {
            repo: source.repo.clone(),
            revision: source.revision.clone(),
            endpoint: source.endpoint.clone(),
        };
        ModelSource::Fetch {
            fetch,
            token: source.token_secret_ref.clone(),
            ca: source.ca_config_map_ref.clone(),
            cache,
        }
    });
    if problems.0.len() > before {
        return None;
    }
    match kind {
        SourceType::HostPath => host_path.as_ref().map(|host| ModelSource::HostPath {
            path: host.path.clone(),
        }),
        SourceType::PersistentVolumeClaim => {
            persistent_volume_claim.as_ref().map(|claim| ModelSource::Claim {
                claim: claim.claim_name.clone(),
                path: claim.path.trim_end_matches('/').to_owned(),
            })
        }
        SourceType::HuggingFace => fetched,
    }
}

fn check_hugging_face(source: &HuggingFaceSource, problems: &mut Problems) {
    let at = |field: &str| format!("spec.model.source.huggingFace.{field}");
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    };
    let good = source
        .repo
        .split_once('/')
        .is_some_and(|(owner, name)| part(owner) && part(name));
    problems.check(
        good,
        &at("repo"),
        "write OWNER/NAME, such as tokyotech-llm/Llama-3-Swallow-8B-Instruct-v0.1",
    );
    let good = source.revision.len() == 40
        && source
            .revision
            .chars()
            .all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
    problems.check(
        good,
        &at("revision"),
        "write the full commit, 40 hexadecimal digits in lower case: branches and tags can change",
    );
    if let Some(endpoint) = &source.endpoint {
        let rest = endpoint
            .strip_prefix("https://")
            .or_else(|| endpoint.strip_prefix("http://"));
        let good = rest.is_some_and(|rest| !rest.is_empty() && !rest.contains([' ', '?', '#', '@']));
        let message = "write a URL such as https://mirror.example, without user, query or fragment";
        problems.check(good, &at("endpoint"), message);
    }
}

fn cache(model: &Model, problems: &mut Problems) -> CacheVolume {
    let cache = model.cache.clone().unwrap_or_default();
    let field = "spec.model.cache";
    match (cache.kind, cache.persistent_volume_claim) {
        (CacheType::EmptyDir, claim) => {
            problems.check(
                claim.is_none(),
                &format!("{field}.persistentVolumeClaim"),
                "is only for type PersistentVolumeClaim: leave it out",
            );
            let size_limit = cache.empty_dir.and_then(|folder| folder.size_limit);
            problems.whole(&format!("{field}.emptyDir.sizeLimit"), size_limit.as_ref());
            CacheVolume::EmptyDir { size_limit }
        }
        (CacheType::PersistentVolumeClaim, claim) => {
            problems.check(
                cache.empty_dir.is_none(),
                &format!("{field}.emptyDir"),
                "is only for type EmptyDir: leave it out",
            );
            if claim.is_none() {
                let message = "is missing: it is needed when type is PersistentVolumeClaim";
                problems.add(format!("{field}.persistentVolumeClaim"), message);
            }
            CacheVolume::Claim {
                claim: claim.map(|claim| claim.claim_name).unwrap_or_default(),
            }
        }
    }
}
