"""FAISS behind the same interface as torch."""

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.torch_index import TorchIndex

faiss = pytest.importorskip("faiss")

from recsys_lightning.retrieval import faiss_index  # noqa: E402
from recsys_lightning.retrieval.faiss_index import FaissIndex  # noqa: E402


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape, seed=0):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def recall(index, vectors, queries, k=10):
    exact = TorchIndex(vectors).search(queries, k).item_ids
    found = index.search(queries, k).item_ids
    return float((exact[:, :, None] == found[:, None]).any(-1).float().mean())


@pytest.mark.parametrize("similarity", ["inner_product", "cosine"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_an_exhaustive_index_answers_as_torch_does(factory, similarity):
    vectors, queries = random(400, 8), random(50, 8, seed=1)
    parameters = "nprobe=8" if "IVF" in factory else ""
    found = FaissIndex(vectors, similarity, factory, parameters).search(queries, 12)
    exact = TorchIndex(vectors, similarity).search(queries, 12)
    assert torch.equal(found.item_ids, exact.item_ids)
    torch.testing.assert_close(found.scores, exact.scores)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_equal_scores_are_ordered_and_closed_as_in_torch(factory):
    vectors, queries = whole(200, 3), whole(30, 3, seed=1)
    index = FaissIndex(vectors, factory=factory, parameters="nprobe=4" if "IVF" in factory else "", first_item=5)
    exact = TorchIndex(vectors, first_item=5)
    for k in (1, 7, 250):
        for ask in ("search", "search_with_ties"):
            found, expected = getattr(index, ask)(queries, k), getattr(exact, ask)(queries, k)
            assert torch.equal(found.item_ids, expected.item_ids)
            assert torch.equal(found.scores, expected.scores)


def test_only_a_flat_index_calls_itself_exact():
    vectors = random(400, 8)
    assert FaissIndex(vectors).exact
    assert not any(FaissIndex(vectors, factory=name).exact for name in ("IVF4,Flat", "HNSW8", "SQ8", "PQ4x4"))


def test_parameters_change_the_search():
    vectors, queries = random(2000, 16), random(100, 16, seed=1)
    few, many = (
        recall(FaissIndex(vectors, "cosine", "IVF40,Flat", f"nprobe={n}"), F.normalize(vectors), queries)
        for n in (1, 20)
    )
    assert few < 0.6 < 0.9 < many
    few, many = (
        recall(FaissIndex(vectors, "inner_product", "HNSW4", f"efSearch={n}"), vectors, queries) for n in (10, 300)
    )
    assert few + 0.1 < many


def test_parameters_reach_an_index_behind_a_transform():
    vectors, queries = random(500, 8), random(40, 8, seed=1)
    one, all_ = (FaissIndex(vectors, factory="OPQ4,IVF10,Flat", parameters=f"nprobe={n}") for n in (1, 10))
    assert recall(one, vectors, queries) < recall(all_, vectors, queries) == 1


def test_hnsw_finds_nearly_all():
    vectors, queries = F.normalize(random(2000, 16)), random(100, 16, seed=1)
    assert recall(FaissIndex(vectors, "cosine", "HNSW32", "efSearch=64"), vectors, queries) > 0.9


def test_cells_that_are_not_visited_leave_places_empty():
    vectors = random(400, 4)
    index = FaissIndex(vectors, factory="IVF10,Flat")  # nprobe is 1
    found = index.search(random(20, 4, seed=1), 300)
    assert (found.item_ids == 0).any(1).all()
    assert torch.equal(found.item_ids == 0, found.scores == -torch.inf)
    for row in found.item_ids.tolist():
        real = [item for item in row if item]
        assert row[: len(real)] == real
        assert len(set(real)) == len(real)


def test_no_queries_and_bad_queries_are_treated_as_in_torch():
    index = FaissIndex(random(30, 4))
    assert index.search(torch.empty(0, 4), 3).item_ids.shape == (0, 3)
    with pytest.raises(InputError, match="query 1 "):
        index.search(torch.tensor([[0.0] * 4, [torch.nan] * 4]), 3)


@pytest.mark.parametrize(
    ("factory", "parameters", "says"),
    [
        ("Flatt", "", "'Flatt' is nothing that FAISS can build.*could not parse"),
        ("IVF10,PQ3", "", "'IVF10,PQ3'.*multiple of the number"),
        ("IVF512,Flat", "", "at least 512 items .* there are 300; .* such as IVF7"),
        ("PQ4", "", r"'PQ4' from 100 items.*\(100\).*\(256\)"),
        ("IDMap,Flat", "", "'IDMap,Flat'"),
        ("Flat", "nprobe=4", "'nprobe=4' do not fit index.factory='Flat'"),
        ("IVF4,Flat", "nprobe=4,efsearch=3", "do not fit"),
    ],
)
def test_what_faiss_refuses_is_said_in_one_line(factory, parameters, says):
    with pytest.raises(InputError, match=says) as error:
        FaissIndex(random(100 if factory == "PQ4" else 300, 8), factory=factory, parameters=parameters)
    assert "\n" not in str(error.value)
    assert ".cpp" not in str(error.value)


def test_settings_reach_the_index():
    vectors = random(400, 8)
    index = build_index(
        vectors, IndexSettings(backend="faiss", factory="IVF10,Flat", parameters="nprobe=3"), "cosine", first_item=4
    )
    assert isinstance(index, FaissIndex)
    assert (index.factory, index.parameters, index.similarity) == ("IVF10,Flat", "nprobe=3", "cosine")
    assert faiss.extract_index_ivf(index._built).nprobe == 3
    assert index.item_ids[0] == 4


def test_two_distributions_at_once_are_refused_with_the_cure(monkeypatch):
    def version(name):
        if name not in ("faiss-cpu", "faiss-gpu"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.15.1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(InputError, match=r"faiss-cpu and faiss-gpu .* pip uninstall -y faiss-cpu faiss-gpu"):
        FaissIndex(random(5, 2))


def test_without_faiss_the_extras_and_the_torch_backend_are_named():
    """In a process of its own, since an import happens once."""
    program = """
import sys
sys.modules["faiss"] = None
import torch
from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.build import IndexSettings, build_index
build_index(torch.eye(2), IndexSettings(), "cosine")
try:
    build_index(torch.eye(2), IndexSettings(backend="faiss"), "cosine")
except InputError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert all(part in said for part in ("[cpu]", "[gpu]", "index.backend: torch"))
    assert said.count("\n") == 1


def test_torch_is_imported_before_faiss():
    """The other way round a forked data loader worker hangs; the module says why."""
    source = Path(faiss_index.__file__).read_text(encoding="utf-8")
    assert 0 < source.index("\nimport torch\n") < source.index("import faiss\n")


# ----------------------------------------------------------------- GPUs, played by stand-ins: FAISS here sees none


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that hold what they are given; `moves` lists how they were asked, `spoil` changes what they answer."""
    state = types.SimpleNamespace(moves=[], spoil=lambda index: index)

    def to_gpus(index, co, gpus):
        state.moves.append((co.shard, gpus))
        return state.spoil(index)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", types.SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpus_list", to_gpus)
    return state


def test_an_index_goes_to_all_gpus_whole_or_in_shares(gpus):
    vectors, queries = random(300, 8), random(9, 8, seed=1)
    for how in ("replicate", "shard"):
        found = FaissIndex(vectors, factory="IVF4,Flat", parameters="nprobe=4", gpus=how).search(queries, 5)
        assert torch.equal(found.item_ids, TorchIndex(vectors).search(queries, 5).item_ids)
    assert gpus.moves == [(False, [0, 1]), (True, [0, 1])]


def test_one_of_several_processes_takes_its_own_gpu_only(gpus, monkeypatch):
    monkeypatch.setattr(faiss_index, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    FaissIndex(random(30, 8))
    assert gpus.moves == [(False, [1])]


def test_hnsw_and_what_faiss_cannot_move_stay_on_the_cpu(gpus, caplog):
    def refuse(index):
        raise RuntimeError("This index type is not implemented on GPU.")

    gpus.spoil = refuse
    vectors = random(300, 8)
    assert FaissIndex(vectors, factory="HNSW8").search(vectors[:1], 1).item_ids.shape == (1, 1)
    assert not gpus.moves
    assert FaissIndex(vectors, factory="SQ8").search(vectors[:1], 1).item_ids.shape == (1, 1)
    assert "keeps SQ8 on the CPU" in caplog.text


def test_an_index_that_comes_back_empty_from_the_gpus_is_no_index(gpus):
    gpus.spoil = lambda index: faiss.IndexFlatIP(8)
    with pytest.raises(RuntimeError, match="moved 0 of 30"):
        FaissIndex(random(30, 8))


def test_a_list_longer_than_gpus_can_give_is_refused_and_shorter_ones_are_closed(gpus, monkeypatch):
    monkeypatch.setattr(faiss_index, "GPU_LIMIT", 16)
    index, exact, query = FaissIndex(whole(30, 1)), TorchIndex(whole(30, 1)), torch.ones(1, 1)
    for k in (16, 30, 50):
        with pytest.raises(InputError, match="at most 15 of its 30"):
            index.search(query, k)
    real = random(30, 1)
    assert torch.equal(FaissIndex(real).search(query, 15).item_ids, TorchIndex(real).search(query, 15).item_ids)
    assert torch.equal(index.search_with_ties(query, 2).item_ids, exact.search_with_ties(query, 2).item_ids)
    assert FaissIndex(whole(16, 1)).search(query, 20).item_ids.shape == (1, 20)


def test_a_gpu_build_that_sees_no_gpu_searches_on_the_cpu(gpus, monkeypatch):
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    FaissIndex(random(30, 8))
    assert not gpus.moves
