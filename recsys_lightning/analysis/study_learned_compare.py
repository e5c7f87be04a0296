"""Learned BeamFusion against fixed pairs, on users it was not taught on: ranking, paired tests, calibration.

Axis letters: U users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_lightning.analysis.paired import PairedTest, holm, paired_test
from recsys_lightning.analysis.study_fusion import PSIS, TAUS
from recsys_lightning.analysis.study_learned import (
    Chooser,
    Taught,
    Teaching,
    best_pair,
    chosen_by,
    features_of,
    fixed,
    mean_loss,
    teach,
)
from recsys_lightning.analysis.study_run import Pool, Progress, StudiedRun, Users, pools
from recsys_lightning.analysis.user_values import Floats
from recsys_lightning.data.sequences import Stage
from recsys_lightning.metrics.calibration import Reliability, reliability
from recsys_lightning.metrics.ranking import NDCGAtK, RecallAtK
from recsys_lightning.metrics.ranks import TargetRanks
from recsys_lightning.models.cobra import COBRA
from recsys_lightning.retrieval.beam_fusion import log_scores, segment_logsumexp
from recsys_lightning.retrieval.fusion_weights import Mode

METRICS = ("recall@5", "recall@10", "recall@50", "ndcg@10")
TUNED_BY = "ndcg@10"
STAGES: tuple[Stage, ...] = ("val", "test")
OWN, TAUGHT_PAIR, TUNED_PAIR, LEARNED = "the run's own", "best on training", "best on validation", "learned"


class Ranked(NamedTuple):
    """What each user of a stage is worth under one way of choosing tau and psi."""

    values: dict[str, Floats]  # (U,) by metric
    claimed: Floats  # (U,) chance that the first item is the answer: its Phi over the sum of the candidates'
    phi: Floats  # (U,) Phi of the first item, as eq. 13 has it
    correct: Floats  # (U,) whether it is; a share where items tie for the first place
    reached: Floats  # (U,) whether the answer is in a beam
    tau: Floats  # (U,)
    psi: Floats  # (U,)


@torch.no_grad()
def rank_users(batches: Sequence[Pool], choose: Chooser, mode: Mode) -> Ranked:
    """Fuse, rank and score every user."""
    ranks: list[TargetRanks] = []
    columns: list[Tensor] = []
    for pool in batches:
        pair = choose(pool)
        tau, psi = (torch.as_tensor(part, device=pool.log_probs.device).expand(len(pool.user)) for part in pair)
        scores = log_scores(pool.found, pool.log_probs, tau, psi, mode)
        ranks.append(pool.ranks(scores))
        total = segment_logsumexp(scores, pool.found.row, len(pool.user))
        first = torch.full_like(total, -torch.inf).scatter_reduce(0, pool.found.row, scores, "amax")
        columns.append(torch.stack([(first - total).exp(), first.exp(), pool.reached.float(), tau, psi], 1).double())
    every = TargetRanks(*(torch.cat(parts) for parts in zip(*ranks, strict=True)))
    scorers = {f"recall@{k}": RecallAtK(k) for k in (1, 5, 10, 50)} | {"ndcg@10": NDCGAtK(10)}
    values = {name: scorer.values(every).cpu().numpy() for name, scorer in scorers.items()}
    claimed, phi, reached, tau_, psi_ = torch.cat(columns).cpu().numpy().T
    return Ranked(values, claimed, phi, values["recall@1"], reached, tau_, psi_)


@dataclass(frozen=True)
class Comparison:
    """Everything that was found.

    Attributes:
        mode: domain of the second softmax.
        taught: the learned weights.
        ranked: by stage and name of the way of choosing.
        train_losses: mean cross-entropy on the training users by name.
        tests: learned less each other way, by stage, name and metric.
        entropy: (U,) of the beams of the test users, for the picture.
    """

    mode: Mode
    taught: Taught
    ranked: Mapping[Stage, Mapping[str, Ranked]]
    train_losses: Mapping[str, float]
    tests: Mapping[tuple[str, str, str], PairedTest]
    entropy: Floats


def compare_learned(
    run: StudiedRun[COBRA],
    mode: Mode,
    teaching: Teaching,
    drawn: Mapping[Stage, Users],
    progress: Progress,
    resamples: int,
) -> Comparison:
    """Teach, choose the fixed pairs, and rank the users of both stages.

    Args:
        run: whose beams.
        mode: domain of the second softmax.
        teaching: how tau and psi are learned.
        drawn: users by stage: ``train``, ``val`` and ``test``.
        progress: told of each step.
        resamples: of the bootstrap.
    """
    search = run.model.search
    known = {
        stage: list(pools(run, users, search.num_beams, progress, f"beams of {stage}"))
        for stage, users in drawn.items()
    }
    train = known["train"]
    own = (search.tau, search.psi)
    taught = teach(train, own, mode, teaching, progress)
    pairs = [(tau, psi) for psi in PSIS for tau in TAUS]
    tuned = max(pairs, key=lambda pair: rank_users(known["val"], fixed(*pair), mode).values[TUNED_BY].mean())
    ways = {
        OWN: fixed(*own),
        TAUGHT_PAIR: fixed(*best_pair(train, pairs, mode)),
        TUNED_PAIR: fixed(*tuned),
        LEARNED: chosen_by(taught.weights),
    }
    ranked = {
        stage: {name: rank_users(known[stage], choose, mode) for name, choose in ways.items()} for stage in STAGES
    }
    losses = {name: mean_loss(train, choose, mode) for name, choose in ways.items()}
    entropy = torch.cat([features_of(pool)[:, 0] for pool in known["test"]]).double().cpu().numpy()
    return Comparison(mode, taught, ranked, losses, _tests(ranked, resamples, teaching.seed), entropy)


def _tests(
    ranked: Mapping[Stage, Mapping[str, Ranked]], resamples: int, seed: int
) -> dict[tuple[str, str, str], PairedTest]:
    found = {
        (stage, name, metric): paired_test(ways[LEARNED].values[metric] - other.values[metric], resamples, seed)
        for stage, ways in ranked.items()
        for name, other in ways.items()
        if name != LEARNED
        for metric in METRICS
    }
    corrected = holm([test.p for test in found.values()])
    return {key: test._replace(p_holm=p) for (key, test), p in zip(found.items(), corrected, strict=True)}


def bins_of(ranked: Ranked, chances: Floats, only_reached: bool = False) -> Reliability:
    """Claimed chances of the first item against how often it is the answer."""
    kept = ranked.reached > 0 if only_reached else np.ones_like(ranked.reached, dtype=np.bool_)
    return reliability(torch.from_numpy(chances[kept]), torch.from_numpy(ranked.correct[kept]))


def calibration_errors(ranked: Ranked, mode: Mode) -> dict[str, float]:
    """Expected calibration errors: over all users, over those whose answer is in a beam, and of Phi as printed."""
    found = {"ECE": bins_of(ranked, ranked.claimed).error()}
    if ranked.reached.any():
        found["ECE, answer in a beam"] = bins_of(ranked, ranked.claimed, only_reached=True).error()
    if mode == "global":  # within an ID the two are one: Phi sums to 1 over the candidates
        found["ECE of Phi"] = bins_of(ranked, ranked.phi).error()
    return found
