"""Checkpoints that are whole or absent, and which of those in a folder a training goes on from."""

import logging
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

_log = logging.getLogger(__name__)

RESUME = "resume.ckpt"  # what a training that was stopped has saved


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its name and renames it: a process that dies leaves the old file or the new one.

    Lightning's own stages in ``$TMPDIR``; where that is another file system, its last step is a copy, which a kill cuts
    off. What other writers have left half done in the folder is removed before the first of ours.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cleaned: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            InputError: the disk is full, or the folder cannot be written to; what was at `path` stays.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent not in self._cleaned:
                self._cleaned.add(target.parent)
                for left in target.parent.glob(".*.ckpt.*.tmp"):
                    left.unlink(missing_ok=True)
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer has RuntimeError for a full disk
            raise InputError(f"cannot write {target}: {error}; what was there is untouched") from error


class BestAndLast(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, whose last.ckpt is of the last validation, not of the last that was the best."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what is due."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what is due."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._save_last(trainer)

    def _save_last(self, trainer: L.Trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):  # true where this step is saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is whole.

    A checkpoint is a zip file, which holds a checksum of each of its parts: all of it is read once.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return None if broken is None else f"the checksum of {broken} is wrong"


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step in a folder; None if it holds none at all.

    Raises:
        InputError: all that are there are damaged.
    """
    found: list[tuple[int, bool, Path]] = []
    bad: dict[Path, str] = {}
    for path in sorted(folder.glob("*.ckpt")):
        wrong = damage(path)
        if wrong is None:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            found.append((int(state["global_step"]), path.name == RESUME, path))
        else:
            bad[path] = wrong
    for path, wrong in bad.items():
        _log.warning("%s is damaged and is passed over: %s", path, wrong)
    if bad and not found:
        raise InputError(
            f"no checkpoint in {folder} is whole: {', '.join(path.name for path in bad)}; remove them to begin anew"
        )
    return max(found)[2] if found else None
