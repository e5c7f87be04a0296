"""The leakage audit: whether a trained run can have learned anything from its validation and test items.

It trusts no part of the run. Data and models are built twice, from the data as they are and with other items in the
place of what is held out, and nothing that training reads may change; what can be counted is counted again; and the
checkpoint is tied to what was counted. Two things it takes as given: the prepared data themselves, and that the cached
text embeddings are what the text encoder makes of the texts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import yaml

from recsys_lightning.analysis.audit_check import Check, not_checked, verdict
from recsys_lightning.analysis.audit_data import (
    Batch,
    TrainingPairs,
    TrainingRows,
    check_evaluation,
    check_item_statistics,
    check_scrambling,
    check_train_batches,
    scrambled,
)
from recsys_lightning.analysis.audit_model import (
    check_catalogue_facts,
    check_losses,
    check_semantic_ids,
    check_texts,
)
from recsys_lightning.analysis.audit_record import check_evidence, check_provenance, check_selection
from recsys_lightning.analysis.audit_split import Recount, check_split, recount
from recsys_lightning.data.catalog import Catalog
from recsys_lightning.data.datamodules import CatalogDataModule, SequenceDataModule
from recsys_lightning.data.sequences import Stage
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing
from recsys_lightning.models.recommender import Recommender
from recsys_lightning.semantic_ids.table import SemanticIds
from recsys_lightning.semantic_ids.tokenizer import ItemTokenizer
from recsys_lightning.training.checkpoints import (
    Build,
    State,
    builder_of,
    model_weights,
    read_checkpoint,
    trained_model,
)
from recsys_lightning.training.record import code_fingerprint
from recsys_lightning.training.tokenizer import TokenizerModule

REPORT = "audit.json"
_LOSS_BATCHES = 4  # compared loss by loss; all batches of an epoch are compared as data
_EVALUATED: tuple[Stage, ...] = ("val", "test")


@dataclass(frozen=True)
class TrainedRun:
    """A run folder, with what its settings build.

    Attributes:
        folder: holds ``config.yaml``.
        module: a `RecommenderModule` or a `TokenizerModule`, not yet configured.
        data: its data module, not yet set up.
        checkpoint: the file with the weights.
        semantic_ids: the table that it reads or, a tokenizer, has written; None if it has none.
    """

    folder: Path
    module: L.LightningModule
    data: CatalogDataModule
    checkpoint: Path
    semantic_ids: Path | None


@dataclass(frozen=True)
class _Worlds:
    """The data as they are, and with other items in the place of what is held out."""

    clean: CatalogDataModule
    untrained: CatalogDataModule  # all interactions are others that nobody may be trained on
    both: CatalogDataModule  # all held-out answers are
    test: CatalogDataModule  # the test answers are
    counted: Recount


def audit(run: TrainedRun, tokenizer: TrainedRun | None = None, no_tokenizer: str = "") -> Iterator[Check]:
    """Check a run, one check after the other.

    Args:
        run: what to audit; its data are prepared and set up.
        tokenizer: the run that should have made its semantic IDs, if there is one.
        no_tokenizer: why there is none.

    Raises:
        InputError: the run, its data or its checkpoint cannot be read, or are of no kind that can be audited.
    """
    build, checkpoint = builder_of(run.module), read_checkpoint(run.checkpoint)
    worlds = _build_worlds(run.data)
    yield from _data_checks(worlds)
    if worlds.clean.catalog.text is not None:
        yield check_texts(worlds.clean.catalog, worlds.untrained.catalog)
    meanings = list(_semantic_checks(run, tokenizer, no_tokenizer, worlds))
    yield from meanings
    try:
        yield from _model_checks(build, model_weights(run.module, checkpoint), worlds)
    except InputError as error:
        # A table of other embeddings is refused by the model, too: that is what the audit was asked to find.
        if all(check.status != "FAIL" for check in meanings):
            raise
        yield not_checked("negatives and losses", f"the model cannot be built: {error}")
    yield from _record_checks(run, worlds, checkpoint)


def write_report(run: TrainedRun, checks: Sequence[Check]) -> Path:
    """Write ``audit.json`` into the run folder: the checks with their figures, and which data and code were audited."""
    path = run.folder / REPORT
    report = {
        "run": str(run.folder),
        "passed": all(check.status != "FAIL" for check in checks),
        "checks": [asdict(check) for check in checks],
        "data": _data_fingerprints(run.data),
        "code": code_fingerprint(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with replacing(path) as file:
        file.write(json.dumps(report, indent=1).encode())
    return path


# ------------------------------------------------------------------------------------------------------------ data


def _build_worlds(data: CatalogDataModule) -> _Worlds:
    data.prepare_data()
    data.setup()
    interactions = data.data.interactions
    counted = recount(interactions, data.splitter, data.split.cold)
    if not counted.num_evaluated or interactions.num_items < 2:
        raise InputError(
            "nothing is held out in these data: no user has enough interactions, or there is only one item"
        )
    answers, untrained = counted.answers("val", "test"), counted.untrained(interactions)
    both = data.with_interactions(scrambled(interactions, answers))
    # Under leave-one-out they are the same; under a user split the histories of held-out users are not trained on.
    same = np.array_equal(answers, untrained)
    return _Worlds(
        clean=data,
        untrained=both if same else data.with_interactions(scrambled(interactions, untrained)),
        both=both,
        test=data.with_interactions(scrambled(interactions, counted.answers("test"), seed=1)),
        counted=counted,
    )


def _data_checks(worlds: _Worlds) -> Iterator[Check]:
    clean, both, counted, other = worlds.clean, worlds.both, worlds.counted, worlds.untrained
    interactions = clean.data.interactions
    known: TrainingPairs | TrainingRows | None = None
    stages: tuple[Stage, ...] = ("train", *_EVALUATED)
    rows = {stage: clean.dataset(stage) for stage in stages} if isinstance(clean, SequenceDataModule) else {}
    yield check_split(interactions, counted, clean.split, rows)
    if rows:
        known = TrainingPairs.of(interactions, counted)
        batches = ([batch for stage in _EVALUATED for batch in _batches(world, stage)] for world in (clean, both))
        yield check_scrambling(*batches)
    elif clean.catalog.text is not None:
        known = TrainingRows.of(clean.catalog.text_embeddings(), counted.cold)
    yield check_train_batches(clean.train_dataloader(), other.train_dataloader(), known)
    yield check_item_statistics(interactions, counted, clean.catalog.train_counts, other.catalog.train_counts)
    loaders = ({stage: _batches(world, stage) for stage in _EVALUATED} for world in (clean, both, worlds.test))
    yield check_evaluation(*loaders)


def _batches(data: CatalogDataModule, stage: Stage) -> Iterable[Batch]:
    loader: Iterable[Batch] = data.val_dataloader() if stage == "val" else data.test_dataloader()
    return loader


# ---------------------------------------------------------------------------------------------------------- models


def _model_checks(build: Build, state: State, worlds: _Worlds) -> Iterator[Check]:
    clean = worlds.clean
    model = build(clean.catalog)
    if isinstance(model, Recommender):
        yield check_catalogue_facts(model, state)
    del model
    batches = list(islice(clean.train_dataloader(), _LOSS_BATCHES))
    yield check_losses(build, clean.catalog, worlds.untrained.catalog, state, batches)


def _semantic_checks(
    run: TrainedRun, tokenizer: TrainedRun | None, no_tokenizer: str, worlds: _Worlds
) -> Iterator[Check]:
    """Where the semantic IDs come from, and what their tokenizer has learned from."""
    if run.semantic_ids is None:
        return
    table, catalog = SemanticIds.load(run.semantic_ids), worlds.clean.catalog
    maker = run if isinstance(run.module, TokenizerModule) else tokenizer
    if maker is None:
        yield check_semantic_ids(table, catalog, None, no_tokenizer or "there is no run of its tokenizer")
        return
    try:
        tokenizer_model = _trained_tokenizer(maker, catalog)
        collisions = maker.module.collisions if isinstance(maker.module, TokenizerModule) else "none"
        yield check_semantic_ids(table, catalog, tokenizer_model, collisions=collisions)
    except InputError as error:
        yield check_semantic_ids(table, catalog, None, f"their tokenizer cannot be asked: {error}")
    if maker is not run:
        yield _check_tokenizer_batches(maker, worlds)


def _trained_tokenizer(maker: TrainedRun, catalog: Catalog) -> ItemTokenizer:
    model = trained_model(maker.module, catalog, maker.checkpoint)
    if not isinstance(model, ItemTokenizer):
        raise InputError(f"{maker.folder} holds a {type(model).__name__}, no tokenizer")
    return model


def _check_tokenizer_batches(maker: TrainedRun, worlds: _Worlds) -> Check:
    name, data = "tokenizer batches", maker.data
    data.raw_dir, data.cache_dir = worlds.clean.raw_dir, worlds.clean.cache_dir
    try:
        data.prepare_data()
        data.setup()
    except InputError as error:
        return not_checked(name, f"the data of {maker.folder} cannot be read: {error}")
    if data.data.fingerprint != worlds.clean.data.fingerprint:
        return verdict(name, [f"{maker.folder} was trained on other data ({data.data.fingerprint[:12]})"], "")
    changed = data.with_interactions(worlds.untrained.data.interactions)
    # Of the items that this run holds out, whatever the tokenizer's own settings say.
    known = TrainingRows.of(data.catalog.text_embeddings(), worlds.counted.cold)
    return check_train_batches(data.train_dataloader(), changed.train_dataloader(), known, name)


# ---------------------------------------------------------------------------------------------------------- record


def _record_checks(run: TrainedRun, worlds: _Worlds, checkpoint: dict[str, Any]) -> Iterator[Check]:
    config = _read_yaml(run.folder / "config.yaml")
    later = {path.name: _read_yaml(path) for path in sorted(run.folder.glob("config-*.yaml"))}
    path = run.folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else None
    yield check_selection(config, checkpoint)
    clean = worlds.clean
    if isinstance(clean, SequenceDataModule):
        counts = np.ascontiguousarray(clean.catalog.train_counts, dtype=np.int64)
        recounted = {
            "train_rows": clean.dataset("train").fingerprint(),
            "val_rows": clean.dataset("val").fingerprint(),
            "train_counts": sha256(counts.tobytes()).hexdigest(),
        }
        yield check_evidence(results, recounted)
    yield check_provenance(config, later, results, _data_fingerprints(clean), code_fingerprint()["sha256"])


def _read_yaml(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _data_fingerprints(data: CatalogDataModule) -> dict[str, str | None]:
    text = data.catalog.text
    return {"fingerprint": data.data.fingerprint, "text_fingerprint": text.fingerprint if text else None}
