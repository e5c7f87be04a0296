"""What was run, where and on what: differences between configurations, environment, and every setting."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from recsys_lightning.analysis.groups import PLACES, shown_path
from recsys_lightning.analysis.report_blocks import Block, DataTable, Section, Settings
from recsys_lightning.analysis.report_sources import Source

_ABSENT = "-"
_MANY = 15  # differences; more are folded away


def configuration(sources: Mapping[str, Source]) -> Section:
    """Settings in which the runs differ, their environment, and all settings of each, folded away.

    Args:
        sources: runs by the names they are shown under.
    """
    names = list(sources)
    settings = [flattened(source.run.results["config"]) for source in sources.values()]
    blocks: list[Block] = []
    unlike = differences(settings)
    if len(sources) > 1 and unlike:
        body = [[key, *values] for key, values in unlike.items()]
        title = f"Settings in which the runs differ ({len(body)})"
        folded = len(body) > _MANY
        blocks.append(DataTable(title, ["setting", *names], body, words=len(names) + 1, folded=folded))
    rows = [environment(source) for source in sources.values()]
    body = [[key, *(row[key] for row in rows)] for key in rows[0]] if rows else []
    blocks.append(DataTable("Environment", ["", *names], body, words=len(names) + 1))
    for name, source in sources.items():
        text = yaml.safe_dump(shown(source.run.results["config"]), sort_keys=False, width=100)
        blocks.append(Settings(f"All settings of {name}", text))
    return Section("configuration", "Configuration and environment", blocks)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted keys as a report may show them, without those that say where a run lies.

    A class and its arguments stand under the key that holds them, without ``class_path`` and ``init_args``.
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in PLACES:
            continue
        if isinstance(value, Mapping) and "class_path" in value:
            found[name] = str(value["class_path"]).rpartition(".")[2]
            value = value.get("init_args") or {}
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{name}.")
        elif not isinstance(value, Mapping):
            found[name] = shown_path(value) if isinstance(value, str) else json.dumps(shown(value))
    return found


def differences(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Keys whose values are not the same in all, in the order of first appearance; ``-`` where there is no such key."""
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = {key: [each.get(key, _ABSENT) for each in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def environment(source: Source) -> dict[str, str]:
    """Model, data, hardware, code and time of a run; ``-`` for what is not known, as while it is under way."""
    results = source.run.results
    data, hardware, code = results["data"], results["hardware"], results["code"]
    machine = hardware.get("gpu") or f"{hardware.get('cpu_cores', '?')} CPU cores ({hardware.get('cpu', '?')})"
    seconds = [f"{name} {value:,.0f}" for name, value in results["seconds_by_command"].items()]
    counts = [
        f"{data[f'num_{name}']:,} {name}" for name in ("users", "items", "interactions") if data.get(f"num_{name}")
    ]
    values = {
        "model": results["model"],
        "seed": results["seed"],
        "epochs": results.get("epochs"),
        "steps": results.get("steps"),
        "trained parameters": f"{results['parameters']:,}" if results.get("parameters") else None,
        "seconds": ", ".join(seconds),
        "hardware": f"{hardware.get('devices', 1)} x {machine}" if hardware else None,
        "torch, Lightning, Python": _joined([hardware.get(name) for name in ("torch", "lightning", "python")]),
        "data": _joined([data.get("source"), *counts]),
        "data fingerprint": str(data.get("fingerprint") or "")[:12],
        "text encoder": (data.get("text_encoder") or "")[:80],
        "code": _joined([code.get("version"), code.get("commit"), str(code.get("sha256") or "")[:12]]),
        "finished": results.get("finished") or (None if source.finished else "under way"),
    }
    return {key: _ABSENT if value in (None, "") else str(value) for key, value in values.items()}


def _joined(parts: Sequence[Any]) -> str:
    return ", ".join(str(part) for part in parts if part)


def shown(value: Any) -> Any:
    """A configuration with its absolute paths as a report may show them: what is above the project goes."""
    if isinstance(value, dict):
        return {key: shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shown(inner) for inner in value]
    return shown_path(value) if isinstance(value, str) else value
