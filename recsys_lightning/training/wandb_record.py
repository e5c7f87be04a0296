"""What W&B is told of a run besides its metrics: configuration, tags, the best validation, tables of recommendations.

Axis letters: B rows, R places of a list.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.signals import REQUEUE
from recsys_lightning.training.preemption import Stopped
from recsys_lightning.training.recommender import RecommenderModule

# The best value of the monitored metric so far. W&B can sort by names of letters, digits and underscores only, which
# ``best/val/ndcg@10`` is not.
OBJECTIVE = "objective"
NUM_USERS, NUM_PLACES = 8, 10
COLUMNS = ("user", "history", "answer", "rank", "item", "title", "score", "seen", "hit")
_MAX_TAG = 64  # characters that W&B takes


def wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    """The W&B loggers of a Trainer; on processes other than the first, where they log nothing, none."""
    return [x for x in trainer.loggers if isinstance(x, WandbLogger)] if trainer.is_global_zero else []


def describe_run(trainer: L.Trainer, command: str, config: Mapping[str, Any], tags: Sequence[str]) -> None:
    """Give W&B the whole configuration of a command, and tags beside the user's own.

    The configuration of `fit` stands at the top, where columns look for it; another command's under its own name.
    """
    for logger in wandb_loggers(trainer):
        run = logger.experiment
        run.config.update(dict(config) if command == "fit" else {command: dict(config)}, allow_val_change=True)
        run.tags = tuple(dict.fromkeys((*(run.tags or ()), *tags)))


def tags_of(dataset: str | None, model: str | None, commit: str | None) -> list[str]:
    """``dataset:beauty``, ``model:COBRA``, ``commit:8a9176d``, without what is not known."""
    named = {"dataset": dataset, "model": model, "commit": commit}
    return [f"{name}:{value}"[:_MAX_TAG] for name, value in named.items() if value]


def model_class(config: Mapping[str, Any]) -> str | None:
    """The class of the model or the tokenizer that a configuration names, without its module."""
    module = config.get("model") or {}
    inner = module.get("init_args") or {}
    named = inner.get("model") or inner.get("tokenizer") or module
    path = named.get("class_path") if isinstance(named, dict) else None
    return path.rpartition(".")[2] if path else None


def log_best(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Log the best value so far of what ``checkpoint.monitor`` names, after each validation of a fit.

    As ``best/val/ndcg@10`` and, for sweeps, as ``objective``. A sweep reads the last value of its metric, and stops
    weak runs early by the values on the way.
    """
    checkpoint = trainer.checkpoint_callback
    if trainer.state.fn != TrainerFn.FITTING or not isinstance(checkpoint, ModelCheckpoint):
        return
    if checkpoint.monitor is None or checkpoint.monitor not in metrics:
        return
    best = metrics[checkpoint.monitor]
    if checkpoint.best_model_score is not None:  # of the validations before this one, also before a restart
        choose = max if checkpoint.mode == "max" else min
        best = choose(best, float(checkpoint.best_model_score))
    for logger in wandb_loggers(trainer):
        values = {f"best/{checkpoint.monitor}": best, OBJECTIVE: best}
        logger.log_metrics(values, trainer.global_step)


def summarize(trainer: L.Trainer, command: str, results: Mapping[str, Any]) -> None:
    """Give W&B the figures of ``results.json`` by which runs and sweeps are compared.

    ``seconds``, ``epochs``, ``steps``, ``parameters``, ``collapsed`` and the metrics of the test as they are;
    ``best/val/...`` are the validation metrics of the checkpoint that is kept as best. Of these a command other than
    `fit` only writes what W&B does not have, as where the fit's run is offline and known by its files alone.
    """
    metrics: Mapping[str, float] = results["metrics"]
    monitor: str = (results["config"].get("checkpoint") or {}).get("monitor") or ""
    figures = {name: results.get(name) for name in ("seconds", "epochs", "steps", "parameters", "collapsed")}
    figures |= {name: value for name, value in metrics.items() if name.startswith("test")}
    best = {f"best/{name}": value for name, value in metrics.items() if name.startswith("val")}
    if monitor in metrics:
        best[OBJECTIVE] = metrics[monitor]
    for logger in wandb_loggers(trainer):
        summary = logger.experiment.summary
        known = {} if command == "fit" else dict(summary)
        new = {name: value for name, value in best.items() if name not in known}
        summary.update({name: value for name, value in (figures | new).items() if value is not None})


def mark_preempted(trainer: L.Trainer, exception: BaseException) -> None:
    """Tell W&B of a run that a scheduler has interrupted, so that a sweep hands it out once more, by the same id.

    Only where the signal says that the machine is taken away: SIGTERM is also how a sweep ends a weak run for good.
    """
    if isinstance(exception, Stopped) and exception.code in [128 + number for number in REQUEUE]:
        for logger in wandb_loggers(trainer):
            logger.experiment.mark_preempting()


def log_recommendations(trainer: L.Trainer, module: L.LightningModule, batch: SequenceBatch) -> None:
    """Log a table of what the first users of a batch are recommended, see `recommendation_rows`.

    The lists are asked for once more. All processes must call it, since an index may be spread over them.
    """
    asked = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
    if not asked or not isinstance(module, RecommenderModule) or module.index is None:
        return
    few = _first(batch, NUM_USERS)
    with torch.inference_mode(), trainer.precision_plugin.forward_context():
        lists = module.built.recommend(few, NUM_PLACES, module.index).first(NUM_PLACES)
    data = trainer.datamodule  # type: ignore[attr-defined]
    for logger in wandb_loggers(trainer):
        rows = recommendation_rows(few, lists, data.catalog, data.data.user_ids)
        logger.log_table("recommendations", columns=list(COLUMNS), data=rows, step=trainer.global_step)


def recommendation_rows(
    batch: SequenceBatch, lists: Recommendations, catalog: Catalog, user_ids: Sequence[str]
) -> list[list[Any]]:
    """A row for each place of each list, with `COLUMNS`: raw ids, and titles where items have them.

    Args:
        batch: B users.
        lists: theirs, (B, R).
        catalog: of the items.
        user_ids: raw id of each user number.
    """
    titles = _titles(catalog)
    rows = []
    for number, user in enumerate(batch.user.tolist()):
        history, answers = (_items(part[number]) for part in (batch.history, batch.target))
        seen = set(_items(batch.seen[number]))
        told = [user_ids[user], *("\n".join(titles[item] for item in items) for items in (history, answers))]
        places = zip(lists.item_ids[number].tolist(), lists.scores[number].float().tolist(), strict=True)
        for rank, (item, score) in enumerate(places, start=1):
            if item:  # 0 where the list has ended
                raw = catalog.raw_ids[item - 1]
                rows.append([*told, rank, raw, titles[item], score, item in seen, item in answers])
    return rows


def _titles(catalog: Catalog) -> list[str]:
    """(I+1) the title of each item, or its raw id; nothing at 0."""
    raw = catalog.raw_ids
    known = catalog.fields.get_column("title").to_list() if "title" in catalog.fields.columns else [None] * len(raw)
    return ["", *(title or name for title, name in zip(known, raw, strict=True))]


def _items(row: Tensor) -> list[int]:
    return [item for item in row.tolist() if item]


def _first(batch: SequenceBatch, count: int) -> SequenceBatch:
    parts = (batch.user, batch.history, batch.target, batch.seen, batch.user_features)
    return SequenceBatch(*(part[:count] for part in parts))
