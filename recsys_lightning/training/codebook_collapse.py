"""What is done about codebooks that collapse in training: say so, stop, or repair them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.nn.codebook_repair import (
    LARGEST_SINKHORN,
    Repaired,
    forget,
    install,
    raise_sinkhorn,
    reseed,
    reset_dead,
)
from recsys_lightning.nn.quantize import ResidualQuantizer
from recsys_lightning.semantic_ids.health import CodebookState
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer
from recsys_lightning.training.checkpoints import Learner
from recsys_lightning.training.codebook_files import CodebookEvent
from recsys_lightning.training.codebook_report import CodebookLevel, codebook_levels
from recsys_lightning.training.codebook_state import codebook_state_now, quantized_vectors

OnCollapse = Literal["warn", "stop", "repair"]
Repair = Literal["reset_dead", "reseed", "raise_sinkhorn"]

# Repairs at checks in a row without one that finds all levels well; more would only unsettle what is being trained.
MOST_REPAIRS = 5


class Finding(NamedTuple):
    """What is wrong with the codebook of a level; of each level at most one."""

    level: int  # from 1, the coarsest
    finding: Literal["low_perplexity", "dead_codes"]
    message: str


class Check(NamedTuple):
    """A model at the end of an epoch, and what is wrong with it."""

    trainer: L.Trainer
    model: Learner
    quantizer: ResidualQuantizer  # of the model
    state: CodebookState
    found: list[Finding]  # in that state, by the first process


def find_collapses(
    levels: Sequence[CodebookLevel], min_perplexity_share: float, max_dead_share: float
) -> list[Finding]:
    """The levels that have collapsed, the coarsest first.

    Args:
        levels: of a whole catalogue.
        min_perplexity_share: a perplexity at or below this share of the size is a collapse; 0: none is.
        max_dead_share: more dead codes than this share of the size are a collapse; 1: none are.
    """
    found = []
    for row in levels:
        if row.is_collapsed(min_perplexity_share):
            message = (
                f"the level-{row.level} codebook has collapsed: perplexity {row.perplexity:.1f} of {row.size} codes, "
                f"at or below {min_perplexity_share:g} of its size"
            )
            found.append(Finding(row.level, "low_perplexity", message))
        elif row.dead_codes > max_dead_share * row.size:
            message = (
                f"the level-{row.level} codebook has {row.dead_codes} dead codes of {row.size}, "
                f"more than {max_dead_share:g} of them"
            )
            found.append(Finding(row.level, "dead_codes", message))
    return found


class CollapseResponse:
    """Acts on findings, and remembers what it has said and done.

    A finding of a level is told once, and again only after a check that did not find it. Repairs are told each time;
    after `MOST_REPAIRS` checks in a row that found a collapse, it gives up until a check finds all levels well.

    Args:
        on_collapse: see `CodebookHealth`.
        repair: see `CodebookHealth`.
    """

    def __init__(self, on_collapse: OnCollapse, repair: Repair) -> None:
        self.on_collapse, self.repair = on_collapse, repair
        self.stopped: str | None = None  # why
        self._told: set[tuple[int, str, str]] = set()  # level, finding, action
        self._repairs = 0  # in a row
        self._sinkhorn: float | None = None  # what it was raised to

    def state(self) -> dict[str, Any]:
        """All that a training that goes on must know, in plain values."""
        return {"told": sorted(map(list, self._told)), "repairs": self._repairs, "sinkhorn": self._sinkhorn}

    def load(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` has given."""
        self._told = {(int(level), str(finding), str(action)) for level, finding, action in state["told"]}
        self._repairs, self._sinkhorn = int(state["repairs"]), state["sinkhorn"]

    def prepare(self, quantizer: ResidualQuantizer) -> None:
        """Refuse a quantizer that cannot be repaired as is asked for, and raise its epsilon to where it was raised.

        Raises:
            InputError: its codebooks stand still, or leave nothing to assign.
        """
        if self.on_collapse != "repair":
            return
        if quantizer.codebook_update == "gradient" and not quantizer.codebooks.requires_grad:
            raise InputError(
                "codebook_health.on_collapse=repair needs codebooks that are trained, and those of this model stand "
                "still; set it to warn or stop"
            )
        if self.repair == "raise_sinkhorn" and quantizer.estimator == "gumbel":
            raise InputError(
                "codebook_health.repair=raise_sinkhorn does not go with estimator=gumbel, which draws codewords and "
                "assigns none; set it to reset_dead or reseed"
            )
        if self._sinkhorn is not None:
            quantizer.sinkhorn = self._sinkhorn

    def respond(self, check: Check) -> list[CodebookEvent]:
        """Warn of what was found, stop the training, or repair the codebooks: the same on all processes."""
        keys = {(finding.level, finding.finding) for finding in check.found}
        self._told = {told for told in self._told if told[:2] in keys}
        if not check.found:
            self._repairs = 0
            return []
        if self.on_collapse == "repair":
            return self._repair(check)
        if self.on_collapse == "stop":
            check.trainer.should_stop = True
            self.stopped = check.found[0].message
        return self._tell(check, check.found, self.on_collapse)

    def _tell(self, check: Check, found: Sequence[Finding], action: str, why: str = "") -> list[CodebookEvent]:
        fresh = [finding for finding in found if (finding.level, finding.finding, action) not in self._told]
        self._told |= {(finding.level, finding.finding, action) for finding in fresh}
        return [_event(check, finding, action, finding.message + why) for finding in fresh]

    def _repair(self, check: Check) -> list[CodebookEvent]:
        first = check.found[:1]
        if self._repairs >= MOST_REPAIRS:
            why = f"; {MOST_REPAIRS} repairs in a row did not help, and there will be no more until it is well"
            return self._tell(check, first, "gave_up", why)
        if self.repair == "raise_sinkhorn":
            return self._balance(check)
        vectors = quantized_vectors(check.model, _catalog(check.trainer))  # (I, D)
        if not vectors.isfinite().all():
            return self._tell(check, first, "warn", "; not repaired: the item vectors are not finite")
        self._repairs += 1
        return [self._new_codewords(check, vectors)]

    def _new_codewords(self, check: Check, vectors: Tensor) -> CodebookEvent:
        """Repair the coarsest level that was found, and those after it, by the vectors (I, D) of the items."""
        trainer, finding = check.trainer, check.found[0]
        level, codebooks = finding.level - 1, check.quantizer.codebooks
        made: Repaired | None = None
        if trainer.is_global_zero:
            rows = vectors[_learned_items(trainer, check.model).to(vectors.device)]  # (N, D)
            mend = reset_dead if self.repair == "reset_dead" else reseed
            made = mend(codebooks, rows, level, seed=trainer.global_step)
        repaired: Repaired = trainer.strategy.broadcast(made)  # type: ignore[assignment] # of the first process
        install(check.quantizer, repaired)
        for optimizer in trainer.optimizers:
            forget(optimizer, codebooks, repaired.changed)
        after = codebook_state_now(check.model, _catalog(trainer))
        codes, later = repaired.changed[level].nonzero()[:, 0].tolist(), int(repaired.changed[level + 1 :].sum())
        message = (
            f"{finding.message}; {self.repair} gave new codewords to {len(codes)} of its codes and to {later} of the "
            f"levels after it, perplexity now {codebook_levels(after)[level].perplexity:.1f}"
        )
        return _event(check, finding, self.repair, message, tuple(codes), after)

    def _balance(self, check: Check) -> list[CodebookEvent]:
        """Raise the epsilon of the last level's Sinkhorn assignment; of other levels say that it does not help them."""
        quantizer, others = check.quantizer, check.found
        last = next((finding for finding in others if finding.level == quantizer.num_levels), None)
        if last is not None:
            others = [finding for finding in others if finding is not last]
        why = "; not repaired: a Sinkhorn assignment is of the last level alone, use reset_dead or reseed"
        events = self._tell(check, others, "warn", why)
        if last is None:
            return events
        if quantizer.sinkhorn is not None and quantizer.sinkhorn >= LARGEST_SINKHORN:
            why = f"; the epsilon of its Sinkhorn assignment is {quantizer.sinkhorn:g} and is raised no further"
            return [*events, *self._tell(check, [last], "gave_up", why)]
        self._repairs += 1
        self._sinkhorn = raise_sinkhorn(quantizer)
        message = f"{last.message}; the epsilon of its Sinkhorn assignment is now {self._sinkhorn:g}"
        return [*events, _event(check, last, self.repair, message)]


def _event(
    check: Check,
    finding: Finding,
    action: str,
    message: str,
    codes: tuple[int, ...] = (),
    after: CodebookState | None = None,
) -> CodebookEvent:
    return CodebookEvent(
        epoch=check.trainer.current_epoch,
        step=check.trainer.global_step,
        level=finding.level,
        finding=finding.finding,
        action=action,
        codes=codes,
        before=_figures(check.state, finding.level),
        after=_figures(after, finding.level),
        message=message,
    )


def _figures(state: CodebookState | None, level: int) -> dict[str, float]:
    if state is None:
        return {}
    row = codebook_levels(state)[level - 1]
    return {"perplexity": row.perplexity, "entropy": row.entropy, "dead_codes": row.dead_codes, "gini": row.gini}


def _learned_items(trainer: L.Trainer, model: Learner) -> Tensor:
    """Places (N,) in 0..I-1 of the items that a model is trained on: codewords must not come from others."""
    if isinstance(model, ItemTokenizer):
        return torch.from_numpy(trainer.datamodule.warm_items) - 1  # type: ignore[attr-defined]
    return torch.as_tensor(_catalog(trainer).train_counts)[1:].nonzero()[:, 0]


def _catalog(trainer: L.Trainer) -> Catalog:
    catalog: Catalog = trainer.datamodule.catalog  # type: ignore[attr-defined]
    return catalog
