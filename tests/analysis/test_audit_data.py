"""The audit's checks of data: each passes on what the project builds, and fails on a leak that is planted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_lightning.analysis.audit_data import (
    TrainingPairs,
    TrainingRows,
    check_evaluation,
    check_item_statistics,
    check_scrambling,
    check_train_batches,
    compared,
    scrambled,
)
from recsys_lightning.analysis.audit_split import BOUNDS, Recount, check_split, recount
from recsys_lightning.data.datamodules import ItemDataModule, SequenceDataModule
from recsys_lightning.data.encoders import TfidfSVD
from recsys_lightning.data.interactions import Interactions
from recsys_lightning.data.sequences import SequenceBatch, SequenceDataset
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.data.splits import LeaveOneOut, UserSplit, training_part

# -------------------------------------------------------------------------------------------------------- scrambling


def test_scrambling_puts_another_item_at_each_position_and_nowhere_else(small):
    positions, items = np.array([0, 4, 8, 13]), small.items.tolist()
    seen: list[set[int]] = [set() for _ in positions]
    for seed in range(200):
        changed = scrambled(small, positions, seed)
        assert np.flatnonzero(changed.items != small.items).tolist() == positions.tolist()
        assert np.array_equal(changed.timestamps, small.timestamps)
        assert np.array_equal(changed.offsets, small.offsets)
        for found, position in zip(seen, positions, strict=True):
            found.add(int(changed.items[position]))
    assert [len(found) for found in seen] == [7, 7, 7, 7], "every other item may come"
    assert np.array_equal(scrambled(small, positions, 3).items, scrambled(small, positions, 3).items)
    assert small.items.tolist() == items


# ----------------------------------------------------------------------------------------------------------- worlds


class Worlds:
    """A data module with its recount, and the same with other held-out items."""

    def __init__(self, folder: Path, kind: type = SequenceDataModule, **settings):
        source = Synthetic(num_users=60, num_themes=2, topics_per_theme=2, items_per_topic=5, min_length=1)
        self.data = kind(source, cache_dir=str(folder), k_core=0, batch_size=16, eval_batch_size=16, **settings)
        self.data.prepare_data()
        self.data.setup()
        self.interactions = self.data.data.interactions
        self.counted = recount(self.interactions, self.data.splitter, self.data.split.cold)
        self.both, self.test, self.untrained = (
            self.data.with_interactions(scrambled(self.interactions, positions, seed))
            for seed, positions in enumerate(
                [
                    self.counted.answers("val", "test"),
                    self.counted.answers("test"),
                    self.counted.untrained(self.interactions),
                ]
            )
        )
        self.pairs = TrainingPairs.of(self.interactions, self.counted)

    def rows(self) -> dict[str, SequenceDataset]:
        return {stage: self.data.dataset(stage) for stage in ("train", "val", "test")}

    def split(self, **changed):
        return check_split(self.interactions, self.counted, self.data.split, self.rows() | changed)

    def train_batches(self):
        return check_train_batches(self.data.train_dataloader(), self.untrained.train_dataloader(), self.pairs)

    def evaluation(self):
        worlds = (self.data, self.both, self.test)
        return check_evaluation(*({"val": w.val_dataloader(), "test": w.test_dataloader()} for w in worlds))

    def scrambling(self):
        return check_scrambling(*([*w.val_dataloader(), *w.test_dataloader()] for w in (self.data, self.both)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def worlds(cache) -> Worlds:
    return Worlds(cache)


def leaky(change) -> type:
    """A data module whose data sets give changed batches: ``change(stage, dataset, batch, rows) -> batch``."""

    class Leaky(SequenceDataset):
        def __getitem__(self, rows):
            return change(self.stage, self, super().__getitem__(rows), np.asarray(rows))

    class LeakyModule(SequenceDataModule):
        def dataset(self, stage):
            found = Leaky(self.data.interactions, self.split, stage, self.max_history, self.windows)
            found.stage, found.end = stage, self.data.interactions.offsets[1:]
            return found

    return LeakyModule


COLD = {"cold_items": 0.2}  # 4 of 20
USERS = UserSplit(val_users=0.2, test_users=0.3, history=0.7, seed=2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"windows": "all", "max_history": 3},
        {"max_history": 2},
        COLD,
        {"cold_items": 0.6, "windows": "all", "max_history": 3},
    ],
)
@pytest.mark.parametrize("splitter", [LeaveOneOut(), USERS])
def test_what_the_project_builds_passes_every_check(cache, settings, splitter):
    worlds = Worlds(cache, split=splitter, **settings)
    checks = [worlds.split(), worlds.train_batches(), worlds.evaluation(), worlds.scrambling()]
    counts = (worlds.data.catalog.train_counts, worlds.untrained.catalog.train_counts)
    checks.append(check_item_statistics(worlds.interactions, worlds.counted, *counts))
    assert [check.status for check in checks] == ["pass"] * 5, checks
    users, several = worlds.interactions.num_users, int((worlds.interactions.lengths >= 2).sum())
    by_user = round(0.2 * several) + round(0.3 * several)
    evaluated = by_user if splitter is USERS else int((worlds.interactions.lengths >= 3).sum())
    assert evaluated < users, "some users are too short"
    assert dict(checks[0].figures) | {"repeats": 0, "ties": 0} == {
        "users": users,
        "evaluated": evaluated,
        "excluded": users - evaluated,
        "repeats": 0,
        "ties": 0,
    }
    assert checks[1].figures["rows"] == len(worlds.data.dataset("train"))
    assert checks[3].figures == {"answers": sum(worlds.data.split.sizes), "unchanged": 0}


def item_batches(worlds, cold):
    known = TrainingRows.of(worlds.data.catalog.text_embeddings(), cold)
    return check_train_batches(worlds.data.train_dataloader(), worlds.both.train_dataloader(), known)


@pytest.mark.parametrize(("settings", "rows"), [({}, 20), (COLD, 16)])
def test_item_data_passes_too(cache, settings, rows):
    worlds = Worlds(cache / "items", Items, encoder=TfidfSVD(dim=4), **settings)
    check = item_batches(worlds, worlds.data.split.cold)
    assert (check.status, check.figures) == ("pass", {"batches": -(-rows // 16), "rows": rows})
    assert worlds.evaluation().status == "pass"
    assert check_split(worlds.interactions, worlds.counted, worlds.data.split, {}).status == "pass"


class Items(ItemDataModule):
    """Has one batch size for all."""

    def __init__(self, source, eval_batch_size, **settings):
        super().__init__(source, **settings)


# ------------------------------------------------------------------------------------------------------------ split


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("step", [-1, 1])
@pytest.mark.parametrize("splitter", [LeaveOneOut(), USERS])
def test_a_split_that_is_off_by_one_is_found(cache, name, step, splitter):
    worlds = Worlds(cache, split=splitter)
    bound = getattr(worlds.data.split, name).copy()
    bound[worlds.counted.users("val")[3]] += step
    split = replace(worlds.data.split, **{name: bound})
    check = check_split(worlds.interactions, worlds.counted, split, {})
    assert (check.status, check.detail) == ("FAIL", f"{name} of 1 users is not where a recount puts it")


def test_a_data_module_that_holds_out_one_item_less_is_found(cache):
    class OffByOne(SequenceDataModule):
        def setup(self, stage=None):
            super().setup(stage)
            split, held_out = self._split, self._split.test_stop - self._split.test_start
            bounds = dict.fromkeys(("train_stop", "val_start"), split.train_stop + held_out)
            self._split = replace(split, **bounds, val_stop=split.test_stop, test_start=split.test_stop)

    check = Worlds(cache, OffByOne).split()
    assert check.status == "FAIL"
    assert "train_stop of" in check.detail
    assert "train rows reach a held-out position" in check.detail


@pytest.mark.parametrize("windows", ["last", "all"])
def test_a_training_window_that_reaches_the_validation_item_is_found(worlds, windows):
    rows = SequenceDataset(worlds.interactions, worlds.data.split, "train", 4, windows)
    rows.answer_stop = rows.answer_stop.copy()
    rows.answer_stop[np.flatnonzero(np.isin(rows.user, worlds.counted.users("test")))[-1]] += 3
    check = worlds.split(train=rows)
    assert (check.status, check.detail) == ("FAIL", "1 train rows reach a held-out position")


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize(
    ("field", "step", "told"),
    [
        ("stop", 1, "3 {} histories end beyond, or before, the answer"),
        ("stop", -1, "3 {} histories end beyond, or before, the answer"),
        ("answer_stop", 1, "3 {} answers are not the held-out ones"),
        ("start", -9, "{} rows reach into another user"),
        ("first", -1, "{} rows reach into another user"),
    ],
)
def test_an_evaluation_row_with_other_bounds_is_found(worlds, stage, field, step, told):
    rows = worlds.data.dataset(stage)
    bounds = getattr(rows, field).copy()
    bounds[[4, 7, 9]] += step
    setattr(rows, field, bounds)
    check = worlds.split(**{stage: rows})
    assert check.status == "FAIL"
    assert told.format(stage) in check.detail


def test_evaluation_of_other_users_is_found(worlds):
    rows = worlds.data.dataset("test")
    rows.user = np.where(rows.user == rows.user[0], rows.user[1], rows.user)
    check = worlds.split(test=rows)
    assert (check.status, check.detail) == (
        "FAIL",
        "the test rows are not one of each user with a test answer",
    )


def test_held_out_answers_in_disorder_fail(worlds):
    counted: Recount = worlds.counted._replace(disorder=2)
    check = check_split(worlds.interactions, counted, worlds.data.split, worlds.rows())
    assert (check.status, check.detail) == ("FAIL", "2 users have a held-out answer older than what precedes it")


# ---------------------------------------------------------------------------------------------------------- control


def test_the_control_finds_data_that_no_scrambling_reaches(cache):
    class Deaf(SequenceDataModule):
        def with_interactions(self, interactions):
            return self

    worlds = Worlds(cache, Deaf)
    check = worlds.scrambling()
    assert check.status == "FAIL"
    assert check.figures["unchanged"] == check.figures["answers"] == 2 * worlds.counted.num_evaluated
    assert worlds.evaluation().status == "pass", "which is why there is a control"


def test_the_control_finds_answers_that_are_not_the_held_out_items(cache):
    def previous_item(stage, dataset, batch, rows):
        if stage != "test":
            return batch
        return replace(batch, target=torch.from_numpy(dataset.items[dataset.first[rows]])[:, None])

    check = Worlds(cache, leaky(previous_item)).scrambling()
    assert check.status == "FAIL"
    assert check.figures["unchanged"] == check.figures["answers"] // 2


# ------------------------------------------------------------------------------------------------- training batches


def held_out_as_seen(stage, dataset, batch, rows):
    if stage != "train":
        return batch
    return replace(batch, seen=torch.from_numpy(dataset.items[dataset.end[dataset.user[rows]] - 1])[:, None])


def test_held_out_items_among_the_seen_of_training_rows_are_found(cache):
    check = Worlds(cache, leaky(held_out_as_seen)).train_batches()
    assert check.status == "FAIL"
    assert "with other held-out items, seen differs in" in check.detail
    assert "that are in no training part of their user" in check.detail


def test_held_out_items_that_no_scrambling_reaches_are_found_by_the_recount(cache):
    originals = []

    def from_elsewhere(stage, dataset, batch, rows):
        originals.append(dataset.items)  # the first are of the data as they are
        return replace(batch, seen=torch.from_numpy(originals[0][dataset.end[dataset.user[rows]] - 1])[:, None])

    check = Worlds(cache, leaky(from_elsewhere)).train_batches()
    assert check.status == "FAIL"
    assert "differs" not in check.detail
    assert "that are in no training part of their user" in check.detail


@pytest.mark.parametrize("field", ["user", "history", "target"])
def test_any_field_of_a_training_batch_that_depends_on_held_out_items_is_found(cache, field):
    def last_bit(stage, dataset, batch, rows):
        odd = torch.from_numpy(dataset.items[dataset.end[dataset.user[rows]] - 1] % 2)
        value = getattr(batch, field)
        return replace(batch, **{field: value + (odd if value.ndim == 1 else odd[:, None])})

    check = Worlds(cache, leaky(last_bit)).train_batches()
    assert check.status == "FAIL"
    assert f"{field} differs in" in check.detail


def test_batches_are_compared_by_number_shape_and_value():
    batches = [torch.zeros(2, 3), torch.ones(2, 3)]
    assert compared(batches, [b.clone() for b in batches]).differences() == []
    assert compared(batches, batches[:1]).differences() == ["1 batches more or fewer"]
    assert compared(batches, [torch.zeros(2, 3), torch.ones(2, 4)]).differences() == ["rows differs in 1 of 2 batches"]
    assert compared(batches, batches[::-1]).differences() == ["rows differs in 2 of 2 batches"]


def test_strays_are_counted_by_user():
    interactions = Interactions(np.array([0, 4, 8]), np.array([1, 2, 3, 4, 5, 6, 7, 8]), np.arange(8), 8)
    pairs = TrainingPairs.of(interactions, recount(interactions))
    batch = SequenceBatch(
        user=torch.tensor([0, 1]),
        history=torch.tensor([[1, 2], [5, 0]]),
        target=torch.tensor([[2], [6]]),
        seen=torch.tensor([[3, 4, 5], [1, 8, 0]]),  # two held out, one of the other user; two strays more
    )
    assert pairs.strays(batch) == 5


# -------------------------------------------------------------------------------------- held-out users, cold items


class TrainsOnHeldOutUsers(SequenceDataModule):
    """Takes a user split, and trains on the histories of the users that it holds out."""

    def setup(self, stage=None):
        super().setup(stage)
        is_held_out = self._split.val_start < self._prepared().interactions.offsets[1:]
        self._split = replace(
            self._split, train_stop=np.where(is_held_out, self._split.val_start, self._split.train_stop)
        )
        counts = training_part(self._prepared().interactions, self._split).counts(self._catalog.num_items)
        self._catalog = replace(self._catalog, train_counts=counts)


def test_training_on_the_history_of_a_held_out_user_is_found(cache):
    worlds = Worlds(cache, TrainsOnHeldOutUsers, split=USERS)
    check = worlds.split()
    assert check.status == "FAIL"
    assert f"train_stop of {worlds.counted.num_evaluated} users is not where" in check.detail
    assert "train rows reach a held-out position" in check.detail
    check = worlds.train_batches()
    assert check.status == "FAIL"
    assert "history differs in" in check.detail
    assert "that are in no training part of their user" in check.detail
    counts = (worlds.data.catalog.train_counts, worlds.untrained.catalog.train_counts)
    check = check_item_statistics(worlds.interactions, worlds.counted, *counts)
    assert check.status == "FAIL"
    assert "change with the held-out items" in check.detail


class TrainsOnCold(SequenceDataModule):
    """Forgets, where it makes training rows, that items are held out."""

    def dataset(self, stage):
        return SequenceDataset(
            self.data.interactions, LeaveOneOut()(self.data.interactions), stage, self.max_history, self.windows
        )


def test_a_cold_item_in_a_training_batch_is_found(cache):
    worlds = Worlds(cache, TrainsOnCold, **COLD)
    dataset = worlds.data.dataset("train")
    batch = dataset[np.arange(len(dataset))]
    leaked = int(np.isin(batch.sequence.numpy(), worlds.data.split.cold).sum())
    check = worlds.train_batches()
    assert leaked > 0
    assert (check.status, check.detail) == (
        "FAIL",
        f"they hold {leaked} items that are in no training part of their user",
    )
    assert worlds.split().status == "FAIL", "rows that did not close up reach further than they may"


def test_counts_of_cold_items_are_found(cache):
    worlds = Worlds(cache, **COLD)
    assert len(worlds.counted.cold) == 4
    counts = worlds.data.catalog.train_counts
    assert check_item_statistics(worlds.interactions, worlds.counted, counts, counts).status == "pass"
    told = counts.copy()
    told[worlds.counted.cold[0]] = 1
    check = check_item_statistics(worlds.interactions, worlds.counted, told, told)
    assert check.status == "FAIL"
    assert check.detail.startswith("1 item counts are not those of training")


def test_a_tokenizer_that_learns_from_cold_items_is_found(cache):
    cold = Worlds(cache / "items", Items, encoder=TfidfSVD(dim=4), **COLD).data.split.cold
    plainly = Worlds(cache / "items", Items, encoder=TfidfSVD(dim=4))  # as if its settings held out nothing
    check = item_batches(plainly, cold)
    assert (check.status, check.detail) == (
        "FAIL",
        "they hold 4 embeddings that are of no item that may be learned from",
    )


def test_an_embedding_that_a_cold_item_shares_with_another_is_no_leak():
    embeddings = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    known = TrainingRows.of(embeddings, np.array([2, 3]))
    assert known.strays(embeddings[[1, 2]]) == 0
    assert known.strays(embeddings[[0, 1, 3]]) == 2, "padding is no item, and item 3 is held out"


# -------------------------------------------------------------------------------------------------- item statistics


def test_counts_over_all_interactions_are_found(cache):
    class CountsAll(SequenceDataModule):
        def setup(self, stage=None):
            super().setup(stage)
            items = self._prepared().interactions
            counts = np.bincount(items.items, minlength=items.num_items + 1)
            self._catalog = replace(self._catalog, train_counts=counts.astype(np.int64))

    worlds = Worlds(cache, CountsAll)
    counts = (worlds.data.catalog.train_counts, worlds.both.catalog.train_counts)
    check = check_item_statistics(worlds.interactions, worlds.counted, *counts)
    assert check.status == "FAIL"
    assert f"they sum to {len(worlds.interactions):,}" in check.detail
    assert "change with the held-out items" in check.detail


def test_counts_that_change_with_held_out_items_are_found_also_where_they_look_right(worlds):
    counts = worlds.data.catalog.train_counts
    changed = counts.copy()
    changed[3] += 1
    check = check_item_statistics(worlds.interactions, worlds.counted, counts, changed)
    assert (check.status, check.detail) == ("FAIL", "1 item counts change with the held-out items")


def test_the_count_of_training_interactions_is_that_of_a_hand_count(small):
    split = LeaveOneOut()(small)
    counts = np.zeros(9, dtype=np.int64)
    for begin, stop in zip(small.offsets[:-1], split.train_stop, strict=True):
        for item in small.items[begin:stop]:
            counts[item] += 1
    check = check_item_statistics(small, recount(small), counts, counts)
    assert (check.status, check.figures) == ("pass", {"training_interactions": 8})


# ------------------------------------------------------------------------------------------------------- evaluation


def told(wanted: str, field: str, *, own: bool):
    """Puts the test item, or a row's own answer, into the inputs of one stage."""

    def change(stage, dataset, batch, rows):
        if stage != wanted:
            return batch
        position = dataset.stop[rows] if own else dataset.end[dataset.user[rows]] - 1
        item = torch.from_numpy(dataset.items[position])[:, None]
        return replace(batch, **{field: torch.cat([getattr(batch, field), item], 1)})

    return change


@pytest.mark.parametrize("field", ["history", "seen"])
@pytest.mark.parametrize(
    ("stage", "own", "detail"),
    [
        ("val", False, "validation batches, with other test items: {} differs"),
        ("val", True, "validation inputs, with other answers: {} differs"),
        ("test", True, "test inputs, with other answers: {} differs"),
    ],
)
def test_an_evaluation_that_is_told_an_answer_is_found(cache, stage, field, own, detail):
    worlds = Worlds(cache, leaky(told(stage, field, own=own)))
    check = worlds.evaluation()
    assert check.status == "FAIL"
    assert detail.format(field) in check.detail
    assert worlds.train_batches().status == "pass"


def test_validation_on_test_answers_is_found(cache):
    def test_answers(stage, dataset, batch, rows):
        if stage != "val":
            return batch
        return replace(batch, target=torch.from_numpy(dataset.items[dataset.stop[rows] + 1])[:, None])

    check = Worlds(cache, leaky(test_answers)).evaluation()
    assert check.status == "FAIL"
    assert "validation batches, with other test items: target differs" in check.detail
