"""Lightning's W&B logger for a run folder: every command on one folder logs into one W&B run."""

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

RUN_ID_FILE = "wandb-run-id.txt"


class WandbRunLogger(WandbLogger):
    """`WandbLogger` that keeps the id of the W&B run in ``wandb-run-id.txt`` of the run folder.

    A test, or a fit that goes on from a checkpoint, finds the file and adds to the run of the fit; a new fit moves the
    folder aside, file and all, and begins another one. Offline runs too carry the id, and ``wandb sync`` joins them.
    `WANDB_RUN_ID`, which `wandb agent` sets, comes before the file. When a command ends its run is finished, so that a
    program may run several.

    Args:
        save_dir: the folder of the run, ``${run_dir}``.
        project: of W&B; in a sweep it is the sweep's.
        name: shown in W&B; by default the last two parts of the folder's path, in a sweep what W&B calls it.
        entity: user or team.
        group: of runs that belong together.
        job_type: kind of run within a group.
        tags: further tags; data set, model and commit are added.
        notes: a longer text.
        offline: keep the run on this machine, as WANDB_MODE=offline does; no account is needed.
        log_model: upload checkpoints: ``all`` as they are written, true at the end.

    Raises:
        InputError: wandb is not installed; later, there is no account or the server cannot be reached.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "recsys_lightning",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        offline: bool = False,
        log_model: Literal["all"] | bool = False,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise InputError('the logger WandbRunLogger needs wandb: pip install "recsys_lightning[wandb]"')
        in_sweep = "WANDB_SWEEP_ID" in os.environ
        if name is None and not in_sweep and "WANDB_NAME" not in os.environ:
            name = "/".join(Path(save_dir).parts[-2:])
        more: dict[str, Any] = {"entity": entity, "group": group, "job_type": job_type, "tags": tags, "notes": notes}
        super().__init__(name, save_dir, offline=offline, project=project, log_model=log_model, **more)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it, and no longer knows what it was for
        if in_sweep:  # they are the sweep's, and wandb warns of others
            self._wandb_init |= {"project": None, "entity": None}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun or taken up when it is first asked for; on other processes one that does nothing."""
        if self._experiment is not None:
            return self._experiment
        import wandb

        # Only now: a fit moves the folder of an earlier run aside after its loggers are made.
        folder = Path(str(self.save_dir))
        folder.mkdir(parents=True, exist_ok=True)  # wandb would write to /tmp instead
        found = run_id(folder)
        if "WANDB_SWEEP_ID" not in os.environ:
            self._wandb_init["id"] = found
        try:
            return super().experiment
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(
                f"W&B: {reason}; WANDB_MODE=offline keeps the run on this machine and needs no account"
            ) from error

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the W&B run; a later command takes it up again."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def run_id(folder: Path) -> str:
    """The id of a folder's W&B run, which is written into the folder where it has none."""
    path = folder / RUN_ID_FILE
    known = path.read_text().strip() if path.is_file() else ""
    found = os.environ.get("WANDB_RUN_ID") or known or uuid.uuid4().hex[:8]
    if found != known:
        with replacing(path) as file:
            file.write(f"{found}\n".encode())
    return found
