"""Codebook health: how evenly a model's codebooks are used, and how hard each loss term pulls at them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.nn.quantize import ResidualQuantizer
from recsys_lightning.semantic_ids.health import usage_metrics
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, tokenize
from recsys_lightning.training.checkpoints import Learner, trained_model
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import TokenizerModule

# Half of the codes, used evenly, have a perplexity of half the size: rounding must not lift it above that.
_ROUNDING = 1e-6


class CodebookLevel(NamedTuple):
    """How the whole catalogue uses the codebook of one level."""

    level: int  # from 1, the coarsest
    perplexity: float  # the number of evenly used codes of the same entropy
    size: int  # codes K
    entropy: float  # share of log K, as `entropy@l` in the logs
    dead_codes: int  # codes that no item has


@dataclass(frozen=True)
class CodebookReport:
    """The codebooks of a model at the end of a command.

    Attributes:
        judged: the weights it tells of, in words.
        levels: the coarsest first; none where the codebooks are not initialised yet, as in a warm-up.
        min_perplexity_share: of the size of level 1; a perplexity at or below it is a collapse. 0: nothing is.
    """

    judged: str
    levels: tuple[CodebookLevel, ...]
    min_perplexity_share: float

    @property
    def collapsed(self) -> bool:
        """Whether too few codes of level 1 carry the catalogue."""
        return any(
            level.perplexity <= self.min_perplexity_share * level.size * (1 + _ROUNDING) for level in self.levels[:1]
        )

    @property
    def warning(self) -> str | None:
        """What is wrong with the codebooks, in one line; None if they are well."""
        if not self.levels:
            return f"WARNING: {self.judged} is of the warm-up: its codebooks are not initialised yet"
        if not self.collapsed:
            return None
        first = self.levels[0]
        return (
            f"WARNING: the level-1 codebook of {self.judged} has collapsed: perplexity {first.perplexity:.1f} of "
            f"{first.size} codes, at or below {self.min_perplexity_share:g} of its size"
        )

    def record(self) -> dict[str, Any]:
        """Its entries in ``results.json``."""
        return {"codebooks": [level._asdict() for level in self.levels], "collapsed": self.collapsed}


class CodebookHealth(L.Callback):
    """Watches the codebooks of a model that has its own; other models it leaves alone.

    In training, once the codebooks are initialised:

    * at the end of every epoch, validated or not, the codes of the whole catalogue: ``codebook/perplexity@l``,
      ``codebook/entropy@l`` (share of log K), ``codebook/dead_codes@l``, ``codebook/cells``,
      ``codebook/collision_rate``, ``codebook/largest_cell``. A `TokenizerModule` logs the same of itself as
      ``val/...``, after each validation;
    * ``gradient/<term>@l = |d term / d codebook of level l|``, with the term weighted as in the objective and its
      gradient neither scaled by mixed precision, nor divided by `accumulate_grad_batches`, nor averaged over
      processes: on several, each measures its own batch and the mean of the norms is logged. The mean of an epoch's
      measured batches is logged. Codebooks that learn by moving averages have no gradient.

    At the end of a fit `report` tells of the whole catalogue's codes by the checkpoint that is kept as best, and by the
    last state where there is no such file; after `validate` and `test`, by the weights that were measured.
    ``results.json`` has it as ``codebooks`` and ``collapsed``. Training is the same with and without this callback.

    Args:
        gradient_every_n_steps: gradients are measured in every n-th batch of an epoch, from its first on; 0 turns them
            off. A measurement of SPARC takes about as long as its backward pass.
        min_perplexity_share: level 1 counts as collapsed where its perplexity is at or below this share of its size;
            0 turns the warning off.

    Raises:
        InputError: An argument is out of its range.
    """

    def __init__(self, gradient_every_n_steps: int = 50, min_perplexity_share: float = 0.5) -> None:
        if gradient_every_n_steps < 0:
            raise InputError(f"codebook_health.gradient_every_n_steps={gradient_every_n_steps} must be 0 (off) or more")
        if not 0 <= min_perplexity_share <= 1:
            raise InputError(f"codebook_health.min_perplexity_share={min_perplexity_share} must lie in [0, 1]")
        self.gradient_every_n_steps = gradient_every_n_steps
        self.min_perplexity_share = min_perplexity_share
        self.report: CodebookReport | None = None  # None also where a model has no codebooks
        self._measures = False  # gradients, in the batch under way

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
        """Log how the whole catalogue uses the codebooks."""
        if not isinstance(pl_module, RecommenderModule):
            return
        table = item_codes_now(pl_module.built, _catalog(trainer))
        if table is not None:
            # Each process has counted all items; `sync_dist` says so to Lightning and changes nothing.
            values = {f"codebook/{name}": value for name, value in usage_metrics(table).items()}
            pl_module.log_dict(values, sync_dist=True)

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

    def _judge(self, trainer: L.Trainer, model: Learner, judged: str) -> None:
        if has_codebooks(model):
            levels = codebook_levels(item_codes_now(model, _catalog(trainer)))
            self.report = CodebookReport(judged, levels, self.min_perplexity_share)


def codebook_report(trainer: L.Trainer) -> CodebookReport | None:
    """What the Trainer's `CodebookHealth` has to say after a command; None without one, or without codebooks."""
    found = (callback.report for callback in trainer.callbacks if isinstance(callback, CodebookHealth))  # type: ignore[attr-defined]
    return next(found, None)


def has_codebooks(model: Learner) -> bool:
    """Whether a model makes its codes itself: a tokenizer, or a recommender with a quantizer of its own."""
    return isinstance(model, ItemTokenizer) or quantizer_of(model) is not None


def quantizer_of(model: Learner) -> ResidualQuantizer | None:
    """The residual quantizer in a model; a tokenizer that is learned in closed form has none."""
    quantizer = getattr(model, "quantizer", None)
    return quantizer if isinstance(quantizer, ResidualQuantizer) else None


def item_codes_now(model: Learner, catalog: Catalog) -> SemanticIds | None:
    """The codes of the whole catalogue as a model stands; None while its codebooks are not initialised.

    The modes of the model's parts are as before afterwards. The table of a recommender names no embeddings.
    """
    name = type(model).__name__
    if isinstance(model, ItemTokenizer):
        if not model.fitted:
            return None
        return tokenize(model, catalog.text_embeddings(), catalog.text_fingerprint, name, catalog.fields)
    quantizer = quantizer_of(model)
    if quantizer is None or not quantizer.initialised:
        return None
    with _evaluating(model), torch.no_grad():
        codes = F.pad(model.item_codes(), (0, 0, 1, 0)).cpu()  # (I+1, L) the padding row first
    return SemanticIds(codes=codes, num_codes=quantizer.num_codes, embeddings_fingerprint="", tokenizer=name)


def codebook_levels(table: SemanticIds | None) -> tuple[CodebookLevel, ...]:
    """The use of each level's codes by all items, the coarsest level first; nothing of no table."""
    if table is None:
        return ()
    found, size = usage_metrics(table), table.num_codes
    return tuple(
        CodebookLevel(n, found[f"perplexity@{n}"], size, found[f"entropy@{n}"], int(found[f"dead_codes@{n}"]))
        for n in range(1, table.num_levels + 1)
    )


def gradient_norms(losses: Mapping[str, Tensor], codebooks: Tensor) -> dict[str, Tensor]:
    """Euclidean norm of each loss term's gradient on each level's codebook, (L,) float32 a term.

    No ``.grad`` is touched and the graph is kept for the backward pass to come.

    Args:
        losses: terms (), by name.
        codebooks: (L, K, D) that require a gradient. A term that they have no part in has norms of 0.
    """
    norms: dict[str, Tensor] = {}
    for name, loss in losses.items():
        gradient: Tensor | None = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, codebooks, retain_graph=True, allow_unused=True)  # (L, K, D)
        found = torch.zeros_like(codebooks) if gradient is None else gradient
        norms[name] = found.float().flatten(1).norm(dim=1)  # (L,)
    return norms


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; each part has its own mode back afterwards, also a part that is never trained."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _best_checkpoint(trainer: L.Trainer) -> Path | None:
    callback = trainer.checkpoint_callback
    path = Path(callback.best_model_path) if isinstance(callback, ModelCheckpoint) else Path()
    return path if path.is_file() else None


def _catalog(trainer: L.Trainer) -> Catalog:
    catalog: Catalog = trainer.datamodule.catalog  # type: ignore[attr-defined]
    return catalog
