"""How far the codes of an item foretell those of the next one that a user meets: what codes cost nothing to be asked.

A model that generates codes has an easier task where consecutive items share them. Chance is subtracted by the reader:
codes that few items hold agree seldom, and those that nearly all items hold agree always.

Axis letters: I items, L levels, N interactions, P pairs of consecutive ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score

from recsys_lightning.data.interactions import IntArray, Interactions
from recsys_lightning.data.splits import Split, training_part
from recsys_lightning.errors import InputError

Ints = NDArray[np.int64]


class NextCode(NamedTuple):
    """How often an item and the next one have the same codes down to a level.

    Attributes:
        share: of the pairs of consecutive interactions.
        chance: the same of two items drawn apart from each other, each as often as it is met: ``sum_c p_c^2`` with p_c
            the share of the interactions that fall on prefix c.
    """

    share: float
    chance: float


def training_sequences(interactions: Interactions, split: Split) -> list[IntArray]:
    """Item ids of each user's training interactions, oldest first; a user without any has an empty one."""
    part = training_part(interactions, split)
    items = np.asarray(part.items)
    return [items[first:stop] for first, stop in zip(part.first.tolist(), part.stop.tolist(), strict=True)]


def next_pairs(sequences: Sequence[IntArray]) -> Ints:
    """(P, 2) item ids of all consecutive interactions within a sequence.

    Raises:
        InputError: no sequence has two.
    """
    items, lengths = _flat(sequences)
    same = np.ones(max(len(items) - 1, 0), dtype=np.bool_)
    stops = lengths.cumsum()
    same[stops[(stops > 0) & (stops < len(items))] - 1] = False  # from one user to the next is no step
    found = np.stack([items[:-1][same], items[1:][same]], axis=1)  # (P, 2)
    if not len(found):
        raise InputError("no user has two training interactions, so that no item has a next one")
    return found


def next_code_agreement(codes: Ints, sequences: Sequence[IntArray]) -> tuple[NextCode, ...]:
    """How often an item and the next one agree in their first code, in their first two, .. in all L.

    Args:
        codes: (I+1, L), row 0 padding.
        sequences: item ids a user, as of `training_sequences`.

    Returns:
        L of them.

    Raises:
        InputError: no sequence has two items.
    """
    pairs, met = next_pairs(sequences), _flat(sequences)[0]
    prefix = np.zeros(len(codes), dtype=np.int64)  # (I+1,) number of each item's prefix
    num_codes, found = int(codes.max()) + 1, []
    for level in range(codes.shape[1]):
        prefix = np.unique(prefix * num_codes + codes[:, level], return_inverse=True)[1]  # below I * K, whatever L is
        shares = np.bincount(prefix[met]) / len(met)
        agree = prefix[pairs[:, 0]] == prefix[pairs[:, 1]]
        found.append(NextCode(float(agree.mean()), float((shares**2).sum())))
    return tuple(found)


def next_code_information(codes: Ints, sequences: Sequence[IntArray]) -> float:
    """Normalised mutual information of the code of an item and the code of the next one, over all pairs.

    By the arithmetic mean of the entropies; 0 where the next code does not depend on this one, up to the bias of a
    finite number of pairs.

    Args:
        codes: (I+1,) a code an item, as of one level; row 0 is padding.
        sequences: item ids a user, as of `training_sequences`.

    Raises:
        InputError: no sequence has two items.
    """
    pairs = next_pairs(sequences)
    return float(normalized_mutual_info_score(codes[pairs[:, 0]], codes[pairs[:, 1]]))


def _flat(sequences: Sequence[IntArray]) -> tuple[Ints, Ints]:
    """All items (N,) one sequence after the other, and the length of each sequence."""
    lengths = np.fromiter((len(items) for items in sequences), np.int64, len(sequences))
    return np.concatenate([np.empty(0, dtype=np.int64), *sequences]), lengths
