"""Striking items from ranked lists."""

import torch

from recsys_lightning.retrieval.recommendations import Recommendations


def test_struck_items_leave_the_order_of_the_others():
    lists = Recommendations(
        torch.tensor([[5, 3, 9, 1], [2, 7, 0, 0]]), torch.tensor([[4.0, 3.0, 2.0, 1.0], [2.0, 1.0, -1, -1]])
    )
    kept = lists.without(torch.tensor([[3, 5, 0], [0, 0, 0]]), k=3)
    assert kept.item_ids.tolist() == [[9, 1, 0], [2, 7, 0]]
    assert kept.scores.tolist() == [[2.0, 1.0, -torch.inf], [2.0, 1.0, -torch.inf]]


def test_many_seen_items_give_the_same_as_a_python_loop():
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(300, generator=g)[:120] + 1 for _ in range(5)])
    seen = torch.randint(0, 301, (5, 150), generator=g)
    kept = Recommendations(ids, torch.arange(120.0).flip(0).expand(5, -1)).without(seen, 40)
    for row in range(5):
        expected = [i for i in ids[row].tolist() if i not in set(seen[row].tolist())][:40]
        assert kept.item_ids[row].tolist() == expected + [0] * (40 - len(expected))
