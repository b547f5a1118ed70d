"""Writes the container images of our programs as OCI archives, with nothing but the standard library.

Each image has two layers: what a program needs of the system (the C library, root certificates, a user), the same for all
three images, and the program. A worker for GPUs has two more: CUDA's libraries, and compiled kernels. The same inputs give the same
bytes: members are sorted, and owners and times are zero. What the programs need is asked from `ldd`, so an
image runs what was built beside it, and carries no shell and no package.

Beside the archives lie the bare layers, for the Containerfile.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
from pathlib import Path

PROGRAMS = {
    "swallow-operator": "The operator of Swallow models",
    "swallow-router": "gRPC and OpenAI HTTP in front of Swallow models",
    "swallow-worker": "One tensor-parallel group of a Swallow model",
}
# The user of the pods that the operator makes. No name is needed to run, but tools show one.
USER = 65532
CERTIFICATES = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"]
# NVIDIA's driver is brought in by the container runtime, and its libraries still name these empty shells of old C libraries.
DRIVER_NEEDS = ["libdl.so.2", "libpthread.so.0", "librt.so.1"]
EPOCH = "1970-01-01T00:00:00Z"
MEDIA = "application/vnd.oci.image"


class Missing(Exception):
    """Something that an image needs is not on this machine."""


class Layer:
    """The files of one layer; folders above them are made."""

    def __init__(self):
        self.members = {}

    def folder(self, path, mode=0o755):
        path = path.strip("/")
        if path and path not in self.members:
            self.folder(os.path.dirname(path))
            self.members[path] = (tarfile.DIRTYPE, mode, b"")

    def file(self, path, data, mode=0o644):
        self.folder(os.path.dirname(path.strip("/")))
        self.members[path.strip("/")] = (tarfile.REGTYPE, mode, data)

    def tar(self):
        """The layer as an uncompressed tar."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for path, (kind, mode, data) in sorted(self.members.items()):
                member = tarfile.TarInfo(path)
                member.type, member.mode, member.size = kind, mode, len(data)
                tar.addfile(member, io.BytesIO(data))
        return out.getvalue()


def libraries(program):
    """The shared libraries of a program, the loader among them, each at the path under which it is looked for."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True)
    if listed.returncode != 0:
        if "not a dynamic executable" in listed.stderr:
            return set()
        raise Missing(f"ldd {program}: {listed.stderr.strip()}")
    if "not found" in listed.stdout:
        raise Missing(f"{program} needs a library that is not here:\n{listed.stdout}")
    return set(re.findall(r"(/\S+) \(0x", listed.stdout))


def base(programs):
    """What all programs need of the system."""
    layer = Layer()
    needed = set().union(*(libraries(program) for program in programs))
    for library in sorted(needed):
        layer.file(library, Path(library).read_bytes(), 0o755)
    for c in (path for path in needed if Path(path).name == "libc.so.6"):
        for name in DRIVER_NEEDS:
            if (Path(c).parent / name).exists():
                layer.file(f"{Path(c).parent}/{name}", (Path(c).parent / name).read_bytes(), 0o755)
    bundle = next((path for path in CERTIFICATES if os.path.exists(path)), None)
    if bundle is None:
        raise Missing("no root certificates on this machine: install ca-certificates")
    layer.file(CERTIFICATES[0], Path(bundle).read_bytes())
    layer.file("/etc/passwd", f"swallow:x:{USER}:{USER}::/:/nologin\n".encode())
    layer.file("/etc/group", f"swallow:x:{USER}:\n".encode())
    layer.file("/etc/nsswitch.conf", b"hosts: files dns\n")
    layer.folder("/tmp", 0o1777)
    return layer


def cuda_libraries(folder, base):
    """CUDA's libraries beside the C library, where the loader finds them, and what they need beyond the base."""
    layer = Layer()
    found = sorted(path for path in folder.rglob("lib*.so*") if path.is_file())
    if not found:
        raise Missing(f"{folder} holds no libraries")
    beside = next(os.path.dirname(path) for path in base.members if os.path.basename(path) == "libc.so.6")
    for path in found:
        layer.file(f"{beside}/{path.name}", path.read_bytes(), 0o755)
    for library in sorted(set().union(*(libraries(path) for path in found))):
        if library.strip("/") not in base.members:
            layer.file(library, Path(library).read_bytes(), 0o755)
    return layer


def cuda_kernels(folder):
    """Compiled kernels, where a worker looks first."""
    layer = Layer()
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if not found:
        raise Missing(f"{folder} holds no kernels")
    for path in found:
        layer.file(f"/usr/share/swallow/kernels/{path.name}", path.read_bytes())
    return layer


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def descriptor(kind, data, **more):
    return {"mediaType": f"{MEDIA}.{kind}", "digest": digest(data), "size": len(data), **more}


def as_json(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def image(reference, config, layers):
    """The blobs and the index of one image, and its digest. `layers` are pairs of a tar and its compressed form."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    described = as_json({
        "created": EPOCH,
        "architecture": architecture,
        "os": "linux",
        "config": {"WorkingDir": "/", **config},
        "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar, _ in layers]},
        "history": [{"created": EPOCH, "created_by": "deploy/images/build"} for _ in layers],
    })
    manifest = as_json({
        "schemaVersion": 2,
        "mediaType": f"{MEDIA}.manifest.v1+json",
        "config": descriptor("config.v1+json", described),
        "layers": [descriptor("layer.v1.tar+gzip", compressed) for _, compressed in layers],
    })
    annotations = {
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
    }
    index = as_json({
        "schemaVersion": 2,
        "mediaType": f"{MEDIA}.index.v1+json",
        "manifests": [descriptor(
            "manifest.v1+json",
            manifest,
            platform={"architecture": architecture, "os": "linux"},
            annotations=annotations,
        )],
    })
    return [described, manifest, *(compressed for _, compressed in layers)], index, digest(manifest)


def archive(path, blobs, index):
    """An OCI layout as a tar; it appears under its name only when it is whole."""
    layer = Layer()
    layer.file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    layer.file("index.json", index)
    for blob in blobs:
        layer.file("blobs/sha256/" + digest(blob).removeprefix("sha256:"), blob)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(layer.tar())
    unfinished.rename(path)


def packed(layer):
    tar = layer.tar()
    # No time and no name in its header. The level trades a tenth of the size for half of the time.
    return tar, gzip.compress(tar, compresslevel=4, mtime=0)


def program_config(name, version):
    """How an image of ours runs."""
    environment = ["PATH=/usr/bin", f"SSL_CERT_FILE={CERTIFICATES[0]}"]
    if name == "swallow-worker":
        # Asks NVIDIA's runtime for what computes, and not for graphics. Means nothing elsewhere.
        environment.append("NVIDIA_DRIVER_CAPABILITIES=compute,utility")
    return {
        "User": f"{USER}:{USER}",
        "Env": environment,
        "Entrypoint": [name],
        "Labels": {
            "org.opencontainers.image.title": name,
            "org.opencontainers.image.description": PROGRAMS[name],
            "org.opencontainers.image.version": version,
            "org.opencontainers.image.licenses": "Apache-2.0",
        },
    }


def build(arguments):
    programs = {name: arguments.bin_dir / name for name in PROGRAMS}
    absent = [str(path) for path in programs.values() if not path.is_file()]
    if absent:
        raise Missing(f"not built: {', '.join(absent)}; run `cargo build --release --bins` first")
    out = arguments.out
    (out / "layers").mkdir(parents=True, exist_ok=True)
    system = base(programs.values())
    common = packed(system)
    (out / "layers/base.tar.gz").write_bytes(common[1])
    for name, path in programs.items():
        program = Layer()
        program.file(f"/usr/bin/{name}", path.read_bytes(), 0o755)
        layers = [common, packed(program)]
        (out / f"layers/{name}.tar.gz").write_bytes(layers[-1][1])
        if name == "swallow-worker":
            # What changes with every version of ours comes last.
            more = []
            if arguments.cuda_libs:
                more.append(("cuda-libraries", packed(cuda_libraries(arguments.cuda_libs, system))))
            if arguments.cuda_kernels:
                more.append(("cuda-kernels", packed(cuda_kernels(arguments.cuda_kernels))))
            for layer, (_, compressed) in more:
                (out / f"layers/{layer}.tar.gz").write_bytes(compressed)
            layers[1:1] = [layer for _, layer in more]
        # containerd imports under the whole name, which is the one that a kubelet asks for.
        reference = f"docker.io/library/{name}:{arguments.version}"
        blobs, index, manifest = image(reference, program_config(name, arguments.version), layers)
        archive(out / f"{name}.tar", blobs, index)
        size = sum(len(compressed) for _, compressed in layers)
        print(f"{name}:{arguments.version} {manifest} {size / 1e6:.1f} MB {out / name}.tar")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--bin-dir", type=Path, required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--cuda-libs", type=Path)
    parser.add_argument("--cuda-kernels", type=Path)
    try:
        build(parser.parse_args())
    except (Missing, OSError) as error:
        sys.exit(f"deploy/images/build: {error}")


if __name__ == "__main__":
    main()
