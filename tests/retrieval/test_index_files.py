"""A kept index is taken again as it was, or refused in one line."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval import index_files
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.index_files import load_index, save_index
from recsys_lightning.retrieval.torch_index import TorchIndex

ITEMS = 60
RAW_IDS = [f"raw{i}" for i in range(1, ITEMS + 1)]
CHECKPOINT, OTHER = "a" * 64, "b" * 64
TORCH = IndexSettings()
FAISS = IndexSettings(backend="faiss", factory="IVF4,Flat", parameters="nprobe=2")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[TORCH, FAISS], ids=["torch", "faiss"])
def settings(request):
    if request.param is FAISS:
        pytest.importorskip("faiss")
    return request.param


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "new" / "index"


@pytest.fixture
def kept(settings, folder):
    """An index that lies in `folder`."""
    index = build_index(F.pad(random(ITEMS, 8), (0, 0, 1, 0)), settings, "cosine", first_item=0)
    save_index(index, folder, settings, CHECKPOINT, RAW_IDS)
    return index


def load(folder, settings, similarity="cosine", fingerprint=CHECKPOINT, raw_ids=RAW_IDS):
    return load_index(folder, settings, similarity, fingerprint, raw_ids)


def test_an_index_comes_back_as_it_was(kept, folder, settings):
    again = load(folder, settings)
    assert type(again) is type(kept)
    for k in (5, 70):
        for found, expected in zip(again.search(random(9, 8), k), kept.search(random(9, 8), k), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(again.table, kept.table)
    assert torch.equal(again.item_ids, kept.item_ids)
    assert (again.similarity, again.exact) == ("cosine", kept.exact)
    assert torch.equal(load(folder, settings, raw_ids=None).table, kept.table)


def test_faiss_is_not_built_again_and_parameters_may_change(tmp_path, monkeypatch):
    faiss_index = pytest.importorskip("recsys_lightning.retrieval.faiss_index")
    save_index(build_index(random(ITEMS, 8), FAISS, "cosine"), tmp_path / "index", FAISS, CHECKPOINT)
    monkeypatch.setattr(faiss_index.FaissIndex, "_build", lambda self: pytest.fail("built again"))
    wider = IndexSettings(backend="faiss", factory="IVF4,Flat", parameters="nprobe=4")
    found = load(tmp_path / "index", wider, raw_ids=None).search(random(9, 8, seed=1), 8)
    exact = TorchIndex(random(ITEMS, 8), "cosine").search(random(9, 8, seed=1), 8)
    assert torch.equal(found.item_ids, exact.item_ids)
    fewer = load(tmp_path / "index", FAISS, raw_ids=None).search(random(9, 8, seed=1), 8)
    assert not torch.equal(fewer.item_ids, exact.item_ids)


def test_parameters_that_are_named_no_more_are_asked_for(tmp_path):
    pytest.importorskip("faiss")
    save_index(build_index(random(ITEMS, 8), FAISS, "cosine"), tmp_path / "index", FAISS, CHECKPOINT)
    plain = IndexSettings(backend="faiss", factory="IVF4,Flat")
    with pytest.raises(InputError, match=r"parameters=nprobe=2; give nprobe a value"):
        load(tmp_path / "index", plain, raw_ids=None)


def test_another_checkpoint_is_refused_with_both_fingerprints_and_the_cure(kept, folder, settings):
    with pytest.raises(
        InputError, match=rf"\({'a' * 12}\).*\({'b' * 12}\); remove the folder or name another"
    ) as error:
        load(folder, settings, fingerprint=OTHER)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw_ids", "says"),
    [
        ([*RAW_IDS[:9], "else", *RAW_IDS[10:]], "another catalogue .item 10 is 'raw10' there and 'else' here"),
        (RAW_IDS[:-1], "60 items there, 59 here"),
        ([*RAW_IDS, "more"], "60 items there, 61 here"),
    ],
)
def test_another_catalogue_is_refused(kept, folder, settings, raw_ids, says):
    with pytest.raises(InputError, match=says):
        load(folder, settings, raw_ids=raw_ids)


def test_a_catalogue_cannot_be_compared_with_an_index_without_raw_ids(tmp_path):
    save_index(TorchIndex(random(5, 2)), tmp_path / "index", TORCH, CHECKPOINT)
    with pytest.raises(InputError, match="without raw ids"):
        load(tmp_path / "index", TORCH, "inner_product", raw_ids=list("abcde"))
    with pytest.raises(ValueError, match="3 raw ids for 5 items"):
        save_index(TorchIndex(random(5, 2)), tmp_path / "other", TORCH, CHECKPOINT, list("abc"))


def test_other_settings_are_refused(kept, folder, settings):
    with pytest.raises(InputError, match="similarity=cosine, not inner_product"):
        load(folder, settings, similarity="inner_product")
    other = FAISS if settings is TORCH else TORCH
    with pytest.raises(InputError, match=f"backend={settings.backend}, not {other.backend}"):
        load(folder, other)
    if settings is FAISS:
        with pytest.raises(InputError, match="factory=IVF4,Flat, not HNSW8"):
            load(folder, IndexSettings(backend="faiss", factory="HNSW8"))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_missing_file_or_folder_is_named(kept, folder, settings):
    expected = ["meta.json", "raw_ids.json", "vectors.safetensors"]
    assert files(folder) == (expected if settings is TORCH else ["index.faiss", *expected])
    for name in files(folder):
        copy = folder.with_name(f"without-{name}")
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        with pytest.raises(InputError, match=f"{name}.*remove the folder"):
            load(copy, settings)
    with pytest.raises(InputError, match="no index at"):
        load(folder / "deeper", settings)


def test_every_truncated_or_altered_file_is_refused(kept, folder, settings):
    """Each file cut short at 12 places, and one bit of each of 40 bytes turned over."""
    g = torch.Generator().manual_seed(0)
    for name in files(folder):
        path = folder / name
        whole = path.read_bytes()
        for cut in torch.randint(0, len(whole), (12,), generator=g).tolist():
            path.write_bytes(whole[:cut])
            with pytest.raises(InputError, match="remove the folder"):
                load(folder, settings)
        for place in torch.randint(0, len(whole), (40,), generator=g).tolist():
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            if name == "meta.json" and same_json(path, whole):
                continue
            with pytest.raises(InputError, match="remove the folder"):
                load(folder, settings)
        path.write_bytes(whole)
    load(folder, settings)


def same_json(path, whole):
    """Whether a bit fell on white space between the values, which nothing depends on."""
    try:
        return json.loads(path.read_text()) == json.loads(whole)
    except ValueError:
        return False


def test_a_folder_of_another_format_is_refused(kept, folder, settings, monkeypatch):
    monkeypatch.setattr(index_files, "FORMAT", 99)
    with pytest.raises(InputError, match="has format 1, and this version reads 99"):
        load(folder, settings)


def test_a_write_that_fails_leaves_nothing_behind(settings, folder, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    index = build_index(random(ITEMS, 8), settings, "cosine")
    monkeypatch.setattr(index_files, "sync_folder", full)
    with pytest.raises(InputError, match=r"cannot write .*no space left.*index\.path"):
        save_index(index, folder, settings, CHECKPOINT)
    assert not list(folder.parent.iterdir())


def test_the_same_index_may_be_kept_twice_and_another_is_not_written_over(kept, folder, settings):
    save_index(kept, folder, settings, CHECKPOINT, RAW_IDS)
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with pytest.raises(InputError, match="holds another index; remove the folder"):
        save_index(kept, folder, settings, OTHER, RAW_IDS)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before
    assert files(folder.parent) == ["index"]


def test_a_slice_of_the_items_is_not_kept(folder):
    with pytest.raises(InputError, match="all item vectors"):
        save_index(TorchIndex(random(5, 2), first_item=3), folder, TORCH, CHECKPOINT)
