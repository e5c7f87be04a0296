"""Paired comparison of runs on the same users: bootstrap interval and p-value of the difference of two means.

What is resampled are the users, so everything here speaks about the trained models at hand and about other users like
these; how much another seed would change a model is the standard deviation over seeds, and no part of it.

Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16; Holm (1979).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys_lightning.analysis.compare import Group, Row, Run, results_file
from recsys_lightning.errors import InputError

Floats = NDArray[np.float64]
Key = tuple[str, str, str]  # name of a group, split, metric

NOTES = (
    "`±` is the standard deviation over seeds: how much training again changes a model. Intervals and p-values are "
    "over users, for the trained models at hand, the seeds of a row averaged: how much other users like these would "
    "change the difference. Neither stands for the other.",
    "Intervals hold 95 % of {resamples:,} bootstrap resamples of the users (seed {seed}); p is two-sided, from the "
    "resamples centred at 0, and at least 1 / {smallest:,}. p is not corrected for several comparisons; p (Holm) is, "
    "for all {tests} of this table. `-`: the ranks of single users do not give the metric.",
)
_RANK_COLUMNS = ("user_id", "item_id", "first", "tied", "first_unseen", "tied_unseen")
_FROM_RANKS = re.compile(r"(recall|ndcg|mrr|hit_rate|map)@(\d+)")  # neither slices nor metrics of whole lists


class Interval(NamedTuple):
    """A mean over users and where it may lie."""

    mean: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """A difference of two means over the same users."""

    difference: float
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided, for a true difference of 0
    p_holm: float  # corrected for the other tests of the comparison


class Unpaired(ValueError):
    """Why runs cannot be paired user by user."""


# -------------------------------------------------------------------------------------------------------- statistics


def resampled_means(values: Floats, resamples: int, seed: int) -> Floats:
    """Means of bootstrap resamples: each draws as many users as there are, with replacement.

    Args:
        values: (B,) one a user.
        resamples: how many.
        seed: of the draws; the same values and seed give the same means.

    Returns:
        (resamples,) means.
    """
    # How often each user is drawn is multinomial, and so is how often each distinct value is. Most users have the
    # same few values (0 where the answer is in neither list), so drawing counts of values has the same law as drawing
    # users and is far less work. A value that few users have costs less when its users are drawn one by
    # one: such users are one cell of the multinomial, and what falls into it is drawn from them.
    rng, users = np.random.default_rng(seed), len(values)
    distinct, counts = np.unique(values, return_counts=True)
    order = counts.argsort(kind="stable")  # the largest cell last: it takes what rounding leaves of the probabilities
    distinct, counts = distinct[order], counts[order]
    common = counts >= 25
    rare = np.repeat(distinct[~common], counts[~common])
    sizes = np.concatenate([[len(rare)], counts[common]])
    sums = np.empty(resamples)
    step = max(1, 2_000_000 // len(sizes))  # resamples at once: 16 MB of counts
    for start in range(0, resamples, step):
        drawn = rng.multinomial(users, sizes / users, size=min(step, resamples - start))  # (step, cells)
        sums[start : start + step] = drawn[:, 1:] @ distinct[common]
        if len(rare):
            for at, count in enumerate(drawn[:, 0], start):
                sums[at] += rare[rng.integers(0, len(rare), count, dtype=np.int32)].sum()
    return sums / users


def bootstrap_interval(values: Floats, resamples: int, seed: int) -> Interval:
    """95 % percentile interval of the mean of (B,) values."""
    low, high = np.quantile(resampled_means(values, resamples, seed), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def paired_test(differences: Floats, resamples: int, seed: int) -> PairedTest:
    """95 % percentile interval and two-sided p-value of the mean of (B,) differences, one a user.

    The p-value is the share of resamples whose mean, centred at 0, is at least as far from 0 as the mean that was
    found: (b + 1) / (resamples + 1), which is never 0. `p_holm` is p.
    """
    mean = float(differences.mean())
    means = resampled_means(differences, resamples, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    # A hair less than |mean|: differences of hits lie on a lattice, where equal sums may round to unequal ones.
    as_far = int((np.abs(means - mean) >= abs(mean) * (1 - 1e-9)).sum())
    p = (as_far + 1) / (resamples + 1)
    return PairedTest(mean, float(low), float(high), p, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several, by Holm's step-down method; in the order given, at most 1."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[at] * (len(p_values) - rank)))
        corrected[at] = largest
    return corrected


# ------------------------------------------------------------------------------------------------- values of each user


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


# ---------------------------------------------------------------------------------------------------- of a comparison


def find_baseline(groups: Sequence[Group], baseline: str | None) -> Group:
    """The group that a run, by name or folder, belongs to; the first if none is named.

    Raises:
        InputError: the run is not among those compared.
    """
    if baseline is None:
        return groups[0]
    for group in groups:
        folders = [run.folder.resolve() for run in group.runs]
        if baseline == group.name or results_file(baseline).parent.resolve() in folders:
            return group
    names = ", ".join(run.name for group in groups for run in group.runs)
    raise InputError(f"--baseline {baseline} is none of the runs that are compared ({names}): add it to them")


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


def paired_tests(
    known: Mapping[str, GroupValues], baseline: str, resamples: int, seed: int
) -> tuple[dict[Key, PairedTest], list[str]]:
    """Each group less the baseline, by split and metric, and a line for each group that cannot be paired with it.

    Args:
        known: values of the groups by name.
        baseline: name of the group that the others are compared with; without its values there are no tests.
        resamples: of the bootstrap.
        seed: of the bootstrap; every test draws anew from it, so what else is compared does not change a test.
    """
    tests: dict[Key, PairedTest] = {}
    remarks = []
    base = known.get(baseline)
    for name, group in known.items():
        if base is None or name == baseline:
            continue
        if unlike := unlike_users(group.answers, base.answers):
            remarks.append(f"No paired test of `{name}` against `{baseline}`: they were measured on {unlike}.")
            continue
        for (split, metric), values in group.values.items():
            if (split, metric) in base.values:
                differences = values - base.values[split, metric]
                tests[name, split, metric] = paired_test(differences, resamples, seed)
    corrected = holm([test.p for test in tests.values()])
    return {key: test._replace(p_holm=p) for (key, test), p in zip(tests.items(), corrected, strict=True)}, remarks


def user_intervals(known: Mapping[str, GroupValues], resamples: int, seed: int) -> dict[Key, Interval]:
    """95 % bootstrap interval over users of each group's own mean, by group, split and metric."""
    return {
        (name, split, metric): bootstrap_interval(values, resamples, seed)
        for name, group in known.items()
        for (split, metric), values in group.values.items()
    }


PAIRED_HEADER = ("run", "split", "metric", "difference", "95 % interval", "p", "p (Holm)")


def paired_body(
    table: Sequence[Row], metrics: Sequence[str], baseline: str, tests: Mapping[Key, PairedTest]
) -> list[list[str]]:
    """Cells below `PAIRED_HEADER`, a row a group other than the baseline, split and metric; `-` without a test."""
    cells = []
    for row in table:
        for metric, score in zip(metrics, row.scores, strict=True):
            if row.name == baseline or score is None:
                continue
            shown = ["-"] * 4
            if test := tests.get((row.name, row.split, metric)):
                interval = f"{test.low:+.4f} to {test.high:+.4f}"
                shown = [f"{test.difference:+.4f}", interval, f"{test.p:.4f}", f"{test.p_holm:.4f}"]
            cells.append([row.name, row.split, metric, *shown])
    return cells


CSV_COLUMNS = {
    **dict.fromkeys(("run", "model", "split", "metric"), pl.String),
    "mean": pl.Float64,
    "sd": pl.Float64,
    "n": pl.Int64,
    "baseline": pl.String,
    **dict.fromkeys(("difference", "ci_low", "ci_high", "p", "p_holm"), pl.Float64),
}


def csv_text(
    table: Sequence[Row], metrics: Sequence[str], baseline: str | None, tests: Mapping[Key, PairedTest]
) -> str:
    """A comparison as CSV at full precision: one line a group, split and metric; what there is not is empty.

    Columns: run, model, split, metric, mean, sd and n over seeds, baseline, and against it difference, ci_low, ci_high
    (95 %), p and p_holm.
    """
    lines = []
    for row in table:
        for metric, score in zip(metrics, row.scores, strict=True):
            test = tests.get((row.name, row.split, metric))
            seeds = (score.mean, score.sd, len(score.values)) if score else (None, None, 0)
            found = (baseline, *test) if test else (None,) * 6
            lines.append((row.name, row.model, row.split, metric, *seeds, *found))
    return pl.DataFrame(lines, schema=CSV_COLUMNS, orient="row").write_csv()
