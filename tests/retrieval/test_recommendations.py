"""Ranked lists: struck items, and equal scores that no list may cut in two."""

import pytest
import torch

from recsys_lightning.retrieval.recommendations import Recommendations, rank_candidates


def test_struck_items_leave_the_order_of_the_others():
    lists = Recommendations(
        torch.tensor([[5, 3, 9, 1], [2, 7, 0, 0]]), torch.tensor([[4.0, 3.0, 2.0, 1.0], [2.0, 1.0, -1, -1]])
    )
    kept = lists.without(torch.tensor([[3, 5, 0], [0, 0, 0]])).first(3)
    assert kept.item_ids.tolist() == [[9, 1, 0], [2, 7, 0]]
    assert kept.scores.tolist() == [[2.0, 1.0, -torch.inf], [2.0, 1.0, -torch.inf]]


def test_many_seen_items_give_the_same_as_a_python_loop():
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(300, generator=g)[:120] + 1 for _ in range(5)])
    seen = torch.randint(0, 301, (5, 150), generator=g)
    kept = Recommendations(ids, torch.arange(120.0).flip(0).expand(5, -1)).without(seen).first(40)
    for row in range(5):
        expected = [i for i in ids[row].tolist() if i not in set(seen[row].tolist())][:40]
        assert kept.item_ids[row].tolist() == expected + [0] * (40 - len(expected))


@pytest.mark.parametrize("k", [1, 3, 8, 20])
@pytest.mark.parametrize("different", [1, 2, 5, 1000], ids=lambda n: f"{n} different scores")
def test_candidates_are_sorted_and_equals_of_the_last_place_are_all_there(k, different):
    g = torch.Generator().manual_seed(k)
    ids = torch.stack([torch.randperm(40, generator=g)[:20] + 1 for _ in range(30)])
    scores = torch.randint(0, different, ids.shape, generator=g).float()
    ended = torch.rand(ids.shape, generator=g) < 0.3
    ids, scores = ids.masked_fill(ended, 0), scores.masked_fill(ended, -torch.inf)
    found = rank_candidates(ids, scores, k)
    for row in range(30):
        real = [(-float(s), int(i)) for s, i in zip(scores[row], ids[row], strict=True) if i > 0]
        last = sorted(real)[: min(k, len(real))][-1][0] if real else 0.0
        expected = [item for score, item in sorted(real) if score <= last]
        assert found.item_ids[row].tolist() == expected + [0] * (found.item_ids.shape[1] - len(expected))
        assert found.scores[row].tolist() == sorted(found.scores[row].tolist(), reverse=True)


def test_no_more_places_than_candidates():
    found = rank_candidates(torch.tensor([[4, 2]]), torch.tensor([[1.0, 1.0]]), 10)
    assert found.item_ids.tolist() == [[2, 4]]
