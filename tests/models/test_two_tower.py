"""The plain two-tower model: what it learns from written as loops, and retrieval against scoring every item."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.data.users import UserFeatures
from recsys_lightning.errors import InputError
from recsys_lightning.models.two_tower import PairObjective, TwoTower, UserSettings
from recsys_lightning.nn.item_tower import FeatureItemEncoder

HISTORIES, TARGETS = ([3, 7, 9, 20], [11, 12], [5, 6, 7]), [4, 13, 9]  # 7 and 9 are answers twice


@pytest.fixture
def build(catalog):
    def make(objective=None, user=None, data=catalog, seed=0, **settings):
        torch.manual_seed(seed)
        return TwoTower(
            data,
            **({"dim": 8, "max_history": 8} | settings),
            item_encoder=partial(FeatureItemEncoder, text=True, dropout=0.0),
            user=UserSettings(**({"dropout": 0.0} | (user or {}))),
            objective=PairObjective(**({"negatives": 3} | (objective or {}))),
        ).eval()

    return make


@pytest.fixture
def draws(monkeypatch):
    """What `torch.randint` has drawn, in order."""
    seen, original = [], torch.randint

    def remember(*args, **settings):
        seen.append(original(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(torch, "randint", remember)
    return seen


@pytest.fixture
def with_features(catalog):
    """The catalogue with a feature of 3 values and one of 2, unknown not counted, of three users."""
    codes = np.array([[1, 0], [3, 2], [2, 1]])
    return dataclasses.replace(catalog, user_features=UserFeatures(("age", "club"), (4, 3), codes))


def vectors_of(model):
    """(I+1, D) with gradients, padding zeros."""
    vectors = model.encode_items(torch.arange(1, model.num_items + 1))
    return torch.cat([torch.zeros_like(vectors[:1]), vectors])


def reference_losses(model, catalog, draws):
    """Both losses, one user, one position and one item at a time."""
    objective, z = model.objective, vectors_of(model)
    positions = []
    for history, target in zip(HISTORIES, TARGETS, strict=True):
        sequence = [*history, target]
        positions += [(sequence[:at], sequence[at]) for at in range(0 if model.user.start else 1, len(sequence))]
    answers = [item for _, item in positions]
    uniform = objective.drawn_from == "uniform"
    pool = model.trained[draws[0]].tolist() if uniform else answers
    candidates = sorted({*answers, *pool} if objective.contrast_pool else set(answers))
    log_p = [math.log(max(n, 1) / catalog.train_counts.sum()) for n in catalog.train_counts.tolist()]
    num_drawn = len(pool) if objective.contrast_pool and uniform else 0

    def chance(item):
        """That an item is among the candidates: met by one of the positions, or drawn."""
        p, num_items = math.exp(log_p[item]), len(model.trained)
        return 1 - (1 - p) ** len(answers) * (1 - 1 / num_items) ** num_drawn

    rows, contrast = [], []
    for (prefix, item), wrong in zip(positions, draws[-1], strict=True):
        u = model.history(z[prefix][None], torch.zeros(1, 0, dtype=torch.long))[0, -1]
        u = F.normalize(u, dim=0) if model.normalize else u
        for other, label in [(item, 1.0), *((pool[n], 0.0) for n in wrong.tolist())]:
            score = (u @ z[other]) * (model.scale if model.normalize else 1) + model.bias
            score = score - (log_p[other] if objective.log_q and not uniform else 0)
            rows.append(F.binary_cross_entropy_with_logits(score, torch.tensor(label)))
        v = F.normalize(u, dim=0) if objective.contrast_by == "cosine" else u
        w = F.normalize(z, dim=1) if objective.contrast_by == "cosine" else z
        scores = torch.stack(
            [v @ w[c] / objective.temperature - (math.log(chance(c)) if objective.log_q else 0) for c in candidates]
        )
        contrast.append(-scores.log_softmax(0)[candidates.index(item)])
    return {
        "bce": objective.bce_weight * torch.stack(rows).mean(),
        "contrast": objective.contrast_weight * torch.stack(contrast).mean(),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": {"drawn_from": "batch", "log_q": True, "bce_weight": 0.5, "contrast_weight": 3.0}},
        {"objective": {"contrast_pool": True, "log_q": True, "pool": 9, "temperature": 0.3, "contrast_by": "cosine"}},
        {"user": {"start": True}, "normalize": True, "objective": {"negatives": 2, "temperature": 0.2}},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_loops_over_positions_and_items(build, batch_of, catalog, draws, settings):
    model = build(**settings)
    found = model.losses(batch_of(*HISTORIES, targets=TARGETS))
    expected = reference_losses(model, catalog, draws)
    parameters = dict(model.named_parameters())
    for name in ("bce", "contrast"):
        torch.testing.assert_close(found[name], expected[name])
        one, other = (gradients(terms[name], parameters.values()) for terms in (found, expected))
        for parameter, *pair in zip(parameters, one, other, strict=True):
            torch.testing.assert_close(*pair, atol=1e-6, rtol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")


def gradients(term, parameters):
    return torch.autograd.grad(term, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True)


def test_items_that_training_never_meets_are_no_wrong_answers(build, batch_of, catalog):
    catalog.train_counts[[4, 17]] = 0
    model, asked = build(), []
    model.item_encoder.register_forward_hook(lambda _m, args, _out: asked.extend(args[0].tolist()))
    model.losses(batch_of([3, 7, 9], targets=[5]))
    assert sorted(asked) == [item for item in range(1, 38) if item not in (4, 17)]  # 2048 draws miss none of the others


@pytest.mark.parametrize("drawn_from", ["uniform", "batch"])
def test_every_item_of_a_batch_is_encoded_once(build, batch_of, drawn_from):
    model, asked = build({"drawn_from": drawn_from, "pool": 5}), []
    model.item_encoder.register_forward_hook(lambda _m, args, _out: asked.extend(args[0].tolist()))
    model.losses(batch_of([3, 7, 3], [7, 9], targets=[7, 3]))
    assert {3, 7, 9} <= set(asked)
    assert len(asked) == len(set(asked))


def test_scores_start_where_most_items_are_wrong_and_cosines_can_grow(build):
    model = build({"negatives": 20, "temperature": 0.1}, normalize=True)
    assert float(model.bias.detach()) == pytest.approx(-math.log(20))
    assert float(model.scale.detach()) == pytest.approx(10)
    torch.testing.assert_close(vectors_of(model)[1:].norm(dim=1), torch.ones(37))
    assert build().scale is None


def test_a_loss_without_weight_is_left_out(build, batch_of):
    batch = batch_of(*HISTORIES, targets=TARGETS)
    assert set(build({"bce_weight": 0.0}).losses(batch)) == {"contrast"}
    assert set(build({"contrast_weight": 0.0}).losses(batch)) == {"bce"}


def lists(model, batch, k=37):
    return model.recommend(batch, k, model.build_index())


def test_recommendations_are_the_largest_products_with_the_last_state(build, batch_of):
    model = build()
    z, found = vectors_of(model), lists(model, batch_of(*HISTORIES))
    for row, history in enumerate(HISTORIES):
        scores = z[1:] @ model.history(z[history][None], torch.zeros(1, 0, dtype=torch.long))[0, -1]
        assert found.item_ids[row].tolist() == (scores.argsort(descending=True) + 1).tolist()


@pytest.mark.parametrize("start", [False, True])
def test_padding_and_company_change_nothing(build, batch_of, start):
    model = build(user={"start": start})
    together = lists(model, batch_of(*HISTORIES, width=8))
    for row, history in enumerate(HISTORIES):
        alone = lists(model, batch_of(history))
        assert alone.item_ids[0].tolist() == together.item_ids[row].tolist()
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-5, rtol=1e-4)


def test_losses_of_a_padded_batch_are_those_of_an_unpadded_one(build, batch_of):
    model = build()
    found = []
    for width in (3, 7):
        torch.manual_seed(3)
        found.append(model.losses(batch_of([3, 7, 9], [11, 12, 4], targets=[5, 6], width=width)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("target", [[[30], [1], [2]], [[30, 1], [2, 0], [4, 5]], [[], [], []]], ids=str)
def test_the_answer_is_never_looked_at(build, batch_of, target):
    model, batch = build(), batch_of(*HISTORIES, targets=TARGETS)
    other = dataclasses.replace(batch, target=torch.tensor(target, dtype=torch.long).view(3, -1))
    assert torch.equal(lists(model, batch).scores, lists(model, other).scores)


def test_user_features_reach_losses_and_lists(build, batch_of, with_features):
    model, batch = build(data=with_features), batch_of(*HISTORIES, targets=TARGETS)
    young, old = (
        dataclasses.replace(batch, user_features=torch.tensor([[code, 2], [1, 0], [1, 0]])) for code in (1, 3)
    )
    one, other = lists(model, young), lists(model, old)
    assert not torch.equal(one.scores[0], other.scores[0])
    assert torch.equal(one.scores[1:], other.scores[1:])
    sum(model.losses(old).values()).backward()
    ages, clubs = (table.weight.grad.abs().sum(1) > 0 for table in model.history.features)
    assert ages.tolist() == [False, True, False, True]
    assert clubs.tolist() == [False, False, True]
    with pytest.raises(InputError, match=r"batch has 0 user features and the model was built for 2"):
        model.losses(batch)


OBJECTIVE = {
    "negatives": 5,
    "drawn_from": "batch",
    "pool": 3,
    "log_q": True,
    "bce_weight": 2.0,
    "contrast_weight": 2.0,
    "contrast_pool": True,
    "temperature": 0.3,
    "contrast_by": "cosine",
}
USER = {"num_layers": 2, "num_heads": 4, "dropout": 0.5, "start": True}


def test_every_setting_changes_training(build, batch_of, trace):
    assert OBJECTIVE.keys() == {f.name for f in dataclasses.fields(PairObjective)}
    assert USER.keys() == {f.name for f in dataclasses.fields(UserSettings)}
    batch = batch_of(*HISTORIES, targets=TARGETS)
    plain = trace(build(), batch)
    assert trace(build(), batch) == plain
    variants = [{"objective": {name: value}} for name, value in OBJECTIVE.items()]
    variants += [{"user": {name: value}} for name, value in USER.items()]
    for settings in (*variants, {"dim": 16}, {"normalize": True}):
        assert trace(build(**settings), batch) != plain, settings


def test_a_tower_without_layers_and_a_longer_max_history_are_possible(build, batch_of):
    long = batch_of([1] * 9, targets=[2])
    assert build(user={"num_layers": 0}, max_history=9).losses(long)["bce"].isfinite()


def test_bad_input_is_named(build, batch_of):
    with pytest.raises(InputError, match=r"dim=8 must be a multiple of user\.num_heads=3"):
        build(user={"num_heads": 3})
    with pytest.raises(InputError, match=r"user 1 has an empty history.*user\.start"):
        lists(build(), batch_of([3], []))
    with pytest.raises(InputError, match=r"9 items.*positions for 8.*max_history"):
        build().losses(batch_of([1] * 9, targets=[2]))
    with pytest.raises(InputError, match=r"item 38, but the catalogue has 37 items"):
        lists(build(), batch_of([3, 38]))
    for batch in (batch_of([3, 38], targets=[4]), batch_of([3], targets=[38])):
        with pytest.raises(InputError, match=r"item 38, but the catalogue has 37 items"):
            build().losses(batch)
    for setting in ({"negatives": 0}, {"pool": 0}, {"temperature": 0.0}):
        name, value = next(iter(setting.items()))
        with pytest.raises(InputError, match=f"objective.{name}={value}"):
            build(setting)


def test_with_start_empty_histories_have_answers_and_are_learned_from(build, batch_of):
    model, someone = build(user={"start": True}), batch_of([3], [3], targets=[4, 9])
    nobody = dataclasses.replace(someone, history=someone.history[:, :0])  # T = 0
    assert lists(model, nobody).scores.isfinite().all()
    assert lists(model, batch_of([], [3])).item_ids[0].tolist() == lists(model, nobody).item_ids[0].tolist()
    assert float(model.losses(nobody)["contrast"].detach()) > 0


@pytest.mark.parametrize("drawn_from", ["uniform", "batch"])
def test_no_answers_give_a_loss_of_zero_and_not_nan(build, batch_of, drawn_from):
    model = build({"drawn_from": drawn_from})
    terms = model.losses(batch_of([3], targets=[0]))
    assert {name: float(term.detach()) for name, term in terms.items()} == {"bce": 0.0, "contrast": 0.0}
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
