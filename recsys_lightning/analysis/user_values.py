"""What each user of a run is worth by a metric, from the ranks file that the run has left."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_lightning.analysis.groups import Group, Run
from recsys_lightning.errors import InputError

Floats = NDArray[np.float64]

_RANK_COLUMNS = ("user_id", "item_id", "first", "tied", "first_unseen", "tied_unseen")
_FROM_RANKS = re.compile(r"(recall|ndcg|mrr|hit_rate|map)@(\d+)")  # neither slices nor metrics of whole lists


class Unpaired(ValueError):
    """Why runs cannot be paired user by user."""


def read_ranks(path: Path) -> pl.DataFrame:
    """The ranks file of a run, sorted by user and item.

    Raises:
        InputError: it is not one of ours.
    """
    try:
        table = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from error
    missing = [name for name in _RANK_COLUMNS if name not in table.columns]
    if missing or table.is_empty() or table.null_count().sum_horizontal().item():
        fault = f"lacks {', '.join(missing)}" if missing else "is empty or has gaps"
        raise InputError(f"{path} {fault}: it was not written by `recsys test` or `recsys validate`")
    return table.sort("user_id", "item_id")


def user_values(
    ranks: pl.DataFrame, metric: str, unseen: bool, ndcg_normalizer: Literal["ideal", "comirec"] = "ideal"
) -> Floats | None:
    """A metric of each user, (B,) by user id; None for a metric that is not one of single users' ranks.

    Args:
        ranks: of `read_ranks`; one row an answer.
        metric: such as ``recall@10``.
        unseen: take the lists without items that the user has met.
        ndcg_normalizer: ``ideal`` or ``comirec``.
    """
    named = _FROM_RANKS.fullmatch(metric)
    if named is None:
        return None
    # Here, since they bring torch: tables of runs without ranks do without.
    import torch

    from recsys_lightning.metrics.ranking import ranking_metrics
    from recsys_lightning.metrics.ranks import TargetRanks

    user = ranks["user_id"].rle_id().to_numpy().astype(np.int64)  # (answers,)
    place = np.arange(len(user)) - np.searchsorted(user, user)  # (answers,) among the answers of its user
    shape = (int(user[-1]) + 1, int(place.max()) + 1)
    first, tied = np.zeros(shape, np.int64), np.zeros(shape, np.int64)  # (B, N)
    relevant = np.zeros(shape, np.bool_)  # (B, N)
    first[user, place] = ranks["first_unseen" if unseen else "first"].to_numpy()
    tied[user, place] = ranks["tied_unseen" if unseen else "tied"].to_numpy()
    relevant[user, place] = True
    kind, k = named.groups()
    scorer = ranking_metrics((int(k),), (kind,), ndcg_normalizer)[metric]
    values: torch.Tensor = scorer.values(TargetRanks(*map(torch.from_numpy, (first, tied, relevant))))  # type: ignore[operator]
    return np.asarray(values.numpy(), np.float64)


class GroupValues(NamedTuple):
    """What each user of a group's runs is worth in one stage, averaged over seeds."""

    answers: pl.DataFrame  # user_id, item_id, sorted by both
    values: dict[tuple[str, str], Floats]  # (B,) by split and metric; those that cannot be had from ranks are not there


def group_values(group: Group, stage: str, metrics: Sequence[str]) -> GroupValues:
    """Metrics of each user, from the ranks files of a group's runs, for both splits of a stage.

    Raises:
        Unpaired: a run has left no ranks, its ranks do not give what its ``results.json`` says, or the runs were
            measured on different users.
        InputError: a ranks file is not one of ours.
    """
    tables = []
    for run in group.runs:
        path = run.folder / f"ranks-{stage}.parquet"
        if not path.is_file():
            command = "test" if stage == "test" else "validate"
            raise Unpaired(f"{run.name} has no {path.name}, which `recsys {command}` writes")
        tables.append(read_ranks(path))
        if unlike := unlike_users(tables[0], tables[-1]):
            raise Unpaired(f"`{group.runs[0].name}` and `{run.name}` were measured on {unlike}")
    found = {}
    for split in (stage, f"{stage}-unseen"):
        for metric in metrics:
            seeds = [_recorded_values(run, table, split, metric) for run, table in zip(group.runs, tables, strict=True)]
            known = [values for values in seeds if values is not None]
            if len(known) == len(tables):
                found[split, metric] = np.stack(known).mean(0)
    return GroupValues(tables[0].select("user_id", "item_id"), found)


def _recorded_values(run: Run, table: pl.DataFrame, split: str, metric: str) -> Floats | None:
    recorded = run.results["metrics"].get(f"{split}/{metric}")
    values = user_values(table, metric, split.endswith("-unseen"), _ndcg_normalizer(run))
    if recorded is None or values is None:
        return None
    if not abs(values.mean() - recorded) < 1e-5:  # results.json may hold float32
        raise Unpaired(
            f"the ranks of `{run.name}` give {split}/{metric} {values.mean():.6f}, its results.json says "
            f"{recorded:.6f}, so that the two are of different evaluations"
        )
    return values


def unlike_users(one: pl.DataFrame, other: pl.DataFrame) -> str:
    """What keeps two ranks tables from being paired user by user; empty if nothing does."""
    first, second = set(one["user_id"]), set(other["user_id"])
    if first != second:
        return f"different users: {len(first - second):,} only of the first, {len(second - first):,} only of the second"
    answers = ["user_id", "item_id"]
    if not one.select(answers).equals(other.select(answers)):
        unlike = pl.concat([one.join(other, on=answers, how="anti"), other.join(one, on=answers, how="anti")])
        return f"the same users but other answers for {unlike['user_id'].n_unique():,} of them"
    return ""


def _ndcg_normalizer(run: Run) -> Literal["ideal", "comirec"]:
    part = run.results["config"]
    for key in ("model", "init_args", "evaluation", "ndcg_normalizer"):
        part = part.get(key) if isinstance(part, dict) else None
    return "comirec" if part == "comirec" else "ideal"


def all_values(groups: Sequence[Group], stage: str, metrics: Sequence[str]) -> tuple[dict[str, GroupValues], list[str]]:
    """`group_values` of each group, by name, and a line for each group that has none."""
    found: dict[str, GroupValues] = {}
    remarks: list[str] = []
    if not any(_FROM_RANKS.fullmatch(metric) for metric in metrics):
        return found, remarks
    for group in groups:
        try:
            found[group.name] = group_values(group, stage, metrics)
        except Unpaired as reason:
            remarks.append(f"No interval over users and no paired test of {group.name}: {reason}.")
    return found, remarks
