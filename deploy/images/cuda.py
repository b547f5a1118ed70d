"""Fills a folder with what a worker opens on a GPU, apart from the driver: NVIDIA's libraries out of their pinned
wheels, and the kernels of every architecture, compiled ahead.

Of the wheels only the files that the worker opens are taken: the rest of cuBLAS, headers and static libraries are not
needed to run. The wheels are kept below SWALLOW_CACHE (they have 700 MB), and pip holds them against their hashes.
"""

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PINS = Path(__file__).with_name("cuda-wheels.txt")
# What the worker opens, and what these open by themselves.
WANTED = ["libcublasLt.so.13", "libnccl.so.2", "libnvrtc.so.13", "libnvrtc-builtins.so.13.0"]
# The GPUs that kernels are compiled for: A100, H100 and H200, B200. Others compile theirs at their first start.
ARCHITECTURES = "sm_80,sm_90a,sm_100a"


class Failed(Exception):
    """A step did not succeed."""


def wheels(cache):
    """The pinned wheels, downloaded where they are not here yet."""
    pins = [line.split()[0] for line in PINS.read_text().splitlines() if line.startswith("nvidia")]

    def here():
        patterns = [pin.replace("-", "_").replace("==", "-") + "-*.whl" for pin in pins]
        found = [path for path in sorted(cache.glob("*.whl")) for p in patterns if fnmatch.fnmatch(path.name, p)]
        return found if len(found) == len(pins) else None

    if not (found := here()):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--require-hashes", "--only-binary=:all:", "--dest", str(cache), "--requirement", str(PINS)]
        if subprocess.run(pip).returncode != 0 or not (found := here()):
            raise Failed("the wheels of cuda-wheels.txt cannot be downloaded")
    return found


def unpack(found, out):
    """The libraries that are wanted, without the folders of the wheels."""
    out.mkdir(parents=True)
    for wheel in found:
        with zipfile.ZipFile(wheel) as members:
            for member in members.namelist():
                if (name := os.path.basename(member)) in WANTED:
                    with members.open(member) as source, open(out / name, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 22)
    if missing := [name for name in WANTED if not (out / name).exists()]:
        raise Failed(f"the wheels hold no {', '.join(missing)}")


def kernels(worker, libraries, out):
    """Compiles the kernels with the NVRTC that the image will have, since a kernel's name holds the compiler's version."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    command = [worker, "kernels", "--arch", ARCHITECTURES, "--out", out]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise Failed(f"{worker} kernels: ended with {done.returncode}\n{done.stdout}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="gets the folders lib and kernels")
    parser.add_argument("--worker", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        unpack(wheels(arguments.cache), arguments.out / "lib")
        kernels(arguments.worker, arguments.out / "lib", arguments.out / "kernels")
    except (Failed, OSError) as error:
        sys.exit(f"deploy/images/build: {error}")


if __name__ == "__main__":
    main()
