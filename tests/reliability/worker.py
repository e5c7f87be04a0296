"""`recsys`, to be started by torchrun: in its first attempt, one process sends a signal at one step."""

import os
import signal
import sys

from recsys_lightning.cli import main
from recsys_lightning.training.preemption import Preemption

rank, step, name, receiver = os.environ.get("DISTURB", "-1 0 SIGTERM self").split()
original = Preemption.on_train_batch_start


def hook(self, trainer, module, batch, batch_idx):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and trainer.global_rank == int(rank) and trainer.fit_loop.epoch_loop.total_batch_idx == int(step):
        os.kill(os.getppid() if receiver == "agent" else os.getpid(), signal.Signals[name])
    original(self, trainer, module, batch, batch_idx)


Preemption.on_train_batch_start = hook
sys.exit(main())
