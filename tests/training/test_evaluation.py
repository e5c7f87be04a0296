"""The evaluator: what it reports is what a loop over users would count, by exact item ids, ties by expected value."""

import json
from collections import defaultdict
from functools import partial

import lightning as L
import polars as pl
import pytest
import torch

from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.errors import InputError
from recsys_lightning.models.popularity import Popularity
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.models.sasrec import SASRec
from recsys_lightning.retrieval.build import IndexSettings
from recsys_lightning.retrieval.recommendations import Recommendations
from recsys_lightning.training.evaluation import EvaluationSettings, Evaluator
from recsys_lightning.training.recommender import RecommenderModule

KS = (1, 5, 10)


@pytest.fixture
def data(tmp_path):
    source = Synthetic(num_users=90, num_themes=2, topics_per_theme=2, items_per_topic=6, min_length=4, max_length=9)
    return SequenceDataModule(source, cache_dir=str(tmp_path), k_core=0, batch_size=16, eval_batch_size=7, seed=3)


def trainer(**settings):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off = dict.fromkeys(quiet, False)
    return L.Trainer(accelerator="cpu", use_distributed_sampler=False, num_sanity_val_steps=0, **(off | settings))


def evaluated(model, data, stage="test", **settings):
    module = RecommenderModule(model, evaluation=EvaluationSettings(**({"ks": KS} | settings)))
    run = trainer()
    found = (run.validate if stage == "val" else run.test)(module, data, verbose=False)[0]
    return found, module


class OneForAll(Recommender):
    """The same score for every item."""

    def __init__(self, catalog):
        super().__init__()
        self.num_items = catalog.num_items

    def losses(self, batch):
        return {}

    def encode_items(self, item_ids):
        return torch.ones(len(item_ids), 1)

    def recommend(self, batch, k, index):
        found = index.search_with_ties(torch.ones(len(batch), 1), k)
        return Recommendations(found.item_ids, found.scores)


def by_loop(data, stage, counts):
    """Every metric of a ranking by `counts`, one user at a time: sums over the places that an answer may take."""
    interactions, train = data.data.interactions, data.catalog.train_counts
    order = sorted(range(1, interactions.num_items + 1), key=lambda item: (-train[item], item))
    head, half = (round(share * len(order)) for share in (0.2, 0.5))
    parts = {"head": set(order[:head]), "mid": set(order[head:half]), "tail": set(order[head:])}
    parts["cold-item"] = {item for item in order if train[item] == 0}
    total, users = defaultdict(float), defaultdict(int)
    for user in range(interactions.num_users):
        items = interactions.items[interactions.offsets[user] : interactions.offsets[user + 1]].tolist()
        history, answer = (items[:-2], items[-2]) if stage == "val" else (items[:-1], items[-1])
        slices = ["", *(f"{name}/" for name, part in parts.items() if answer in part)]
        slices += ["cold-user/"] if len(items) <= 6 else []
        for column, struck in ((stage, set()), (f"{stage}-unseen", set(history))):
            scores = [counts[item] for item in order if item not in struck]
            mine = None if answer in struck else counts[answer]
            better = sum(score > mine for score in scores) if mine is not None else len(scores)
            places = range(better + 1, better + 1 + (scores.count(mine) if mine is not None else 0))
            for name in slices:
                users[f"{column}/{name}users"] += 1
                for k in KS:
                    inside = [place for place in places if place <= k]
                    chance = 1 / max(len(places), 1)
                    total[f"{column}/{name}recall@{k}"] += len(inside) * chance
                    total[f"{column}/{name}hit_rate@{k}"] += len(inside) * chance
                    reciprocal = sum(1 / place for place in inside) * chance
                    total[f"{column}/{name}mrr@{k}"] += reciprocal
                    total[f"{column}/{name}map@{k}"] += reciprocal
                    discounts = (1 / float(torch.tensor(place + 1.0).log2()) for place in inside)
                    total[f"{column}/{name}ndcg@{k}"] += sum(discounts) * chance
    return {name: value / users[f"{name.rpartition('/')[0]}/users"] for name, value in total.items()} | dict(users)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_both_columns_and_every_slice_equal_a_loop_over_users(data, stage):
    found, _ = evaluated(Popularity, data, stage, cold_user=6)
    expected = by_loop(data, stage, data.catalog.train_counts)
    assert len(expected) > 150
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    judged = {name for name in found if "@" in name and name.partition("@")[0].rpartition("/")[2] in
              ("recall", "ndcg", "mrr", "hit_rate", "map")}  # fmt: skip
    assert judged == {name for name in expected if "@" in name}


def test_a_model_that_scores_all_items_alike_is_worth_chance(data):
    found, _ = evaluated(OneForAll, data)
    num_items = data.catalog.num_items
    for k in KS:
        assert found[f"test/recall@{k}"] == pytest.approx(k / num_items)
    expected = by_loop(data, "test", [0] * (num_items + 1))
    assert found["test-unseen/ndcg@5"] == pytest.approx(expected["test-unseen/ndcg@5"], abs=1e-6)


def test_lists_are_judged_too_and_never_repeat_an_item(data):
    found, _ = evaluated(Popularity, data)
    for k in KS:
        assert found[f"test/duplicates@{k}"] == 0
        assert found[f"test/coverage@{k}"] == pytest.approx(k / data.catalog.num_items)  # one list for all
        assert found[f"test-unseen/coverage@{k}"] > found[f"test/coverage@{k}"]


def test_users_judged_and_left_out_are_all_users(data):
    run = trainer(limit_test_batches=2)
    found = run.test(RecommenderModule(Popularity), data, verbose=False)[0]
    assert (found["test/users"], found["test/users_left_out"]) == (14, 76)


def test_the_table_of_ranks_says_where_each_answer_stood(data):
    found, module = evaluated(Popularity, data)
    table = module.rank_table
    assert table.user.tolist() == list(range(90))
    counts, interactions = data.catalog.train_counts, data.data.interactions
    for user, item, first, tied, *_ in zip(*table, strict=True):
        assert item == interactions.items[interactions.offsets[user + 1] - 1]
        better = int((counts[1:] > counts[item]).sum())
        equal = int((counts[1:] == counts[item]).sum())
        assert (first, tied) == ((better + 1, equal) if better < max(KS) else (0, 0))
    chances = [(min(f + t - 1, 5) - f + 1) / t for f, t in zip(table.first, table.tied, strict=True) if 0 < f <= 5]
    assert sum(chances) / 90 == pytest.approx(found["test/recall@5"], abs=1e-6)


def test_fit_validates_by_the_ranking_metrics_alone_and_validate_by_all(data):
    run = trainer(max_epochs=1)
    module = RecommenderModule(Popularity, evaluation=EvaluationSettings(ks=KS))
    run.fit(module, data)
    short = {name for name in run.callback_metrics if name.startswith("val/") and "@" in name}
    assert short == {f"val/{kind}@{k}" for kind in ("recall", "ndcg", "mrr", "hit_rate", "map") for k in KS}
    found = run.validate(module, data, verbose=False)[0]
    assert short < set(found)
    assert {"val/tail/recall@5", "val/gini@10", "val/cold-user/users"} <= set(found)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"popularity_cuts": (0.4, 0.5)}, "test/tail/users"),
        ({"popularity_cuts": (0.2, 0.9)}, "test/mid/users"),
        ({"cold_user": 5}, "test/cold-user/users"),
    ],
    ids=lambda value: str(value),
)
def test_settings_of_slices_change_them(data, settings, changed):
    plain, other = evaluated(Popularity, data)[0], evaluated(Popularity, data, **settings)[0]
    assert plain[changed] != other[changed]


def test_metrics_and_cut_offs_are_the_users_choice(data):
    found, _ = evaluated(Popularity, data, ks=(3,), metrics=("recall",))
    assert {name for name in found if name.startswith("test/") and "@" in name and name.count("/") == 1} == {
        f"test/{name}@3" for name in ("recall", "coverage", "gini", "novelty", "duplicates")
    }


def test_users_without_an_answer_are_left_out_and_counted_and_an_unknown_answer_is_named(data, batch_of):
    data.prepare_data()
    data.setup()
    evaluator = Evaluator(EvaluationSettings(ks=(1, 500)), data.catalog, data.data.interactions.lengths)
    batch = batch_of([1], [2], targets=[3, 0])
    lists = Recommendations(torch.tensor([[3, 9], [9, 6]]), torch.tensor([[3.0, 2], [3, 2]]))
    evaluator.update(batch, lists)
    found = evaluator.compute()
    assert (found["/users"], found["/users_without_answer"], found["/recall@1"]) == (1, 1, 1)
    assert found["/users_left_out"] == 89
    assert found["/recall@500"] == 1  # of 24 items: a cut-off beyond the catalogue takes all there is
    with pytest.raises(InputError, match="user 1 has item 99 as an answer, but the catalogue has 24 items"):
        evaluator.update(batch_of([1], [2], targets=[3, 99]), lists)


def test_the_normalizer_of_ndcg_matters_for_several_answers(data, batch_of):
    data.prepare_data()
    data.setup()
    batch = batch_of([1], [2])
    batch = type(batch)(batch.user, batch.history, torch.tensor([[3, 4, 5], [6, 7, 0]]), batch.seen)
    lists = Recommendations(torch.tensor([[3, 9, 8], [9, 6, 8]]), torch.tensor([[3.0, 2, 1], [3, 2, 1]]))
    found = {}
    for normalizer in ("ideal", "comirec"):
        settings = EvaluationSettings(ks=(3,), ndcg_normalizer=normalizer)
        evaluator = Evaluator(settings, data.catalog, data.data.interactions.lengths)
        evaluator.update(batch, lists)
        found[normalizer] = float(evaluator.compute()["/ndcg@3"])
    second, third = 1 / torch.tensor(3.0).log2(), 1 / torch.tensor(4.0).log2()
    assert found["ideal"] == pytest.approx(float(1 / (1 + second + third) + second / (1 + second)) / 2)
    assert found["comirec"] == pytest.approx(float(1 + second) / 2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ks": ()}, r"evaluation.ks=\[\]"),
        ({"ks": (0, 5)}, r"evaluation.ks=\[0, 5\]"),
        ({"ks": (5, 5)}, r"evaluation.ks=\[5, 5\]"),
        ({"metrics": ()}, r"evaluation.metrics=\[\]"),
        ({"cold_user": 0}, r"evaluation.cold_user=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        EvaluationSettings(**settings)


# ----------------------------------------------------------------------------------------------------------- the index

FAISS = {"backend": "faiss", "factory": "IVF4,Flat"}
sasrec = partial(SASRec, dim=8)


def test_an_approximate_index_comes_with_its_recall_and_an_exact_one_without(data):
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    exact, _ = evaluated(sasrec, data)
    assert "test/index-recall" not in exact
    recalls = {}
    for probes in (1, 4):
        torch.manual_seed(0)
        index = IndexSettings(**FAISS, parameters=f"nprobe={probes}")
        found, _ = evaluated(sasrec, data, index=index)
        recalls[probes] = found["test/index-recall"]
        if probes == 4:  # all cells: nothing is missed
            assert found["test/ndcg@10"] == pytest.approx(exact["test/ndcg@10"], abs=1e-6)
    assert 0 < recalls[1] < recalls[4] == 1


@pytest.mark.parametrize("settings", [{}, FAISS], ids=["torch", "faiss"])
def test_an_index_is_kept_and_refused_for_other_weights(data, tmp_path, settings):
    if settings:
        pytest.importorskip("faiss")
    index = IndexSettings(**settings, path=str(tmp_path / "index"))
    torch.manual_seed(0)
    first, module = evaluated(sasrec, data, index=index)
    assert (tmp_path / "index").exists()
    again = trainer().test(module, data, verbose=False)[0]
    assert again["test/ndcg@10"] == pytest.approx(first["test/ndcg@10"])
    torch.manual_seed(1)
    with pytest.raises(InputError, match=r"checkpoint.*(remove|name another)"):
        evaluated(sasrec, data, index=index)


def test_nan_in_a_models_vectors_is_named_and_not_ranked(data):
    class Broken(OneForAll):
        def encode_items(self, item_ids):
            return torch.ones(len(item_ids), 1).masked_fill(item_ids[:, None] == 7, torch.nan)

    with pytest.raises(InputError, match="item 7 holds NaN"):
        evaluated(Broken, data)


# --------------------------------------------------------------------------------------------------------- the run


def test_a_run_keeps_every_metric_and_the_rank_of_every_answer(tmp_path, monkeypatch):
    """Through the command: results.json and the two tables of ranks, by raw ids."""
    from recsys_lightning.cli import main

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    words = ["--model=RecommenderModule", "--model.model=SASRec", "--model.model.dim=8"]
    words += ["--data=SequenceDataModule", "--data.source=Synthetic", "--data.source.num_users=60"]
    words += [f"--data.cache_dir={tmp_path}", "--data.k_core=0", f"--run_dir={tmp_path}/run"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *words, "--trainer.max_epochs=1"]) == 0
    assert (tmp_path / "run/ranks-val.parquet").is_file()
    assert main(["test", *words]) == 0
    assert main(["validate", *words]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"test/recall@10", "test-unseen/tail/ndcg@5", "val/gini@10", "val/recall@10"} <= set(results["metrics"])
    assert set(results["evidence"]) == {"train_rows", "val_rows", "train_counts"}
    for stage in ("val", "test"):
        table = pl.read_parquet(tmp_path / f"run/ranks-{stage}.parquet")
        assert table.columns == ["user_id", "item_id", "first", "tied", "first_unseen", "tied_unseen"]
        assert len(table) == table["user_id"].n_unique() == 60
        untied = table.filter(first=1, tied=1)
        assert len(untied) / 60 <= results["metrics"][f"{stage}/recall@5"] + 1e-6
