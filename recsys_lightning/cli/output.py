"""What commands show while they work, and where they write their reports."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from recsys_lightning.errors import InputError


def check_output(output: Path) -> None:
    """Refuse now what could not be written an hour later: a Markdown file with pictures beside it.

    Raises:
        InputError: it is no name of one, its folder cannot be written to, or pictures cannot be drawn.
    """
    from recsys_lightning.analysis.figures import require_matplotlib

    if output.suffix != ".md" or output.is_dir():
        raise InputError(f"--output {output} must be a file that ends in .md")
    require_matplotlib()
    check_writable(output)


def check_writable(output: Path) -> None:
    """Make the folder of a file, and refuse one that nothing can be written to.

    Raises:
        InputError: what is wrong with it.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}; choose another folder") from error


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for each thing that is done, told what it is, and how many of how many steps are done."""
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done)

        yield report


def shown_word(word: str) -> str:
    """A word of the command line as a report may show it: without absolute paths, also behind an equals sign."""
    from recsys_lightning.analysis.groups import shown_path

    option, equals, value = word.partition("=")
    return f"{option}={shown_path(value)}" if equals and option.startswith("--") else shown_path(word)
