"""Commands in processes of their own that may be killed at a given step; started from one that has imported all."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["recsys_lightning.cli.trainer", "sklearn.decomposition", "torch", "torch._dynamo"])


def command(arguments: Sequence[str], log: Path, signals: dict[int, int]) -> None:
    """Run one; at the start of batch n of the whole training, counted from 0, signal n comes."""
    import torch

    from recsys_lightning.cli import main
    from recsys_lightning.training.preemption import Preemption

    torch.set_num_threads(1)  # sums depend on it in their last bits
    stream = log.open("a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    original = Preemption.on_train_batch_start

    def hook(self, trainer, module, batch, batch_idx):
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        if number in signals:
            os.kill(os.getpid(), signals.pop(number))
        original(self, trainer, module, batch, batch_idx)

    Preemption.on_train_batch_start = hook
    sys.exit(main(arguments))


def run(arguments: Sequence[str], log: Path, signals: dict[int, int] | None = None, timeout: float = 120) -> int:
    """Its exit status, negative where a signal has ended it."""
    process = CONTEXT.Process(target=command, args=(list(map(str, arguments)), log, signals or {}))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{arguments} hangs:\n{log.read_text()}")
    return process.exitcode


KILL, TERM, USR1, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
