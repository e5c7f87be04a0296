"""Learned BeamFusion: tau and psi from the user, taught on free-running beams of the training split.

The teacher is the last training item of each user, and the objective that of listwise ranking: the cross-entropy of the
answer among all candidates, whose log odds are log Phi (COBRA, eq. 13). A fixed pair is judged by the same objective.
Axis letters: B rows, C candidates over all rows.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys_lightning.analysis.study_run import Pool, Progress
from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.beam_fusion import log_scores, segment_logsumexp
from recsys_lightning.retrieval.fusion_weights import FusionWeights, Mode, user_features

Pair = tuple[float | Tensor, float | Tensor]
"""tau and psi: numbers, or one a row (B,)."""
Chooser = Callable[[Pool], Pair]


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How the weights are learned.

    Attributes:
        epochs: passes over the users.
        lr: of Adam.
        hidden: width of the network's hidden layer.
        held_out: share of the users that teach nothing; they say which epoch is kept.
        seed: of their draw, of the network and of the order.

    Raises:
        InputError: a value that cannot be.
    """

    epochs: int = 30
    lr: float = 0.01
    hidden: int = 16
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.hidden < 1 or not self.lr > 0 or not 0 < self.held_out < 1:
            raise InputError(f"need epochs and hidden of 1 or more, lr above 0 and held_out in 0..1, got {self}")


@dataclass(frozen=True)
class Taught:
    """What came of it.

    Attributes:
        weights: of the best epoch.
        losses: mean cross-entropy of the users held out before the first epoch and after each.
        best_epoch: whose weights were kept; 0 is the fixed pair.
        users: users drawn from the training split.
        reached: users whose answer is in a beam; the others cannot teach.
    """

    weights: FusionWeights
    losses: list[float]
    best_epoch: int
    users: int
    reached: int


def fixed(tau: float, psi: float) -> Chooser:
    """The same pair for every user."""
    return lambda _: (tau, psi)


def chosen_by(weights: FusionWeights) -> Chooser:
    """Each user's own pair."""
    return lambda pool: weights(features_of(pool))


def features_of(pool: Pool) -> Tensor:
    """(B, F) what the weights know of the users of a batch."""
    return user_features(pool.log_probs, pool.length, pool.found)


def answer_losses(pool: Pool, pair: Pair, mode: Mode) -> Tensor:
    """(reached users,) ``-log softmax(log Phi)[answer]`` over the user's candidates, with gradients for the pair."""
    scores = log_scores(pool.found, pool.log_probs, *pair, mode)  # (C,)
    total = segment_logsumexp(scores, pool.found.row, len(pool.user))  # (B,)
    losses: Tensor = total[pool.reached] - scores[pool.answer_at]
    return losses


def mean_loss(batches: Sequence[Pool], choose: Chooser, mode: Mode) -> float:
    """Mean of `answer_losses` over the users whose answer is in a beam; NaN if there are none."""
    with torch.no_grad():
        losses = torch.cat([answer_losses(pool, choose(pool), mode) for pool in batches])
    return float(losses.double().mean())


def best_pair(batches: Sequence[Pool], pairs: Sequence[tuple[float, float]], mode: Mode) -> tuple[float, float]:
    """The fixed pair of the least `mean_loss`; the first of equals."""
    return min(pairs, key=lambda pair: mean_loss(batches, fixed(*pair), mode))


def teach(
    batches: Sequence[Pool], start: tuple[float, float], mode: Mode, teaching: Teaching, progress: Progress
) -> Taught:
    """Learn tau and psi as functions of the user.

    Args:
        batches: of the training split, users in random order.
        start: the fixed pair to begin with.
        mode: domain of the second softmax.
        teaching: how.
        progress: told of each epoch.

    Raises:
        InputError: too few users have their answer in a beam.
    """
    users, reached = sum(len(pool.user) for pool in batches), sum(len(pool.answer_at) for pool in batches)
    rng = np.random.default_rng(teaching.seed)
    # Which of the users that can teach are held out, batch by batch; at least one either way.
    drawn = np.zeros(reached, dtype=np.bool_)
    drawn[rng.permutation(reached)[: max(1, round(teaching.held_out * reached))]] = True
    if reached < 2 or drawn.all():
        raise InputError(
            f"the answers of {reached} of {users:,} training users are in a beam: too few to learn from; "
            "use more --users, or a run with more beams"
        )
    sizes = [len(pool.answer_at) for pool in batches]
    held = torch.split(torch.from_numpy(drawn), sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(teaching.seed)
        weights = FusionWeights(*start, mode, batches[0].log_probs.shape[1], teaching.hidden)
    device = batches[0].log_probs.device
    weights.standardize(torch.cat([features_of(pool) for pool in batches]).cpu())
    weights.to(device)
    optimizer = torch.optim.Adam(weights.parameters(), lr=teaching.lr)
    losses, kept, best = [_held_out_loss(batches, held, weights)], copy.deepcopy(weights.state_dict()), 0
    for epoch in range(1, teaching.epochs + 1):
        progress("learning", epoch - 1, teaching.epochs)
        for number in rng.permutation(len(batches)):
            mine = ~held[number].to(device)
            if not bool(mine.any()):
                continue
            pool = batches[number]
            loss = answer_losses(pool, weights(features_of(pool)), mode)[mine].mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses.append(_held_out_loss(batches, held, weights))
        if losses[-1] < losses[best]:
            kept, best = copy.deepcopy(weights.state_dict()), epoch
    progress("learning", teaching.epochs, teaching.epochs)
    weights.load_state_dict(kept)
    return Taught(weights.eval(), losses, best, users, reached)


def _held_out_loss(batches: Sequence[Pool], held: Sequence[Tensor], weights: FusionWeights) -> float:
    with torch.no_grad():
        parts = list(_losses_of(batches, held, weights))
    return float(torch.cat(parts).double().mean())


def _losses_of(batches: Sequence[Pool], wanted: Sequence[Tensor], weights: FusionWeights) -> Iterator[Tensor]:
    for pool, mask in zip(batches, wanted, strict=True):
        yield answer_losses(pool, weights(features_of(pool)), weights.mode)[mask.to(pool.log_probs.device)]
