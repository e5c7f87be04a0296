"""One process with a batch and several that share it out: the same loss, and the same gradient of every weight."""

import dataclasses
from functools import partial
from typing import get_args
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.sequences import SequenceBatch
from recsys_lightning.data.text import ItemEmbeddings
from recsys_lightning.models.cobra import COBRA, CobraDecoder, CobraObjective, CobraTokens
from recsys_lightning.models.rqvae import RQVAE, RQVAEEstimator
from recsys_lightning.models.sasrec import SASRec
from recsys_lightning.models.sparc import SPARC, SparcCodebooks, SparcObjective, SparcSearch
from recsys_lightning.models.two_tower import PairObjective, TwoTower, UserSettings
from recsys_lightning.nn.item_encoders import EmbeddingItemEncoder, IdItemEncoder, TextItemEncoder
from recsys_lightning.nn.item_tower import FeatureItemEncoder
from recsys_lightning.semantic_ids.residual_vq import ResidualVQ
from recsys_lightning.semantic_ids.table import SemanticIds

ITEMS = 25
MODELS = {
    "COBRA": {},
    "COBRA, text": {"item_encoder": partial(TextItemEncoder, vocabulary_size=60, dropout=0.0)},
    "COBRA, whole catalogue": {"objective": {"negatives": "catalogue"}},
    "COBRA, corrected": {"objective": {"log_q": True, "mask_same_sequence": True, "detach_targets": True}},
    "COBRA, queue": {"objective": {"queue": 10}},
    "COBRA, dense first": {"tokens": {"order": "dense_first"}},
    "COBRA, IDs alone": {"tokens": {"paths": "sparse"}},
    "COBRA, vectors alone": {"tokens": {"paths": "dense"}, "item_encoder": IdItemEncoder},
    "SASRec": None,
    "TwoTower": {"objective": {}},
    "TwoTower, batch": {"objective": {"drawn_from": "batch", "log_q": True}, "normalize": True},
    "TwoTower, contrast alone": {"objective": {"bce_weight": 0.0, "contrast_pool": True}, "normalize": True},
    "SPARC": {},
    "SPARC, z_recon": {"objective": {"own_share": 0.0, "search_weight": 1.0}, "user": {"start": True}},
    "SPARC, batch": {"objective": {"drawn_from": "batch"}, "normalize": True, "codebooks": {"estimator": "rotation"}},
    "SPARC, interest alone": {
        "objective": dict.fromkeys(
            ("bce_weight", "contrast_weight", "rq_weight", "bpr_weight", "item_contrast_weight"), 0.0
        ),
        "codebooks": {"warmup_steps": 0},
    },
    "SPARC, warm-up": {"codebooks": {"warmup_steps": 9}, "objective": {"search_weight": 1.0}},
    "SPARC-Static": {"codebooks": {"joint": False}},
}
# Tokenizers, by what they are made of; their rows are shared out 3 to 2, or 2 to 2 to 1.
TOKENIZERS = {
    "RQVAE": partial(RQVAE, hidden=(8,), latent_dim=4, dead_code_threshold=0.0),
    "RQVAE, rotation": partial(RQVAE, hidden=(8,), latent_dim=4, dead_code_threshold=0.0, estimator="rotation"),
    "RQVAE, by gradient": partial(
        RQVAE, hidden=(8,), latent_dim=4, dead_code_threshold=0.0, codebook_update="gradient"
    ),
    "ResidualVQ": partial(ResidualVQ, dead_code_threshold=0.0),
}


def build(name, settings):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    fields = pl.DataFrame({"item_id": [f"{i}" for i in range(ITEMS)], "title": [f"red soap {i}" for i in range(ITEMS)]})
    vectors = np.concatenate([np.zeros((1, 6)), rng.normal(size=(ITEMS, 6))]).astype(np.float32)
    counts = np.concatenate([[0], rng.integers(1, 9, ITEMS)])
    catalog = Catalog(fields, counts, ItemEmbeddings(vectors, "f" * 64, "random"))
    if name.startswith("TwoTower"):
        return TwoTower(
            catalog, 8, 6, settings.get("normalize", False), item_encoder=TOWER, user=UserSettings(dropout=0.0),
            objective=PairObjective(negatives=2, **settings["objective"]),
        )  # fmt: skip
    if name.startswith("SPARC"):
        return SPARC(
            catalog, 8, 6, settings.get("normalize", False), TOWER,
            UserSettings(dropout=0.0, **settings.get("user", {})),
            SparcCodebooks(**({"num_codes": 4, "warmup_steps": 1} | settings.get("codebooks", {}))),
            SparcObjective(negatives=2, **settings.get("objective", {})),
            SparcSearch(num_interests=2),
        )  # fmt: skip
    if settings is None:
        return SASRec(catalog, dim=8, dropout=0.0, max_history=6)
    codes = torch.randint(0, 3, (ITEMS + 1, 2))
    codes[0] = 0
    return COBRA(
        catalog,
        SemanticIds(codes, 3, "f" * 64, "random"),
        8,
        settings.get("item_encoder", partial(EmbeddingItemEncoder, hidden=(8,), dropout=0.0)),
        CobraTokens(**settings.get("tokens", {})),
        CobraDecoder(num_heads=2, dropout=0.0, max_items=7),
        CobraObjective(**settings.get("objective", {})),
    )


def whole_batch():
    """Sequences of unequal length, so that the two halves have unequal numbers of positions to learn from."""
    histories = [[3, 7, 9, 20, 1], [11, 12, 3], [5], [6, 2], [8]]
    rows = [torch.tensor(row + [0] * (5 - len(row))) for row in histories]
    return SequenceBatch(
        torch.arange(5), torch.stack(rows), torch.tensor([[4], [13], [9], [3], [25]]), torch.zeros(5, 0).long()
    )


TOWER = partial(FeatureItemEncoder, text=True, dropout=0.0)


# Draws that are the same however many processes share out a batch. The first position of all stands in the first
# process, so that the first of anything is drawn; of weights the largest.
DRAWS = {
    "rand": lambda *size, device=None: torch.zeros(size, device=device),
    "randint": lambda high, size, device=None: torch.zeros(size, dtype=torch.long, device=device),
    "randperm": lambda count, device=None: torch.arange(count, device=device),
    "multinomial": lambda weights, count, replacement: weights.argmax(1, keepdim=True).expand(-1, count),
}


@mock.patch.multiple(torch, **DRAWS)
def two_steps(model, batch):
    """Losses and gradients of the second of two steps: the queue of the first is in it, and SPARC has its codes."""
    model.train()
    sum(model.losses(batch).values()).backward()
    # In the warm-up as after it: DistributedDataParallel waits for the gradient of every weight.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    terms = model.losses(batch)
    sum(terms.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: term.detach() for name, term in terms.items()}, grads


def build_tokenizer(name, seed=0):
    """One with codebooks from k-means; with another seed, of other rows."""
    torch.manual_seed(0)
    tokenizer = TOKENIZERS[name](6, num_levels=2, num_codes=4, seed=seed)
    return tokenizer.fit(torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)))


def rows_to_learn():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def check_tokenizers(number, world, folder):
    for name in TOKENIZERS:
        # Each process finds codebooks of its own, and all must take the first one's.
        tokenizer, expected = build_tokenizer(name, seed=number), torch.load(f"{folder}/{name}.pt")
        terms, grads = two_steps(tokenizer, rows_to_learn()[number::world])
        for tensor in (*terms.values(), *grads.values()):
            dist.all_reduce(tensor)
            tensor /= world
        for found, wanted in (
            (terms, expected["terms"]), (grads, expected["grads"]), (tokenizer.state_dict(), expected["state"])
        ):  # fmt: skip
            assert found.keys() == wanted.keys()
            for key in found:
                assert torch.allclose(found[key], wanted[key], atol=1e-6, rtol=1e-4), f"{name}: {key}"


def process(number, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=world)
    for name, settings in MODELS.items():
        model, batch = build(name, settings), whole_batch()
        if model.quantizer is not None:  # each process finds codebooks of its own, and all must take the first one's
            model.settings = dataclasses.replace(model.settings, seed=number)
        part = {f.name: getattr(batch, f.name)[number::world] for f in dataclasses.fields(batch)}
        terms, grads = two_steps(model, SequenceBatch(**part))
        # What DistributedDataParallel does: the mean over processes.
        for tensor in (*terms.values(), *grads.values()):
            dist.all_reduce(tensor)
            tensor /= world
        expected = torch.load(f"{folder}/{name}.pt")
        for found, wanted in ((terms, expected["terms"]), (grads, expected["grads"])):
            assert found.keys() == wanted.keys()
            for key in found:
                assert torch.allclose(found[key], wanted[key], atol=1e-6, rtol=1e-4), f"{name}: {key}"
        if model.quantizer is not None:
            for key, value in model.state_dict().items():
                assert torch.allclose(value, expected["state"][key], atol=1e-6), f"{name}: {key}"
    check_tokenizers(number, world, folder)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_gradients_are_those_of_one_process_with_the_whole_batch(tmp_path, world):
    pytest.importorskip("tokenizers")
    for name, settings in MODELS.items():
        model = build(name, settings)
        terms, grads = two_steps(model, whole_batch())
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        torch.save({"terms": terms, "grads": grads, "state": model.state_dict()}, tmp_path / f"{name}.pt")
    for name in TOKENIZERS:
        tokenizer = build_tokenizer(name)
        terms, grads = two_steps(tokenizer, rows_to_learn())
        torch.save({"terms": terms, "grads": grads, "state": tokenizer.state_dict()}, tmp_path / f"{name}.pt")
    mp.spawn(process, args=(world, tmp_path), nprocs=world)


VARIANTS = [
    *({"estimator": estimator} for estimator in get_args(RQVAEEstimator)),
    *({"estimator": estimator, "codebook_update": "gradient"} for estimator in get_args(RQVAEEstimator)),
    {"sinkhorn": 0.003},
    {"sinkhorn": 0.003, "codebook_update": "gradient"},
    {"normalize": True, "dropout": 0.5, "commitment": 0.0},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_weight_of_an_rqvae_has_a_gradient_in_every_step(settings):
    tokenizer = RQVAE(6, (8,), 4, 2, 4, **settings).fit(torch.randn(20, 6))
    for _ in range(2):
        sum(tokenizer.losses(torch.randn(5, 6)).values()).backward()
        assert all(p.grad is not None for p in tokenizer.parameters() if p.requires_grad)
        tokenizer.zero_grad()
