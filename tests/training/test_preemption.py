"""What is done when a scheduler takes the machine away."""

import logging
import os
import signal
import subprocess
from types import SimpleNamespace

import pytest

from recsys_lightning.errors import InputError
from recsys_lightning.training import preemption
from recsys_lightning.training.preemption import Preemption, Stopped, slurm_job


@pytest.mark.parametrize("settings", [{"every_n_steps": -1}, {"every_minutes": -0.5}])
def test_negative_settings_are_refused_by_name(settings):
    with pytest.raises(InputError, match=f"preemption.{next(iter(settings))}=-"):
        Preemption(**settings)


def test_a_job_and_a_task_of_an_array_are_named_as_scontrol_names_them():
    assert slurm_job({}) is None
    assert slurm_job({"SLURM_JOB_ID": "7"}) == "7"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm_job(array) == "7_2"


@pytest.fixture
def scontrol(monkeypatch):
    """Takes down how `scontrol` is called."""
    calls = []

    def run(command, **_):
        calls.append(command)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(preemption.subprocess, "run", run)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return calls


def leave(callback: Preemption, number: int, first: bool = True) -> None:
    trainer = SimpleNamespace(is_global_zero=first, global_step=3, default_root_dir="run")
    with pytest.raises(Stopped) as stopped:
        callback._leave(trainer, number)
    assert stopped.value.code == 128 + number, "whoever started it sees that it is not finished"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_slurm_queues_the_job_again_once(scontrol, number):
    leave(Preemption(), number)
    leave(Preemption(), number, first=False)
    assert scontrol == [["scontrol", "requeue", "7"]]


def test_a_job_that_was_cancelled_is_not_queued_again_nor_one_that_shall_not(scontrol):
    leave(Preemption(), signal.SIGTERM)
    leave(Preemption(requeue=False), signal.SIGUSR1)
    assert scontrol == []


def test_what_slurm_refuses_is_said(monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    refused = subprocess.CompletedProcess([], 1, "", "Requested operation is presently disabled\n")
    monkeypatch.setattr(preemption.subprocess, "run", lambda *_, **__: refused)
    with caplog.at_level(logging.ERROR):
        leave(Preemption(), signal.SIGUSR1)
    assert "does not queue job 7 again: Requested operation is presently disabled" in caplog.text


def test_outside_slurm_nothing_is_called(scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    leave(Preemption(), signal.SIGUSR1)
    assert scontrol == []
    assert "SLURM_JOB_ID" not in os.environ
