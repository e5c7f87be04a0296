"""Codebook health: how evenly a model's codebooks are used, how hard each loss term pulls at them, and what helps."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.health import CodebookState
from recsys_lightning.training.checkpoints import Learner, trained_model
from recsys_lightning.training.codebook_collapse import Check, CollapseResponse, OnCollapse, Repair, find_collapses
from recsys_lightning.training.codebook_files import CodebookFiles, num_events, show_usage
from recsys_lightning.training.codebook_report import CodebookReport, codebook_levels, whole_figures
from recsys_lightning.training.codebook_state import codebook_state_now, gradient_norms, has_codebooks, quantizer_of
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import TokenizerModule

_log = logging.getLogger(__name__)


class CodebookHealth(L.Callback):
    """Watches the codebooks of a model that has its own, and acts on a collapse; other models it leaves alone.

    In training, once the codebooks are initialised, the model's quantizer is checked at the end of epochs, validated or
    not, on the whole catalogue and not on batches. Logged are:

    * for each level l from 1 ``codebook/perplexity@l``, ``codebook/entropy@l`` (share of log K),
      ``codebook/dead_codes@l``, ``codebook/gini@l``, and ``codebook/residual_norm@l``: the mean of
      ``|r_(l+1)| / |r_1|``, what is left of the vectors after level l;
    * ``codebook/reconstruction_error``, the share of the variance that codes lose: of the embeddings of a tokenizer, of
      the item vectors of a recommender; ``codebook/cells``, ``codebook/collision_rate``, ``codebook/largest_cell``;
      ``codebook/churn``, the share of items whose ID is another than at the check before. A `TokenizerModule` logs its
      usage once more as ``val/...``, of the items that are not held out of training;
    * ``gradient/<term>@l = |d term / d codebook of level l|``, with the term weighted as in the objective and its
      gradient neither scaled by mixed precision, nor divided by `accumulate_grad_batches`, nor averaged over
      processes: on several, each measures its own batch and the mean of the norms is logged. The mean of an epoch's
      measured batches is logged. Codebooks that learn by moving averages have no gradient.

    TensorBoard and W&B get histograms and tables of the usage too. ``codebook-usage.parquet`` and
    ``codebook-events.jsonl`` in the run folder are described at `CodebookFiles`.

    A level has collapsed where its perplexity is at or below `min_perplexity_share` of its size, or more than
    `max_dead_share` of its codes are dead. A check that finds one acts by `on_collapse`. It is said once a level and
    finding, and again only after a check in between did not find it. Repairs at five checks in a row are the most.

    At the end of a fit `report` tells of the whole catalogue's codes by the checkpoint that is kept as best, and by the
    last state where there is no such file; after `validate` and `test`, by the weights that were measured.
    ``results.json`` has it as ``codebooks``, ``codebooks_whole``, ``collapsed`` (of level 1) and ``codebook_events``.
    With ``on_collapse="warn"`` training is the same with and without this callback.

    Args:
        gradient_every_n_steps: gradients are measured in every n-th batch of an epoch, from its first on; 0 turns them
            off. A measurement of SPARC takes about as long as its backward pass.
        min_perplexity_share: see above; 0 turns it off. At the end only level 1 is judged by it.
        max_dead_share: see above; 1 turns it off.
        every_n_epochs: a check is at the end of every n-th epoch. None: every epoch of a recommender, and of a
            tokenizer, whose epochs are short, every ``trainer.check_val_every_n_epoch``.
        on_collapse: ``warn``: say so; ``stop``: end the training after this epoch; ``repair``: do what `repair` says.
        repair: ``reset_dead``: codewords that hardly any item has, of the coarsest level that has collapsed and of
            those after it, are set to what the codes leave of the items that they serve worst; ``reseed``: that level
            and those after it are learned anew by k-means on the catalogue; ``raise_sinkhorn``: the epsilon of the
            last level's Sinkhorn assignment is doubled, and without one it begins at 0.003, which helps that level
            alone, in the epochs that follow. Only items that are trained on lend themselves to repairs.

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(
        self,
        gradient_every_n_steps: int = 50,
        min_perplexity_share: float = 0.5,
        max_dead_share: float = 0.25,
        every_n_epochs: int | None = None,
        on_collapse: OnCollapse = "warn",
        repair: Repair = "reset_dead",
    ) -> None:
        if gradient_every_n_steps < 0:
            raise InputError(f"codebook_health.gradient_every_n_steps={gradient_every_n_steps} must be 0 (off) or more")
        for name, share in (("min_perplexity_share", min_perplexity_share), ("max_dead_share", max_dead_share)):
            if not 0 <= share <= 1:
                raise InputError(f"codebook_health.{name}={share} must lie in [0, 1]")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise InputError(f"codebook_health.every_n_epochs={every_n_epochs} must be 1 or more, or null")
        self.gradient_every_n_steps = gradient_every_n_steps
        self.min_perplexity_share, self.max_dead_share = min_perplexity_share, max_dead_share
        self.every_n_epochs = every_n_epochs
        self.report: CodebookReport | None = None  # None also where a model has no codebooks
        self._response = CollapseResponse(on_collapse, repair)
        self._codes: Tensor | None = None  # (I, L) of the last check
        self._files: CodebookFiles | None = None  # on the first process, of a training that leaves any
        self._measures = False  # gradients, in the batch under way

    def state_dict(self) -> dict[str, Any]:
        """What was seen, said and done so far, for a training that goes on."""
        codes = None if self._codes is None else self._codes.to(torch.int32)
        return {"codes": codes, "response": self._response.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        codes = state_dict["codes"]
        self._codes = None if codes is None else codes.to(torch.int64)
        self._response.load(state_dict["response"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a model that cannot be repaired as is asked for."""
        if isinstance(pl_module, RecommenderModule | TokenizerModule):
            quantizer = quantizer_of(pl_module.built)
            if quantizer is not None:
                self._response.prepare(quantizer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the files, now that it is known which step the training goes on from."""
        watched = isinstance(pl_module, RecommenderModule | TokenizerModule) and quantizer_of(pl_module.built)
        if watched and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            resumed_at = None if trainer.ckpt_path is None else trainer.global_step
            self._files = CodebookFiles(Path(trainer.default_root_dir), resumed_at)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the gradients of this batch are measured: the same batches on all processes."""
        every = self.gradient_every_n_steps
        self._measures = every > 0 and batch_idx % every == 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Measure the gradient of each loss term on the codebooks."""
        if not self._measures or not isinstance(pl_module, RecommenderModule | TokenizerModule):
            return
        quantizer = quantizer_of(pl_module.built)
        if quantizer is None or not quantizer.codebooks.requires_grad or not quantizer.initialised:
            return
        norms = gradient_norms(pl_module.step_losses, quantizer.codebooks)
        values = {f"gradient/{term}@{i + 1}": norm for term, row in norms.items() for i, norm in enumerate(row)}
        pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the codebooks, and act on what is found."""
        if not isinstance(pl_module, RecommenderModule | TokenizerModule) or not self._is_due(trainer, pl_module):
            return
        quantizer = quantizer_of(pl_module.built)
        if quantizer is None or not quantizer.initialised:
            return
        state = codebook_state_now(pl_module.built, _catalog(trainer), self._codes)
        if state is None:
            return
        self._codes = state.table.codes[1:]  # (I, L)
        # Each process has counted all items; `sync_dist` says so to Lightning and changes nothing.
        pl_module.log_dict({f"codebook/{name}": value for name, value in state.metrics().items()}, sync_dist=True)
        self._show(trainer, state)
        found = find_collapses(codebook_levels(state), self.min_perplexity_share, self.max_dead_share)
        # A tie that processes break differently must not let them act differently.
        found = trainer.strategy.broadcast(found)
        events = self._response.respond(Check(trainer, pl_module.built, quantizer, state, found))
        if trainer.is_global_zero:
            for event in events:
                _log.warning("epoch %d: %s", event.epoch, event.message)
        if self._files is not None:
            self._files.add_events(events)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the best checkpoint; it is built anew, so that the module keeps its last state."""
        if not trainer.is_global_zero or not isinstance(pl_module, RecommenderModule | TokenizerModule):
            return
        best = _best_checkpoint(trainer)
        if best is None or not has_codebooks(pl_module.built):
            self._judge(trainer, pl_module.built, "the last epoch")
        else:
            self._judge(trainer, trained_model(pl_module, _catalog(trainer), best), best.name)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge what was tested."""
        if isinstance(pl_module, RecommenderModule | TokenizerModule):
            self._judge(trainer, pl_module.built, Path(trainer.ckpt_path or "the model").name)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge what `recsys validate` has measured."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_end(trainer, pl_module)

    def _is_due(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        every = self.every_n_epochs
        if every is None:
            every = trainer.check_val_every_n_epoch if isinstance(module, TokenizerModule) else 1
        return (trainer.current_epoch + 1) % (every or 1) == 0

    def _show(self, trainer: L.Trainer, state: CodebookState) -> None:
        if trainer.is_global_zero:
            show_usage(trainer.loggers, state, trainer.global_step)
        if self._files is not None:
            self._files.add_usage(trainer.current_epoch, trainer.global_step, state.usage.counts)

    def _judge(self, trainer: L.Trainer, model: Learner, judged: str) -> None:
        if not has_codebooks(model):
            return
        state = codebook_state_now(model, _catalog(trainer))
        self.report = CodebookReport(
            judged,
            codebook_levels(state),
            self.min_perplexity_share,
            whole_figures(state),
            num_events(Path(trainer.default_root_dir)),
            self._response.stopped,
        )


def codebook_report(trainer: L.Trainer) -> CodebookReport | None:
    """What the Trainer's `CodebookHealth` has to say after a command; None without one, or without codebooks."""
    found = (callback.report for callback in trainer.callbacks if isinstance(callback, CodebookHealth))  # type: ignore[attr-defined]
    return next(found, None)


def _best_checkpoint(trainer: L.Trainer) -> Path | None:
    callback = trainer.checkpoint_callback
    path = Path(callback.best_model_path) if isinstance(callback, ModelCheckpoint) else Path()
    return path if path.is_file() else None


def _catalog(trainer: L.Trainer) -> Catalog:
    catalog: Catalog = trainer.datamodule.catalog  # type: ignore[attr-defined]
    return catalog
