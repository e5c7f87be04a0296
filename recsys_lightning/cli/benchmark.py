"""`recsys benchmark`."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recsys_lightning.cli.output import check_output
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

if TYPE_CHECKING:
    from recsys_lightning.analysis.latency_plan import Cell, LabSettings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"benchmark: {message}; see `recsys benchmark retrieval --help`")


def run(arguments: Sequence[str]) -> None:
    """Measure the latency and the recall of retrieval; write a report, all cells and pictures where asked."""
    given = _parsed(arguments)
    from recsys_lightning.analysis import latency_report as report
    from recsys_lightning.analysis.compare import terminal_table
    from recsys_lightning.analysis.groups import shown_path

    settings = _settings(given)
    if given.output is not None:
        check_output(given.output)
    cells = []
    for cell in _with_progress(settings):
        cells.append(cell)
        if given.output is not None and cell.interests == max(settings.interests):
            # What is measured is kept, whatever happens to the rest.
            _write(given.output.with_suffix(".csv"), report.cells_frame(cells).write_csv().encode())
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no edge to fold at
    console.print(terminal_table("What soft search costs", report.TERMINAL_HEAD, report.terminal_rows(cells)))
    if left_out := report.left_out_rows(cells):
        console.print(terminal_table("Left out", report.LEFT_OUT_HEAD, left_out))
    for line in report.headline(cells):
        console.print(line, markup=False, highlight=False)
    if given.output is None:
        return
    from recsys_lightning.analysis.latency_figure import latency_png, recall_png

    stem = given.output.stem
    pictures = {f"{stem}-latency.png": latency_png(cells), f"{stem}-recall.png": recall_png(cells)}
    for name, picture in pictures.items():
        _write(given.output.with_name(name), picture)
    command = shlex.join(["recsys", *map(shown_path, arguments)])
    text = report.markdown_report(command, settings, cells, list(pictures), f"{stem}.csv")
    _write(given.output, text.encode())


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    from recsys_lightning.analysis.latency_plan import KINDS, LabSettings

    default = LabSettings()
    parser = _Parser(
        prog="recsys benchmark",
        description="Measure the latency, the throughput and the recall of retrieval indexes on synthetic catalogues, "
        "for one and for several interest queries a user.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=("retrieval",), help="what to measure")
    add("--items", nargs="+", type=_count, default=list(default.items), metavar="N", help="sizes of the catalogues")
    add("--interests", nargs="+", type=int, default=list(default.interests), metavar="K", help="queries a user")
    add("--indexes", nargs="+", default=list(default.indexes), metavar="INDEX", help=f"of {', '.join(KINDS)}")
    add("--device", choices=("cpu", "cuda", "both"), help="where to search; both where there is a GPU, else cpu")
    add("--dim", type=int, default=default.dim, help="width of the vectors")
    add("--k", type=int, default=default.k, help="items of a list")
    add("--users", type=int, default=default.users, help="users that are drawn; timed calls go round them")
    add("--batch", type=int, default=default.batch, help="users of a batch")
    add("--repeats", type=int, default=default.repeats, help="timed calls of a cell, one user at a time and in batches")
    add("--seconds", type=float, default=default.seconds, help="limit of the timed calls of a cell, each of the two")
    add("--threads", type=int, default=default.threads, help="of a search and of building an index")
    add("--hnsw_limit", type=_count, default=default.hnsw_limit, metavar="N", help="largest catalogue HNSW is built on")
    add("--seed", type=int, default=default.seed, help="of all that is drawn")
    add("--output", type=Path, help="write this Markdown file, and beside it all cells (.csv) and two pictures (.png)")
    return parser.parse_args(list(arguments[1:]))


def _settings(given: argparse.Namespace) -> "LabSettings":
    import torch

    from recsys_lightning.analysis.latency_plan import LabSettings

    wanted = given.device or ("both" if torch.cuda.is_available() else "cpu")
    if wanted != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {wanted}: torch sees no GPU; leave --device out, or say cpu")
    return LabSettings(
        items=tuple(given.items),
        interests=tuple(given.interests),
        indexes=tuple(given.indexes),
        devices=("cpu", "cuda") if wanted == "both" else (wanted,),
        dim=given.dim,
        k=given.k,
        users=given.users,
        batch=given.batch,
        repeats=given.repeats,
        seconds=given.seconds,
        threads=given.threads,
        hnsw_limit=given.hnsw_limit,
        seed=given.seed,
    )


def _with_progress(settings: "LabSettings") -> Iterator["Cell"]:
    """The cells of a lab, with a bar on standard error."""
    from recsys_lightning.analysis.latency import measure
    from recsys_lightning.analysis.latency_plan import planned_cells

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(planned_cells(settings)))
        for cell in measure(settings, lambda text: progress.update(task, description=text)):
            progress.advance(task)
            yield cell


def _count(text: str) -> int:
    """A whole number, also written as 1e6."""
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(number)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
