"""How healthy the codes of a catalogue are, as numbers by name and in words.

Shapes: I items, D width, K codes, L levels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import CollisionReport, SemanticIds
from recsys_lightning.semantic_ids.usage import CodeUsage, code_usage


@dataclass(frozen=True, eq=False)
class CodebookState:
    """The codes of a whole catalogue at one moment, and what they keep of the vectors they stand for.

    Attributes:
        table: the codes.
        usage: of them, level by level.
        collisions: of them.
        residual_norm: (L,) see `residual_norms`; None where no vectors were quantized level by level.
        reconstruction_error: see `reconstruction_error`; None where there is nothing to rebuild.
        churn: share of items whose ID is another than at the check before; None at the first check.
    """

    table: SemanticIds
    usage: CodeUsage
    collisions: CollisionReport
    residual_norm: Tensor | None
    reconstruction_error: float | None
    churn: float | None

    def metrics(self) -> dict[str, float]:
        """What is logged, by name: `usage_metrics`, and of the others what is known."""
        values = _usage_values(self.usage, self.collisions)
        if self.residual_norm is not None:
            values |= {f"residual_norm@{n}": value for n, value in enumerate(self.residual_norm.tolist(), start=1)}
        others = {"reconstruction_error": self.reconstruction_error, "churn": self.churn}
        return values | {name: value for name, value in others.items() if value is not None}


def codebook_state(
    table: SemanticIds,
    residual_norm: Tensor | None = None,
    reconstruction_error: float | None = None,
    before: Tensor | None = None,
) -> CodebookState:
    """Count the codes of a table; `before` are the codes (I, L) of the check before, if there was one."""
    codes = table.codes[1:]  # (I, L)
    changed = None if before is None else churn(codes, before)
    usage = code_usage(codes, table.num_codes)
    return CodebookState(table, usage, table.collision_report(), residual_norm, reconstruction_error, changed)


def usage_metrics(table: SemanticIds) -> dict[str, float]:
    """What is logged of the codes in a table, by name: cells and collisions, and how each level's codes are used.

    ``collision_rate``, ``cells``, ``largest_cell``, and for each level l from 1 ``perplexity@l``, ``entropy@l`` (share
    of log K), ``dead_codes@l`` and ``gini@l``.
    """
    return _usage_values(code_usage(table.codes[1:], table.num_codes), table.collision_report())


def _usage_values(usage: CodeUsage, report: CollisionReport) -> dict[str, float]:
    values: dict[str, float] = {
        "collision_rate": report.collision_rate,
        "cells": report.num_cells,
        "largest_cell": report.largest_cell,
    }
    columns = {
        "perplexity": usage.perplexity,
        "entropy": usage.entropy_share,
        "dead_codes": usage.num_dead,
        "gini": usage.gini,
    }
    for name, column in columns.items():
        values |= {f"{name}@{level}": value for level, value in enumerate(column.tolist(), start=1)}
    return {name: float(value) for name, value in values.items()}


def residual_norms(vectors: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    """What is left of vectors after each level: the mean over items of ``|r_(l+1)| / |r_1|``, (L,) float32.

    With r_1 a vector and ``r_(l+1) = r_l - codebook_l[code_l]``. Vectors of length 0 have no such ratio and are left
    out; with no others it is 0.

    Args:
        vectors: (I, D).
        codes: (I, L), the nearest or any others.
        codebooks: (L, K, D).
    """
    lengths = vectors.float().norm(dim=-1)  # (I,)
    known = lengths > 0
    residual, lengths, codes = vectors[known].float(), lengths[known], codes[known]
    norms = []
    for codebook, code in zip(codebooks, codes.unbind(-1), strict=True):  # (K, D), (I,)
        residual = residual - codebook[code].float()  # (I, D)
        norms.append((residual.norm(dim=-1) / lengths).sum() / max(len(lengths), 1))
    return torch.stack(norms).cpu()


def reconstruction_error(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of the vectors' variance that their codes lose: ``mean |x - x_hat|^2 / mean |x - mean x|^2``.

    0 is a perfect copy; 1 is as good as to say the mean of all vectors for each.

    Args:
        parts: the vectors x and what the codes make of them, x_hat, both (n, D), for all items bit by bit.
    """
    count, error, squares, total = 0, 0.0, 0.0, None
    for vectors, rebuilt in parts:
        exact = vectors.double()  # (n, D): the variance below is a difference of sums
        count += len(exact)
        error += float((exact - rebuilt.double()).square().sum())
        squares += float(exact.square().sum())
        total = exact.sum(0) if total is None else total + exact.sum(0)  # (D,)
    if total is None:
        raise InputError("a reconstruction error needs at least one vector")
    variance = squares - float(total.square().sum()) / count
    # Where all vectors are alike the difference is rounding, of either sign.
    return error / max(variance, torch.finfo(torch.float32).eps * squares, torch.finfo(torch.float64).tiny)


def churn(codes: Tensor, before: Tensor) -> float:
    """Share of items whose ID has changed: codes (I, L) now and `before`, of the same items.

    Raises:
        InputError: they are of other items or levels.
    """
    if codes.shape != before.shape:
        raise InputError(f"codes {tuple(codes.shape)} and those before {tuple(before.shape)} are not of the same items")
    return float((codes != before).any(-1).double().mean())


def describe(report: CollisionReport) -> str:
    """A collision report in one line."""
    perplexity = ", ".join(f"{value:.1f}" for value in report.perplexity)
    return (
        f"{report.num_items} items in {report.num_cells} cells, largest {report.largest_cell}, "
        f"collision rate {report.collision_rate:.3f}, perplexity of the levels {perplexity}"
    )
