"""Batches of histories against a loop over users, and the promises of the sampler."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from recsys_lightning.data.interactions import Interactions
from recsys_lightning.data.sequences import BucketSampler, SequenceBatch, SequenceDataset
from recsys_lightning.data.splits import LeaveOneOut, Split, UserSplit
from recsys_lightning.data.users import UserFeatures
from recsys_lightning.errors import InputError

STAGES = ["train", "val", "test", "predict"]


def interactions_of(lengths: list[int]) -> Interactions:
    """Users of so many interactions; every interaction is with an item of its own, in no order of ids."""
    total = sum(lengths)
    items = np.random.default_rng(0).permutation(total) + 1
    return Interactions(np.cumsum([0, *lengths]), items, np.arange(total), total)


LENGTHS = [1, 2, 3, 4, 5, 9, 3, 12, 1, 30, 7]


def dataset_of(stage, max_history=4, windows="last", lengths=LENGTHS) -> SequenceDataset:
    interactions = interactions_of(lengths)
    return SequenceDataset(interactions, LeaveOneOut()(interactions), stage, max_history, windows)


def users_items() -> Iterator[tuple[int, list[int]]]:
    interactions = interactions_of(LENGTHS)
    for user in range(interactions.num_users):
        yield user, interactions.items[interactions.offsets[user] : interactions.offsets[user + 1]].tolist()


def rows_by_hand(stage, max_history, windows="last") -> list[tuple[int, list[int], list[int], list[int]]]:
    """(user, history, answers, seen) of each row, by a loop over users."""
    rows = []
    for user, items in users_items():
        if stage == "predict":
            rows.append((user, items[-max_history:], [], items))
        elif stage == "train":
            train = items[:-2] if len(items) >= 3 else items
            end = len(train) - 1
            while end >= 1:
                rows.append((user, train[:end][-max_history:], [train[end]], []))
                end = end - max_history if windows == "all" else 0
        elif len(items) >= 3:
            place = -2 if stage == "val" else -1
            rows.append((user, items[:place][-max_history:], [items[place]], items[:place]))
    return rows


def unpadded(matrix: torch.Tensor) -> list[list[int]]:
    """The rows of a matrix without the zeros at their end; other zeros stay and would be seen."""
    return [np.trim_zeros(np.array(row), "b").tolist() for row in matrix.tolist()]


# ------------------------------------------------------------------------------------------------------ datasets


@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("max_history", [1, 4, 100])
@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_equals_a_loop_over_users(stage, max_history, windows):
    dataset = dataset_of(stage, max_history, windows)
    rows = rows_by_hand(stage, max_history, windows)
    assert len(dataset) == len(rows)
    # In evaluation a batch holds, beside the history, all that the user has seen.
    assert dataset.lengths.tolist() == [len(history if stage == "train" else seen) for _, history, _, seen in rows]
    order = np.random.default_rng(1).permutation(len(rows))
    for chosen in (order, order[:3].tolist(), order[:1]):
        batch = dataset[chosen]
        users, histories, answers, seen = zip(*(rows[n] for n in chosen), strict=True)
        assert batch.user.tolist() == list(users)
        assert unpadded(batch.history) == list(histories)
        assert unpadded(batch.target) == list(answers)
        assert unpadded(batch.seen) == list(seen)
        assert batch.history.shape[1] == max(map(len, histories))  # no column of padding alone
        assert batch.seen.shape[1] == max(map(len, seen))
        assert batch.history.dtype == batch.target.dtype == batch.user.dtype == batch.seen.dtype == torch.int64
        assert batch.history_mask.sum(1).tolist() == [len(history) for history in histories]
        assert len(batch) == len(chosen)


def test_a_sequence_is_the_history_followed_at_once_by_the_answer():
    batch = SequenceBatch(
        user=torch.arange(3),
        history=torch.tensor([[5, 6, 7], [8, 0, 0], [3, 4, 0]]),
        target=torch.tensor([[1], [2], [9]]),
        seen=torch.zeros(3, 0, dtype=torch.long),
    )
    assert batch.sequence.tolist() == [[5, 6, 7, 1], [8, 2, 0, 0], [3, 4, 9, 0]]


def test_a_user_split_gives_rows_of_several_answers_with_all_before_them_as_seen():
    interactions = interactions_of(LENGTHS)
    split = UserSplit(0.4, 0.4, history=0.6)(interactions)
    for stage, start, stop in (("val", split.val_start, split.val_stop), ("test", split.test_start, split.test_stop)):
        dataset = SequenceDataset(interactions, split, stage, max_history=4)
        batch = dataset[np.arange(len(dataset))]
        items = dict(users_items())
        expected = {user: items[user][-n:] for user, n in enumerate((stop - start).tolist()) if n}
        assert len(expected) == 4
        assert max(map(len, expected.values())) > 1
        assert dict(zip(batch.user.tolist(), unpadded(batch.target), strict=True)) == expected
        known = {user: items[user][: -len(answers)] for user, answers in expected.items()}
        assert dict(zip(batch.user.tolist(), unpadded(batch.seen), strict=True)) == known
        tails = {user: seen[-4:] for user, seen in known.items()}
        assert dict(zip(batch.user.tolist(), unpadded(batch.history), strict=True)) == tails


def test_each_stage_reads_its_own_bounds():
    interactions = interactions_of([6])
    bounds = (np.array([place]) for place in (1, 2, 3, 4, 6))  # as a splitter of one's own may leave gaps
    split, items = Split(*bounds), interactions.items.tolist()
    for stage, known, last in (("val", 2, 3), ("test", 4, 6), ("predict", 6, 6)):
        batch = SequenceDataset(interactions, split, stage, 9)[[0]]
        assert (batch.history.tolist(), batch.target.tolist()) == ([items[:known]], [items[known:last]])
    assert len(SequenceDataset(interactions, split, "train", 9)) == 0, "one item has no answer"


def test_user_features_come_with_their_users_and_without_any_there_is_no_column():
    interactions = interactions_of(LENGTHS)
    features = UserFeatures(("a", "b"), (30, 7), np.arange(22).reshape(11, 2))
    dataset = SequenceDataset(interactions, LeaveOneOut()(interactions), "test", 4, "last", features)
    batch = dataset[[3, 0, 5]]
    assert batch.user_features.tolist() == [[2 * user, 2 * user + 1] for user in batch.user.tolist()]
    assert torch.equal(batch.to("cpu").user_features, batch.user_features)
    assert batch.to("meta").user_features.device.type == "meta"
    plain = dataset_of("test")[[3, 0, 5]]
    assert plain.user_features.shape == (3, 0)
    assert plain.user_features.dtype == torch.int64
    assert replace(plain, user=plain.user[:2], history=plain.history[:2]).user_features.shape == (2, 0)
    assert dataset.fingerprint() != dataset_of("test").fingerprint()


@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("max_history", [1, 4, 100])
def test_no_held_out_item_is_in_any_training_row(max_history, windows):
    held_out = {item for _, items in users_items() if len(items) >= 3 for item in items[-2:]}
    dataset = dataset_of("train", max_history, windows)
    trained = set(dataset[np.arange(len(dataset))].sequence.flatten().tolist()) - {0}
    assert len(held_out) == 16
    assert not trained & held_out


def test_a_test_answer_is_in_no_history_before_it():
    for stage in ("val", "test"):
        batch = dataset_of(stage)[np.arange(8)]
        assert not (batch.history == batch.target).any()
        assert not (batch.seen == batch.target).any()


@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("max_history", [1, 4, 100])
def test_training_rows_close_up_over_cold_items_and_no_other_row_does(max_history, windows):
    interactions = interactions_of(LENGTHS)
    cold = interactions.items[[1, 4, 20, 21, 24, 40, *range(50, 60), 68, 76]]  # some are answers of evaluation
    split = LeaveOneOut()(interactions)
    without = replace(split, cold=np.sort(cold))
    # As if those interactions had never been: users that keep none are left out, as Interactions has no empty ones.
    kept = [
        [item for item in (items[:-2] if len(items) >= 3 else items) if item not in cold] for _, items in users_items()
    ]
    left = [items for items in kept if items]
    offsets = np.cumsum([0, *map(len, left)])
    closed = Interactions(offsets, np.concatenate(left), np.zeros(offsets[-1], dtype=np.int64), interactions.num_items)
    expected = SequenceDataset(closed, Split(*[offsets[1:]] * 5), "train", max_history, windows)
    rows = SequenceDataset(interactions, without, "train", max_history, windows)
    batch, wanted = rows[np.arange(len(rows))], expected[np.arange(len(expected))]
    assert batch.sequence.tolist() == wanted.sequence.tolist()
    users = np.array([user for user, items in enumerate(kept) if items])
    assert batch.user.tolist() == users[wanted.user.numpy()].tolist()
    assert rows.lengths.tolist() == expected.lengths.tolist()
    for stage in ("val", "test", "predict"):
        fingerprints = {SequenceDataset(interactions, s, stage, max_history).fingerprint() for s in (split, without)}
        assert len(fingerprints) == 1
    assert rows.fingerprint() != SequenceDataset(interactions, split, "train", max_history, windows).fingerprint()


@pytest.mark.parametrize("max_history", [1, 2, 4, 5, 100])
def test_all_windows_learn_every_training_item_once(max_history):
    dataset = dataset_of("train", max_history, windows="all")
    batch = dataset[np.arange(len(dataset))]
    answers = Counter(batch.sequence[:, 1:].flatten().tolist())  # every position is learned
    histories = Counter(batch.history.flatten().tolist())
    training = [items[:-2] if len(items) >= 3 else items for _, items in users_items()]
    del answers[0], histories[0]
    assert answers == Counter(item for items in training for item in items[1:])
    assert histories == Counter(item for items in training for item in items[:-1])
    assert dataset.lengths.max() <= max_history


def test_a_history_of_no_item_is_refused():
    with pytest.raises(ValueError, match="max_history=0"):
        dataset_of("train", max_history=0)


def test_a_split_without_rows_has_length_zero():
    assert [len(dataset_of(stage, lengths=[1, 1])) for stage in STAGES] == [0, 0, 0, 2]


def test_a_moved_batch_is_equal():
    batch = dataset_of("test")[np.arange(8)]
    moved = batch.to("cpu")
    for name in ("user", "history", "target", "seen"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))


# ------------------------------------------------------------------------------------------------------- sampler


def lengths_of(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(1, 20, rows)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_every_row_once_in_equally_many_batches(world_size, shuffle):
    for rows in [*range(world_size, 30), 97]:
        for batch_size in (1, 3, 8):
            samplers = [
                BucketSampler(lengths_of(rows), batch_size, shuffle, 7, pool_batches=2, rank=r, world_size=world_size)
                for r in range(world_size)
            ]
            batches = [list(sampler) for sampler in samplers]
            assert {len(own) for own in batches} == {len(samplers[0])}
            assert sorted(row for own in batches for batch in own for row in batch) == list(range(rows))
            sizes = [len(batch) for own in batches for batch in own]
            assert min(sizes) >= 1
            assert max(sizes) <= batch_size + (world_size > 1)  # a remainder too small for all ranks is joined


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BucketSampler(lengths_of(200), 8, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3, 5) == order(3, 5)
    different = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert all(a != b for n, a in enumerate(different) for b in different[:n])
    sampler = BucketSampler(lengths_of(200), 8, shuffle=True, seed=3)
    first = list(sampler)
    assert list(sampler) == first == order(3, 0)  # an epoch that is read twice is the same epoch
    sampler.set_epoch(5)
    assert list(sampler) == order(3, 5)


def test_the_order_takes_nothing_from_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the very state that must not matter
    first = list(BucketSampler(lengths_of(50), 4, shuffle=True))
    assert list(BucketSampler(lengths_of(50), 4, shuffle=True)) == first


def test_rows_of_one_length_are_shuffled_as_well():
    order = [row for batch in BucketSampler(np.full(64, 5), 8, shuffle=True) for row in batch]
    assert order != sorted(order)
    assert Counter(order) == Counter(range(64))
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(order))
    assert neighbours < 16  # 2 of 64 are expected by chance, 63 in file order


def test_evaluation_takes_the_longest_rows_first():
    lengths = lengths_of(30)
    order = [row for batch in BucketSampler(lengths, 4) for row in batch]
    assert order == sorted(range(30), key=lambda row: -lengths[row])  # stable, as sorted() is


@pytest.mark.parametrize("rows", [0, 3])
def test_fewer_rows_than_processes_are_refused_on_every_rank(rows):
    for rank in range(4):
        with pytest.raises(InputError, match=f"^{rows} rows cannot be shared out among 4 processes.*devices"):
            BucketSampler(lengths_of(rows), 2, rank=rank, world_size=4)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        BucketSampler(lengths_of(9), 0)
    with pytest.raises(ValueError, match=r"rank=2 must be in 0\.\.1"):
        BucketSampler(lengths_of(9), 1, rank=2, world_size=2)


def padding_share(lengths: np.ndarray, batches: list[list[int]]) -> float:
    tokens = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / tokens


@pytest.mark.parametrize("batch_size", [64, 256])
def test_little_of_a_training_epoch_is_padding(batch_size):
    rng = np.random.default_rng(0)
    lengths = np.minimum(2 + rng.geometric(0.2, 22_363), 20)  # short histories and a long tail, cut at 20
    bucketed = padding_share(lengths, list(BucketSampler(lengths, batch_size, shuffle=True)))
    order = rng.permutation(len(lengths))
    shuffled = padding_share(lengths, [order[n : n + batch_size].tolist() for n in range(0, len(order), batch_size)])
    assert bucketed < 0.15 < shuffled


# ----------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("stage", STAGES)
def test_a_fingerprint_is_that_of_the_rows_and_nothing_else(stage):
    known = dataset_of(stage).fingerprint()
    assert len(known) == 64
    assert dataset_of(stage).fingerprint() == known
    others = {dataset_of(other).fingerprint() for other in STAGES if other != stage}
    assert known not in others
    for field in ("user", "start", "stop", "answer_stop"):
        dataset = dataset_of(stage)
        bounds = getattr(dataset, field).copy()
        bounds[-1] -= 1
        setattr(dataset, field, bounds)
        assert dataset.fingerprint() != known, field


@pytest.mark.parametrize("stage", STAGES)
def test_a_fingerprint_changes_with_every_item_that_a_row_reaches_and_with_no_other(stage):
    interactions = interactions_of(LENGTHS)
    split = LeaveOneOut()(interactions)
    known = SequenceDataset(interactions, split, stage, 4)
    rows = rows_by_hand(stage, 4)
    reached = {item for _, *parts in rows for part in parts for item in part}
    assert 0 < len(reached) <= len(interactions)
    for position, item in enumerate(interactions.items):
        items = interactions.items.copy()
        items[position] = item % interactions.num_items + 1
        changed = Interactions(interactions.offsets, items, interactions.timestamps, interactions.num_items)
        same = SequenceDataset(changed, split, stage, 4).fingerprint() == known.fingerprint()
        assert same == (item not in reached)


def test_a_fingerprint_depends_on_the_length_of_histories():
    assert dataset_of("train", 4).fingerprint() != dataset_of("train", 5).fingerprint()
    assert dataset_of("train", 4).fingerprint() != dataset_of("train", 4, windows="all").fingerprint()
