"""The folder of a run before its training begins: which checkpoint it goes on from, and what is there already."""

import itertools
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from recsys_lightning.analysis.grid_runs import differences
from recsys_lightning.errors import InputError
from recsys_lightning.training.durable import damage, newest

_log = logging.getLogger(__name__)

NEED_CHECKPOINT = ("validate", "test", "predict", "audit")
# Which processes train, and when they save, is no difference of what is trained.
_HOW = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator", "preemption")


def checkpoint_folder(run_dir: str) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def chosen_checkpoint(command: str, given: str | None, run_dir: str, arguments: Sequence[str]) -> str | None:
    """The file that a command reads its weights from; None if a fit begins anew.

    Args:
        command: such as ``fit``.
        given: ``best``, ``last``, a file, or for a fit ``auto``: the newest whole checkpoint of a training that was
            broken off, if there is one.
        run_dir: folder of the run.
        arguments: words of the command line, for what is said.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    folder = checkpoint_folder(run_dir)
    if given == "auto":
        if command != "fit":
            raise InputError(f"--ckpt_path auto is for `recsys fit`; `recsys {command}` takes best, last or a file")
        found = newest(folder) if folder.is_dir() else None
        if found is not None:
            _log.info("going on from %s", found)
        return None if found is None else str(found)
    if given in ("best", "last"):
        given = str(folder / f"{given}.ckpt")
    if command in NEED_CHECKPOINT and given is None:
        given = str(folder / "best.ckpt")
    if given is None:
        return None
    if not Path(given).is_file():
        # From the command line: the parsed configuration loses its files where one holds a ${...}.
        words = itertools.pairwise(arguments)
        fit = " ".join(["recsys fit", *(f"-c {path}" for flag, path in words if flag in ("-c", "--config"))])
        raise InputError(f"no checkpoint {given}: train first with `{fit}`, or name one with --ckpt_path")
    wrong = damage(Path(given))
    if wrong is not None:
        raise InputError(
            f"{given} is no checkpoint, is cut off or is damaged ({wrong}); name another one with --ckpt_path"
        )
    return given


def is_finished(run_dir: str) -> bool:
    """Whether the training of a run has come to its end."""
    path = Path(run_dir) / "results.json"
    try:
        return "fit" in json.loads(path.read_text(encoding="utf-8"))["seconds_by_command"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def refuse_other_settings(run_dir: str, config: Mapping[str, Any], written: Collection[str]) -> None:
    """Refuse to go on with a run by other settings than it was begun with.

    Args:
        run_dir: folder of the run.
        config: of this command, resolved.
        written: keys that its files and its command line name, see `differences`.

    Raises:
        InputError: names the first such key with both values, and the cure.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        return
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    places = tuple(f"{place}." for place in _HOW)
    found = [(key, *both) for key, *both in differences(old, config, written) if not f"{key}.".startswith(places)]
    if found:
        key, before, now = found[0]
        more = f" ({len(found) - 1} more keys differ)" if len(found) > 1 else ""
        raise InputError(
            f"{run_dir} was begun with {key}={json.dumps(before)}, not {json.dumps(now)}{more}: set it back, begin "
            "anew with another --run_dir, or go on with the new settings by --ckpt_path last"
        )


def csv_logger(run_dir: str, checkpoint: str | None) -> CSVLogger:
    """Writes metrics.csv; a run that goes on keeps the rows of the steps before its checkpoint."""
    # Each row at once: rows in memory are lost with the process, and those of a step are few.
    logger = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)
    path = Path(run_dir) / "metrics.csv"
    if checkpoint is None or not is_first_process() or not path.is_file():
        return logger
    step = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    rows = pl.read_csv(path, infer_schema=False)
    kept = rows.filter(pl.col("step").cast(pl.Int64) < step)
    writer = logger.experiment  # its making deletes the file
    kept.write_csv(path)
    writer.metrics_keys = rows.columns
    return logger


def is_first_process() -> bool:
    """Whether this is the process that writes, as far as launchers say before processes have met."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def move_aside(folder: Path) -> None:
    """Rename the folder of an earlier run to the first free ``<folder>.<n>``: nothing is overwritten.

    Only the first process does so; the others come later and would move the new run. A run that failed before its first
    step has left nothing but its configuration, and is not kept.
    """
    if not is_first_process():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "config.yaml" not in names or names == {"config.yaml"}:
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    _log.warning("an earlier run in %s was moved to %s", folder, aside)
