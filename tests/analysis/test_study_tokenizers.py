"""`recsys study tokenizers`: each figure is that of its tokenizer's own table, and the correlation is Spearman's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from recsys_lightning.analysis.study_tokenizers import FIGURES, Bench, correlations, measure
from recsys_lightning.analysis.study_tokenizers_report import tokenizer_study
from recsys_lightning.data.interactions import Interactions
from recsys_lightning.data.splits import LeaveOneOut
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds

SEQUENCES = [[1, 2, 3, 4, 9, 10], [5, 6, 7, 8, 11, 12], [1, 2, 5, 6, 3, 4]]  # the last two are held out


def quiet(what, done, total):
    pass


@pytest.fixture
def data(catalog):
    items = np.concatenate(SEQUENCES)
    offsets = np.cumsum([0, *map(len, SEQUENCES)])
    interactions = Interactions(
        items=items, timestamps=np.arange(len(items)), offsets=offsets, num_items=catalog.num_items
    )
    split = LeaveOneOut()(interactions)
    return SimpleNamespace(catalog=catalog, data=SimpleNamespace(interactions=interactions), split=split)


@pytest.fixture
def make_run(tmp_path, data):
    """A tested recommender on a table that is written now, with a tokenizer's results beside it."""

    def make(name, codes, recall, seed=1, num_codes=4, **results):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        table = SemanticIds(
            codes=torch.cat([torch.zeros(1, codes.shape[1], dtype=torch.int64), codes]),
            num_codes=num_codes,
            embeddings_fingerprint="f" * 64,
            tokenizer=name,
        )
        table.save(folder / "semantic_ids.safetensors")
        known = {"metrics": {"val/reconstruction_error": 0.25}, "model": "RQVAE", "run": "", "seed": 1, "data": {}}
        known |= {"hardware": {}, "seconds_by_command": {"fit": 9.0}, "code": {}, "config": {}}
        (folder / "results.json").write_text(json.dumps(known | results))
        model = {"init_args": {"semantic_ids": str(folder / "semantic_ids.safetensors")}}
        own = {"metrics": {"test/recall@10": recall}, "config": {"model": {"init_args": {"model": model}}}}
        return SimpleNamespace(name=f"{name}-seed{seed}", data=data, results=own)

    return make


def drawn(seed, num_codes=4, levels=2):
    return torch.randint(num_codes, (37, levels), generator=torch.Generator().manual_seed(seed))


BENCH = Bench(metrics=("recall@10",), field="brand", level=1)


def test_each_row_is_of_its_own_table(make_run):
    codes = drawn(0)
    cost = {"policy": "reassign"}
    run = make_run("a", codes, 0.1, cpu_seconds_by_command={"fit": 7.5}, semantic_ids={"collisions": cost})
    (row,) = measure([run], BENCH, quiet)
    assert (row.name, row.made_by, row.collisions, row.levels, row.num_codes) == ("a", "RQVAE", "reassign", 2, 4)
    assert (row.cpu_seconds, row.reconstruction_error) == (7.5, 0.25)
    tuples = [tuple(code) for code in codes.tolist()]
    assert row.unique == pytest.approx(sum(tuples.count(code) == 1 for code in tuples) / 37)
    shares = np.bincount(codes[:, 0], minlength=4) / 37
    assert row.perplexity_share[0] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()) / 4, rel=1e-5)


def test_next_item_agreement_counts_training_pairs_over_chance(make_run):
    first = torch.zeros(37, dtype=torch.int64)
    first[[4, 5, 6, 7]] = 1  # items 5 to 8
    (row,) = measure([make_run("a", first[:, None], 0.1)], BENCH, quiet)
    pairs = [(1, 2), (2, 3), (3, 4), (5, 6), (6, 7), (7, 8), (1, 2), (2, 5), (5, 6)]  # no pair of a held-out item
    share = sum((a in range(5, 9)) == (b in range(5, 9)) for a, b in pairs) / len(pairs)
    second = 6 / 12  # of the training interactions fall on items 5 to 8
    assert row.agreement == pytest.approx(share / (second**2 + (1 - second) ** 2))


def test_runs_on_one_table_are_seeds_of_one_row(make_run):
    codes = drawn(0)
    rows = measure(
        [make_run("a", codes, 0.1), make_run("a", codes, 0.3, seed=2), make_run("b", drawn(1), 0.2)], BENCH, quiet
    )
    assert [(row.name, row.scores["recall@10"].values) for row in rows] == [("a", (0.1, 0.3)), ("b", (0.2,))]


def test_the_correlation_is_that_of_the_ranks(make_run):
    recalls = [0.3, 0.1, 0.2, 0.5, 0.4]
    runs = [
        make_run(f"t{at}", drawn(at), recall, cpu_seconds_by_command={"fit": seconds})
        for at, (recall, seconds) in enumerate(zip(recalls, [5, 1, 3, 4, 100], strict=True))
    ]
    found = {one.figure: one for one in correlations(measure(runs, BENCH, quiet), "recall@10")}
    by_hand = np.corrcoef(rankdata(recalls), rankdata([5, 1, 3, 4, 100]))[0, 1]
    assert found["CPU seconds"].rho == pytest.approx(by_hand)
    assert found["CPU seconds"].tokenizers == 5
    assert found["reconstruction error"].rho is None, "the same of all"


def test_too_few_tokenizers_correlate_with_nothing(make_run):
    rows = measure([make_run(f"t{at}", drawn(at), 0.1 * at) for at in range(3)], BENCH, quiet)
    assert {one.rho for one in correlations(rows, "recall@10")} == {None}


def test_a_figure_that_is_not_known_leaves_its_row_out_and_says_so(make_run):
    runs = [make_run(f"t{at}", drawn(at), 0.1 * at, cpu_seconds_by_command={"fit": at}) for at in range(4)]
    runs.append(make_run("published", drawn(9), 0.7, metrics={}))
    found = tokenizer_study(runs, BENCH, quiet)
    assert "No CPU time is known of published" in " ".join(found.remarks)
    of = {line.split(",")[0]: line for line in found.files["-correlations.csv"].decode().splitlines()}
    assert of["CPU seconds"].endswith(",4")
    assert of["cells"].endswith(",5")


def test_the_report_has_the_best_first_and_a_picture(make_run):
    runs = [make_run(f"t{at}", drawn(at), 0.1 * at, num_codes=4 + at % 2) for at in range(5)]
    found = tokenizer_study(runs, BENCH, quiet)
    assert [row[0] for row in found.tables[0].body] == ["t4", "t3", "t2", "t1", "t0"]
    assert len(found.tables[0].head) == len(found.tables[0].body[0]) == 3 + 1 + len(FIGURES)
    assert found.pictures[".png"].startswith(b"\x89PNG")
    assert found.files[".csv"].decode().count("\n") == 6


def test_what_cannot_be_compared_is_refused(make_run, data, catalog):
    run = make_run("a", drawn(0), 0.1)
    with pytest.raises(InputError, match="has no test/ndcg@10"):
        measure([run], Bench(metrics=("ndcg@10",), field=None), quiet)
    run.results["config"]["model"]["init_args"]["model"]["init_args"] = {}
    with pytest.raises(InputError, match="reads no semantic IDs"):
        measure([run], BENCH, quiet)
