"""`recsys study`."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from recsys_lightning.cli import nearest
from recsys_lightning.cli.output import check_output
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

if TYPE_CHECKING:
    from recsys_lightning.analysis.study_report import Findings
    from recsys_lightning.analysis.study_run import StudiedRun

STUDIES = {
    "fusion": "recall and diversity of BeamFusion over M, tau, psi and the mode, without training again",
    "cosines": "how near item vectors are within and between semantic IDs, and pictures of them",
    "learned-fusion": "tau and psi as functions of the user, learned on the training split, against fixed ones",
}

_HELP = f"""usage: recsys study NAME RUN [RUN ...] --output FILE.md [options]

Analyse trained COBRA runs. A study writes a report, its numbers (.csv) and its pictures (.png) side by side.

studies:
{chr(10).join(f"  {name:<16}{line}" for name, line in STUDIES.items())}

`recsys study NAME --help` lists the options of a study.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog.removeprefix('recsys ')}: {message}; see `{self.prog} --help`")


def run(arguments: Sequence[str]) -> None:
    """Run one study and write what it found.

    Raises:
        InputError: the command line, a run or the place of the report is at fault.
    """
    words = list(arguments[1:])
    if not words or words[0] in ("-h", "--help"):
        if not words:
            raise InputError(f"study: name one of {', '.join(STUDIES)}; see `recsys study --help`")
        sys.stdout.write(_HELP)
        return
    name = words[0]
    if name not in STUDIES:
        raise InputError(f"study: no study {name!r}; there are {', '.join(STUDIES)}{nearest(name, STUDIES)}")
    given, settings = _parsed(name, words[1:])
    check_output(given.output)
    started = time.perf_counter()
    runs = _opened(given, settings)
    with _progress() as progress:
        findings = _study(name, runs, given, progress)
    seconds = time.perf_counter() - started
    _show(findings)
    _write(findings, given.output, shlex.join(["recsys", *map(_shown, arguments)]), runs, seconds)


def _parsed(name: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a study, and those that are settings of the runs."""
    parser = _Parser(
        prog=f"recsys study {name}",
        description=f"{STUDIES[name][0].upper()}{STUDIES[name][1:]}.",
        epilog="Any other --KEY VALUE with a dot in it, such as --data.raw_dir DIR, changes a setting of the runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    several = name == "cosines"
    add("runs", nargs="+" if several else 1, metavar="RUN", help="folder that `recsys fit` wrote")
    add("--output", type=Path, required=True, help="the report, a Markdown file; other files are written beside it")
    add("--ckpt_path", default="best", help="checkpoint: best, last or a file")
    add("--device", choices=("cpu", "cuda"), help="where to compute; the GPU where there is one")
    add("--seed", type=_natural, default=0, help="of all that is drawn")
    if not several:
        add("--users", type=_count, help="draw so many users of each split instead of taking all")
    _ADD[name](add)
    given, rest = parser.parse_known_args(list(words))
    for word in rest:
        if word.startswith("-") and "." not in word.partition("=")[0]:
            known = [option for action in parser._actions for option in action.option_strings]
            raise InputError(f"study {name}: no option {word!r}{nearest(word, known)}; see `{parser.prog} --help`")
    if rest and not rest[0].startswith("--"):
        raise InputError(f"study {name}: {rest[0]!r} is one run too many, or the value of no option")
    return given, rest


def _add_fusion(add: Callable[..., object]) -> None:
    from recsys_lightning.analysis.study_fusion import BEAMS, PSIS, TAUS

    add("--stage", choices=("val", "test"), default="val", help="whose users")
    add("--k", type=_count, default=50, help="places over which diversity and the recall of the picture are taken")
    add("--beams", type=_count, nargs="+", default=list(BEAMS), metavar="M", help="numbers of beams")
    add("--taus", type=float, nargs="+", default=list(TAUS), metavar="TAU", help="weights of the beam score")
    add("--psis", type=float, nargs="+", default=list(PSIS), metavar="PSI", help="weights of the cosine")


def _add_cosines(add: Callable[..., object]) -> None:
    add("--semantic_ids", type=Path, metavar="FILE", help="take these IDs for all runs, instead of their own")


def _add_learned(add: Callable[..., object]) -> None:
    add("--mode", choices=("global", "per_id"), help="domain of the softmax over cosines; the run's own")
    add("--epochs", type=_count, default=30, help="passes over the training users")
    add("--lr", type=float, default=0.01, help="learning rate")
    add("--hidden", type=_count, default=16, help="width of the network's hidden layer")
    add("--resamples", type=_count, default=10_000, help="of the bootstrap")


_ADD = {"fusion": _add_fusion, "cosines": _add_cosines, "learned-fusion": _add_learned}


def _study(
    name: str, runs: Sequence["StudiedRun"], given: argparse.Namespace, progress: Callable[[str, int, int], None]
) -> "Findings":
    if name == "cosines":
        from recsys_lightning.analysis.study_cosines import cosine_study

        return cosine_study(runs, given.semantic_ids, given.seed, progress)
    if name == "fusion":
        from recsys_lightning.analysis.study_fusion import FusionGrid, fusion_study

        lists = {"beams": tuple(given.beams), "taus": tuple(given.taus), "psis": tuple(given.psis)}
        grid = FusionGrid(**lists, k=given.k, stage=given.stage, users=given.users, seed=given.seed)
        return fusion_study(runs[0], grid, progress)
    from recsys_lightning.analysis.study_learned import Teaching
    from recsys_lightning.analysis.study_learned_report import learned_study

    if given.resamples < 100:
        raise InputError(f"study {name}: --resamples {given.resamples}: an interval needs at least 100")
    teaching = Teaching(epochs=given.epochs, lr=given.lr, hidden=given.hidden, seed=given.seed)
    return learned_study(runs[0], teaching, given.mode, given.users, progress, given.resamples)


def _opened(given: argparse.Namespace, settings: Sequence[str]) -> list["StudiedRun"]:
    """The runs, ready to be studied."""
    import torch

    from recsys_lightning.analysis.study_run import open_cobra
    from recsys_lightning.cli.audit import open_run, run_folder
    from recsys_lightning.cli.messages import while_running

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; leave --device out, or say cpu")
    opened = []
    for folder in [run_folder(name) for name in given.runs]:
        options = [*settings, "--ckpt_path", given.ckpt_path]
        try:
            opened.append(open_cobra(open_run(folder, options), device))
        except Exception as error:
            line = while_running(error)
            if line is None:
                raise
            raise InputError(line if str(folder) in line else f"{folder}: {line}") from error
    return opened


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for each thing that is done."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as shown:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield report


def _show(findings: "Findings") -> None:
    from recsys_lightning.analysis.compare import terminal_table

    console = Console(width=None if sys.stdout.isatty() else 200)  # a file has no edge to fold at
    for table in findings.tables:
        console.print(terminal_table(table.title, table.head, table.body))
    for remark in findings.remarks:
        console.print(remark, markup=False, highlight=False)


def _write(findings: "Findings", output: Path, command: str, runs: Sequence["StudiedRun"], seconds: float) -> None:
    from recsys_lightning.analysis.study_report import markdown

    report = markdown(findings, output.stem, command, runs, seconds)
    beside = {**findings.pictures, **findings.files}
    contents = {output.with_name(output.stem + ending): content for ending, content in beside.items()}
    for path, content in (*contents.items(), (output, report.encode())):  # the report last: it names the others
        with replacing(path) as file:
            file.write(content)
    sys.stdout.write(f"written to {output}\n")


def _shown(word: str) -> str:
    """A word of the command line as a report may show it: without absolute paths, also behind an equals sign."""
    from recsys_lightning.analysis.groups import shown_path

    option, equals, value = word.partition("=")
    return f"{option}={shown_path(value)}" if equals and option.startswith("--") else shown_path(word)


def _natural(text: str) -> int:
    return _whole(text, 0)


def _count(text: str) -> int:
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
    return int(text)
