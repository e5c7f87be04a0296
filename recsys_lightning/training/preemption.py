"""A training that is stopped, or killed, and goes on as if nothing had happened."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from recsys_lightning.distributed import world_size
from recsys_lightning.errors import InputError
from recsys_lightning.signals import REQUEUE, stop_signals
from recsys_lightning.training.durable import RESUME

_log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The training was asked to stop and has saved what it had; the code is 128 and the number of the signal."""


class Preemption(L.Callback):
    """Saves ``checkpoints/resume.ckpt`` when a signal comes and from time to time, and makes `fit` exact to go on with.

    SIGUSR1, SIGUSR2, SIGTERM and SIGINT only set a flag (`recsys_lightning.signals`). At the beginning of each step the
    processes agree on whether any of them has it: stopping alone, or saving within a handler, leaves the others waiting
    for ever. Then all save together and leave with 128 and the number of the signal, which tells torchrun and any
    scheduler that the training is not finished. Under Slurm, the first process has the job queued again at SIGUSR1 and
    SIGUSR2, which are sent before a machine is taken away. SIGTERM is also what ``scancel`` sends, and a job that Slurm
    preempts by requeueing comes back by itself, so that it only ends the run.

    ``recsys fit --ckpt_path auto`` goes on from the file. The random numbers of a step are a function of the run's
    seed, the epoch, the number of the batch and the process, and the order of the batches of seed and epoch, so that a
    training that was broken off ends with the very weights of one that was not. A signal during a validation is obeyed
    after it.

    Args:
        every_n_steps: save after so many steps of the optimizer as well, for what gives no warning; 0 turns it off.
        every_minutes: save after so many minutes as well; 0 turns it off.
        requeue: have Slurm queue the job again.

    Raises:
        InputError: an argument is negative.
    """

    def __init__(self, every_n_steps: int = 0, every_minutes: float = 0.0, requeue: bool = True) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_minutes", every_minutes)):
            if value < 0:
                raise InputError(f"preemption.{name}={value} must be 0 (off) or more")
        self.every_n_steps, self.every_minutes, self.requeue = every_n_steps, every_minutes, requeue
        self._saved_step, self._saved_time = 0, time.monotonic()
        self._saving = False  # so that the state says of a checkpoint whether it is one of ours
        self._processes: int | None = None  # that have trained before
        self._stepped: int | None = None  # Lightning's count for loggers, to be restored
        self._group: dist.ProcessGroup | None = None

    # --------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """What Lightning would count wrong when it goes on from a checkpoint of ours, and who has trained."""
        return {"stepped": self._stepped if self._saving else None, "processes": world_size()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._stepped, self._processes = state_dict["stepped"], state_dict["processes"]

    # --------------------------------------------------------------------------------------------------- the hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on a signal is noted, and obeyed between two steps."""
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()
        if dist.is_available() and dist.is_initialized():
            # On the CPU, so that agreeing does not make the host wait for the GPU.
            self._group = dist.new_group(backend="gloo")
        if trainer.is_global_zero and self._processes not in (None, world_size()):
            _log.warning(
                "this training had %s processes and goes on with %s: its batches are not those that it would have had",
                self._processes,
                world_size(),
            )
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        stop_signals.begin()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Obey, save, and set the random numbers of this step."""
        loop = trainer.fit_loop.epoch_loop
        if self._stepped is not None:  # the first step after a checkpoint that was saved here
            loop._batches_that_stepped, self._stepped = self._stepped, None
        # Not between two batches whose gradients are added up: those would be lost.
        if batch_idx % trainer.accumulate_grad_batches == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            stop, save = self._agreed(stop_signals.received or 0, self._due(trainer))
            if (stop or save) and trainer.global_step > 0:
                self._save(trainer)
            if stop:
                self._leave(trainer, stop)
        self._set_random_numbers(trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the random numbers of what a validation may draw."""
        if trainer.state.fn == "fit":
            self._set_random_numbers(trainer.current_epoch, trainer.global_step, trainer.global_rank, 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the random numbers of what the end of an epoch may draw, such as repairs of codebooks."""
        self._set_random_numbers(trainer.current_epoch, trainer.global_step, trainer.global_rank, 2)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A finished training has nothing to go on from."""
        if trainer.is_global_zero:
            _file(trainer).unlink(missing_ok=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the processes along that this one has started, which would wait for it for ever."""
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and not isinstance(exception, Stopped):
            launcher.kill(9)

    # ----------------------------------------------------------------------------------------------------- the work

    def _due(self, trainer: L.Trainer) -> bool:
        steps = trainer.global_step - self._saved_step
        minutes = (time.monotonic() - self._saved_time) / 60
        by_steps = self.every_n_steps > 0 and steps >= self.every_n_steps
        return steps > 0 and (by_steps or 0 < self.every_minutes <= minutes)

    def _agreed(self, signal_number: int, save: bool) -> tuple[int, bool]:
        """The highest number of a signal that any process has, and whether any wants to save."""
        if self._group is None:
            return signal_number, save
        both = torch.tensor([signal_number, int(save)])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group)
        return int(both[0]), bool(both[1])

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        self._stepped, self._saving = trainer.fit_loop.epoch_loop._batches_that_stepped, True
        try:
            trainer.save_checkpoint(_file(trainer))
        finally:
            self._stepped, self._saving = None, False
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def _leave(self, trainer: L.Trainer, number: int) -> None:
        name = signal.Signals(number).name
        if trainer.is_global_zero:
            what = f"saved {_file(trainer)}" if trainer.global_step > 0 else "there was nothing to save yet"
            _log.warning("%s after step %s: %s", name, trainer.global_step, what)
            job = slurm_job(os.environ)
            if job is not None and self.requeue and number in REQUEUE:
                _requeue(job)
        raise Stopped(128 + number)

    def _set_random_numbers(self, *place: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence([self._seed, *place]).generate_state(1, np.uint64)[0] >> 1))


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The name of this Slurm job for ``scontrol``; None outside Slurm."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment.get("SLURM_JOB_ID")


def _requeue(job: str) -> None:
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if done.returncode == 0:
        _log.warning("Slurm queues job %s again", job)
    else:
        _log.error("Slurm does not queue job %s again: %s", job, done.stderr.strip())


def _file(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / RESUME
