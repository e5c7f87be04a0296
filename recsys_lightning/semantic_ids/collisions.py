"""Collisions: items that share a semantic ID, the ways to tell them apart, and what each costs.

All ways but the extra token leave the codes before the last as they are, and so move items only within their prefix.
Shapes: I items, L levels, K codes a level, N items of one prefix.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import polars as pl
import torch
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.last_codes import separate
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, check_embeddings, evaluating, rebuilt

Policy = Literal["none", "extra_token", "sinkhorn", "reassign"]


@dataclass(frozen=True, kw_only=True)
class CollisionCost:
    """What a policy has done to a table, and at what cost; pairs are (before, after)."""

    policy: Policy
    items_moved: int  # items with another code than before at some level that was there before
    extra_levels: int  # tokens more that each item takes
    num_codes: tuple[int, int]  # codes a level: an extra token may need more
    collision_rate: tuple[float, float]  # share of items whose tuple some other item holds too
    largest_cell: tuple[int, int]  # items
    cells: tuple[int, int]  # different tuples in use
    squared_distance: tuple[float, float]  # mean over items of |target - decode|^2: an extra token adds nothing to it
    seconds: float

    def describe(self) -> str:
        """All of it in one line."""
        rate, largest, cells, distance = self.collision_rate, self.largest_cell, self.cells, self.squared_distance
        grown = distance[1] / distance[0] - 1 if distance[0] > 0 else math.inf if distance[1] > 0 else 0.0
        return (
            f"collisions by {self.policy}: collision rate {rate[0]:.3f} -> {rate[1]:.3f}, cells {cells[0]} -> "
            f"{cells[1]}, largest {largest[0]} -> {largest[1]}; {self.items_moved} items moved, {self.extra_levels} "
            f"tokens more, codes a level {self.num_codes[0]} -> {self.num_codes[1]}, squared distance "
            f"{distance[0]:.4g} -> {distance[1]:.4g} ({grown:+.2%}), {self.seconds:.1f} s"
        )


class Resolved(NamedTuple):
    """A table after a collision policy, and what that has cost."""

    table: SemanticIds
    cost: CollisionCost


@torch.no_grad()
def resolve(policy: Policy, tokenizer: ItemTokenizer, embeddings: Tensor, table: SemanticIds) -> Resolved:
    """Tell the items apart that share a semantic ID.

    * ``"none"``: leave them.
    * ``"extra_token"``: one level more, which counts the items of a cell (`SemanticIds.disambiguated`). Each item has
      its own tuple, at the price of a token without meaning.
    * ``"reassign"``: in each prefix of L-1 codes that holds a collision, give all its N items anew the last codes of
      the least total squared distance (`ItemTokenizer.last_distances`) that use the K codes as evenly as can be: each
      item has its own where N <= K, else floor(N / K) or ceil(N / K) share one. Items alone in their cell may move too,
      where that makes the total less. So does the ZCR of CollisionGenRec, which however moves as few items as it can,
      and leaves prefixes of N > K as they are.
    * ``"sinkhorn"``: items that share a cell, and no others, get new last codes by a Sinkhorn assignment among the
      codes that the other items of their prefix leave free, in up to 20 rounds, as LETTER and MiniOneRec do (whose
      codes need not be free). Equal embeddings always get equal codes, so that some collisions may stay.

    Args:
        policy: which of them.
        tokenizer: what the table was made with, on any device; its mode is as before afterwards.
        embeddings: (I+1, D) the table was made from, row 0 padding.
        table: the semantic IDs as the tokenizer gave them.

    Returns:
        The new table, on the CPU, and the cost.

    Raises:
        InputError: another tokenizer's table or another catalogue's embeddings, no such policy, or one that needs
            distances of a tokenizer that has none.
    """
    _check(policy, tokenizer, embeddings, table.num_codes, table.num_items, table.num_levels)
    start = time.perf_counter()
    with evaluating(tokenizer):
        new = _resolved(policy, tokenizer, embeddings, table)
        seconds = time.perf_counter() - start
        distances = [_squared_distance(tokenizer, embeddings, each.codes) for each in (table, new)]
    old_report, new_report = table.collision_report(), new.collision_report()
    moved = (new.codes[:, : table.num_levels] != table.codes.cpu()).any(-1)  # (I+1,)
    cost = CollisionCost(
        policy=policy,
        items_moved=int(moved.sum()),
        extra_levels=new.num_levels - table.num_levels,
        num_codes=(table.num_codes, new.num_codes),
        collision_rate=(old_report.collision_rate, new_report.collision_rate),
        largest_cell=(old_report.largest_cell, new_report.largest_cell),
        cells=(old_report.num_cells, new_report.num_cells),
        squared_distance=(distances[0], distances[1]),
        seconds=seconds,
    )
    return Resolved(new, cost)


@torch.no_grad()
def append(
    policy: Policy,
    tokenizer: ItemTokenizer,
    embeddings: Tensor,
    table: SemanticIds,
    known: Tensor,
    fingerprint: str,
    fields: pl.DataFrame | None = None,
) -> SemanticIds:
    """The table of a catalogue that has grown: known items keep their codes to the digit, new ones get theirs.

    The tokenizer is not trained again: it codes the whole new catalogue (`ItemTokenizer.assign`), and of that the new
    items' codes are taken. The policy then keeps them from colliding, with each other and with the known items, which
    never move: ``"reassign"`` and ``"sinkhorn"`` as `resolve` has them among the last codes that the known items of a
    prefix leave free, ``"extra_token"`` by counting on from the last item of the cell. An item that is no longer there
    takes its codes with it: others may get them.

    An extra token may count beyond the codes a level. `num_codes` of the result is then larger than that of `table`,
    and a model trained on `table` has no weights for the new codes: it has to be trained anew.

    Args:
        policy: how collisions of `table` were resolved.
        tokenizer: what `table` was made with, on any device; its mode is as before afterwards.
        embeddings: (J+1, D) of all items of the new catalogue, row 0 padding.
        table: the semantic IDs of I known items, with the policy's extra token where it has one.
        known: (J+1,) for each item of the new catalogue its id in `table`; 0 for a new one, and for padding.
        fingerprint: of the new embeddings, kept in the table.
        fields: of all items of the new catalogue, J rows, as `Catalog.fields`; None where the tokenizer reads none.

    Returns:
        The table of the new catalogue, on the CPU.

    Raises:
        InputError: as `resolve`, or `known` has another length, ids that `table` does not have, or one of them twice.
    """
    extra = policy == "extra_token"
    num_codes = tokenizer.num_codes if extra else table.num_codes  # an extra token may have needed more
    _check(policy, tokenizer, embeddings, num_codes, len(embeddings) - 1, table.num_levels - extra)
    known = _checked_known(known, len(embeddings), table)
    old, new = known.nonzero()[:, 0], (known == 0).nonzero()[1:, 0]  # item ids of the new catalogue
    codes = torch.zeros(len(embeddings), table.num_levels, dtype=torch.int64)  # (J+1, L)
    codes[old] = table.codes.cpu()[known[old]]
    if len(new):
        with evaluating(tokenizer):
            codes[new, : tokenizer.num_levels] = tokenizer.assign(embeddings[1:], fields).cpu()[new - 1]
            if policy == "extra_token":
                _count_on(codes, new)
            elif policy != "none":
                movable = torch.zeros(len(codes), dtype=torch.bool)
                movable[new] = True
                separate(policy, tokenizer, embeddings, codes, movable)
    return replace(
        table,
        codes=codes,
        num_codes=max(table.num_codes, int(codes.max()) + 1),
        embeddings_fingerprint=fingerprint,
        tokenizer=f"{table.tokenizer}, {len(new)} items appended",
        item_ids=None if fields is None else tuple(fields.get_column("item_id").to_list()),
    )


def _check(
    policy: str, tokenizer: ItemTokenizer, embeddings: Tensor, num_codes: int, num_items: int, num_levels: int
) -> None:
    if policy not in get_args(Policy):
        raise InputError(f"collisions must be one of {', '.join(get_args(Policy))}, got {policy!r}")
    if (num_levels, num_codes) != (tokenizer.num_levels, tokenizer.num_codes):
        raise InputError(
            f"the tokenizer has {tokenizer.num_levels} levels of {tokenizer.num_codes} codes, but the table, without "
            f"the extra token of collisions by 'extra_token', has {num_levels} of {num_codes}: it was made with "
            "another tokenizer or with another policy"
        )
    check_embeddings(embeddings[1:], tokenizer.embedding_dim)
    if len(embeddings) != num_items + 1:
        raise InputError(
            f"{num_items} items have semantic IDs but {len(embeddings) - 1} have embeddings (row 0 is padding); give "
            "the embeddings that the table was made from"
        )


def _checked_known(known: Tensor, num_rows: int, table: SemanticIds) -> Tensor:
    known = known.cpu().long()
    if known.shape != (num_rows,) or int(known[0]) != 0:
        raise InputError(
            f"known must say for padding (0) and each of {num_rows - 1} items which item of the old table it is, "
            f"got shape {tuple(known.shape)}"
        )
    if int(known.min()) < 0 or int(known.max()) > table.num_items:
        raise InputError(
            f"known items must be among the 1..{table.num_items} of the old table, or 0 for a new one, got "
            f"{int(known.min())}..{int(known.max())}"
        )
    ids, counts = torch.unique(known[known > 0], return_counts=True)
    if bool((counts > 1).any()):
        raise InputError(f"item {int(ids[counts > 1][0])} of the old table is named twice among the known items")
    return known


def _resolved(policy: Policy, tokenizer: ItemTokenizer, embeddings: Tensor, table: SemanticIds) -> SemanticIds:
    table = replace(table, codes=table.codes.cpu())
    if policy == "none":
        return table
    if policy == "extra_token":
        return table.disambiguated()
    codes = table.codes.clone()
    separate(policy, tokenizer, embeddings, codes, torch.arange(len(codes)) > 0)
    return replace(table, codes=codes, tokenizer=f"{table.tokenizer}, collisions by {policy}")


def _count_on(codes: Tensor, new: Tensor) -> None:
    """Give new items the next counts of their cells, in the order of their ids, in the last level of codes (I+1, L)."""
    _, cell, _ = torch.unique(codes[1:, :-1], dim=0, return_inverse=True, return_counts=True)  # (I,)
    num_cells = int(cell.max()) + 1
    is_new = torch.zeros(len(cell), dtype=torch.bool)
    is_new[new - 1] = True
    counts = torch.zeros(num_cells, dtype=torch.int64)  # (C,) the first that is free
    counts.scatter_reduce_(0, cell[~is_new], codes[1:, -1][~is_new] + 1, "amax")
    order = new[cell[new - 1].argsort(stable=True)]  # (N,) new items by cell, and by id within one
    sizes = torch.bincount(cell[new - 1], minlength=num_cells)  # (C,)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (N,)
    codes[order, -1] = counts.repeat_interleave(sizes) + torch.arange(len(order)) - starts


def _squared_distance(tokenizer: ItemTokenizer, embeddings: Tensor, codes: Tensor) -> float:
    """Mean over items of the squared distance between what the tokenizer wants to rebuild and what codes stand for."""
    parts = rebuilt(tokenizer, embeddings[1:], codes[1:, : tokenizer.num_levels])
    total = sum(float((target - estimate).double().square().sum()) for target, estimate in parts)
    return total / (len(embeddings) - 1)
