"""The index of an evaluation: item vectors encoded once, shared out over the processes, and kept where asked to."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from recsys_lightning.distributed import gather_rows, rank, world_size
from recsys_lightning.errors import InputError
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.index import ItemIndex, LocalIndex
from recsys_lightning.retrieval.index_files import load_index, save_index
from recsys_lightning.retrieval.measured import MeasuredIndex


def index_of(model: Recommender, settings: IndexSettings, raw_ids: Sequence[str] | None = None) -> ItemIndex:
    """An index of all items of a model. Every process encodes its share of them.

    Without `settings.sharded` each process then holds all vectors, with it only its own. An approximate index comes
    with an exact one beside it, which tells how much of it the first queries find.

    Args:
        model: whose items.
        settings: which index. With a `path` the index is taken from there if it was made from this model's weights,
            and kept there if there is none.
        raw_ids: raw ids of items 1 .. I: a kept index of another catalogue is refused. None neither keeps nor takes an
            index, whatever the path: within `fit` the weights change.

    Raises:
        InputError: vectors that cannot be ranked, settings that do not fit, a kept index of other weights, or fewer
            items than processes.
    """
    share, first = _share(model)
    if settings.sharded:
        index = build_index(share, settings, model.similarity, first)
        exact = dataclasses.replace(settings, backend="torch", factory="Flat", parameters="", gpus="replicate")
        return index if index.exact else MeasuredIndex(index, build_index(share, exact, model.similarity, first))
    table = F.pad(gather_rows(share), (0, 0, 1, 0))  # (I+1, D)
    index = _kept(model, table, settings, raw_ids)
    return index if index.exact else MeasuredIndex(index, build_index(table, IndexSettings(), model.similarity, 0))


def _share(model: Recommender) -> tuple[torch.Tensor, int]:
    """The vectors (n, D) of this process's items, and the first of them."""
    ranks = world_size()
    if model.num_items < ranks:
        raise InputError(f"{model.num_items} items cannot be shared out among {ranks} processes; use fewer")
    first, stop = (1 + model.num_items * number // ranks for number in (rank(), rank() + 1))
    return model.item_table(first, stop)[1:], first


def _kept(model: Recommender, table: torch.Tensor, settings: IndexSettings, raw_ids: Sequence[str] | None) -> ItemIndex:
    if settings.path is None or raw_ids is None:
        return build_index(table, settings, model.similarity, 0)
    folder, fingerprint = Path(settings.path), weights_fingerprint(model)
    if folder.is_dir():
        return load_index(folder, settings, model.similarity, fingerprint, raw_ids, table.device)
    index = build_index(table, settings, model.similarity, 0)
    assert isinstance(index, LocalIndex)  # noqa: S101 - settings refuse a path for a sharded one
    save_index(index, folder, settings, fingerprint, raw_ids)
    return index


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over all weights and buffers of a model, by name: what tells one checkpoint from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
