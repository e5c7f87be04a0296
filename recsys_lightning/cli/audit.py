"""`recsys audit`."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from recsys_lightning.analysis.audit import REPORT, TrainedRun, audit, write_report
from recsys_lightning.analysis.audit_check import Check
from recsys_lightning.cli import nearest
from recsys_lightning.cli.messages import while_running
from recsys_lightning.cli.trainer import run as run_command
from recsys_lightning.errors import InputError
from recsys_lightning.training.tokenizer import FILE_NAME, TokenizerModule

_HELP = f"""usage: recsys audit RUN [RUN ...] [options]

Check that runs have learned nothing from their validation and test items. Each RUN is a folder that `recsys fit` wrote.
Data and model are built from its config.yaml, once as they are and once with other items in the place of the held-out
answers; nothing that training reads may change. One line a check: pass, FAIL or not checked; the same as RUN/{REPORT}.

The exit status is 0 if no check fails, 1 if one does, 2 if a run cannot be audited.

options, given after the runs:
  -h, --help          show this text
  --ckpt_path PATH    the checkpoint: best, last or a file (default: best)
  --KEY VALUE         change any other setting, such as --data.raw_dir DIR
"""


def run(arguments: Sequence[str]) -> None:
    """Audit runs and print what was found.

    Raises:
        InputError: a run cannot be audited.
        SystemExit: with status 1, a check has failed.
    """
    words = list(arguments[1:])
    if {"-h", "--help"} & set(words):
        sys.stdout.write(_HELP)
        return
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    if not names:
        raise InputError("audit: name a run folder, before any options; see `recsys audit --help`")
    folders = [run_folder(name) for name in names]
    found = [check for folder in folders for check in _audited(folder, words[len(names) :])]
    if any(check.status == "FAIL" for check in found):
        raise SystemExit(1)


def _audited(folder: Path, options: Sequence[str]) -> list[Check]:
    """Audit one run, printing each check as it is made."""
    opened = open_run(folder, options)
    sys.stdout.write(f"{folder}\n")
    checks: list[Check] = []
    try:
        for check in audit(opened, *_tokenizer_of(opened)):
            sys.stdout.write(f"{check}\n")
            sys.stdout.flush()
            checks.append(check)
    except Exception as error:
        line = while_running(error)
        if line is None:
            raise
        raise InputError(f"{folder}: {line}") from error
    count = {status: [c.name for c in checks if c.status == status] for status in ("pass", "FAIL", "not checked")}
    named = {status: f" ({', '.join(names)})" if status != "pass" and names else "" for status, names in count.items()}
    parts = (f"{len(names)} {status}{named[status]}" for status, names in count.items())
    sys.stdout.write(f"{', '.join(parts)}; written to {write_report(opened, checks)}\n")
    return checks


def run_folder(name: str) -> Path:
    """The folder of a run, by its name on the command line.

    Raises:
        InputError: there is none, or it is no run's.
    """
    folder = Path(name)
    if not folder.is_dir():
        near = [str(path) for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise InputError(f"no run folder {folder}{nearest(name, near, cutoff=0.8)}")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} holds no config.yaml: it is no run that `recsys fit` wrote")
    return folder


def open_run(folder: Path, options: Sequence[str] = ()) -> TrainedRun:
    """What the settings of a run build.

    Args:
        folder: that `recsys fit` wrote.
        options: further words of a command line, such as ``--data.raw_dir DIR``; they win.

    Raises:
        InputError: the settings or the checkpoint cannot be read.
    """
    config = folder / "config.yaml"
    # config.yaml of a resumed fit names the checkpoint that it went on from.
    settings = ["-c", str(config), "--run_dir", str(folder), "--ckpt_path", "best", *options]
    try:
        built = run_command(["audit", *settings])
    except InputError as error:
        raise InputError(f"{error}" if str(config) in str(error) else f"{config}: {error}") from error
    given = built.config[built.subcommand]
    if isinstance(built.model, TokenizerModule):
        table = folder / FILE_NAME
        table_of_run = table if table.is_file() else None
    else:
        table_of_run = next(_semantic_ids(given.as_dict()["model"]), None)
    return TrainedRun(folder, built.model, built.datamodule, Path(given.ckpt_path), table_of_run)


def _semantic_ids(node: Any) -> Iterator[Path]:
    """The files that a configuration names as ``semantic_ids``."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if key == "semantic_ids" and isinstance(value, (str, Path)):
            yield Path(value)
        yield from _semantic_ids(value)


def _tokenizer_of(run: TrainedRun) -> tuple[TrainedRun | None, str]:
    """The run in whose folder the semantic IDs of this one lie; or None, and why there is none that can be asked."""
    if run.semantic_ids is None or isinstance(run.module, TokenizerModule):
        return None, ""
    folder = run.semantic_ids.parent
    missing = [name for name in ("config.yaml", "checkpoints/best.ckpt") if not (folder / name).is_file()]
    if missing:
        return None, f"{folder} holds no {' and no '.join(missing)}"
    try:
        return open_run(folder), ""
    except InputError as error:
        return None, f"the run in {folder} cannot be opened: {error}"
