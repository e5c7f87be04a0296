"""The tables of the latency lab: what soft search costs, recall at equal latency, and what was left out."""

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import torch
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]

from recsys_lightning.analysis.compare import markdown_table
from recsys_lightning.analysis.latency_plan import Cell, LabSettings
from recsys_lightning.analysis.latency_timing import MIN_CALLS_P99

GOOD_RECALL = 0.95  # an approximate index is shown with the fastest parameter that reaches it
LIMITS = (0.1, 1.0, 4.0)  # of the tables of recall, as multiples of the exact search of one vector
Group = tuple[int, str, str]  # items, device, index
_NOTHING = Cell(items=0, device="", index="", parameters="", interests=1)


def machine() -> dict[str, str]:
    """What the figures depend on besides the settings."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {name: metadata.version(name) for name in ("torch", "faiss-cpu", "faiss-gpu") if _is_installed(name)}
    return {
        "CPU": f"{(models or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores",
        "BLAS kernels": ", ".join(_blas()) or "unknown",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load average of 15 minutes": f"{os.getloadavg()[2]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "Python": platform.python_version(),
        "date": date.today().isoformat(),
    } | versions


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _blas() -> list[str]:
    """Libraries of linear algebra by package, and for which CPU they chose their kernels: FAISS's may choose badly."""
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return [
        f"{Path(pool['filepath']).parent.name.partition('.')[0]}: {pool['internal_api']} {pool.get('architecture', '')}"
        for pool in pools
    ]


def cells_frame(cells: Sequence[Cell]) -> pl.DataFrame:
    """All cells as a table, a row a cell."""
    return pl.DataFrame([asdict(cell) for cell in cells], infer_schema_length=None)


def shown_interests(cells: Iterable[Cell]) -> int:
    """The number of interests at which indexes are compared: 4, or else the nearest that was measured."""
    return min({cell.interests for cell in cells}, key=lambda number: (abs(number - 4), number))


def operating_points(cells: Sequence[Cell]) -> dict[Group, str]:
    """The parameters each index is shown with: the fastest of good recall, or those of the best recall."""
    at = shown_interests(cells)
    groups: dict[Group, list[Cell]] = {}
    for cell in cells:
        if cell.interests == at and cell.p50_ms is not None and cell.recall is not None:
            groups.setdefault((cell.items, cell.device, cell.index), []).append(cell)
    chosen = {}
    for group, members in groups.items():
        good = [cell for cell in members if (cell.recall or 0.0) >= GOOD_RECALL]
        pick = min(good, key=_p50) if good else max(members, key=lambda cell: cell.recall or 0.0)
        chosen[group] = pick.parameters
    return chosen


def shown_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of the operating points."""
    chosen = operating_points(cells)
    return [cell for cell in cells if chosen.get((cell.items, cell.device, cell.index)) == cell.parameters]


def cost_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """What soft search costs one user at a time: see `COST_HEAD`."""
    one = {_key(cell): cell for cell in cells if cell.interests == 1}
    rows = []
    for cell in cells:
        base = one.get(_key(cell), _NOTHING)
        rows.append(
            [
                *_name(cell),
                _recall(cell),
                _ms(cell.p50_ms),
                _ms(cell.p99_ms),
                _ratio(cell.p50_ms, base.p50_ms),
                _ratio(cell.p99_ms, base.p99_ms),
                str(cell.calls),
            ]
        )
    return rows


COST_HEAD = ["items", "index", "K", "recall", "p50 ms", "p99 ms", "p50 / K=1", "p99 / K=1", "calls"]


def batch_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """What soft search costs in batches: see `BATCH_HEAD`."""
    one = {_key(cell): cell for cell in cells if cell.interests == 1}
    rows = []
    for cell in cells:
        base = one.get(_key(cell), _NOTHING)
        rows.append(
            [
                *_name(cell),
                _count(cell.users_per_second),
                _count(cell.queries_per_second),
                _ms(cell.batch_p50_ms),
                _ms(cell.batch_p99_ms),
                _ratio(cell.batch_p50_ms, base.batch_p50_ms),
                _ratio(cell.batch_p99_ms, base.batch_p99_ms),
                str(cell.batch_calls),
            ]
        )
    return rows


BATCH_HEAD = [
    *["items", "index", "K", "users/s", "queries/s", "p50 ms", "p99 ms", "p50 / K=1", "p99 / K=1", "calls"],
]


def recall_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """The best recall of each index within limits of latency; titles and rows.

    The limits are multiples of the p50 of the exact search of one vector on the same catalogue and device, or 1, 10 and
    100 ms where that was not measured.
    """
    indexes = list(dict.fromkeys(cell.index for cell in cells))
    head = ["items", "K", "p50 at most", *indexes]
    rows = []
    for items, device, interests in dict.fromkeys((cell.items, cell.device, cell.interests) for cell in cells):
        here = [cell for cell in cells if (cell.items, cell.device) == (items, device)]
        exact = next((cell.p50_ms for cell in here if (cell.index, cell.interests) == ("exact", 1)), None)
        limits = {f"{x:g} x exact K=1 = {_ms(x * exact)} ms": x * exact for x in LIMITS} if exact else {}
        for name, limit in (limits or {f"{ms} ms": float(ms) for ms in (1, 10, 100)}).items():
            best = [
                _best_recall([c for c in here if (c.index, c.interests) == (index, interests)], limit)
                for index in indexes
            ]
            rows.append([_items(items, device), str(interests), name, *best])
    return head, rows


def build_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """What indexes cost before the first search: see `BUILD_HEAD`."""
    built = {(c.items, c.device, c.index): c for c in cells if c.build_seconds is not None}
    return [
        [_items(c.items, c.device), c.index, f"{c.build_seconds:.1f}", f"{(c.index_bytes or 0) / 1e6:,.1f}"]
        for c in built.values()
    ]


BUILD_HEAD = ["items", "index", "build s", "MB"]


def left_out_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """What has not been measured and why: see `LEFT_OUT_HEAD`."""
    reasons: dict[tuple[str, str, str, str], list[int]] = {}
    for cell in cells:
        if cell.left_out:
            key = (_items(cell.items, cell.device), cell.index, cell.parameters or "-", cell.left_out)
            reasons.setdefault(key, []).append(cell.interests)
    return [[*key[:3], ", ".join(map(str, interests)), key[3]] for key, interests in reasons.items()]


LEFT_OUT_HEAD = ["items", "index", "parameters", "K", "why"]


def headline(cells: Sequence[Cell]) -> list[str]:
    """What four interests cost beside one on the exact index, a sentence a catalogue and device."""
    exact = {(c.items, c.device, c.interests): c for c in cells if c.index == "exact" and c.p50_ms is not None}
    lines = []
    for (items, device, interests), one in exact.items():
        four = exact.get((items, device, 4))
        if interests == 1 and four is not None:
            ratio = _ratio(four.p99_ms, one.p99_ms)
            few = f"of K=1 (no p99 below {MIN_CALLS_P99} calls)"
            p99 = few if ratio == "-" else f"and {ratio} times the p99 of K=1"
            p50 = _ratio(four.p50_ms, one.p50_ms)
            lines.append(f"{_items(items, device)} items, exact: K=4 takes {p50} times the p50 {p99}.")
    return lines


def terminal_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The shortest table that tells what soft search costs: see `TERMINAL_HEAD`."""
    shown = shown_cells(cells)
    pairs = zip(cost_rows(shown), batch_rows(shown), strict=True)
    return [[*alone[:6], alone[7], together[3]] for alone, together in pairs]


TERMINAL_HEAD = ["items", "index", "K", "recall", "p50 ms", "p99 ms", "p99 / K=1", "users/s"]


def tables(settings: LabSettings, cells: Sequence[Cell]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a lab: title, titles of the columns, rows."""
    shown = shown_cells(cells)
    return [
        ("What soft search costs: one user at a time", COST_HEAD, cost_rows(shown)),
        (f"What soft search costs: batches of {settings.batch} users", BATCH_HEAD, batch_rows(shown)),
        ("Recall at equal latency", *recall_rows(cells)),
        ("Building", BUILD_HEAD, build_rows(cells)),
        ("Left out", LEFT_OUT_HEAD, left_out_rows(cells)),
    ]


def markdown_report(
    command: str, settings: LabSettings, cells: Sequence[Cell], figures: Sequence[str], table: str
) -> str:
    """The report of a lab.

    Args:
        command: the command line that writes it.
        settings: of the lab.
        cells: what was measured.
        figures: names of the pictures beside the report.
        table: name of the file beside the report that holds all cells.
    """
    parts = [
        "# Latency of retrieval",
        f"Written by `{command}`. All cells are in `{table}`.",
        "Items and queries are synthetic unit vectors from a mixture of Gaussians with about sqrt(items) clusters; the "
        "K queries of a user lie near K different clusters. A call is one search of all queries of a user, or of a "
        "batch of users, and the merge of their lists: an item's score is its best over the K queries. Recall is the "
        f"share of the exact merged list of {settings.k} items that was found. A p99 is given from {MIN_CALLS_P99} "
        "calls on, and is `-` where the time of a cell ended before.",
        f"An approximate index is shown with the fastest parameter whose recall at K={shown_interests(cells)} is at "
        f"least {GOOD_RECALL}, or else with that of the best recall. The limits of *recall at equal latency* are on "
        "the p50 of one user's search.",
        *headline(cells),
        *(f"![{name}]({name.replace(' ', '%20')})" for name in figures),
    ]
    for title, head, body in tables(settings, cells):
        parts += [f"## {title}", markdown_table(head, body) if body else "Nothing."]
    values = {name: _plain(value) for name, value in asdict(settings).items()} | machine()
    parts += ["## How it was measured", markdown_table(["", ""], [[name, value] for name, value in values.items()])]
    return "\n\n".join(parts) + "\n"


def _key(cell: Cell) -> tuple[int, str, str, str]:
    return cell.items, cell.device, cell.index, cell.parameters


def _p50(cell: Cell) -> float:
    return float("inf") if cell.p50_ms is None else cell.p50_ms


def _best_recall(cells: Sequence[Cell], limit: float) -> str:
    within = [cell for cell in cells if cell.recall is not None and _p50(cell) <= limit]
    if not within:
        return "-"
    best = max(within, key=lambda cell: (cell.recall or 0.0, -_p50(cell)))
    return f"{_recall(best)} ({best.parameters})" if best.parameters else _recall(best)


def _name(cell: Cell) -> list[str]:
    return [_items(cell.items, cell.device), f"{cell.index} {cell.parameters}".strip(), str(cell.interests)]


def _items(items: int, device: str) -> str:
    return f"{items:,}" if device == "cpu" else f"{items:,} ({device})"


def _recall(cell: Cell) -> str:
    return "-" if cell.recall is None else f"{cell.recall:.3f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.2f}"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
