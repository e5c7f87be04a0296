"""Item texts encoded by all processes of a run together, each with its share of the batches.

The batches are those of a single process, so that on like processors the vectors are the same to the bit, however many
processes there are; where they round differently, so do the vectors.
Shapes: I items, B texts of a batch, D width.
"""

import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch

from recsys_lightning.data.encoders import BatchedEncoder, TextEncoder, Vectors, check_finite, first_line, progress
from recsys_lightning.data.text import ItemEmbeddings, cached, embed_texts, saving
from recsys_lightning.distributed import gather_rows, local_rank, rank, world_size
from recsys_lightning.errors import InputError

T = TypeVar("T")

# Batches that a process encodes between two exchanges: bounds memory, and how long processes wait for one another.
_BATCHES = 8


def embed_unless_shared(texts: list[str], encoder: TextEncoder, cache_dir: Path) -> None:
    """What one process of each node does before `embed_together`, while the others wait.

    It fetches a model that has to be downloaded, and encodes texts that cannot be shared out: an encoder that learns
    from all of them, as TF-IDF does, gives another vector where it sees a part.
    """
    if cached(texts, encoder, cache_dir) is not None:
        return
    actual = encoder.resolve()
    if not isinstance(actual, BatchedEncoder):
        embed_texts(texts, actual, cache_dir)


def embed_together(texts: list[str], encoder: TextEncoder, cache_dir: Path) -> ItemEmbeddings:
    """`recsys_lightning.data.text.embed_texts` by all processes, to be called on each of them with the same texts.

    Nothing is computed where all find the vectors in their cache folders. Those may be one folder for all nodes or one
    a node; each is written once. If one process fails, all do.

    Args:
        texts: text of item ``i`` at position ``i - 1``.
        encoder: who encodes; `embed_unless_shared` has run on each node.
        cache_dir: folder of the files.

    Raises:
        InputError: as of `embed_texts`, on any process.
    """
    if _everywhere(cached(texts, encoder, cache_dir) is not None):
        return _read_back(texts, encoder, cache_dir)
    choices, resolved = encoder.alternatives, _all_or_none(encoder.resolve)
    try:
        # A process that could not reach the model hub speaks for all: vectors of two models do not go together.
        actual = choices[int(gather_rows(torch.tensor([choices.index(resolved)])).max())]
        if isinstance(actual, BatchedEncoder) and not _everywhere(cached(texts, actual, cache_dir) is not None):
            _encode(texts, actual, cache_dir)
    finally:
        resolved.release()
    return _all_or_none(partial(_read_back, texts, actual, cache_dir))


def _everywhere(here: bool) -> bool:
    return bool(gather_rows(torch.tensor([here])).all())


def _read_back(texts: list[str], encoder: TextEncoder, cache_dir: Path) -> ItemEmbeddings:
    found = cached(texts, encoder, cache_dir)
    if found is None:
        raise InputError(
            f"there are no item vectors of {encoder.identity} in {cache_dir}; check the disk and the free space, or "
            "run `recsys prepare` on one process first"
        )
    return found


def _encode(texts: list[str], encoder: BatchedEncoder, cache_dir: Path) -> None:
    """Encode this process's share, and write the vectors of all where there is a cache folder to fill."""
    batches, step = encoder.batches(texts), world_size() * _BATCHES
    writes = _is_writer(cache_dir) and cached(texts, encoder, cache_dir) is None
    table: _Table | None = None
    bar = progress("Encoding item texts", len(texts)) if rank() == 0 else nullcontext(lambda count: None)
    with ExitStack() as stack, bar as advance:
        for start in range(0, len(batches), step):
            shares = [batches[start + process : start + step : world_size()] for process in range(world_size())]
            rows = _all_rows(_all_or_none(partial(_encode_batches, texts, shares[rank()], encoder)))  # (B, D)
            if writes and table is None:
                file = stack.enter_context(saving(texts, encoder, cache_dir, rows.shape[1]))
                table = _Table(file, len(texts), rows.shape[1])
            # As gathered: all of the first process, then all of the second.
            places = [place for share in shares for batch in share for place in batch]
            _all_or_none(partial(table.write, places, rows) if table else lambda: None)
            advance(len(places))
        _all_or_none(stack.close)  # here, so that a full disk is everybody's


def _encode_batches(texts: list[str], batches: list[list[int]], encoder: BatchedEncoder) -> Vectors | None:
    """Vectors (B, D) of the batches, one after another; None of no batch."""
    parts = []
    for places in batches:
        chosen = [texts[place] for place in places]
        parts.append(encoder.encode_batch(chosen))
        if parts[-1].ndim != 2 or len(parts[-1]) != len(chosen) or parts[-1].shape[1] < 1:
            raise InputError(f"text encoder {encoder.identity} gave shape {parts[-1].shape} for {len(chosen)} texts")
        check_finite(parts[-1], chosen, encoder.identity, places)
    return np.concatenate(parts) if parts else None


def _all_rows(own: Vectors | None) -> Vectors:
    """The rows (B, D) of all processes, of which some may have none."""
    width = int(gather_rows(torch.tensor([0 if own is None else own.shape[1]])).max())
    rows = torch.zeros(0, width) if own is None else torch.from_numpy(np.ascontiguousarray(own))
    return gather_rows(rows).numpy()


class _Table:
    """The file of all vectors, row ``i`` of item ``i``, written a few rows at a time."""

    def __init__(self, file: BinaryIO, num_items: int, dim: int) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_items + 1, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        self.file, self.begin, self.width = file, file.tell(), 4 * dim
        file.truncate(self.begin + (num_items + 1) * self.width)  # zeros, which row 0 keeps

    def write(self, places: Sequence[int], rows: Vectors) -> None:
        """Write the rows (B, D) of the items at such places of the texts."""
        for place, row in sorted(zip(places, rows.astype("<f4", copy=False), strict=True), key=lambda pair: pair[0]):
            self.file.seek(self.begin + (place + 1) * self.width)
            self.file.write(row.tobytes())


def _is_writer(cache_dir: Path) -> bool:
    """Whether this process is the one that writes into its cache folder, which nodes may share or not."""
    name = gather_rows(torch.tensor(list(uuid.uuid4().bytes) if rank() == 0 else [], dtype=torch.uint8))
    mark = cache_dir / f".{bytes(name.tolist()).hex()}.shared"
    _all_or_none(partial(_leave, mark) if rank() == 0 else lambda: None)
    try:
        seen = _all_or_none(mark.exists)
    finally:
        if rank() == 0:
            mark.unlink(missing_ok=True)
    return rank() == 0 or (local_rank() == 0 and not seen)


def _leave(mark: Path) -> None:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise InputError(f"{mark.parent} cannot be written to ({error}); give a writable cache folder") from error


def _all_or_none(action: Callable[[], T]) -> T:
    """What an action gives, once it has succeeded on all processes; every process raises where one has failed.

    The others would wait for one that stops for ever.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    said = "" if failure is None else f"process {rank()}: {first_line(failure)}\n"
    everyone = gather_rows(torch.tensor(list(said.encode()), dtype=torch.uint8))
    if failure is not None:
        raise failure
    if len(everyone):
        raise InputError(f"item texts were not encoded by {bytes(everyone.tolist()).decode().splitlines()[0]}")
    return result
