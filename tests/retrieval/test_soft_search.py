"""Soft search: the lists of a user's interest queries become one list."""

import pytest
import torch
from torch import Tensor

from recsys_lightning.retrieval.index import Found
from recsys_lightning.retrieval.soft_search import max_merge, soft_search
from recsys_lightning.retrieval.torch_index import TorchIndex


def numbers(*shape: int, seed: int = 0, whole: bool = False) -> Tensor:
    """Random numbers; whole ones from -2 to 2 give many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-2, 3, shape, generator=generator).float() if whole else torch.randn(shape, generator=generator)
    )


def by_full_sort(queries: Tensor, table: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """The k items of the best score over a user's queries, by sorting all items: score, then lower id."""
    scores, ids = [], []
    for user in queries:
        best = [(-max(float(query @ vector) for query in user), item) for item, vector in enumerate(table) if item > 0]
        ids.append([item for _, item in sorted(best)[:k]])
        scores.append([-score for score, _ in sorted(best)[:k]])
    return scores, ids


@pytest.mark.parametrize("whole", [False, True], ids=["random", "many ties"])
@pytest.mark.parametrize("num_queries", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_soft_search_is_the_exact_top_k_of_the_best_score_over_the_queries(whole, num_queries, k):
    table, queries = numbers(31, 3, whole=whole), numbers(6, num_queries, 3, seed=1, whole=whole)
    found = soft_search(TorchIndex(table[1:]), queries, k)
    scores, ids = by_full_sort(queries, table, k)
    torch.testing.assert_close(found.scores, torch.tensor(scores))
    assert found.item_ids.tolist() == ids


def test_one_query_is_a_plain_search():
    index = TorchIndex(numbers(50, 4))
    queries = numbers(8, 4, seed=1)
    soft, plain = soft_search(index, queries[:, None], 10), index.search(queries, 10)
    assert torch.equal(soft.scores, plain.scores)
    assert torch.equal(soft.item_ids, plain.item_ids)


def test_an_item_that_every_query_finds_is_there_once_with_its_best_score():
    table = torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 3.0], [-1.0, -1.0]])
    index = TorchIndex(table[1:])
    found = soft_search(index, torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), 2)
    assert found.item_ids.tolist() == [[2, 1]]
    assert found.scores.tolist() == [[6.0, 3.0]]


def test_shorter_lists_of_the_queries_are_merged_and_the_list_is_filled_up_with_padding():
    table = torch.tensor([[0.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    index = TorchIndex(table[1:])
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 0.0]]])
    found = soft_search(index, queries, 3, per_query=1)  # item 2 is second for a query and so in no list
    assert found.item_ids.tolist() == [[1, 3, 0], [1, 0, 0]]
    assert found.scores.tolist() == [[3.0, 1.0, -torch.inf], [6.0, -torch.inf, -torch.inf]]


def test_all_queries_of_all_users_go_into_one_search():
    class Counting:
        calls: list[tuple[int, ...]] = []  # noqa: RUF012

        def search(self, queries: Tensor, k: int) -> Found:
            self.calls.append((*queries.shape, k))
            return Found(torch.zeros(len(queries), k), torch.arange(1, k + 1).expand(len(queries), k))

    soft_search(Counting(), torch.zeros(5, 3, 2), 4, per_query=6)
    assert Counting.calls == [(15, 2, 6)]


def test_merged_lists_hold_no_repeats_and_padding_takes_no_place():
    scores = torch.tensor([[1.0, 5.0, 2.0, -torch.inf, 5.0, -torch.inf], [-torch.inf] * 6])
    item_ids = torch.tensor([[7, 4, 7, 0, 3, 0], [0] * 6])
    found = max_merge(scores, item_ids, 4)
    assert found.item_ids.tolist() == [[3, 4, 7, 0], [0, 0, 0, 0]]
    assert found.scores[0].tolist() == [5.0, 5.0, 2.0, -torch.inf]
    assert (found.scores[1] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(4, 3), (4, 0, 3)])
def test_queries_of_another_shape_are_refused_by_name(shape):
    index = TorchIndex(numbers(9, 3))
    with pytest.raises(ValueError, match=r"users, queries of a user, width"):
        soft_search(index, torch.zeros(shape), 2)


def test_a_list_without_places_is_refused():
    index = TorchIndex(numbers(9, 3))
    with pytest.raises(ValueError, match="per_query=0 must be at least 1"):
        soft_search(index, torch.zeros(1, 2, 3), 2, per_query=0)
