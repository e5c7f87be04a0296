"""What each user is worth, from ranks that a person can picture."""

import math
from pathlib import Path

import polars as pl
import pytest

from recsys_lightning.analysis.groups import Group, Run, group_runs, load_run
from recsys_lightning.analysis.user_values import Unpaired, all_values, group_values, read_ranks, user_values
from recsys_lightning.errors import InputError

METRICS = ["recall@5", "ndcg@10", "tail/recall@10"]


def test_metrics_of_each_user_follow_from_his_ranks(ranks_table):
    ranks = ranks_table([1, 3, 0, 11], unseen=[1, 2, 0, 10])
    assert user_values(ranks, "recall@10", unseen=False).tolist() == [1, 1, 0, 0]
    assert user_values(ranks, "recall@10", unseen=True).tolist() == [1, 1, 0, 1]
    assert user_values(ranks, "hit_rate@2", unseen=False).tolist() == [1, 0, 0, 0]
    assert user_values(ranks, "ndcg@10", unseen=False).tolist() == pytest.approx([1, 0.5, 0, 0])
    assert user_values(ranks, "mrr@20", unseen=False).tolist() == pytest.approx([1, 1 / 3, 0, 1 / 11])
    assert user_values(ranks, "map@10", unseen=True).tolist() == pytest.approx([1, 1 / 2, 0, 1 / 10])


def test_ties_and_several_answers_count_as_the_metrics_count_them():
    ranks = pl.DataFrame(
        {
            "user_id": ["a", "b", "b", "b"],
            "item_id": ["x", "x", "y", "z"],
            "first": [2, 1, 5, 0],
            "tied": [3, 1, 1, 0],
            "first_unseen": [2, 1, 5, 0],
            "tied_unseen": [2, 1, 1, 0],
        }
    )
    # a stands on rank 2, 3 or 4, without what he has met on 2 or 3; b has answers on 1, on 5 and nowhere.
    assert user_values(ranks, "recall@3", unseen=False).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert user_values(ranks, "recall@2", unseen=True).tolist() == pytest.approx([1 / 2, 1 / 3])
    best = 1 + 1 / math.log2(3) + 1 / 2
    found = 1 + 1 / math.log2(6)
    assert user_values(ranks, "ndcg@5", unseen=True)[1] == pytest.approx(found / best)
    assert user_values(ranks, "ndcg@5", True, "comirec")[1] == pytest.approx(found / (1 + 1 / math.log2(3)))


@pytest.mark.parametrize(
    "metric", ["tail/recall@10", "coverage@10", "semantic-id/recall@10", "users", "recall", "auc@5"]
)
def test_slices_and_metrics_of_lists_are_not_had_from_ranks(metric, ranks_table):
    assert user_values(ranks_table([1, 2]), metric, unseen=False) is None


def test_the_order_of_a_ranks_file_does_not_matter(tmp_path, ranks_table):
    table = ranks_table([1, 3, 0, 11])
    table.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "ranks.parquet")
    assert read_ranks(tmp_path / "ranks.parquet").equals(table)


def test_a_file_that_is_no_ranks_file_is_refused(tmp_path, ranks_table):
    path = tmp_path / "ranks-test.parquet"
    path.write_text("user_id,first\n")
    with pytest.raises(InputError, match=r"ranks-test.parquet is not a Parquet file"):
        read_ranks(path)
    ranks_table([1]).drop("tied").write_parquet(path)
    with pytest.raises(InputError, match=r"ranks-test.parquet lacks tied"):
        read_ranks(path)
    ranks_table([]).write_parquet(path)
    with pytest.raises(InputError, match=r"is empty or has gaps"):
        read_ranks(path)
    ranks_table([1, 2]).with_columns(first=pl.Series([1, None], dtype=pl.Int32)).write_parquet(path)
    with pytest.raises(InputError, match=r"is empty or has gaps"):
        read_ranks(path)


# --------------------------------------------------------------------------------------------------------------- runs


def groups_of(*folders: str) -> list[Group]:
    return group_runs([load_run(folder) for folder in folders])


def test_nobody_asks_for_ranks_where_no_metric_is_made_of_them(runs):
    """Tokenizers have none."""
    Path("runs/bad/seed1/ranks-test.parquet").unlink()
    assert all_values(groups_of(*runs), "test", ["tail/recall@10", "cells"]) == ({}, [])


def test_seeds_on_other_users_are_no_group_of_pairs(runs, write_run):
    write_run(Path("runs/good/seed3"), [1] * 10, [1] * 10, 3)
    with pytest.raises(Unpaired, match=r"runs/good/seed1. and .runs/good/seed3. were measured on different users"):
        group_values(groups_of("runs/good/seed1", "runs/good/seed3")[0], "test", METRICS)


def test_ranks_of_another_evaluation_are_not_taken_for_those_of_the_results(runs, ranks_table):
    other = [5] * len(runs["runs/bad/seed1"])
    ranks_table(other).write_parquet("runs/bad/seed1/ranks-test.parquet")
    with pytest.raises(Unpaired, match=r"test/recall@5 1\.000000, its results\.json says 0\.0"):
        group_values(groups_of("runs/bad/seed1")[0], "test", METRICS)


def test_the_normalizer_of_ndcg_is_that_of_the_runs_evaluation(tmp_path, ranks_table):
    table = pl.concat([ranks_table([1]), ranks_table([0]).with_columns(item_id=pl.lit("missed"))])
    table.write_parquet(tmp_path / "ranks-test.parquet")
    ideal = 1 / (1 + 1 / math.log2(3))
    for normalizer, value in (("ideal", ideal), ("comirec", 1.0), (None, ideal)):
        evaluation = {} if normalizer is None else {"evaluation": {"ndcg_normalizer": normalizer}}
        results = {"metrics": {"test/ndcg@5": value}, "config": {"model": {"init_args": evaluation}}}
        found = group_values(Group("x", (Run("x", tmp_path, results),)), "test", ["ndcg@5"])
        assert found.values["test", "ndcg@5"].tolist() == pytest.approx([value])
