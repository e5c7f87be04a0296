"""COBRA against the paper: what is read where, what reaches what, and search against exhaustive scoring."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA, CobraDecoder, CobraObjective, CobraSearch, CobraTokens
from recsys_lightning.nn.item_encoders import EmbeddingItemEncoder, TextItemEncoder

HISTORIES = [3, 7, 9, 20], [11, 12], [5, 6, 7, 8, 30, 31]


@pytest.fixture
def build(catalog, semantic_ids):
    def make(
        decoder=None, objective=None, search=None, item_encoder=EmbeddingItemEncoder, ids=semantic_ids, tokens=None
    ):
        torch.manual_seed(0)
        decoder = CobraDecoder(**({"num_heads": 2, "max_items": 8} | (decoder or {})))
        tokens, objective = CobraTokens(**(tokens or {})), CobraObjective(**(objective or {}))
        return COBRA(catalog, ids, 16, item_encoder, tokens, decoder, objective, CobraSearch(**(search or {}))).eval()

    return make


def tokens_of(model, items, vectors):
    """The interleaved input of one user, token by token, as equations 2 and 3 write it."""
    rows = [] if model.bos is None else [model.bos[0]]
    for item in items:
        for level in range(model.num_levels):
            code = model.codes[item, level] + level * model.num_codes
            rows.append(model.code.weight[code] + model.token_type.weight[level])
        rows.append(vectors[item] + model.token_type.weight[model.num_levels])
    tokens = torch.stack(rows)
    return tokens + model.position.weight[: len(tokens)]


def reference_losses(model, sequences, temperature=0.0625):
    """Equations 4 to 9, one user, one position and one level at a time, by the index map of the three-level layout."""
    stride, levels = model.num_levels + 1, model.num_levels
    bos = int(model.bos is not None)
    vectors = model.item_table()
    candidates = sorted(set(itertools.chain(*sequences)))
    sparse, dense = [[] for _ in range(levels)], []
    for items in sequences:
        hidden = model.decoder(tokens_of(model, items, vectors)[None])[0][0]
        for t in range(0 if bos else 1, len(items)):
            item = items[t]
            for level in range(levels):
                # Level 0 is read at the dense token before the item, level c at the item's own code c - 1.
                read = bos + (t - 1) * stride + levels if level == 0 else bos + t * stride + level - 1
                logits = model.heads[level](hidden[read])
                sparse[level].append(-logits.log_softmax(-1)[model.codes[item, level]])
            predicted = model.dense_head(hidden[bos + t * stride + levels - 1])
            if model.decoder_config.dense_head == "residual":
                predicted = predicted + hidden[bos + (t - 1) * stride + levels]  # the token before the item's first
            scores = torch.stack([F.cosine_similarity(predicted, vectors[c], dim=0) for c in candidates]) / temperature
            dense.append(-scores.log_softmax(-1)[candidates.index(item)])
    return torch.stack([torch.stack(level).mean() for level in sparse]).mean(), torch.stack(dense).mean()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("dense_head", ["none", "linear", "residual"])
def test_losses_are_equations_4_to_9_written_as_loops(build, batch_of, bos, dense_head):
    model = build({"bos": bos, "dense_head": dense_head})
    batch = batch_of(*HISTORIES, targets=[4, 13, 9])
    found = model.losses(batch)
    sparse, dense = reference_losses(model, [[*h, t] for h, t in zip(HISTORIES, [4, 13, 9], strict=True)])
    torch.testing.assert_close(found["sparse"], sparse)
    torch.testing.assert_close(found["dense"], dense)


def test_the_first_code_depends_on_tokens_up_to_the_last_dense_vector_only(build, batch_of):
    """z_{t+1} is read at v_t (eq. 4): changing what comes later changes nothing before it."""
    model = build()
    vectors = model.item_table()
    one, other = (model.decoder(tokens_of(model, items, vectors)[None])[0][0] for items in ([3, 7, 9], [3, 7, 30]))
    stride = model.num_levels + 1
    torch.testing.assert_close(one[: 2 * stride], other[: 2 * stride])
    assert not torch.allclose(one[2 * stride :], other[2 * stride :])


@pytest.mark.parametrize("width", [6, 8])
def test_padding_and_company_change_nothing(build, batch_of, width):
    model = build()
    items = model.build_index()
    alone = [model.recommend(batch_of(history), 10, items) for history in HISTORIES]
    together = model.recommend(batch_of(*HISTORIES, width=width), 10, items)
    for row, single in enumerate(alone):
        assert together.item_ids[row].tolist() == single.item_ids[0].tolist()
        torch.testing.assert_close(together.scores[row], single.scores[0], atol=1e-4, rtol=1e-4)


def test_losses_of_a_padded_batch_are_those_of_an_unpadded_one(build, batch_of):
    model = build()
    histories = [[3, 7, 9], [11, 12, 4]]
    tight, loose = (model.losses(batch_of(*histories, targets=[5, 6], width=w)) for w in (3, 7))
    for name in ("sparse", "dense"):
        torch.testing.assert_close(tight[name], loose[name])


def exhaustive(model, history, vectors, tau, psi, per_id=False):
    """Score every item of the catalogue by teacher forcing its codes: no beam, no trie, no cache."""
    phi, cosine = [], []
    stride = model.num_levels + 1
    for item in range(1, model.num_items + 1):
        tokens = tokens_of(model, [*history, item], vectors)[:-1]
        hidden = model.decoder(tokens[None])[0][0]
        start = len(history) * stride - 1 + int(model.bos is not None)
        log_p = 0.0
        for level in range(model.num_levels):
            log_p += model.heads[level](hidden[start + level]).log_softmax(-1)[model.codes[item, level]].item()
        phi.append(log_p)
        predicted = model.dense_head(hidden[-1])
        if model.decoder_config.dense_head == "residual":
            predicted = predicted + hidden[start]
        cosine.append(F.cosine_similarity(predicted, vectors[item], dim=0).item())
    phi, cosine = torch.tensor(phi), torch.tensor(cosine)
    cells = [tuple(code) for code in model.codes[1:].tolist()]
    by_cell = {cell: phi[cells.index(cell)] for cell in cells}
    log_beam = tau * phi - torch.stack([tau * p for p in by_cell.values()]).logsumexp(0)
    if per_id:
        norm = torch.stack(
            [(psi * cosine)[torch.tensor([other == cell for other in cells])].logsumexp(0) for cell in cells]
        )
    else:
        norm = (psi * cosine).logsumexp(0)
    return log_beam + psi * cosine - norm


@pytest.mark.parametrize("fusion", ["global", "per_id"])
@pytest.mark.parametrize("decoder", [{}, {"bos": True}, {"dense_head": "linear"}, {"dense_head": "residual"}])
def test_many_beams_and_whole_cells_equal_exhaustive_scoring(build, batch_of, fusion, decoder):
    model = build(decoder, search={"num_beams": 64, "per_cell": 0, "fusion": fusion, "tau": 0.9, "psi": 8.0})
    vectors = model.item_table()
    found = model.recommend(batch_of(*HISTORIES), model.num_items, model.build_index())
    for row, history in enumerate(HISTORIES):
        expected = exhaustive(model, history, vectors, 0.9, 8.0, fusion == "per_id")
        scores = torch.empty(model.num_items).scatter(0, found.item_ids[row] - 1, found.scores[row])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
        assert found.item_ids[row].unique().numel() == model.num_items  # each item once


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_every_beam_is_a_cell_with_items_and_no_item_is_listed_twice(build, batch_of, num_beams):
    model = build(search={"num_beams": num_beams})
    vectors = model.item_table()
    beams = model.generate(batch_of(*HISTORIES), vectors, num_beams)
    cells = {tuple(code) for code in model.codes[1:].tolist()}
    for leaf in beams.leaves.flatten():
        assert tuple(model.trie.codes_of_leaf[leaf].tolist()) in cells
    assert all(row.unique().numel() == len(row) for row in beams.leaves)
    found = model.recommend(batch_of(*HISTORIES), 20, model.build_index())
    for row in found.item_ids:
        real = row[row > 0]
        assert real.unique().numel() == len(real)
    assert (found.scores[found.item_ids == 0] == -torch.inf).all()


def test_beam_probabilities_are_those_of_teacher_forcing(build, batch_of):
    """Decoding with the cache gives each semantic ID the probability that one causal pass gives it."""
    model = build()
    vectors = model.item_table()
    beams = model.generate(batch_of(HISTORIES[0]), vectors, 8)
    for leaf, log_prob, dense in zip(beams.leaves[0], beams.log_probs[0], beams.hidden[0], strict=True):
        item = int(model.trie.cell_items[model.trie.cell_offsets[leaf]])
        hidden = model.decoder(tokens_of(model, [*HISTORIES[0], item], vectors)[None, :-1])[0][0]
        start = len(HISTORIES[0]) * 4 - 1
        expected = sum(
            model.heads[level](hidden[start + level]).log_softmax(-1)[model.codes[item, level]] for level in range(3)
        )
        torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(dense, hidden[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("item_encoder", [EmbeddingItemEncoder, partial(TextItemEncoder, vocabulary_size=60)])
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_reaches_the_item_encoder_through_inputs_and_targets(build, batch_of, item_encoder, detach):
    """C5: without detaching, an item that is only ever an answer or only a negative still gets a gradient."""
    pytest.importorskip("tokenizers")
    model = build(objective={"detach_targets": detach}, item_encoder=item_encoder)
    seen = {}
    encoder = model.item_encoder

    def remember(_module, args, vectors):
        vectors.retain_grad()
        seen.update(ids=args[0], vectors=vectors)

    encoder.register_forward_hook(remember)
    model.losses(batch_of([3, 7], targets=[9]))["dense"].backward()
    grads = dict(zip(seen["ids"].tolist(), seen["vectors"].grad.abs().sum(1).tolist(), strict=True))
    assert grads[3] > 0  # a history item: through the input
    assert (grads[9] > 0) is not detach  # the answer is no input here: only as a target
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_every_unique_item_of_a_batch_is_encoded_once(build, batch_of):
    model = build()
    asked = []
    model.item_encoder.register_forward_hook(lambda _m, args, _out: asked.append(args[0].tolist()))
    model.losses(batch_of([3, 7, 3], [7, 9], targets=[7, 3]))
    assert asked == [[3, 7, 9]]


def dense_loss(build, batch, **objective):
    return build(objective=objective).losses(batch)["dense"].item()


def test_catalogue_negatives_contrast_with_every_item(build, batch_of):
    batch = batch_of([3, 7, 9], targets=[5])
    model = build(objective={"negatives": "catalogue"})
    vectors = model.item_table()
    hidden = model.decoder(tokens_of(model, [3, 7, 9, 5], vectors)[None])[0][0]
    by_hand = []
    for t, item in enumerate([7, 9, 5], start=1):
        scores = F.cosine_similarity(hidden[t * 4 + 2][None], vectors[1:]) / 0.0625
        by_hand.append(-scores.log_softmax(0)[item - 1])
    torch.testing.assert_close(model.losses(batch)["dense"], torch.stack(by_hand).mean())


@pytest.mark.parametrize("objective", [{"negatives": "catalogue"}, {"extra_negatives": 2000}])
def test_items_that_training_never_meets_are_no_negatives(build, batch_of, catalog, objective):
    """Else a new item would be pushed away from everybody before anyone could want it."""
    catalog.train_counts[[4, 17]] = 0
    model = build(objective=objective)
    asked = []
    model.item_encoder.register_forward_hook(lambda _m, args, _out: asked.append(args[0].tolist()))
    model.losses(batch_of([3, 7, 9], targets=[5]))
    assert asked == [[item for item in range(1, 38) if item not in (4, 17)]]


def test_each_objective_setting_changes_the_loss(build, batch_of):
    batch = batch_of([3, 7, 9], [11, 12, 4], targets=[5, 6])
    plain = build().losses(batch)
    settings = [{"temperature": 1.0}, {"mask_same_sequence": True}, {"log_q": True}, {"negatives": "catalogue"}]
    for setting in [*settings, {"extra_negatives": 20}]:
        assert dense_loss(build, batch, **setting) != pytest.approx(plain["dense"].item(), abs=1e-4), setting
    torch.testing.assert_close(build(objective={"sparse_weight": 3.0}).losses(batch)["sparse"], 3 * plain["sparse"])
    torch.testing.assert_close(build(objective={"dense_weight": 0.5}).losses(batch)["dense"], 0.5 * plain["dense"])


def test_mask_same_sequence_leaves_out_the_users_other_items(build, batch_of):
    batch = batch_of([3, 7], [11, 12], targets=[9, 4])
    model = build(objective={"mask_same_sequence": True})
    vectors = model.item_table()
    terms = []
    for own, others in (([3, 7, 9], [11, 12, 4]), ([11, 12, 4], [3, 7, 9])):
        hidden = model.decoder(tokens_of(model, own, vectors)[None])[0][0]
        for t in (1, 2):
            candidates = [own[t], *others]
            scores = F.cosine_similarity(hidden[t * 4 + 2][None], vectors[candidates]) / 0.0625
            terms.append(-scores.log_softmax(0)[0])
    torch.testing.assert_close(model.losses(batch)["dense"], torch.stack(terms).mean())


def test_extra_negatives_are_drawn_from_the_whole_catalogue_and_counted_once(build, batch_of):
    model = build(objective={"extra_negatives": 500})
    asked = []
    model.item_encoder.register_forward_hook(lambda _m, args, _out: asked.append(args[0].tolist()))
    model.losses(batch_of([3, 7], targets=[9]))
    assert asked == [list(range(1, 38))]  # 500 draws miss none of 37 items, and each is encoded once


def test_log_q_is_the_chance_of_being_in_the_batch(build, batch_of, catalog):
    """Twice as likely to be drawn, one log 2 less score, for rare items: 1 - (1 - p)^n is about n p."""
    batch = batch_of([3, 7], targets=[9])
    model = build(objective={"log_q": True})
    vectors = model.item_table()
    hidden = model.decoder(tokens_of(model, [3, 7, 9], vectors)[None])[0][0]
    p = torch.tensor(catalog.train_counts / catalog.train_counts.sum())[[3, 7, 9]]
    log_q = (1 - (1 - p) ** 3).log()
    terms = []
    for t in (1, 2):
        scores = F.cosine_similarity(hidden[t * 4 + 2][None], vectors[[3, 7, 9]]) / 0.0625 - log_q
        terms.append(-scores.log_softmax(0)[t])
    torch.testing.assert_close(model.losses(batch)["dense"], torch.stack(terms).mean().float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "setting",
    [{"num_beams": 2}, {"per_cell": 1}, {"tau": 0.2}, {"psi": 1.0}, {"fusion": "per_id"}],
    ids=lambda setting: next(iter(setting)),
)
def test_each_search_setting_changes_the_scores(build, batch_of, setting):
    items = build().build_index()
    plain = build().recommend(batch_of(*HISTORIES), 20, items)
    changed = build(search=setting).recommend(batch_of(*HISTORIES), 20, items)
    assert not torch.equal(plain.scores, changed.scores)


def test_only_bos_answers_an_empty_history(build, batch_of):
    empty = batch_of([], [3])
    with pytest.raises(InputError, match=r"user 0 has an empty history.*bos: true"):
        build().recommend(empty, 5, build().build_index())
    model = build({"bos": True})
    found = model.recommend(empty, 5, model.build_index())
    assert (found.item_ids > 0).all()


def test_a_batch_overfits(build, batch_of):
    model = build({"dropout": 0.0}).train()
    batch = batch_of(*HISTORIES, targets=[4, 13, 9])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(model.losses(batch).values()).backward()
        optimizer.step()
    model.eval()
    found = model.recommend(batch, 1, model.build_index())
    assert found.item_ids[:, 0].tolist() == [4, 13, 9]


def test_a_history_longer_than_the_positions_is_refused(build, batch_of):
    model = build({"max_items": 4})
    with pytest.raises(InputError, match=r"sequence of 6 items.*positions for 4.*decoder.max_items"):
        model.recommend(batch_of([1, 2, 3, 4, 5, 6]), 5, model.build_index())


def test_a_checkpoint_of_other_semantic_ids_is_refused(build, semantic_ids):
    from dataclasses import replace

    other = replace(semantic_ids, codes=(semantic_ids.codes + 1) % 4 * (torch.arange(38)[:, None] > 0))
    with pytest.raises(InputError, match="trained with other semantic IDs"):
        build(ids=other).load_state_dict(build().state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": {"temperature": 0.0}}, r"temperature=0.0 must be above 0"),
        ({"objective": {"log_q": True, "negatives": "catalogue"}}, r"log_q"),
        ({"objective": {"extra_negatives": -1}}, r"extra_negatives=-1"),
        ({"decoder": {"num_heads": 3}}, r"dim=16 must be a multiple of decoder.num_heads=3"),
        (
            {"decoder": {"dense_head": "residual"}, "tokens": {"order": "parallel"}},
            r"decoder.dense_head=residual is for tokens.paths=both and tokens.order=cascade",
        ),
        ({"search": {"num_beams": 0}}, r"num_beams=0"),
        ({"search": {"per_cell": -1}}, r"per_cell=-1"),
    ],
)
def test_impossible_settings_are_refused_with_the_key(build, settings, message):
    with pytest.raises(InputError, match=message):
        build(**settings)
