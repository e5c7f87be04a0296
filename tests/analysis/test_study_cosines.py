"""Intra- and inter-ID cosines against every pair by hand, and the order and the places of the pictures."""

import math
from itertools import combinations
from types import SimpleNamespace

import polars as pl
import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.analysis.study_cosines import (
    by_semantic_id,
    cosine_gap,
    cosine_study,
    flat_map,
    item_views,
    prefix_labels,
)
from recsys_lightning.analysis.study_run import StudiedRun
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA, CobraDecoder, CobraSearch, CobraTokens
from recsys_lightning.semantic_ids.table import SemanticIds


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def pairs_by_hand(vectors: torch.Tensor, labels: list[int]) -> tuple[list[float], list[float]]:
    within, between = [], []
    for i, j in combinations(range(len(labels)), 2):
        cosine = float(F.cosine_similarity(vectors[i], vectors[j], dim=0))
        (within if labels[i] == labels[j] else between).append(cosine)
    return within, between


def test_means_are_over_every_pair():
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 5, generator=g, dtype=torch.float64) * torch.arange(1, 41)[:, None]
    labels = torch.randint(0, 6, (40,), generator=g)
    within, between = pairs_by_hand(vectors, labels.tolist())
    found = cosine_gap(vectors, labels)
    assert (found.groups, found.pairs_within) == (6, len(within))
    assert found.within == pytest.approx(sum(within) / len(within))
    assert found.between == pytest.approx(sum(between) / len(between))
    assert found.gap == pytest.approx(found.within - found.between)


def test_an_item_without_direction_is_at_a_right_angle_to_all():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = cosine_gap(vectors, torch.tensor([0, 0, 1]))
    assert found.within == pytest.approx(0.0)
    assert found.between == pytest.approx(math.sqrt(0.5) / 2)


def test_a_mean_over_no_pairs_is_no_number():
    vectors = torch.eye(3)
    alone, together = cosine_gap(vectors, torch.arange(3)), cosine_gap(vectors, torch.zeros(3, dtype=torch.long))
    assert math.isnan(alone.within)
    assert alone.between == pytest.approx(0.0)
    assert math.isnan(together.between)
    assert together.within == pytest.approx(0.0)


def test_prefixes_are_told_apart_by_all_their_codes():
    codes = torch.tensor([[0, 1, 2], [0, 1, 3], [1, 1, 2], [0, 1, 2]])
    same = {n: [[bool(x == y) for y in label] for x in label] for n in (1, 2, 3) for label in [prefix_labels(codes, n)]}
    assert same[1] == same[2]
    assert same[1][0] == [True, True, False, True]
    assert same[3][0] == [True, False, False, True]


def test_items_are_drawn_in_the_order_of_their_codes():
    codes = torch.randint(0, 3, (50, 2), generator=torch.Generator().manual_seed(0))
    everything = by_semantic_id(codes, 100, 0)
    assert sorted(everything.tolist()) == list(range(50))
    assert codes[everything].tolist() == sorted(codes.tolist())
    some = by_semantic_id(codes, 10, 0)
    assert len(set(some.tolist())) == 10
    assert codes[some].tolist() == sorted(codes[some].tolist())
    assert some.tolist() != by_semantic_id(codes, 10, 1).tolist()


def test_a_map_keeps_clusters_apart():
    centers = F.normalize(torch.eye(3, 8), dim=-1)
    noise = 0.05 * torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    vectors = F.normalize(centers.repeat_interleave(10, 0) + noise, dim=-1)
    places = flat_map(vectors, 0)
    assert torch.equal(places, flat_map(vectors, 0))
    middles = places.view(3, 10, 2).mean(1)
    nearest = torch.cdist(places, middles).argmin(1)
    assert nearest.tolist() == [group for group in range(3) for _ in range(10)]
    with pytest.raises(InputError, match="at least 4 items"):
        flat_map(vectors[:3], 0)


# -------------------------------------------------------------------------------------------------------------- runs


def studied(
    catalog: Catalog, semantic_ids: SemanticIds | None, name: str = "runs/a", paths: str = "both"
) -> StudiedRun:
    """An untrained COBRA; of its data only the catalogue is looked at."""
    torch.manual_seed(len(name))
    decoder, tokens = CobraDecoder(num_layers=1, num_heads=2), CobraTokens(paths=paths)
    model = COBRA(catalog, semantic_ids, 8, tokens=tokens, decoder=decoder, search=CobraSearch()).eval()
    return StudiedRun(name, model, SimpleNamespace(catalog=catalog), {}, "best.ckpt", torch.device("cpu"))


def moved(semantic_ids: SemanticIds) -> SemanticIds:
    codes = semantic_ids.codes.clone()
    codes[1:] = codes[1:].flip(0)
    return SemanticIds(codes=codes, num_codes=4, embeddings_fingerprint="f" * 64, tokenizer="moved")


def test_a_run_without_ids_takes_those_of_the_first_run_that_has(catalog, semantic_ids):
    runs = [
        studied(catalog, None, "runs/dense", "dense"),
        studied(catalog, semantic_ids, "runs/one"),
        studied(catalog, moved(semantic_ids), "runs/two"),
    ]
    views = item_views(runs, None, silent)
    assert [view.codes_of for view in views] == ["runs/one", "runs/one", "runs/two"]
    assert torch.equal(views[0].codes, semantic_ids.codes[1:])
    assert torch.equal(views[2].codes, moved(semantic_ids).codes[1:])
    for view, run in zip(views, runs, strict=True):
        torch.testing.assert_close(view.vectors, F.normalize(run.model.item_table()[1:], dim=-1))


def test_a_named_file_wins_over_the_runs_own_ids(catalog, semantic_ids, tmp_path):
    path = tmp_path / "ids.safetensors"
    moved(semantic_ids).save(path)
    views = item_views([studied(catalog, semantic_ids), studied(catalog, None, "runs/b", "dense")], path, silent)
    assert all(torch.equal(view.codes, moved(semantic_ids).codes[1:]) for view in views)
    other = SemanticIds(
        codes=semantic_ids.codes[:-1], num_codes=4, embeddings_fingerprint="f" * 64, tokenizer="of fewer items"
    )
    other.save(path)
    with pytest.raises(InputError, match="36 items but the catalogue has 37"):
        item_views([studied(catalog, semantic_ids)], path, silent)


def test_runs_that_cannot_be_set_side_by_side_are_refused(catalog, semantic_ids):
    with pytest.raises(InputError, match="no semantic IDs: name their file"):
        item_views([studied(catalog, None, "runs/dense", "dense")], None, silent)
    with pytest.raises(InputError, match="no dense vectors"):
        item_views([studied(catalog, semantic_ids, "runs/sparse", "sparse")], None, silent)
    fields = catalog.fields.with_columns(item_id=pl.col("item_id") + "x")
    other = Catalog(fields, catalog.train_counts, catalog.text)
    with pytest.raises(InputError, match="on different items"):
        item_views([studied(catalog, semantic_ids), studied(other, semantic_ids, "runs/b")], None, silent)


def test_the_study_has_a_row_a_run_and_prefix(catalog, semantic_ids):
    runs = [studied(catalog, semantic_ids, "runs/with"), studied(catalog, None, "runs/without", "dense")]
    found = cosine_study(runs, None, 0, silent)
    body = found.tables[0].body
    assert [(row[0], row[2]) for row in body] == [
        (run, part) for run in ("runs/with", "runs/without") for part in ("first 1", "first 2", "whole ID")
    ]
    table = pl.read_csv(found.files[".csv"])
    cell = semantic_ids.codes[1:].unique(dim=0, return_inverse=True)[1]
    within, between = pairs_by_hand(runs[1].model.item_table()[1:], cell.tolist())
    last = table.row(5, named=True)
    assert (last["prefix"], last["pairs_within"]) == (3, len(within))
    assert last["within"] == pytest.approx(sum(within) / len(within), abs=1e-5)
    assert last["gap"] == pytest.approx(sum(within) / len(within) - sum(between) / len(between), abs=1e-5)
    assert all(picture.startswith(b"\x89PNG") for picture in found.pictures.values())
    assert list(found.pictures) == ["-heat.png", "-tsne.png"]
