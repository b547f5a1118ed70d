"""Starts the main job once for all client tests: two models behind one router on this machine.

The clients are the real ones: the openai package, and stubs generated from the proto files. Nothing here knows
how the server works; it is started as the README says and stopped with SIGTERM.
"""

import importlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import grpc
import pytest
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
READY_WITHIN_S = 120

MODEL = """\
apiVersion: serving.swallow.dev/v1alpha1
kind: SwallowModel
metadata:
  name: {name}
spec:
  model:
    servedNames: [{names}]
    source:
      type: HostPath
      hostPath:
        path: {path}
  engine:
    kvCache:
      bytes: 256Mi
  accelerator:
    device: CPU
  parallelism:
    tensor: {tensor}
  replicas: {replicas}
"""


class Served:
    """The running main job and its endpoints."""

    def __init__(self, process, grpc_address, http_url):
        self.process = process
        self.grpc_address = grpc_address
        self.http_url = http_url


def read_until_ready(process):
    """The fields of the `ready` line; what came before it is shown when it does not come."""
    seen, fields = [], {}
    done = threading.Event()

    def read():
        for line in process.stdout:
            seen.append(line)
            if line.startswith("ready"):
                fields.update(word.split("=", 1) for word in line.split()[1:] if "=" in word)
                done.set()
        done.set()

    threading.Thread(target=read, daemon=True).start()
    done.wait(READY_WITHIN_S)
    if not fields:
        process.kill()
        pytest.fail("not ready:\n" + "".join(seen))
    return fields


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny = MODEL.format(name="tiny", names='"tiny", "swallow-tiny"', path=FIXTURES / "tiny", tensor=2, replicas=2)
    odd = MODEL.format(name="odd", names='"odd"', path=FIXTURES / "odd", tensor=1, replicas=1)
    # The same weights with a chat template that knows functions: what an operator supplies beside a model.
    shutil.copytree(FIXTURES / "tiny", folder / "caller")
    shutil.copy(pathlib.Path(__file__).parent / "caller.jinja", folder / "caller" / "chat_template.jinja")
    caller = MODEL.format(name="caller", names='"caller"', path=folder / "caller", tensor=1, replicas=1)
    (folder / "models.yaml").write_text("---\n".join([tiny, odd, caller]))
    binary = pathlib.Path(os.environ["CARGO_TARGET_DIR"]) / "release" / "swallow-operator"
    log = open(folder / "stderr.log", "w")
    process = subprocess.Popen(
        [binary, "local", "-f", folder / "models.yaml", "--grpc-port", "0", "--http-port", "0"],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        ready = read_until_ready(process)
        yield Served(process, ready["grpc"], ready["http"])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code == 0, f"exit code {code}:\n{(folder / 'stderr.log').read_text()}"


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    """Modules generated from the proto files, as a user of the API would make them."""
    out = tmp_path_factory.mktemp("stubs")
    protos = ROOT / "proto" / "rpc"
    names = ["common", "generation", "chat", "model"]
    files = [f"swallow/inference/v1/{name}.proto" for name in names]
    well_known = pathlib.Path(importlib.import_module("grpc_tools").__file__).parent / "_proto"
    arguments = ["protoc", f"-I{protos}", f"-I{well_known}", f"--python_out={out}", f"--grpc_python_out={out}", *files]
    assert protoc.main(arguments) == 0
    sys.path.insert(0, str(out))
    modules = {name: importlib.import_module(f"swallow.inference.v1.{name}_pb2") for name in names}
    services = {
        f"{name}_grpc": importlib.import_module(f"swallow.inference.v1.{name}_pb2_grpc") for name in names[1:]
    }
    return type("Stubs", (), {**modules, **services})


@pytest.fixture(scope="session")
def channel(served):
    with grpc.insecure_channel(served.grpc_address) as channel:
        grpc.channel_ready_future(channel).result(10)
        yield channel
