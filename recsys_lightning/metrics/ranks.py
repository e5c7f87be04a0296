"""Where each user's answers stand in his list, ties included: all that ranking metrics need to know.

Shapes: B users, R places of a list (best first), N answers of a user. Item id 0 is padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recsys_lightning.errors import InputError

COMPARISONS_AT_ONCE = 2**23  # bytes of the largest intermediate table


class TargetRanks(NamedTuple):
    """The ranks of the answers of B users.

    Items of equal score stand in random order: an answer's rank is each of first .. first+tied-1 with equal chance.
    """

    first: Tensor  # (B, N) long: best rank the answer can have, counted from 1; 0 = not in the list
    tied: Tensor  # (B, N) long: places that share its score, its own included; 1 = no tie; 0 = not in the list
    relevant: Tensor  # (B, N) bool: a real, distinct answer that counts (padding, repeats, outside a slice: False)

    def only(self, mask: Tensor) -> "TargetRanks":
        """The same with the answers outside `mask` (B, N; bool) no longer counted, e.g. those outside a slice.

        Raises:
            ValueError: the mask has another shape.
        """
        if mask.shape != self.relevant.shape:
            raise ValueError(
                f"need a mask of shape {tuple(self.relevant.shape)}, one value an answer, got {tuple(mask.shape)}"
            )
        return self._replace(relevant=self.relevant & mask)


def rank_targets(item_ids: Tensor, scores: Tensor, target: Tensor) -> TargetRanks:
    """Find the answers in the lists, by exact item id.

    Places of equal score are tied. Padding is never found, and the places after a list's last item belong to no tie.
    An item that a list repeats stands at its first place; the later places still take up room. Repeated answers count
    once. No table of B x N x R is made at once.

    Args:
        item_ids: (B, R) long, best first; 0 = the list has ended.
        scores: (B, R), non-increasing.
        target: (B, N) long; 0 = padding.

    Raises:
        ValueError: the shapes do not fit, or scores increase along a list.
        InputError: scores hold NaN, which could be ranked anywhere.
    """
    if item_ids.ndim != 2 or item_ids.shape != scores.shape or target.ndim != 2 or len(target) != len(item_ids):
        shapes = [tuple(tensor.shape) for tensor in (item_ids, scores, target)]
        raise ValueError(f"need item_ids (B, R), scores (B, R) and target (B, N), got {shapes}")
    _check_scores(scores)
    relevant = (target != 0) & ~repeats(target)  # (B, N)
    num_places = item_ids.shape[1]
    if num_places == 0:
        return TargetRanks(torch.zeros_like(target), torch.zeros_like(target), relevant)

    found, place = _find(item_ids, target)
    falling = scores.neg().contiguous()  # (B, R) ascending, as searchsorted wants it
    score = falling.gather(1, place)  # (B, N)
    better = torch.searchsorted(falling, score)  # (B, N) places of a better score
    not_worse = torch.searchsorted(falling, score, right=True)
    places = torch.arange(1, num_places + 1, device=item_ids.device)
    length = ((item_ids != 0) * places).amax(1, keepdim=True)  # (B, 1) last place that holds an item
    tied = torch.minimum(not_worse, length) - better
    return TargetRanks(torch.where(found, better + 1, 0), torch.where(found, tied, 0), relevant)


def repeats(ids: Tensor) -> Tensor:
    """Places of (B, R) ids whose id stands at an earlier place of the row, (B, R) bool."""
    ordered, place = ids.sort(dim=1, stable=True)  # stable: among equals the first place comes first
    repeat = torch.zeros_like(ids, dtype=torch.bool)
    repeat[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(repeat).scatter(1, place, repeat)


def _find(item_ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each answer is in the list, and its first place counted from 0: (B, N) bool and (B, N) long."""
    founds, places = [], []
    for answers in torch.split(target, max(1, COMPARISONS_AT_ONCE // max(1, item_ids.numel())), dim=1):
        match = item_ids[:, None, :] == answers[:, :, None]  # (B, n, R)
        founds.append(match.any(-1) & (answers != 0))
        places.append(match.view(torch.uint8).argmax(-1))  # the first of equal maxima
    return torch.cat(founds, 1), torch.cat(places, 1)


def _check_scores(scores: Tensor) -> None:
    falling = scores[:, 1:] <= scores[:, :-1]  # also False where one of the two is NaN
    if falling.all() and not scores[:, :1].isnan().any():
        return
    bad = scores.isnan().any(1)  # (B,)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise InputError(
            f"the scores of row {row} of the batch hold NaN ({int(bad.sum())} of {len(bad)} rows do): "
            "look for NaN in the model's weights or vectors"
        )
    row = int((~falling).any(1).nonzero()[0, 0])
    raise ValueError(f"scores must not increase along a list, and those of row {row} do")
