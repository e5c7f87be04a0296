"""COBRA's variants against loops written from their descriptions: what each reads where, generates, and ranks by."""

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA, CobraDecoder, CobraObjective, CobraSearch, CobraTokens
from recsys_lightning.nn.item_encoders import EmbeddingItemEncoder, IdItemEncoder
from recsys_lightning.retrieval.beam_fusion import beam_candidates
from recsys_lightning.retrieval.fusion_weights import FusionWeights, user_features
from recsys_lightning.retrieval.recommendations import Recommendations

HISTORIES = [3, 7, 9, 20], [11, 12], [5, 6, 7, 8, 30, 31]
TARGETS = [4, 13, 9]
BEFORE, SELF = -1, 0

# Tokens of an item ("c0", "c1", "c2", their sum "c", the dense vector "v"), and for each prediction the token after
# which it is read: of the item before, or of the item itself.
VARIANTS = {
    "cascade": ({}, "c0 c1 c2 v", [(BEFORE, "v"), (SELF, "c0"), (SELF, "c1")], (SELF, "c2")),
    "parallel": ({"order": "parallel"}, "c0 c1 c2 v", [(BEFORE, "v"), (SELF, "c0"), (SELF, "c1")], (BEFORE, "v")),
    "dense first": ({"order": "dense_first"}, "v c0 c1 c2", [(SELF, "v"), (SELF, "c0"), (SELF, "c1")], (BEFORE, "c2")),
    "sum": ({"id_merge": "sum"}, "c v", [(BEFORE, "v")] * 3, (SELF, "c")),
    "parallel sum": ({"id_merge": "sum", "order": "parallel"}, "c v", [(BEFORE, "v")] * 3, (BEFORE, "v")),
    "dense first sum": ({"id_merge": "sum", "order": "dense_first"}, "v c", [(SELF, "v")] * 3, (BEFORE, "c")),
    "IDs alone": ({"paths": "sparse"}, "c0 c1 c2", [(BEFORE, "c2"), (SELF, "c0"), (SELF, "c1")], None),
    "IDs alone, sum": ({"paths": "sparse", "id_merge": "sum"}, "c", [(BEFORE, "c")] * 3, None),
    "vectors alone": ({"paths": "dense"}, "v", [], (BEFORE, "v")),
}
WITH_BOTH = [name for name in VARIANTS if "alone" not in name]


@pytest.fixture
def build(catalog, semantic_ids):
    def make(name, search=None, objective=None, bos=False, ids=semantic_ids, item_encoder=EmbeddingItemEncoder, **more):
        torch.manual_seed(0)
        tokens = CobraTokens(**(VARIANTS[name][0] | more))
        decoder = CobraDecoder(num_heads=2, max_items=8, bos=bos)
        objective, search = CobraObjective(**(objective or {})), CobraSearch(**(search or {}))
        return COBRA(catalog, ids, 16, item_encoder, tokens, decoder, objective, search).eval()

    return make


def token(model, name, kind, codes, vector):
    """One token of an item with these codes and this dense vector, without its position."""
    embedded = [model.code.weight[code + level * model.num_codes] for level, code in enumerate(codes)]
    value = {"v": vector, "c": sum(embedded)}.get(kind)
    value = embedded[int(kind[1])] if value is None else value
    return value + model.token_type.weight[VARIANTS[name][1].split().index(kind)]


def read(model, name, items, ahead=()):
    """States after each token: of the items, then of the tokens `ahead`; keyed by (item, token)."""
    kinds = VARIANTS[name][1].split()
    vectors = model.item_table()
    keys, rows = ([], []) if model.bos is None else ([(-1, kinds[-1])], [model.bos[0]])
    for at, item in enumerate(items):
        codes = model.codes[item].tolist() if model.num_levels else []
        for kind in kinds:
            keys.append((at, kind))
            rows.append(token(model, name, kind, codes, vectors[item]))
    for kind, value in ahead:
        keys.append((len(items), kind))
        rows.append(value)
    x = torch.stack(rows)
    hidden = model.decoder((x + model.position.weight[: len(x)])[None])[0][0]
    return dict(zip(keys, hidden, strict=True))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_read_where_the_variant_says(build, batch_of, name, bos):
    model = build(name, bos=bos)
    _, _, code_reads, dense_read = VARIANTS[name]
    sequences = [[*h, t] for h, t in zip(HISTORIES, TARGETS, strict=True)]
    candidates = sorted({item for items in sequences for item in items})
    sparse, dense = [], []
    for items in sequences:
        states = read(model, name, items)
        for t in range(0 if bos else 1, len(items)):
            for level, (whose, kind) in enumerate(code_reads):
                logits = model.heads[level](states[t + whose, kind])
                sparse.append(-logits.log_softmax(-1)[model.codes[items[t], level]])
            if dense_read is not None:
                whose, kind = dense_read
                scores = F.cosine_similarity(states[t + whose, kind][None], model.item_table()[candidates]) / 0.0625
                dense.append(-scores.log_softmax(-1)[candidates.index(items[t])])
    found = model.losses(batch_of(*HISTORIES, targets=TARGETS))
    expected = {"sparse": sparse, "dense": dense}
    assert found.keys() == {term for term, parts in expected.items() if parts}
    for term, value in found.items():
        torch.testing.assert_close(value, torch.stack(expected[term]).mean())


def exhaustive(model, name, history):
    """log P(ID) and cosine of every item, by reading its whole semantic ID: no beam, no trie, no cache."""
    kinds, (_, _, code_reads, dense_read) = VARIANTS[name][1].split(), VARIANTS[name]
    vectors, n = model.item_table(), len(history)
    known = read(model, name, history)
    predicted = known.get((n + dense_read[0], dense_read[1])) if dense_read else None
    phi, cosine = torch.zeros(model.num_items), torch.zeros(model.num_items)
    for item in range(1, model.num_items + 1):
        codes = model.codes[item].tolist()
        # The item's own tokens as they are known when the next one is generated: a vector is the predicted one.
        ahead = [(kind, token(model, name, kind, codes, predicted)) for kind in kinds if kind != "v" or kinds[0] == "v"]
        states = read(model, name, history, ahead)
        for level, (whose, kind) in enumerate(code_reads):
            phi[item - 1] += model.heads[level](states[n + whose, kind]).log_softmax(-1)[codes[level]].item()
        if dense_read:
            query = states[n + dense_read[0], dense_read[1]]
            cosine[item - 1] = F.cosine_similarity(query, vectors[item], dim=0).item()
    return phi, cosine


def scores_of(model, found):
    """(B, I) the score of every item."""
    assert all(row.unique().numel() == model.num_items for row in found.item_ids)
    return torch.zeros(len(found.item_ids), model.num_items).scatter(1, found.item_ids - 1, found.scores)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", WITH_BOTH)
def test_many_beams_equal_exhaustive_scoring(build, batch_of, name, bos):
    model = build(name, {"num_beams": 64, "per_cell": 0, "tau": 0.9, "psi": 8.0}, bos=bos)
    found = scores_of(model, model.recommend(batch_of(*HISTORIES), model.num_items, model.build_index()))
    for row, history in zip(found, HISTORIES, strict=True):
        phi, cosine = exhaustive(model, name, history)
        expected = 0.9 * phi + 8.0 * cosine
        # The two denominators of BeamFusion are the same for all items of a user.
        torch.testing.assert_close(row - row[0], expected - expected[0], atol=1e-4, rtol=1e-4)


def test_an_early_dense_vector_is_read_before_the_id(build, batch_of):
    """It is learned like that of the parallel order, beside the cascade's own."""
    model = build("cascade", objective={"early_weight": 0.5})
    found, plain = (build_.losses(batch_of(*HISTORIES, targets=TARGETS)) for build_ in (model, build("cascade")))
    assert found.keys() == {"sparse", "dense", "early"}
    torch.testing.assert_close([found["sparse"], found["dense"]], [plain["sparse"], plain["dense"]])
    parallel = build("parallel").losses(batch_of(*HISTORIES, targets=TARGETS))["dense"]
    torch.testing.assert_close(found["early"], 0.5 * parallel)


@pytest.mark.parametrize("fusion", ["global", "per_id"])
def test_omega_adds_the_cosine_with_the_early_vector(build, batch_of, fusion):
    search = {"num_beams": 64, "per_cell": 0, "fusion": fusion}
    with_early, without = (
        build("cascade", search | more, objective={"early_weight": 0.5}) for more in ({"omega": 3.0}, {})
    )
    index = with_early.build_index()
    added = [scores_of(m, m.recommend(batch_of(*HISTORIES), m.num_items, index)) for m in (with_early, without)]
    for row, history in zip(added[0] - added[1], HISTORIES, strict=True):
        query = read(with_early, "cascade", history)[len(history) - 1, "v"]
        expected = 3.0 * F.cosine_similarity(query[None], index.table[1:])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_learned_weights_give_each_user_his_own_tau_and_psi(build, batch_of, tmp_path):
    torch.manual_seed(3)
    weights = FusionWeights(0.9, 8.0, "global", num_beams=6)
    torch.nn.init.normal_(weights.mlp[-1].weight)
    weights.save(tmp_path / "weights.safetensors")
    search = {"num_beams": 6, "per_cell": 0}
    learned = build("cascade", search | {"learned": str(tmp_path / "weights.safetensors")})
    assert learned.state_dict().keys() == build("cascade", search).state_dict().keys()
    batch, index = batch_of(*HISTORIES), learned.build_index()
    found = learned.recommend(batch, 10, index)
    beams = learned.generate(batch, index.table, 6)
    candidates = beam_candidates(beams, learned.trie, index.table, 0)
    tau, psi = weights(user_features(beams.log_probs, torch.tensor([len(h) for h in HISTORIES]), candidates))
    for row in range(len(HISTORIES)):
        fixed = build("cascade", search | {"tau": tau[row].item(), "psi": psi[row].item()})
        fixed.load_state_dict(learned.state_dict())
        alone = fixed.recommend(batch_of(HISTORIES[row]), 10, index)
        width = alone.scores.shape[1]
        torch.testing.assert_close(found.scores[row, :width], alone.scores[0], atol=1e-4, rtol=1e-4)


def test_learned_weights_of_another_search_are_refused(build, tmp_path):
    FusionWeights(1.0, 8.0, "per_id", num_beams=6).save(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"search.fusion=per_id and search.num_beams=6, not for global and"):
        build("cascade", {"num_beams": 6, "learned": str(tmp_path / "w.safetensors")})


@pytest.mark.parametrize("name", ["IDs alone", "IDs alone, sum"])
def test_without_dense_vectors_items_are_ranked_by_their_semantic_id(build, batch_of, name):
    model = build(name, {"num_beams": 64})
    found = scores_of(model, model.recommend(batch_of(*HISTORIES), model.num_items, model.build_index()))
    for row, history in zip(found, HISTORIES, strict=True):
        torch.testing.assert_close(row, exhaustive(model, name, history)[0], atol=1e-4, rtol=1e-4)
        assert row[18] == row[19] == row[24]  # items 19, 20 and 25 share a cell: nothing tells them apart


def test_disambiguation_tells_the_items_of_a_cell_apart(build, batch_of):
    model = build("IDs alone", {"num_beams": 200}, disambiguate=True)
    assert model.num_levels == 4
    assert len(torch.unique(model.codes[1:], dim=0)) == model.num_items
    found = model.recommend(batch_of(*HISTORIES), model.num_items, model.build_index())
    assert scores_of(model, found)[0].unique().numel() == model.num_items


def test_without_ids_items_are_ranked_by_cosine(build, batch_of):
    model = build("vectors alone", ids=None)
    index = model.build_index()
    found = model.recommend(batch_of(*HISTORIES), model.num_items, index)
    assert model.prefix_trie is None
    for row, history in zip(scores_of(model, found), HISTORIES, strict=True):
        query = read(model, "vectors alone", history)[len(history) - 1, "v"]
        torch.testing.assert_close(row, F.cosine_similarity(query[None], index.table[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_and_company_change_nothing(build, batch_of, name):
    model = build(name, {"num_beams": 6})
    items = model.build_index()
    together = model.recommend(batch_of(*HISTORIES, width=8), 10, items)
    for row, history in enumerate(HISTORIES):
        alone = model.recommend(batch_of(history), 10, items)
        width = alone.item_ids.shape[1]
        assert together.item_ids[row, :width].tolist() == alone.item_ids[0].tolist()
        torch.testing.assert_close(together.scores[row, :width], alone.scores[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_parameter_is_idle(build, batch_of, name):
    """Unused parameters would stop training on several processes."""
    model = build(name)
    sum(model.losses(batch_of(*HISTORIES, targets=TARGETS)).values()).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_nearest_takes_the_whole_catalogue_for_the_best_id(build, batch_of):
    """The paper's "w/o BeamFusion": the top-1 ID, then nearest neighbours of its dense vector."""
    model = build("cascade", {"fusion": "nearest", "num_beams": 4})
    index = model.build_index()
    found = scores_of(model, model.recommend(batch_of(*HISTORIES), model.num_items, index))
    for row, history in zip(found, HISTORIES, strict=True):
        phi, _ = exhaustive(model, "cascade", history)
        best = int(phi.argmax()) + 1
        ahead = [(f"c{i}", token(model, "cascade", f"c{i}", model.codes[best].tolist(), None)) for i in range(3)]
        query = read(model, "cascade", history, ahead)[len(history), "c2"]
        torch.testing.assert_close(row, F.cosine_similarity(query[None], index.table[1:]), atol=1e-4, rtol=1e-4)


def test_late_rank_fusion_adds_reciprocal_ranks(build, batch_of):
    model = build("parallel", {"fusion": "ranks", "num_beams": 64})
    found = scores_of(model, model.recommend(batch_of(*HISTORIES), model.num_items, model.build_index()))
    for row, history in zip(found, HISTORIES, strict=True):
        by_id, by_vector = exhaustive(model, "parallel", history)
        expected = torch.zeros(model.num_items)
        for scores in (by_id, by_vector):
            rank = 1 + (scores[None] > scores[:, None] + 1e-6).sum(1)
            expected += 1 / (60 + rank)
        torch.testing.assert_close(row, expected)


def test_the_queue_adds_items_of_earlier_batches_and_none_twice(build, batch_of):
    model = build("cascade", objective={"queue": 6}).train()
    first, second = batch_of([3, 7], targets=[9]), batch_of([9, 11], targets=[12])
    with torch.no_grad():
        model.dropout.p = model.item_encoder.dropout.p = 0.0
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        for layer in model.decoder.layers:
            layer.attention.dropout = 0.0
        before = model.item_table()
        model.losses(first)
        assert model.queue.ids.tolist() == [3, 7, 9, 0, 0, 0]
        model.item_encoder.norm.bias += torch.randn(16)  # so that what the queue holds is out of date
        found = model.losses(second)["dense"]
        now = model.item_table()
        negatives = torch.stack([now[9], now[11], now[12], before[3], before[7]])  # 9 is in the batch: not twice
        states, terms = read(model, "cascade", [9, 11, 12]), []
        for t in (1, 2):
            scores = F.cosine_similarity(states[t, "c2"][None], negatives) / 0.0625
            terms.append(-scores.log_softmax(-1)[t])
        torch.testing.assert_close(found, torch.stack(terms).mean())
        assert sorted(model.queue.ids.tolist()) == [0, 3, 7, 9, 11, 12]
        model.losses(batch_of([20, 21], targets=[22]))  # no room for eight: the oldest leave
        assert set(model.queue.ids.tolist()) >= {11, 12, 20, 21, 22}


def test_the_queue_rests_while_nothing_is_trained(build, batch_of):
    model = build("cascade", objective={"queue": 6})
    model.losses(batch_of([3, 7], targets=[9]))
    assert not model.queue.ids.any()


def test_id_item_encoder_needs_no_text(catalog, semantic_ids, batch_of):
    model = COBRA(catalog, semantic_ids, 16, IdItemEncoder, decoder=CobraDecoder(num_heads=2, max_items=8))
    model.losses(batch_of([3, 7], targets=[9]))["dense"].backward()
    grads = model.item_encoder.item.weight.grad.abs().sum(1)
    assert grads.nonzero().flatten().tolist() == [3, 7, 9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"paths": "dense", "order": "parallel"}, r"tokens.order=parallel.*tokens.paths=both"),
        ({"paths": "dense", "id_merge": "sum"}, r"tokens.id_merge=sum needs IDs"),
        ({"disambiguate": True}, r"tokens.disambiguate is for tokens.paths=sparse"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CobraTokens(**settings)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("IDs alone", {"search": {"fusion": "nearest"}}, r"search.fusion=nearest needs dense vectors"),
        ("cascade", {"ids": None}, r"semantic_ids is missing.*tokens.paths=dense"),
        ("parallel", {"objective": {"early_weight": 1.0}}, r"objective.early_weight is for .*tokens.order=cascade"),
        ("cascade", {"search": {"omega": 1.0}}, r"search.omega=1.0 needs objective.early_weight"),
        ("cascade", {"objective": {"queue": -1}}, r"objective.queue=-1"),
        ("cascade", {"objective": {"queue": 8, "negatives": "catalogue"}}, r"objective.queue are for negatives: batch"),
        ("cascade", {"objective": {"queue": 8, "log_q": True}}, r"objective.log_q knows"),
    ],
)
def test_impossible_variants_are_refused_with_the_key(build, name, more, message):
    with pytest.raises(InputError, match=message):
        build(name, **more)


def test_a_recommendation_is_closed_under_ties(build, batch_of):
    """Items 19 to 25 share a cell: whoever asks for one of them by ID alone gets all."""
    model = build("IDs alone", {"num_beams": 64})
    index = model.build_index()
    whole = model.recommend(batch_of([3, 7]), model.num_items, index)
    place = whole.item_ids[0].tolist().index(19)
    found: Recommendations = model.recommend(batch_of([3, 7]), place + 1, index)
    assert set(range(19, 26)) <= set(found.item_ids[0].tolist())
