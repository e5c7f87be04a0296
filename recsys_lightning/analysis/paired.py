"""Paired comparison of runs on the same users: bootstrap interval and p-value of the difference of two means.

What is resampled are the users, so everything here speaks about the trained models at hand and about other users like
these; how much another seed would change a model is the standard deviation over seeds, and no part of it.

Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16; Holm (1979).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from recsys_lightning.analysis.compare import Row
from recsys_lightning.analysis.groups import Group, results_file
from recsys_lightning.analysis.user_values import Floats, GroupValues, unlike_users
from recsys_lightning.errors import InputError

Key = tuple[str, str, str]  # name of a group, split, metric

NOTES = (
    "`±` is the standard deviation over seeds: how much training again changes a model. Intervals and p-values are "
    "over users, for the trained models at hand, the seeds of a row averaged: how much other users like these would "
    "change the difference. Neither stands for the other.",
    "Intervals hold 95 % of {resamples:,} bootstrap resamples of the users (seed {seed}); p is two-sided, from the "
    "resamples centred at 0, and at least 1 / {smallest:,}. p is not corrected for several comparisons; p (Holm) is, "
    "for all {tests} of this table. `-`: the ranks of single users do not give the metric.",
)


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
