"""What `recsys study codes` is of: whatever has given items semantic IDs, as a table beside its catalogue.

That is a recommender with semantic IDs or codebooks of its own, the run of a tokenizer, or a bare table in a file.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from recsys_lightning.analysis.audit import TrainedRun
from recsys_lightning.analysis.codes_agreement import training_sequences
from recsys_lightning.analysis.groups import load_run, shown_path
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.interactions import IntArray
from recsys_lightning.errors import InputError
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer, tokenize
from recsys_lightning.training.checkpoints import Learner, trained_model
from recsys_lightning.training.tokenizer import TokenizerModule


@dataclass(frozen=True)
class CodedRun:
    """Semantic IDs and the items that they are of.

    Attributes:
        name: the folder or the file, as a report may show it.
        table: of the items 1 .. I, on the CPU.
        catalog: the same items.
        sequences: item ids of each user's training interactions, oldest first.
        results: the run's ``results.json``; empty of a bare table.
        checkpoint: name of the file that the codes are from.
        device: where they were computed.
    """

    name: str
    table: SemanticIds
    catalog: Catalog
    sequences: list[IntArray]
    results: dict[str, Any]
    checkpoint: str
    device: torch.device


def open_coded(run: TrainedRun, device: str = "cpu") -> CodedRun:
    """The codes of a run, with its catalogue.

    A recommender is asked for the codes that it works with, so that codebooks which were trained with it count as they
    are in the checkpoint. Of a tokenizer it is the table that the run has written from its best checkpoint; of another
    checkpoint the items are tokenized again, without what the run has done about collisions.

    Args:
        run: of a recommender or of an `ItemTokenizer`.
        device: where models compute.

    Raises:
        InputError: the run has no results or gives items no codes, or its data, checkpoint or table cannot be read.
    """
    record = load_run(run.folder)
    run.data.prepare_data()
    run.data.setup()
    catalog, place, source = run.data.catalog, torch.device(device), run.checkpoint
    written = run.semantic_ids if isinstance(run.module, TokenizerModule) else None
    table: SemanticIds | None
    best = run.folder / "checkpoints" / "best.ckpt"
    if written is not None and best.is_file() and run.checkpoint.samefile(best):
        table, source = SemanticIds.load(written, catalog.text_fingerprint, catalog.num_items), written
    else:
        table = _codes_of(trained_model(run.module, catalog, run.checkpoint).to(place), catalog)
    if table is None:
        raise InputError(f"{record.name} has no semantic IDs: there are no codes to study")
    sequences = training_sequences(run.data.data.interactions, run.data.split)
    return CodedRun(record.name, table, catalog, sequences, record.results, source.name, place)


def coded_file(path: Path, lender: CodedRun) -> CodedRun:
    """The codes in a file, of the items of a run.

    Args:
        path: that `SemanticIds.save` has written, such as the ``semantic_ids.safetensors`` of a tokenizer's run.
        lender: the run whose data the items are of; its other codes play no part.

    Raises:
        InputError: the file cannot be read, or its items are not those of the run.
    """
    name, catalog = shown_path(path.as_posix()), lender.catalog
    table = SemanticIds.load(path)
    if table.num_items != catalog.num_items or table.item_ids not in (None, tuple(catalog.raw_ids)):
        raise InputError(
            f"{name} is of other items than {lender.name} ({table.num_items:,} and {catalog.num_items:,}): "
            "study it with a run on its own data"
        )
    return replace(lender, name=name, table=table, results={}, checkpoint=path.name)


def _codes_of(model: Learner, catalog: Catalog) -> SemanticIds | None:
    """The table of what a model gives the items of a catalogue; None if it gives them nothing."""
    if isinstance(model, ItemTokenizer):
        name = type(model).__name__
        return tokenize(model, catalog.text_embeddings(), catalog.text_fingerprint, name, catalog.fields)
    with torch.inference_mode():
        trie = model.prefix_trie
        if trie is None:
            return None
        codes = F.pad(trie.codes_of_leaf[trie.leaf_of_item[1:]], (0, 0, 1, 0)).cpu()  # (I+1, L)
    return SemanticIds(codes.clone(), trie.num_codes, "of the model", type(model).__name__)
