"""Expected ranking metrics when items of equal score stand in random order: closed forms, no sampling.

A user's list falls into groups of equal score. A group occupies the ranks a .. b, so it has m = b-a+1 places, and holds
r relevant answers, which stand on any r of the m places with equal chance. "Inside" are its q places of rank <= k. What
comes before the group holds R relevant answers for certain. Groups without a relevant answer do not matter.

Shapes: B users, G groups with a relevant answer, over all users.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_lightning.metrics.ranks import TargetRanks


@dataclass(frozen=True)
class TieGroups:
    """The groups of equal score that hold relevant answers, by user and then by rank.

    Attributes:
        num_relevant: (B,) float64 relevant answers of each user, in the list or not.
        user: (G,) long row of the batch.
        start: (G,) long rank a of the group's first place.
        size: (G,) long places m.
        relevant: (G,) float64 relevant answers r.
        before: (G,) float64 relevant answers R of the same user in earlier groups.
    """

    num_relevant: Tensor
    user: Tensor
    start: Tensor
    size: Tensor
    relevant: Tensor
    before: Tensor

    def window(self, k: int) -> tuple[Tensor, Tensor]:
        """The ranks of each group that are inside: (G,) last rank before them and (G,) last of them, equal if none."""
        before = self.start - 1
        return before.clamp(max=k), (before + self.size).clamp(max=k)

    def sum_by_user(self, values: Tensor) -> Tensor:
        """(B,) float64 sums of the (G,) values of each user's groups."""
        return torch.zeros_like(self.num_relevant).index_add_(0, self.user, values)


def tie_groups(ranks: TargetRanks) -> TieGroups:
    """Group the relevant answers that are in the lists by equal score.

    Raises:
        ValueError: the three parts of `ranks` differ in shape, or a group holds more answers than places.
    """
    if ranks.first.ndim != 2 or not ranks.first.shape == ranks.tied.shape == ranks.relevant.shape:
        shapes = [tuple(part.shape) for part in ranks]
        raise ValueError(f"need first, tied and relevant of one shape (B, N), got {shapes}")
    num_relevant = ranks.relevant.sum(1, dtype=torch.float64)  # (B,)
    user, column = (ranks.relevant & (ranks.first > 0)).nonzero(as_tuple=True)  # (H,) answers found, by user
    first, tied = ranks.first[user, column], ranks.tied[user, column]  # (H,)
    if ranks.first.shape[1] == 1:  # one answer a user: nothing to group
        ones = torch.ones_like(first, dtype=torch.float64)
        return TieGroups(num_relevant, user, first, tied, ones, torch.zeros_like(ones))
    span = first.max() + 1 if len(first) else 1
    key, group, relevant = torch.unique(user * span + first, return_inverse=True, return_counts=True)  # (G,) (H,) (G,)
    size = torch.zeros_like(key).scatter_(0, group, tied)  # the answers of a group agree on it
    if (relevant > size).any():
        raise ValueError("these ranks place more answers on a group of equal scores than it has places")
    earlier = torch.bincount(user, minlength=len(ranks.first)).cumsum(0)  # (B,) answers found up to this user
    before = relevant.cumsum(0) - relevant  # (G,) over all users
    of_user = key // span
    before = before - torch.where(of_user > 0, earlier[of_user - 1], 0)
    return TieGroups(num_relevant, of_user, key % span, size, relevant.double(), before.double())


def expected_recall(groups: TieGroups, k: int) -> Tensor:
    """E[relevant answers inside] / relevant answers = sum of r q / m over groups / relevant answers, (B,)."""
    low, high = groups.window(k)
    return groups.sum_by_user(groups.relevant * (high - low) / groups.size) / groups.num_relevant.clamp(min=1)


def expected_ndcg(groups: TieGroups, k: int) -> Tensor:
    """E[DCG] / DCG of the list that begins with all relevant answers, (B,).

    DCG = sum over relevant ranks p <= k of 1 / log2(p + 1); each place of a group is relevant with chance r / m.
    """
    best = discount_sums(k, groups.num_relevant.device)[groups.num_relevant.long().clamp(1, k)]  # (B,)
    return groups.sum_by_user(_dcg(groups, k)) / best


def expected_ndcg_of_found(groups: TieGroups, k: int) -> Tensor:
    """E[DCG / DCG of a list that begins with as many relevant answers as were found], 0 if none was, (B,).

    The number found is random only in the group that crosses k, where it is hypergeometric; given it, the places
    inside are equally likely.
    """
    sums = discount_sums(k, groups.num_relevant.device)  # (k+1,)
    best = torch.cat([sums.new_ones(1), sums[1:]])  # by number found; nothing found gives 0 / 1
    low, high = groups.window(k)
    crosses = (low < k) & (groups.start + groups.size > k + 1)  # (G,) at most one group a user
    whole = groups.start + groups.size <= k + 1  # (G,)
    dcg = _dcg(groups, k)
    dcg_whole = groups.sum_by_user(torch.where(whole, dcg, 0.0))  # (B,)
    found_whole = groups.sum_by_user(torch.where(whole, groups.relevant, 0.0)).long()  # (B,)
    expected = dcg_whole / best[found_whole]
    at = crosses.nonzero()[:, 0]  # (C,)
    if len(at) == 0:
        return expected
    user, inside = groups.user[at], (high - low)[at].double()  # (C,)
    chance = _found_chances(groups.size[at].double(), groups.relevant[at], inside)  # (C, X+1)
    number = torch.arange(chance.shape[1], device=at.device)  # (X+1,) found in the crossing group
    per_place = ((sums[high] - sums[low])[at] / inside)[:, None]  # (C, 1) mean discount of the places inside
    best_crossing = best[(found_whole[user, None] + number).clamp(max=k)]  # (C, X+1)
    crossing = (chance * (dcg_whole[user, None] + number * per_place) / best_crossing).sum(1)  # (C,)
    return expected.index_copy(0, user, crossing)


def expected_reciprocal_rank(groups: TieGroups, k: int) -> Tensor:
    """E[1 / rank of the first relevant answer if that is <= k, else 0], (B,): only the first group matters."""
    sums = harmonic_sums(k, groups.num_relevant.device)
    low, high = groups.window(k)
    alone = (sums[high] - sums[low]) / groups.size  # (G,) right for a group of one relevant answer
    at = _first_and_shared(groups, k)
    if len(at):
        chance = _first_hit_chances(groups, at, k)  # (S, J)
        place = torch.arange(chance.shape[1], device=at.device)
        alone[at] = (chance / (groups.start[at, None] + place)).sum(1)
    return groups.sum_by_user(torch.where(groups.before == 0, alone, 0.0))


def expected_hit(groups: TieGroups, k: int) -> Tensor:
    """P(a relevant answer is inside), (B,): 1 - C(m-q, r) / C(m, r) in the first group."""
    low, high = groups.window(k)
    alone = (high - low).double() / groups.size  # (G,) right for a group of one relevant answer
    at = _first_and_shared(groups, k)
    if len(at):
        alone[at] = _first_hit_chances(groups, at, k).sum(1).clamp(max=1)
    return groups.sum_by_user(torch.where(groups.before == 0, alone, 0.0))


def expected_average_precision(groups: TieGroups, k: int) -> Tensor:
    """E[sum over relevant ranks p <= k of (relevant answers up to p) / p] / min(k, relevant answers), (B,).

    The j-th place of a group, p = a+j-1, is relevant with chance r / m; then the group has (j-1)(r-1)/(m-1) relevant
    answers before it on average. With s = (r-1)/(m-1) its share is r/m * sum over j of (1 + R + (p-a) s) / p.
    """
    sums = harmonic_sums(k, groups.num_relevant.device)
    low, high = groups.window(k)
    slope = (groups.relevant - 1) / (groups.size - 1).clamp(min=1)  # (G,)
    constant = 1 + groups.before - slope * groups.start
    share = groups.relevant / groups.size * (constant * (sums[high] - sums[low]) + slope * (high - low))  # (G,)
    return groups.sum_by_user(share) / groups.num_relevant.clamp(1, k)


@functools.lru_cache(maxsize=64)
def discount_sums(k: int, device: torch.device) -> Tensor:
    """(k+1,) float64: at index n the sum of 1 / log2(p + 1) over ranks p = 1 .. n."""
    ranks = torch.arange(1, k + 1, dtype=torch.float64, device=device)
    return torch.nn.functional.pad((1 / torch.log2(ranks + 1)).cumsum(0), (1, 0))


@functools.lru_cache(maxsize=64)
def harmonic_sums(k: int, device: torch.device) -> Tensor:
    """(k+1,) float64: at index n the sum of 1 / p over ranks p = 1 .. n."""
    ranks = torch.arange(1, k + 1, dtype=torch.float64, device=device)
    return torch.nn.functional.pad((1 / ranks).cumsum(0), (1, 0))


def _dcg(groups: TieGroups, k: int) -> Tensor:
    """Expected DCG of each group, (G,)."""
    sums = discount_sums(k, groups.num_relevant.device)
    low, high = groups.window(k)
    return groups.relevant * (sums[high] - sums[low]) / groups.size


def _first_and_shared(groups: TieGroups, k: int) -> Tensor:
    """(S,) indices of the groups that are their user's first, start inside, and hold several relevant answers."""
    return ((groups.before == 0) & (groups.relevant > 1) & (groups.start <= k)).nonzero()[:, 0]


def _first_hit_chances(groups: TieGroups, at: Tensor, k: int) -> Tensor:
    """P(the first relevant answer is on the j-th place of the group) = C(m-j, r-1) / C(m, r), (S, J), j = 1 .. J.

    0 from rank k+1 on. By recursion: P(1) = r / m and P(j+1) / P(j) = (m-j-r+1) / (m-j).
    """
    size, relevant = groups.size[at, None].double(), groups.relevant[at, None]  # (S, 1)
    inside = (k + 1 - groups.start[at, None]).minimum(groups.size[at, None])  # (S, 1)
    place = torch.arange(1, int(inside.max()) + 1, dtype=torch.float64, device=at.device)  # (J,)
    ratios = (size - place - relevant + 1).clamp(min=0) / (size - place).clamp(min=1)  # (S, J)
    chances = torch.cat([relevant / size, ratios[:, :-1]], 1).cumprod(1)
    return torch.where(place <= inside, chances, 0.0)


def _found_chances(size: Tensor, relevant: Tensor, inside: Tensor) -> Tensor:
    """Hypergeometric chances that x of r relevant answers on m places are among q given places, (C, X+1), x = 0 .. X.

    From P(x+1) / P(x) = (r-x)(q-x) / ((x+1)(m-r-q+x+1)), in logarithms so that nothing underflows.
    """
    size, relevant, inside = size[:, None], relevant[:, None], inside[:, None]  # (C, 1)
    most = torch.minimum(relevant, inside)
    number = torch.arange(int(most.max()) + 1, dtype=torch.float64, device=size.device)  # (X+1,)
    least = (inside - (size - relevant)).clamp(min=0)
    x = number[:-1]
    up = ((relevant - x) * (inside - x)).clamp(min=1).log() - (x + 1).log()
    up = up - (size - relevant - inside + x + 1).clamp(min=1).log()
    logs = torch.nn.functional.pad(up.cumsum(1), (1, 0))  # (C, X+1) up to a constant, whatever stands below `least`
    return logs.masked_fill((number < least) | (number > most), -torch.inf).softmax(1)
