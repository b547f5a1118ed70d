//! The commands that print: they need no cluster, and what they print is whole.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde::Deserialize;
use serde_json::Value;

/// The largest CRD: `kubectl apply` and Helm both have limits, and a user has patience.
const CRD_BYTES_MAX: usize = 100_000;

fn operator(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_swallow-operator"))
        .args(args)
        .output()
        .expect("the operator starts")
}

fn text(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).expect("YAML is UTF-8")
}

fn documents(yaml: &str) -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(yaml)
        .map(|one| Value::deserialize(one).expect("it is YAML"))
        .collect()
}

fn samples() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models");
    let entries = fs::read_dir(folder).expect("the samples are there");
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .collect()
}

#[test]
fn the_definition_is_small_and_documented() {
    let yaml = text(&operator(&["crd"]));
    assert!(yaml.len() < CRD_BYTES_MAX, "{} bytes", yaml.len());
    let crd = &documents(&yaml)[0];
    let version = &crd["spec"]["versions"][0];
    assert_eq!(
        version["subresources"]["scale"]["specReplicasPath"],
        ".spec.replicas"
    );
    let schema = &version["schema"]["openAPIV3Schema"]["properties"];
    assert!(
        schema["status"]["properties"].get("phase").is_none(),
        "conditions say what is true"
    );
    for part in ["spec", "status"] {
        documented(&schema[part], part);
    }
}

/// Every field says what it is, beginning with its name, as `kubectl explain` shows it.
fn documented(schema: &Value, path: &str) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let about = field["description"].as_str().unwrap_or_default();
        assert!(
            about.starts_with(name.as_str()),
            "{path} is not documented: '{about}'"
        );
        documented(field, &path);
        documented(&field["items"], &path);
    }
}

#[test]
fn samples_become_objects_with_their_memory_plans() {
    let samples = samples();
    assert!(samples.len() >= 3, "{samples:?}");
    for sample in samples {
        let sample = sample.display().to_string();
        let yaml = text(&operator(&["plan", "-f", &sample]));
        assert!(
            yaml.starts_with("# ") && yaml.contains("\n# memory plan: "),
            "{sample}: {yaml}"
        );
        let kinds: Vec<String> = documents(&yaml)
            .iter()
            .filter_map(|object| object["kind"].as_str().map(str::to_owned))
            .collect();
        for kind in [
            "Pod",
            "Deployment",
            "Service",
            "ServiceAccount",
            "PodDisruptionBudget",
        ] {
            assert!(
                kinds.iter().any(|found| found == kind),
                "{sample}: no {kind} in {kinds:?}"
            );
        }
    }
}

#[test]
fn pods_satisfy_the_restricted_standard() {
    for sample in samples() {
        let yaml = text(&operator(&["plan", "-f", &sample.display().to_string()]));
        for object in documents(&yaml) {
            let spec = match object["kind"].as_str() {
                Some("Pod") => &object["spec"],
                Some("Deployment") => &object["spec"]["template"]["spec"],
                _ => continue,
            };
            assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
            assert_eq!(
                spec["securityContext"]["seccompProfile"]["type"],
                "RuntimeDefault"
            );
            let lists = ["containers", "initContainers"]
                .map(|list| spec[list].as_array().cloned().unwrap_or_default());
            for container in lists.concat() {
                let security = &container["securityContext"];
                assert_eq!(security["allowPrivilegeEscalation"], false);
                assert_eq!(security["capabilities"]["drop"][0], "ALL");
                assert_eq!(security["readOnlyRootFilesystem"], true);
            }
        }
    }
}

#[test]
fn models_with_one_router_name_share_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("models.yaml");
    let model = |name: &str, seconds: u32| {
        format!(
            "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata: {{name: {name}}}\nspec:\n  model: \
             {{source: {{type: HostPath, hostPath: {{path: /m}}}}}}\n  accelerator: {{device: CPU}}\n  router: {{name: \
             front, limits: {{maxQueueSeconds: {seconds}}}}}\n"
        )
    };
    let name = file.display().to_string();
    fs::write(&file, format!("{}---\n{}", model("a", 60), model("b", 60))).expect("the folder is ours");
    let objects = documents(&text(&operator(&["plan", "-f", &name])));
    let routers: Vec<&Value> = objects
        .iter()
        .filter(|object| object["kind"] == "Deployment")
        .collect();
    assert_eq!(routers.len(), 1);
    let args = routers[0]["spec"]["template"]["spec"]["containers"][0]["args"].to_string();
    assert!(
        args.contains("--discover=a=a-worker") && args.contains("--discover=b=b-worker"),
        "{args}"
    );

    fs::write(&file, format!("{}---\n{}", model("a", 60), model("b", 61))).expect("the folder is ours");
    let output = operator(&["plan", "-f", &name]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.contains("b: spec.router: does not agree with the one of a"),
        "{stderr}"
    );
}

#[test]
fn every_mistake_is_a_line_with_field_and_advice() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("model.yaml");
    let yaml = "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata: {name: m}\nspec:\n  model:\n    source: \
                {type: HuggingFace, huggingFace: {repo: name, revision: 012345678901234567890123456789012345main}}\n    shape: \
                {preset: llama-3-70b}\n  accelerator: {deviceMemory: 80Gi}\n  parallelism: {tensor: 3}\n  rollout: {maxSurge: 0, \
                maxUnavailable: 0}\n";
    fs::write(&file, yaml).expect("the folder is ours");
    let output = operator(&["plan", "-f", &file.display().to_string()]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<&str> = stderr.lines().collect();
    for (line, words) in lines.iter().zip([
        "m: spec.model.source.huggingFace.repo: write OWNER/NAME",
        "m: spec.model.source.huggingFace.revision: write the full commit",
        "m: spec.rollout: maxSurge and maxUnavailable are both 0",
        "m: spec.parallelism.tensor: 3 does not divide the model's 64 attention heads: write 1, 2, 4, 8, 16, 32, 64",
    ]) {
        assert!(line.contains(words), "'{words}' is not in '{line}'");
    }
    assert_eq!(lines.len(), 4, "{stderr}");

    let tight = yaml
        .replace("repo: name", "repo: owner/name")
        .replace("012345678901234567890123456789012345main", &"0a".repeat(20))
        .replace("tensor: 3", "tensor: 1")
        .replace("maxSurge: 0", "maxSurge: 1");
    fs::write(&file, tight).expect("the folder is ours");
    let output = operator(&["plan", "-f", &file.display().to_string()]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("m: spec: not enough memory: ") && stderr.contains("parallelism.tensor: 2 fits"),
        "{stderr}"
    );
}

#[test]
fn a_chat_template_reaches_the_worker_as_it_is_written() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("model.yaml");
    let yaml = "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata: {name: m}\nspec:\n  accelerator: {device: \
                CPU}\n  model: {source: {type: HostPath, hostPath: {path: /m}}}\n  engine:\n    chatTemplate: |-\n      {{- '東京 \
                $(HOME) $$' -}}\n      {%- if tools %}{{ tools }}{% endif %}\n";
    fs::write(&file, yaml).expect("the folder is ours");
    let objects = documents(&text(&operator(&["plan", "-f", &file.display().to_string()])));
    let pod = objects.iter().find(|object| object["kind"] == "Pod");
    let args = &pod.expect("one group")["spec"]["containers"][0]["args"];
    let args: Vec<&str> = args
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    // Kubernetes takes `$$` for a dollar, and puts nothing for a variable then.
    let expected = "--chat-template={{- '東京 $$(HOME) $$$$' -}}\n{%- if tools %}{{ tools }}{% endif %}";
    assert!(args.contains(&expected), "{args:?}");
}

#[test]
fn what_fetches_gets_token_and_authority_and_tells_its_progress() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("model.yaml");
    let yaml = "apiVersion: serving.swallow.dev/v1alpha1\nkind: SwallowModel\nmetadata: {name: m}\nspec:\n  accelerator: {device: \
                CPU}\n  model: {source: {type: HuggingFace, huggingFace: {repo: o/n, revision: \
                \"0123456789012345678901234567890123456789\", tokenSecretRef: {name: hub}, caConfigMapRef: {name: \
                mirror-ca}}}}\n";
    fs::write(&file, yaml).expect("the folder is ours");
    let objects = documents(&text(&operator(&["plan", "-f", &file.display().to_string()])));
    let pod = objects
        .iter()
        .find(|object| object["kind"] == "Pod")
        .expect("one group");
    let fetch = &pod["spec"]["initContainers"][0];
    let args = fetch["args"].to_string();
    for flag in [
        "--token-file=/etc/swallow/token/token",
        "--ca-file=/etc/swallow/ca/ca.pem",
        "--http-listen=0.0.0.0:",
    ] {
        assert!(args.contains(flag), "no {flag} in {args}");
    }
    let volume = |name: &str| {
        let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
        volumes
            .into_iter()
            .find(|volume| volume["name"] == name)
            .unwrap_or_else(|| panic!("no volume {name}"))
    };
    assert_eq!(volume("ca")["configMap"]["name"], "mirror-ca");
    assert_eq!(volume("ca")["configMap"]["items"][0]["key"], "ca.crt");
    assert_eq!(volume("token")["secret"]["secretName"], "hub");
    let mounts = |container: &Value| container["volumeMounts"].to_string();
    assert!(mounts(fetch).contains("/etc/swallow/ca"));
    let worker = &pod["spec"]["containers"][0];
    assert!(
        !mounts(worker).contains("/etc/swallow"),
        "the worker has no use for them"
    );
}

/// The file that `local` takes is planned as well, and nothing of its Secrets is printed.
#[test]
fn secrets_beside_models_are_left_out() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("model.yaml");
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/models/secured.yaml");
    let sample = fs::read_to_string(sample).expect("the sample is there");
    let plan = |yaml: &str| {
        fs::write(&file, yaml).expect("the folder is ours");
        text(&operator(&["plan", "-f", &file.display().to_string()]))
    };
    let secret =
        "---\napiVersion: v1\nkind: Secret\nmetadata: {name: secured-keys}\nstringData: {keys.json: hush}\n";
    let alone = plan(&sample);
    assert!(alone.contains("secretName: secured-keys"), "{alone}");
    assert_eq!(plan(&(sample + secret)), alone);
}
