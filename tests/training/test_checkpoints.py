"""A run's weights come back as they were, or not at all."""

import pickle

import pytest
import torch

from recsys_lightning.errors import InputError
from recsys_lightning.models.cobra import COBRA, CobraDecoder
from recsys_lightning.models.popularity import Popularity
from recsys_lightning.semantic_ids.residual_kmeans import ResidualKMeans
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.training.checkpoints import load_weights, model_weights, read_checkpoint, trained_model
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import TokenizerModule


def cobra_module(semantic_ids, dim: int = 16) -> RecommenderModule:
    decoder = CobraDecoder(num_layers=1, num_heads=2, dropout=0.3)
    return RecommenderModule(lambda catalog: COBRA(catalog, semantic_ids, dim, decoder=decoder))


@pytest.fixture
def saved(catalog, semantic_ids, tmp_path):
    """A COBRA and its checkpoint, with what else Lightning puts there."""
    torch.manual_seed(3)
    model = cobra_module(semantic_ids).build_model(catalog)
    state = {f"recommender.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": state | {"other.metric": torch.zeros(1)}, "epoch": 4, "callbacks": {}}, path)
    return model, path


def test_the_model_has_the_checkpoints_weights_and_evaluates(saved, catalog, semantic_ids, batch_of):
    trained, path = saved
    found = trained_model(cobra_module(semantic_ids), catalog, path)
    assert found is not trained
    assert not found.training
    expected = trained.eval().state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_a_tokenizers_weights_come_back(catalog, tmp_path):
    module = TokenizerModule(lambda width: ResidualKMeans(width, num_levels=2, num_codes=4))
    made = module.build_tokenizer(12).fit(catalog.text_embeddings()[1:])
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": {f"tokenizer.{name}": value for name, value in made.state_dict().items()}}, path)
    found = trained_model(module, catalog, path)
    embeddings = catalog.text_embeddings()[1:]
    assert torch.equal(found.encode(embeddings), made.encode(embeddings))


def test_weights_have_the_models_own_names(saved, semantic_ids):
    model, path = saved
    checkpoint = read_checkpoint(path)
    assert checkpoint["epoch"] == 4
    assert model_weights(cobra_module(semantic_ids), checkpoint).keys() == model.state_dict().keys()


def test_weights_of_another_width_are_refused_on_one_line(saved, catalog, semantic_ids):
    with pytest.raises(InputError, match="other model or data settings") as caught:
        trained_model(cobra_module(semantic_ids, dim=8), catalog, saved[1])
    assert "\n" not in str(caught.value)


def test_weights_of_other_semantic_ids_are_refused(saved, catalog, semantic_ids):
    codes = semantic_ids.codes.clone()
    codes[5, 0] = (codes[5, 0] + 1) % 4
    other = SemanticIds(codes=codes, num_codes=4, embeddings_fingerprint="f" * 64, tokenizer="other")
    with pytest.raises(InputError, match="other semantic IDs"):
        trained_model(cobra_module(other), catalog, saved[1])


def test_weights_of_another_model_are_refused(saved, catalog):
    with pytest.raises(InputError, match="other model or data settings"):
        trained_model(RecommenderModule(Popularity), catalog, saved[1])


def test_what_is_to_be_kept_is_neither_loaded_nor_missed(catalog):
    model = Popularity(catalog)
    before = model.counts.clone()
    load_weights(model, {"counts": torch.zeros_like(before)}, keep=("counts",))
    load_weights(model, {}, keep=("counts",))
    assert torch.equal(model.counts, before)
    load_weights(model, {"counts": torch.zeros_like(before)})
    assert not model.counts.any()


def test_a_file_without_weights_is_refused(tmp_path):
    path = tmp_path / "best.ckpt"
    with pytest.raises(InputError, match="no checkpoint"):
        read_checkpoint(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="holds no weights"):
        read_checkpoint(path)


class Runs:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return print, ("it ran",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "more": Runs()}, tmp_path / "best.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        read_checkpoint(tmp_path / "best.ckpt")
    assert "it ran" not in capsys.readouterr().out


def test_a_module_of_neither_kind_is_refused(catalog, saved):
    import lightning as L

    with pytest.raises(InputError, match="neither a recommender nor a tokenizer"):
        trained_model(L.LightningModule(), catalog, saved[1])
