"""Reciprocal rank fusion against sums done by hand."""

import pytest
import torch

from recsys_lightning.retrieval.rank_fusion import reciprocal_rank_fusion
from recsys_lightning.retrieval.recommendations import Generated, Recommendations

INF = torch.inf


def test_ranks_add_up_and_equals_share_the_best_rank_of_theirs():
    one = Recommendations(torch.tensor([[5, 2, 3, 0]]), torch.tensor([[9.0, 7.0, 7.0, -INF]]))  # ranks 1, 2, 2
    other = Recommendations(torch.tensor([[3, 8]]), torch.tensor([[0.5, 0.1]]))  # ranks 1, 2
    found = reciprocal_rank_fusion([one, other], 4)
    expected = {5: 1 / 61, 2: 1 / 62, 3: 1 / 62 + 1 / 61, 8: 1 / 62}
    assert found.item_ids.tolist() == [[3, 5, 2, 8]]
    assert found.scores[0].tolist() == pytest.approx([expected[item] for item in (3, 5, 2, 8)])


def test_a_smaller_constant_favours_the_first_places():
    one = Recommendations(torch.tensor([[1, 2, 3]]), torch.tensor([[3.0, 2.0, 1.0]]))
    other = Recommendations(torch.tensor([[4, 2, 3]]), torch.tensor([[3.0, 2.0, 1.0]]))
    assert reciprocal_rank_fusion([one, other], 4).item_ids[0, 0] == 2
    assert reciprocal_rank_fusion([one, other], 4, constant=-0.5).item_ids[0, 0] == 1


def test_lists_are_closed_under_ties_and_end_in_item_0():
    lists = [
        Recommendations(torch.tensor([[1, 2], [7, 0]]), torch.tensor([[1.0, 1.0], [1.0, -INF]])),
        Recommendations(torch.tensor([[3, 4], [7, 6]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])),
    ]
    found = reciprocal_rank_fusion(lists, 1)
    assert found.item_ids.tolist() == [[1, 2, 3], [7, 0, 0]]
    assert found.scores[1].tolist() == [pytest.approx(2 / 61), -INF, -INF]


def test_what_was_generated_is_kept():
    generated = Generated(torch.tensor([[4]]), torch.tensor([[-1.0]]))
    plain = Recommendations(torch.tensor([[1]]), torch.tensor([[1.0]]))
    assert reciprocal_rank_fusion([plain, plain._replace(generated=generated)], 1).generated is generated
