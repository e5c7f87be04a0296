"""A run of the report opened again: its data, its model, and the semantic IDs of its items."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_lightning.analysis.audit import TrainedRun
from recsys_lightning.analysis.report_sources import Source
from recsys_lightning.analysis.study_run import StudiedRun
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.datamodules import SequenceDataModule
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.training.checkpoints import trained_model


@dataclass(frozen=True)
class OpenedRun:
    """What a report computes from.

    Attributes:
        name: as the report shows it.
        source: its files.
        catalog: its items.
        studied: its model and data; None of a tokenizer.
        table: semantic IDs of its items; None of a model that has none.
    """

    name: str
    source: Source
    catalog: Catalog
    studied: StudiedRun[Recommender] | None
    table: SemanticIds | None

    @property
    def level1(self) -> Tensor | None:
        """(I+1,) level-1 code of each item; that of padding says nothing. None without semantic IDs."""
        return None if self.table is None else self.table.codes[:, 0]


def open_reported(name: str, source: Source, run: TrainedRun, device: str = "cpu") -> OpenedRun:
    """Build the data and the model of a run and load its weights.

    Args:
        name: that the report shows.
        source: the run's files.
        run: what its settings build.
        device: where the model shall be.

    Raises:
        InputError: its data or its checkpoint cannot be read.
    """
    run.data.prepare_data()
    run.data.setup()
    catalog = run.data.catalog
    if not isinstance(run.data, SequenceDataModule):
        table = SemanticIds.load(run.semantic_ids, num_items=catalog.num_items) if run.semantic_ids else None
        return OpenedRun(name, source, catalog, None, table)
    model = trained_model(run.module, catalog, run.checkpoint)
    assert isinstance(model, Recommender)  # noqa: S101 - tokenizers learn from an ItemDataModule
    place = torch.device(device)
    studied = StudiedRun(name, model.to(place), run.data, source.run.results, run.checkpoint.name, place)
    return OpenedRun(name, source, catalog, studied, semantic_ids_of(model))


def semantic_ids_of(model: Recommender) -> SemanticIds | None:
    """The codes (I+1, L) of a model's prefix trie; None of a model without."""
    trie = model.prefix_trie
    if trie is None:
        return None
    codes = trie.codes_of_leaf[trie.leaf_of_item.clamp(min=0)].cpu()  # (I+1, L)
    codes[0] = 0
    name = type(model).__name__
    return SemanticIds(codes=codes, num_codes=trie.num_codes, embeddings_fingerprint="", tokenizer=name)


def item_titles(catalog: Catalog, longest: int = 110) -> list[str]:
    """What each item is called, cut to a line, by title or, without one, raw id; index 0 is padding."""
    titles = catalog.fields["title"].to_list() if "title" in catalog.fields.columns else [None] * catalog.num_items
    whole = [" ".join((title or raw_id).split()) for title, raw_id in zip(titles, catalog.raw_ids, strict=True)]
    return ["", *(text if len(text) <= longest else f"{text[: longest - 3].rstrip()}..." for text in whole)]


def shown_codes(codes: Tensor) -> str:
    """Codes (L,) as ``3.14.1``."""
    return ".".join(str(code) for code in codes.tolist())
