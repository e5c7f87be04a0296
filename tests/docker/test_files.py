"""What the Dockerfile, the compose file and the scripts promise, as far as no engine is needed to see it."""

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"^\s*#.*\n", "", (ROOT / "docker/Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
RUNNABLE = ("cpu", "gpu")


def stage(name: str) -> list[str]:
    """Instructions of one stage."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    found = [text.splitlines()[1:] for text in stages if text.splitlines()[0].endswith(f" AS {name}")]
    assert len(found) == 1, f"no stage {name}"
    return [line for line in found[0] if line.strip()]


def environment() -> dict[str, str]:
    words = next(line for line in stage("system") if line.startswith("ENV ")).split()[1:]
    return dict(word.split("=", 1) for word in words)


def volumes() -> list[str]:
    line = next(line for line in stage("system") if line.startswith("VOLUME "))
    return json.loads(line.removeprefix("VOLUME "))


def test_base_image_and_torch_index_are_arguments():
    assert re.search(r"\AARG BASE_IMAGE=\S+\nFROM \$\{BASE_IMAGE\} AS system$", DOCKERFILE.lstrip(), re.M)
    for device in RUNNABLE:
        assert any(line.startswith("ARG TORCH_INDEX=") for line in stage(device))
        assert any("--extra-index-url" in line and "TORCH_INDEX" in line for line in stage(device))


def test_the_image_without_a_target_is_the_one_for_cpus():
    assert re.findall(r"^FROM .* AS (\S+)$", DOCKERFILE, re.M)[-1] == "cpu"


def test_both_devices_are_built_the_same_way():
    cpu, gpu = ("\n".join(stage(device)) for device in RUNNABLE)
    cpu = re.sub(r"^ARG TORCH_INDEX=.*$", "ARG TORCH_INDEX=", cpu, flags=re.M)
    assert cpu.replace("lock-cpu", "lock-gpu").replace("DEVICE=cpu", "DEVICE=gpu") == gpu


@pytest.mark.parametrize("device", RUNNABLE)
def test_what_changes_often_comes_last_and_nothing_is_installed_without_a_hash(device):
    lines = stage(device)
    heavy, rest, code = (
        lines.index(f"COPY {what}") for what in (f"docker/lock-{device}.txt docker/", "docker/lock.txt docker/", ". .")
    )
    assert heavy < rest < code
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 3
    assert all(
        "--require-hashes" in line or "--no-index --no-build-isolation --editable ." in line for line in installs
    )


@pytest.mark.parametrize("device", RUNNABLE)
def test_it_runs_as_a_user_without_rights_whom_kubernetes_can_tell_by_the_number(device):
    assert re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", stage(device)[-1])


def test_the_program_is_started_directly_so_that_signals_reach_it():
    line = next(line for line in stage("system") if line.startswith("ENTRYPOINT "))
    assert json.loads(line.removeprefix("ENTRYPOINT "))[:2] == ["tini", "--"]


def test_all_that_is_written_lies_on_a_volume_and_temporary_files_on_that_of_the_runs():
    found = environment()
    assert PurePosixPath(found["TMPDIR"]).is_relative_to("/recsys/runs")
    assert set(volumes()) == {"/recsys/runs", "/recsys/raw", "/recsys/cache"}
    for name in ("HOME", "HF_HOME"):
        assert any(PurePosixPath(found[name]).is_relative_to(volume) for volume in volumes()), name


def test_only_what_the_image_needs_is_sent_to_the_builder():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    assert let_in == {"recsys_lightning", "experiments", "docker", "Makefile", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in let_in)


def test_compose_mounts_the_volumes_and_builds_the_targets_of_the_dockerfile():
    assert set(COMPOSE["services"]) == {"recsys", "recsys-gpu"}
    for name, service in COMPOSE["services"].items():
        device = "gpu" if name.endswith("-gpu") else "cpu"
        assert service["image"] == f"recsys:{device}", "as docker/build.sh names it"
        assert service["build"]["target"] == device
        folder = (ROOT / "docker" / service["build"]["context"]).resolve()
        assert folder == ROOT.resolve()
        assert (folder / service["build"]["dockerfile"]).is_file()
        mounted = [volume.rpartition(":")[2] for volume in service["volumes"]]
        assert sorted(mounted) == sorted(volumes())
        assert service["read_only"] is True
        assert service["stop_grace_period"]


def test_compose_reserves_gpus_for_the_gpu_service_only():
    assert "deploy" not in COMPOSE["services"]["recsys"]
    devices = COMPOSE["services"]["recsys-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def test_compose_holds_no_secret():
    for service in COMPOSE["services"].values():
        assert "WANDB_API_KEY" in service["environment"]
        assert not [entry for entry in service["environment"] if "=" in entry], "names only: values come from outside"


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "docker" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=60)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH with what the scripts need, and stand-ins that print how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "sh", "dirname", "mkdir", "head", "id"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def stand_in(folder: Path, name: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\nprintf '%s\\n' {name} \"$@\"\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (["fit", "-c", "a b.yaml"], ["recsys", "fit", "-c", "a b.yaml"]),
        (["test"], ["recsys", "test"]),
        (["--version"], ["recsys", "--version"]),
        ([], ["recsys"]),
        (["make", "demo"], ["make", "demo"]),
        (["torchrun", "--help"], ["torchrun", "--help"]),
    ],
)
def test_the_container_takes_commands_of_recsys_and_a_few_programs(programs, tmp_path, given, called):
    for name in ("recsys", "make", "torchrun"):
        stand_in(programs, name)
    home, temporary = tmp_path / "runs/.home", tmp_path / "runs/.tmp"
    done = run("entrypoint.sh", *given, PATH=str(programs), HOME=str(home), TMPDIR=str(temporary))
    assert (done.returncode, done.stdout.splitlines()) == (0, called)
    assert home.is_dir()
    assert temporary.is_dir()


def test_a_run_folder_that_cannot_be_written_is_one_clear_line(programs, tmp_path):
    (tmp_path / "runs").write_text("")
    done = run(
        "entrypoint.sh", "fit", PATH=str(programs), HOME=f"{tmp_path}/runs/.home", TMPDIR=f"{tmp_path}/runs/.tmp"
    )
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.strip()
    assert "\n" not in line
    assert f"user {os.getuid()} cannot write to the run folder" in line
    assert "--user" in line


def test_without_an_engine_building_ends_with_one_line_that_names_the_page(programs):
    done = run("build.sh", "cpu", PATH=str(programs))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "docs/docker.md" in done.stderr


def test_an_unknown_device_is_refused(programs):
    stand_in(programs, "docker")
    done = run("build.sh", "tpu", PATH=str(programs))
    assert (done.returncode, done.stdout) == (2, "")
    assert "cpu or gpu" in done.stderr


def test_docker_comes_before_podman_and_the_environment_reaches_the_build(programs, tmp_path):
    stand_in(programs, "docker")
    stand_in(programs, "podman")
    certificates, settings = tmp_path / "ca.crt", tmp_path / "pip.conf"
    certificates.write_text("")
    settings.write_text("")
    done = run(
        "build.sh",
        "gpu",
        "--no-cache",
        PATH=str(programs),
        BASE_IMAGE="base:1",
        TORCH_INDEX="",
        PIP_CERT=str(certificates),
        PIP_CONFIG_FILE=str(settings),
        PIP_FIND_LINKS=str(tmp_path),
    )
    words = done.stdout.splitlines()
    pairs = list(itertools.pairwise(words))
    assert words[:2] == ["docker", "build"]
    assert words[-2:] == ["--no-cache", "."]
    for pair in [
        ("--target", "gpu"),
        ("--tag", "recsys:gpu"),
        ("--build-arg", "BASE_IMAGE=base:1"),
        ("--build-arg", "TORCH_INDEX="),
        ("--secret", f"id=ca,src={certificates}"),
        ("--build-arg", "PIP_CERT=/run/secrets/ca"),
        ("--secret", f"id=pip.conf,src={settings}"),
    ]:
        assert pair in pairs
    assert "--volume" not in words, "docker has no such option of build"


def test_podman_is_asked_where_docker_does_not_answer_and_mounts_a_folder_of_wheels(programs, tmp_path):
    (programs / "docker").write_text("#!/bin/sh\nexit 1\n")
    (programs / "docker").chmod(0o755)
    stand_in(programs, "podman")
    words = run("build.sh", "cpu", PATH=str(programs), PIP_FIND_LINKS=str(tmp_path)).stdout.splitlines()
    assert words[:2] == ["podman", "build"]
    assert words[words.index("--volume") + 1] == f"{tmp_path}:{tmp_path}:ro"
