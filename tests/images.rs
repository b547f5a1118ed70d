//! The images of the programs: the same programs give the same bytes, and an image holds what its program needs and no more.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;
use swallow_tests::{program, root};

const PROGRAMS: [&str; 3] = ["swallow-operator", "swallow-router", "swallow-worker"];

fn build(out: &Path) {
    let operator = program("swallow-operator");
    let done = Command::new(root().join("deploy/images/build"))
        .arg(out)
        .arg("--bin-dir")
        .arg(operator.parent().expect("a program is in a folder"))
        .output()
        .expect("it can be run");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The names and contents of a tar's files, unpacked by the system's own tar.
fn files(tar: &Path) -> BTreeMap<String, Vec<u8>> {
    let list = Command::new("tar")
        .arg("-tf")
        .arg(tar)
        .output()
        .expect("tar is everywhere");
    let names = String::from_utf8(list.stdout).expect("names are text");
    names
        .lines()
        .filter(|name| !name.ends_with('/'))
        .map(|name| {
            let mut child = Command::new("tar")
                .args(["-xOf"])
                .arg(tar)
                .arg(name)
                .stdout(Stdio::piped())
                .spawn()
                .expect("tar is everywhere");
            let mut bytes = Vec::new();
            let mut stdout = child.stdout.take().expect("it is piped");
            stdout.read_to_end(&mut bytes).expect("it is readable");
            assert!(
                child.wait().expect("it ends").success(),
                "{name} in {}",
                tar.display()
            );
            (name.to_owned(), bytes)
        })
        .collect()
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("it is JSON")
}

#[test]
fn images_are_the_same_every_time_and_hold_what_is_needed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    build(&first);
    build(&second);
    for name in PROGRAMS {
        let archive = first.join(format!("{name}.tar"));
        let bytes = fs::read(&archive).expect("it was written");
        let again = fs::read(second.join(format!("{name}.tar"))).expect("it was written");
        assert!(bytes == again, "{name}: two runs gave two archives");

        let members = files(&archive);
        let blob = |descriptor: &Value| -> &[u8] {
            let digest = descriptor["digest"].as_str().expect("a digest");
            &members[&format!("blobs/{}", digest.replace(':', "/"))]
        };
        let index = json(&members["index.json"]);
        let reference = format!("docker.io/library/{name}:{}", env!("CARGO_PKG_VERSION"));
        assert_eq!(
            index["manifests"][0]["annotations"]["io.containerd.image.name"],
            reference
        );
        let manifest = json(blob(&index["manifests"][0]));
        let config = json(blob(&manifest["config"]));
        assert_eq!(
            config["config"]["User"], "65532:65532",
            "nobody in particular, and not root"
        );
        assert_eq!(config["config"]["Entrypoint"][0], name);

        let mut held = Vec::new();
        for (at, layer) in manifest["layers"].as_array().expect("layers").iter().enumerate() {
            let path = folder.path().join(format!("{name}-{at}.tar.gz"));
            fs::write(&path, blob(layer)).expect("the folder is ours");
            held.extend(files(&path).into_keys());
        }
        let has = |ending: &str| held.iter().any(|path| path.ends_with(ending));
        for needed in [
            "libc.so.6",
            "etc/ssl/certs/ca-certificates.crt",
            &format!("usr/bin/{name}"),
        ] {
            assert!(has(needed), "{name} lacks {needed}: {held:?}");
        }
        assert!(
            held.iter().any(|path| path.contains("/ld-linux")),
            "{name} has no loader: {held:?}"
        );
        let programs = held.iter().filter(|path| path.contains("bin/")).count();
        assert_eq!(programs, 1, "no shell and no other program: {held:?}");
    }
}
