"""Data modules: what is built when, which batches come out, on one process and on several; Beauty's exact figures."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from recsys_lightning.data.datamodules import CatalogDataModule, ItemDataModule, SequenceDataModule
from recsys_lightning.data.encoders import TextEncoder, TfidfSVD
from recsys_lightning.data.interactions import Interactions
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.data.sources import Amazon2014, Synthetic, Tabular
from recsys_lightning.data.splits import LeaveOneOut, Splitter, UserSplit
from recsys_lightning.errors import InputError
from recsys_lightning.metrics.ranking import ranking_metrics
from recsys_lightning.metrics.ranks import rank_targets
from recsys_lightning.metrics.slices import item_slices
from recsys_lightning.models.popularity import Popularity

STAGES = ("train", "val", "test", "predict")


class Lengths(TextEncoder):
    """Writes the length of a text; counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    @property
    def identity(self) -> str:
        return "lengths"

    def encode(self, texts: list[str]) -> np.ndarray:
        self.calls += 1
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def source(**settings: int) -> Synthetic:
    return Synthetic(**({"num_users": 90, "items_per_topic": 3, "min_length": 1, "max_length": 12} | settings))


def ready(cache: Path, kind: type = SequenceDataModule, **settings) -> SequenceDataModule:
    """A data module after prepare_data and setup."""
    settings = {"source": source(), "k_core": 0, "cache_dir": str(cache), "raw_dir": str(cache / "raw")} | settings
    module = kind(**settings)
    module.prepare_data()
    module.setup()
    return module


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of this file share."""
    return tmp_path_factory.mktemp("cache")


def loader_of(module: SequenceDataModule, stage: str):
    return getattr(module, f"{stage}_dataloader")()


def plain(batch: SequenceBatch | Tensor) -> list:
    """A batch as nested lists, for comparison."""
    if isinstance(batch, Tensor):
        return batch.tolist()
    return [getattr(batch, name).tolist() for name in ("user", "history", "target", "seen", "user_features")]


# ------------------------------------------------------------------------------------------------------- batches


def test_every_stage_gives_every_row_once_in_batches_of_its_size(cache):
    module = ready(cache, batch_size=16, eval_batch_size=25)
    lengths = module.data.interactions.lengths
    expected = {
        "train": [user for user, n in enumerate(lengths) if n == 2 or n >= 4],  # two items left to train on
        "val": [user for user, n in enumerate(lengths) if n >= 3],
        "test": [user for user, n in enumerate(lengths) if n >= 3],
        "predict": list(range(90)),
    }
    for stage in STAGES:
        batches = list(loader_of(module, stage))
        size = 16 if stage == "train" else 25
        assert sorted(user for batch in batches for user in batch.user.tolist()) == expected[stage]
        assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)
        assert len(loader_of(module, stage)) == len(batches)


def test_max_history_and_windows_reach_the_batches(cache):
    last, split = (ready(cache, max_history=3, windows=windows) for windows in ("last", "all"))
    for module in (last, split):
        assert max(batch.history.shape[1] for batch in module.train_dataloader()) == 3
    assert sum(map(len, split.train_dataloader())) > sum(map(len, last.train_dataloader()))


@pytest.mark.parametrize("stage", ["train", "test"])
def test_worker_processes_give_the_same_batches(cache, stage):
    batches = [
        [plain(batch) for batch in loader_of(ready(cache, batch_size=16, num_workers=n, seed=3), stage)] for n in (0, 2)
    ]
    assert batches[0] == batches[1]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", [SequenceDataModule, ItemDataModule])
def test_processes_share_the_rows_of_one_order(cache, monkeypatch, world_size, kind):
    encoder = TfidfSVD(dim=4)
    single = ready(cache, kind, encoder=encoder, batch_size=8 * world_size)
    alone = [plain(batch) for batch in single.train_dataloader()]
    shared_out = ready(cache, kind, encoder=encoder, batch_size=8)  # before the others come, who would exchange texts
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(list(shared_out.train_dataloader()))
    assert {len(share) for share in shares} == {len(alone)}
    for whole, *parts in zip(alone, *shares, strict=True):
        # Rank r has the rows r, r + world_size, ... of the batch that one process of world_size times the size has.
        if kind is ItemDataModule:
            for rank, part in enumerate(parts):
                assert part.tolist() == whole[rank::world_size]
        else:
            for rank, part in enumerate(parts):
                assert part.user.tolist() == whole[0][rank::world_size]


def test_item_batches_hold_every_embedding_once_and_no_padding(cache):
    module = ready(cache, ItemDataModule, encoder=TfidfSVD(dim=4), batch_size=10)
    vectors = module.catalog.text_embeddings()
    assert vectors.shape == (49, 4)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        rows = [tuple(row) for batch in loader for row in batch.tolist()]
        assert Counter(rows) == Counter(tuple(row) for row in vectors[1:].tolist())
    in_order = torch.cat(list(module.val_dataloader()))
    assert torch.equal(in_order, vectors[1:])


# --------------------------------------------------------------------------------------------------------- order


def order_of(module: SequenceDataModule) -> list[list[int]]:
    return [batch.user.tolist() for batch in module.train_dataloader()]


def test_the_order_follows_the_seed_of_the_run_unless_it_has_its_own(cache, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    of_the_run, same, own = (order_of(ready(cache, batch_size=8, seed=seed)) for seed in (None, 11, 12))
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    of_another_run, still_own = (order_of(ready(cache, batch_size=8, seed=seed)) for seed in (None, 12))
    assert of_the_run == same
    assert of_another_run == own == still_own
    assert own != same
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert order_of(ready(cache, batch_size=8)) == order_of(ready(cache, batch_size=8, seed=0))


class Recorder(L.LightningModule):
    """Notes whom it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[list[int]]] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: SequenceBatch, index: int) -> Tensor:
        self.epochs[-1].append(batch.user.tolist())
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_trains_each_epoch_in_the_order_of_its_number(cache, tmp_path):
    recorder, module = Recorder(), ready(cache, batch_size=16, seed=5)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(recorder, train_dataloaders=module.train_dataloader())
    expected = []
    for epoch in range(3):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        expected.append([batch.user.tolist() for batch in loader])
    assert recorder.epochs == expected
    assert expected[0] != expected[1]


# ------------------------------------------------------------------------------------------------------- catalog


def test_train_counts_count_training_interactions_only(cache):
    module = ready(cache)
    interactions = module.data.interactions
    counts = Counter()
    for user in range(interactions.num_users):
        items = interactions.items[interactions.offsets[user] : interactions.offsets[user + 1]].tolist()
        counts.update(items[:-2] if len(items) >= 3 else items)
    assert module.catalog.train_counts.tolist() == [counts[item] for item in range(interactions.num_items + 1)]


def test_embeddings_are_made_by_prepare_data_and_opened_by_setup(tmp_path):
    encoder = Lengths()
    module = ready(tmp_path, encoder=encoder, template=("{title}",))
    titles = module.catalog.fields["title"].to_list()
    expected = [[0, 0], *([len(title), 1] for title in titles)]
    assert module.catalog.text_embeddings().tolist() == expected
    assert module.catalog.text_fingerprint == module.catalog.text.fingerprint
    ready(tmp_path, encoder=encoder, template=("{title}",))
    assert encoder.calls == 1


def test_setup_without_prepare_data_says_what_to_run(tmp_path):
    encoder = Lengths()
    module = SequenceDataModule(source(), encoder, k_core=0, cache_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"no item embeddings in .*: run `recsys prepare` on this machine first"):
        module.setup()
    assert encoder.calls == 0


def test_embeddings_that_nobody_asked_for_are_refused_where_they_are_needed(cache):
    with pytest.raises(InputError, match=r"name an encoder with --data\.encoder"):
        ready(cache).catalog.text_embeddings()


def test_statistics_are_json_and_add_up(cache):
    module = ready(cache, encoder=TfidfSVD(dim=4))
    statistics = json.loads(json.dumps(module.statistics()))
    assert statistics.keys() == {
        *("users", "items", "interactions", "density", "length", "text_coverage"),
        *("items_without_text", "dropped", "rejects"),
        *("split", "split_rule", "split_users", "only_history"),
        *("cold_items", "user_coverage", "text_encoder", "text_width"),
    }
    assert sum(statistics["split"].values()) == statistics["interactions"]
    assert statistics["split"]["test"] == sum(module.data.interactions.lengths >= 3)
    assert statistics["cold_items"] == {"items": 0, "struck_interactions": 0}
    assert (statistics["split_rule"], statistics["only_history"], statistics["user_coverage"]) == (
        "LeaveOneOut()",
        0,
        {},
    )
    evaluated = int((module.data.interactions.lengths >= 3).sum())
    assert statistics["split_users"] == {"train": 90, "val": evaluated, "test": evaluated}
    assert (statistics["text_encoder"], statistics["text_width"]) == (TfidfSVD(dim=4).identity, 4)
    assert ready(cache).statistics()["text_encoder"] is None


def test_setup_opens_the_data_once(cache):
    module = ready(cache)
    catalog = module.catalog
    module.setup("test")
    assert module.catalog is catalog


@pytest.mark.parametrize("name", ["data", "catalog", "split"])
def test_data_before_setup_says_what_to_call(name):
    with pytest.raises(RuntimeError, match=r"prepare_data\(\) and setup\(\)"):
        getattr(SequenceDataModule(source()), name)


@pytest.mark.parametrize(
    ("kind", "name", "value", "limit"),
    [
        *((SequenceDataModule, name, 0, 1) for name in ("max_history", "batch_size", "eval_batch_size")),
        *((SequenceDataModule, name, -1, 0) for name in ("k_core", "num_workers", "seed", "cold_seed")),
        (ItemDataModule, "batch_size", 0, 1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(kind, name, value, limit):
    with pytest.raises(InputError, match=rf"data\.{name}={value} must be (at least )?{limit}"):
        kind(source(), **{name: value})


def test_a_split_that_nobody_is_in_is_refused(tmp_path):
    module = ready(tmp_path, source=source(max_length=2))
    with pytest.raises(InputError, match="no user has enough interactions for the test split"):
        module.test_dataloader()
    assert len(list(module.predict_dataloader())) == 1


def test_short_names_of_sources_and_encoders_are_known_to_the_command_line():
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(CatalogDataModule, "data")
    arguments = ["--data=SequenceDataModule", "--data.source=Synthetic", "--data.encoder=TfidfSVD"]
    data = parser.parse_args([*arguments, "--data.encoder.dim=7"]).data
    assert data.class_path == "recsys_lightning.data.datamodules.SequenceDataModule"
    assert data.init_args.source.class_path == "recsys_lightning.data.sources.Synthetic"
    assert data.init_args.encoder.class_path == "recsys_lightning.data.encoders.TfidfSVD"
    assert data.init_args.encoder.init_args.dim == 7


# ---------------------------------------------------------------------------------------------------- cold items

COLD = {"cold_items": 0.25, "cold_seed": 3}  # 12 of 48 items


def items_of(batch: SequenceBatch) -> set[int]:
    return set(torch.cat([batch.history, batch.target, batch.seen], 1).flatten().tolist()) - {0}


def test_both_kinds_of_data_module_hold_out_the_same_items_and_another_seed_holds_out_others(cache):
    sequences, items = ready(cache, **COLD), ready(cache, ItemDataModule, **COLD)
    cold = sequences.split.cold.tolist()
    assert len(cold) == 12
    assert items.split.cold.tolist() == cold
    assert sorted([*cold, *sequences.warm_items.tolist()]) == list(range(1, 49))
    assert ready(cache, cold_items=0.25, cold_seed=4).split.cold.tolist() != cold
    assert sequences.with_interactions(reversed_items(sequences)).split.cold.tolist() == cold
    assert ready(cache, **COLD, seed=9).split.cold.tolist() == cold, "the seed of the run has no part in it"


@pytest.mark.parametrize("windows", ["last", "all"])
def test_cold_items_are_in_no_training_batch_and_in_evaluation_as_ever(cache, windows):
    settings = {"windows": windows, "max_history": 4, "batch_size": 16}
    module, plainly = ready(cache, **COLD, **settings), ready(cache, **settings)
    cold = set(module.split.cold.tolist())
    assert not cold & set().union(*map(items_of, module.train_dataloader()))
    assert cold & set().union(*map(items_of, plainly.train_dataloader()))
    for stage in ("val", "test", "predict"):
        both = [[plain(batch) for batch in loader_of(data, stage)] for data in (module, plainly)]
        assert both[0] == both[1]
    assert cold & {item for batch in module.test_dataloader() for item in batch.target.flatten().tolist()}
    assert cold <= {item for batch in module.predict_dataloader() for item in items_of(batch)}


def test_cold_items_have_no_training_count_and_the_others_have_theirs(cache):
    module, plainly = ready(cache, **COLD), ready(cache)
    counts = plainly.catalog.train_counts.copy()
    struck = int(counts[module.split.cold].sum())
    counts[module.split.cold] = 0
    assert struck > 0
    assert module.catalog.train_counts.tolist() == counts.tolist()
    assert module.catalog.num_items == 48
    statistics = module.statistics()
    assert statistics["cold_items"] == {"items": 12, "struck_interactions": struck}
    assert statistics["split"]["train"] == counts.sum()
    assert sum(statistics["split"].values()) + struck == statistics["interactions"]


def test_cold_items_are_answered_in_the_slice_of_items_never_met(cache):
    module = ready(cache, **COLD)
    mask = item_slices(torch.as_tensor(module.catalog.train_counts))["cold-item"]
    assert set(module.split.cold.tolist()) <= set(mask.nonzero().flatten().tolist())


def test_a_tokenizer_learns_from_and_is_chosen_on_the_other_items_and_tested_on_all(cache):
    module = ready(cache, ItemDataModule, encoder=TfidfSVD(dim=4), batch_size=10, **COLD)
    vectors = module.catalog.text_embeddings()
    warm = Counter(tuple(row) for row in vectors[torch.from_numpy(module.warm_items)].tolist())
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert Counter(tuple(row) for batch in loader for row in batch.tolist()) == warm
    assert torch.equal(torch.cat(list(module.test_dataloader())), vectors[1:])


@pytest.mark.parametrize("kind", [SequenceDataModule, ItemDataModule])
@pytest.mark.parametrize(
    ("share", "message"),
    [
        (-0.1, r"data\.cold_items=-0\.1 must be a share of the items, from 0 to less than 1"),
        (1.0, r"data\.cold_items=1\.0 must be a share"),
        (float("nan"), r"data\.cold_items=nan must be a share"),
        (0.01, r"data\.cold_items=0\.01 of 48 items is not even one; raise it"),
        (0.995, r"data\.cold_items=0\.995 of 48 items leaves none to train on; lower it"),
    ],
)
def test_a_senseless_share_of_cold_items_is_one_clear_line(cache, kind, share, message):
    with pytest.raises(InputError, match=message):
        ready(cache, kind, cold_items=share)


def test_so_many_cold_items_that_no_training_row_is_left_are_refused(cache):
    module = ready(cache, cold_items=0.97)
    with pytest.raises(InputError, match=r"for the train split; lower --data\.cold_items, which holds out 47 items"):
        module.train_dataloader()
    assert len(list(module.test_dataloader())) > 0


# -------------------------------------------------------------------------------------------------------- splits

USERS = {"split": UserSplit(val_users=0.2, test_users=0.1, history=0.6, seed=5)}


def histories(module: SequenceDataModule) -> list[list[int]]:
    interactions = module.data.interactions
    return [part.tolist() for part in np.split(interactions.items, interactions.offsets[1:-1])]


def test_leave_one_out_is_the_split_unless_another_is_named(cache):
    assert ready(cache).splitter == LeaveOneOut()
    named = ready(cache, split=LeaveOneOut())
    for stage in STAGES:
        batches = [[plain(batch) for batch in loader_of(data, stage)] for data in (ready(cache), named)]
        assert batches[0] == batches[1]


def test_a_user_split_gives_each_user_one_part_and_every_answer_at_once(cache):
    module = ready(cache, max_history=4, eval_batch_size=7, **USERS)
    items, several = histories(module), sum(len(row) >= 2 for row in histories(module))
    users = {stage: [] for stage in STAGES}
    for stage in STAGES:
        for batch in loader_of(module, stage):
            users[stage] += batch.user.tolist()
            for row, user in enumerate(batch.user.tolist()):
                known = max(int(0.6 * len(items[user])), 1)  # none of these lengths is rounded wrongly
                before, after = items[user][:known], items[user][known:]
                if stage == "predict":
                    before, after = items[user], []
                if stage == "train":
                    assert batch.sequence[row][: len(items[user])].tolist() == items[user][-5:] + [0] * 0
                    continue
                for name, expected in (("history", before[-4:]), ("seen", before), ("target", after)):
                    assert [item for item in getattr(batch, name)[row].tolist() if item] == expected
    assert len(users["val"]) == round(0.2 * several)
    assert len(users["test"]) == round(0.1 * several)
    assert (
        len(set(users["train"]) | set(users["val"]) | set(users["test"]))
        == several
        == len(users["train"] + users["val"] + users["test"])
    )
    assert sorted(users["predict"]) == list(range(90)), "everybody, whatever part he has"


def test_held_out_users_are_in_no_training_batch_and_count_nowhere(cache):
    for settings in (USERS, USERS | {"windows": "all", "max_history": 3}, USERS | COLD):
        module = ready(cache, **settings)
        split, cold = module.split, set(module.split.cold.tolist())
        held_out = set(np.flatnonzero(split.test_stop > split.val_start).tolist())
        assert len(held_out) > 15
        assert not held_out & {user for batch in module.train_dataloader() for user in batch.user.tolist()}
        rows = [row for user, row in enumerate(histories(module)) if user not in held_out]
        counts = Counter(item for row in rows for item in row if item not in cold)
        assert module.catalog.train_counts.tolist() == [counts[item] for item in range(49)]


def test_windows_of_a_user_split_answer_each_training_item_but_the_first_once(cache):
    module = ready(cache, windows="all", max_history=3, **USERS)
    answered = {}
    for batch in module.train_dataloader():
        for user, sequence in zip(batch.user.tolist(), batch.sequence.tolist(), strict=True):
            answered[user] = answered.get(user, Counter()) + Counter(item for item in sequence[1:] if item)
    items = histories(module)
    trained = np.flatnonzero(module.split.train_stop > module.data.interactions.offsets[:-1]).tolist()
    assert answered == {user: Counter(items[user][1:]) for user in trained if len(items[user]) > 1}


def test_cold_items_leave_the_answers_of_a_user_split_as_they_are(cache):
    cold, plainly = ready(cache, **USERS, **COLD), ready(cache, **USERS)
    for stage in ("val", "test", "predict"):
        both = [[plain(batch) for batch in loader_of(data, stage)] for data in (cold, plainly)]
        assert both[0] == both[1]
    held_out = set(cold.split.cold.tolist())
    assert not held_out & set().union(*map(items_of, cold.train_dataloader()))
    assert held_out & set().union(*map(items_of, cold.test_dataloader()))


def test_statistics_of_a_user_split_add_up(cache):
    for settings in (USERS, USERS | COLD):
        statistics = ready(cache, **settings).statistics()
        parts = statistics["split"].values()
        struck, only_history = statistics["cold_items"]["struck_interactions"], statistics["only_history"]
        assert sum(parts) + struck + only_history == statistics["interactions"]
        assert min(*parts, only_history) > 0
        assert sum(statistics["split_users"].values()) == 90
        assert statistics["split_rule"] == "UserSplit(val_users=0.2, test_users=0.1, history=0.6, seed=5)"


@pytest.mark.parametrize("kind", [SequenceDataModule, ItemDataModule])
def test_both_kinds_of_data_module_take_a_split(cache, kind):
    module = ready(cache, kind, encoder=TfidfSVD(dim=4), **USERS)
    assert module.split.sizes == ready(cache, **USERS).split.sizes
    assert module.catalog.train_counts.tolist() == ready(cache, **USERS).catalog.train_counts.tolist()
    with pytest.raises(InputError, match="leaves no user for val of the"):
        ready(cache, kind, split=UserSplit(val_users=0.001))


def test_a_splitter_of_ones_own_is_used(cache):
    class Everything(Splitter):
        def __call__(self, interactions):
            return dataclasses.replace(
                LeaveOneOut()(interactions), **dict.fromkeys(("train_stop", "val_start"), interactions.offsets[1:] - 1)
            )

    module = ready(cache, split=Everything())
    assert len(module.dataset("train")) == (module.data.interactions.lengths >= 3).sum()


def test_short_names_of_splits_are_known_to_the_command_line():
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(CatalogDataModule, "data")
    arguments = ["--data=SequenceDataModule", "--data.source=Synthetic"]
    default = parser.parse_args(arguments).data.init_args.split
    assert default.class_path == "recsys_lightning.data.splits.LeaveOneOut"
    named = parser.parse_args([*arguments, "--data.split=UserSplit", "--data.split.history=0.5"]).data.init_args.split
    assert named.class_path == "recsys_lightning.data.splits.UserSplit"
    assert named.init_args.as_dict() == {"val_users": 0.1, "test_users": 0.1, "history": 0.5, "seed": 0}


# ------------------------------------------------------------------------------------------------- user features


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Ten users of five interactions, of whom nine have a row in the users' table."""
    rows = [(f"u{user}", f"i{(user + n) % 7}", n + 1) for user in range(10) for n in range(5)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(tmp_path / "log.csv")
    users = [(f"u{user}", "no" if user % 2 else "de", user) for user in range(9)]
    pl.DataFrame(users, schema=["user_id", "country", "age"], orient="row").write_parquet(tmp_path / "users.parquet")
    return tmp_path


def with_users(folder: Path, **settings) -> SequenceDataModule:
    known = Tabular("log.csv", None, users="users.parquet")
    return ready(folder / "cache", source=known, raw_dir=str(folder), **settings)


def test_batches_carry_the_features_of_their_users(tables):
    module = with_users(tables, eval_batch_size=3, batch_size=3)
    features = module.catalog.user_features
    assert (features.names, features.sizes) == (("country", "age"), (3, 10))
    by_user = {f"u{user}": [2 if user % 2 else 1, user + 1] for user in range(9)} | {"u9": [0, 0]}
    for stage in STAGES:
        for batch in loader_of(module, stage):
            assert batch.user_features.tolist() == [by_user[module.data.user_ids[user]] for user in batch.user.tolist()]
            assert batch.to("cpu").user_features.tolist() == batch.user_features.tolist()
    assert module.statistics()["user_coverage"] == {"country": 0.9, "age": 0.9}


def test_what_only_held_out_users_have_is_unknown(tables):
    module = with_users(tables, split=UserSplit(0.3, 0.3))
    split, codes = module.split, module.catalog.user_features.codes
    trained = split.train_stop > module.data.interactions.offsets[:-1]
    known = np.array([user != "u9" for user in module.data.user_ids])
    assert (codes[known, 1] > 0).tolist() == trained[known].tolist(), "an age of its own each"


def test_features_are_part_of_the_fingerprint_of_rows(tables):
    before = with_users(tables).dataset("train").fingerprint()
    pl.read_parquet(tables / "users.parquet").with_columns(age=pl.col("age").reverse()).write_parquet(
        tables / "users.parquet"
    )
    changed = with_users(tables)
    assert changed.dataset("train").fingerprint() != before
    plainly = ready(tables / "cache", source=Tabular("log.csv", None), raw_dir=str(tables))
    assert plainly.catalog.user_features is None
    assert next(iter(plainly.train_dataloader())).user_features.shape == (10, 0)


# ---------------------------------------------------------------------------------------------- other interactions


def reversed_items(module: SequenceDataModule) -> Interactions:
    """Every item replaced by the one as far from the other end of the catalogue."""
    known = module.data.interactions
    return dataclasses.replace(known, items=known.num_items + 1 - known.items)


def test_a_data_module_over_other_interactions_is_one_built_from_them(cache):
    module = ready(cache, encoder=TfidfSVD(dim=4), batch_size=16, max_history=5)
    other = module.with_interactions(reversed_items(module))
    assert type(other) is SequenceDataModule
    assert other.catalog.train_counts[1:].tolist() == module.catalog.train_counts[:0:-1].tolist()
    assert other.catalog.text_fingerprint == module.catalog.text_fingerprint
    assert other.data.fingerprint != module.data.fingerprint
    for stage in STAGES:
        for one, changed in zip(loader_of(module, stage), loader_of(other, stage), strict=True):
            assert torch.equal(one.user, changed.user)
            for name in ("history", "target", "seen"):
                items = getattr(one, name)
                assert torch.equal(getattr(changed, name), torch.where(items == 0, 0, 49 - items))


def test_the_data_module_itself_stays_as_it_was(cache):
    module = ready(cache, batch_size=16)
    before = [plain(batch) for batch in module.train_dataloader()]
    counts, data, files = module.catalog.train_counts.copy(), module.data, sorted(cache.rglob("*"))
    module.with_interactions(reversed_items(module))
    assert [plain(batch) for batch in module.train_dataloader()] == before
    assert (module.catalog.train_counts == counts).all()
    assert module.data is data
    assert sorted(cache.rglob("*")) == files


def test_a_data_module_does_not_take_interactions_of_other_users_or_items(cache):
    module = ready(cache)
    known = module.data.interactions
    with pytest.raises(
        ValueError, match="of 90 users with 99 items cannot take the place of those of 90 users with 48"
    ):
        module.with_interactions(dataclasses.replace(known, num_items=99))
    fewer = Interactions(known.offsets[:2], known.items[: known.offsets[1]], known.timestamps[: known.offsets[1]], 48)
    with pytest.raises(ValueError, match="interactions of 1 users"):
        module.with_interactions(fewer)


# -------------------------------------------------------------------------------------------------- Amazon Beauty


@pytest.fixture(scope="module")
def beauty(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SequenceDataModule:
    raw = str(shared_data / "amazon-2014")
    return ready(tmp_path_factory.mktemp("beauty"), source=Amazon2014(), raw_dir=raw, k_core=5)


@pytest.mark.real_data
def test_beauty_has_its_published_figures(beauty):
    statistics = beauty.statistics()
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (22_363, 12_101, 198_502)
    assert statistics["split"] == {"train": 153_776, "val": 22_363, "test": 22_363}
    assert statistics["dropped"] == {"exact duplicates": 0, "outside the k-core": 0}
    assert beauty.catalog.train_counts.sum() == 153_776


@pytest.mark.real_data
@pytest.mark.parametrize(("stage", "by_id", "expected"), [("val", 0.0087, 0.0093), ("test", 0.0072, 0.0072)])
def test_popularity_has_its_known_recall_on_beauty(beauty, stage, by_id, expected):
    """Known with ties broken by id; two items tie for the fifth place, so the expected value is another."""
    model, metrics, found = Popularity(beauty.catalog), ranking_metrics([5]), 0
    index = model.build_index()
    for batch in loader_of(beauty, stage):
        listed = model.recommend(batch, 5, index)
        found += int((listed.first(5).item_ids == batch.target).sum())
        metrics.update(rank_targets(listed.item_ids, listed.scores, batch.target))
    assert metrics["recall@5"].num_users == 22_363
    assert round(found / 22_363, 4) == by_id
    assert round(float(metrics.compute()["recall@5"]), 4) == expected


@pytest.mark.real_data
def test_cold_items_of_beauty_leave_its_answers_as_they_are(beauty):
    cold = SequenceDataModule(
        beauty.source, raw_dir=str(beauty.raw_dir), cache_dir=str(beauty.cache_dir), cold_items=0.05
    )
    cold.setup()
    statistics = cold.statistics()
    assert statistics["cold_items"] == {"items": 605, "struck_interactions": 8_068}
    assert statistics["split"] == {"train": 145_708, "val": 22_363, "test": 22_363}
    assert len(cold.dataset("train")) == 22_285


@pytest.mark.real_data
@pytest.mark.parametrize("batch_size", [64, 256])
def test_little_of_a_training_epoch_on_beauty_is_padding(beauty, batch_size):
    beauty.batch_size = batch_size
    batches = list(beauty.train_dataloader())
    items = sum(int(batch.history_mask.sum()) for batch in batches)
    share = 1 - items / sum(batch.history.numel() for batch in batches)
    assert sum(map(len, batches)) == 22_363
    assert share < 0.15


@pytest.mark.real_data
def test_no_held_out_interaction_of_beauty_is_trained_on(beauty):
    interactions, split = beauty.data.interactions, beauty.split
    rows = beauty.dataset("train")
    assert (rows.answer_stop <= split.train_stop[rows.user]).all()
    assert (rows.start >= interactions.offsets[rows.user]).all()
    assert (split.test_stop - split.train_stop == 2).all()
    times, last = interactions.timestamps, split.test_stop - 1
    assert (times[last - 2] <= times[last - 1]).all()
    assert (times[last - 1] <= times[last]).all()


# --------------------------------------------------------------------------------------------------- Amazon Books


@pytest.mark.real_data
def test_books_have_their_published_figures_and_a_user_split(shared_data, tmp_path):
    books = ready(
        tmp_path, source=Tabular(name="books"), raw_dir=str(shared_data / "books-1m"), k_core=5, split=UserSplit()
    )
    statistics = books.statistics()
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (38_234, 38_519, 517_167)
    assert statistics["dropped"] == {"exact duplicates": 0, "outside the k-core": 0}
    assert statistics["split_users"] == {"train": 30_588, "val": 3_823, "test": 3_823}
    assert statistics["split"] == {"train": 414_115, "val": 11_504, "test": 12_019}
    assert statistics["only_history"] == 79_529
    held_out = np.flatnonzero(books.split.train_stop == books.data.interactions.offsets[:-1])
    lengths = books.data.interactions.lengths[held_out].tolist()
    assert sum(length - length * 4 // 5 for length in lengths) == 11_504 + 12_019, "in whole numbers"
    assert sum(lengths) == 517_167 - 414_115
    assert sum(map(len, (books.dataset(stage) for stage in STAGES))) == 30_588 + 2 * 3_823 + 38_234
