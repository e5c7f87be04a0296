"""What each launcher says in the environment of a process, and what the Trainer is then told."""

import logging
import os
from unittest import mock

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from recsys_lightning.cli.launch import Started, alone, find_started, trainer_settings
from recsys_lightning.errors import InputError
from recsys_lightning.training.ddp import RecsysDDP
from recsys_lightning.training.durable import DurableCheckpointIO

# What a process of each kind finds, from runs of torch 2.13 and Slurm 22.05; only the lines that say how many.
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "0", "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}  # fmt: skip
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "b.sh", "SLURM_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
SRUN = BATCH_SCRIPT | {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip
# `srun -N1 -n2 -w n2` in the same job: three variables are still the job's.
PART = SRUN | {
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n2",
}  # fmt: skip
ONE_TASK = SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
TERMINAL = SRUN | {"SLURM_PTY_PORT": "4711", "SLURM_JOB_NAME": "bash"}


@pytest.fixture
def environment():
    """Sets variables, without those of a launcher that these tests may themselves run under; all is undone."""

    def put(variables):
        for name in [*SRUN, *TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE", "NODE_RANK", "SLURM_PTY_PORT"]:
            os.environ.pop(name, None)
        os.environ.update(variables)

    with mock.patch.dict(os.environ):
        yield put


@pytest.mark.parametrize(
    ("variables", "started"),
    [
        ({}, None),
        (TORCHRUN, Started("torchrun", 4, 2)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, Started("torchrun", 1, 2)),
        (SRUN, Started("srun", 2, 2)),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, Started("srun", 2, 2)),  # srun bash run.sh
        (PART, Started("srun", 2, 1)),
        (SRUN | TORCHRUN, Started("torchrun", 4, 2)),  # torchrun, by srun
        (BATCH_SCRIPT, None),
        (ONE_TASK, None),
        (SALLOC, None),
        (TERMINAL, None),
        # What Lightning tells the processes that it starts by itself.
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, None),
    ],
)
def test_what_a_launcher_has_started_is_found(environment, variables, started):
    environment(variables)
    assert find_started() == started


def test_under_torchrun_the_trainer_is_told_of_all_processes(environment):
    environment(TORCHRUN)
    settings = trainer_settings({"devices": "auto", "num_nodes": 1, "strategy": "auto", "plugins": None})
    (plugin,) = settings.pop("plugins")
    assert isinstance(plugin, TorchElasticEnvironment)
    assert settings == {"devices": 4, "num_nodes": 2, "strategy": "ddp"}
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[plugin], **settings)
    assert isinstance(trainer.strategy, RecsysDDP)
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank) == (8, 5, 1, 1)


@pytest.mark.parametrize(("variables", "place"), [(SRUN, (4, 3, 1, 1)), (PART, (2, 0, 0, 0))])
def test_under_srun_the_trainer_is_told_of_the_step_and_requeues_nothing(environment, variables, place):
    environment(variables)
    settings = trainer_settings({"devices": "auto", "num_nodes": 1, "strategy": "auto", "plugins": None})
    (plugin,) = settings["plugins"]
    assert isinstance(plugin, SLURMEnvironment)
    assert not plugin.auto_requeue
    assert plugin.main_address == ("n1" if variables is SRUN else "n2")
    trainer = Trainer(accelerator="cpu", logger=False, **settings)
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank) == place
    plugin.validate_settings(trainer.num_devices, trainer.num_nodes)


@pytest.mark.parametrize("variables", [BATCH_SCRIPT, ONE_TASK, SALLOC, TERMINAL])
def test_a_process_that_srun_has_started_alone_or_not_at_all_starts_the_others_by_itself(environment, variables):
    environment(variables)
    settings = trainer_settings({"devices": 2, "num_nodes": 1, "strategy": "ddp", "plugins": None})
    assert [type(plugin) for plugin in settings["plugins"]] == [LightningEnvironment]
    trainer = Trainer(accelerator="cpu", logger=False, devices=2, strategy="ddp", **settings)
    assert (trainer.world_size, trainer.global_rank) == (2, 0)
    assert not settings["plugins"][0].creates_processes_externally
    # Lightning would have taken it for one of a step's, but for names of jobs that it knows.
    assert Trainer(accelerator="cpu", logger=False, devices=1, num_nodes=1, plugins=alone()["plugins"])


def test_without_a_launcher_the_settings_are_the_users(environment):
    environment({})
    assert trainer_settings({"devices": 2, "num_nodes": 1, "strategy": "ddp", "plugins": None}) == {}


def test_what_the_user_has_said_stays(environment):
    environment(TORCHRUN)
    own = TorchElasticEnvironment()
    kept = {"devices": [4, 5, 6, 7], "num_nodes": 2, "strategy": DDPStrategy(), "plugins": [own]}
    assert trainer_settings(kept) == {"num_nodes": 2}
    files = DurableCheckpointIO()
    settings = trainer_settings({"devices": "4", "num_nodes": 1, "strategy": "ddp_find_unused", "plugins": files})
    assert settings["plugins"][0] is files
    assert "strategy" not in settings
    assert "devices" not in settings


def test_one_process_needs_no_strategy(environment):
    environment(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"})
    settings = trainer_settings({"devices": "auto", "strategy": "auto"})
    assert (settings["devices"], settings["num_nodes"], "strategy" in settings) == (1, 1, False)


@pytest.mark.parametrize(
    ("variables", "trainer", "message"),
    [
        (
            TORCHRUN,
            {"devices": 2},
            "trainer.devices=2, but torchrun has started 4 processes on each node; leave trainer.devices out, or start "
            "as many",
        ),
        (TORCHRUN, {"devices": "0,1"}, "trainer.devices=0,1, but torchrun has started 4 processes"),
        (TORCHRUN, {"devices": "1"}, "trainer.devices=1, but torchrun has started 4 processes"),
        (TORCHRUN, {"num_nodes": 3}, "trainer.num_nodes=3, but torchrun has started processes on 2 nodes"),
        (SRUN, {"devices": 8}, "trainer.devices=8, but srun has started 2 processes on each node"),
        (
            TORCHRUN | {"WORLD_SIZE": "6"},
            {},
            "torchrun has started 6 processes on 2 nodes, 4 of them on this one; give all nodes one --nproc_per_node",
        ),
        (
            SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
            {},
            "srun has started 3 tasks on 2 nodes, 2,1 of them on each; give all nodes as many, with --ntasks-per-node",
        ),
        ({}, {"num_nodes": 2}, "trainer.num_nodes=2, but this is the one process that was started"),
        (BATCH_SCRIPT, {"num_nodes": 2, "devices": 2}, "start the command on all nodes, by `srun` in a Slurm job"),
    ],
)
def test_a_configuration_that_contradicts_the_launcher_is_refused_on_one_line(environment, variables, trainer, message):
    environment(variables)
    with pytest.raises(InputError) as error:
        trainer_settings({"devices": "auto", "num_nodes": 1, "strategy": "auto", **trainer})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_script_of_a_job_that_forgot_srun_is_told_so(environment, caplog):
    environment(BATCH_SCRIPT)
    with caplog.at_level(logging.WARNING):
        trainer_settings({"devices": "auto"})
    assert caplog.messages == ["Slurm has room for 4 tasks, but this process is alone: `srun recsys ...` starts all"]
    caplog.clear()
    trainer_settings({"devices": 2})
    assert not caplog.messages


@pytest.mark.parametrize(
    ("restarts", "shared", "warns"), [("3", "True", True), ("3", "False", False), ("0", "True", False)]
)
def test_restarts_on_the_store_that_torchrun_shares_are_warned_of(environment, caplog, restarts, shared, warns):
    variables = {"RANK": "0", "TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shared}
    environment(TORCHRUN | variables)
    with caplog.at_level(logging.WARNING):
        trainer_settings({})
    assert [("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line) for line in caplog.messages] == [True] * warns
