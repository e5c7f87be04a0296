"""Where a command writes its report."""

import tempfile
from pathlib import Path

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
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}; choose another folder") from error
