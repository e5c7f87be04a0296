"""What SPARC finds: soft search against exhaustive scoring, what it looks at, bad input, and a catalogue to learn."""

import dataclasses
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.data.users import UserFeatures
from recsys_lightning.errors import InputError
from recsys_lightning.models.popularity import Popularity
from recsys_lightning.models.sparc import SPARC, SparcCodebooks, SparcObjective, SparcSearch
from recsys_lightning.models.two_tower import UserSettings
from recsys_lightning.nn.item_tower import FeatureItemEncoder

HISTORIES, TARGETS = ([3, 7, 9, 20], [11, 12], [5, 6, 7]), [4, 13, 9]


@pytest.fixture
def build(catalog):
    def make(search=None, objective=None, codebooks=None, user=None, data=catalog, started=True, **settings):
        torch.manual_seed(0)
        model = SPARC(
            data,
            **({"dim": 8, "max_history": 8} | settings),
            item_encoder=partial(FeatureItemEncoder, text=True, dropout=0.0),
            user=UserSettings(**({"dropout": 0.0} | (user or {}))),
            codebooks=SparcCodebooks(**({"num_codes": 4, "warmup_steps": 0} | (codebooks or {}))),
            objective=SparcObjective(**({"negatives": 3, "search_weight": 1.0} | (objective or {}))),
            search=SparcSearch(**({"num_interests": 2} | (search or {}))),
        ).eval()
        if started:
            model.start_codes()
        return model

    return make


@pytest.fixture
def batch(batch_of):
    return batch_of(*HISTORIES, targets=TARGETS)


def nobody(num_users):
    """A batch of users without a history: T = 0."""
    none = torch.zeros(num_users, 0, dtype=torch.long)
    return SequenceBatch(torch.arange(num_users), none, torch.full((num_users, 1), 4), none)


def lists(model, batch, k=37, **search):
    model.search = dataclasses.replace(model.search, **search)
    return model.recommend(batch, k, model.build_index())


def by_item(found):
    """Scores (B, I) of lists that hold every item."""
    return torch.empty_like(found.scores).scatter(1, found.item_ids - 1, found.scores)


# ---------------------------------------------------------------------------------------------- soft search


def test_one_interest_is_a_search_with_the_likeliest_codes_query(build, batch):
    model = build()
    likeliest = model.interest_logits(batch).argmax(1, keepdim=True)
    expected = model.build_index().search(model.interest_queries(batch, likeliest)[:, 0], 9)
    found = lists(model, batch, 9, num_interests=1)
    assert torch.equal(found.item_ids, expected.item_ids)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("interests", ["predicted", "uniform"])
def test_with_all_codes_max_is_the_best_score_over_all_codes_queries(build, batch, interests):
    model = build()
    queries = model.interest_queries(batch, torch.arange(4).expand(3, -1))  # (B, C, D)
    scores = queries @ model.item_table()[1:].T  # (B, C, I)
    found = lists(model, batch, num_interests=4, interests=interests)
    torch.testing.assert_close(by_item(found), scores.amax(1))
    assert (scores.argmax(1).unique() < 4).all()
    assert scores.argmax(1).unique().numel() > 1  # more than one query has a say


def test_merges_weigh_by_the_softmax_of_the_logits_over_the_codes_that_are_searched(build, batch):
    model = build()
    for temperature in (1.0, 0.3):
        best = (model.interest_logits(batch) / temperature).topk(2)
        weights = best.values.softmax(1)[..., None]  # (B, K, 1)
        scores = model.interest_queries(batch, best.indices) @ model.item_table()[1:].T  # (B, K, I)
        shared = {"merge": "sum", "per_interest": 37, "temperature": temperature}
        torch.testing.assert_close(by_item(lists(model, batch, **shared)), (weights * scores).sum(1))
        even = lists(model, batch, **shared, interests="uniform")
        torch.testing.assert_close(by_item(even), scores.mean(1))
        model.search = SparcSearch(num_interests=2)


def test_each_query_is_the_target_attention_of_the_codes_own_codeword(build, batch):
    model = build(normalize=True)
    codes = torch.tensor([[3, 1], [0, 2], [2, 2]])
    found = model.interest_queries(batch, codes)
    table = model.item_table()
    for row, history in enumerate(HISTORIES):
        states = model.history(table[history][None], torch.zeros(1, 0, dtype=torch.long))
        for j, code in enumerate(codes[row].tolist()):
            word, last = model.books.codebooks[0, code], torch.tensor([len(history) - 1])
            u = model.reader(states, torch.tensor([0]), last, word[None, None])[0, 0]
            torch.testing.assert_close(found[row, j], u / u.norm())


def test_all_interests_of_all_users_take_one_pass_and_one_search(build, batch):
    model, passes, searches = build(), [], []
    model.reader.register_forward_hook(lambda _m, args, _out: passes.append(args[3].shape))
    index = model.build_index()
    original = index.search_with_ties
    index.search_with_ties = lambda queries, k: searches.append(queries.shape) or original(queries, k)
    model.recommend(batch, 5, index)
    assert passes == [(3, 2, 8)]
    assert searches == [(6, 8)]


SEARCH = {
    "num_interests": 3,
    "merge": "quota",
    "temperature": 0.2,
    "score_temperature": 0.2,
    "per_interest": 2,
    "restrict_to_code": True,
    "interests": "uniform",
}


@pytest.mark.parametrize("name", SEARCH)
def test_every_setting_of_the_search_changes_the_lists(build, batch, name):
    assert SEARCH.keys() == {f.name for f in dataclasses.fields(SparcSearch)}
    model = build({"merge": "p_weighted"})
    plain, changed = lists(model, batch, 20), lists(model, batch, 20, **{name: SEARCH[name]})
    assert plain.scores.shape != changed.scores.shape or not torch.equal(plain.scores, changed.scores)


def test_max_looks_at_no_probabilities(build, batch):
    plain = lists(build(), batch, 9)
    for setting in ({"temperature": 0.1}, {"interests": "uniform"}, {"score_temperature": 0.1}):
        assert torch.equal(lists(build(), batch, 9, **setting).scores, plain.scores)


def test_per_interest_bounds_what_an_interest_finds(build, batch):
    found = lists(build(), batch, 20, per_interest=3)
    assert ((found.item_ids > 0).sum(1) <= 2 * 3).all()
    assert ((found.item_ids > 0).sum(1) >= 3).all()


@pytest.mark.parametrize("joint", [True, False])
def test_restricted_to_its_code_a_search_finds_all_items_of_the_code_and_no_others(build, batch, joint):
    model = build({"restrict_to_code": True}, codebooks={"joint": joint})
    with torch.no_grad():  # frozen codes no longer follow the items
        model.item_encoder.item.weight.mul_(-1)
    chosen, codes = model.interest_logits(batch).topk(2).indices, model.item_codes()[:, 0]
    found = lists(model, batch)
    for row in range(3):
        wanted = {item + 1 for item in range(37) if codes[item] in chosen[row]}
        assert set(found.item_ids[row].tolist()) - {0} == wanted


# ----------------------------------------------------------------------------------- what inference looks at


@pytest.mark.parametrize("target", [[[30], [1], [2]], [[30, 1], [2, 0], [4, 5]], [[], [], []]], ids=str)
@pytest.mark.parametrize("started", [True, False])
def test_the_answer_is_never_looked_at(build, batch, target, started):
    model = build({"merge": "p_weighted"}, started=started)
    other = dataclasses.replace(batch, target=torch.tensor(target, dtype=torch.long).view(3, -1))
    assert torch.equal(lists(model, batch).scores, lists(model, other).scores)
    assert torch.equal(model.interest_logits(batch), model.interest_logits(other))
    codes = torch.tensor([[0, 1], [2, 3], [1, 2]])
    assert torch.equal(model.interest_queries(batch, codes), model.interest_queries(other, codes))


def test_interest_logits_are_those_after_the_last_item(build, batch):
    model = build()
    table, found = model.item_table(), model.interest_logits(batch)
    for row, history in enumerate(HISTORIES):
        alone = model.interest(table[history][None], torch.zeros(1, 0, dtype=torch.long))[0, -1]
        torch.testing.assert_close(found[row], alone)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("merge", ["max", "p_weighted", "sum", "quota"])
def test_padding_and_company_change_nothing(build, batch_of, start, merge):
    model = build({"merge": merge}, user={"start": start})
    together = lists(model, batch_of(*HISTORIES, width=8), 10)
    for row, history in enumerate(HISTORIES):
        alone = lists(model, batch_of(history), 10)
        assert alone.item_ids[0].tolist() == together.item_ids[row].tolist()[: alone.item_ids.shape[1]]
        torch.testing.assert_close(alone.scores[0, :10], together.scores[row, :10], atol=1e-5, rtol=1e-4)


def test_user_features_reach_user_tower_and_interest_tower(build, batch, catalog):
    features = UserFeatures(("age",), (4,), np.zeros((3, 1), dtype=np.int64))
    model = build(data=dataclasses.replace(catalog, user_features=features))
    one, other = (dataclasses.replace(batch, user_features=torch.tensor([[1], [1], [code]])) for code in (1, 3))
    codes = torch.zeros(3, 1, dtype=torch.long)
    for found in (
        [model.interest_logits(b) for b in (one, other)],
        [model.interest_queries(b, codes) for b in (one, other)],
    ):
        assert torch.equal(found[0][:2], found[1][:2])
        assert not torch.allclose(found[0][2], found[1][2], atol=1e-3)
    sum(model.losses(other).values()).backward()
    for encoder in (model.history, model.interest.encoder):
        assert (encoder.features[0].weight.grad.abs().sum(1) > 0).tolist() == [False, True, False, True]


# ------------------------------------------------------------------------------------------------ bad input


def finite(model, batch):
    """One training step: every loss, gradient and state is a number."""
    terms = model.train().losses(batch)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(value.isfinite().all() for value in model.state_dict().values())
    return {name: float(term.detach()) for name, term in terms.items()}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("drawn_from", ["uniform", "batch"])
@pytest.mark.parametrize("started", [True, False])
def test_batches_with_little_or_nothing_to_learn_from_are_finite(build, batch_of, drawn_from, joint, started):
    codebooks = {"joint": joint, "warmup_steps": 9}
    for little in (batch_of([3], targets=[4]), batch_of([3], [4], targets=[0, 0]), nobody(2)):
        terms = finite(build(objective={"drawn_from": drawn_from}, codebooks=codebooks, started=started), little)
        assert terms.get("bpr", 0.0) == 0.0


@pytest.mark.parametrize("start", [False, True])
def test_a_batch_without_a_second_level_1_code_ranks_no_codes(build, batch_of, start):
    """All answers are one item, or items of one code: there is no other code to ask with."""
    model = build(user={"start": start})
    codes = model.item_codes()[:, 0]
    one, other = ((codes == codes.mode().values).nonzero()[:2, 0] + 1).tolist()
    for batch in (batch_of([one], [one], targets=[one, one]), batch_of([one], [other], targets=[other, one])):
        assert finite(model, batch)["bpr"] == 0.0
        model.zero_grad()


@pytest.mark.parametrize("normalize", [False, True])
def test_users_without_history_have_finite_lists_and_losses_with_start(build, batch_of, normalize):
    model = build(user={"start": True}, normalize=normalize)
    alone = lists(model, nobody(2), 9)
    assert alone.scores.isfinite().all()
    mixed = lists(model, batch_of([], [3]), 9)
    assert torch.equal(mixed.item_ids[0], alone.item_ids[0])
    assert finite(model, nobody(2))["bce"] > 0


def test_a_user_without_history_is_named_where_there_is_no_start(build, batch_of):
    codes = torch.zeros(2, 1, dtype=torch.long)
    for started in (True, False):
        model, batch = build(started=started), batch_of([3], [])
        for ask in (
            partial(lists, model, batch),
            partial(model.interest_logits, batch),
            partial(model.interest_queries, batch, codes),
        ):
            with pytest.raises(InputError, match=r"user 1 has an empty history, and SPARC.*user\.start"):
                ask()


def test_an_item_that_training_never_met_has_codes_and_is_found(build, catalog, batch_of):
    catalog.train_counts[[4, 17]] = 0
    model, batch = build(), batch_of([3, 17], targets=[4])  # as history and as answer
    finite(model, batch)
    found = lists(model.eval(), batch)
    assert sorted(found.item_ids[0].tolist()) == list(range(1, 38))
    assert found.scores.isfinite().all()
    assert model.item_codes().shape == (37, 3)


def test_no_users_get_no_lists(build, batch):
    none = SequenceBatch(batch.user[:0], batch.history[:0], batch.target[:0], batch.seen[:0])
    assert lists(build(), none, 5).item_ids.shape == (0, 5)


@pytest.mark.parametrize("merge", ["max", "p_weighted", "sum", "quota"])
@pytest.mark.parametrize("restrict", [False, True])
def test_double_precision_changes_nothing(build, batch, merge, restrict):
    found = []
    for double in (False, True):
        model = build({"merge": merge, "restrict_to_code": restrict})
        model = model.double() if double else model
        torch.manual_seed(1)
        terms = finite(model, batch)
        found.append((terms, lists(model.eval(), batch, 9)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1].scores, found[1][1].scores.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merge", ["max", "p_weighted", "sum", "quota"])
@pytest.mark.parametrize("started", [True, False])
def test_half_precision_is_near_and_finite(build, batch, merge, started):
    found = []
    for half in (False, True):
        model = build({"merge": merge}, normalize=True, started=started, codebooks={"warmup_steps": 9})
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(finite(model, batch))
            scores = lists(model.eval(), batch, 9).scores
        assert not scores.isnan().any()
        assert scores[:, 0].isfinite().all()
    assert found[0] == pytest.approx(found[1], rel=0.2)


def test_bad_input_is_named(build, batch_of):
    with pytest.raises(InputError, match=r"search\.num_interests=5 is more than the 4 codes of level 1"):
        build({"num_interests": 5})
    model = build()
    with pytest.raises(InputError, match=r"search\.num_interests=5 is more than the 4 codes of level 1"):
        model.search = dataclasses.replace(model.search, num_interests=5)
    for name, value in {"num_interests": 0, "per_interest": 0, "temperature": 0.0, "score_temperature": -1.0}.items():
        with pytest.raises(InputError, match=f"search.{name}={value}"):
            SparcSearch(**{name: value})
    for name, value in {"num_shuffled": 0, "own_share": 1.5, "label_smoothing": -0.1, "negatives": 0}.items():
        with pytest.raises(InputError, match=f"objective.{name}={value}"):
            SparcObjective(**{name: value})
    for name, value in {"gradient_share": 1.1, "warmup_steps": -1}.items():
        with pytest.raises(InputError, match=f"codebooks.{name}={value}"):
            SparcCodebooks(**{name: value})
    with pytest.raises(InputError, match=r"num_codes of 2 or more"):
        build({"num_interests": 1}, codebooks={"num_codes": 1})
    with pytest.raises(InputError, match=r"9 items.*positions for 8.*max_history"):
        lists(model, batch_of([1] * 9))
    with pytest.raises(InputError, match=r"item 38, but the catalogue has 37 items"):
        lists(model, batch_of([38]))
    for batch in (batch_of([3, 38], targets=[4]), batch_of([3], targets=[38])):
        with pytest.raises(InputError, match=r"item 38, but the catalogue has 37 items"):
            model.losses(batch)


# ---------------------------------------------------------------------------------------- a catalogue to learn

CLUSTER, LENGTH = 6, 6  # items of a cluster; four clusters
TOYS = 4 * CLUSTER


def toy_catalog():
    """Four clusters of items whose texts say which."""
    rng = np.random.default_rng(0)
    texts = np.repeat(np.eye(4), CLUSTER, axis=0) + 0.1 * rng.normal(size=(TOYS, 4))
    fields = pl.DataFrame({"item_id": [f"{i}" for i in range(TOYS)]})
    text = ItemEmbeddings(np.concatenate([np.zeros((1, 4)), texts]).astype(np.float32), "f" * 64, "clusters")
    return Catalog(fields, np.concatenate([[0], np.full(TOYS, 20)]), text)


def toy_batch(num_users, seed):
    """Users of the first half meet items of clusters 0 and 1 at random, those of the second half of 2 and 3."""
    rng = np.random.default_rng(seed)
    group = np.arange(num_users) % 2
    cluster = 2 * group[:, None] + rng.integers(0, 2, (num_users, LENGTH + 1))
    items = torch.from_numpy(1 + CLUSTER * cluster + rng.integers(0, CLUSTER, cluster.shape))
    return SequenceBatch(
        torch.arange(num_users), items[:, :-1], items[:, -1:], torch.zeros(num_users, 0, dtype=torch.long)
    )


def test_a_plain_loop_teaches_that_two_interests_find_both_clusters_of_a_user_where_one_finds_one():
    torch.manual_seed(0)
    catalog, steps = toy_catalog(), 120
    model = SPARC(
        catalog,
        dim=16,
        max_history=LENGTH,
        normalize=True,
        item_encoder=partial(FeatureItemEncoder, text=True),
        user=UserSettings(dropout=0.1),
        codebooks=SparcCodebooks(num_levels=2, num_codes=4, warmup_steps=20),
        objective=SparcObjective(temperature=0.2, pool=24),
        search=SparcSearch(num_interests=2),
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for step in range(steps):
        optimizer.zero_grad()
        sum(model.losses(toy_batch(16, seed=step)).values()).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    test, popular = toy_batch(256, seed=10**6), Popularity(catalog)
    everyone = popular.recommend(test, CLUSTER, popular.build_index()).item_ids[:, :CLUSTER]
    clusters, largest = {}, {}
    for num_interests in (1, 2):
        found = lists(model, test, CLUSTER, num_interests=num_interests).item_ids[:, :CLUSTER]
        kinds = (found - 1) // CLUSTER  # (B, k)
        assert (kinds // 2 == torch.arange(256)[:, None] % 2).float().mean() > 0.95  # of the user's own two
        clusters[num_interests] = np.mean([row.unique().numel() for row in kinds])
        largest[num_interests] = np.mean([int(row.bincount().max()) / CLUSTER for row in kinds])
        # Half of the right clusters' items against a quarter of all.
        assert recall(found, test) > recall(everyone, test) + 0.15
    assert largest[1] > 0.85
    assert largest[2] < 0.8
    assert clusters[2] > 1.8


def recall(item_ids, batch):
    return float((item_ids == batch.target).any(1).float().mean())
