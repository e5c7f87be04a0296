"""`recsys study`."""

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from rich.console import Console

from recsys_lightning.cli import nearest
from recsys_lightning.cli.output import check_output, progress_bars, shown_word
from recsys_lightning.cli.studies import STUDIES, count, natural
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing

if TYPE_CHECKING:
    from recsys_lightning.analysis.audit import TrainedRun
    from recsys_lightning.analysis.study_report import Findings, Opened

T = TypeVar("T")

_HELP = f"""usage: recsys study NAME RUN [RUN ...] --output FILE.md [options]

Analyse trained runs of COBRA, SPARC and tokenizers. A study writes a report, its numbers (.csv) and pictures (.png).

studies:
{chr(10).join(f"  {name:<16}{study.line}" for name, study in STUDIES.items())}

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
    runs = _opened(name, given, settings)
    with progress_bars() as progress:
        findings = STUDIES[name].make(runs, given, progress)
    seconds = time.perf_counter() - started
    _show(findings)
    _write(findings, given.output, shlex.join(["recsys", *map(shown_word, arguments)]), runs, seconds)


def _parsed(name: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a study, and those that are settings of the runs."""
    study = STUDIES[name]
    parser = _Parser(
        prog=f"recsys study {name}",
        description=f"{study.line[0].upper()}{study.line[1:]}.",
        epilog="Any other --KEY VALUE with a dot in it, such as --data.raw_dir DIR, changes a setting of the runs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    folder = "folder that `recsys fit` wrote"
    if study.several is None:
        add("runs", nargs=1, metavar="RUN", help=folder)
    else:
        add("runs", nargs="+", metavar="RUN", help=f"{folder}; {study.several}")
    add("--output", type=Path, required=True, help="the report, a Markdown file; other files are written beside it")
    add("--ckpt_path", default="best", help="checkpoint: best, last or a file")
    add("--device", choices=("cpu", "cuda"), help="where to compute; the GPU where there is one")
    if study.draws != "nothing":
        add("--seed", type=natural, default=0, help="of all that is drawn")
    if study.draws == "users":
        add("--users", type=count, help="draw so many users of each split instead of taking all")
    study.add(add)
    given, rest = parser.parse_known_args(list(words))
    for word in rest:
        if word.startswith("-") and "." not in word.partition("=")[0]:
            known = [option for action in parser._actions for option in action.option_strings]
            raise InputError(f"study {name}: no option {word!r}{nearest(word, known)}; see `{parser.prog} --help`")
    if rest and not rest[0].startswith("--"):
        raise InputError(f"study {name}: {rest[0]!r} is one run too many, or the value of no option")
    return given, rest


def _opened(name: str, given: argparse.Namespace, settings: Sequence[str]) -> "list[Opened]":
    """The runs, ready to be studied."""
    import torch

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU; leave --device out, or say cpu")
    kinds = STUDIES[name].kinds
    if kinds is None:
        return _coded(given, settings, device)
    from recsys_lightning.analysis.study_run import open_studied

    wanted = kinds()
    return [_open(run, given.ckpt_path, settings, lambda of: open_studied(of, wanted, device)) for run in given.runs]


def _coded(given: argparse.Namespace, settings: Sequence[str], device: str) -> "list[Opened]":
    """What was named to study the codes of: runs of recommenders and tokenizers, and files of semantic IDs."""
    from recsys_lightning.analysis.codes_run import CodedRun, coded_file, open_coded

    def opened(run: str | Path, checkpoint: str) -> CodedRun:
        return _open(run, checkpoint, settings, lambda of: open_coded(of, device))

    if given.before and len(given.runs) > 1:
        raise InputError("--before sets a checkpoint of one run before it: name one run, or leave --before out")
    files = [Path(run) for run in given.runs if Path(run).is_file()]
    if given.before and files:
        raise InputError(f"--before sets a checkpoint of a run before it, and {files[0]} is a file of semantic IDs")
    runs: dict[str, CodedRun] = {run: opened(run, given.ckpt_path) for run in given.runs if Path(run) not in files}
    lender = next(iter(runs.values()), None)
    found: list[CodedRun] = [opened(given.runs[0], given.before)] if given.before else []
    for run in given.runs:
        if run in runs:
            found.append(runs[run])
            continue
        own = Path(run).parent
        if (own / "config.yaml").is_file():
            found.append(coded_file(Path(run), opened(own, "best")))
        elif lender is not None:
            found.append(coded_file(Path(run), lender))
        else:
            raise InputError(f"{run} lies in no run folder: name a run on the same data beside it, for its items")
    if len({run.name for run in found}) < len(found):  # checkpoints of one run
        found = [dataclasses.replace(run, name=f"{run.name} ({run.checkpoint})") for run in found]
    return [*found]


def _open(run: str | Path, checkpoint: str, settings: Sequence[str], of: Callable[["TrainedRun"], T]) -> T:
    """What `of` makes of a run folder, with the folder's name before whatever is wrong with it."""
    from recsys_lightning.cli.audit import open_run, run_folder
    from recsys_lightning.cli.messages import while_running

    folder = run_folder(str(run))
    try:
        return of(open_run(folder, [*settings, "--ckpt_path", checkpoint]))
    except Exception as error:
        line = while_running(error)
        if line is None:
            raise
        raise InputError(line if str(folder) in line else f"{folder}: {line}") from error


def _show(findings: "Findings") -> None:
    from recsys_lightning.analysis.compare import terminal_table

    console = Console(width=None if sys.stdout.isatty() else 200)  # a file has no edge to fold at
    for table in findings.tables:
        console.print(terminal_table(table.title, table.head, table.body))
    for remark in findings.remarks:
        console.print(remark, markup=False, highlight=False)


def _write(findings: "Findings", output: Path, command: str, runs: "Sequence[Opened]", seconds: float) -> None:
    from recsys_lightning.analysis.study_report import markdown

    report = markdown(findings, output.stem, command, runs, seconds)
    beside = {**findings.pictures, **findings.files}
    contents = {output.with_name(output.stem + ending): content for ending, content in beside.items()}
    for path, content in (*contents.items(), (output, report.encode())):  # the report last: it names the others
        with replacing(path) as file:
            file.write(content)
    sys.stdout.write(f"written to {output}\n")
