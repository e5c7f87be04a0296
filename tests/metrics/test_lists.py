"""List metrics against loops and known answers."""

import itertools
import math

import numpy as np
import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.metrics.lists import (
    DistinctCodesAtK,
    DuplicatesAtK,
    ExposureAtK,
    IntraListDistanceAtK,
    NoveltyAtK,
    list_metrics,
)

NUM_ITEMS = 15
KS = (6, 1, 3, 20)


@pytest.fixture
def tables() -> dict[str, torch.Tensor]:
    """Training counts with items never met, vectors with one of zeros, level-1 codes."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (NUM_ITEMS + 1,), generator=rng)
    vectors = torch.randn(NUM_ITEMS + 1, 5, generator=rng)
    vectors[4] = 0
    counts[0] = 99  # index 0 is not read
    return {"counts": counts, "vectors": vectors, "codes": torch.randint(0, 4, (NUM_ITEMS + 1,), generator=rng)}


@pytest.fixture
def lists() -> torch.Tensor:
    """40 lists of 8 places: some repeat items, some end early, some are empty."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(1, NUM_ITEMS + 1, (40, 8), generator=rng)
    lengths = torch.randint(0, 9, (40, 1), generator=rng)
    return ids * (torch.arange(8) < lengths)


def by_looping(lists: list[list[int]], tables: dict[str, torch.Tensor], k: int) -> dict[str, float]:
    """The definitions, one list at a time."""
    cut = [[item for item in row[:k] if item] for row in lists]
    exposure = [sum(row.count(item) for row in cut) for item in range(1, NUM_ITEMS + 1)]
    differences = sum(abs(a - b) for a in exposure for b in exposure)
    total = tables["counts"][1:].sum().item()
    share = [max(count, 0.5) / total for count in tables["counts"].tolist()]
    unit = [v / (np.linalg.norm(v) or 1) for v in tables["vectors"].double().numpy()]
    pairs = [[1 - unit[a] @ unit[b] for a, b in itertools.combinations(row, 2)] for row in cut]
    started = [row for row in cut if row]
    return {
        f"coverage@{k}": np.mean([count > 0 for count in exposure]),
        f"gini@{k}": differences / (2 * NUM_ITEMS * sum(exposure)),
        f"novelty@{k}": np.mean([-math.log2(share[item]) for row in cut for item in row]),
        f"duplicates@{k}": np.mean([len(row) - len(set(row)) for row in started]),
        f"distinct-codes@{k}": np.mean([len({tables["codes"][item].item() for item in row}) for row in started]),
        **({f"intra-list-distance@{k}": np.mean([np.mean(row) for row in pairs if row])} if any(pairs) else {}),
    }


@pytest.mark.parametrize("size", [1, 7, 40])
def test_all_metrics_equal_loops_for_every_size_of_batch(lists, tables, size):
    metrics = list_metrics(KS, NUM_ITEMS, tables["counts"], tables["vectors"], tables["codes"])
    for batch in lists.split(size):
        metrics.update(batch)
    values = {name: value.item() for name, value in metrics.compute().items()}
    expected = {}
    for k in KS:
        expected |= by_looping(lists.tolist(), tables, k)
    assert values == pytest.approx(expected, abs=1e-6)
    assert "intra-list-distance@1" not in values  # one item makes no pair
    assert values["duplicates@6"] > 0


def test_metrics_whose_tables_are_not_given_are_left_out(lists, tables):
    metrics = list_metrics((5,), NUM_ITEMS, tables["counts"]).clone(prefix="test/")
    metrics.update(lists)
    assert metrics.compute().keys() == {"test/coverage@5", "test/gini@5", "test/novelty@5", "test/duplicates@5"}


def test_two_halves_merge_to_the_whole(lists, tables):
    make = lambda: list_metrics(KS, NUM_ITEMS, tables["counts"], tables["vectors"], tables["codes"])  # noqa: E731
    whole, first, second = make(), make(), make()
    whole.update(lists)
    first.update(lists[:13])
    second.update(lists[13:])
    for name in whole.keys(keep_base=True):
        first[name].merge_state(second[name])
    merged = {name: value.item() for name, value in first.compute().items()}
    assert merged == pytest.approx({name: value.item() for name, value in whole.compute().items()}, abs=1e-9)


def test_gini_is_0_for_even_exposure_and_nearly_1_for_one_item():
    even = ExposureAtK((2,), 6)
    even.update(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    assert even.compute()["gini@2"].item() == pytest.approx(0, abs=1e-12)
    assert even.compute()["coverage@2"] == 1
    one = ExposureAtK((1,), 100)
    one.update(torch.tensor([[7]] * 9))
    assert one.compute()["gini@1"].item() == pytest.approx(0.99, abs=1e-12)
    assert one.compute()["coverage@1"].item() == pytest.approx(0.01, abs=1e-12)


def test_novelty_is_in_bits_and_an_item_never_met_is_half_an_interaction():
    metric = NoveltyAtK((1, 2), torch.tensor([0, 4, 4, 0]))
    metric.update(torch.tensor([[1, 3]]))
    values = metric.compute()
    assert values["novelty@1"].item() == 1
    assert values["novelty@2"].item() == (1 + 4) / 2
    with pytest.raises(InputError, match="no item was"):
        NoveltyAtK((1,), torch.tensor([5, 0, 0]))


def test_distance_is_one_minus_cosine_whatever_the_lengths_of_the_vectors():
    vectors = torch.tensor([[9.0, 9.0], [2.0, 0.0], [0.0, 3.0], [-5.0, 0.0], [0.1, 0.0]])
    metric = IntraListDistanceAtK((2, 3), vectors)
    metric.update(torch.tensor([[1, 4, 2], [1, 3, 0], [1, 0, 0]]))
    values = metric.compute()
    assert values["intra-list-distance@2"].item() == pytest.approx((0 + 2) / 2, abs=1e-6)
    assert values["intra-list-distance@3"].item() == pytest.approx((2 / 3 + 2) / 2, abs=1e-6)
    assert metric.vectors.data_ptr() == vectors.data_ptr()  # a catalogue's vectors are not copied


def test_vectors_that_are_not_finite_are_refused():
    vectors = torch.ones(6, 2)
    vectors[0] = torch.nan  # padding is not read
    assert IntraListDistanceAtK((2,), vectors)
    vectors[3, 1] = torch.nan
    with pytest.raises(InputError, match="1 items, first 3, are not finite"):
        IntraListDistanceAtK((2,), vectors)


def test_padding_shares_no_code_with_an_item_and_nothing_duplicates_it():
    lists = torch.tensor([[0, 2, 1, 0], [0, 0, 0, 0]])
    codes = DistinctCodesAtK((4,), torch.tensor([0, 0, 1]))
    codes.update(lists)
    assert codes.compute()["distinct-codes@4"] == 2
    duplicates = DuplicatesAtK((4,))
    duplicates.update(lists)
    assert duplicates.compute()["duplicates@4"] == 0


def test_without_any_list_nothing_is_reported(tables):
    metrics = list_metrics((5,), NUM_ITEMS, tables["counts"], tables["vectors"], tables["codes"])
    metrics.update(torch.zeros(3, 8, dtype=torch.long))
    assert metrics.compute() == {}


def test_tables_and_sums_keep_their_type_when_the_model_moves_to_bfloat16(lists, tables):
    arguments = (KS, NUM_ITEMS, tables["counts"], tables["vectors"], tables["codes"])
    plain, moved = list_metrics(*arguments), list_metrics(*arguments).to(torch.bfloat16)
    plain.update(lists)
    moved.update(lists)
    assert plain.compute() == moved.compute()


def test_wrong_shapes_and_ks_are_refused(tables):
    with pytest.raises(ValueError, match=f"train_counts has {NUM_ITEMS + 1} rows for 9 items"):
        list_metrics((5,), 9, tables["counts"])
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        DuplicatesAtK((5,)).update(torch.ones(4, dtype=torch.long))
    with pytest.raises(InputError, match="different ks"):
        DuplicatesAtK((5, 5))
