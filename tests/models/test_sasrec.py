"""SASRec: what a state may see, what its losses are, and retrieval against scoring every item."""

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.models.sasrec import SASRec

HISTORIES = [3, 7, 9, 20], [11, 12], [5, 6, 7, 8, 30, 31]


@pytest.fixture
def build(catalog):
    def make(**settings):
        torch.manual_seed(0)
        return SASRec(catalog, **({"dim": 16, "max_history": 8} | settings)).eval()

    return make


def states_of(model, items):
    """The state after each item of one user, from the embeddings on."""
    embedded = model.item.weight[items] * 4 + model.position.weight[: len(items)]  # 4 = sqrt(16)
    return model.encoder(embedded[None])[0][0]


def test_cross_entropy_is_the_mean_over_every_next_item(build, batch_of):
    model = build()
    terms = []
    for history, answer in zip(HISTORIES, [4, 13, 9], strict=True):
        for state, target in zip(states_of(model, history), [*history[1:], answer], strict=True):
            terms.append(-(model.item.weight[1:] @ state).log_softmax(0)[target - 1])
    found = model.losses(batch_of(*HISTORIES, targets=[4, 13, 9]))
    torch.testing.assert_close(found["next_item"], torch.stack(terms).mean())


def test_bce_sets_each_answer_against_one_drawn_item(build, batch_of):
    model = build(loss="bce")
    batch = batch_of([3, 7], targets=[9])
    torch.manual_seed(5)
    drawn = torch.randint(1, 38, (2,))
    torch.manual_seed(5)
    found = model.losses(batch)["next_item"]
    terms = [
        F.logsigmoid(state @ model.item.weight[right]) + F.logsigmoid(-(state @ model.item.weight[wrong]))
        for state, right, wrong in zip(states_of(model, [3, 7]), [7, 9], drawn, strict=True)
    ]
    torch.testing.assert_close(found, -torch.stack(terms).mean())


@pytest.mark.parametrize("width", [6, 8])
def test_padding_and_company_change_nothing(build, batch_of, width):
    model = build()
    index = model.build_index()
    together = model.recommend(batch_of(*HISTORIES, width=width), 10, index)
    for row, history in enumerate(HISTORIES):
        alone = model.recommend(batch_of(history), 10, index)
        assert alone.item_ids[0].tolist() == together.item_ids[row].tolist()


def test_recommendations_are_the_largest_products_with_the_last_state(build, batch_of):
    model = build()
    found = model.recommend(batch_of(*HISTORIES), 37, model.build_index())
    for row, history in enumerate(HISTORIES):
        scores = model.item.weight[1:] @ states_of(model, history)[-1]
        assert found.item_ids[row].tolist() == (scores.argsort(descending=True) + 1).tolist()


def test_the_answer_is_never_looked_at(build, batch_of):
    model = build()
    index = model.build_index()
    lists = [model.recommend(batch_of([3, 7], targets=[t]), 5, index).item_ids for t in (1, 30)]
    assert torch.equal(*lists)


def test_every_setting_changes_something(build, batch_of):
    batch = batch_of(*HISTORIES, targets=[4, 13, 9])
    plain = float(build().losses(batch)["next_item"])
    for settings in ({"dim": 8}, {"num_layers": 1}, {"num_heads": 4}, {"loss": "bce"}):
        assert float(build(**settings).losses(batch)["next_item"]) != plain, settings
    noisy = build(dropout=0.9).train()
    assert float(noisy.losses(batch)["next_item"]) != plain


def test_bad_input_is_named(build, catalog, batch_of):
    with pytest.raises(InputError, match=r"dim=16 must be a multiple of num_heads=3"):
        build(num_heads=3)
    with pytest.raises(InputError, match="user 1 has an empty history"):
        build().recommend(batch_of([3], []), 5, build().build_index())
    with pytest.raises(InputError, match=r"9 items.*positions for 8.*max_history"):
        build().losses(batch_of([1] * 9, targets=[2]))


def test_no_answers_give_a_loss_of_zero_and_not_nan(build, batch_of):
    empty = batch_of([3], targets=[0])
    for loss in ("cross_entropy", "bce"):
        assert float(build(loss=loss).losses(empty)["next_item"]) == 0.0
