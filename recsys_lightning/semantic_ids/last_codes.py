"""Last codes anew: items of one prefix of codes that share a cell are given other codes of the last level.

Shapes: I items, L levels, K codes a level, N items of one prefix.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from recsys_lightning.errors import InputError
from recsys_lightning.nn.sinkhorn import balanced_codes
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer

# As in the public code of LETTER and MiniOneRec.
_ROUNDS = 20
# Rows whose distances are held at once, a longer prefix aside: bounds memory on catalogues of millions.
_ROWS = 8192
# Items of one prefix that are weighed against each other: memory grows by their square, and time faster.
_LARGEST = 5_000


def separate(
    policy: Literal["reassign", "sinkhorn"],
    tokenizer: ItemTokenizer,
    embeddings: Tensor,
    codes: Tensor,
    movable: Tensor,
) -> None:
    """Give items other last codes where they share a cell, in place.

    Args:
        policy: how, see `recsys_lightning.semantic_ids.collisions.resolve`.
        tokenizer: in evaluation mode, on any device.
        embeddings: (I+1, D), row 0 padding.
        codes: (I+1, L) on the CPU; what is changed.
        movable: (I+1,) bool, the items that may get another code.

    Raises:
        InputError: the tokenizer has no distances to its last codes, or a prefix holds too many items to be weighed.
    """
    last = codes[:, -1]  # (I+1,) a view
    for _ in range(1 if policy == "reassign" else _ROUNDS):
        before = last.clone()
        for items, distances in _distances(tokenizer, embeddings, codes, _colliding_prefixes(codes, movable), movable):
            moving, held = items[movable[items]], torch.bincount(last[items], minlength=tokenizer.num_codes)
            if policy == "sinkhorn":  # who is alone in a cell stays there
                shared = held[last[moving]] > 1  # (N,)
                moving, distances = moving[shared], distances[shared]
            staying = held - torch.bincount(last[moving], minlength=len(held))  # (K,) items
            last[moving] = (_least_distance if policy == "reassign" else _balanced)(distances, staying, last[moving])
        if torch.equal(last, before):
            return


def _colliding_prefixes(codes: Tensor, movable: Tensor) -> list[Tensor]:
    """Items, ascending, of each prefix in which a movable item (I+1,) shares its tuple of codes (I+1, L)."""
    _, cell, sizes = torch.unique(codes[1:], dim=0, return_inverse=True, return_counts=True)  # (I,), (C,)
    shared = (sizes[cell] > 1) & movable[1:]  # (I,)
    if codes.shape[1] == 1:
        prefix = torch.zeros_like(cell)
    else:
        _, prefix, _ = torch.unique(codes[1:, :-1], dim=0, return_inverse=True, return_counts=True)  # (I,)
    wanted = torch.isin(prefix, torch.unique(prefix[shared]))  # (I,)
    items = wanted.nonzero()[:, 0]  # (N,) ascending
    order = prefix[items].argsort(stable=True)
    _, counts = torch.unique_consecutive(prefix[items][order], return_counts=True)
    return list(torch.split(items[order] + 1, counts.tolist())) if len(items) else []


def _distances(
    tokenizer: ItemTokenizer, embeddings: Tensor, codes: Tensor, prefixes: list[Tensor], movable: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each prefix's items, with the distances (N, K) of its movable ones to the last codes, many prefixes at once."""
    block: list[Tensor] = []
    for at, items in enumerate(prefixes):
        block.append(items)
        if sum(len(each) for each in block) < _ROWS and at + 1 < len(prefixes):
            continue
        moving = [each[movable[each]] for each in block]
        rows = torch.cat(moving)
        # On the tokenizer's device, which is not always that of the embeddings.
        found = tokenizer.last_distances(embeddings[rows].to(tokenizer.device), codes[rows]).cpu().double()
        yield from zip(block, torch.split(found, [len(each) for each in moving]), strict=True)
        block = []


def _least_distance(distances: Tensor, staying: Tensor, codes: Tensor) -> Tensor:
    """New codes (N,) of least total distance (N, K) among those that fill the cells as evenly as can be.

    No cell gets its next item before all have as many. `staying` (K,) counts the items of the prefix that keep their
    code; `codes` (N,) are those that the others have now.
    """
    num_items = len(codes)
    if num_items > _LARGEST:
        raise InputError(
            f"a prefix holds {num_items} items, and collisions by 'reassign' can weigh {_LARGEST} against each other "
            "at most; use 'sinkhorn' or 'extra_token', or more codes or levels"
        )
    most = 1
    while int((most - staying).clamp(min=0).sum()) < num_items:
        most += 1
    room = (most - staying).clamp(min=0)  # (K,)
    seats = torch.arange(len(room)).repeat_interleave(room)  # (S,) each code as often as there is room for it
    # The last seat of each code costs more than any distances can save: all others are taken first.
    fare = distances.new_zeros(len(seats))  # (S,)
    fare[room.cumsum(0)[room > 0] - 1] = 2 * num_items * float(distances.max()) + 1e-9
    _, chosen = linear_sum_assignment((distances[:, seats] + fare).numpy())  # rows come in their order
    return seats[torch.from_numpy(chosen)]


def _balanced(distances: Tensor, staying: Tensor, codes: Tensor) -> Tensor:
    """New codes (N,) by a Sinkhorn assignment of distances (N, K) to the codes that no item stays in (K,).

    Where there is none, moving helps nobody: `codes` (N,), those they have now.
    """
    free = (staying == 0).nonzero()[:, 0]  # (F,)
    return free[balanced_codes(distances[:, free])] if len(free) and len(codes) else codes
