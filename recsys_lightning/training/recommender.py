"""One LightningModule for every model that keeps the `Recommender` contract."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.distributed import gather_rows
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.measured import MeasuredIndex
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.training.evaluation import EvaluationSettings, Evaluator, RankTable
from recsys_lightning.training.indexing import index_of
from recsys_lightning.training.objective import log_losses
from recsys_lightning.training.optimizers import Schedule, build_optimizer, check_warmup


class RecommenderModule(L.LightningModule):
    """Trains a recommender on its own losses and ranks it by exact item ids over the whole catalogue.

    Every metric is logged twice: ``val/recall@10`` counts all items, ``val-unseen/recall@10`` strikes those that the
    user has met before (C21, C22). `fit` validates by the ranking metrics alone; `validate` and `test` add slices,
    metrics of the lists and, for models that generate semantic IDs, their semantic-ID-level score.

    Args:
        model: makes the model from the catalogue, e.g. `COBRA`; the catalogue comes from the data module.
        optimizer: makes the optimizer; biases, norms and gains are never decayed (C11).
        schedule: of the learning rate after the warm-up (C11).
        warmup_steps: steps over which the learning rate climbs (C11).
        evaluation: see `EvaluationSettings`.
    """

    def __init__(
        self,
        model: Callable[[Catalog], Recommender],
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
        schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        evaluation: EvaluationSettings = EvaluationSettings(),
    ):
        super().__init__()
        check_warmup(warmup_steps)
        self.build_model, self.optimizer, self.schedule, self.warmup_steps = model, optimizer, schedule, warmup_steps
        self.evaluation = evaluation
        self.recommender: Recommender | None = None
        self.index: ItemIndex | None = None
        self.evaluator: Evaluator | None = None
        self.rank_table: RankTable | None = None  # of the last evaluation
        self.step_losses: dict[str, Tensor] = {}  # of the training step under way, until its backward pass is done

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
        self.step_losses = self.built.losses(batch)
        return log_losses(self, self.step_losses, len(batch))

    def on_after_backward(self) -> None:
        """Let go of the losses, and of the graph behind them."""
        self.step_losses = {}

    def on_validation_epoch_start(self) -> None:
        """Encode the catalogue once, and start counting."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.index = index_of(self.built, self.evaluation.index, None if fitting else data.catalog.raw_ids)
        lengths, trie = data.data.interactions.lengths, self.built.prefix_trie
        evaluator = Evaluator(self.evaluation, data.catalog, lengths, trie, thorough=not fitting)
        self.evaluator = evaluator.to(self.device)

    on_test_epoch_start = on_validation_epoch_start

    def on_predict_epoch_start(self) -> None:
        """Encode the catalogue once."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.index = index_of(self.built, self.evaluation.index, data.catalog.raw_ids)

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Rank and count."""
        self._evaluator().update(batch, self._recommend(batch))

    test_step = validation_step

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> tuple[Tensor, Recommendations]:
        """Users (B,) and their lists of the longest cut-off, without what they have seen."""
        return batch.user, self._recommend(batch).without(batch.seen).first(max(self.evaluation.ks))

    def on_validation_epoch_end(self) -> None:
        """Log both columns."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log both columns."""
        self._finish("test")

    def on_predict_epoch_end(self) -> None:
        """Let go of the index."""
        self.index = None

    def _recommend(self, batch: SequenceBatch) -> Recommendations:
        # Long enough that a list still has max(ks) items once all that were seen are struck from it.
        assert self.index is not None  # noqa: S101 - set by the epoch's start
        return self.built.recommend(batch, max(self.evaluation.ks) + batch.seen.shape[1], self.index)

    def _evaluator(self) -> Evaluator:
        assert self.evaluator is not None  # noqa: S101 - set by the epoch's start
        return self.evaluator

    def _finish(self, stage: str) -> None:
        found = self._evaluator().compute()
        if isinstance(self.index, MeasuredIndex):
            counts = torch.tensor([[self.index.found, self.index.wanted]])
            hit, wanted = gather_rows(counts).sum(0)
            found["/index-recall"] = hit / wanted
        # The values are the same on all processes already.
        self.log_dict({f"{stage}{name}": value.float() for name, value in found.items()}, sync_dist=True)
        self.rank_table = self._evaluator().rank_table()
        self.index = self.evaluator = None
