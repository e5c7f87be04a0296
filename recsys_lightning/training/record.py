"""What a run leaves behind besides its checkpoints: ``config.yaml``, ``results.json`` and predictions."""

import hashlib
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import torch
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

import recsys_lightning
from recsys_lightning.data.datamodules import CatalogDataModule, SequenceDataModule
from recsys_lightning.distributed import gather_rows
from recsys_lightning.files import replacing
from recsys_lightning.semantic_ids.collisions import Resolved
from recsys_lightning.training.codebook_health import codebook_report
from recsys_lightning.training.evaluation import RankTable
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import TokenizerModule
from recsys_lightning.training.wandb_logger import WandbRunLogger  # noqa: F401 - for its short name in configurations
from recsys_lightning.training.wandb_record import (
    describe_run,
    log_best,
    log_recommendations,
    mark_preempted,
    model_class,
    summarize,
    tags_of,
)


class RunRecord(SaveConfigCallback):
    """Writes the resolved configuration and the results of a run into its folder.

    ``config.yaml`` is the configuration of `fit`; later commands on the same run write ``config-test.yaml`` and so on.
    ``results.json`` holds ``metrics`` (flat; ``val/...`` of the checkpoint that is kept as best, ``test/...`` of the
    last test), ``data``, ``model``, ``seed``, ``config``, ``hardware``, ``seconds`` in all and by command,
    ``cpu_seconds_by_command`` (of the first process, without what its data workers used), ``epochs``, ``steps``,
    ``code``, and ``evidence`` of what was trained and validated on, for `recsys audit`; of a model with codebooks of
    its own also ``codebooks`` (a row a level), ``codebooks_whole``, ``codebook_events`` (how many) and ``collapsed``,
    see `CodebookHealth`; of a tokenizer ``semantic_ids``, how the codes that `fit` has written collide, and what its
    policy of collisions has cost. Commands on one run add to the file. Beside it, ``ranks-val.parquet`` and
    ``ranks-test.parquet`` hold the rank of every answer (see `RankTable`) by raw ids, for tests that
    pair users.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note the time and save the configuration."""
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.fitting = stage == TrainerFn.FITTING
        self.validated: dict[str, float] = {}
        self.ranks: RankTable | None = None  # of those metrics
        self.code = code_fingerprint()  # now: the files may be edited while the run goes on
        if not trainer.is_global_zero:
            return
        self.config_values = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        self.folder = Path(trainer.default_root_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        command = TrainerFn(stage).value
        name = self.config_filename if command == "fit" else f"config-{command}.yaml"
        with replacing(self.folder / name) as file:
            file.write(yaml.safe_dump(self.config_values, sort_keys=False).encode())
        tags = tags_of(_data(trainer).get("source"), model_class(self.config_values), self.code["commit"])
        describe_run(trainer, command, self.config_values, tags)

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on has to know: its best validation so far, and what it has cost."""
        return {
            "validated": self.validated,
            "seconds": time.perf_counter() - self.started,
            "cpu_seconds": time.process_time() - self.cpu_started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the ranks of that validation lie in the folder of the run."""
        if not self.fitting:  # a test reads the checkpoint too
            return
        self.validated = dict(state_dict["validated"])
        self.started -= state_dict["seconds"]
        self.cpu_started -= state_dict["cpu_seconds"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the validation metrics of the best epoch, and while nothing says which is best, of the last."""
        if trainer.sanity_checking:
            return
        metrics = _metrics(trainer, "val")
        log_best(trainer, metrics)
        monitor = trainer.checkpoint_callback
        if isinstance(monitor, ModelCheckpoint) and monitor.monitor in self.validated and monitor.monitor in metrics:
            better = metrics[monitor.monitor] - self.validated[monitor.monitor]
            if (better if monitor.mode == "max" else -better) <= 0:
                return
        self.validated, self.ranks = metrics, _ranks(pl_module)
        if trainer.state.fn == TrainerFn.FITTING:  # now: a later process may not see this validation
            self._write_ranks(trainer, "val")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the fit."""
        self._write(trainer, pl_module, "fit", self.validated)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Show W&B, where it is asked for, what a few users are recommended."""
        if batch_idx == 0:
            log_recommendations(trainer, pl_module, batch)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the test."""
        self.ranks = _ranks(pl_module)
        self._write(trainer, pl_module, "test", _metrics(trainer, "test"))
        self._write_ranks(trainer, "test")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say in W&B that the run was interrupted, if it was."""
        mark_preempted(trainer, exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Record `recsys validate`, for which there is no hook of its own."""
        if stage == "validate" and self.validated:
            self._write(trainer, pl_module, "validate", self.validated)
            self._write_ranks(trainer, "val")

    def _write(self, trainer: L.Trainer, module: L.LightningModule, command: str, metrics: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        path = self.folder / "results.json"
        known = json.loads(path.read_text()) if path.is_file() and command != "fit" else {}
        seconds = {**known.get("seconds_by_command", {}), command: round(time.perf_counter() - self.started, 2)}
        cpu_seconds = round(time.process_time() - self.cpu_started, 2)
        results = {
            "run": str(self.folder),
            "model": _model_name(module),
            "seed": self.config_values.get("seed_everything"),
            "metrics": {**known.get("metrics", {}), **metrics},
            "data": _data(trainer),
            "seconds": round(sum(seconds.values()), 2),
            "seconds_by_command": seconds,
            "cpu_seconds_by_command": {**known.get("cpu_seconds_by_command", {}), command: cpu_seconds},
            "hardware": _hardware(trainer),
            "code": self.code,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": self.config_values,
        }
        trained = {"epochs": trainer.current_epoch, "steps": trainer.global_step} if command == "fit" else known
        results |= {name: trained.get(name) for name in ("epochs", "steps", "parameters")}
        if command == "fit":
            results["parameters"] = sum(p.numel() for p in module.parameters() if p.requires_grad)
        results["evidence"] = _evidence(trainer) if command == "fit" else known.get("evidence", {})
        report = codebook_report(trainer)
        if report is not None:
            results |= report.record()
        if isinstance(module, TokenizerModule) and module.written is not None:
            results["semantic_ids"] = _semantic_ids(module.written)
        with replacing(path) as file:
            file.write(json.dumps(results, indent=1).encode())
        summarize(trainer, command, results)

    def _write_ranks(self, trainer: L.Trainer, stage: str) -> None:
        if self.ranks is None or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        table = pl.DataFrame({name: column.numpy() for name, column in self.ranks._asdict().items()})
        table = _with_raw_ids(table, data).select("user_id", "item_id", pl.col(RankTable._fields[2:]).cast(pl.Int32))
        with replacing(self.folder / f"ranks-{stage}.parquet") as file:
            table.write_parquet(file)


class PredictionWriter(BasePredictionWriter):
    """Writes the lists of `recsys predict` to ``predictions.parquet``: raw user and item ids, rank and score.

    One row a recommendation, by user and rank; items the user has met are left out. Of several processes the first
    writes the users of all.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # users, ranks, items and scores of a batch

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, *_: Any, **__: Any
    ) -> None:
        """Keep a batch."""
        if not isinstance(pl_module, RecommenderModule):
            return
        users, lists = prediction
        items = lists.item_ids.cpu().flatten()
        rows, width = lists.item_ids.shape
        ranks = torch.arange(1, width + 1).repeat(rows)
        columns = (users.cpu().repeat_interleave(width), ranks, items, lists.scores.float().cpu().flatten())
        user, rank, item, score = (column[items > 0] for column in columns)
        self.parts.append((user, rank, item, score))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        columns = [gather_rows(torch.cat(part)) for part in zip(*self.parts, strict=True)]
        if not trainer.is_global_zero:
            return
        names = ("user", "rank", "item", "score")
        table = pl.DataFrame({name: column.numpy() for name, column in zip(names, columns, strict=True)})
        data = trainer.datamodule  # type: ignore[attr-defined]
        table = _with_raw_ids(table.sort("user", "rank"), data).select("user_id", "rank", "item_id", "score")
        with replacing(Path(trainer.default_root_dir) / "predictions.parquet") as file:
            table.write_parquet(file)


def code_fingerprint() -> dict[str, str | None]:
    """Which code ran: version, SHA-256 over the package's source files, and the git commit where there is one."""
    package = Path(recsys_lightning.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        commit: str | None = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {"version": recsys_lightning.__version__, "sha256": digest.hexdigest(), "commit": commit}


def _with_raw_ids(table: pl.DataFrame, data: CatalogDataModule) -> pl.DataFrame:
    """A table with columns ``user`` and ``item`` (numbers), with ``user_id`` and ``item_id`` (raw) beside them."""
    users = pl.DataFrame({"user_id": data.data.user_ids}).with_row_index("user").cast({"user": pl.Int64})
    items = pl.DataFrame({"item_id": data.catalog.raw_ids}).with_row_index("item", offset=1).cast({"item": pl.Int64})
    return table.join(users, on="user", maintain_order="left").join(items, on="item", maintain_order="left")


def _ranks(module: L.LightningModule) -> RankTable | None:
    return module.rank_table if isinstance(module, RecommenderModule) else None


def _evidence(trainer: L.Trainer) -> dict[str, str]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, SequenceDataModule):
        return {}
    counts = np.ascontiguousarray(data.catalog.train_counts, dtype=np.int64)
    return {
        "train_rows": data.dataset("train").fingerprint(),
        "val_rows": data.dataset("val").fingerprint(),
        "train_counts": hashlib.sha256(counts.tobytes()).hexdigest(),
    }


def _metrics(trainer: L.Trainer, stage: str) -> dict[str, float]:
    wanted = (f"{stage}/", f"{stage}-unseen/")
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(wanted)}


def _semantic_ids(written: Resolved) -> dict[str, Any]:
    """How the codes that a tokenizer's fit has written collide, and what their policy has cost."""
    return {**asdict(written.table.collision_report()), "collisions": asdict(written.cost)}


def _model_name(module: L.LightningModule) -> str:
    inner = getattr(module, "recommender", None) or getattr(module, "tokenizer", None) or module
    return type(inner).__name__


def _data(trainer: L.Trainer) -> dict[str, Any]:
    module = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, CatalogDataModule):
        return {}
    interactions, text = module.data.interactions, module.catalog.text
    return {
        "source": module.source.name,
        "num_users": interactions.num_users,
        "num_items": interactions.num_items,
        "num_interactions": len(interactions),
        "fingerprint": module.data.fingerprint,
        "text_encoder": text.encoder if text else None,
        "text_fingerprint": text.fingerprint if text else None,
    }


def _hardware(trainer: L.Trainer) -> dict[str, Any]:
    return {
        "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
        "devices": trainer.num_devices * trainer.num_nodes,
        "nodes": trainer.num_nodes,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "cpu_cores": os.cpu_count(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "python": platform.python_version(),
    }
