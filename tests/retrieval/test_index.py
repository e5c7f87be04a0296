"""Exact search and what holds for every index: order, ties, ends of lists, refusals."""

import logging

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.retrieval import index as index_module
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.index import Found, LocalIndex
from recsys_lightning.retrieval.measured import MeasuredIndex
from recsys_lightning.retrieval.torch_index import TorchIndex, best_places


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape, seed=0, largest=1):
    """Whole numbers, whose products are exact in float32 and often equal."""
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def by_full_sort(vectors, queries, k, similarity="inner_product", with_ties=False):
    """One stable sort of all scores for each query: lists of (score, item), best first, lower ids first."""
    if similarity == "cosine":
        vectors, queries = F.normalize(vectors, dim=-1), F.normalize(queries, dim=-1)
    lists = []
    for scores in (queries.double() @ vectors.double().T).float():
        order = scores.sort(descending=True, stable=True)
        places = list(zip(order.values.tolist(), (order.indices + 1).tolist(), strict=True))
        stop = min(k, len(places))
        while with_ties and stop < len(places) and places[stop][0] == places[stop - 1][0]:
            stop += 1
        lists.append(places[:stop])
    return lists


def read(found):
    """The lists as pairs, without the places behind their ends."""
    rows = zip(found.scores.tolist(), found.item_ids.tolist(), strict=True)
    return [[(s, i) for s, i in zip(*row, strict=True) if i] for row in rows]


@pytest.mark.parametrize("scores_at_once", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("seed", range(12))
def test_ids_and_scores_are_those_of_a_full_stable_sort(seed, scores_at_once):
    """Among whole numbers of small width, so that nearly every list has equal scores, also across its end."""
    g = torch.Generator().manual_seed(seed)
    items, rows, dim, k = (int(torch.randint(1, top, (), generator=g)) for top in (60, 14, 5, 25))
    vectors, queries = whole(items, dim, seed=seed), whole(rows, dim, seed=seed + 100)
    index = TorchIndex(vectors, scores_at_once=scores_at_once)
    found, tied = index.search(queries, k), index.search_with_ties(queries, k)
    assert found.scores.shape == found.item_ids.shape == (rows, k)
    assert read(found) == by_full_sort(vectors, queries, k)
    assert read(tied) == by_full_sort(vectors, queries, k, with_ties=True)
    assert tied.item_ids.shape[1] >= k


@pytest.mark.parametrize("similarity", ["inner_product", "cosine"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 40])
def test_real_numbers_are_ranked_as_by_a_full_sort(rows, similarity):
    """1,100 items: few and many queries go two ways through the matrix product, the first in blocks with a rest."""
    vectors, queries = random(1100, 16) * torch.arange(1, 1101)[:, None], random(rows, 16, seed=1)
    found = TorchIndex(vectors, similarity).search(queries, 30)
    expected = by_full_sort(vectors, queries, 30, similarity)
    assert found.item_ids.tolist() == [[item for _, item in row] for row in expected]
    torch.testing.assert_close(found.scores, torch.tensor([[score for score, _ in row] for row in expected]))


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 33])
@pytest.mark.parametrize("items", [7, 300, 1031])
def test_equal_vectors_have_equal_scores_wherever_they_stand(items, rows):
    vectors = random(items, 32)
    double = torch.cat([vectors, vectors])[torch.randperm(2 * items, generator=torch.Generator().manual_seed(1))]
    scores = TorchIndex(double).search(random(rows, 32, seed=2), 2 * items).scores
    assert torch.equal(scores[:, ::2], scores[:, 1::2])


def test_a_list_of_fewer_items_than_asked_ends_in_item_0():
    index = TorchIndex(torch.eye(2))
    for found in (index.search(torch.eye(2), 4), index.search_with_ties(torch.eye(2), 4)):
        assert found.item_ids.tolist() == [[1, 2, 0, 0], [2, 1, 0, 0]]
        assert found.scores.tolist() == [[1, 0, -torch.inf, -torch.inf]] * 2


def test_a_constant_model_gives_the_lowest_ids_and_all_items_when_ties_are_asked_for():
    index = TorchIndex(torch.zeros(500, 3))
    assert index.search(random(3, 3), 4).item_ids.tolist() == [[1, 2, 3, 4]] * 3
    assert index.search_with_ties(random(3, 3), 4).item_ids.tolist() == [list(range(1, 501))] * 3


def test_no_queries_give_no_lists():
    for similarity in ("inner_product", "cosine"):
        index = TorchIndex(random(300, 4), similarity)
        assert index.search(torch.empty(0, 4), 5).item_ids.shape == (0, 5)
        assert index.search_with_ties(torch.empty(0, 4), 5).scores.shape == (0, 5)


def test_ties_that_would_fill_the_memory_are_cut_with_one_warning_that_counts_them(monkeypatch, caplog):
    monkeypatch.setattr(index_module, "MAX_PLACES", 40)
    index = TorchIndex(torch.cat([torch.zeros(100, 2), torch.ones(3, 2)]))
    with caplog.at_level(logging.WARNING):
        found = index.search_with_ties(torch.ones(2, 2), 5)
    assert found.item_ids.shape == (2, 20)
    assert found.item_ids[:, :3].tolist() == [[101, 102, 103]] * 2
    assert (found.scores[:, 3:] == 0).all()
    assert [record.getMessage()[:41] for record in caplog.records] == ["17 or more items have the score of place "]
    caplog.clear()
    monkeypatch.setattr(index_module, "MAX_PLACES", 110)  # room for one list of all items: `search` goes row by row
    asked, real = [], TorchIndex._top
    monkeypatch.setattr(TorchIndex, "_top", lambda self, q, k: (asked.append(len(q) * k), real(self, q, k))[1])
    assert index.search(torch.ones(4, 2), 5).item_ids.tolist() == [[101, 102, 103, 1, 2]] * 4
    assert not caplog.records
    assert 103 <= max(asked) <= 110


def test_ids_begin_at_the_first_item_and_a_table_begins_at_its_padding():
    vectors, query = torch.eye(3), torch.tensor([[0.0, 2, 1]])
    shard = TorchIndex(vectors, first_item=8)
    assert shard.search(query, 2).item_ids.tolist() == [[9, 10]]
    assert (shard.item_ids.tolist(), shard.num_items, shard.dim) == ([8, 9, 10], 3, 3)
    table = F.pad(vectors, (0, 0, 1, 0))
    index = TorchIndex(table, first_item=0)
    assert index.search(query, 2).item_ids.tolist() == [[2, 3]]
    assert index.item_ids.tolist() == [1, 2, 3]


def test_the_table_is_the_one_the_index_was_built_from_or_is_made():
    table = F.pad(random(5, 3), (0, 0, 1, 0))
    assert TorchIndex(table, "cosine", first_item=0).table.data_ptr() == table.data_ptr()
    assert torch.equal(TorchIndex(table[1:]).table, table)
    with pytest.raises(InputError, match=r"all item vectors on every process: set index\.sharded: false"):
        _ = TorchIndex(table[3:], first_item=3).table


def test_cosine_leaves_the_vectors_as_they_were_and_ignores_their_length():
    vectors = random(50, 4)
    index = TorchIndex(vectors, "cosine")
    longer = TorchIndex(vectors * torch.arange(1, 51)[:, None], "cosine")
    assert torch.equal(index.vectors, vectors)
    found, other = index.search(random(6, 4, seed=3), 9), longer.search(7 * random(6, 4, seed=3), 9)
    assert torch.equal(found.item_ids, other.item_ids)
    torch.testing.assert_close(found.scores, other.scores)


def test_scores_are_full_precision_under_autocast_and_under_a_lower_matmul_precision(monkeypatch):
    vectors, queries = random(40, 64), random(20, 64, seed=1)
    plain = TorchIndex(vectors).search(queries, 5)
    precisions, real = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: (precisions.append(torch.get_float32_matmul_precision()), real(*a, **k))
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            mixed = TorchIndex(vectors).search(queries.bfloat16().float(), 5)
            again = TorchIndex(vectors).search(queries, 5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(precisions) == {"highest"}
    assert again.scores.dtype == mixed.scores.dtype == torch.float32
    assert torch.equal(again.scores, plain.scores)


def test_half_precision_vectors_and_queries_that_need_gradients_are_taken():
    vectors = random(9, 4).requires_grad_()
    found = TorchIndex(vectors.bfloat16()).search(random(2, 4).requires_grad_(), 3)
    assert found.scores.dtype == torch.float32
    assert not found.scores.requires_grad


@pytest.mark.parametrize("columns", [1, 5, 64, 100, 1000, 4097])
@pytest.mark.parametrize("k", [1, 3, 60])
def test_best_places_are_those_of_topk(columns, k):
    for scores in (random(6, columns), whole(6, columns, largest=20)):
        values, places = best_places(scores, min(k, columns))
        assert torch.equal(values, scores.topk(min(k, columns), dim=1).values)
        assert torch.equal(scores.gather(1, places), values)
        assert all(len(set(row)) == len(row) for row in places.tolist())


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (torch.empty(0, 3), "at least one item"),
        (torch.tensor([[1.0, 2], [torch.nan, 1], [torch.inf, 1]]), "item 2 holds NaN or infinity"),
        (torch.tensor([[1.0, 2], [3, 1], [1, -torch.inf]]), "item 3 holds NaN or infinity"),
    ],
)
def test_vectors_that_cannot_be_ranked_are_refused(vectors, says):
    with pytest.raises(InputError, match=says):
        TorchIndex(vectors)


def test_a_bad_item_of_a_table_or_shard_is_named_by_its_id_and_huge_vectors_are_taken():
    bad = torch.tensor([[0.0], [1], [torch.nan]])
    with pytest.raises(InputError, match="item 2 holds"):
        TorchIndex(bad, first_item=0)
    with pytest.raises(InputError, match="item 12 holds"):
        TorchIndex(bad, first_item=10)
    with pytest.raises(InputError, match=r"row 0 .* must be zero"):
        TorchIndex(torch.ones(3, 1), first_item=0)
    assert TorchIndex(torch.full((9, 9), 3e38)).search(torch.zeros(1, 9), 1).item_ids.tolist() == [[1]]


def test_queries_that_cannot_be_ranked_are_refused_in_every_search():
    index = TorchIndex(random(9, 3))
    good = random(4, 3)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = good.clone()
        bad[2, 1] = value
        for search in (index.search, index.search_with_ties):
            search(good, 2)
            with pytest.raises(InputError, match="query 2 "):
                search(bad, 2)
    for wrong in (random(2, 4), random(3)):
        with pytest.raises(InputError, match="width 3"):
            index.search(wrong, 2)
    for k in (0, -1):
        with pytest.raises(InputError, match=f"k={k}"):
            index.search_with_ties(good, k)


def test_scores_that_overflow_are_refused_by_query():
    index = TorchIndex(torch.full((4, 2), 1e30))
    with pytest.raises(InputError, match=r"query 1 .*finite"):
        index.search(torch.tensor([[1.0, 1], [1e30, 1]]), 2)


def test_an_unknown_similarity_is_refused():
    with pytest.raises(InputError, match="'dot' must be one of inner_product, cosine"):
        TorchIndex(torch.eye(2), "dot")


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"backend": "annoy"}, "backend='annoy' must be torch or faiss"),
        ({"gpus": "all", "backend": "faiss"}, "gpus='all' must be replicate or shard"),
        ({"factory": "HNSW32"}, r"index\.factory=HNSW32 needs index\.backend: faiss"),
        ({"parameters": "nprobe=4"}, r"index\.parameters=nprobe=4 needs index\.backend: faiss"),
        ({"gpus": "shard"}, r"index\.gpus=shard needs index\.backend: faiss"),
        ({"backend": "faiss", "parameters": "nprobe"}, "nprobe=16"),
        ({"backend": "faiss", "parameters": "nprobe=0"}, "positive"),
        ({"backend": "faiss", "parameters": "nprobe=-3"}, "positive"),
        ({"backend": "faiss", "parameters": "nprobe=4;efSearch=3"}, "positive"),
        ({"backend": "faiss", "parameters": ","}, "positive"),
        ({"sharded": True, "path": "x"}, r"index\.path: null or index\.sharded: false"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        IndexSettings(**settings)


def test_the_default_settings_search_exactly_in_torch():
    table = F.pad(random(30, 4), (0, 0, 1, 0))
    index = build_index(table, IndexSettings(), "cosine", first_item=0)
    assert isinstance(index, TorchIndex)
    assert index.exact
    assert read(index.search(table[4:5], 1))[0][0][1] == 4


# ------------------------------------------------------------------------------------------- measured recall


class Forgetful(LocalIndex):
    """Finds items of even id only, and gives no more than `limit` of them."""

    exact = False

    def _top(self, queries, k):
        scores = (queries @ self.vectors.T).masked_fill(self.item_ids % 2 == 1, -torch.inf)
        best = scores.topk(k, dim=1)
        return Found(best.values, self.item_ids[best.indices].masked_fill(best.values == -torch.inf, 0))


def test_what_an_index_cannot_find_leaves_places_at_the_end_empty():
    found = Forgetful(torch.ones(5, 1)).search_with_ties(torch.ones(1, 1), 3)
    assert read(found) == [[(1.0, 2), (1.0, 4)]]
    assert found.item_ids.shape == (1, 3)


@pytest.mark.parametrize("ask", ["search", "search_with_ties"])
def test_recall_is_the_share_of_the_exact_lists_that_was_found(ask):
    vectors, queries = random(40, 4), random(30, 4, seed=1)
    index = MeasuredIndex(Forgetful(vectors), TorchIndex(vectors), limit=1000)
    assert index.recall != index.recall  # NaN: nothing asked yet
    answer = torch.cat([getattr(index, ask)(part, 10).item_ids for part in queries.split(7)])
    expected = by_full_sort(vectors, queries, 10)
    even = sum(item % 2 == 0 for row in expected for _, item in row)
    assert (index.found, index.wanted, index.recall) == (even, 300, even / 300)
    assert torch.equal(answer, Forgetful(vectors).search(queries, 10).item_ids)
    assert not index.exact


def test_recall_is_measured_on_the_first_queries_only_and_on_as_many_items_as_there_are():
    vectors = random(6, 4)
    index = MeasuredIndex(Forgetful(vectors), TorchIndex(vectors), limit=5)
    for rows in (3, 4, 2):
        index.search(random(rows, 4, seed=rows), 10)
    assert (index.found, index.wanted) == (5 * 3, 5 * 6)


def test_only_two_indexes_of_the_same_items_can_be_compared():
    with pytest.raises(ValueError, match="same items"):
        MeasuredIndex(TorchIndex(torch.eye(2)), TorchIndex(torch.eye(3)))
