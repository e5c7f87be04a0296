"""The audit's checks of models and semantic IDs: each passes on honest ones and fails on a leak that is planted."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from recsys_lightning.analysis.audit_model import (
    check_catalogue_facts,
    check_losses,
    check_semantic_ids,
    check_texts,
    load_weights,
)
from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA, CobraDecoder, CobraObjective
from recsys_lightning.models.popularity import Popularity
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.models.rqvae import RQVAE
from recsys_lightning.nn.item_encoders import EmbeddingItemEncoder
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans
from recsys_lightning.semantic_ids.tokenizer import tokenize


class Toy(Recommender):
    """One weight an item; its loss contrasts answers with items drawn at random."""

    def __init__(self, catalog):
        super().__init__()
        self.num_items = catalog.num_items
        self.weight = nn.Parameter(torch.randn(catalog.num_items + 1))
        self.take(torch.as_tensor(catalog.train_counts).float())

    def take(self, counts):
        """What it takes from the catalogue's counts: nothing."""

    def factor(self):
        """Of the negatives."""
        return 1.0

    def losses(self, batch):
        drawn = torch.randint(1, self.num_items + 1, (32,))
        positive = self.weight[batch.target[:, 0]].mean()
        return {"contrast": (self.factor() * self.weight[drawn]).mean() - positive}

    def encode_items(self, *_):
        raise NotImplementedError

    def recommend(self, *_):
        raise NotImplementedError


class Weighted(Toy):
    """Weights its negatives by a buffer that no checkpoint holds."""

    def take(self, counts):
        self.register_buffer("total", counts.sum(), persistent=False)

    def factor(self):
        return 1 + self.total


class Persistent(Weighted):
    """The same with a buffer that is loaded from the checkpoint, the same for both models."""

    def take(self, counts):
        self.register_buffer("total", counts.sum())


class Hidden(Weighted):
    """The same with a plain attribute."""

    def take(self, counts):
        self.total = float(counts.sum())


class InGradientOnly(Hidden):
    """The loss has the same value whatever the counts are."""

    def factor(self):
        return 1.0

    def losses(self, batch):
        losses = super().losses(batch)
        nudge = self.total * self.weight.mean()
        return losses | {"nudge": nudge - nudge.detach()}


class InTrainingOnly(Hidden):
    def factor(self):
        return super().factor() if self.training else 1.0


class Named(Persistent):
    catalogue_facts = ("total",)


class Unrepeatable(Toy):
    def factor(self):
        return float(int.from_bytes(os.urandom(4), "big"))


@pytest.fixture
def changed(catalog):
    """The catalogue of a data module that counts held-out items: one count differs."""
    counts = catalog.train_counts.copy()
    counts[[5, 6]] += 1
    return replace(catalog, train_counts=counts)


@pytest.fixture
def batches(batch_of):
    return [batch_of([1, 2, 3], [4, 5], targets=[6, 7]), batch_of([8, 9], [10, 11], targets=[12, 13])]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -------------------------------------------------------------------------------------------- negatives and losses


@pytest.mark.parametrize("kind", [Toy, Weighted, Persistent, Hidden, InGradientOnly, InTrainingOnly, Named])
def test_losses_on_the_same_catalogue_pass(catalog, batches, kind):
    check = check_losses(kind, catalog, replace(catalog), state_of(kind(catalog)), batches)
    assert check.status == "pass", check
    assert check.figures["loss"] == len(batches) * (2 if kind is InGradientOnly else 1)
    assert check.figures["gradient"] == 1


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        (Weighted, "built total, loss contrast of batch 1, gradient of weight and 1 more change"),
        (Persistent, "built total change"),
        (Hidden, "loss contrast of batch 1, gradient of weight, loss contrast of batch 2 change"),
        (InGradientOnly, "gradient of weight change"),
        (InTrainingOnly, "loss contrast of batch 1, gradient of weight, loss contrast of batch 2 change"),
        (Named, "built total, loss contrast of batch 1"),
    ],
)
def test_a_model_that_weights_negatives_by_counts_with_held_out_items_is_found(catalog, changed, batches, kind, detail):
    check = check_losses(kind, catalog, changed, state_of(kind(catalog)), batches)
    assert check.status == "FAIL"
    assert check.detail.startswith(detail)
    assert check_losses(Toy, catalog, changed, state_of(Toy(catalog)), batches).status == "pass"


def test_the_real_log_q_correction_is_seen_to_use_counts(catalog, changed, semantic_ids, batches):
    def cobra(catalog, log_q=True):
        return COBRA(
            catalog,
            semantic_ids,
            dim=8,
            item_encoder=lambda items, dim: EmbeddingItemEncoder(items, dim, hidden=(8,)),
            decoder=CobraDecoder(num_layers=1, num_heads=2),
            objective=CobraObjective(log_q=log_q, extra_negatives=4),
        )

    state = state_of(cobra(catalog))
    assert check_losses(cobra, catalog, catalog, state, batches).status == "pass"
    check = check_losses(cobra, catalog, changed, state, batches)
    assert check.status == "FAIL"
    assert check.detail.startswith("built log_popularity, loss dense of batch 1")


def test_the_checkpoint_s_weights_are_those_compared(catalog, batches):
    class Fragile(Hidden):
        def factor(self):
            return 1 + self.total * self.weight[0].clamp_min(0)

    counts = catalog.train_counts * 2
    state = state_of(Fragile(catalog))
    for weight, status in ((-1.0, "pass"), (1.0, "FAIL")):
        state["weight"][0] = weight
        assert check_losses(Fragile, catalog, replace(catalog, train_counts=counts), state, batches).status == status


def test_dropout_and_states_that_a_model_keeps_do_not_disturb_the_comparison(catalog):
    rows = [torch.from_numpy(np.array(catalog.text.vectors[1:])), torch.randn(9, 12)]
    build = lambda _: RQVAE(12, hidden=[8], latent_dim=4, num_levels=2, num_codes=4, dropout=0.5)  # noqa: E731
    tokenizer = build(catalog).fit(rows[0])
    assert check_losses(build, catalog, catalog, state_of(tokenizer), rows).status == "pass"


def test_a_model_without_losses_passes_by_what_it_is_built_of(catalog, changed, batches):
    state = state_of(Popularity(catalog))
    check = check_losses(Popularity, catalog, catalog, state, batches)
    assert (check.status, check.figures) == ("pass", {"built": 1, "loss": 0, "gradient": 0})
    assert check_losses(Popularity, catalog, changed, state, batches).detail.startswith("built counts change")


def test_losses_that_cannot_be_repeated_are_not_checked(catalog, batches):
    check = check_losses(Unrepeatable, catalog, catalog, state_of(Toy(catalog)), batches)
    assert (check.status, check.detail) == (
        "not checked",
        "losses cannot be repeated on this machine, not even on the same data",
    )


def test_the_random_numbers_of_the_caller_are_left_alone(catalog, batches):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_losses(Toy, catalog, catalog, {"weight": torch.zeros(38)}, batches)
    assert torch.equal(torch.rand(3), expected)


def test_weights_are_loaded_and_facts_are_not(catalog, changed):
    model, state = Named(catalog), state_of(Named(changed))
    load_weights(model, state)
    assert torch.equal(model.weight, state["weight"])
    assert model.total == catalog.train_counts.sum()


@pytest.mark.parametrize(
    "state", [{}, {"weight": torch.zeros(38), "other": torch.zeros(1)}, {"weight": torch.zeros(4)}]
)
def test_weights_of_another_model_are_refused(catalog, state):
    with pytest.raises(InputError, match="the checkpoint was made with other model or data settings: "):
        load_weights(Toy(catalog), state)


# --------------------------------------------------------------------------------------------------------- the facts


def test_a_popularity_checkpoint_whose_counts_include_test_items_is_found(catalog, changed):
    assert check_catalogue_facts(Popularity(catalog), state_of(Popularity(catalog))).status == "pass"
    check = check_catalogue_facts(Popularity(catalog), state_of(Popularity(changed)))
    assert (check.status, check.detail) == ("FAIL", "2 of 38 values of counts are not those of a model built anew")


def test_a_fact_that_is_missing_or_of_another_shape_is_found(catalog):
    assert check_catalogue_facts(Popularity(catalog), {}).detail == "the checkpoint holds no counts"
    check = check_catalogue_facts(Popularity(catalog), {"counts": torch.zeros(3)})
    assert (check.status, check.detail) == ("FAIL", "counts is (3,), a model built anew has (38,)")


def test_buffers_that_a_model_does_not_name_are_not_checked(catalog):
    assert check_catalogue_facts(Toy(catalog), {}).status == "pass"
    assert check_catalogue_facts(Weighted(catalog), {}).status == "pass", "no checkpoint holds it"
    check = check_catalogue_facts(Persistent(catalog), {})
    assert (check.status, check.detail) == ("not checked", "Persistent does not say whether it learns total")


def test_buffers_beside_the_facts_are_named_as_learned(catalog):
    class Moving(Named):
        def take(self, counts):
            super().take(counts)
            self.register_buffer("average", torch.zeros(2))

    check = check_catalogue_facts(Moving(catalog), state_of(Moving(catalog)) | {"average": torch.ones(2)})
    assert check.status == "pass"
    assert check.detail == "total as in a model built anew; learned, so not compared: average"


# ----------------------------------------------------------------------------------------------- texts, semantic IDs


def test_texts_that_change_with_held_out_items_are_found(catalog):
    assert check_texts(catalog, replace(catalog)).status == "pass"
    other = replace(catalog, text=replace(catalog.text, fingerprint="e" * 64))
    assert check_texts(catalog, other).detail == "their fingerprint changes with the held-out items"
    vectors = catalog.text.vectors.copy()
    vectors[3] += 1
    other = replace(catalog, text=replace(catalog.text, vectors=vectors))
    assert check_texts(catalog, other).detail == "the embeddings change with the held-out items"


@pytest.fixture
def tokenizer(catalog):
    return ResidualKMeans(12, num_levels=2, num_codes=4).fit(catalog.text_embeddings()[1:])


@pytest.fixture
def table(catalog, tokenizer):
    return tokenize(tokenizer, catalog.text_embeddings(), catalog.text_fingerprint, "ResidualKMeans")


def test_semantic_ids_of_their_tokenizer_pass(catalog, tokenizer, table):
    check = check_semantic_ids(table, catalog, tokenizer)
    assert (check.status, check.figures) == ("pass", {"items": 37, "same_codes": 37, "share": 1.0})


def test_codes_that_pairs_of_consecutive_held_out_items_were_given_in_common_are_found(catalog, tokenizer, table):
    codes = table.codes.clone()
    pairs = [(a, b) for a in range(1, 37) for b in range(a + 1, 38) if not torch.equal(codes[a], codes[b])][:2]
    for validation, test in pairs:
        codes[test] = codes[validation]
    planted = replace(table, codes=codes)
    assert planted.embeddings_fingerprint == catalog.text_fingerprint
    check = check_semantic_ids(planted, catalog, tokenizer)
    assert check.status == "FAIL"
    assert check.detail == f"the tokenizer's checkpoint makes the same codes of {37 - 2} of 37 item texts"


def test_a_single_item_of_a_thousand_may_lie_on_an_edge(catalog):
    vectors = np.concatenate([np.zeros((1, 12)), np.random.default_rng(0).normal(size=(2000, 12))]).astype(np.float32)
    many = replace(
        catalog,
        fields=catalog.fields[[0] * 2000],
        train_counts=np.zeros(2001, dtype=np.int64),
        text=replace(catalog.text, vectors=vectors),
    )
    tokenizer = ResidualKMeans(12, num_levels=2, num_codes=4).fit(many.text_embeddings()[1:])
    table = tokenize(tokenizer, many.text_embeddings(), many.text_fingerprint, "ResidualKMeans")
    for moved, status in ((2, "pass"), (3, "FAIL")):
        codes = table.codes.clone()
        codes[1 : 1 + moved, 0] = (codes[1 : 1 + moved, 0] + 1) % 4
        assert check_semantic_ids(replace(table, codes=codes), many, tokenizer).status == status


def test_semantic_ids_of_other_embeddings_or_other_items_are_found(catalog, tokenizer, table):
    check = check_semantic_ids(replace(table, embeddings_fingerprint="e" * 64), catalog, tokenizer)
    assert (check.status, check.detail) == (
        "FAIL",
        "they come from embeddings eeeeeeeeeeee, the catalogue's texts have ffffffffffff",
    )
    check = check_semantic_ids(replace(table, codes=table.codes[:-1]), catalog, tokenizer)
    assert (check.status, check.detail) == ("FAIL", "they are of 36 items, the catalogue has 37")
    other = ResidualKMeans(12, num_levels=3, num_codes=4).fit(catalog.text_embeddings()[1:])
    check = check_semantic_ids(table, catalog, other)
    assert (check.status, check.detail) == ("FAIL", "their tokenizer makes 3 codes an item, the table has 2")


def test_semantic_ids_without_their_tokenizer_are_not_checked(catalog, table):
    check = check_semantic_ids(table, catalog, None, "nothing is known of it")
    assert check.status == "not checked"
    assert check.detail.endswith("but nothing is known of it")
