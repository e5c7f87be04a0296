"""`recsys compare`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from recsys_lightning.analysis import compare
from recsys_lightning.analysis.groups import group_runs, load_run, shown_path, warnings
from recsys_lightning.analysis.published import TABLE_2, published_rows, standing
from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"compare: {message}; see `recsys compare --help`")


def run(arguments: Sequence[str]) -> None:
    """Print a table of runs and a paired test; write them as Markdown, CSV and a picture where asked."""
    given = _parsed(arguments)
    from recsys_lightning.analysis import paired
    from recsys_lightning.analysis.user_values import all_values

    groups = group_runs([load_run(name) for name in given.runs])
    baseline = paired.find_baseline(groups, given.baseline).name
    measured = compare.rows(groups, given.stage, given.metrics)
    table = measured + (published_rows(given.published, given.metrics) if given.published else [])
    known, remarks = all_values(groups, given.stage, given.metrics)
    tests, unpaired = paired.paired_tests(known, baseline, given.resamples, given.seed)
    remarks = warnings(groups) + remarks + unpaired
    if tests:
        numbers = {"resamples": given.resamples, "seed": given.seed, "tests": len(tests)}
        remarks += [note.format(**numbers, smallest=given.resamples + 1) for note in paired.NOTES]
    if given.published:
        remarks += [line for group in groups if (line := standing(group, given.published))]

    head, body, bold = compare.header(given.metrics), compare.body(table), compare.best_cells(table, given.metrics)
    pairs = paired.paired_body(measured, given.metrics, baseline, tests) if tests else []
    heading = f"Difference from {baseline}, over the same users"
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no edge to fold at
    console.print(compare.terminal_table(given.title, head, body, bold))
    if pairs:
        console.print(compare.terminal_table(heading, paired.PAIRED_HEADER, pairs))
    for remark in remarks:
        console.print(remark.replace("**", "").replace("`", ""), markup=False, highlight=False)
    if given.output is None:
        return

    from recsys_lightning.analysis.figures import comparison_png

    intervals = paired.user_intervals(known, given.resamples, given.seed)
    picture = comparison_png(given.title, table, given.metrics, intervals)
    image = given.output.with_suffix(".png")
    parts = [compare.markdown_table(head, body, bold), f"![{given.title}]({image.name.replace(' ', '%20')})"]
    if pairs:
        parts += [f"## {heading}", compare.markdown_table(paired.PAIRED_HEADER, pairs)]
    command = shlex.join(["recsys", *map(shown_path, arguments)])
    report = compare.markdown_report(given.title, command, groups, parts, remarks)
    csv = paired.csv_text(measured, given.metrics, baseline, tests)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((image, picture), (given.output.with_suffix(".csv"), csv), (given.output, report)):
        with replacing(path) as file:
            file.write(content if isinstance(content, bytes) else content.encode())


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="recsys compare", description="Put the results of runs into one table, with a paired test.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders, or their results.json; seeds of one setting are one row"
    )
    parser.add_argument("--stage", choices=("test", "val"), default="test", help="which metrics (default: %(default)s)")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=list(compare.DEFAULT_METRICS),
        help="any of results.json without the stage, such as tail/recall@10 (default: %(default)s)",
    )
    parser.add_argument("--baseline", metavar="RUN", help="what the others are tested against (default: the first run)")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        help="also write this Markdown file, and beside it the numbers (.csv) and a picture (.png)",
    )
    parser.add_argument("--title", default="Comparison of runs", help="of the table")
    parser.add_argument("--published", choices=sorted(TABLE_2), help="add the paper's rows for a data set")
    given = parser.parse_args(list(arguments[1:]))
    if given.published and given.stage != "test":
        parser.error("the paper prints test metrics: --published goes with --stage test")
    if given.resamples < 100:
        parser.error(f"--resamples {given.resamples}: an interval needs at least 100")
    if given.seed < 0:
        parser.error(f"--seed {given.seed}: must be 0 or more")
    if len(set(given.metrics)) < len(given.metrics):
        parser.error(f"--metrics {' '.join(given.metrics)}: one is named twice")
    if given.output is not None:
        if given.output.suffix in (".csv", ".png"):
            parser.error(f"--output {given.output}: name the Markdown file; its .csv and .png are written beside it")
        from recsys_lightning.analysis.figures import require_matplotlib

        require_matplotlib()  # before the work, not after it
    return given
