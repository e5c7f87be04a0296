"""`recsys compare`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from recsys_lightning.analysis.compare import (
    DEFAULT_METRICS,
    header,
    load_results,
    markdown_report,
    rows,
    terminal_table,
)
from recsys_lightning.analysis.published import TABLE_2, published_rows, standing
from recsys_lightning.errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"compare: {message}; see `recsys compare --help`")


def run(arguments: Sequence[str]) -> None:
    """Print a table of runs; write it as Markdown where asked."""
    parser = _Parser(prog="recsys compare", description="Put the results of runs into one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or their results.json")
    parser.add_argument("--stage", choices=("test", "val"), default="test", help="which metrics (default: %(default)s)")
    parser.add_argument("--metrics", nargs="+", default=list(DEFAULT_METRICS), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="also write this Markdown file, with settings and provenance")
    parser.add_argument("--title", default="Comparison of runs", help="of the table")
    parser.add_argument("--published", choices=sorted(TABLE_2), help="add the paper's rows for a data set")
    given = parser.parse_args(list(arguments[1:]))
    if given.published and given.stage != "test":
        parser.error("the paper prints test metrics: --published goes with --stage test")
    results = [load_results(name) for name in given.runs]
    head, body = header(given.metrics), rows(results, given.stage, given.metrics)
    remarks: list[str] = []
    if given.published:
        body += published_rows(given.published, given.metrics)
        remarks = [standing(result, given.published) for result in results]
    Console().print(terminal_table(given.title, head, body))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["recsys", *arguments])
        given.output.write_text(markdown_report(given.title, command, results, head, body, remarks))
