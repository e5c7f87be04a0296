"""The leakage audit's checks of what a run has written: by what it was selected, on which rows, from which data."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from recsys_lightning.analysis.audit_check import Check, not_checked, verdict

# What a metric by which a run selects may begin with: none of these has seen a test answer.
SELECTORS = ("val/", "val-unseen/", "train/")
_SECTIONS = ("seed_everything", "model", "data", "trainer", "checkpoint", "early_stopping")
# Where a run lies and where its files are, not what it is.
_PLACES = ("raw_dir", "cache_dir", "dirpath", "default_root_dir", "logger")


def check_selection(config: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> Check:
    """A run was selected, stopped and scheduled by validation metrics, by its settings and by its checkpoint.

    Args:
        config: of the fit.
        checkpoint: as Lightning wrote it.
    """
    name = "model selection"
    wanted = dict(_monitors(config, ""))
    problems = [f"{key} is {metric!r}, no validation metric" for key, metric in wanted.items() if not _legal(metric)]
    saved = _saved_monitors(checkpoint)
    for kind, metrics in saved.items():
        problems += [f"the checkpoint's {kind} went by {metric!r}" for metric in metrics if not _legal(metric)]
    # Runs of before had Lightning's own ModelCheckpoint.
    kinds = {"BestAndLast": "checkpoint", "ModelCheckpoint": "checkpoint", "EarlyStopping": "early_stopping"}
    for kind, key in ((kind, f"{part}.monitor") for kind, part in kinds.items()):
        if kind in saved and key in wanted and wanted[key] not in saved[kind]:
            went_by = ", ".join(map(repr, saved[kind]))
            problems.append(f"{key} is {wanted[key]!r}, but the checkpoint's {kind} went by {went_by}")
    if not problems and not saved:
        return not_checked(
            name, "the settings name validation metrics, but the checkpoint does not say what it went by"
        )
    shown = ", ".join(dict.fromkeys(repr(metric) for metric in wanted.values()))
    return verdict(name, problems, f"by {shown}, in config.yaml and in the checkpoint")


def _legal(metric: str | None) -> bool:
    return metric is None or metric.startswith(SELECTORS)  # None keeps the last epoch


def _monitors(node: Any, path: str) -> Iterator[tuple[str, str | None]]:
    """Every key ``monitor`` of a configuration, wherever it stands."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        place = f"{path}.{key}" if path else str(key)
        if key == "monitor" and (value is None or isinstance(value, str)):
            yield place, value
        yield from _monitors(value, place)


def _saved_monitors(checkpoint: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """What the callbacks in a checkpoint went by: Lightning keys their states by class and settings."""
    found: dict[str, list[str | None]] = {}
    for key, state in checkpoint.get("callbacks", {}).items():
        kind = key.partition("{")[0]
        in_key = re.search(r"'monitor': (?:'([^']*)'|None)", key)
        metrics = [in_key[1]] if in_key else []
        if isinstance(state, Mapping) and "monitor" in state and state["monitor"] not in metrics:
            metrics.append(state["monitor"])
        if metrics:
            found.setdefault(kind, []).extend(metrics)
    return found


def check_evidence(results: Mapping[str, Any] | None, recounted: Mapping[str, str]) -> Check:
    """The rows that the run noted when it was trained are those of this audit.

    Args:
        results: ``results.json``; None if there is none.
        recounted: fingerprints of the training rows, the validation rows and the item counts, by their names there.
    """
    name = "rows of the run"
    noted = (results or {}).get("evidence") or {}
    missing = [key for key in recounted if key not in noted]
    if missing:
        return not_checked(name, f"results.json holds no {', '.join(missing)}: train again to have them noted")
    wrong = [key for key, value in recounted.items() if noted[key] != value]
    problems = [f"the run had other {', '.join(wrong)} than a recount of its settings gives"] if wrong else []
    return verdict(name, problems, f"{', '.join(recounted)} as noted when the run was trained")


def check_provenance(
    config: Mapping[str, Any],
    later: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Any] | None,
    data: Mapping[str, str | None],
    code: str | None,
) -> Check:
    """The results are those of these settings and these data.

    Args:
        config: ``config.yaml``, of the fit.
        later: the other ``config-<command>.yaml`` of the folder, by name.
        results: ``results.json``; None if there is none.
        data: ``fingerprint`` and ``text_fingerprint`` of the data that the audit has built.
        code: SHA-256 of the code that runs the audit.
    """
    name = "provenance"
    if results is None:
        return not_checked(name, "the run folder has no results.json")
    noted = results.get("data") or {}
    problems = [
        f"results.json has {key} {str(noted.get(key))[:12]}, the data have {str(value)[:12]}"
        for key, value in data.items()
        if noted.get(key) != value
    ]
    notes = [] if (results.get("code") or {}).get("sha256") == code else ["note: audited with other code than trained"]
    settings = results.get("config") or {}
    changed = _differences(config, settings)
    source = next((file for file, given in later.items() if not _differences(given, settings)), None)
    if changed and source is None:
        problems.append(f"results.json has other settings than config.yaml: {_shown(changed)}")
    elif changed:
        notes.append(f"note: measured with settings of {source} that are not those of the fit: {_shown(changed)}")
    return verdict(name, problems, "; ".join(["data and settings as in results.json", *notes]))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that shape a run and in which two configurations differ."""
    flat = [dict(_leaves({name: config.get(name) for name in _SECTIONS}, "")) for config in (one, other)]
    keys = [key for key in {**flat[0], **flat[1]} if not key.endswith(tuple(f".{place}" for place in _PLACES))]
    absent = object()
    return [key for key in keys if flat[0].get(key, absent) != flat[1].get(key, absent)]


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _shown(keys: list[str]) -> str:
    short = [key.replace(".init_args", "") for key in keys]
    return ", ".join(short[:4]) + (f" and {len(short) - 4} more" if len(short) > 4 else "")
