"""Item text to item vectors: compose one text an item, have it encoded, keep the vectors in a fingerprinted cache.

Shapes: I items, D width. Row 0 of every table of item vectors is padding and holds zeros; item ``i`` is row ``i``.
"""

import hashlib
import json
import logging
import math
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl

from recsys_lightning.data.encoders import TextEncoder, Vectors, check_finite, first_line
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # part of every fingerprint: raise it when the same input would give another file


# ---------------------------------------------------------------------------------------------------- composing


def compose_texts(fields: pl.DataFrame, template: Sequence[str], separator: str = ". ") -> list[str]:
    """One text for each row of ``fields``, put together from its non-blank fields.

    A segment of the template is left out for an item when one of the fields it names is null, NaN or blank. A segment
    that names a column which ``fields`` lacks is left out for all items, because data sets differ in what they carry.
    White space inside a value becomes single spaces; a list value is joined by ``", "``.

    Args:
        fields: One row an item, one column a field.
        template: Segments with ``{name}`` placeholders, such as ``["{title}", "Brand: {brand}"]``.
        separator: What stands between two segments.

    Returns:
        I texts in the order of the rows; ``""`` for an item of which no segment is left.

    Raises:
        InputError: The template is no list of segments, a placeholder is more than ``{name}``, or ``fields`` has none
            of the columns that the template names.
    """
    if isinstance(template, str) or not template:
        raise InputError(f"text template must be a non-empty list of segments, such as ['{{title}}'], got {template!r}")
    segments = [(segment, _placeholders(segment)) for segment in template]
    missing = sorted({name for _, names in segments for name in names} - set(fields.columns))
    kept = [(segment, names) for segment, names in segments if not set(names) & set(missing)]
    if not kept:
        raise InputError(
            f"text template {list(template)} has no segment that can be filled: there is no column {missing}; "
            f"write it with the columns that exist: {fields.columns}"
        )
    if missing:
        _log.info("text template: no column %s, its segments are left out; columns are %s", missing, fields.columns)

    used = {name for _, names in kept for name in names}
    columns = {name: [_clean(value) for value in fields[name].to_list()] for name in used}
    texts = []
    for row in range(fields.height):
        filled = []
        for segment, names in kept:
            values = {name: columns[name][row] for name in names}
            if all(values.values()):
                filled.append(segment.format_map(values))
        texts.append(separator.join(filled))
    return texts


def _placeholders(segment: str) -> list[str]:
    """Field names of one segment; anything but ``{name}`` is refused."""
    try:
        parts = list(string.Formatter().parse(segment))
    except ValueError as error:
        raise InputError(f"text template segment {segment!r} is malformed ({error}); write {{name}}") from None
    names = []
    for _, name, spec, conversion in parts:
        if name is None:  # literal text after the last placeholder
            continue
        # Attribute and index access reach into objects, and a format makes no sense for an absent value.
        if not name.isidentifier() or spec or conversion:
            raise InputError(f"text template segment {segment!r} may hold only plain {{name}} placeholders")
        names.append(name)
    if not names:
        raise InputError(f"text template segment {segment!r} names no field: it would be the same for all items")
    return names


def _clean(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list):
        return ", ".join(part for part in map(_clean, value) if part)
    return " ".join(str(value).split())


# -------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True, eq=False)
class ItemEmbeddings:
    """Vectors of all items, where they come from, and the key of that origin.

    Attributes:
        vectors: (I+1, D) float32, memory-mapped and read-only; row 0 is padding and zero.
        fingerprint: SHA-256, in hex, of the encoder's identity, the texts and the file format.
        encoder: Identity of the encoder.
    """

    vectors: Vectors  # (I+1, D)
    fingerprint: str
    encoder: str


def embed_texts(texts: list[str], encoder: TextEncoder, cache_dir: Path) -> ItemEmbeddings:
    """Vectors of the item texts, computed once and kept in ``cache_dir``.

    The file is ``text-<first 16 digits of the fingerprint>.npy`` beside a ``.json`` that says what it holds. When it is
    there and whole it is only mapped: the encoder loads no model. A damaged file is computed again.

    Args:
        texts: Text of item ``i`` at position ``i - 1``.
        encoder: Who encodes; where its model cannot be had, what ``encoder.resolve()`` gives instead.
        cache_dir: Folder of the files; made if need be.

    Returns:
        The vectors, row ``i`` of item ``i``; ``encoder`` tells which encoder made them.

    Raises:
        InputError: There are no texts, or the encoder cannot be had or gives unusable vectors.
    """
    if not texts:
        raise InputError("there are no item texts to encode; check that the data set has items")
    found = _load(texts, encoder, cache_dir)
    if found is not None:
        return found
    actual = encoder.resolve()
    if actual is not encoder:
        found = _load(texts, actual, cache_dir)
        if found is not None:
            return found
    try:
        rows = actual.encode(texts)
    finally:
        actual.release()
    if rows.ndim != 2 or rows.shape[0] != len(texts) or rows.shape[1] < 1:
        raise InputError(f"text encoder {actual.identity} gave shape {rows.shape} for {len(texts)} texts; need (N, D)")
    check_finite(rows, texts, actual.identity)
    _save(rows, texts, actual, cache_dir)
    found = _load(texts, actual, cache_dir)
    if found is None:
        raise InputError(f"item vectors written to {cache_dir} cannot be read back; check the disk and the free space")
    return found


def find_embeddings(texts: list[str], encoder: TextEncoder, cache_dir: Path) -> ItemEmbeddings | None:
    """Cached vectors of the item texts, or None; computes and loads nothing.

    Args:
        texts: Text of item ``i`` at position ``i - 1``.
        encoder: Looked up itself first, then its ``alternatives`` in order, with a warning when one of them is taken.
        cache_dir: Folder that ``embed_texts`` wrote to; need not exist.
    """
    for candidate in encoder.alternatives:
        found = _load(texts, candidate, cache_dir)
        if found is not None:
            if candidate is not encoder:
                _log.warning(
                    "item vectors are of %s, in place of %s: results are not comparable with those of the latter",
                    candidate.identity,
                    encoder.identity,
                )
            return found
    return None


def cached(texts: list[str], encoder: TextEncoder, cache_dir: Path) -> ItemEmbeddings | None:
    """Cached vectors of the item texts by this encoder and no other, or None; computes and loads nothing."""
    return _load(texts, encoder, cache_dir)


def _fingerprint(texts: list[str], identity: str) -> str:
    digest = hashlib.sha256(f"item text vectors {FORMAT_VERSION}\n".encode())
    for part in (identity, *texts):
        content = part.encode("utf-8", "surrogatepass")  # scraped text may hold lone surrogates
        digest.update(f"{len(content)}:".encode())  # lengths keep ["ab", "c"] apart from ["a", "bc"]
        digest.update(content)
    return digest.hexdigest()


def _files(fingerprint: str, cache_dir: Path) -> tuple[Path, Path]:
    stem = f"text-{fingerprint[:16]}"
    return cache_dir / f"{stem}.npy", cache_dir / f"{stem}.json"


def _load(texts: list[str], encoder: TextEncoder, cache_dir: Path) -> ItemEmbeddings | None:
    """The cached vectors of one encoder if they are there and whole."""
    identity = encoder.identity
    fingerprint = _fingerprint(texts, identity)
    vectors_file, about_file = _files(fingerprint, cache_dir)
    if not (vectors_file.exists() and about_file.exists()):
        return None
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        vectors = np.load(vectors_file, mmap_mode="r", allow_pickle=False)
        expected = (len(texts) + 1, about["dim"])
        if about["fingerprint"] != fingerprint or vectors.shape != expected or vectors.dtype != np.float32:
            raise ValueError(f"it holds {vectors.dtype} {vectors.shape}, expected float32 {expected}")
        if vectors_file.stat().st_size != about["bytes"] or vectors[0].any():
            raise ValueError("its size or its padding row is not as written")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        _log.warning(
            "cached item vectors %s are damaged (%s); they are computed again", vectors_file, first_line(error)
        )
        return None
    return ItemEmbeddings(vectors=vectors, fingerprint=fingerprint, encoder=identity)


def _save(rows: Vectors, texts: list[str], encoder: TextEncoder, cache_dir: Path) -> None:
    """Write the (I, D) rows below a zero row 0."""
    vectors = np.zeros((len(rows) + 1, rows.shape[1]), dtype=np.float32)  # (I+1, D)
    vectors[1:] = rows
    with saving(texts, encoder, cache_dir, rows.shape[1]) as file:
        np.save(file, vectors, allow_pickle=False)


@contextmanager
def saving(texts: list[str], encoder: TextEncoder, cache_dir: Path, dim: int) -> Iterator[BinaryIO]:
    """The ``.npy`` file of the vectors, to be written; it counts once the block has ended.

    Args:
        texts: of all items.
        encoder: who has encoded them.
        cache_dir: folder of the files; made if need be.
        dim: width of the vectors.

    Raises:
        InputError: it cannot be written; nothing is left behind.
    """
    identity = encoder.identity
    fingerprint = _fingerprint(texts, identity)
    vectors_file, about_file = _files(fingerprint, cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with replacing(vectors_file) as file:
            yield file
        about = {
            "format": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "encoder": identity,
            "num_items": len(texts),
            "num_empty": sum(not text.strip() for text in texts),
            "dim": dim,
            "bytes": vectors_file.stat().st_size,
        }
        # It comes last and makes the other file count.
        with replacing(about_file) as file:
            file.write(json.dumps(about, indent=2).encode())
    except OSError as error:
        raise InputError(
            f"item vectors cannot be written to {cache_dir} ({error}); give a writable cache folder"
        ) from error
