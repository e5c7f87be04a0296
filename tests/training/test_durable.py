"""A checkpoint is whole or absent, and one that is damaged is never gone on from."""

import errno
import random
from pathlib import Path

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.training import durable
from recsys_lightning.training.durable import DurableCheckpointIO, damage, newest


def state(step: int) -> dict[str, object]:
    return {"global_step": step, "state_dict": {"weight": torch.full((300,), float(step))}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, step in {"best": 4, "last": 8, "resume": 6}.items():
        DurableCheckpointIO().save_checkpoint(state(step), tmp_path / f"{name}.ckpt")
    return tmp_path


def test_the_checkpoint_of_the_highest_step_is_the_newest(folder):
    assert newest(folder) == folder / "last.ckpt"
    DurableCheckpointIO().save_checkpoint(state(9), folder / "resume.ckpt")
    assert newest(folder) == folder / "resume.ckpt"


def test_of_two_of_one_step_the_one_that_a_signal_left_is_taken(folder):
    DurableCheckpointIO().save_checkpoint(state(8), folder / "resume.ckpt")
    assert newest(folder) == folder / "resume.ckpt"


def test_where_there_is_none_there_is_none(tmp_path):
    assert newest(tmp_path) is None


def test_every_cut_and_every_flipped_bit_is_noticed(folder):
    path, rng = folder / "last.ckpt", random.Random(0)
    whole = path.read_bytes()
    assert damage(path) is None
    for _ in range(100):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        assert damage(path) is not None
    # In the bytes of the weights: torch.load would give other weights without a word.
    start = whole.index(torch.full((300,), 8.0).numpy().tobytes())
    for _ in range(100):
        broken = bytearray(whole)
        broken[start + rng.randrange(1200)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(broken))
        torch.load(path, weights_only=True)
        assert "checksum" in str(damage(path))


def test_a_damaged_one_is_passed_over_and_named(folder, caplog):
    path = folder / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-50])
    assert newest(folder) == folder / "resume.ckpt"
    assert "last.ckpt is damaged and is passed over" in caplog.text


def test_where_all_are_damaged_nothing_is_begun_anew_over_them(folder):
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole: best.ckpt, last.ckpt, resume.ckpt"):
        newest(folder)


def test_what_was_there_stays_if_a_checkpoint_cannot_be_written(folder, monkeypatch):
    def full(checkpoint, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*last.ckpt.*No space left on device.*untouched"):
        DurableCheckpointIO().save_checkpoint(state(10), folder / "last.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "resume.ckpt"]
    assert damage(folder / "last.ckpt") is None


def test_what_a_killed_process_left_half_written_is_removed_by_the_next(folder):
    (folder / ".last.ckpt.0123.tmp").write_bytes(b"half of it")
    (folder / "notes.tmp").write_bytes(b"mine")
    DurableCheckpointIO().save_checkpoint(state(10), folder / "last.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", "notes.tmp", "resume.ckpt"]
