"""Write the image's lock files: every package that it installs, with its version and the hashes of its files.

docker/lock-cpu.txt and docker/lock-gpu.txt hold what one device alone needs (torch, FAISS, CUDA's libraries), and
docker/lock.txt what both need. `make docker-lock` runs this. It needs `uv`, which reads the packages' metadata only.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
PROJECT = FOLDER.parent / "pyproject.toml"
EXTRAS = ("text", "wandb", "tensorboard", "plots", "report")
TORCH = {"cpu": "2.13.0+cpu", "gpu": "2.13.0"}
# The image's machine and its oldest Python, whatever this machine is. The hashes are of the files for all machines.
TARGET = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28")
HEAD = "# From `make docker-lock`, not to be edited by hand: {what}\n"
WHAT = {
    "lock": "what both images install.",
    "lock-cpu": "what the image for CPUs installs first.",
    "lock-gpu": "what the image for GPUs installs first: gigabytes that change seldom.",
}


def main(arguments: list[str]) -> None:
    """Resolve the packages of both devices and write the three files."""
    parser = argparse.ArgumentParser(prog="docker/lock.py", description=__doc__)
    cpu = "https://download.pytorch.org/whl/cpu"
    parser.add_argument(
        "--cpu", default=cpu, metavar="INDEX", help="index of torch's CPU builds, or a folder of wheels"
    )
    parser.add_argument("--gpu", default="", metavar="INDEX", help="index of torch's CUDA builds, if it is another one")
    given = parser.parse_args(arguments)
    locked = {device: resolve(device, vars(given)[device]) for device in ("cpu", "gpu")}
    both = locked["cpu"].keys() & locked["gpu"].keys()
    write("lock", {requirement: locked["cpu"][requirement] for requirement in both})
    for device, found in locked.items():
        write(f"lock-{device}", {requirement: found[requirement] for requirement in found.keys() - both})


def resolve(device: str, index: str) -> dict[str, set[str]]:
    """The hashes, by ``name==version``, of everything that the image of a device installs."""
    project = tomllib.loads(PROJECT.read_text())
    build = [*project["build-system"]["requires"], "editables"]  # what the package itself is installed with
    command = ["uv", "pip", "compile", "--no-config", "--quiet", "--generate-hashes", "--no-annotate", "--no-header"]
    command += [word for extra in (device, *EXTRAS) for word in ("--extra", extra)]
    if index:
        where = "--find-links" if Path(index).is_dir() else "--index"
        command += [where, index, "--index-strategy", "unsafe-best-match"]
    command += [*TARGET, str(PROJECT), "-"]
    text = "\n".join([f"torch=={TORCH[device]}", *build])
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"docker/lock.py: uv finds no packages for {device}:\n{done.stderr}")
    return entries(done.stdout)


def entries(text: str) -> dict[str, set[str]]:
    """The hashes of a lock file, as ``sha256:...``, by ``name==version``."""
    found: dict[str, set[str]] = {}
    for requirement in re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.M)):
        name, *words = requirement.replace("\\", " ").split()
        found[name] = {word.removeprefix("--hash=") for word in words if word.startswith("--hash=")}
    return found


def write(name: str, locked: dict[str, set[str]]) -> None:
    """Write one file; of a release that it held before, hashes that are not found now stay."""
    path = FOLDER / f"{name}.txt"
    # A folder of wheels has the one of this machine only.
    known = entries(path.read_text()) if path.exists() else {}
    lines = [HEAD.format(what=WHAT[name])]
    for requirement, hashes in sorted(locked.items()):
        digests = (f"--hash={digest}" for digest in sorted(hashes | known.get(requirement, set())))
        lines.append(" \\\n    ".join([requirement, *digests]) + "\n")
    path.write_text("".join(lines))
    sys.stdout.write(f"{path.name}: {len(lines) - 1} packages\n")


if __name__ == "__main__":
    main(sys.argv[1:])
