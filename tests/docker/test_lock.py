"""The lock files of the image: whole, hashed, and of the versions that the project asks for."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTALLED = ("text", "wandb", "tensorboard", "plots", "report")


def lines(name: str) -> list[str]:
    """A lock file as pip reads it: one requirement with its hashes a line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "docker" / name).read_text(), flags=re.M)
    return text.replace("\\\n", " ").splitlines()


def locked(device: str) -> dict[str, str]:
    """Version by name, of all that the image of a device installs."""
    pins = [line.split()[0].split("==") for name in (f"lock-{device}.txt", "lock.txt") for line in lines(name)]
    assert len({name for name, _ in pins}) == len(pins), "a package is locked twice"
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("name", ["lock.txt", "lock-cpu.txt", "lock-gpu.txt"])
def test_every_package_has_one_version_and_its_hashes(name):
    assert lines(name)
    for line in lines(name):
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==\S+( +--hash=sha256:[0-9a-f]{64})+ *", line), line[:80]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_lock_satisfies_everything_that_the_project_asks_for(device):
    linux = {
        **default_environment(),
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "python_version": "3.11",
        "python_full_version": "3.11.2",
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    wanted += [line for extra in (device, *INSTALLED) for line in extras[extra]]
    versions = locked(device)
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate(linux):
            version = versions.get(canonicalize_name(requirement.name))
            assert version, f"{requirement} is not locked: run `make docker-lock`"
            assert version in requirement.specifier, f"{version} is not {requirement}: run `make docker-lock`"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_malicious_lightning_releases_are_not_in_it(device):
    """GHSA-w37p-236h-pfx3; pytorch-lightning is the same code by another name."""
    versions = locked(device)
    assert versions["lightning"] not in ("2.6.2", "2.6.3")
    assert versions.get("pytorch-lightning") not in ("2.6.2", "2.6.3")


def test_each_device_has_its_own_torch_and_faiss_and_the_cpu_no_cuda():
    cpu, gpu = locked("cpu"), locked("gpu")
    assert cpu["torch"] == f"{gpu['torch']}+cpu", "the same release; a bare version would let the CUDA build in"
    pinned = (ROOT / "docker/constraints-cpu.txt").read_text().splitlines()[-1]
    assert pinned == f"torch=={gpu['torch']}", "as `make install` has it"
    assert ("faiss-cpu" in cpu, "faiss-gpu" in cpu) == (True, False)
    assert ("faiss-cpu" in gpu, "faiss-gpu" in gpu) == (False, True)
    assert not [name for name in cpu if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert [name for name in gpu if name.startswith("nvidia-cudnn")]


def test_hashes_that_are_not_found_again_stay_with_the_same_release_only(tmp_path, monkeypatch):
    """A folder of wheels knows this machine's file of torch; the hashes of others are still right."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / "docker/lock.py")
    assert spec is not None
    assert spec.loader is not None
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    one, two, three = (f"sha256:{digit * 64}" for digit in "123")
    lock.write("lock", {"b==1": {two, one}, "a==1": {three}})
    assert (
        (tmp_path / "lock.txt")
        .read_text()
        .endswith(f"\na==1 \\\n    --hash={three}\nb==1 \\\n    --hash={one} \\\n    --hash={two}\n")
    )
    lock.write("lock", {"b==1": {three}, "a==2": {one}})
    found = lock.entries((tmp_path / "lock.txt").read_text())
    assert found == {"b==1": {one, two, three}, "a==2": {one}}
