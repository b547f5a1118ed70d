"""system_images.py BIN OUT: images of the cluster's own pods, each one static program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "deploy/images"))
from oci import Layer, archive, image, packed  # noqa: E402 (the path comes first)

bin_dir, out = map(Path, sys.argv[1:])
for name in ["pause", "coredns", "metrics-server"]:
    layer = Layer()
    layer.file(f"/{name}", (bin_dir / name).read_bytes(), 0o755)
    layer.folder("/tmp", 0o1777)
    config = {"User": "65534:65534", "Env": ["PATH=/"], "Entrypoint": [f"/{name}"]}
    blobs, index, _ = image(f"swallow.test/{name}:1", config, [packed(layer)])
    archive(out / f"{name}.tar", blobs, index)
