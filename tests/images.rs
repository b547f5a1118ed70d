//! The images of the programs: the same programs give the same bytes, and an image holds what its program needs and no more.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use swallow_tests::{has_gpu, program, root};

const PROGRAMS: [&str; 3] = ["swallow-operator", "swallow-router", "swallow-worker"];

fn build(out: &Path) {
    build_with(out, &[]);
}

fn build_with(out: &Path, more: &[&Path]) {
    let operator = program("swallow-operator");
    let done = Command::new(root().join("deploy/images/build"))
        .arg(out)
        .arg("--bin-dir")
        .arg(operator.parent().expect("a program is in a folder"))
        .args(more)
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

/// As `--cuda` does it, with a library and a kernel that are none: the real ones have 700 MB, and `tests/cuda_image` looks
/// at these.
#[test]
fn a_workers_image_for_gpus_has_libraries_with_what_they_need_and_asks_for_a_driver_alone() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    for name in ["libs", "kernels", "root"] {
        fs::create_dir(path(name)).expect("the folder is ours");
    }
    fs::write(path("kernels").join("a-sm_90a.cubin"), "code").expect("the folder is ours");
    fs::write(path("a.c"), "int answer(void) { return 42; }").expect("the folder is ours");
    let library = path("libs").join("libnccl.so.2");
    let mut compile = Command::new("cc");
    compile
        .args(["-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(path("a.c"));
    // What NCCL needs, and no program of ours.
    run(compile.args(["-Wl,--no-as-needed", "-lstdc++"]));
    let out = path("out");
    build_with(
        &out,
        &[
            Path::new("--cuda-libs"),
            &path("libs"),
            Path::new("--cuda-kernels"),
            &path("kernels"),
        ],
    );
    let root = path("root");
    for layer in ["base", "cuda-libraries", "cuda-kernels", "swallow-worker"] {
        let layer = out.join(format!("layers/{layer}.tar.gz"));
        run(Command::new("tar").arg("-xzf").arg(layer).arg("-C").arg(&root));
    }
    let held = files_below(&root);
    let find = |name: &str| {
        let found = held
            .iter()
            .find(|path| path.file_name().is_some_and(|file| file == name));
        found.unwrap_or_else(|| panic!("the image has no {name}: {held:?}"))
    };
    assert_eq!(
        find("libnccl.so.2").parent(),
        find("libc.so.6").parent(),
        "the loader looks there"
    );
    find("libstdc++.so.6");
    assert!(root.join("usr/share/swallow/kernels/a-sm_90a.cubin").is_file());
    let archive = files(&out.join("swallow-worker.tar"));
    let layers = archive.keys().filter(|name| name.starts_with("blobs/")).count();
    assert_eq!(layers, 6, "four layers, a manifest and a configuration");
    if !has_gpu() {
        asks_for_a_driver(&root, &held);
    }
}

/// Runs the unpacked worker with its own loader and libraries.
fn asks_for_a_driver(root: &Path, held: &[PathBuf]) {
    let named = |begin: &str| {
        let begins = |path: &&PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(begin))
        };
        held.iter().find(begins).expect("it is in the image")
    };
    let output = Command::new(named("ld-linux"))
        .args(["--inhibit-cache", "--library-path"])
        .arg(named("libc.so.6").parent().expect("it is in a folder"))
        .arg(root.join("usr/bin/swallow-worker"))
        .args([
            "serve",
            "--device=cuda",
            "--model=llama-3-8b",
            "--load-format=dummy",
            "--served-name=m",
        ])
        .args([
            "--replica-id=r",
            "--grpc-listen=127.0.0.1:0",
            "--http-listen=127.0.0.1:0",
        ])
        .args(["--log-format=json"])
        .output()
        .expect("the loader starts");
    let said = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = said.lines().filter(|line| line.contains("\"ERROR\"")).collect();
    assert!(!output.status.success() && errors.len() == 1, "{said}");
    assert!(
        errors[0].contains("--device=cuda: NVIDIA's driver (libcuda.so.1) is missing"),
        "{said}"
    );
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("it was unpacked").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn run(command: &mut Command) {
    let done = command.output().expect("it can be run");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}
