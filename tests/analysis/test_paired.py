"""Paired statistics against formulas and scipy, on ranks that a person can picture."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from recsys_lightning.analysis.compare import Row, rows
from recsys_lightning.analysis.groups import Group, Score, group_runs, load_run
from recsys_lightning.analysis.paired import (
    CSV_COLUMNS,
    PairedTest,
    bootstrap_interval,
    csv_text,
    find_baseline,
    holm,
    paired_body,
    paired_test,
    paired_tests,
    resampled_means,
    user_intervals,
)
from recsys_lightning.analysis.user_values import all_values
from recsys_lightning.cli import main
from recsys_lightning.errors import InputError

# --------------------------------------------------------------------------------------------------------- resampling


def test_a_resample_of_two_users_has_the_law_of_two_coins():
    means = resampled_means(np.array([0.0, 1.0]), 10_000, seed=0)
    observed = [(means == value).sum() for value in (0, 0.5, 1)]
    assert sum(observed) == 10_000
    assert stats.chisquare(observed, [2_500, 5_000, 2_500]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("zeros", "ones"), [(30, 30), (30, 5), (5, 30), (5, 5)], ids=["common", "ones rare", "zeros rare", "all rare"]
)
def test_the_number_of_hits_in_a_resample_is_binomial(zeros, ones):
    """Whether values are shared by many users or by few, which are drawn in two ways."""
    users = zeros + ones
    values = np.repeat([0.0, 1.0], [zeros, ones])
    hits = np.rint(resampled_means(values, 20_000, seed=1) * users).astype(int)
    chances = stats.binom(users, ones / users).pmf(np.arange(users + 1)) * 20_000
    edges = np.flatnonzero(chances > 5)  # whatever is rarer is counted with the rarest that is not
    inside = np.clip(np.arange(users + 1), edges[0], edges[-1])
    observed = np.bincount(inside[hits], minlength=users + 1)[edges]
    expected = np.bincount(inside, chances, minlength=users + 1)[edges]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def mixed_values(rng: np.random.Generator) -> np.ndarray:
    """Differences as they come: most 0, some of a few values, some of their own."""
    return rng.permutation(np.concatenate([np.zeros(120), np.repeat([0.5, -0.5], [40, 26]), rng.normal(0.2, 0.5, 40)]))


def test_scipys_bootstrap_gives_the_same_interval():
    values = mixed_values(np.random.default_rng(3))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4))
    ours = bootstrap_interval(values, 20_000, seed=5)
    assert ours.mean == pytest.approx(values.mean(), abs=1e-15)
    # An estimated 2.5 % quantile of 20,000 has a standard error of 0.019 standard deviations; two of them 0.027.
    tolerance = 4 * 0.027 * theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_the_interval_of_many_users_is_that_of_the_normal_distribution():
    values = np.random.default_rng(6).normal(0.3, 2, 5_000)
    found = bootstrap_interval(values, 4_000, seed=0)
    standard_error = values.std() / math.sqrt(len(values))
    low, high = stats.norm(values.mean(), standard_error).interval(0.95)
    assert found.low == pytest.approx(low, abs=0.15 * standard_error)
    assert found.high == pytest.approx(high, abs=0.15 * standard_error)


def test_a_seed_is_a_seed():
    values = mixed_values(np.random.default_rng(3))
    assert (resampled_means(values, 500, seed=1) == resampled_means(values, 500, seed=1)).all()
    assert (resampled_means(values, 500, seed=1) != resampled_means(values, 500, seed=2)).any()
    assert len(resampled_means(values, 137, seed=1)) == 137


# ----------------------------------------------------------------------------------------------------------- p-values


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(7)
    p_values = [paired_test(rng.choice([-1.0, 0.0, 1.0], 300, p=(0.1, 0.8, 0.1)), 400, seed).p for seed in range(400)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_p_is_that_of_the_t_test_for_many_users():
    rng = np.random.default_rng(8)
    for shift in (0.0, 0.02, 0.04):
        values = rng.normal(shift, 1, 3_000)
        test = paired_test(values, 4_000, seed=0)
        assert test.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.04)
        assert test.p_holm == test.p
        assert (test.difference, test.low, test.high) == tuple(bootstrap_interval(values, 4_000, seed=0))


def test_a_planted_difference_has_the_least_p_there_is_in_either_direction():
    values = np.repeat([1.0, 0.0, -1.0], [400, 500, 100])
    up, down = paired_test(values, 999, seed=0), paired_test(-values, 999, seed=0)
    assert up.difference == -down.difference == pytest.approx(0.3)
    assert up.p == down.p == 1 / 1000
    assert up.low > 0 > down.high


def test_no_difference_at_all_has_p_1():
    assert paired_test(np.zeros(50), 200, seed=0) == PairedTest(0.0, 0.0, 0.0, 1.0, 1.0)
    assert paired_test(np.array([1.0, -1.0] * 30), 200, seed=0).p == 1


def test_equal_sums_count_as_equally_far_however_they_round():
    """One hit more than misses was found: every resample is as far from that as 0 is, but those of just one more."""
    test = paired_test(np.repeat([0.3, -0.3, 0.0], [4, 3, 3]), 20_000, seed=0)
    law = stats.multinomial(10, (0.4, 0.3, 0.3))
    one_more = sum(law.pmf([misses + 1, misses, 9 - 2 * misses]) for misses in range(5))
    assert test.p == pytest.approx(1 - one_more, abs=0.015)


def test_holm_by_hand():
    # Ordered 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04, and the last may not be below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


# --------------------------------------------------------------------------------------------------------------- runs

METRICS = ["recall@5", "ndcg@10", "tail/recall@10"]


def groups_of(*folders: str) -> list[Group]:
    return group_runs([load_run(folder) for folder in folders])


def test_values_are_averaged_over_seeds_and_paired_by_user(runs):
    groups = groups_of(*runs)
    known, remarks = all_values(groups, "test", METRICS)
    assert remarks == []
    hit = {name: np.array([0 < rank <= 5 for rank in ranks], float) for name, ranks in runs.items()}
    good = (hit["runs/good/seed1"] + hit["runs/good/seed2"]) / 2
    assert known["runs/good/seed*"].values["test", "recall@5"].tolist() == good.tolist()
    tests, remarks = paired_tests(known, "runs/good/seed*", 500, seed=3)
    assert remarks == []
    expected = paired_test(hit["runs/bad/seed1"] - good, 500, seed=3)
    found = tests["runs/bad/seed1", "test", "recall@5"]
    assert found[:4] == expected[:4]
    assert found.difference == pytest.approx(
        groups[1].score("test/recall@5").mean - groups[0].score("test/recall@5").mean
    )
    # Two metrics in two splits, all as small as p can be.
    assert {key: test.p_holm for key, test in tests.items()} == {
        ("runs/bad/seed1", split, metric): pytest.approx(4 / 501)
        for split in ("test", "test-unseen")
        for metric in METRICS[:2]
    }
    intervals = user_intervals(known, 500, seed=3)
    assert intervals["runs/good/seed*", "test", "recall@5"] == bootstrap_interval(good, 500, 3)
    assert len(intervals) == 8


def test_what_else_is_compared_does_not_change_a_test(runs):
    known, _ = all_values(groups_of(*runs), "test", METRICS)
    alone, _ = all_values(groups_of(*runs), "test", ["ndcg@10"])
    key = ("runs/bad/seed1", "test", "ndcg@10")
    one = paired_tests(alone, "runs/good/seed*", 300, 0)[0][key]
    assert one[:4] == paired_tests(known, "runs/good/seed*", 300, 0)[0][key][:4]


def test_missing_ranks_are_said_and_the_others_still_tested(runs, write_run):
    ones = [1] * len(runs["runs/bad/seed1"])
    write_run(Path("runs/third/seed1"), ones, ones, 1)
    Path("runs/third/seed1/ranks-test.parquet").unlink()
    known, (remark,) = all_values(groups_of(*runs, "runs/third/seed1"), "test", METRICS)
    assert "runs/third/seed1 has no ranks-test.parquet" in remark
    assert {name for name, _, _ in paired_tests(known, "runs/good/seed*", 200, 0)[0]} == {"runs/bad/seed1"}
    assert paired_tests(known, "runs/third/seed1", 200, 0) == ({}, [])


def test_other_users_are_never_paired(runs, write_run):
    users = [f"user {at:04}" for at in range(3, len(runs["runs/bad/seed1"]) + 5)]
    write_run(Path("runs/other/seed1"), [1] * len(users), [1] * len(users), 1, users)
    known, _ = all_values(groups_of(*runs, "runs/other/seed1"), "test", METRICS)
    tests, (remark,) = paired_tests(known, "runs/good/seed*", 200, 0)
    assert {name for name, _, _ in tests} == {"runs/bad/seed1"}
    assert "`runs/other/seed1` against `runs/good/seed*`" in remark
    assert "different users: 5 only of the first, 3 only of the second" in remark


def test_other_answers_of_the_same_users_are_never_paired(runs):
    path = Path("runs/bad/seed1/ranks-test.parquet")
    table = pl.read_parquet(path)
    changed = pl.when(pl.int_range(pl.len()) < 7).then(pl.lit("another")).otherwise("item_id").alias("item_id")
    table.with_columns(changed).write_parquet(path)
    known, _ = all_values(groups_of(*runs), "test", METRICS)
    tests, (remark,) = paired_tests(known, "runs/good/seed*", 200, 0)
    assert not tests
    assert "the same users but other answers for 7 of them" in remark


def test_the_baseline_is_the_first_group_or_the_one_of_a_run(runs):
    good, bad = groups_of(*runs)
    assert find_baseline([good, bad], None) is good
    assert find_baseline([bad, good], None) is bad
    assert find_baseline([bad, good], "runs/good/seed2/") is good
    assert find_baseline([bad, good], "runs/good/seed2/results.json") is good
    assert find_baseline([bad, good], "runs/good/seed*") is good
    with pytest.raises(InputError, match=r"--baseline runs/good is none of .*runs/bad/seed1, runs/good/seed1"):
        find_baseline([bad, good], "runs/good")


# -------------------------------------------------------------------------------------------------------------- output


def test_what_cannot_be_tested_shows_a_dash(runs):
    groups = groups_of(*runs)
    test = PairedTest(-0.01234, -0.02, 0.003, 0.0312, 0.0624)
    table = rows(groups, "test", METRICS)
    body = paired_body(table, METRICS, "runs/good/seed*", {("runs/bad/seed1", "test", "recall@5"): test})
    assert body[0] == [
        "runs/bad/seed1",
        "test",
        "recall@5",
        "-0.0123",
        "-0.0200 to +0.0030",
        "0.0312",
        "0.0624",
    ]
    assert body[2] == ["runs/bad/seed1", "test", "tail/recall@10", "-", "-", "-", "-"]
    assert len(body) == 5  # there is no tail/recall@10 over unseen items


def test_the_csv_holds_every_digit():
    mean, sd = (0.1 + 1 / 3) / 2, abs(0.1 - 1 / 3) / math.sqrt(2)
    test = PairedTest(1 / 7, -1 / 9, 1 / 11, 1 / 13, 2 / 13)
    table = [
        Row("a, b", "COBRA", "test", 2, (Score((0.1, 1 / 3)), Score((0.5,)))),
        Row('"c"', "SPARC", "test", 1, (None, Score((0.25,)))),
    ]
    text = csv_text(table, ["recall@5", "users"], "a, b", {('"c"', "test", "users"): test})
    found = pl.read_csv(text.encode(), schema=CSV_COLUMNS).rows()
    assert found == [
        ("a, b", "COBRA", "test", "recall@5", pytest.approx(mean, abs=1e-17), pytest.approx(sd), 2, *[None] * 6),
        ("a, b", "COBRA", "test", "users", 0.5, None, 1, *[None] * 6),
        ('"c"', "SPARC", "test", "recall@5", None, None, 0, *[None] * 6),
        ('"c"', "SPARC", "test", "users", 0.25, None, 1, "a, b", *test),
    ]


def compared(*options: str, runs: dict[str, list[int]]) -> pl.DataFrame:
    """What the command writes."""
    assert main(["compare", *runs, "--metrics", *METRICS, "--output", "out/c.md", *options]) == 0
    return pl.read_csv("out/c.csv", schema=CSV_COLUMNS)


def test_compare_tests_against_the_baseline_and_says_what_the_numbers_mean(runs, capsys):
    found = compared(runs=runs)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Difference from runs/good/seed*, over the same users" in printed
    assert "p is not corrected for several comparisons; p (Holm) is, for all 4 of this table" in printed
    report = Path("out/c.md").read_text()
    assert "`±` is the standard deviation over seeds" in report
    assert "p-values are over users, for the trained models at hand" in report
    assert "10,000 bootstrap resamples of the users (seed 0)" in report
    # -0.2 or so, and as sure as 10,000 resamples can be.
    line = found.row(by_predicate=pl.concat_str("run", "split", "metric") == "runs/bad/seed1testrecall@5", named=True)
    assert line["baseline"] == "runs/good/seed*"
    assert line["ci_low"] < line["difference"] < line["ci_high"] < 0
    assert line["p"] == 1 / 10_001
    assert f"| {line['difference']:+.4f} | {line['ci_low']:+.4f} to {line['ci_high']:+.4f} | 0.0001 |" in report
    assert found.filter(pl.col("run") == "runs/good/seed*")["difference"].null_count() == 6


def test_baseline_resamples_and_seed_change_the_test(runs):
    base = compared("--resamples", "400", runs=runs)
    turned = compared("--resamples", "400", "--baseline", "runs/bad/seed1", runs=runs)
    tested = base["difference"].drop_nulls().to_list()
    assert turned["difference"].drop_nulls().to_list() == pytest.approx([-value for value in tested])
    assert base["p"].drop_nulls().to_list() == [1 / 401] * 4
    fewer = compared("--resamples", "100", runs=runs)
    assert fewer["p"].drop_nulls().to_list() == [1 / 101] * 4
    reseeded = compared("--resamples", "400", "--seed", "1", runs=runs)
    assert reseeded["difference"].equals(base["difference"])
    assert not reseeded["ci_low"].equals(base["ci_low"])
    assert compared("--resamples", "400", "--seed", "0", runs=runs).equals(base)


def test_one_run_alone_has_no_test(runs, capsys):
    assert main(["compare", "runs/bad/seed1", "--metrics", "recall@5"]) == 0
    assert "Difference" not in capsys.readouterr().out


def test_no_absolute_path_enters_the_report(runs, tmp_path):
    folders = [str(tmp_path / name) for name in runs]
    output = str(tmp_path / "c.md")
    assert main(["compare", *folders, "--baseline", folders[2], "--metrics", "recall@5", "--output", output]) == 0
    for suffix in (".md", ".csv"):
        assert str(tmp_path) not in (tmp_path / "c").with_suffix(suffix).read_text()
