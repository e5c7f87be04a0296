"""The latency lab: what soft search costs, and what approximate indexes gain and lose, on synthetic catalogues.

SPARC (arXiv:2508.09090) searches several interest vectors a user and leaves open what that costs beside one vector.
Axis letters: B users of a batch, K interest queries a user, I items, U users, D width.
"""

import importlib.metadata
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from recsys_lightning.analysis.latency_catalogue import Catalogue, synthetic_catalogue
from recsys_lightning.analysis.latency_plan import HNSW_LINKS, Cell, LabSettings, index_settings, planned_cells
from recsys_lightning.analysis.latency_timing import Search, Timing, time_in_turns
from recsys_lightning.errors import InputError
from recsys_lightning.retrieval.build import IndexSettings, build_index
from recsys_lightning.retrieval.index import ItemIndex
from recsys_lightning.retrieval.soft_search import max_merge, soft_search

Say = Callable[[str], None]


def measure(settings: LabSettings, say: Say) -> Iterator[Cell]:
    """Measure a lab cell by cell.

    Args:
        settings: what to measure.
        say: told what is being done.

    Returns:
        The cells of `planned_cells`, each once, in that order.

    Raises:
        InputError: FAISS is needed and not installed.
    """
    planned = planned_cells(settings)
    if set(settings.indexes) != {"exact"}:  # what is not installed shows now, not after the first catalogue
        try:
            build_index(torch.eye(2), IndexSettings(backend="faiss"), "inner_product")
        except InputError as error:
            raise InputError(f"--indexes other than exact are made by FAISS: {error}") from error
    for items in sorted(set(settings.items)):
        here = [cell for cell in planned if cell.items == items]
        if (short := _short_of_memory(4 * items * settings.dim)) is not None:
            yield from (replace(cell, left_out=f"the vectors alone need {short}") for cell in here)
            continue
        say(f"{items:,} items: drawing")
        catalogue = synthetic_catalogue(items, settings.users, max(settings.interests), settings.dim, settings.seed)
        say(f"{items:,} items: exact answers, which recall is measured against")
        truth = _exact_lists(catalogue, settings)
        for device in settings.devices:
            for kind in dict.fromkeys(settings.indexes):
                group = [cell for cell in here if (cell.device, cell.index) == (device, kind)]
                yield from _measure_index(group, catalogue, truth, settings, say)


def _exact_lists(catalogue: Catalogue, settings: LabSettings) -> dict[int, Tensor]:
    """For each number of interests, the exact merged lists (U, k), from one search of all queries."""
    device = settings.devices[-1]
    lists: dict[int, list[Tensor]] = {interests: [] for interests in settings.interests}
    with threadpool_limits(os.cpu_count()):  # nothing is timed here
        index = build_index(catalogue.vectors.to(device), IndexSettings(), "inner_product")
        for queries in torch.split(catalogue.queries.to(device), settings.batch):  # (B, K, D)
            found = index.search(queries.flatten(0, 1), settings.k)
            scores, ids = (part.view(*queries.shape[:2], -1) for part in found)  # (B, K, N)
            for interests, parts in lists.items():
                merged = max_merge(scores[:, :interests], ids[:, :interests], settings.k)
                parts.append(merged.first(settings.k).item_ids.cpu())
    return {interests: torch.cat(parts) for interests, parts in lists.items()}


def _measure_index(
    cells: list[Cell], catalogue: Catalogue, truth: dict[int, Tensor], settings: LabSettings, say: Say
) -> Iterator[Cell]:
    """The cells of one index on one catalogue."""
    items, device, kind = cells[0].items, cells[0].device, cells[0].index
    name = f"{items:,} items, {kind} on {device}"
    if (reason := _refusal(items, device, kind, settings)) is not None:
        yield from (replace(cell, left_out=reason) for cell in cells)
        return
    vectors = catalogue.vectors.to(device) if kind == "exact" else catalogue.vectors  # FAISS asks for arrays
    with tempfile.TemporaryDirectory(prefix="recsys-") as folder:
        file = Path(folder) / "index"
        say(f"{name}: building")
        try:
            with threadpool_limits(settings.threads):
                seconds, num_bytes = _build(vectors, kind, file)
        except OSError as error:
            yield from (replace(cell, left_out=f"it cannot be kept meanwhile: {error}") for cell in cells)
            return
        for parameters in dict.fromkeys(cell.parameters for cell in cells):
            say(f"{name}: searching {parameters}".strip())
            row = [replace(cell, build_seconds=seconds, index_bytes=num_bytes) for cell in cells]
            row = [cell for cell in row if cell.parameters == parameters]
            with threadpool_limits(settings.threads):
                filled = _measure_row(row, _opened(vectors, kind, parameters, file), catalogue, truth, settings)
            yield from filled


def _build(vectors: Tensor, kind: str, file: Path) -> tuple[float, int]:
    """Seconds of building an index and its bytes; one of FAISS is kept in `file`, for `_opened`."""
    started = time.perf_counter()
    index = build_index(vectors, index_settings(kind, len(vectors)), "inner_product")
    seconds = time.perf_counter() - started
    if kind == "exact":
        return seconds, vectors.nbytes
    from recsys_lightning.retrieval.faiss_index import FaissIndex  # where it is asked for only: it may be missing

    if not isinstance(index, FaissIndex):
        raise TypeError(f"{type(index).__name__} is not kept in a file")
    index.write(file)
    return seconds, file.stat().st_size


def _opened(vectors: Tensor, kind: str, parameters: str, file: Path) -> ItemIndex:
    """A built index, to be searched with these parameters."""
    settings = index_settings(kind, len(vectors))
    if kind == "exact":
        return build_index(vectors, settings, "inner_product")
    from recsys_lightning.retrieval.faiss_index import FaissIndex

    return FaissIndex(vectors, "inner_product", settings.factory, parameters, file=file)


def _measure_row(
    cells: list[Cell], index: ItemIndex, catalogue: Catalogue, truth: dict[int, Tensor], settings: LabSettings
) -> list[Cell]:
    """The cells of one index and one parameter, from few interests to many."""
    device = index.vectors.device
    finish = torch.cuda.synchronize if device.type == "cuda" else None
    queries = catalogue.queries.to(device)
    users = torch.arange(settings.users, device=device)
    num_batches = math.ceil(settings.users / settings.batch)
    places = torch.arange(num_batches * settings.batch, device=device)  # whole batches: the last begins again

    def timed(rows: Sequence[Tensor]) -> list[Timing]:
        searches = [_searches(index, queries[:, : cell.interests], rows, settings.k) for cell in cells]
        return time_in_turns(searches, len(rows), settings.repeats, settings.seconds, finish)

    alone, together = timed(torch.split(users, 1)), timed(torch.split(places % settings.users, settings.batch))
    return [
        with_timings(cell, one, batch, truth[cell.interests], settings)
        for cell, one, batch in zip(cells, alone, together, strict=True)
    ]


def _searches(index: ItemIndex, queries: Tensor, rows: Sequence[Tensor], k: int) -> Search:
    """Soft search of the users of one entry of `rows`, by its number."""
    ready = [queries[row].contiguous() for row in rows]  # each (B, K, D)
    log_probs = [queries.new_zeros(len(row), queries.shape[1]) for row in rows]  # ComiRec's rule does not look at them
    return lambda number: soft_search(index, ready[number], log_probs[number], k).first(k).item_ids


def with_timings(cell: Cell, alone: Timing, together: Timing, truth: Tensor, settings: LabSettings) -> Cell:
    """The cell with what was seen of it one user at a time and in batches; `truth` are the exact lists (U, k)."""
    batches = together.calls_per_second
    users_per_second = None if batches is None else batches * settings.batch
    reasons = {"one user": alone.gave_up, "a batch": together.gave_up}
    return replace(
        cell,
        recall=list_recall(alone.answers, truth),
        recall_users=len(alone.answers),
        p50_ms=alone.percentile(50),
        p99_ms=alone.percentile(99),
        calls=len(alone.seconds),
        batch_p50_ms=together.percentile(50),
        batch_p99_ms=together.percentile(99),
        batch_calls=len(together.seconds),
        users_per_second=users_per_second,
        queries_per_second=None if users_per_second is None else users_per_second * cell.interests,
        left_out="; ".join(f"{form}: {reason}" for form, reason in reasons.items() if reason),
    )


def list_recall(answers: dict[int, Tensor], truth: Tensor) -> float | None:
    """Share of the exact lists (U, k) that is in the lists (1, k) of the users who were answered; None without any."""
    if not answers:
        return None
    found = torch.cat(list(answers.values())).cpu()  # (U', k)
    wanted = truth[list(answers)]
    return float((wanted[:, :, None] == found[:, None, :]).any(-1).float().mean())


def _refusal(items: int, device: str, kind: str, settings: LabSettings) -> str | None:
    """Why an index is not built, or None."""
    if kind == "hnsw" and items > settings.hnsw_limit:
        return f"building takes too long above --hnsw_limit {settings.hnsw_limit:,} items"
    if kind == "hnsw" and device == "cuda":
        return "FAISS has no HNSW for GPUs"
    if kind == "ivf" and device != ("cuda" if faiss_uses_gpus() else "cpu"):
        return "FAISS takes the GPUs that it sees" if device == "cpu" else "this FAISS is for CPUs, or sees no GPU"
    if kind != "exact":
        row = 4 * settings.dim + 8 + (8 * HNSW_LINKS if kind == "hnsw" else 0)
        if (short := _short_of_memory(items * row)) is not None:
            return f"the index needs {short}"
    return None


def faiss_uses_gpus() -> bool:
    """Whether FAISS is a build for GPUs and there is one."""
    from recsys_lightning.retrieval.faiss_index import DISTRIBUTIONS  # where it is asked for only: it may be missing

    installed = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    return torch.cuda.is_available() and bool(installed & set(DISTRIBUTIONS) - {"faiss-cpu"})


def _short_of_memory(needed: int) -> str | None:
    """`X GB of memory, and Y GB are free` where that is so; where the system does not tell, nothing is short."""
    free = free_memory()
    if free is None or needed <= free:
        return None
    return f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"


def free_memory() -> int | None:
    """Bytes that new objects may take without swapping, on Linux; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] * 1024 if kilobytes else None
