"""One LightningModule for every item tokenizer: it learns, then writes the semantic IDs of the whole catalogue."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.datamodules import CatalogDataModule
from recsys_lightning.semantic_ids.health import describe, usage_metrics
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, tokenize
from recsys_lightning.training.objective import log_losses
from recsys_lightning.training.optimizers import Schedule, build_optimizer, check_warmup

_log = logging.getLogger(__name__)

FILE_NAME = "semantic_ids.safetensors"


class TokenizerModule(L.LightningModule):
    """Fits an `ItemTokenizer` on item embeddings and writes ``semantic_ids.safetensors`` into the run folder.

    After each validation the whole catalogue is tokenized and judged: ``val/loss`` (sum of the tokenizer's losses),
    ``val/collision_rate``, ``val/cells``, and for each level ``val/perplexity@l``, ``val/entropy@l`` (share of log K)
    and ``val/dead_codes@l``. The file is written at the end of `fit`, from the best checkpoint where there is one.

    Items that the data hold out of training (``data.cold_items``) are neither fitted on nor part of a validation, so
    that they choose no checkpoint either; the file and ``test/...`` are of the whole catalogue.

    Args:
        tokenizer: makes the tokenizer from the width of the embeddings, e.g. `RQVAE` or `ResidualKMeans`.
        optimizer: makes the optimizer; biases, norms and gains are never decayed.
        schedule: of the learning rate after the warm-up.
        warmup_steps: steps over which the learning rate climbs.
    """

    def __init__(
        self,
        tokenizer: Callable[[int], ItemTokenizer],
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-4),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ):
        super().__init__()
        check_warmup(warmup_steps)
        self.build_tokenizer, self.optimizer = tokenizer, optimizer
        self.schedule, self.warmup_steps = schedule, warmup_steps
        self.tokenizer: ItemTokenizer | None = None
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

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """The sum of the tokenizer's losses; each is logged by name, and so is the sum."""
        self.step_losses = self.built.losses(batch)
        return log_losses(self, self.step_losses, len(batch))

    def on_after_backward(self) -> None:
        """Let go of the losses, and of the graph behind them."""
        self.step_losses = {}

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the losses on a part of the items that may be learned from."""
        self._log_losses(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the losses on a part of the catalogue."""
        self._log_losses(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Tokenize the items that may be learned from and log how their codes are used."""
        table = self.semantic_ids()
        rows = F.pad(self._warm_items, (1, 0))  # the padding row first
        self._log_usage(replace(table, codes=table.codes[rows]), "val")

    def on_test_epoch_end(self) -> None:
        """Tokenize the whole catalogue and log how its codes are used."""
        self._log_usage(self.semantic_ids(), "test")

    def on_fit_end(self) -> None:
        """Write the semantic IDs, from the best checkpoint where there is one."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            state = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
            self.load_state_dict(state["state_dict"])
        ids = self.semantic_ids()
        path = Path(self.trainer.default_root_dir) / FILE_NAME
        ids.save(path)
        _log.info("wrote %s: %s", path, describe(ids.collision_report()))

    def semantic_ids(self) -> SemanticIds:
        """The table of the whole catalogue as the tokenizer stands now."""
        catalog = self._catalog
        name = type(self.built).__name__
        return tokenize(self.built, catalog.text_embeddings(), catalog.text_fingerprint, name, catalog.fields)

    def _log_losses(self, batch: Tensor, stage: str) -> None:
        losses = self.built.losses(batch)
        if not losses:  # learned in closed form: what is left of an embedding once its codewords are taken away
            losses = {"reconstruction": F.mse_loss(self.built.reconstruct(batch), batch)}
        losses["loss"] = torch.stack(list(losses.values())).sum()
        values = {f"{stage}/{name}": value for name, value in losses.items()}
        self.log_dict(values, batch_size=len(batch), sync_dist=True)

    def _log_usage(self, table: SemanticIds, stage: str) -> None:
        values = {f"{stage}/{name}": value for name, value in usage_metrics(table).items()}
        self.log_dict(values, sync_dist=True)
