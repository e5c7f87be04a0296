"""One command line under every launcher: what `torchrun` or `srun` has started is what the Trainer is told.

Started by neither, the Trainer starts ``trainer.devices`` processes by itself. What comes from the environment never
becomes part of a run's configuration: a run of eight processes can be tested, or gone on with, by another number.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from recsys_lightning.data.datamodules import CatalogDataModule
from recsys_lightning.errors import InputError
from recsys_lightning.training.ddp import register_ddp

_log = logging.getLogger(__name__)

# What torchrun tells each process, and what somebody who starts processes by hand may tell them.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_UNSAID = (None, "auto", -1, "-1")


@dataclass(frozen=True)
class Started:
    """The processes that a launcher has started, this one among them.

    Attributes:
        by: the launcher, for messages.
        devices: processes on each node.
        num_nodes: nodes.
    """

    by: str
    devices: int
    num_nodes: int


def trainer_settings(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What the Trainer must be given in place of its own configuration, for the processes that there are.

    Under `torchrun` and `srun` these are devices, nodes and, for several processes, the strategy ``ddp`` where none is
    named. Under Slurm it is also the cluster environment: Lightning reads the job's variables where it should read
    those of the step, and takes each process of a job for one that `srun` has started. Its re-queueing is off: it waits
    for ever when processes are uneven.

    Args:
        trainer: ``trainer`` of the configuration, with the plugins built.

    Raises:
        InputError: the configuration contradicts the launcher, or the launcher has started unequal nodes.
    """
    register_ddp()
    started = find_started()
    if started is None:
        _check_alone(trainer)
        return _with_environment(trainer, LightningEnvironment()) if "SLURM_NTASKS" in os.environ else {}
    _check_agreement(trainer, started)
    settings: dict[str, Any] = {"num_nodes": started.num_nodes}
    if trainer.get("devices") in _UNSAID:
        settings["devices"] = started.devices
    if started.devices * started.num_nodes > 1 and trainer.get("strategy", "auto") == "auto":
        settings["strategy"] = "ddp"
    if started.by == "torchrun":
        _warn_of_shared_store()
    return settings | _with_environment(trainer, _environment(started))


def alone() -> dict[str, Any]:
    """What a Trainer must be given that shall know nothing of other processes, whatever has started this one."""
    return {"devices": 1, "num_nodes": 1, "plugins": [LightningEnvironment()]}


def prepare_together(data: CatalogDataModule) -> bool:
    """Prepare a data module without a Trainer, by all processes that a launcher has started; true on the first.

    As in a training, one process a node prepares, and what can be shared out all do.
    """
    started = find_started()
    if started is None or started.devices * started.num_nodes == 1:
        data.prepare_data()
        data.setup()
        return True
    environment = _environment(started)
    address, port = environment.main_address, environment.main_port  # sets what torch reads
    _log.debug("meeting the other processes at %s:%s", address, port)
    if torch.cuda.is_available():
        torch.cuda.set_device(environment.local_rank() % torch.cuda.device_count())
    # The first process may download for hours.
    dist.init_process_group(
        "gloo", rank=environment.global_rank(), world_size=environment.world_size(), timeout=timedelta(days=7)
    )
    try:
        if environment.local_rank() == 0:
            data.prepare_data()
        dist.barrier()
        data.setup()
        return environment.global_rank() == 0
    finally:
        dist.destroy_process_group()


def find_started() -> Started | None:
    """What a launcher has started; None where this process is by itself, or its Trainer starts the others.

    Raises:
        InputError: a launcher has started unequal numbers of processes on its nodes.
    """
    # torchrun comes first: srun may have started it.
    if all(name in os.environ for name in _TORCHRUN):
        return _started_by_torchrun()
    # Only a process of a step has the number of its tasks: neither the script of a job nor a shell of salloc. One task
    # is no other than a process on a plain machine; of a terminal (--pty) only the first task goes on.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "SLURM_PTY_PORT" not in os.environ:
        return _started_by_srun(tasks)
    return None


def _started_by_torchrun() -> Started:
    world, devices = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", world // devices))
    if devices * num_nodes != world:
        raise InputError(
            f"torchrun has started {world} processes on {num_nodes} nodes, {devices} of them on this one; "
            "give all nodes one --nproc_per_node"
        )
    return Started("torchrun", devices, num_nodes)


def _started_by_srun(tasks: int) -> Started:
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    layout = os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))  # such as 4, 4(x2) or 2,1
    counts = {int(count) for count in re.sub(r"\(x\d+\)", "", layout).split(",")}
    if len(counts) > 1:
        raise InputError(
            f"srun has started {tasks} tasks on {nodes} nodes, {layout} of them on each; "
            "give all nodes as many, with --ntasks-per-node"
        )
    return Started("srun", counts.pop(), nodes)


def _check_agreement(trainer: Mapping[str, Any], started: Started) -> None:
    said = trainer.get("devices")
    if said not in _UNSAID and _count(said) != started.devices:
        raise InputError(
            f"trainer.devices={said}, but {started.by} has started {started.devices} processes on each node; "
            "leave trainer.devices out, or start as many"
        )
    # 1 is also what stands there where nobody has said anything.
    if trainer.get("num_nodes", 1) not in (1, started.num_nodes):
        raise InputError(
            f"trainer.num_nodes={trainer['num_nodes']}, but {started.by} has started processes on "
            f"{started.num_nodes} nodes; leave trainer.num_nodes out, or start on as many"
        )


def _check_alone(trainer: Mapping[str, Any]) -> None:
    num_nodes, said = trainer.get("num_nodes", 1), trainer.get("devices")
    if num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"trainer.num_nodes={num_nodes}, but this is the one process that was started: start the command on all "
            "nodes, by `srun` in a Slurm job or by `torchrun` on each"
        )
    reserved = int(os.environ.get("SLURM_NTASKS", "1"))
    if reserved > 1 and "SLURM_STEP_ID" not in os.environ and (said in _UNSAID or _count(said) == 1):
        _log.warning("Slurm has room for %d tasks, but this process is alone: `srun recsys ...` starts all", reserved)


def _count(devices: Any) -> int:
    """How many devices are named, as a number, a list, or text of either kind."""
    if isinstance(devices, str):
        parts = [part for part in devices.split(",") if part.strip()]
        return len(parts) if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


def _environment(started: Started) -> ClusterEnvironment:
    if started.by == "torchrun":
        return TorchElasticEnvironment()
    _tell_lightning_of_the_step(started)
    return SLURMEnvironment(auto_requeue=False)


def _with_environment(trainer: Mapping[str, Any], environment: ClusterEnvironment) -> dict[str, Any]:
    plugins = trainer.get("plugins") or []
    plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    if any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):  # the user's own
        return {}
    return {"plugins": [*plugins, environment]}


def _tell_lightning_of_the_step(started: Started) -> None:
    """Lightning reads variables of the job, which a step may use in part only."""
    os.environ["SLURM_NTASKS_PER_NODE"] = str(started.devices)
    os.environ["SLURM_NNODES"] = str(started.num_nodes)
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is not None:
        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))


def _warn_of_shared_store() -> None:
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ["RANK"] == "0":
        _log.warning(
            "torchrun may hang when it restarts processes: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it starts"
        )
