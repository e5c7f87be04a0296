"""A throw-away Slurm of two nodes on this machine with a munge of its own: loopback only, and gone after the tests."""

import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recsys_lightning.analysis.grid_slurm import ENDED
from recsys_lightning.cli import main

_DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
# Without the two NoIn.. words the daemons would listen to the whole network.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=30
JobRequeue=1
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4096
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4096
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_for(what: str, is_so: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.1)


class Slurm:
    """A running Slurm; its clients find it by the environment.

    Attributes:
        folder: of its files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def ask(self, *words: object) -> str:
        """What a command prints."""
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job or an array task, also of one that has ended."""
        return self.ask("squeue", "--noheader", "--array", "--states=all", "--format=%T", f"--jobs={job}")

    def wait_for(self, what: str, is_so: Callable[[], object], seconds: float = 400) -> None:
        """Wait until something is so."""
        _wait_for(what, is_so, seconds)

    def wait_until_ended(self, *jobs: str) -> None:
        """Wait for jobs."""
        for job in jobs:
            self.wait_for(f"the end of job {job}", lambda job=job: self.state(job) in ENDED, 600)


def _idle() -> bool:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], capture_output=True, text=True, timeout=30)
    return done.stdout.split() == ["idle", "idle"]


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A running Slurm; nothing is left of it afterwards."""
    os.environ["PATH"] += ":/usr/sbin"
    if missing := [name for name in _DAEMONS if shutil.which(name) is None]:
        pytest.skip(f"no {missing[0]} on this machine: `make test-slurm` installs Debian's slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    names = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": folder, "ports": _free_ports(3)}
    (folder / "slurm.conf").write_text(_CONFIGURATION.format(**names))
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    munged.append(f"--seed-file={folder / 'munged.seed'}")
    settings = ["-D", "-f", str(folder / "slurm.conf")]
    commands = [["slurmctld", "-c", *settings], ["slurmd", "-N", "n1", *settings], ["slurmd", "-N", "n2", *settings]]
    started: list[subprocess.Popen[bytes]] = []
    # No variable of a job that these tests may themselves run in.
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    with pytest.MonkeyPatch.context() as patch, (folder / "output").open("wb") as output:
        for name in set(os.environ) - set(own):
            patch.delenv(name)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        environment = {**own, "SLURM_CONF": str(folder / "slurm.conf")}

        def start(command: list[str]) -> None:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            started.append(subprocess.Popen(command, env=environment, start_new_session=True, **streams))

        try:
            start(munged)
            _wait_for("munged listens", (folder / "munge.socket").exists, 10)
            for command in commands:
                start(command)
            _wait_for(f"both nodes idle; see {folder}", _idle, 30)
            yield Slurm(folder)
        finally:
            subprocess.run(["scancel", f"--user={names['user']}"], capture_output=True, timeout=30)
            with contextlib.suppress(AssertionError):
                _wait_for("no job left", lambda: not Slurm(folder).ask("squeue", "--noheader"), 15)
            for process in reversed(started):
                process.terminate()
            for process in reversed(started):
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@pytest.fixture(scope="session")
def slurm(daemons: Slurm) -> Iterator[Slurm]:
    """That Slurm, for jobs of this project."""
    with pytest.MonkeyPatch.context() as patch:
        # Names of nodes do not resolve to an address here, as they do on a cluster; `recsys` must be found.
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield daemons


# ---------------------------------------------------------------------------------------------------- tiny experiments

SOURCE = {"num_users": 60, "num_themes": 2, "topics_per_theme": 2, "items_per_topic": 5}
DATA = {"data.source": {"class_path": "Synthetic", "init_args": SOURCE}, "data.encoder.dim": 8}
QUIET = {"trainer.enable_progress_bar": False, "trainer.log_every_n_steps": 1}
TOKENIZER = {**DATA, **QUIET, "model.tokenizer.num_codes": 4, "trainer.max_epochs": 1}
COBRA = {
    **DATA,
    **QUIET,
    "data.batch_size": 8,
    "model.model.dim": 16,
    "model.model.search.num_beams": 4,
    "trainer.max_epochs": 3,
    "trainer.check_val_every_n_epoch": 1,
}


Words = Callable[..., list[str]]


@pytest.fixture(scope="session")
def tiny_words() -> Words:
    """Words of a command line that trains a tiny COBRA or, by name, tokenizer; settings may be changed or added."""

    def words(experiment: str = "cobra", **changed: object) -> list[str]:
        settings = {**(COBRA if experiment == "cobra" else TOKENIZER), **changed}
        values = {key: value if isinstance(value, str | Path) else json.dumps(value) for key, value in settings.items()}
        return ["-c", f"experiments/demo/{experiment}.yaml", *(f"--{key}={value}" for key, value in values.items())]

    return words


# The last process is always behind the others, which wait for it within an all-reduce when a signal comes.
SLOW = """
import os, pathlib, time
import lightning as L

class Slow(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == trainer.world_size - 1:
            time.sleep(float(os.environ.get("SLOW", "0")))
        pathlib.Path(trainer.default_root_dir, f"step-{trainer.global_step}-{trainer.global_rank}").touch()
"""


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_words: Words) -> Path:
    """A folder with the experiments of this project in it, semantic IDs for them, and a callback `slow.Slow`."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "experiments").symlink_to(Path(__file__).parents[2] / "experiments")
    (folder / "slow.py").write_text(SLOW)
    with contextlib.chdir(folder):
        assert main(["fit", *tiny_words("rqvae")]) == 0
    return folder
