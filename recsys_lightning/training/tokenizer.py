"""One LightningModule for every item tokenizer: it learns, then writes the semantic IDs of the whole catalogue."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.datamodules import CatalogDataModule
from recsys_lightning.distributed import copy_first_state
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.collisions import Policy, Resolved, resolve
from recsys_lightning.semantic_ids.health import describe, reconstruction_error, usage_metrics
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, rebuilt, tokenize
from recsys_lightning.training.objective import global_means, log_losses
from recsys_lightning.training.optimizers import Schedule, build_optimizer, check_warmup

_log = logging.getLogger(__name__)

FILE_NAME = "semantic_ids.safetensors"


class TokenizerModule(L.LightningModule):
    """Fits an `ItemTokenizer` on item embeddings and writes ``semantic_ids.safetensors`` into the run folder.

    After each validation the whole catalogue is tokenized and judged: ``val/loss`` (sum of the tokenizer's losses; of
    one that is learned in closed form its reconstruction error), ``val/reconstruction_error``, ``val/collision_rate``,
    ``val/cells``, and for each level ``val/perplexity@l``, ``val/entropy@l`` (share of log K) and ``val/dead_codes@l``.
    The file is written at the end of `fit`, from the best checkpoint where there is one.

    Items that the data hold out of training (``data.cold_items``) are neither fitted on nor part of a validation, so
    that they choose no checkpoint either; the file and ``test/...`` are of the whole catalogue.

    Args:
        tokenizer: makes the tokenizer from the width of the embeddings, e.g. `RQVAE` or `ResidualKMeans`.
        optimizer: makes the optimizer; biases, norms and gains are never decayed.
        schedule: of the learning rate after the warm-up.
        warmup_steps: steps over which the learning rate climbs.
        collisions: what becomes of items with one and the same codes, in the file and in ``test/...``, see
            `recsys_lightning.semantic_ids.collisions`: nothing, one code more (``extra_token``), or another last code,
            by ``sinkhorn`` or ``reassign``. What it costs is said in the log and in ``results.json``.
    """

    def __init__(
        self,
        tokenizer: Callable[[int], ItemTokenizer],
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-4),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        collisions: Policy = "none",
    ):
        super().__init__()
        check_warmup(warmup_steps)
        if collisions not in get_args(Policy):
            raise InputError(f"collisions must be one of {', '.join(get_args(Policy))}, got {collisions!r}")
        self.build_tokenizer, self.optimizer = tokenizer, optimizer
        self.schedule, self.warmup_steps = schedule, warmup_steps
        self.collisions: Policy = collisions
        self.tokenizer: ItemTokenizer | None = None
        self.written: Resolved | None = None  # what `fit` has written, and what that cost
        self._has_losses = False  # to be minimised by gradient; known from the first batch that is judged
        self.step_losses: dict[str, Tensor] = {}  # of the training step under way, until its backward pass is done

    def configure_model(self) -> None:
        """Build the tokenizer as soon as the data module can say how wide the embeddings are."""
        if self.tokenizer is None:
            self.tokenizer = self.build_tokenizer(self._catalog.text_width)

    @property
    def built(self) -> ItemTokenizer:
        """The tokenizer; available from `configure_model` on."""
        if self.tokenizer is None:
            raise RuntimeError("the tokenizer is built by the Trainer, from the data module's embeddings")
        return self.tokenizer

    @property
    def _data(self) -> CatalogDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined,no-any-return]

    @property
    def _catalog(self) -> Catalog:
        return self._data.catalog

    @property
    def _warm_items(self) -> Tensor:
        """Ids of the items that may be learned from."""
        return torch.from_numpy(self._data.warm_items)

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule over all trainable parameters."""
        total = int(self.trainer.estimated_stepping_batches)
        return build_optimizer(self.built, self.optimizer, self.schedule, self.warmup_steps, total)

    def on_fit_start(self) -> None:
        """Learn in closed form what can be, unless a checkpoint brought it."""
        if not self.built.fitted:
            warm = self._warm_items
            embeddings = self._catalog.text_embeddings()[warm].to(self.device)
            self.built.fit(embeddings, self._catalog.fields[(warm - 1).numpy()])
            copy_first_state(self.built)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """The sum of the tokenizer's losses; each is logged by name, and so is the sum."""
        self.step_losses = self.built.losses(batch)
        return log_losses(self, self.step_losses, len(batch))

    def on_after_backward(self) -> None:
        """Let go of the losses, and of the graph behind them."""
        self.step_losses = {}

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the losses, if there are any, on a part of the items that may be learned from."""
        self._log_losses(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the losses, if there are any, on a part of the catalogue."""
        self._log_losses(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Tokenize the items that may be learned from, and log how their codes are used and what these lose."""
        self._log_table(self.semantic_ids().of_items(self._warm_items), self._warm_items, "val")

    def on_test_epoch_end(self) -> None:
        """Tokenize the whole catalogue, and log how its codes are used and what these lose."""
        table = self._resolved(self.semantic_ids()).table
        self._log_table(table, torch.arange(1, table.num_items + 1), "test")

    def on_train_end(self) -> None:
        """Write the semantic IDs, from the best checkpoint where there is one; colliding ones as `collisions` says."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            state = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
            self.load_state_dict(state["state_dict"])
        self.written = self._resolved(self.semantic_ids())
        path = Path(self.trainer.default_root_dir) / FILE_NAME
        self.written.table.save(path)
        _log.info("wrote %s: %s", path, describe(self.written.table.collision_report()))
        if self.collisions != "none":
            _log.info(self.written.cost.describe())

    def semantic_ids(self) -> SemanticIds:
        """The table of the whole catalogue as the tokenizer stands now; collisions stay."""
        catalog = self._catalog
        name = type(self.built).__name__
        return tokenize(self.built, catalog.text_embeddings(), catalog.text_fingerprint, name, catalog.fields)

    def _resolved(self, table: SemanticIds) -> Resolved:
        return resolve(self.collisions, self.built, self._catalog.text_embeddings(), table)

    def _log_losses(self, batch: Tensor, stage: str) -> None:
        losses = self.built.losses(batch)
        self._has_losses = bool(losses)
        if losses:
            losses["loss"] = torch.stack(list(losses.values())).sum()
            values, num_rows = global_means(losses, len(batch))
            named = {f"{stage}/{name}": value for name, value in values.items()}
            self.log_dict(named, batch_size=num_rows, sync_dist=True)

    def _log_table(self, table: SemanticIds, items: Tensor, stage: str) -> None:
        """Log the use of the codes of some items, by id, and what they lose; the loss too, where there is no other."""
        values = usage_metrics(table)
        if table.num_levels == self.built.num_levels:  # a code that only counts says nothing of an item
            embeddings = self._catalog.text_embeddings()[items]
            values["reconstruction_error"] = reconstruction_error(rebuilt(self.built, embeddings, table.codes[1:]))
        if not self._has_losses:
            values["loss"] = values.get("reconstruction_error", 0.0)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)
