"""The weights of a finished run, read as data only, and the model that they belong to."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from recsys_lightning.data.catalog import Catalog
from recsys_lightning.errors import InputError
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer
from recsys_lightning.training.recommender import RecommenderModule
from recsys_lightning.training.tokenizer import TokenizerModule

Learner = Recommender | ItemTokenizer
Build = Callable[[Catalog], Learner]
State = Mapping[str, Tensor]


def trained_model(module: L.LightningModule, catalog: Catalog, checkpoint: Path) -> Learner:
    """The model of a run, built from its catalogue, with the checkpoint's weights, in evaluation mode.

    Args:
        module: the run's `RecommenderModule` or `TokenizerModule`; it is left as it is.
        catalog: of the run's data.
        checkpoint: file that the run wrote.

    Raises:
        InputError: the checkpoint is none, or is of another model, other semantic IDs or other data.
    """
    model = builder_of(module)(catalog)
    load_weights(model, model_weights(module, read_checkpoint(checkpoint)))
    return model.eval()


def builder_of(module: L.LightningModule) -> Build:
    """What makes the model of a module from a catalogue.

    Raises:
        InputError: the module is neither of a recommender nor of a tokenizer.
    """
    if isinstance(module, RecommenderModule):
        return module.build_model
    if isinstance(module, TokenizerModule):
        make = module.build_tokenizer
        return lambda catalog: make(catalog.text_width)
    raise InputError(f"{type(module).__name__} is neither a recommender nor a tokenizer")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All that Lightning has put into a checkpoint; nothing in it can run code.

    Raises:
        InputError: there is no such file, or it holds no weights.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint {path}: train first, or name another one")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InputError(f"{path} is no checkpoint of a run: it holds no weights")
    return checkpoint


def model_weights(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> State:
    """The weights in a checkpoint by the model's own names; the module's stand before those of its model."""
    prefix = "tokenizer." if isinstance(module, TokenizerModule) else "recommender."
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_weights(model: Learner, state: State, keep: Collection[str] = ()) -> None:
    """Load weights into a model, all but those named `keep`, which stay as they were built.

    Raises:
        InputError: they are the weights of another model.
    """
    try:
        missing, unexpected = model.load_state_dict({k: v for k, v in state.items() if k not in keep}, strict=False)
    except RuntimeError as error:  # of another shape
        missing, unexpected = [], [str(error).splitlines()[-1].strip()]
    wrong = [*unexpected, *(name for name in missing if name not in keep)]
    if wrong:
        raise InputError(f"the checkpoint was made with other model or data settings: {wrong[0]}")
