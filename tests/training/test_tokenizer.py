"""TokenizerModule: every tokenizer is fitted by one mechanism and leaves the table it promises."""

import dataclasses

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recsys_lightning.data.datamodules import ItemDataModule
from recsys_lightning.data.encoders import TfidfSVD
from recsys_lightning.data.sources import Synthetic
from recsys_lightning.errors import InputError
from recsys_lightning.models.popularity import Popularity
from recsys_lightning.models.rqvae import RQVAE
from recsys_lightning.semantic_ids.collisions import resolve
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans
from recsys_lightning.semantic_ids.residual_vq import ResidualVQ
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import FILE_NAME, TokenizerModule


@pytest.fixture
def data(tmp_path):
    source = Synthetic(num_users=80, num_themes=2, topics_per_theme=3, items_per_topic=8)
    return ItemDataModule(source, TfidfSVD(dim=12), cache_dir=str(tmp_path / "cache"), k_core=0, batch_size=16, seed=1)


def fit(module, data, folder, **settings):
    checkpoint = ModelCheckpoint(folder, "best", monitor="val/loss", mode="min", auto_insert_metric_name=False)
    run = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        **({"max_epochs": 4, "callbacks": [checkpoint]} | settings),
    )  # fmt: skip
    run.fit(module, data)
    return run


TOKENIZERS = {
    "rqvae": lambda width: RQVAE(width, hidden=(16,), latent_dim=8, num_levels=2, num_codes=6),
    "kmeans": lambda width: ResidualKMeans(width, num_levels=2, num_codes=6),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_fit_leaves_a_table_of_the_whole_catalogue_with_its_fingerprint(data, tmp_path, name):
    fit(TokenizerModule(TOKENIZERS[name]), data, tmp_path)
    table = SemanticIds.load(tmp_path / FILE_NAME, data.catalog.text_fingerprint, data.catalog.num_items)
    assert table.codes.shape == (data.catalog.num_items + 1, 2)
    assert table.num_codes == 6


def test_the_table_comes_from_the_best_checkpoint(data, tmp_path):
    module = TokenizerModule(TOKENIZERS["rqvae"])
    run = fit(module, data, tmp_path)
    best = TokenizerModule(TOKENIZERS["rqvae"])
    best.trainer = run
    best.configure_model()
    best.load_state_dict(torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"])
    assert torch.equal(best.semantic_ids().codes, SemanticIds.load(tmp_path / FILE_NAME).codes)


def test_training_lowers_the_reconstruction_error(data, tmp_path):
    short = fit(TokenizerModule(TOKENIZERS["rqvae"]), data, tmp_path / "a", max_epochs=1)
    long = fit(TokenizerModule(TOKENIZERS["rqvae"]), data, tmp_path / "b", max_epochs=60)
    assert long.callback_metrics["val/reconstruction"] < 0.8 * short.callback_metrics["val/reconstruction"]


def test_the_whole_catalogue_is_judged(data, tmp_path):
    run = fit(TokenizerModule(TOKENIZERS["kmeans"]), data, tmp_path, max_epochs=1)
    report = SemanticIds.load(tmp_path / FILE_NAME).collision_report()
    logged = run.callback_metrics
    assert float(logged["val/collision_rate"]) == pytest.approx(report.collision_rate)
    assert float(logged["val/cells"]) == report.num_cells
    for level in (1, 2):
        assert float(logged[f"val/perplexity@{level}"]) == pytest.approx(report.perplexity[level - 1], rel=1e-5)
        assert float(logged[f"val/entropy@{level}"]) == pytest.approx(report.entropy_share[level - 1], rel=1e-5)
        assert float(logged[f"val/dead_codes@{level}"]) == 6 - report.used_codes[level - 1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cold_items_teach_nothing_and_get_semantic_ids(data, tmp_path, name):
    """The embeddings of the items held out may be anything: what is learned, logged and chosen stays the same."""
    data.cold_items, data.cold_seed = 0.25, 1
    data.prepare_data()
    data.setup()
    cold, text = torch.from_numpy(data.split.cold), data.catalog.text
    assert len(cold) == 12
    outcomes = []
    for shift in (0.0, 5.0):
        vectors = np.array(text.vectors)
        vectors[data.split.cold] += shift
        data._catalog = dataclasses.replace(data.catalog, text=dataclasses.replace(text, vectors=vectors))
        torch.manual_seed(0)
        folder = tmp_path / str(shift)
        run = fit(TokenizerModule(TOKENIZERS[name]), data, folder)
        weights = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
        codes = SemanticIds.load(folder / FILE_NAME, num_items=48).codes
        outcomes.append((weights, dict(run.callback_metrics), codes))
    (weights, logged, codes), (other_weights, other_logged, other_codes) = outcomes
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), key
    assert logged.keys() == other_logged.keys()
    assert all(torch.equal(value, other_logged[key]) for key, value in logged.items())
    warm = torch.from_numpy(data.warm_items)
    assert torch.equal(codes[warm], other_codes[warm])
    assert not torch.equal(codes[cold], other_codes[cold]), "they are given the IDs that their texts ask for"


def test_a_resumed_fit_does_not_start_its_codebooks_anew(data, tmp_path, monkeypatch):
    fit(TokenizerModule(TOKENIZERS["rqvae"]), data, tmp_path)
    monkeypatch.setattr(RQVAE, "fit", lambda *_: pytest.fail("fitted a second time"))
    again = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False, max_epochs=5,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    again.fit(TokenizerModule(TOKENIZERS["rqvae"]), data, ckpt_path=str(tmp_path / "best.ckpt"), weights_only=True)


@pytest.mark.parametrize(
    "build",
    [
        lambda steps: TokenizerModule(TOKENIZERS["rqvae"], warmup_steps=steps),
        lambda steps: RecommenderModule(Popularity, warmup_steps=steps),
    ],
    ids=["tokenizer", "recommender"],
)
def test_a_negative_warm_up_is_refused(build):
    build(0)
    with pytest.raises(InputError, match=r"model.warmup_steps=-1 must be 0 or more"):
        build(-1)


@pytest.mark.parametrize("collisions", ["none", "extra_token", "sinkhorn", "reassign"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_file_holds_what_the_policy_of_collisions_makes_and_results_say_what_it_cost(
    data, tmp_path, name, collisions
):
    module = TokenizerModule(TOKENIZERS[name], collisions=collisions)
    run = fit(module, data, tmp_path)
    written = SemanticIds.load(tmp_path / FILE_NAME)
    raw = module.semantic_ids()
    again = resolve(collisions, module.built, data.catalog.text_embeddings(), raw)
    assert torch.equal(written.codes, again.table.codes)
    assert written.item_ids == tuple(data.catalog.raw_ids)
    assert module.written.cost.policy == collisions
    rates = module.written.cost.collision_rate
    assert rates[0] > 0
    assert (rates[1] == 0) if collisions == "extra_token" else (rates[1] == rates[0]) == (collisions == "none")
    run.test(module, data, verbose=False)
    assert float(run.callback_metrics["test/collision_rate"]) == pytest.approx(rates[1])


def test_without_losses_the_reconstruction_error_is_the_loss(data, tmp_path):
    closed = fit(TokenizerModule(TOKENIZERS["kmeans"]), data, tmp_path / "a", max_epochs=1).callback_metrics
    assert float(closed["val/loss"]) == float(closed["val/reconstruction_error"])
    trained = fit(TokenizerModule(TOKENIZERS["rqvae"]), data, tmp_path / "b", max_epochs=2).callback_metrics
    terms = float(trained["val/reconstruction"]) + float(trained["val/quantization"])
    assert float(trained["val/loss"]) == pytest.approx(terms, rel=1e-5)
    assert float(trained["val/loss"]) != float(trained["val/reconstruction_error"])


def test_the_loss_of_each_validation_is_that_of_its_own_codes(data, tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, module):
            now = trainer.callback_metrics
            seen.append((float(now["val/loss"]), float(now["val/reconstruction_error"])))

    module = TokenizerModule(lambda width: ResidualVQ(width, 2, 6, codebook_update="ema", ema_decay=0.5))
    assert module.build_tokenizer(12).losses(torch.randn(4, 12)) == {}
    fit(module, data, tmp_path, max_epochs=3, callbacks=[Watch()], enable_checkpointing=False)
    assert len({loss for loss, _ in seen}) > 1
    assert all(loss == error for loss, error in seen)


def test_an_unknown_policy_is_refused():
    with pytest.raises(InputError, match="collisions must be one of none, extra_token"):
        TokenizerModule(TOKENIZERS["kmeans"], collisions="ignore")
