"""A data set built once and kept: raw files to `Interactions` and item fields in one folder of memory-mapped files."""

import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys_lightning.data.encoders import first_line
from recsys_lightning.data.interactions import Interactions, k_core
from recsys_lightning.data.rejects import RejectLog
from recsys_lightning.data.sources import Source
from recsys_lightning.errors import InputError
from recsys_lightning.files import sync_folder

_log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the files of a prepared folder change their meaning: older folders are then built again


@dataclass(frozen=True)
class PreparedData:
    """A prepared data set.

    Attributes:
        interactions: after the k-core, exact duplicates dropped.
        fields: I rows: ``item_id`` (raw id), then one String column a text field.
        users: U rows: ``user_id`` (raw id), then one column a feature, see `RawData.users`; none in most data.
        statistics: what `recsys prepare` prints, as plain JSON values.
        fingerprint: of the raw files' contents and every setting that shaped the result.
    """

    interactions: Interactions
    fields: pl.DataFrame
    users: pl.DataFrame
    statistics: dict[str, Any]
    fingerprint: str

    @property
    def user_ids(self) -> list[str]:
        """(U,) raw ids of the users."""
        return self.users.get_column("user_id").to_list()


def prepare(source: Source, raw_dir: Path, cache_dir: Path, core: int) -> PreparedData:
    """Read, clean and number the raw files, or take the result from `cache_dir` if it was built from the same ones.

    The folder appears under its final name only when it is whole, so an interrupted build leaves nothing behind that
    could be taken for data. Several processes may build at once: the first to finish gives the folder to all.

    Args:
        source: where the rows come from.
        raw_dir: folder of the raw files; what is missing is downloaded into it, where the source has an address.
        cache_dir: folder for built data.
        core: k of the k-core; 0 keeps everything.

    Raises:
        InputError: raw files are missing or unusable, nothing is left of them, or `cache_dir` cannot be used.
    """
    source.download(raw_dir)
    fingerprint = _fingerprint(source, raw_dir, core)
    folder = cache_dir / f"{source.name}-{fingerprint[:16]}"
    if not (folder / "meta.json").is_file():
        built = _build(source, raw_dir, core, fingerprint)
        try:
            _save(built, source, folder)
        except OSError as error:
            raise InputError(
                f"cannot write prepared data to {cache_dir} ({error}); give a writable folder with --data.cache_dir"
            ) from error
        _log.info("prepared %s in %s", source.name, folder)
    return _load(folder)


def _save(data: PreparedData, source: Source, folder: Path) -> None:
    # Not tempfile.mkdtemp: its folders are closed to all other users of a shared cache.
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    staging.mkdir(parents=True)
    try:
        data.interactions.save(staging)
        data.fields.write_parquet(staging / "items.parquet")
        data.users.write_parquet(staging / "users.parquet")
        meta = {
            "fingerprint": data.fingerprint,
            "source": source.name,
            "settings": source.settings,
            "statistics": data.statistics,
        }
        (staging / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(staging)
        if folder.exists() and not (folder / "meta.json").is_file():  # files were taken out of it
            shutil.rmtree(folder)
        try:
            staging.replace(folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
            # Another process has built the same in the meantime.
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _load(folder: Path) -> PreparedData:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        fields = pl.read_parquet(folder / "items.parquet")
        return PreparedData(
            interactions=Interactions.load(folder, num_items=len(fields)),
            fields=fields,
            users=pl.read_parquet(folder / "users.parquet"),
            statistics=meta["statistics"],
            fingerprint=meta["fingerprint"],
        )
    except (OSError, ValueError, KeyError, EOFError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"prepared data in {folder} are damaged ({first_line(error)}); remove the folder and run the command again"
        ) from error


def _build(source: Source, raw_dir: Path, core: int, fingerprint: str) -> PreparedData:
    raw = source.read(raw_dir)
    unique = raw.interactions.unique(maintain_order=True)
    kept = k_core(unique, core)
    if kept.is_empty():
        raise InputError(
            f"{source.name}: no interaction is left of {len(raw.interactions)} after the {core}-core; "
            "lower --data.k_core or check the raw files"
        )
    interactions, user_ids, item_ids = Interactions.from_frame(kept)
    # A source that gave an item, or a user, two rows would shift the numbers of all after it.
    fields = pl.DataFrame({"item_id": item_ids}).join(
        raw.items, on="item_id", how="left", maintain_order="left", validate="1:1"
    )
    users = pl.DataFrame({"user_id": user_ids}, schema={"user_id": pl.String})
    if raw.users is not None:
        users = users.join(raw.users, on="user_id", how="left", maintain_order="left", validate="1:1")
    statistics = _statistics(raw.rejects, len(raw.interactions), len(unique), interactions, fields)
    return PreparedData(interactions, fields, users, statistics, fingerprint)


def _statistics(
    rejects: RejectLog, read: int, unique: int, interactions: Interactions, fields: pl.DataFrame
) -> dict[str, Any]:
    lengths = interactions.lengths
    text = [name for name in fields.columns if name != "item_id"]
    textless = len(fields.filter(pl.all_horizontal(pl.col(text).is_null()))) if text else len(fields)
    return {
        "users": interactions.num_users,
        "items": interactions.num_items,
        "interactions": len(interactions),
        "density": len(interactions) / (interactions.num_users * interactions.num_items),
        "length": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
        },
        "text_coverage": {name: 1 - fields.get_column(name).null_count() / len(fields) for name in text},
        "items_without_text": textless,
        "dropped": {"exact duplicates": read - unique, "outside the k-core": unique - len(interactions)},
        "rejects": rejects.to_dict(),
    }


def _fingerprint(source: Source, raw_dir: Path, core: int) -> str:
    digest = hashlib.sha256()
    settings = {"format": FORMAT, "source": source.name, "settings": source.settings, "k_core": core}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for path in source.files(raw_dir):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
