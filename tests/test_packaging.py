"""What a resolver reads: dependencies, extras, versions, pins."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import recsys_lightning

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_malicious_lightning_releases_are_never_installed(version):
    """GHSA-w37p-236h-pfx3: they steal credentials on import."""
    specifier = requirements(PROJECT["dependencies"])["lightning"].specifier
    assert version not in specifier
    assert "2.6.1" in specifier


def test_no_dependency_brings_them_by_another_name():
    """pytorch-lightning is the same code under another name, with other releases to exclude."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    assert "pytorch-lightning" not in requirements([*PROJECT["dependencies"], *extras])


def test_the_extras_that_are_promised_exist():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) >= {"cpu", "gpu", "text", "wandb", "tensorboard", "plots", "dev"}
    assert list(requirements(extras["cpu"])) == ["faiss-cpu"]
    assert list(requirements(extras["gpu"])) == ["faiss-gpu"], "never faiss-gpu-cu12: it aborts on Hopper GPUs"
    assert requirements(extras["dev"])["recsys_lightning"].extras <= set(extras)


def test_the_gpu_extra_installs_nothing_where_there_is_no_wheel():
    marker = requirements(PROJECT["optional-dependencies"]["gpu"])["faiss-gpu"].marker
    assert marker is not None
    assert marker.evaluate({"sys_platform": "linux", "platform_machine": "x86_64"})
    assert not marker.evaluate({"sys_platform": "darwin", "platform_machine": "arm64"})


def test_python_3_11_is_the_oldest():
    specifier = SpecifierSet(PROJECT["requires-python"])
    assert "3.10" not in specifier
    assert all(version in specifier for version in ("3.11", "3.12", "3.13"))
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert named
    assert all(version in specifier for version in named)


def test_there_is_one_version():
    assert "version" in PROJECT["dynamic"], "it is written in recsys_lightning/__init__.py and nowhere else"
    assert importlib.metadata.version("recsys_lightning") == recsys_lightning.__version__


def test_the_cpu_build_of_torch_is_pinned_the_same_everywhere():
    """Any other release, and any range that admits a newer one, makes a resolver fetch gigabytes of CUDA libraries."""
    lines = (ROOT / "docker/constraints-cpu.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins == ["torch==2.13.0"]
    assert re.findall(r"^TORCH_cpu := (.*)$", (ROOT / "Makefile").read_text(), re.M) == pins
    assert "2.13.0" in requirements(PROJECT["dependencies"])["torch"].specifier
