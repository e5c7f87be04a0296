"""A built index on disk: a folder that is whole or absent, and that says which checkpoint it came from."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recsys_lightning.errors import InputError
from recsys_lightning.files import sync_folder
from recsys_lightning.retrieval.build import IndexSettings
from recsys_lightning.retrieval.index import ItemIndex, LocalIndex, Similarity
from recsys_lightning.retrieval.torch_index import TorchIndex

FORMAT = 1  # raise it when the files change their meaning: older folders are then refused

META, VECTORS, RAW_IDS, FAISS = "meta.json", "vectors.safetensors", "raw_ids.json", "index.faiss"


def save_index(
    index: LocalIndex, folder: Path, settings: IndexSettings, fingerprint: str, raw_ids: Sequence[str] | None = None
) -> None:
    """Keep an index of the whole catalogue. The folder appears under its name only when it is whole.

    Several processes may save the same index at once: the first to finish gives the folder to all.

    Args:
        index: made by `build_index` with `settings`.
        folder: where; it must not exist.
        settings: those it was built with.
        fingerprint: of the checkpoint whose item vectors it holds.
        raw_ids: raw ids of items 1 .. I, so that another catalogue is refused when it is loaded.

    Raises:
        InputError: there is another index in the folder, it cannot be written, or the index is a slice.
    """
    if index.table.shape[0] != index.num_items + 1 or (raw_ids is not None and len(raw_ids) != index.num_items):
        raise ValueError(f"{len(raw_ids or ())} raw ids for {index.num_items} items")
    meta = _description(settings, index.similarity) | {
        "format": FORMAT,
        "parameters": settings.parameters,
        "dim": index.dim,
        "num_items": index.num_items,
        "fingerprint": fingerprint,
    }
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        staging.mkdir(parents=True)
        save_file({"vectors": index.table.cpu(), "item_ids": index.item_ids.cpu()}, staging / VECTORS)
        if settings.backend == "faiss":
            index.write(staging / FAISS)  # type: ignore[attr-defined]
        if raw_ids is not None:
            (staging / RAW_IDS).write_text(json.dumps(list(raw_ids)), encoding="utf-8")
        meta["files"] = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        meta["sha256"] = _meta_sha256(meta)
        (staging / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(staging)
        try:
            staging.replace(folder)
        except OSError:
            if not folder.exists():
                raise
            found = _meta(folder)  # another process may have kept the same in the meantime
            if any(found[name] != meta[name] for name in meta if name not in ("files", "sha256")):
                raise InputError(
                    f"{folder} holds another index; remove the folder or name another index.path"
                ) from None
        sync_folder(folder.parent)
    except OSError as error:
        raise InputError(
            f"cannot write the index to {folder} ({error}); give a writable folder as index.path"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_index(
    folder: Path,
    settings: IndexSettings,
    similarity: Similarity,
    fingerprint: str,
    raw_ids: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> ItemIndex:
    """Take an index that `save_index` has kept, and nothing else. Nothing in the folder is run.

    Args:
        folder: where.
        settings: those in use; `parameters` may have other values than when it was kept, and `gpus` may be another.
        similarity: the one in use.
        fingerprint: of the checkpoint in use.
        raw_ids: raw ids of items 1 .. I in use; None leaves them unchecked.
        device: where the item vectors are to lie.

    Raises:
        InputError: no such folder, missing or damaged files, another checkpoint, another catalogue, or other settings.
    """
    if not folder.is_dir():
        raise InputError(f"no index at {folder}")
    meta = _meta(folder)
    if meta["fingerprint"] != fingerprint:
        raise InputError(
            f"the index in {folder} was built from another checkpoint ({meta['fingerprint'][:12]}) than the one in use "
            f"({fingerprint[:12]}); {_CURE}"
        )
    for name, wanted in _description(settings, similarity).items():
        if meta[name] != wanted:
            raise InputError(f"the index in {folder} was built with {name}={meta[name]}, not {wanted}; {_CURE}")
    # FAISS keeps the parameters in its file: one that is named no more would quietly stay as it was.
    gone = _names(meta["parameters"]) - _names(settings.parameters)
    if gone:
        raise InputError(
            f"the index in {folder} was kept with index.parameters={meta['parameters']}; "
            f"give {', '.join(sorted(gone))} a value there, or remove the folder"
        )
    for name, digest in meta["files"].items():
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
        if _sha256(folder / name) != digest:
            raise _damaged(folder, f"{name} does not match its SHA-256")
    if raw_ids is not None:
        _check_raw_ids(folder, raw_ids)
    try:
        table = load_file(folder / VECTORS)["vectors"].to(device)
    except (SafetensorError, KeyError, OSError) as error:
        raise _damaged(folder, str(error)) from error
    if settings.backend == "torch":
        return TorchIndex(table, similarity, first_item=0)
    from recsys_lightning.retrieval.faiss_index import FaissIndex  # where it is asked for only: it may be missing

    given = (settings.factory, settings.parameters, settings.gpus)
    return FaissIndex(table, similarity, *given, first_item=0, file=folder / FAISS)


_CURE = "remove the folder or name another index.path"


def _description(settings: IndexSettings, similarity: Similarity) -> dict[str, Any]:
    """What an index that is loaded must share with the settings in use."""
    return {"backend": settings.backend, "factory": settings.factory, "similarity": similarity}


def _meta(folder: Path) -> dict[str, Any]:
    """The description of a kept index, unharmed and in this format."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        kept, digest = meta["format"], meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{META}: {error}") from error
    if digest != _meta_sha256(meta):
        raise _damaged(folder, f"{META} does not match its SHA-256")
    if kept != FORMAT:
        raise InputError(f"the index in {folder} has format {kept}, and this version reads {FORMAT}; remove the folder")
    return dict(meta)


def _check_raw_ids(folder: Path, raw_ids: Sequence[str]) -> None:
    if not (folder / RAW_IDS).is_file():
        raise InputError(f"the index in {folder} was kept without raw ids to compare with the catalogue's; {_CURE}")
    kept = json.loads((folder / RAW_IDS).read_text(encoding="utf-8"))
    if kept == list(raw_ids):
        return
    differ = next((i for i, (a, b) in enumerate(zip(kept, raw_ids, strict=False)) if a != b), None)
    what = f"item {differ + 1} is {kept[differ]!r} there and {raw_ids[differ]!r} here" if differ is not None else ""
    raise InputError(
        f"the index in {folder} is of another catalogue ({what or f'{len(kept)} items there, {len(raw_ids)} here'}); "
        f"{_CURE}"
    )


def _names(parameters: str) -> set[str]:
    return {part.partition("=")[0] for part in parameters.split(",") if part}


def _meta_sha256(meta: dict[str, Any]) -> str:
    rest = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(f"the index in {folder} is damaged ({reason}); remove the folder and run the command again")
