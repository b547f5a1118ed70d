//! The chart renders what is written beside this file, for every value that switches something.

use std::fs;

use swallow_tests::root;

use crate::harness::Space;

const CASES: [(&str, &[&str]); 4] = [
    ("defaults", &[]),
    (
        "namespaced",
        &[
            "watchNamespaces={models,more}",
            "rbac.readNodes=false",
            "crds.install=false",
        ],
    ),
    (
        "observed",
        &[
            "podMonitor.enabled=true",
            "podMonitor.labels.release=prometheus",
            "networkPolicy.enabled=true",
        ],
    ),
    (
        "sample",
        &[
            "sampleModel.enabled=true",
            "sampleModel.spec.model.source.type=HostPath",
            "sampleModel.spec.model.source.hostPath.path=/srv/models/small",
            "sampleModel.spec.accelerator.device=CPU",
            "replicas=2",
            "image.repository=registry.example/swallow-operator",
            "workerImage=registry.example/swallow-worker:1",
        ],
    ),
];

/// Mistakes that the values' schema has to catch, each with a word of what Helm then says.
const REFUSED: [(&str, &str); 4] = [
    ("replica=2", "replica"),
    ("replicas=-1", "replicas"),
    ("watchNamespaces={Not_A_Name}", "watchNamespaces"),
    ("sampleModel.enabled=true", "model"),
];

pub fn templates_are_as_written(space: &Space<'_>) {
    let chart = root().join("charts/swallow");
    let path = chart.display().to_string();
    let linted = space
        .cluster
        .helm(&["lint", "--strict", &path])
        .expect("the chart is sound");
    assert!(linted.contains("0 chart(s) failed"), "{linted}");

    let mut different = Vec::new();
    for (name, values) in CASES {
        let mut words = vec!["template", "swallow", &path, "-n", "swallow-system"];
        for value in values {
            words.extend(["--set", value]);
        }
        let rendered = space.cluster.helm(&words).expect("it renders");
        // The house's rules compare the resource, whole.
        let (schema, rest): (Vec<&str>, Vec<&str>) = rendered
            .split("---\n")
            .partition(|document| document.contains("kind: CustomResourceDefinition\n"));
        let kept = schema
            .iter()
            .all(|document| document.contains("helm.sh/resource-policy: keep"));
        assert!(
            kept && schema.len() == usize::from(name != "namespaced"),
            "{name}: {} schemas",
            schema.len()
        );
        let rendered = rest.join("---\n");
        let golden = root().join(format!("tests/cluster/goldens/{name}.yaml"));
        if std::env::var_os("SWALLOW_UPDATE_GOLDENS").is_some() {
            fs::write(&golden, &rendered).expect("the tree can be written");
        }
        if fs::read_to_string(&golden).unwrap_or_default() != rendered {
            different.push(name);
        }
    }
    assert!(
        different.is_empty(),
        "{different:?} differ; with SWALLOW_UPDATE_GOLDENS=1 they are written anew, for git to show"
    );
    for (value, word) in REFUSED {
        let error = space
            .cluster
            .helm(&["template", &path, "--set", value])
            .expect_err("the schema refuses it");
        assert!(error.contains(word), "{value}: {error}");
    }
}

/// Another release in a namespace of its own, without operators: what is tried is what Helm makes, keeps and takes up again.
pub fn a_second_release_stands_beside_and_comes_again(space: &Space<'_>) {
    let chart = root().join("charts/swallow").display().to_string();
    let scope = format!("watchNamespaces={{{}}}", space.name);
    let install = || {
        let mut words = vec!["install", "second", &chart, "-n", &space.name];
        for value in [
            "replicas=0",
            "crds.install=false",
            &scope,
            "sampleModel.enabled=true",
            "sampleModel.spec.model.source.type=HostPath",
            "sampleModel.spec.model.source.hostPath.path=/srv/models/small",
            "sampleModel.spec.accelerator.device=CPU",
            "sampleModel.spec.suspend=true",
        ] {
            words.extend(["--set", value]);
        }
        space.cluster.helm(&words)
    };
    let uid = || space.kubectl(&["get", "swallowmodel", "sample", "-o", "jsonpath={.metadata.uid}"]);
    let notes = install().expect("it stands beside the first one");
    assert!(notes.contains("kubectl apply -f"), "{notes}");
    let first = uid();
    let kept = space
        .cluster
        .helm(&["uninstall", "second", "-n", &space.name])
        .expect("it is installed");
    let router = format!("{}-second-swallow-router", space.name);
    assert!(kept.contains(&router), "routers keep their rights: {kept}");
    install().expect("it takes up what it kept");
    assert_eq!(uid(), first, "a model outlives its release, and is not made anew");
    let _ = space.cluster.helm(&["uninstall", "second", "-n", &space.name]);
    let _ = space.cluster.kubectl(&["delete", "clusterrole", &router]);
}
