"""One LightningModule for every model that keeps the `Recommender` contract."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MetricCollection

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranking import count_relevant, hits, ranking_metrics
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.training.objective import log_losses
from recsys_lightning.training.optimizers import Schedule, build_optimizer, check_warmup


class RecommenderModule(L.LightningModule):
    """Trains a recommender on its own losses and ranks it by exact item ids over the whole catalogue.

    Every metric is logged twice: ``val/recall@10`` counts all items, ``val-unseen/recall@10`` strikes those that the
    user has met before (C21, C22).

    Args:
        model: makes the model from the catalogue, e.g. `COBRA`; the catalogue comes from the data module.
        optimizer: makes the optimizer; biases, norms and gains are never decayed (C11).
        schedule: of the learning rate after the warm-up (C11).
        warmup_steps: steps over which the learning rate climbs (C11).
        ks: cut-offs of the metrics.
    """

    def __init__(
        self,
        model: Callable[[Catalog], Recommender],
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
        schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        ks: tuple[int, ...] = (5, 10, 20, 50),
    ):
        super().__init__()
        if not ks or min(ks) < 1:
            raise InputError(f"model.ks={list(ks)} must be cut-offs of 1 or more")
        check_warmup(warmup_steps)
        self.build_model, self.optimizer, self.schedule, self.warmup_steps = model, optimizer, schedule, warmup_steps
        self.ks = ks
        self.recommender: Recommender | None = None
        self.metrics = torch.nn.ModuleDict()
        for stage in ("val", "test"):
            for column in (stage, f"{stage}-unseen"):
                self.metrics[column] = ranking_metrics(ks).clone(prefix=f"{column}/")
        self.item_vectors: Tensor | None = None

    def configure_model(self) -> None:
        """Build the model as soon as the data module can say which items there are."""
        if self.recommender is None:
            self.recommender = self.build_model(self.trainer.datamodule.catalog)  # type: ignore[attr-defined]

    @property
    def built(self) -> Recommender:
        """The model; available from `configure_model` on."""
        if self.recommender is None:
            raise RuntimeError("the model is built by the Trainer, from the data module's catalogue")
        return self.recommender

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule over all trainable parameters."""
        total = self.trainer.estimated_stepping_batches
        return build_optimizer(self.built, self.optimizer, self.schedule, self.warmup_steps, int(total))

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor | None:
        """The sum of the model's losses; each is logged by name, and so is the sum."""
        return log_losses(self, self.built.losses(batch), len(batch))

    def on_validation_epoch_start(self) -> None:
        """Encode the catalogue once."""
        self.item_vectors = self.built.encode_items()

    on_test_epoch_start = on_validation_epoch_start
    on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Rank and count."""
        self._evaluate(batch, "val")

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Rank and count."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> tuple[Tensor, Recommendations]:
        """Users (B,) and their lists of the longest cut-off, without what they have seen."""
        return batch.user, self._recommend(batch).without(batch.seen, max(self.ks))

    def on_validation_epoch_end(self) -> None:
        """Log both columns."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log both columns."""
        self._log("test")

    def _recommend(self, batch: SequenceBatch) -> Recommendations:
        # Long enough that a list still has max(ks) items once all that were seen are struck from it.
        assert self.item_vectors is not None  # noqa: S101 - set by the epoch's start
        return self.built.recommend(batch, max(self.ks) + batch.seen.shape[1], self.item_vectors)

    def _evaluate(self, batch: SequenceBatch, stage: str) -> None:
        answered = self._recommend(batch)
        num_relevant = count_relevant(batch.target)
        for column, listed in ((stage, answered), (f"{stage}-unseen", answered.without(batch.seen, max(self.ks)))):
            self._metrics(column).update(hits(listed.item_ids[:, : max(self.ks)], batch.target), num_relevant)

    def _log(self, stage: str) -> None:
        for column in (stage, f"{stage}-unseen"):
            metrics = self._metrics(column)
            self.log_dict({name: value.float() for name, value in metrics.compute().items()}, sync_dist=True)
            metrics.reset()
        self.item_vectors = None

    def _metrics(self, column: str) -> MetricCollection:
        metrics = self.metrics[column]
        assert isinstance(metrics, MetricCollection)  # noqa: S101 - the dict holds nothing else
        return metrics
