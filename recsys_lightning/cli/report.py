"""`recsys report`."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from recsys_lightning.analysis.report import Opened, ReportSettings, build_report, representatives, shown_names
from recsys_lightning.analysis.report_figures import require_plotly
from recsys_lightning.analysis.report_sources import Source, is_finished, read_source
from recsys_lightning.cli import nearest
from recsys_lightning.cli.output import check_writable, progress_bars, shown_word
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

if TYPE_CHECKING:
    from recsys_lightning.analysis.report_opened import OpenedRun

_LEFT_OUT = "Left out by --without_model."
_LATER = "Computed once the training is over: they need the model and its data."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"report: {message}; see `recsys report --help`")


def run(arguments: Sequence[str]) -> None:
    """Write the report on runs as one HTML file, once or again and again while they train.

    Raises:
        InputError: the command line, a run or the place of the report is at fault.
    """
    given, settings = _parsed(arguments)
    require_plotly()
    output: Path = given.output or _folder(given.runs[0]) / "report.html"
    if given.output is None and not output.parent.is_dir():
        raise InputError(f"no run folder {output.parent}")
    _check_output(output)
    command = shlex.join(["recsys", *map(shown_word, arguments)])
    if given.watch:
        watch(given, settings, output, command, time.sleep)
        return
    write(given, settings, output, command, [read_source(name) for name in given.runs])
    sys.stdout.write(f"written to {output}\n")


def watch(
    given: argparse.Namespace,
    settings: Sequence[str],
    output: Path,
    command: str,
    sleep: Callable[[float], None],
) -> None:
    """Write the report anew every few seconds until all runs are finished, then once more, whole.

    Args:
        given: the command line.
        settings: of the runs, on it.
        output: the file.
        command: that the report names.
        sleep: waits for so many seconds.
    """
    sys.stdout.write(f"open {output} in a browser; Ctrl+C ends this, the training goes on\n")
    sys.stdout.flush()
    while not all(is_finished(_folder(name)) for name in given.runs):
        sources = [read_source(name, live=True) for name in given.runs]
        write(given, settings, output, command, sources, refresh=given.interval)
        sleep(given.interval)
    write(given, settings, output, command, [read_source(name, live=True) for name in given.runs])
    sys.stdout.write(f"the training is over; written to {output}\n")


def write(
    given: argparse.Namespace,
    settings: Sequence[str],
    output: Path,
    command: str,
    sources: Sequence[Source],
    refresh: int | None = None,
) -> None:
    """Write the report once.

    Args:
        given: the command line.
        settings: of the runs, on it.
        output: the file.
        command: that the report names.
        sources: the runs.
        refresh: seconds until it is written again; None for the last time, which alone opens the models.
    """
    folders = {source.run.folder.resolve() for source in sources}
    if len(folders) < len(sources):
        raise InputError("report: one run is named twice")
    wanted = ReportSettings(
        title=given.title or _title(sources),
        k=given.k,
        users=given.users,
        examples=given.examples,
        cards=given.cards,
        seed=given.seed,
    )
    with progress_bars() as say:
        opened: Opened | str
        if refresh is not None:
            opened = _LATER
        elif given.without_model:
            opened = _LEFT_OUT
        else:
            opened = _opened(sources, given, settings, say)
        html = build_report(sources, wanted, opened, say, command, refresh)
    with replacing(output) as file:
        file.write(html.encode())
    for line in opened.remarks if isinstance(opened, Opened) else ():
        sys.stderr.write(f"recsys: warning: {line}\n")


def _parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command, and those that are settings of the runs."""
    parser = _Parser(
        prog="recsys report",
        description="Write one HTML file on runs, to look at and to send: it opens from disk and needs no network.",
        epilog="Any other --KEY VALUE with a dot in it, such as --data.raw_dir DIR, changes a setting of the runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    defaults = ReportSettings()
    add("runs", nargs="+", metavar="RUN", help="folders that `recsys fit` wrote; seeds of one setting are one row")
    add("--output", type=Path, help="the file; None is report.html in the first run's folder")
    add("--title", help="of the page; None names the runs")
    add("--without_model", action="store_true", help="leave out what needs the data and the models: quick")
    add("--watch", action="store_true", help="write it again and again while the runs train")
    add("--interval", type=int, default=10, help="seconds between two reports of --watch")
    add("--k", type=int, default=defaults.k, help="cut-off of slices, lists and plots")
    add("--users", type=int, default=defaults.users, help="test users drawn for recall and diversity")
    add("--examples", type=int, default=defaults.examples, help="example users")
    add("--cards", type=int, default=defaults.cards, help="code cards a level, of the largest codes")
    add("--seed", type=int, default=defaults.seed, help="of all that is drawn")
    add("--ckpt_path", default="best", help="checkpoint: best, last or a file")
    add("--device", choices=("cpu", "cuda"), help="where to compute; None is the GPU where there is one")
    given, rest = parser.parse_known_args(list(arguments[1:]))
    for word in rest:
        if word.startswith("-") and "." not in word.partition("=")[0]:
            known = [option for action in parser._actions for option in action.option_strings]
            raise InputError(f"report: no option {word!r}{nearest(word, known)}; see `recsys report --help`")
    if rest and not rest[0].startswith("--"):
        raise InputError(f"report: {rest[0]!r} is the value of no option; name the runs first")
    for name, least in (("interval", 1), ("seed", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)}: must be {least} or more")
    return given, rest


def _folder(name: str) -> Path:
    path = Path(name)
    return path.parent if path.suffix == ".json" else path


def _check_output(output: Path) -> None:
    """Refuse now what could not be written minutes later.

    Raises:
        InputError: it is no name of an HTML file, or its folder cannot be written to.
    """
    if output.suffix != ".html" or output.is_dir():
        raise InputError(f"--output {output} must be a file that ends in .html")
    check_writable(output)


def _title(sources: Sequence[Source]) -> str:
    names = shown_names(sources)
    return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more runs"


def _opened(
    sources: Sequence[Source], given: argparse.Namespace, settings: Sequence[str], say: Callable[[str, int, int], None]
) -> Opened:
    """The first run of each group, ready to be computed with; one that cannot be opened is named and left out."""
    import torch

    from recsys_lightning.analysis.report_opened import open_reported
    from recsys_lightning.cli.audit import open_run
    from recsys_lightning.cli.messages import while_running

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; leave --device out, or say cpu")
    chosen = representatives(sources)
    names = {source.run.folder: name for name, source in zip(shown_names(sources), sources, strict=True)}
    runs: list[OpenedRun] = []
    remarks: list[str] = []
    for at, source in enumerate(chosen):
        say("opening runs", at, len(chosen))
        name = names[source.run.folder]
        try:
            trained = open_run(source.run.folder, [*settings, "--ckpt_path", given.ckpt_path])
            runs.append(open_reported(name, source, trained, device))
        except Exception as error:
            line = str(error) if isinstance(error, InputError) else while_running(error)
            if line is None:
                raise
            remarks.append(f"{name} could not be opened, so what needs its model is missing: {line}")
    say("opening runs", len(chosen), len(chosen))
    return Opened(runs, remarks)
