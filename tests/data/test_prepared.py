"""Prepared data: built once, anew when anything changes, whole or absent."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys_lightning.data.prepared import prepare
from recsys_lightning.data.rejects import RejectLog
from recsys_lightning.data.sources import RawData, Source
from recsys_lightning.errors import InputError

LOG = "bob tent 9\namy doll 4\nbob soap 3\namy tent 2\nbob soap 3\nbob doll 9\n"  # row 5 repeats row 3


class Lines(Source):
    """Reads ``user item time`` lines; counts how often; titles are known for tents and dolls."""

    def __init__(self, setting: int = 0, name: str = "lines", users: pl.DataFrame | None = None) -> None:
        self.setting, self._name, self.users = setting, name, users
        self.calls = 0
        self.titles = {"doll": "a doll", "tent": "a tent", "unmet": "never met"}

    @property
    def name(self) -> str:
        return self._name

    @property
    def settings(self) -> dict[str, Any]:
        return {"setting": self.setting}

    def files(self, raw_dir: Path) -> list[Path]:
        return [raw_dir / "log.txt"]

    def read(self, raw_dir: Path) -> RawData:
        self.calls += 1
        rows = [line.split() for line in self.files(raw_dir)[0].read_text().splitlines()]
        rejects = RejectLog()
        rejects.read("log.txt", len(rows))
        rejects.keep("log.txt", len(rows))
        columns = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}
        interactions = pl.DataFrame([(u, i, int(t)) for u, i, t in rows], schema=columns, orient="row")
        items = pl.DataFrame({"item_id": list(self.titles), "title": list(self.titles.values())})
        return RawData(interactions, items, rejects, self.users)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "log.txt").write_text(LOG)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache"


def test_rows_are_numbered_cleaned_and_given_their_fields(raw, cache):
    data = prepare(Lines(), raw, cache, core=0)
    assert data.user_ids == ["bob", "amy"]
    assert data.fields.rows() == [("tent", "a tent"), ("doll", "a doll"), ("soap", None)]  # items are 1, 2, 3
    assert data.interactions.items.tolist() == [3, 1, 2, 1, 2]
    assert data.interactions.offsets.tolist() == [0, 3, 5]
    assert data.interactions.num_items == 3


def test_users_are_given_their_features_in_the_order_of_their_numbers(raw, cache):
    users = pl.DataFrame({"user_id": ["amy", "unmet"], "age": [30.0, 90.0], "country": ["no", None]})
    for _ in range(2):  # built, then read again
        data = prepare(Lines(users=users), raw, cache, core=0)
        assert data.users.rows() == [("bob", None, None), ("amy", 30.0, "no")]
        assert data.users.schema == {"user_id": pl.String, "age": pl.Float64, "country": pl.String}
        assert data.user_ids == ["bob", "amy"]
    assert prepare(Lines(setting=1), raw, cache, core=0).users.rows() == [("bob",), ("amy",)]


def test_a_source_that_gives_a_user_two_rows_is_stopped(raw, cache):
    users = pl.DataFrame({"user_id": ["amy", "amy"], "age": [30.0, 31.0]})
    with pytest.raises(pl.exceptions.ComputeError, match="1:1"):
        prepare(Lines(users=users), raw, cache, core=0)


def test_a_repeat_at_another_time_is_kept_and_an_exact_duplicate_is_not(raw, cache):
    (raw / "log.txt").write_text("bob tent 1\nbob tent 2\nbob tent 1\n")
    interactions = prepare(Lines(), raw, cache, core=0).interactions
    assert (interactions.items.tolist(), interactions.timestamps.tolist()) == ([1, 1], [1, 2])


def test_statistics_are_plain_values_worked_out_by_hand(raw, cache):
    data = prepare(Lines(), raw, cache, core=2)  # soap is met once when its exact duplicate is gone
    assert data.statistics == {
        "users": 2,
        "items": 2,
        "interactions": 4,
        "density": 1.0,
        "length": {"mean": 2.0, "median": 2.0, "min": 2, "max": 2},
        "text_coverage": {"title": 1.0},
        "items_without_text": 0,
        "dropped": {"exact duplicates": 1, "outside the k-core": 1},
        "rejects": {"log.txt": {"read": 6, "kept": 6, "rejected": {}, "examples": []}},
    }
    everything = prepare(Lines(), raw, cache, core=0).statistics
    assert everything["text_coverage"] == {"title": pytest.approx(2 / 3)}
    assert everything["items_without_text"] == 1


def test_the_second_run_reads_nothing(raw, cache):
    first_source, second_source = Lines(), Lines()
    first, second = prepare(first_source, raw, cache, core=0), prepare(second_source, raw, cache, core=0)
    assert (first_source.calls, second_source.calls) == (1, 0)
    assert isinstance(second.interactions.items, np.memmap)
    assert second.fingerprint == first.fingerprint
    assert second.user_ids == first.user_ids
    assert second.fields.equals(first.fields)
    assert second.statistics == first.statistics
    assert second.interactions.items.tolist() == first.interactions.items.tolist()


def test_the_folder_holds_what_is_promised_and_nothing_else_is_left(raw, cache):
    data = prepare(Lines(), raw, cache, core=0)
    (folder,) = cache.iterdir()
    assert folder.name == f"lines-{data.fingerprint[:16]}"
    assert {path.name for path in folder.iterdir()} == {
        *("offsets.npy", "items.npy", "timestamps.npy", "items.parquet", "users.parquet", "meta.json")
    }
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["source"], meta["settings"], meta["fingerprint"]) == ("lines", {"setting": 0}, data.fingerprint)


def test_a_changed_byte_setting_core_or_source_is_built_anew(raw, cache):
    prints = [prepare(Lines(), raw, cache, core=0).fingerprint]
    for source, core in ((Lines(setting=1), 0), (Lines(), 2), (Lines(name="other"), 0)):
        prints.append(prepare(source, raw, cache, core).fingerprint)
        assert source.calls == 1
    (raw / "log.txt").write_text(LOG.replace("amy doll 4", "amy doll 5"))
    source = Lines()
    data = prepare(source, raw, cache, core=0)
    assert source.calls == 1
    assert 5 in data.interactions.timestamps
    assert len({*prints, data.fingerprint}) == 5


def test_a_file_that_only_looks_newer_is_not_read_again(raw, cache):
    prepare(Lines(), raw, cache, core=0)
    (raw / "log.txt").write_text(LOG)
    source = Lines()
    prepare(source, raw, cache, core=0)
    assert source.calls == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_read_leaves_no_folder(raw, cache, monkeypatch, error):
    def stop(self, raw_dir):
        raise error("stop")

    with monkeypatch.context() as patched:
        patched.setattr(Lines, "read", stop)
        with pytest.raises(error, match="stop"):
            prepare(Lines(), raw, cache, core=0)
    assert not cache.exists() or list(cache.iterdir()) == []
    assert len(prepare(Lines(), raw, cache, core=0).interactions) == 5


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_folder(raw, cache, monkeypatch, error):
    def stop(self, path):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(pl.DataFrame, "write_parquet", stop)
        with pytest.raises((InputError, KeyboardInterrupt)) as caught:
            prepare(Lines(), raw, cache, core=0)
    assert list(cache.iterdir()) == []
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
        assert "--data.cache_dir" in str(caught.value)
    assert len(prepare(Lines(), raw, cache, core=0).interactions) == 5


def test_a_process_that_finishes_second_takes_the_folder_of_the_first(raw, cache, monkeypatch):
    read = Lines.read

    def read_while_another_prepares(self, raw_dir):
        monkeypatch.setattr(Lines, "read", read)
        prepare(Lines(), raw_dir, cache, core=0)
        return read(self, raw_dir)

    monkeypatch.setattr(Lines, "read", read_while_another_prepares)
    assert len(prepare(Lines(), raw, cache, core=0).interactions) == 5
    assert len(list(cache.iterdir())) == 1


def test_a_folder_without_its_meta_file_is_built_again(raw, cache):
    prepare(Lines(), raw, cache, core=0)
    (folder,) = cache.iterdir()
    (folder / "meta.json").unlink()
    source = Lines()
    assert len(prepare(source, raw, cache, core=0).interactions) == 5
    assert source.calls == 1


@pytest.mark.parametrize(
    ("name", "is_cut"),
    [
        *((name, False) for name in ("offsets.npy", "items.npy", "items.parquet", "users.parquet")),
        *((name, True) for name in ("offsets.npy", "items.npy", "items.parquet", "users.parquet", "meta.json")),
    ],
)
def test_damaged_files_are_refused_with_the_cure(raw, cache, name, is_cut):
    prepare(Lines(), raw, cache, core=0)
    (folder,) = cache.iterdir()
    if is_cut:
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    else:
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"damaged .*remove the folder") as caught:
        prepare(Lines(), raw, cache, core=0)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_is_open_to_whoever_may_read_the_cache(raw, cache):
    prepare(Lines(), raw, cache, core=0)
    (folder,) = cache.iterdir()
    assert folder.stat().st_mode == cache.stat().st_mode  # mkdtemp would have made it private


def test_nothing_left_after_the_k_core_is_refused_with_the_cure(raw, cache):
    with pytest.raises(InputError, match=r"lines: no interaction is left of 6 after the 4-core; lower --data\.k_core"):
        prepare(Lines(), raw, cache, core=4)
    assert not cache.exists()


def test_an_empty_log_is_refused(raw, cache):
    (raw / "log.txt").write_text("")
    with pytest.raises(InputError, match="no interaction is left of 0"):
        prepare(Lines(), raw, cache, core=0)


def test_missing_raw_files_are_named(raw, cache):
    shutil.rmtree(raw)
    with pytest.raises(InputError, match=r"lines: missing .*log\.txt; put the files there.*--data\.raw_dir"):
        prepare(Lines(), raw, cache, core=0)


def test_a_cache_folder_that_cannot_be_made_is_an_input_error(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write prepared data to .*--data\.cache_dir"):
        prepare(Lines(), raw, tmp_path / "file" / "cache", core=0)


def test_two_rows_of_fields_for_one_item_are_never_taken_in(raw, cache, monkeypatch):
    read = Lines.read

    def doubled(self, raw_dir):
        data = read(self, raw_dir)
        return RawData(data.interactions, pl.concat([data.items, data.items]), data.rejects)

    monkeypatch.setattr(Lines, "read", doubled)
    with pytest.raises(pl.exceptions.ComputeError, match="1:1"):  # a bug of the source: it keeps its traceback
        prepare(Lines(), raw, cache, core=0)
